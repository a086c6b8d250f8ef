"""Decode every picture of data sets, as `gndet check --images` does, and keep what was found."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gndet.config.schema import DataConfig
from gndet.data.datasets.cache import keep_pictures
from gndet.data.datasets.faults import SKIPPABLE, Findings, in_order, several, skipping_unreadable
from gndet.data.datasets.json_parts import processors
from gndet.data.datasets.reading import whole
from gndet.toolbox.check.decoding import Look, Picture, look_at_all
from gndet.toolbox.check.report import Checked

Show = Callable[[str], None]


def look_at_pictures(checked: Checked, data: DataConfig, show: Show, console: Console | None) -> Checked:
    """Decode every picture of a data set.  Returns it with what was found, and the digests of the files.

    One whose pictures are drawn, or whose folder was refused, is returned as it is.
    """
    dataset, title = checked.dataset, f"{checked.which} pictures".strip()
    if checked.folder is None or not checked.has_pictures or not len(dataset.records):
        return checked
    pictures = [Picture(dataset.records.path(i), r.size, data.max_pixels) for i, r in enumerate(dataset.records)]
    ids = [record.image_id for record in dataset.records]
    looks = _with_progress(look_at_all(pictures, processors()), len(pictures), title, show, console)
    looks = sorted(looks, key=lambda look: look.place)  # they end in any order
    found = _faults(looks, pictures, ids)
    records = whole(dataset.records)
    records.note_digests({look.place: int(look.digest[:16] or "0", 16) for look in looks})
    keep_pictures(records, found.listed())
    earlier = [one for one in dataset.findings if not one.code.startswith("picture-")]
    findings = in_order([*earlier, *found.listed()])
    if data.skip_unreadable:
        unreadable = sum(any(code in SKIPPABLE for code, _ in look.faults) for look in looks)
        findings = skipping_unreadable(findings, unreadable, len(pictures), data.max_unreadable)
    notes = (note for note in dataset.notes if "decoded by gndet check" not in note)
    notes = (*notes, f"{several(len(pictures), 'picture')} decoded")
    return checked._replace(dataset=dataset._replace(findings=findings, notes=notes))


def _faults(looks: list[Look], pictures: list[Picture], ids: list[int]) -> Findings:
    """What the pictures showed, and which of them are equal; ids: of the images."""
    found, first_with = Findings(), {}
    for look in looks:
        image_id, path = ids[look.place], pictures[look.place].path
        for code, words in look.faults:
            if code != "file-empty":  # the listing of the folder has told
                found.add(code, f"image {image_id}: {words}", image_id)
        other = first_with.setdefault(look.digest, path) if look.digest else path
        if other != path:
            found.add("picture-twice", f"image {image_id}: {path} is equal to {other}", image_id)
    return found


def _with_progress(items: Iterator[Any], total: int, title: str, show: Show, console: Console | None) -> Iterator[Any]:
    """Pass items on; on a terminal a bar shows how many, else a line at each tenth."""
    if console is None or not console.is_terminal:
        for count, item in enumerate(items, start=1):
            yield item
            if count * 10 // total > (count - 1) * 10 // total:
                show(f"{title}: {count} of {total} decoded")
        return
    columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task)
