"""Decode every picture of a data set, in processes that a damaged file may crash; draw a contact sheet.

A process that crashes or hangs on a picture is replaced; the picture is reported, and the others are decoded.
"""

import hashlib
import itertools
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gndet.config.data import DataConfig
from gndet.data.datasets.cache import keep_pictures
from gndet.data.datasets.faults import SKIPPABLE, Fault, Findings, several, skipping_unreadable
from gndet.data.datasets.first_pictures import RANGED, with_range
from gndet.data.datasets.images import Reading, Unusual, read_image
from gndet.data.records import Dataset, Finding
from gndet.data.workers import Death, Failure, map_ahead, usable_cores
from gndet.errors import DataError, in_one_line
from gndet.evaluation.drawing import captioned, draw_ground_truth, draw_objects, grid, placard, shrunk
from gndet.text import printable
from gndet.toolbox.check.report import Checked

TIME_LIMIT = 120.0  # seconds per picture; 100 million pixels take a while
IMAGES, COLUMNS = 16, 4  # of the contact sheet: images, images per row
SIDE = 640  # pixels of the longer side of an image
BARE = ("picture-size", "picture-unrotated")  # drawn without boxes: boxes for another size would be misplaced
BY_READER = ("picture-embedded", "picture-renamed", "picture-unlabeled")  # found without decoding
INVISIBLE = (  # on the sheet
    "image-empty", "crowd", "number-float", "area-missing", "area-wrong", "area-odd", "area-box", "box-none",
    "mask-missing", "picture-mode",
)  # fmt: skip

Show = Callable[[str], None]


class PictureFile(NamedTuple):
    """A picture to decode."""

    path: Path
    size: tuple[int, int] | None  # height, width as in the annotation file
    reading: Reading


class Decoded(NamedTuple):
    """What decoding a picture showed."""

    faults: list[tuple[str, str]]  # code of FAULTS, and words that name the file
    digest: str  # SHA-256 of the file, "" if it cannot be read
    values: tuple[float, float] | None = None  # least and largest, of a picture of more than 8 bits per channel


def decode_pictures(checked: Checked, data: DataConfig, show: Show, console: Console | None) -> Checked:
    """Decode every picture of a data set.  Returns it with the findings, and stores the files' digests in its records.

    Drawn data sets, and those whose folder was refused, are returned as they are.
    """
    dataset, title = checked.dataset, f"{checked.name} pictures".strip()
    if checked.folder is None or not checked.has_pictures or not len(dataset.records):
        return checked
    records: Any = dataset.records  # packed
    reading = Reading.of(data)
    pictures = [PictureFile(records.path(i), record.size, reading) for i, record in enumerate(records)]
    decoded = list(_with_progress(decode_all(pictures, usable_cores()), len(pictures), title, show, console))
    listed = _faults(decoded, pictures, [record.image_id for record in records]).listed()
    found = with_range(listed, [picture.values for picture in decoded if picture.values], reading.pixel_range)
    records.note_digests({i: int(picture.digest[:16] or "0", 16) for i, picture in enumerate(decoded)})
    keep_pictures(records, found)
    ids, merged = {record.image_id for record in records}, Findings()
    merged.take([*(finding for finding in dataset.findings if not _is_replaced(finding, ids)), *found])
    findings = merged.listed()
    if data.skip_unreadable:
        unreadable = sum(any(code in SKIPPABLE for code, _ in picture.faults) for picture in decoded)
        findings = skipping_unreadable(findings, unreadable, len(pictures), data.max_unreadable)
    replaced = ("decoded by gndet check", "data.pixel_range")  # of an earlier check, and of the first pictures
    earlier_notes = (note for note in dataset.notes if not any(words in note for words in replaced))
    notes = (*earlier_notes, f"{several(len(pictures), 'picture')} decoded")
    return checked._replace(dataset=dataset._replace(findings=findings, notes=notes))


def _is_replaced(finding: Finding, ids: set[int]) -> bool:
    """Return whether a finding is of an earlier look at the pictures with these ids, not of the reader."""
    earlier = finding.code.startswith("picture-") and finding.code not in BY_READER
    return earlier and (finding.code in RANGED or not ids.isdisjoint(finding.image_ids))


def _faults(decoded: list[Decoded], pictures: list[PictureFile], image_ids: list[int]) -> Findings:
    """Collect the faults of the pictures, and note pictures that are equal."""
    found, first_with = Findings(), dict[str, Path]()
    for shown, picture, image_id in zip(decoded, pictures, image_ids, strict=True):
        path, digest = picture.path, shown.digest
        for code, words in shown.faults:
            if code != "file-empty":  # already found while listing the folder
                found.add(code, f"image {image_id}: {words}", image_id)
        other = first_with.setdefault(digest, path) if digest else path
        if other != path:
            found.add("picture-twice", f"image {image_id}: {path} is equal to {other}", image_id)
    return found


