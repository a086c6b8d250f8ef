"""What a detector finds in one picture, and its forms in other libraries and labelling tools.

N objects, best first; (h, w) picture, upright.  Boxes are xyxy in pixels of the picture.
"""

import base64
import difflib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hotcoco.mask import decode
from PIL import Image
from torch import Tensor

from gndet.data.datasets.exports.yolo_rows import row_of
from gndet.data.datasets.tracing import joined, trace
from gndet.errors import ConfigError, DataError
from gndet.evaluation.drawing import draw_detections, refuse_drawing, save_marked
from gndet.evaluation.results import Results
from gndet.files import refuse_output, write_whole
from gndet.text import named_briefly, printable

if TYPE_CHECKING:
    import supervision

SHOWN_SIDE = 1024  # pixels of the longer side of a picture in a notebook; a larger one would bloat the notebook
NAMED = 4  # objects that repr lists


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The objects found in one picture, best first, as arrays on the CPU.

    `len(p)` counts them.  Iteration yields {"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}} per object, with
    unrounded boxes, and `p[0]` is the first of these.  `p[p.scores > 0.7]`, `p[:5]` and `p[[0, 2]]` are Predictions of
    some of the objects, `p["cell"]` is that of one class.  A Prediction can be copied and pickled; of a picture that
    was handed over as pixels, it holds these pixels, for `draw`.  Its arrays are made on first access; a change to them
    does not change what the methods return.
    """

    size: tuple[int, int]  # height, width of the picture after its EXIF orientation
    classes: tuple[str, ...]  # of the detector
    category_ids: tuple[int, ...]  # of the data set that the detector was trained on, one per class
    path: Path | None  # of the picture or video; None for a picture in memory
    results: Results  # the N rows, with masks as run-length codes
    load: Callable[[], np.ndarray]  # returns the picture, (h, w, 3) uint8 RGB
    seconds: float | None = None  # of a video's frame: when it is shown, from the video's start

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32 xyxy, inside the picture."""
        corner, sides = np.split(self.results.boxes, 2, axis=1)
        return np.hstack((corner, corner + sides)).astype(np.float32)

    @cached_property
    def scores(self) -> np.ndarray:
        """(N,) float32 in [0, 1], descending."""
        return self.results.scores.astype(np.float32)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, indices into `classes`, from 0."""
        places = {category_id: place for place, category_id in enumerate(self.category_ids)}
        return np.array([places[category_id] for category_id in self.results.category_ids.tolist()], dtype=np.int64)

    @property
    def names(self) -> list[str]:
        """The N names of the classes."""
        return [self.classes[label] for label in self.labels]

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(N, h, w) bool, N * h * w bytes; None if the detector finds boxes only.  Other methods do not need it."""
        return self._pasted()

    def _pasted(self) -> np.ndarray | None:
        if self.results.codes is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for place, mask in enumerate(self._masks()):
            masks[place] = mask
        return masks

    def _masks(self) -> Iterator[np.ndarray]:
        """Yield the masks (h, w) bool, one at a time; nothing for a detector of boxes."""
        return (decode(code).astype(bool) for code in self.results.masks() or ())

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True):
            yield {"score": score, "label": name, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}

    def __contains__(self, name: object) -> bool:
        """Return whether an object of a class was found."""
        return name in self.names

    def __getitem__(self, index: Any) -> Any:
        """Return a Prediction of the objects that a mask, a slice, a list of places or a class name chooses.

        A whole number gives the dict of that object.  Raises ConfigError for the name of no class.
        """
        if isinstance(index, str):
            return self[self.labels == class_label(index, self.classes)]
        if isinstance(index, slice):
            return self._taken(np.arange(len(self))[index])
        places = np.asarray(index)
        if places.ndim == 0 and places.dtype.kind in "iu":
            return next(iter(self._taken(np.arange(len(self))[places, None])))
        if places.ndim != 1:
            raise IndexError(f"got {index!r}, expected a mask, a slice, a list of places, a place, or a class name")
        return self._taken(np.arange(len(self))[places if places.size else places.astype(np.int64)])

    def _taken(self, places: np.ndarray) -> "Prediction":
        return Prediction(**self.__getstate__() | {"results": self.results.take(places)})

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: not the arrays that were made on access."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        found = [f"{printable(name)} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        listed = ", ".join([*found[:NAMED], *(["..."] if len(found) > NAMED else [])]) or "nothing"
        at = "" if self.seconds is None else f" at {self.seconds:.2f} s"
        where = f"{printable(self.path.name)}{at}, " if self.path else ""
        return f"<Prediction of {len(self)} in {where}{self.size[0]} x {self.size[1]}: {listed}>"

    def _repr_png_(self) -> bytes | None:
        """Draw the picture for a notebook, which shows repr instead if the picture can no longer be read."""
        try:
            picture = self.draw()
        except DataError:
            return None
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return _png(picture)

    def draw(self, file: str | Path | None = None) -> Image.Image:
        """Draw the objects on the picture, enlarged if it is small; `p[p.scores > 0.7].draw()` leaves some out.

        file: where to write the drawing, as PNG or JPEG; only another drawing of gndet is replaced.
        Raises DataError if the picture can no longer be read, and OutputError.
        """
        path = None if file is None else Path(os.path.expanduser(file))
        if path:
            refuse_drawing(path, "draw", [self.path] if self.path else [])
        drawn = draw_detections(self.load(), self.results, self.classes, self.category_ids, 0.0)
        if path:
            save_marked(path, drawn)
        return Image.fromarray(drawn)

    def to_torchvision(self) -> dict[str, Tensor]:
        """Return tensors as torchvision's detectors do, but with labels from 0, as in `classes`; all are copies.

        boxes (N, 4) float32 xyxy, scores (N,) float32, labels (N,) int64, and with masks: masks (N, 1, h, w) bool.
        """
        tensors = {name: torch.tensor(getattr(self, name)) for name in ("boxes", "scores", "labels")}
        masks = self._pasted()
        return tensors if masks is None else tensors | {"masks": torch.from_numpy(masks)[:, None]}

    def to_supervision(self) -> "supervision.Detections":
        """Return supervision.Detections with class names.  Needs `pip install supervision`."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.copy(), mask=self._pasted(),
            confidence=self.scores.copy(), class_id=self.labels.copy(), data={"class_name": np.array(self.names)},
        )  # fmt: skip

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO results with the category ids of the detector's data: boxes xywh, masks as run-length codes."""
        return [row | {"image_id": int(image_id)} for row in self.results]

    def to_labelme(self, file: str | Path) -> None:
        """Write a LabelMe JSON file: a polygon per part of a mask, or rectangles.

        The parts of an object share a group_id.  The file names the picture relative to its own folder; it holds the
        picture if that was handed over as pixels or is a video's frame.  Raises OutputError, also if the file exists.
        """
        file, shapes = _new_file(file, "to_labelme"), []
        for number, (name, box, outlines) in enumerate(zip(self.names, self.boxes, self._outlines(), strict=True)):
            group = number if len(outlines) > 1 else None
            drawn = [("polygon", outline) for outline in outlines] or [("rectangle", box.reshape(2, 2))]
            for kind, points in drawn:
                shape = {"label": name, "points": points.tolist(), "group_id": group, "shape_type": kind, "flags": {}}
                shapes.append(shape)
        path = self.path if self.seconds is None else None
        content: dict[str, Any] = {
            "version": "5.5.0", "flags": {}, "shapes": shapes,
            "imagePath": os.path.relpath(_real(path), _real(file).parent) if path else f"{file.stem}.png",
            "imageData": None if path else base64.b64encode(_png(Image.fromarray(self.load()))).decode("ascii"),
            "imageHeight": self.size[0], "imageWidth": self.size[1],
        }  # fmt: skip
        write_whole(file, json.dumps(content, ensure_ascii=False, indent=2))

    def to_yolo(self, file: str | Path) -> None:
        """Write a YOLO text file: `class cx cy w h` per object, or `class x1 y1 x2 y2 ...` with masks.

        Numbers are shares of the picture's width and height; a class is an index into `classes`.  Bridges without width
        join the parts and holes of a mask to one outline.  The file is empty if nothing was found.
        Raises OutputError, also if the file exists.
        """
        file, rows = _new_file(file, "to_yolo"), []
        for label, box, outlines in zip(self.labels, self.boxes.astype(np.float64), self._outlines(), strict=True):
            outline = joined(outlines) if outlines else None
            if outline is None and self.results.codes is not None:  # a mask without a pixel
                outline = box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
            rows.append(row_of(label, box, outline, self.size))
        write_whole(file, "".join(f"{row}\n" for row in rows))

    def _outlines(self) -> Iterator[list[np.ndarray]]:
        """Yield the outlines of each object's mask, one per part; none for a detector of boxes."""
        if self.results.codes is None:
            return ([] for _ in range(len(self)))
        return map(trace, self._masks())


def class_label(name: str, classes: Sequence[str], option: str = "") -> int:
    """Return the label of a class of a detector.  Raises ConfigError for another name, which an option may give."""
    if name in classes:
        return classes.index(name)
    nearest = difflib.get_close_matches(name, classes, 1, 0.5)
    meant = f"; did you mean {nearest[0]!r}? It" if nearest else "; it"
    raise ConfigError(f"{option}{name!r} is not a class of this detector{meant} knows {named_briefly(classes)}")


def _new_file(file: str | Path, method: str) -> Path:
    """Make the folder of a file.  Raises OutputError if the file exists: labels that were edited are the user's."""
    path = Path(os.path.expanduser(file))
    refuse_output(path, method, None)
    return path


def _real(file: Path) -> Path:
    """Resolve the links of a file's folder, but not the file itself: its target may have another name."""
    return file.parent.resolve() / file.name


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
