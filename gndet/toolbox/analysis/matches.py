"""What a COCO evaluator matched with what, in columns; curves over the score.

n detections, m objects, T = 10 IoU thresholds, K classes.  hotcoco's matches are pycocotools' own (tested): per image
and class, by falling score, each detection takes the free object with the highest IoU; crowd regions and detections on
them do not count.
"""

from typing import Any, NamedTuple

import hotcoco
import numpy as np

from gndet.data.records import Dataset

IOU_THRESHOLDS = 10  # 0.5 to 0.95


class Matches(NamedTuple):
    """Detections and objects of a data set with their matches; detections beyond the limit per image are left out."""

    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index; (n,) int64 place of a detection in the results
    label: np.ndarray  # (n,) int64 place of its class
    image: np.ndarray  # (n,) int64 place of its image
    scores: np.ndarray  # (n,) float64
    matched: np.ndarray  # (n, T) int64 annotation id of the matched object; 0: none
    ignored: np.ndarray  # (n, T) bool: on a crowd region; counts neither way
    object_ids: np.ndarray  # (m,) int64 annotation ids
    object_label: np.ndarray  # (m,) int64
    object_image: np.ndarray  # (m,) int64
    object_index: np.ndarray  # (m, T) int64 place in the results of the matched detection; -1: missed
    object_ignored: np.ndarray  # (m,) bool: a crowd region
    classes: tuple[str, ...]  # K names
    image_ids: np.ndarray  # (images,) int64


def read_matches(scorer: hotcoco.COCOeval, dataset: Dataset) -> Matches:
    """Read the matches of an evaluator of a data set after evaluate()."""
    label_of = {id: place for place, id in enumerate(dataset.category_ids)}
    image_of = {record.image_id: place for place, record in enumerate(dataset.records)}
    parts = [part for part in scorer.evalImgs if part is not None]
    found, truth = ([part for part in parts if len(part[key])] for key in ("dtIds", "gtIds"))

    def column(parts: list[dict[str, Any]], key: str, dtype: type) -> np.ndarray:  # (n,), or (n, T) of (T, n) parts
        return np.concatenate([np.asarray(part[key], dtype=dtype).T for part in parts] or [np.zeros(0, dtype)])

    def repeated(parts: list[dict[str, Any]], key: str, places: dict[int, int], count: str) -> np.ndarray:
        return np.array([places[part[key]] for part in parts for _ in part[count]], dtype=np.int64)

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
    """Return (n,) bool: matched at IoU 0.5 with an object that counts."""
    return (matches.matched[:, 0] > 0) & ~matches.ignored[:, 0]


def false_positives(matches: Matches) -> np.ndarray:
    """Return (n,) bool: matched with nothing at IoU 0.5, and not on a crowd region."""
    return (matches.matched[:, 0] == 0) & ~matches.ignored[:, 0]


SCORES = np.linspace(0.0, 1.0, 101)


class Curves(NamedTuple):
    """Of detections with a score of at least SCORES[s]; nan where undefined.  The last row is of all classes."""

    precision: np.ndarray  # (K + 1, S)
    recall: np.ndarray  # (K + 1, S)
    f1: np.ndarray  # (K + 1, S)


def score_curves(matches: Matches) -> Curves:
    """Return precision, recall and F1 at each of SCORES: per class, and of all detections together."""
    tp, fp = (_at_least(matches, rows) for rows in (true_positives(matches), false_positives(matches)))
    count = np.bincount(matches.object_label[~matches.object_ignored], minlength=len(matches.classes))
    objects = np.append(count, count.sum()).astype(np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = tp / (tp + fp), np.where(objects > 0, tp / objects, np.nan)
        f1 = np.where(objects > 0, 2 * tp / (tp + fp + objects), np.nan)
    return Curves(precision, recall, f1)


def _at_least(matches: Matches, rows: np.ndarray) -> np.ndarray:
    """Count the detections in `rows` (n,) bool with at least each of SCORES, (K + 1, S) float64."""
    counts = np.zeros((len(matches.classes) + 1, len(SCORES)))
    for label in range(len(matches.classes)):
        scores = np.sort(matches.scores[rows & (matches.label == label)])
        counts[label] = len(scores) - np.searchsorted(scores, SCORES, side="left")
    counts[-1] = counts.sum(0)
    return counts


def best_thresholds(curves: Curves) -> np.ndarray:
    """Return the score threshold with the highest F1, and precision, recall and F1 there, (K + 1, 4).

    Per class and of all, to a hundredth; nan where nothing was found.
    """
    place = np.nan_to_num(curves.f1).argmax(1)
    best = np.stack([SCORES[place], *(values[np.arange(len(place)), place] for values in curves)], axis=1)
    return np.where(best[:, 3:] > 0, best, np.nan)
