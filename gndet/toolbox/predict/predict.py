"""`gndet predict`: detect objects in pictures and videos, draw the detections, and write them all as COCO results.

Loader processes read ahead of the detector; threads draw and write behind it.  Memory does not grow with the number of
pictures, except for their detections, which are kept in columns.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from gndet.data.datasets.faults import Findings, describe_finding, several
from gndet.data.datasets.images import Reading, Unusual, picture_size
from gndet.errors import DataError, OutputError
from gndet.evaluation.detector import Detector
from gndet.evaluation.drawing import PICTURE
from gndet.evaluation.evaluate import detect
from gndet.evaluation.portions import Portion, picture_portions, video_portions
from gndet.evaluation.prediction import class_label
from gndet.evaluation.sources import Pictures, Sources, find_sources, read_headers
from gndet.evaluation.video import video_writer
from gndet.files import Kind, is_own, refuse_file, sweep
from gndet.text import printable
from gndet.toolbox.predict.output import (
    PREDICTIONS,
    SHEET,
    Drawn,
    DrawTask,
    Output,
    Wanted,
    frame_names,
    output_kinds,
    unique_names,
)

TILE_SECONDS = 1.0  # between frames of a video on the contact sheet: closer ones look alike
FRAMES_PER_LINE = 100  # of progress
NAMED = 10  # unreadable files to name at the end


def predict(
    detector: Detector, sources: Sequence[str], out: Path, device: torch.device, show: Callable[[str], None], *,
    threshold: float = 0.5, classes: Sequence[str] | None = None, crops: bool = False, sheet: bool = False,
    every: int = 1,
) -> None:  # fmt: skip
    """Detect objects in pictures and videos; write each with its detections, and all as COCO results.

    sources: as `find_sources` takes them.  show: called with one line per picture, and a table at the end.
    out: folder, made if missing, for NAME.png of each picture, NAME.mp4 of each video, predictions.json (results) and
    images.json, where a frame's file_name is like "a.mp4#t=1.240" (seconds) and its "frame" counts from 0.
    threshold: least score of a detection that is drawn, cropped and counted; predictions.json holds all detections.
    classes: names of the classes to keep, in predictions.json too.  crops: write each drawn object to
    crops/CLASS/NAME-N-SCORE.png, N from 1 for the best.  sheet: write the first pictures together as sheet.png.
    every: use every Nth frame of a video.
    An unreadable file that was named raises DataError: at once if its header shows it, otherwise after everything else
    is written.  An unreadable file from a folder or a pattern is left out and reported at the end.
    Before anything is written, raises ConfigError for a class that the detector does not know, and OutputError if a
    picture would be overwritten or the folder cannot be made.
    """
    wanted = Wanted(threshold, _category_ids(detector, classes), crops, sheet)
    data, num = detector.config.data, detector.config.evaluation.images_per_gpu
    found, pictures, rates, broken, notes = read_inputs(sources, out, Reading.of(data))
    video_names = unique_names([video.stem for video in rates], ".mp4")
    reserved = [frame_names(Path(name).stem) for name in video_names] + [Path(SHEET).stem] * sheet
    names = unique_names([file.stem for file in pictures.files], ".png", "|".join(reserved))
    refuse_outputs(output_kinds(out, names, video_names, detector.classes, wanted), [*found.pictures, *found.videos])
    for line in notes:
        show(line)

    def report(drawn: Drawn) -> None:
        task = drawn.task
        show(f"{task.record.file_name}: {drawn.count} objects with a score of {threshold} or more -> {task.file}")

    with Output(detector, out, wanted, device.type != "cpu") as output:
        portions = picture_portions(pictures, data, num, pin_memory=device.type == "cuda", notify=show)
        with contextlib.closing(portions):
            for portion in portions:
                broken |= {pictures.files[skipped.image_id - 1]: skipped.reason for skipped in portion.broken}
                files = [out / names[record.image_id - 1] for record in portion.records]
                tasks = [DrawTask(r, file.stem, file, True) for r, file in zip(portion.records, files, strict=True)]
                _detect(output, portion, tasks, device, report)
        output.finish()
        first = len(pictures) + 1
        for (video, rate), name in zip(rates.items(), video_names, strict=True):
            reason, count = _detect_in_video(output, video, out / name, rate, every, first, device, show)
            broken |= {video: reason} if reason else {}
            first += count
        output.save(show)
    report_broken(broken, found.named, len(found.pictures) + len(found.videos), show)


class Inputs(NamedTuple):
    """The pictures and videos that a user's arguments name, with what their headers say."""

    found: Sources
    pictures: Pictures
    rates: dict[Path, Fraction]  # frames per second of the videos
    broken: dict[Path, str]  # the reasons of files that cannot be read
    notes: list[str]  # what was passed over, and what is unusual


def read_inputs(sources: Sequence[str], out: Path, reading: Reading) -> Inputs:
    """Find pictures and videos, and read their headers; what gndet drew into `out` is left out.  Raises DataError."""
    found = without_own_drawings(find_sources(sources), out)
    told = Findings()
    sizes, rates, broken = read_headers(found, reading, lambda file: _size(file, reading, told))
    unusual = [line for finding in told.listed() for line in describe_finding(finding._replace(remedy=""))]
    return Inputs(found, Pictures(sizes, reading), rates, broken, [*found.notes, *unusual])