def _with_progress(
    decoded: Iterator[Decoded], total: int, title: str, show: Show, console: Console | None
) -> Iterator[Decoded]:
    """Pass the pictures on and show progress: a bar on a terminal, otherwise one line per tenth."""
    on_terminal = console is not None and console.is_terminal
    columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    # no refresh thread: processes that are forked while it runs would inherit its locks
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not on_terminal) as progress:
        task = progress.add_task(title, total=total)
        for count, picture in enumerate(decoded, start=1):
            yield picture
            progress.update(task, completed=count, refresh=count * 100 // total > (count - 1) * 100 // total)
            if not on_terminal and count * 10 // total > (count - 1) * 10 // total:
                show(f"{title}: {count} of {total} decoded")


def decode(picture: PictureFile) -> Decoded:
    """Decode a picture.  Returns its faults and its file's hash."""
    faults, unusual = list[tuple[str, str]](), Unusual()
    try:
        with warnings.catch_warnings(action="ignore"):  # anything unusual becomes a fault
            read_image(*picture, unusual)
        faults += [(code, f"{picture.path}: {words}") for code, words in unusual.found]
    except Fault as fault:
        faults.append((fault.code, str(fault)))
    try:
        with picture.path.open("rb") as file:
            return Decoded(faults, hashlib.file_digest(file, "sha256").hexdigest(), unusual.values)
    except OSError:
        return Decoded(faults, "", unusual.values)


def decode_all(
    pictures: Sequence[PictureFile],
    processes: int,
    decoder: Callable[[PictureFile], Decoded] = decode,
    time_limit: float = TIME_LIMIT,
) -> Generator[Decoded, None, None]:
    """Decode pictures in parallel.  Yields what each showed, in order.

    time_limit: seconds per picture.  A picture whose process dies, or is killed for exceeding the limit, gets the fault
    picture-crash.  Raises MachineError if no process can be started.
    """

    def crashed(picture: PictureFile, death: Death, _: int) -> Decoded:
        if death.status is None:  # killed after the time limit
            return _crash(picture, f"took over {time_limit:.0f} s to decode")
        ended = f"by {signal.Signals(-death.status).name}" if death.status < 0 else f"with exit status {death.status}"
        return _crash(picture, f"ended the process that decoded it {ended}")

    results = map_ahead(decoder, pictures, workers=processes, on_death=crashed, time_limit=time_limit)
    with closing(results):
        for picture, result in results:
            yield _crash(picture, result.text.splitlines()[-1]) if isinstance(result, Failure) else result


def _crash(picture: PictureFile, words: str) -> Decoded:
    return Decoded([("picture-crash", f"{picture.path}: {words}")], "")


def contact_sheet(datasets: Sequence[tuple[str, Dataset]]) -> np.ndarray | None:
    """Draw up to IMAGES images, equally many of each data set.

    datasets: (name, data set); the name, if any, starts the captions.  Returns (H, W, 3) uint8, or None if there is no
    image.
    """
    pictures = []
    datasets = [(name, dataset) for name, dataset in datasets if len(dataset.records)]
    for name, dataset in datasets:
        for index, codes in choose_images(dataset, IMAGES // len(datasets)).items():
            shown = [*codes[:2], *([f"and {len(codes) - 2} more"] if len(codes) > 2 else [])]
            file_name = printable(dataset.records[index].file_name)
            caption = "  ".join([f"{name} {file_name}".strip(), *(f"[{code}]" for code in shown)])
            pictures.append(captioned(_drawn(dataset, index), caption))
    return grid(pictures, COLUMNS) if pictures else None


def _drawn(dataset: Dataset, index: int) -> np.ndarray:
    """Draw an image with its objects, without them if its picture has another size, or a placeholder if that fails."""
    record = dataset.records[index]
    try:
        return draw_ground_truth(shrunk(record.load(), SIDE), record, [printable(name) for name in dataset.classes])
    except DataError as error:
        if isinstance(error, Fault) and error.code in BARE:
            records: Any = dataset.records  # packed
            picture = read_image(records.path(index), None, records.reading)
            return draw_objects(shrunk(picture, SIDE), np.zeros((0, 4)), [], [])
        return placard(str(error), SIDE)
    except Exception as error:  # the other images stand
        return placard(f"{printable(record.file_name)} could not be drawn: {in_one_line(error)}", SIDE)


def choose_images(dataset: Dataset, num: int) -> dict[int, list[str]]:
    """Choose num images: one per kind of fault in turn, then evenly spread images.

    Returns {index in dataset.records: codes of the faults that it was chosen for}, in ascending order.
    """
    places = {record.image_id: place for place, record in enumerate(dataset.records)}
    faults = [finding for finding in dataset.findings if finding.code not in INVISIBLE]
    queues = {fault.code: [places[i] for i in fault.image_ids if i in places] for fault in faults}
    taken: dict[int, list[str]] = {}
    for turn in itertools.zip_longest(*queues.values()):
        for code, place in zip(queues, turn, strict=True):
            if place is not None and (len(taken) < num or place in taken):
                codes = taken.setdefault(place, [])
                codes += [] if code in codes else [code]
    count = min(num, len(dataset.records))
    spread = [i * len(dataset.records) // count for i in range(count)]
    for place in [*spread, *range(len(dataset.records))]:
        if len(taken) >= count:
            break
        taken.setdefault(place, [])
    return dict(sorted(taken.items()))
