"""What `gndet check --images` does: decode every picture of a data set, and keep what that shows."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gndet.config.schema import DataConfig
from gndet.data.datasets.cache import keep_pictures
from gndet.data.datasets.faults import SKIPPABLE, Findings, in_order, several, skipping_unreadable
from gndet.data.workers import usable_cores
from gndet.toolbox.check.decoding import Decoded, PictureFile, decode_all
from gndet.toolbox.check.report import Checked

Show = Callable[[str], None]
Item = TypeVar("Item")


def decode_pictures(checked: Checked, data: DataConfig, show: Show, console: Console | None) -> Checked:
    """Decode every picture of a data set.  Returns the data set with what was found; notes the digests of the files.

    Drawn data sets, and those whose folder was refused, are returned as they are.
    """
    dataset, title = checked.dataset, f"{checked.name} pictures".strip()
    if checked.folder is None or not checked.has_pictures or not len(dataset.records):
        return checked
    records = dataset.records
    pictures = [PictureFile(records.path(i), record.size, data.max_pixels) for i, record in enumerate(records)]
    decoded = list(_with_progress(decode_all(pictures, usable_cores()), len(pictures), title, show, console))
    found = _faults(decoded, pictures, [record.image_id for record in records])
    records.note_digests({i: int(picture.digest[:16] or "0", 16) for i, picture in enumerate(decoded)})
    keep_pictures(records, found.listed())
    earlier = [finding for finding in dataset.findings if not finding.code.startswith("picture-")]
    findings = in_order([*earlier, *found.listed()])
    if data.skip_unreadable:
        unreadable = sum(any(code in SKIPPABLE for code, _ in picture.faults) for picture in decoded)
        findings = skipping_unreadable(findings, unreadable, len(pictures), data.max_unreadable)
    notes = (note for note in dataset.notes if "decoded by gndet check" not in note)
    notes = (*notes, f"{several(len(pictures), 'picture')} decoded")
    return checked._replace(dataset=dataset._replace(findings=findings, notes=notes))


def _faults(decoded: list[Decoded], pictures: list[PictureFile], image_ids: list[int]) -> Findings:
    """Collect the faults of the pictures, and note pictures that are equal."""
    found, first_with = Findings(), {}
    for (faults, digest), picture, image_id in zip(decoded, pictures, image_ids, strict=True):
        path = picture.path
        for code, words in faults:
            if code != "file-empty":  # already found while listing the folder
                found.add(code, f"image {image_id}: {words}", image_id)
        other = first_with.setdefault(digest, path) if digest else path
        if other != path:
            found.add("picture-twice", f"image {image_id}: {path} is equal to {other}", image_id)
    return found


def _with_progress(
    items: Iterator[Item], total: int, title: str, show: Show, console: Console | None
) -> Iterator[Item]:
    """Yield the items, and show progress: a bar on a terminal, else one line per tenth."""
    if console is None or not console.is_terminal:
        for count, item in enumerate(items, start=1):
            yield item
            if count * 10 // total > (count - 1) * 10 // total:
                show(f"{title}: {count} of {total} decoded")
        return
    columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    # no refresh thread: the processes are forked beside it, and would inherit its locks
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(title, total=total)
        for count, item in enumerate(items, start=1):
            yield item
            progress.update(task, completed=count, refresh=count * 100 // total > (count - 1) * 100 // total)