def _size(file: Path, reading: Reading, told: Findings) -> tuple[int, int]:
    """Return a picture's height and width, and tell what its header shows to be unusual."""
    unusual = Unusual()
    size = picture_size(file, reading, unusual)
    if unusual.depth == 16:
        low, high = reading.pixel_range or (0, 65535)
        unusual.found.append(("picture-16bit", f"values {low:g} to {high:g} become 0 to 255 (data.pixel_range)"))
    for code, words in unusual.found:
        told.add(code, f"{printable(file.name)}: {words}")
    return size


def _category_ids(detector: Detector, classes: Sequence[str] | None) -> list[int]:
    """Look up the category ids of named classes, or of all.  Raises ConfigError for an unknown class."""
    names = detector.classes if classes is None else classes
    return [detector.category_ids[class_label(name, detector.classes, "--classes: ")] for name in names]


def without_own_drawings(found: Sources, out: Path) -> Sources:
    """Leave out, and note, what gndet drew into `out` before, unless it is named.  Raises DataError if all is."""
    home, others = Path(os.path.realpath(out)), [file for file in found.pictures if file not in found.named]
    own = {file for file in others if home in Path(os.path.realpath(file)).parents and is_drawn(file)}
    if not own:
        return found
    pictures = [file for file in found.pictures if file not in own]
    text = f"{out}: {several(len(own), 'picture')} passed over, which gndet drew"
    if not pictures and not found.videos:
        raise DataError(f"{text}; there is no other")
    return found._replace(pictures=pictures, notes=[*found.notes, text])


def is_drawn(file: Path) -> bool:
    """Return whether gndet drew a picture; not if it cannot be read."""
    try:
        return is_own(file, PICTURE)
    except OSError:
        return False


def refuse_outputs(files: dict[Path, Kind], inputs: Sequence[Path]) -> None:
    """Raise OutputError if a file that may be written is an input, or is not gndet's own; else make its folder."""
    taken = set(map(_identity, inputs))
    for file, kind in files.items():
        if file.exists() and _identity(file) in taken:
            raise OutputError(f"--out {file.parent}: would overwrite the picture {file}; choose another folder")
        if os.path.lexists(file) or file.name == PREDICTIONS:
            refuse_file(file, "--out", kind)
    for folder in {file.parent for file in files}:
        sweep(folder)


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def _detect(
    output: Output, portion: Portion, tasks: Sequence[DrawTask], device: torch.device, on_drawn: Callable[[Drawn], None]
) -> None:
    if portion.batch is None:
        return
    detections = detect(output.detector.model, portion.batch, device, output.detector.autocast)
    output.add(detections, portion.batch.sizes, tasks, on_drawn)


def _detect_in_video(
    output: Output, video: Path, file: Path, rate: Fraction, every: int, first: int, device: torch.device,
    show: Callable[[str], None],
) -> tuple[str, int]:  # fmt: skip
    """Detect objects in a video, and write it with its detections.

    rate: its frames per second; first: the image id of its first frame.  Returns the reason why it could not be read
    to the end (or ""), and the number of frames read.
    """
    config, count, objects, next_tile, reason = output.detector.config, 0, 0, -1.0, ""
    with video_writer(file, rate / every) as append:

        def write(drawn: Drawn) -> None:
            nonlocal objects
            objects += drawn.count
            assert drawn.picture is not None and drawn.task.frame is not None
            append(drawn.picture, drawn.task.frame.seconds)

        try:
            for portion in video_portions(video, config.data, config.evaluation.images_per_gpu, every, first):
                tasks = []
                for record, frame in zip(portion.records, portion.frames, strict=True):
                    tile = frame.seconds >= next_tile
                    next_tile = frame.seconds + TILE_SECONDS if tile else next_tile
                    tasks.append(DrawTask(record, f"{file.stem}-f{frame.index:06d}", None, tile, frame))
                    count += 1
                    if count % FRAMES_PER_LINE == 0:
                        show(f"{video}: {count} frames, at {frame.seconds:.1f} s")
                _detect(output, portion, tasks, device, write)
        except DataError as error:
            reason = str(error)
        output.finish()
    if count:
        show(f"{video}: {count} frames, {objects} objects with a score of {output.wanted.threshold} or more -> {file}")
    return reason, count


def report_broken(broken: dict[Path, str], named: frozenset[Path], num: int, show: Callable[[str], None]) -> None:
    """Show the unreadable files.  Raises DataError if one of them was named, or all `num` are unreadable."""
    lines = [f"  {reason}" for reason in list(broken.values())[:NAMED]]
    lines += [f"  and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
    text = "\n".join([f"{len(broken)} of {num} files could not be read, or not to the end:", *lines])
    if len(broken) == num or any(file in named for file in broken):
        raise DataError(text)
    if broken:
        show(text)
