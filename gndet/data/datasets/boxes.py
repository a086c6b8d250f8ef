"""Check the boxes of annotations; compute missing boxes from masks, and upright boxes around turned ones.

Letters: n annotations, m of them.  Boxes are float64 pixels of the original, xywh in the file.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np

from gndet.data.datasets.faults import Marks
from gndet.data.datasets.json_items import column
from gndet.data.datasets.masks import check_masks, to_floats

MAX_COORDINATE = 1e6  # pixels, far beyond MAX_SIDE; larger numbers (or inf, NaN) do not make a box
ROUNDING = 0.01  # pixels: COCO's boxes are rounded to hundredths
OVERHANG = 2  # pixels that a box may reach over the edge before it is noted: rounding and outlines cause that much
NO_BOX = [float("nan")] * 4
EMPTY: tuple[Any, ...] = (None, [], [None] * 4)  # a bbox that states no box


def check_boxes(items: Sequence[dict[str, Any]], sizes: np.ndarray, marks: Marks) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes xyxy (n, 4), and the areas (n,) of those that the file states; sizes (n, 2) of their images."""
    values = column(items, "bbox")
    if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}):
        values = [value if type(value) is list and len(value) == 4 else NO_BOX for value in values]
    boxes = to_floats(list(chain.from_iterable(values))).reshape(-1, 4)
    if np.isnan(boxes).any():
        _find_boxes(boxes, items, sizes, marks)
    marks.drop("box-malformed", ~(np.abs(boxes) <= MAX_COORDINATE).all(1))  # also true for NaN
    boxes[~marks.left] = 0
    (x, y, width, height), (image_height, image_width) = boxes.T.copy(), sizes.T
    boxes[:, 2:] += boxes[:, :2]
    right, bottom = boxes[:, 2:].T
    marks.drop("box-empty", (right <= x) | (bottom <= y))  # also true for a width that rounding has lost
    if any(attributes := column(items, "attributes")):
        _turn_boxes(boxes, _turns(attributes), items, sizes, marks)
        (x, y), (right, bottom) = boxes[:, :2].T, boxes[:, 2:].T
    over = np.maximum(np.maximum(-x, -y), np.maximum(right - image_width, bottom - image_height))
    outside = (right <= 0) | (bottom <= 0) | (x >= image_width) | (y >= image_height)
    marks.drop("box-outside", outside & (over > ROUNDING))
    marks.note("box-clipped", over > ROUNDING)
    over[marks.places.get("box-rotated", [])] = 0  # a turned rectangle may overhang; its numbers are right
    marks.note("box-overhang", over > OVERHANG)
    marks.note("box-tiny", (width < 1) | (height < 1))
    return boxes, width * height


def _find_boxes(boxes: np.ndarray, items: Sequence[dict[str, Any]], sizes: np.ndarray, marks: Marks) -> None:
    """Set boxes xywh (n, 4) that are missing to those of their masks; drop annotations with neither."""
    empty = [place for place in np.flatnonzero(marks.left).tolist() if items[place].get("bbox") in EMPTY]
    boxes[empty] = _boxes_of_masks([items[place].get("segmentation") for place in empty], sizes[empty])
    missing, stated = np.zeros((2, len(items)), dtype=bool)
    missing[empty], stated[empty] = True, ["bbox" in items[place] for place in empty]
    no_mask = np.isnan(boxes[:, 0])
    marks.note("box-missing", missing & ~no_mask)
    marks.drop("box-none", stated & no_mask)


def _turn_boxes(
    boxes: np.ndarray, degrees: np.ndarray, items: Sequence[dict[str, Any]], sizes: np.ndarray, marks: Marks
) -> None:
    """Replace boxes xyxy (n, 4) that CVAT states before their turn by degrees (n,): by that of the mask, if any."""
    places = np.flatnonzero(marks.left & (degrees % 180 != 0))
    around = _turned(boxes[places], degrees[places])
    of_mask = _boxes_of_masks([items[place].get("segmentation") for place in places.tolist()], sizes[places])
    of_mask[:, 2:] += of_mask[:, :2]
    around = np.where(np.isnan(of_mask), around, of_mask)
    changed = np.zeros(len(boxes), dtype=bool)
    changed[places] = np.abs(around - boxes[places]).max(1) > ROUNDING
    boxes[places] = around
    marks.note("box-rotated", changed)


def _boxes_of_masks(segmentations: Sequence[Any], sizes: np.ndarray) -> np.ndarray:
    """Return the boxes xywh (m, 4) around m segmentations as they are in a file; NaN where no mask is left.

    sizes (m, 2) height, width of the images.  A refused segmentation gets the whole image: its own fault is reported.
    """
    checked = check_masks(segmentations, sizes)
    low, high = np.hsplit(checked.extents, 2)
    boxes = np.where(checked.kept[:, None], np.hstack((low, high - low)), np.nan)
    boxes[checked.refused] = np.pad(sizes[checked.refused, ::-1], ((0, 0), (2, 0)))
    return boxes


def _turns(attributes: Sequence[Any]) -> np.ndarray:
    """Return CVAT's `rotation` of n annotations in degrees, (n,); 0 where `attributes` holds none, or not a number."""
    values = [value.get("rotation", 0) if type(value) is dict else 0 for value in attributes]
    for place, value in enumerate(values):
        if type(value) is str:
            with suppress(ValueError):
                values[place] = float(value)
    degrees = to_floats(values)
    return np.where(np.isfinite(degrees), degrees, 0)


def _turned(boxes: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Return the boxes xyxy (m, 4) around rectangles xyxy (m, 4) that are turned about their center by degrees (m,)."""
    center, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    sine, cosine = np.abs(np.sin(np.deg2rad(degrees))), np.abs(np.cos(np.deg2rad(degrees)))
    reach = np.stack((half[:, 0] * cosine + half[:, 1] * sine, half[:, 0] * sine + half[:, 1] * cosine), 1)
    return np.hstack((center - reach, center + reach))
