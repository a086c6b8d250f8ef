"""`gndet predict` with a classifier: name the most likely classes of pictures and videos' frames, and write them.

K classes.  Loader processes read ahead of the classifier.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gndet.data.datasets.images import Reading
from gndet.data.records import Record
from gndet.errors import DataError
from gndet.evaluation.drawing import PICTURE, captioned, grid, save_marked, shrunk
from gndet.evaluation.picture_classifier import TOP, ClassPrediction, PictureClassifier
from gndet.evaluation.portions import picture_portions, video_portions
from gndet.evaluation.results import SIGNATURE
from gndet.evaluation.video import Frame
from gndet.files import write_whole
from gndet.text import printable, text_table
from gndet.toolbox.predict.output import (
    COLUMNS,
    LISTS,
    PREDICTIONS,
    SHEET,
    TILE_SIDE,
    TILES,
    image_row,
    save_images,
)  # fmt: skip
from gndet.toolbox.predict.predict import FRAMES_PER_LINE, TILE_SECONDS, read_inputs, refuse_outputs, report_broken

Show = Callable[[str], None]


def predict_classes(
    classifier: PictureClassifier, sources: Sequence[str], out: Path, show: Show, *,
    top: int = TOP, sheet: bool = False, every: int = 1,
) -> None:  # fmt: skip
    """Classify pictures and the frames of videos; show the `top` most likely classes of each, and write them as JSON.

    sources, every, unreadable files: as in `predict.predict`.  show: called with a line per picture, and a table.
    out: folder, made if missing, for predictions.json, a list of {"image_id", "file_name", "category_id", "label",
    "score"} with `top` rows per picture, the most likely class first, and images.json as `predict.predict` writes it.
    sheet: write the first pictures together, with their classes, as sheet.png.
    Raises OutputError before anything is computed if the files cannot be written, and DataError as `predict.predict`.
    """
    data, num = classifier.config.data, classifier.config.evaluation.images_per_gpu
    found, pictures, rates, broken, notes = read_inputs(sources, out, Reading.of(data))
    kinds = LISTS | ({SHEET: PICTURE} if sheet else {})
    refuse_outputs({out / name: kind for name, kind in kinds.items()}, [*found.pictures, *found.videos])
    for line in notes:
        show(line)
    output = _Output(classifier, top, sheet)
    portions = picture_portions(pictures, data, num, pin_memory=classifier.on_gpu, notify=show)
    with contextlib.closing(portions):
        for portion in portions:
            broken |= {pictures.files[skipped.image_id - 1]: skipped.reason for skipped in portion.broken}
            for record, prediction in zip(portion.records, classifier.predict_portion(portion), strict=True):
                output.add(record, prediction, tile=True)
                show(f"{record.file_name}: {prediction.words(top)}")
    first = len(pictures) + 1
    for video in rates:
        before, next_tile = len(output.images), -1.0
        try:
            for portion in video_portions(video, data, num, every, first):
                predictions = classifier.predict_portion(portion, video)
                for record, frame, prediction in zip(portion.records, portion.frames, predictions, strict=True):
                    tile = frame.seconds >= next_tile
                    next_tile = frame.seconds + TILE_SECONDS if tile else next_tile
                    output.add(record, prediction, tile, frame)
                    if (len(output.images) - before) % FRAMES_PER_LINE == 0:
                        show(f"{video}: at {frame.seconds:.1f} s: {prediction.words(top)}")
        except DataError as error:
            broken[video] = str(error)
        count = len(output.images) - before
        first += count
        show(f"{video}: {count} frames")
    output.save(out, show)
    report_broken(broken, found.named, len(found.pictures) + len(found.videos), show)


class _Output:
    """What has been predicted."""

    def __init__(self, classifier: PictureClassifier, top: int, sheet: bool) -> None:
        self.classes, self.ids, self.top = classifier.classes, classifier.category_ids, top
        self.tiles_left = TILES if sheet else 0
        self.images: list[dict[str, Any]] = []  # of images.json
        self.ranked: list[tuple[np.ndarray, np.ndarray]] = []  # labels and probabilities (top,) of each
        self.tiles: list[np.ndarray] = []

    def add(self, record: Record, prediction: ClassPrediction, tile: bool, frame: Frame | None = None) -> None:
        """Keep the classes of a picture; tile: put it on the contact sheet if there is room."""
        labels = prediction.labels[: self.top]
        self.images.append(image_row(record, frame))
        self.ranked.append((labels, prediction.probabilities[labels]))
        if tile and self.tiles_left:
            self.tiles_left -= 1
            caption = f"{printable(Path(record.file_name).name)}: {prediction.words(1)}"
            self.tiles.append(captioned(shrunk(record.load(), TILE_SIDE), caption))

    def save(self, out: Path, show: Show) -> None:
        """Write the contact sheet and the lists, and show how many pictures are of each class."""
        rows = [
            {
                "image_id": image["id"], "file_name": image["file_name"], "category_id": self.ids[label],
                "label": self.classes[label], "score": score,
            }
            for image, (labels, scores) in zip(self.images, self.ranked, strict=True)
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]  # fmt: skip
        write_whole(out / PREDICTIONS, f"{json.dumps(rows)}\n{SIGNATURE}\n")
        save_images(out, self.images, dict(zip(self.ids, self.classes, strict=True)))
        if self.tiles:
            save_marked(out / SHEET, grid(self.tiles, COLUMNS))
            show(f"contact sheet of {len(self.tiles)} pictures -> {out / SHEET}")
        counts = Counter(self.classes[int(labels[0])] for labels, _ in self.ranked)
        table = [["most likely class", "images"], *([name, str(num)] for name, num in counts.most_common())]
        show(text_table([*table, ["all", str(len(self.images))]]))
        show(f"the {min(self.top, len(self.classes))} most likely classes of each -> {out / PREDICTIONS}")
