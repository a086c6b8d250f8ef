"""What a COCO evaluator matched with what, in columns.  n detections, m objects, T = 10 IoU thresholds, K classes.

hotcoco's matches are pycocotools' own (tested): an image and class at a time, by falling score, each detection takes
the free object with the highest IoU; crowd regions and what lies on them do not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import hotcoco
import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


class Matches(NamedTuple):
    """Detections and objects of a data set with what became of them; those beyond the limit an image are left out."""

    index: np.ndarray  # (n,) int64 place of a detection in the results
    label: np.ndarray  # (n,) int64 place of its class
    image: np.ndarray  # (n,) int64 place of its image
    scores: np.ndarray  # (n,) float64
    matched: np.ndarray  # (n, T) int64 annotation id of the object it was matched with; 0: none
    ignored: np.ndarray  # (n, T) bool: on a crowd region; counts neither way
    object_ids: np.ndarray  # (m,) int64 annotation ids
    object_label: np.ndarray  # (m,) int64
    object_image: np.ndarray  # (m,) int64
    object_index: np.ndarray  # (m, T) int64 place in the results of the detection it was matched with; -1: missed
    object_ignored: np.ndarray  # (m,) bool: a crowd region
    classes: tuple[str, ...]  # K names
    image_ids: np.ndarray  # (images,) int64


def matches(
    scorer: hotcoco.COCOeval, classes: Sequence[str], category_ids: Sequence[int], image_ids: Sequence[int]
) -> Matches:
    """Read an evaluator's matches, after evaluate().

    classes, category_ids: names of the K classes and their ids in the file; image_ids: in the data set's order.
    """
    label_of = {id: place for place, id in enumerate(category_ids)}
    image_of = {id: place for place, id in enumerate(image_ids)}
    parts = [one for one in scorer.evalImgs if one is not None]
    found = [one for one in parts if len(one["dtIds"])]
    truth = [one for one in parts if len(one["gtIds"])]

    def column(parts: list[dict], key: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(one[key], dtype=dtype) for one in parts] or [np.zeros(0, dtype)])

    def rows(parts: list[dict], key: str, dtype: type) -> np.ndarray:
        none = np.zeros((0, len(IOU_THRESHOLDS)), dtype)
        return np.concatenate([np.asarray(one[key], dtype=dtype).T for one in parts] or [none])

    def repeated(parts: list[dict], key: str, of: dict[int, int], count: str) -> np.ndarray:
        return np.array([of[one[key]] for one in parts for _ in range(len(one[count]))], dtype=np.int64)

    return Matches(
        index=column(found, "dtIds", np.int64) - 1,
        label=repeated(found, "category_id", label_of, "dtIds"),
        image=repeated(found, "image_id", image_of, "dtIds"),
        scores=column(found, "dtScores", np.float64),
        matched=rows(found, "dtMatches", np.int64),
        ignored=rows(found, "dtIgnore", bool),
        object_ids=column(truth, "gtIds", np.int64),
        object_label=repeated(truth, "category_id", label_of, "gtIds"),
        object_image=repeated(truth, "image_id", image_of, "gtIds"),
        object_index=rows(truth, "gtMatches", np.int64) - 1,
        object_ignored=column(truth, "gtIgnore", bool),
        classes=tuple(classes),
        image_ids=np.array(image_ids, dtype=np.int64),
    )  # fmt: skip


def true_positives(found: Matches, threshold: int = 0) -> np.ndarray:
    """(n,) bool: matched with an object that counts, at the IoU threshold of that place."""
    return (found.matched[:, threshold] > 0) & ~found.ignored[:, threshold]


def false_positives(found: Matches, threshold: int = 0) -> np.ndarray:
    """(n,) bool: matched with nothing, and not on a crowd region."""
    return (found.matched[:, threshold] == 0) & ~found.ignored[:, threshold]
