"""Find faults that show only in the numbers of a whole data set, not in a single annotation.

Letters: N images, n objects.  Boxes are float64 pixels of the original, xyxy (4, n).
"""

from collections.abc import Callable

import numpy as np

from gndet.config.schema import Config
from gndet.data.datasets.boxes import OVERHANG, ROUNDING
from gndet.data.datasets.faults import Findings
from gndet.data.datasets.packed import Packed, count_objects
from gndet.data.records import Dataset, Record

MATCH = 0.5  # the least IoU that an object's box and the box around its mask should have
SAME = 0.8  # IoU above which a box is taken for that of the mask
BETTER = 0.1  # by which one reading of a box must fit its mask better than another
MOST = 0.5  # share of all objects from which on the boxes of a file are taken for another format's
FEWEST = 2  # objects that show that
MANY_CLASSES = 500  # beyond Objects365's 365


def judge_boxes(packed: Packed, extents: np.ndarray, found: Findings) -> None:
    """Refuse boxes that are not COCO's xywh in pixels; note masks, in extents (n, 4) xyxy, away from their box."""
    image = np.searchsorted(packed.objects_first, np.arange(len(packed.boxes)), side="right") - 1  # (n,)
    boxes, extents = packed.boxes.T.copy(), extents.T.copy()  # (4, n) x0, y0, x1, y1
    sides = packed.sizes[image].T[::-1]  # (2, n) width, height of the image

    def add(code: str, faulty: np.ndarray, words: Callable[[int], str]) -> None:
        for i in np.flatnonzero(faulty).tolist():
            text = f"annotation {packed.annotation_ids[i]}: {words(i)}" if found.wants_example(code) else ""
            found.add(code, text, int(packed.image_ids[image[i]]))

    def in_image(i: int) -> str:
        x0, y0, x1, y1 = boxes[:, i].tolist()
        bbox = [x0, y0, round(x1 - x0, 6), round(y1 - y0, 6)]
        return f"bbox {bbox} in an image of width {sides[0, i]}, height {sides[1, i]}"

    def two_boxes(i: int) -> str:
        box, mask = (", ".join(f"{edge:g}" for edge in edges[:, i]) for edges in (boxes, extents))
        return f"x0, y0, x1, y1 of the box: {box}; of the mask: {mask}"

    add("mask-elsewhere", _elsewhere(boxes, extents, sides), two_boxes)
    normalized, corners = _are_normalized(boxes, sides), _are_corners(boxes, extents, sides)
    least = max(MOST * len(packed.boxes), FEWEST)
    if np.count_nonzero(normalized) >= least:
        add("boxes-normalized", normalized, in_image)
    elif np.count_nonzero(corners) >= least:
        add("boxes-xyxy", corners, in_image)


def _elsewhere(boxes: np.ndarray, extents: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return which masks (n,) are away from their box: both clipped to the image, their IoU is below MATCH."""
    limits = np.concatenate((sides, sides))
    boxes, extents = np.clip(boxes, 0, limits), np.clip(extents, 0, limits)
    # a mask that is a line or a point has no area to compare
    return (_area(extents) > 0) & (_iou(boxes, extents) < MATCH)


def _are_normalized(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return which boxes (n,) state a part of the image: the four numbers lie in 0 to 1, where images are larger."""
    x0, y0, x1, y1 = boxes
    in_range = (np.abs(numbers - 0.5) <= 0.5 + ROUNDING for numbers in (x0, y0, x1 - x0, y1 - y0))
    return np.logical_and.reduce((*in_range, *(sides > OVERHANG)))


def _are_corners(boxes: np.ndarray, extents: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return which boxes (n,) are [x0, y0, x1, y1] rather than [x, y, width, height].

    As corners they are a box inside the image.  As read, they leave the image, or fit their mask less than as corners.
    """
    x0, y0, x1, y1 = boxes
    corners = np.stack((x0, y0, x1 - x0, y1 - y0))  # the numbers of the file
    inside = (corners[2] > x0) & (corners[3] > y0) & (corners[2:] <= sides + OVERHANG).all(0)
    boxes, corners, extents, sides = (values[:, inside] for values in (boxes, corners, extents, sides))  # usually few
    overhang = (boxes[2:] > sides + OVERHANG).any(0)
    match = _iou(corners, extents)
    better = (match >= SAME) & (match >= _iou(boxes, extents) + BETTER)
    inside[inside] = np.where(_area(extents) > 0, better, overhang)
    return inside


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[2] - boxes[0]).clip(0) * (boxes[3] - boxes[1]).clip(0)


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of each of n boxes (4, n) with its other, (n,); 0 if both are empty."""
    common = _area(np.concatenate((np.maximum(boxes[:2], others[:2]), np.minimum(boxes[2:], others[2:]))))
    union = _area(boxes) + _area(others) - common
    return common / np.where(union > 0, union, 1)


def limit_notes(train: Dataset, val: Dataset, cfg: Config) -> list[str]:
    """Say in a line each which limits of the config the data exceed, and what a metric of them cannot show."""
    if cfg.task != "detection":
        return []
    head = cfg.model.final_head
    (_, detections_per_image), max_detections = cfg.model.detection_limits, cfg.evaluation.max_detections
    notes = []
    counts = {which: count_objects(dataset.records).trainable for which, dataset in (("train", train), ("val", val))}
    for which, objects in counts.items():
        if num := np.count_nonzero(objects > detections_per_image):
            notes.append(
                f"{which}: {num} of {len(objects)} images have more objects than model.{head}.detections_per_image="
                f"{detections_per_image}, at most {objects.max()}: a detector cannot find them all"
            )
    most = [_most_of_a_class(val.records[i]) for i in np.flatnonzero(counts["val"] > max_detections).tolist()]
    if num := np.count_nonzero(np.array(most) > max_detections):
        notes.append(
            f"val: {num} of {len(val.records)} images have more objects of a class than evaluation.max_detections="
            f"{max_detections}, at most {max(most)}: the metric does not count all that are found"
        )
    if val.records and not counts["val"].any():
        notes.append("val: no image has an object, so that there is no AP")
    if len(train.classes) > MANY_CLASSES:
        notes.append(
            f"train: {len(train.classes):,} classes: scores are low where so many compete; for LVIS, "
            f"model.{head}.score_threshold=0.0001 and detections_per_image=300 are usual"
        )
    return notes


def _most_of_a_class(record: Record) -> int:
    return int(np.bincount(record.labels[~record.crowd], minlength=1).max())
