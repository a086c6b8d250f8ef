"""Turn detections into drawings, crops, a contact sheet, COCO results and counts; threads draw and write.

n objects of a picture score at least the threshold, best first.  Pictures are (h, w, 3) uint8 RGB.
"""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gndet.data.records import Dataset, Record
from gndet.data.workers import usable_cores
from gndet.evaluation.behind import to_host
from gndet.evaluation.detector import Detector
from gndet.evaluation.drawing import PICTURE, captioned, draw_detections, grid, save_marked, shrunk
from gndet.evaluation.evaluate import to_results
from gndet.evaluation.results import RESULTS, Results, join, save_results
from gndet.evaluation.video import VIDEO, Frame
from gndet.files import Kind, cut_name, make_folder, write_whole
from gndet.structures import Detections
from gndet.text import printable, text_table

TILES, COLUMNS, TILE_SIDE = 24, 6, 480  # of the contact sheet: pictures, pictures per row, longer side in pixels
COMPRESSION = 1  # of PNG files: a fifth of the time of Pillow's default 6, for a fifth more bytes
MAX_THREADS = 8
PREDICTIONS, IMAGES, SHEET, CROPS = "predictions.json", "images.json", "sheet.png", "crops"
CROP = re.compile(r".*-\d+-\d\.\d\d\.png", re.DOTALL)  # name of an object's crop
LISTS: dict[str, Kind] = {
    PREDICTIONS: RESULTS, IMAGES: Kind("a list of pictures of gndet predict", rb'\A\{"info": \{"description": "gndet')
}  # fmt: skip


class Wanted(NamedTuple):
    """What to keep, and what to make."""

    threshold: float  # least score of an object that is drawn, cropped and counted
    category_ids: Sequence[int]  # detections of other categories are dropped
    crops: bool
    sheet: bool


class DrawTask(NamedTuple):
    """A picture to draw."""

    record: Record
    name: str  # of its crops
    file: Path | None  # for the drawing; None: return the drawing instead
    tile: bool  # whether it goes on the contact sheet
    frame: Frame | None = None  # if it is from a video


class Drawn(NamedTuple):
    """A picture that has been drawn."""

    task: DrawTask
    found: Results
    count: int  # type: ignore[assignment]  # hides tuple.count; n
    picture: np.ndarray | None  # the drawing; None if it was written to a file
    tile: np.ndarray | None


class Output:
    """Draw and write in threads, and collect all detections; leaving the context ends the threads."""

    def __init__(self, detector: Detector, out: Path, wanted: Wanted, overlap: bool) -> None:
        """out: an existing folder.  overlap: draw while the detector computes, which suits a detector on a GPU.

        On a CPU, take turns: torch's threads wait for each other, so one that has to share its core delays them all.
        """
        self.detector, self.out, self.wanted, self.overlap = detector, out, wanted, overlap
        self.folders = dict(zip(detector.category_ids, crop_folders(detector.classes), strict=True))
        num = min(MAX_THREADS, usable_cores())
        self.threads, self.most = ThreadPoolExecutor(num), 2 * num  # most: batches to hold in memory until drawn
        self.waiting: list[tuple[Callable[[], list[Drawn]], Callable[[Drawn], None]]] = []
        self.pending: deque[tuple[Future[list[Drawn]], Callable[[Drawn], None]]] = deque()
        self.results: list[Results] = []
        self.images: list[dict[str, Any]] = []
        self.tiles: list[np.ndarray] = []

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    def add(
        self, detections: Detections, sizes: Tensor, tasks: Sequence[DrawTask], on_drawn: Callable[[Drawn], None]
    ) -> None:
        """Queue a batch to be drawn.

        detections: of B images; sizes (B, 2) height, width of the resized pictures; on_drawn: called with each drawn
        picture, in order, here or in `finish`.
        """
        self.waiting.append((partial(self._draw, to_host(detections), sizes, tasks), on_drawn))
        if self.overlap or len(self.waiting) == self.most:
            self.finish(self.most if self.overlap else 0)

    def finish(self, most: int = 0) -> None:
        """Start drawing all waiting batches, and wait until at most `most` batches are still being drawn."""
        self.pending += [(self.threads.submit(draw), on_drawn) for draw, on_drawn in self.waiting]
        self.waiting = []
        while len(self.pending) > most:
            future, on_drawn = self.pending.popleft()
            for drawn in future.result():
                self._note(drawn)
                on_drawn(drawn)

    def _note(self, drawn: Drawn) -> None:
        self.images.append(image_row(drawn.task.record, drawn.task.frame))
        self.results.append(drawn.found)
        if drawn.tile is not None and len(self.tiles) < TILES:
            self.tiles.append(drawn.tile)

    def _draw(self, arrived: Callable[[], Detections], sizes: Tensor, tasks: Sequence[DrawTask]) -> list[Drawn]:
        classes, ids = self.detector.classes, self.detector.category_ids
        dataset = Dataset("batch", classes, ids, [task.record for task in tasks])
        paste = self.detector.config.model.mask_paste
        results = to_results(arrived(), list(range(len(tasks))), sizes, dataset, paste)
        results = results.take(np.flatnonzero(np.isin(results.category_ids, self.wanted.category_ids)))
        done = []
        for task in tasks:
            found, image = results.of_image(task.record.image_id), task.record.load()
            order = np.argsort(-found.scores, kind="stable")
            shown = found.take(order[found.scores[order] >= self.wanted.threshold])
            picture = draw_detections(image, shown, classes, ids, self.wanted.threshold)
            if task.file:
                save_marked(task.file, picture, COMPRESSION)
            if self.wanted.crops:
                self._save_crops(task.name, image, shown)
            tile = None
            if self.wanted.sheet and task.tile and len(self.tiles) < TILES:
                caption = f"{printable(Path(task.record.file_name).name)}: {len(shown)}"
                tile = captioned(shrunk(picture, TILE_SIDE), caption)
            done.append(Drawn(task, found, len(shown), None if task.file else picture, tile))
        return done

    def _save_crops(self, name: str, image: np.ndarray, shown: Results) -> None:
        """Write each object, cropped to the pixels that its box touches."""
        size = np.array(image.shape[1::-1])  # width, height
        columns = zip(shown.boxes, shown.scores, shown.category_ids.tolist(), strict=True)
        for number, (box, score, category) in enumerate(columns, start=1):
            left, top = near = np.minimum(np.floor(box[:2]).astype(int), size - 1)
            right, bottom = np.maximum(np.ceil(box[:2] + box[2:]).astype(int), near + 1)
            folder = self.out / CROPS / self.folders[category]
            make_folder(folder, "--out")
            save_marked(folder / f"{name}-{number}-{score:.2f}.png", image[top:bottom, left:right], COMPRESSION)

    def save(self, show: Callable[[str], None]) -> None:
        """Write the contact sheet and the detections of all pictures, and show a summary."""
        self.finish()
        results, classes, ids = join(self.results), self.detector.classes, self.detector.category_ids
        file = self.out / PREDICTIONS
        save_results(file, results, marked=True)
        save_images(self.out, self.images, dict(zip(ids, classes, strict=True)))
        if self.tiles:
            save_marked(self.out / SHEET, grid(self.tiles, COLUMNS), COMPRESSION)
            show(f"contact sheet of {len(self.tiles)} pictures -> {self.out / SHEET}")
        shown = results.take(np.flatnonzero(results.scores >= self.wanted.threshold))
        names, rows = dict(zip(ids, classes, strict=True)), []
        for category, num in Counter(shown.category_ids.tolist()).most_common():
            seen_in = np.unique(shown.image_ids[shown.category_ids == category])
            rows.append([names[category], str(num), str(len(seen_in))])
        total = ["all", str(len(shown)), str(len(self.images))]
        show(f"objects with a score of {self.wanted.threshold} or more:")
        show(text_table([["class", "objects", "images"], *rows, total]))
        show(f"{len(results)} detections, with lower scores too -> {file} (COCO results; image ids in images.json)")


