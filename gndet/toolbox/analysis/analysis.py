"""Analyze what a detector gets right and wrong, from its detections alone and without torch.

The detections come from gndet or from a file in COCO's results format.  `make_analysis` combines the findings of this
package's modules; `gndet analyze` and the report show them.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.coco_metrics import Kind, Metrics, coco_metrics, coco_truths
from gndet.evaluation.results import Results
from gndet.evaluation.results_file import Known, read_detections
from gndet.toolbox.analysis.bootstrap import Intervals, ap_intervals
from gndet.toolbox.analysis.errors import Errors, confusion, sort_errors
from gndet.toolbox.analysis.matches import (
    Curves,
    Matches,
    best_thresholds,
    in_cocos_order,
    match,
    rows_by_image,
    score_curves,
    true_positives,
)
from gndet.toolbox.analysis.overlaps import find_overlaps
from gndet.toolbox.analysis.suspects import Suspect, find_suspects

DEFAULT_THRESHOLD = 0.5  # if nothing was found, so no threshold is best


class Analysis(NamedTuple):
    """The analysis of a detector's boxes or masks; K classes, N images."""

    kind: str  # box or mask
    metrics: Metrics
    matches: Matches
    curves: Curves
    best: np.ndarray  # (K + 1, 4) threshold, precision, recall, F1: each class, then all; nan if nothing was found
    intervals: Intervals
    errors: Errors
    confusion: np.ndarray  # (K + 1, K + 1) annotated class by detected class; the last row and column mean nothing
    counts: np.ndarray  # (N, 3) found, false and missed per image, at `threshold`
    f1: np.ndarray  # (N,) per image; 1 for an image without objects and without detections
    suspects: list[Suspect]
    threshold: float  # the lowest score of a detection that counts when single images are judged

    def worst(self, count: int) -> list[int]:
        """Return the indices of the worst images, by F1 and then by the number of mistakes."""
        mistakes = self.counts[:, 1:].sum(1)
        order = np.lexsort((np.arange(len(self.f1)), -mistakes, self.f1))
        return [int(place) for place in order[:count] if mistakes[place]]

    def finest(self, count: int) -> list[int]:
        """Return the indices of the best images that have objects, by F1 and then by the number of objects found."""
        busy = self.counts[:, 0] + self.counts[:, 2] > 0
        order = np.lexsort((np.arange(len(self.f1)), -self.counts[:, 0], -self.f1))
        return [int(place) for place in order if busy[place]][:count]


def chosen_kind(dataset: Dataset, results: Results, kind: str | None = None) -> str:
    """Return `kind`; by default "mask" if both detections and objects have masks, else "box".

    Raises DataError if `kind` is "mask" and there are no masks.
    """
    drawn = any(mask is not None for record in dataset.records for mask in record.segmentations)
    possible = drawn and results.codes is not None
    if kind == "mask" and not possible:
        lacking = "detections" if drawn else "objects of the data set"
        raise DataError(f"--kind mask: the {lacking} have no masks; expected box")
    return kind or ("mask" if possible else "box")


def make_analysis(dataset: Dataset, results: Results, *, kind: str, max_detections: int) -> Analysis:
    """Analyze detections by their boxes or by their masks.

    kind: "box" or "mask"; objects and detections must have it.  max_detections: per image and class.
    """
    scored: Kind = "segm" if kind == "mask" else "bbox"
    truth = coco_truths(dataset, masks=kind == "mask")[scored]
    matches, objects = in_cocos_order(dataset, results, truth, max_detections)
    found, crowd = results.take(matches.index), np.array([row["iscrowd"] for row in objects], dtype=bool)
    images = list(rows_by_image(matches, truth))
    with ThreadPoolExecutor(1) as beside:  # hotcoco matches without the interpreter's lock
        scores = beside.submit(
            coco_metrics, {scored: truth}, results, engine="hotcoco", max_detections=max_detections
        )  # fmt: skip
        boxes = find_overlaps(images, found, objects, "bbox")
        overlaps = boxes if kind == "box" else find_overlaps(images, found, objects, "segm")
        matches = match(matches, overlaps, crowd, found.boxes[:, 2:].prod(1) if kind == "box" else found.areas)
        metrics = scores.result()[scored]
    curves = score_curves(matches)
    best = best_thresholds(curves)
    threshold = DEFAULT_THRESHOLD if np.isnan(best[-1, 0]) else float(best[-1, 0])
    counts = image_counts(matches, threshold)
    with np.errstate(invalid="ignore"):
        f1 = np.where(counts.any(1), 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]), 1.0)
    return Analysis(
        kind=kind, metrics=metrics, matches=matches, curves=curves, best=best, intervals=ap_intervals(matches),
        errors=sort_errors(matches, overlaps, crowd),
        confusion=confusion(matches, overlaps, crowd, max_detections, threshold),
        counts=counts, f1=f1, suspects=find_suspects(matches, boxes, threshold), threshold=threshold,
    )  # fmt: skip


def image_counts(matches: Matches, threshold: float) -> np.ndarray:
    """Count objects found, false detections and objects missed per image at IoU 0.5 and a score threshold, (N, 3)."""
    images = len(matches.image_ids)
    shown = (matches.scores >= threshold) & ~matches.ignored[:, 0]
    hit = true_positives(matches)
    tp, fp = (np.bincount(matches.image[rows], minlength=images) for rows in (shown & hit, shown & ~hit))
    objects = np.bincount(matches.object_image[~matches.object_ignored], minlength=images)
    return np.stack([tp, fp, objects - tp], axis=1)


def read_results(path: Path, dataset: Dataset) -> Results:
    """Read the detections of a data set; return them image by image, in the data set's order.

    A detection without a box gets the box of its mask.  Raises DataError if the file is not in COCO's results format
    or names an image or a class that the data set does not have; the error says at which index of the list, which
    value, and what was expected.
    """
    known = Known({record.image_id: record.size for record in dataset.records}, frozenset(dataset.category_ids))
    return read_detections(path, known, dataset.name).in_order_of(list(known.sizes))
