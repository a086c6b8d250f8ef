"""Compute which detections overlap which objects, and let detections take objects as COCO's evaluation does.

n detections, m objects, p pairs of both, T IoU thresholds, d detections and g objects of one image.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.segmentation import to_rle
from gndet.evaluation.coco_metrics import Kind
from gndet.evaluation.results import Results


class Overlaps(NamedTuple):
    """All pairs of a detection and an object of one image that overlap, by detection, then by object."""

    detection: np.ndarray  # (p,) int64 row
    object: np.ndarray  # (p,) int64 row
    iou: np.ndarray  # (p,) float64 above 0; for a crowd region, the share of the detection that lies on it

    def take(self, which: np.ndarray) -> "Overlaps":
        """Return the pairs that `which` selects."""
        return Overlaps(*(column[which] for column in self))


def find_overlaps(
    images: Iterable[tuple[slice, slice, tuple[int, int]]], found: Results, objects: list[dict[str, Any]], kind: Kind
) -> Overlaps:
    """Compare the boxes or the masks of detections and objects, image by image.

    images: rows of `found`, rows of `objects`, and (height, width) of each.  objects: m annotations in COCO's format.
    """
    parts = [Overlaps(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64)))]
    for rows, columns, size in images:
        annotations = objects[columns]
        if rows.start == rows.stop or not annotations:
            continue
        crowd = [annotation["iscrowd"] for annotation in annotations]
        if kind == "segm":
            codes = (found.codes or [])[rows]
            shapes: Any = [{"size": size, "counts": code} for code in codes]
            drawn: Any = [to_rle(annotation["segmentation"], size) for annotation in annotations]
        else:
            shapes, drawn = found.boxes[rows], np.array([annotation["bbox"] for annotation in annotations])
        ious = coco_mask.iou(shapes, drawn, crowd)  # (d, g)
        row, column = np.nonzero(ious > 0)
        parts.append(Overlaps(rows.start + row, columns.start + column, ious[row, column]))
    return Overlaps(*map(np.concatenate, zip(*parts, strict=True)))


def best_objects(overlaps: Overlaps, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest IoU of each detection, (n,), and the first object that has it; 0 and -1 if none overlaps."""
    detection, object, iou = overlaps.take(np.lexsort((-overlaps.object, overlaps.iou, overlaps.detection)))
    last = np.flatnonzero(np.diff(detection, append=-1))
    highest, best = np.zeros(n), np.full(n, -1)
    highest[detection[last]], best[detection[last]] = iou[last], object[last]
    return highest, best


def turns(group: np.ndarray) -> np.ndarray:
    """Count how many neighbors of the same group come before each item, (n,); items of a group are neighbors."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


def take_objects(
    overlaps: Overlaps, group: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """Let each detection take the free object with the highest IoU, in the order of the detections.

    overlaps: pairs that may match.  group (n,): neighbors of one group compete for objects, others do not.
    ignored (m,): objects that are taken only if no other is free.  crowd (m,): regions that stay free.
    thresholds (T,): least IoU.  Returns the row of the object (n, T), or -1.

    All groups advance together: the first detection of each group, then the second of each, and so on.
    """
    candidates, turn = np.unique(overlaps.detection), np.zeros(len(group), dtype=np.int64)
    turn[candidates] = turns(group[candidates])
    # the last pair of a detection is its best; of equal ones pycocotools takes the last
    keys = overlaps.object, overlaps.iou, ~ignored[overlaps.object], overlaps.detection, turn[overlaps.detection]
    detection, object, iou = overlaps.take(np.lexsort(keys))
    taken = np.full((len(group), len(thresholds)), -1)
    free = np.ones((len(ignored), len(thresholds)), dtype=bool)
    last = int(turn.max(initial=0)) + 1
    for start, stop in pairwise(np.searchsorted(turn[detection], np.arange(last + 1)).tolist()):
        if start == stop:
            continue  # no detection overlaps an object
        rows, columns = detection[start:stop], object[start:stop]  # (P,)
        possible = free[columns] & (iou[start:stop, None] >= thresholds)  # (P, T)
        begin = np.flatnonzero(np.diff(rows, prepend=-1))  # of each detection
        best = np.maximum.reduceat(np.where(possible, np.arange(stop - start)[:, None], -1), begin)
        place, threshold = np.nonzero(best >= 0)
        chosen = columns[best[place, threshold]]
        taken[rows[begin[place]], threshold] = chosen
        free[chosen, threshold] = crowd[chosen]
    return taken
