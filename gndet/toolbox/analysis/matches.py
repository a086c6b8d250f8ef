"""Match detections with objects as COCO does, and compute precision, recall and F1 over the score.

n detections, m objects, T = 10 IoU thresholds, K classes.  As in pycocotools (a test checks it), per image and class
and by descending score, each detection takes the free object with the highest IoU.  Crowd regions and the detections on
them do not count.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gndet.data.records import Dataset
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.overlaps import Overlaps, take_objects, turns

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # pycocotools' own: others differ by rounding
LARGEST = 1e5**2  # pixels; COCO ignores what is larger


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


def in_cocos_order(dataset: Dataset, results: Results, truth: dict[str, Any], limit: int) -> tuple[Matches, list[Any]]:
    """Sort detections and objects by image id and class, then by score or as they are in the data set.

    truth: the data set as `coco_truths` returns it.  limit: the number of detections that count per image and class.
    Returns the matches, in which nothing is matched yet, and the m annotations.  Crowd regions come last.
    """
    image_ids = np.array([image["id"] for image in truth["images"]], dtype=np.int64)
    category_ids = np.array(dataset.category_ids, dtype=np.int64)  # ascending
    image, label = _places(image_ids, results.image_ids), np.searchsorted(category_ids, results.category_ids)
    index = np.lexsort((-results.scores, label, results.image_ids))
    index = index[turns((image * len(category_ids) + label)[index]) < limit]
    rows = truth["annotations"]
    ids, images, categories = (
        np.array([row[key] for row in rows], dtype=np.int64) for key in ("id", "image_id", "category_id")
    )
    ignored = np.array([row["iscrowd"] or row["area"] > LARGEST for row in rows], dtype=bool)
    order = np.lexsort((ignored, categories, images))
    nothing = np.zeros((len(index), len(IOU_THRESHOLDS)), dtype=np.int64)
    return Matches(
        index=index, label=label[index], image=image[index], scores=results.scores[index],
        matched=nothing, ignored=nothing.astype(bool),
        object_ids=ids[order], object_label=np.searchsorted(category_ids, categories[order]),
        object_image=_places(image_ids, images[order]),
        object_index=np.full((len(order), len(IOU_THRESHOLDS)), -1), object_ignored=ignored[order],
        classes=tuple(dataset.classes), image_ids=image_ids,
    ), [rows[place] for place in order.tolist()]  # fmt: skip


def _places(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return at which index each of the wanted ids is; ids: unique."""
    by_id = ids.argsort()
    return by_id[np.searchsorted(ids, wanted, sorter=by_id)]


def rows_by_image(matches: Matches, truth: dict[str, Any]) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Yield the rows of detections, the rows of objects and the size (height, width) of each image."""
    by_id = matches.image_ids.argsort()
    ends = [
        np.searchsorted(matches.image_ids[image], matches.image_ids[by_id], side=side).tolist()
        for image in (matches.image, matches.object_image) for side in ("left", "right")
    ]  # fmt: skip
    for image, start, stop, first, last in zip(by_id.tolist(), *ends, strict=True):
        row = truth["images"][image]
        yield slice(start, stop), slice(first, last), (row["height"], row["width"])


def match(matches: Matches, overlaps: Overlaps, crowd: np.ndarray, areas: np.ndarray) -> Matches:
    """Match detections with objects of their class; areas (n,) of the detections; crowd (m,): crowd regions."""
    own = matches.label[overlaps.detection] == matches.object_label[overlaps.object]
    near = overlaps.take(own & (overlaps.iou >= IOU_THRESHOLDS[0]))
    group = matches.image * len(matches.classes) + matches.label
    taken = take_objects(near, group, matches.object_ignored, crowd, IOU_THRESHOLDS)
    row, threshold = np.nonzero(taken >= 0)
    chosen = taken[row, threshold]
    matched, ignored = np.zeros_like(taken), np.repeat(areas[:, None] > LARGEST, taken.shape[1], axis=1)
    matched[row, threshold] = matches.object_ids[chosen]
    ignored[row, threshold] = matches.object_ignored[chosen]
    object_index = np.full_like(matches.object_index, -1)
    object_index[chosen, threshold] = matches.index[row]  # of a crowd region, the last detection
    return matches._replace(matched=matched, ignored=ignored, object_index=object_index)


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