def image_row(record: Record, frame: Frame | None = None) -> dict[str, Any]:
    """Return a picture's row of images.json; frame: if it is one of a video."""
    height, width = record.size
    row = {"id": record.image_id, "file_name": record.file_name, "height": height, "width": width}
    return row | ({"frame": frame.index} if frame else {})


def save_images(out: Path, images: list[dict[str, Any]], names: dict[int, str]) -> None:
    """Write images.json; names: of the classes by category id."""
    categories = [{"id": id, "name": name} for id, name in names.items()]
    info = {"description": "gndet predict"}
    content = {"info": info, "images": images, "categories": categories, "annotations": []}
    write_whole(out / IMAGES, json.dumps(content))


def crop_folders(classes: Sequence[str]) -> list[str]:
    """Return the name of each class's folder of crops."""
    return unique_names([re.sub(r"[^\w .+()-]", "_", name).strip(" .") or "_" for name in classes])


def frame_names(stem: str) -> str:
    """Return the regular expression of the names of a video's frames, which its crops have."""
    return rf"{re.escape(stem)}-f\d{{6,}}"


def output_kinds(
    out: Path, pictures: Sequence[str], videos: Sequence[str], classes: Sequence[str], wanted: Wanted
) -> dict[Path, Kind]:
    """Return the files that may be written, with the kind of each; of the crops only what already has such a name."""
    kinds = dict.fromkeys(pictures, PICTURE) | dict.fromkeys(videos, VIDEO) | LISTS
    kinds |= {SHEET: PICTURE} if wanted.sheet else {}
    folders = [out / CROPS, *(out / CROPS / name for name in crop_folders(classes))] if wanted.crops else []
    crops = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if CROP.fullmatch(file.name)]
    crops += [folder for folder in folders if os.path.lexists(folder) and not folder.is_dir()]
    return {out / name: kind for name, kind in kinds.items()} | dict.fromkeys(crops, PICTURE)


def unique_names(names: Sequence[str], suffix: str = "", reserved: str = "") -> list[str]:
    """Append the suffix to each name; number names that repeat an earlier one or match `reserved`, ignoring case.

    reserved: a regular expression of names without the suffix.  Names of more than LONGEST bytes are cut.
    """
    unique, taken, kept = list[str](), set[str](), re.compile(reserved.casefold())
    for number, long_name in enumerate(names, start=1):
        name = cut_name(long_name)
        while name.casefold() in taken or kept.fullmatch(name.casefold()):
            name = f"{name}-{number}"
        taken.add(name.casefold())
        unique.append(f"{name}{suffix}")
    return unique
