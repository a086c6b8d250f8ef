"""Read a COCO evaluator's matches into columns, and compute precision, recall and F1 over the score.

n detections, m objects, T = 10 IoU thresholds, K classes.  hotcoco matches as pycocotools does (a test checks it): per
image and class, by descending score, each detection takes the free object with the highest IoU.  Crowd regions and the
detections on them do not count.
"""

from typing import Any, NamedTuple

import hotcoco
import numpy as np

from gndet.data.records import Dataset

IOU_THRESHOLDS = 10  # 0.5 to 0.95


class Matches(NamedTuple):
    """Detections and objects of a data set with their matches, without detections beyond the limit per image."""

    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index; (n,) int64 index of the detection in the results
    label: np.ndarray  # (n,) int64 index of its class
    image: np.ndarray  # (n,) int64 index of its image
    scores: np.ndarray  # (n,) float64
    matched: np.ndarray  # (n, T) int64 annotation id of the matched object; 0: none
    ignored: np.ndarray  # (n, T) bool: on a crowd region, so neither true nor false
    object_ids: np.ndarray  # (m,) int64 annotation ids
    object_label: np.ndarray  # (m,) int64
    object_image: np.ndarray  # (m,) int64
    object_index: np.ndarray  # (m, T) int64 index of the matched detection in the results; -1: missed
    object_ignored: np.ndarray  # (m,) bool: a crowd region
    classes: tuple[str, ...]  # K names
    image_ids: np.ndarray  # (images,) int64


def read_matches(scorer: hotcoco.COCOeval, dataset: Dataset) -> Matches:
    """Read the matches of an evaluator whose evaluate() has run on the data set."""
    label_of = {id: index for index, id in enumerate(dataset.category_ids)}
    image_of = {record.image_id: index for index, record in enumerate(dataset.records)}
    parts = [part for part in scorer.evalImgs if part is not None]
    found, truth = ([part for part in parts if len(part[key])] for key in ("dtIds", "gtIds"))

    def column(parts: list[dict[str, Any]], key: str, dtype: type) -> np.ndarray:  # (n,), or (n, T) of (T, n) parts
        return np.concatenate([np.asarray(part[key], dtype=dtype).T for part in parts] or [np.zeros(0, dtype)])

    def repeated(parts: list[dict[str, Any]], key: str, index_of: dict[int, int], count: str) -> np.ndarray:
        return np.array([index_of[part[key]] for part in parts for _ in part[count]], dtype=np.int64)

    return Matches(
        index=column(found, "dtIds", np.int64) - 1,
        label=repeated(found, "category_id", label_of, "dtIds"),
        image=repeated(found, "image_id", image_of, "dtIds"),
        scores=column(found, "dtScores", np.float64),
        matched=column(found, "dtMatches", np.int64).reshape(-1, IOU_THRESHOLDS),
        ignored=column(found, "dtIgnore", bool).reshape(-1, IOU_THRESHOLDS),
        object_ids=column(truth, "gtIds", np.int64),
        object_label=repeated(truth, "category_id", label_of, "gtIds"),
        object_image=repeated(truth, "image_id", image_of, "gtIds"),
        object_index=column(truth, "gtMatches", np.int64).reshape(-1, IOU_THRESHOLDS) - 1,
        object_ignored=column(truth, "gtIgnore", bool),
        classes=tuple(dataset.classes),
        image_ids=np.array(list(image_of), dtype=np.int64),
    )


def true_positives(matches: Matches) -> np.ndarray:
    """Return which detections match an object that counts at IoU 0.5, (n,) bool."""
    return (matches.matched[:, 0] > 0) & ~matches.ignored[:, 0]


def false_positives(matches: Matches) -> np.ndarray:
    """Return which detections match nothing at IoU 0.5 and lie on no crowd region, (n,) bool."""
    return (matches.matched[:, 0] == 0) & ~matches.ignored[:, 0]


SCORES = np.linspace(0.0, 1.0, 101)


class Curves(NamedTuple):
    """Curves over detections that score at least SCORES[s]; nan if undefined.  The last row is of all classes."""

    precision: np.ndarray  # (K + 1, S)
    recall: np.ndarray  # (K + 1, S)
    f1: np.ndarray  # (K + 1, S)


def score_curves(matches: Matches) -> Curves:
    """Return precision, recall and F1 at each of SCORES, per class and for all detections together."""
    tp, fp = (_at_least(matches, rows) for rows in (true_positives(matches), false_positives(matches)))
    count = np.bincount(matches.object_label[~matches.object_ignored], minlength=len(matches.classes))
    objects = np.append(count, count.sum()).astype(np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = tp / (tp + fp), np.where(objects > 0, tp / objects, np.nan)
        f1 = np.where(objects > 0, 2 * tp / (tp + fp + objects), np.nan)
    return Curves(precision, recall, f1)


def _at_least(matches: Matches, rows: np.ndarray) -> np.ndarray:
    """Count the detections of `rows`, (n,) bool, that reach each of SCORES; return (K + 1, S) float64."""
    counts = np.zeros((len(matches.classes) + 1, len(SCORES)))
    for label in range(len(matches.classes)):
        scores = np.sort(matches.scores[rows & (matches.label == label)])
        counts[label] = len(scores) - np.searchsorted(scores, SCORES, side="left")
    counts[-1] = counts.sum(0)
    return counts


def best_thresholds(curves: Curves) -> np.ndarray:
    """Return the score threshold with the highest F1, and the precision, recall and F1 it gives, (K + 1, 4).

    One row per class, then one for all classes; thresholds to a hundredth; nan if nothing was found.
    """
    index = np.nan_to_num(curves.f1).argmax(1)
    best = np.stack([SCORES[index], *(values[np.arange(len(index)), index] for values in curves)], axis=1)
    return np.where(best[:, 3:] > 0, best, np.nan)
