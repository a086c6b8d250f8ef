"""Precision, recall and F1 against the score, from the evaluator's matches at IoU 0.5.  S = 101 scores, K classes."""

from typing import NamedTuple

import numpy as np

from gndet.toolbox.analysis.matches import Matches, false_positives, true_positives

SCORES = np.linspace(0.0, 1.0, 101)


class Curves(NamedTuple):
    """Of detections with a score of at least SCORES[s]; nan where undefined.  The last row is that of all classes."""

    precision: np.ndarray  # (K + 1, S)
    recall: np.ndarray  # (K + 1, S)
    f1: np.ndarray  # (K + 1, S)


class BestThreshold(NamedTuple):
    """The score from which detections are best taken for real: F1 is highest."""

    threshold: float
    precision: float
    recall: float
    f1: float


def score_curves(found: Matches) -> Curves:
    """Precision, recall and F1 of each class, and of all detections together, at each of SCORES."""
    hit, wrong = true_positives(found), false_positives(found)
    count = np.bincount(found.object_label[~found.object_ignored], minlength=len(found.classes))
    tp, fp = (np.stack([_at_least(found.scores[(found.label == k) & of]) for k in range(len(found.classes))])
              if found.classes else np.zeros((0, len(SCORES))) for of in (hit, wrong))  # fmt: skip
    tp, fp = (np.concatenate([part, part.sum(0, keepdims=True)]).astype(np.float64) for part in (tp, fp))
    objects = np.append(count, count.sum()).astype(np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = tp / (tp + fp), np.where(objects > 0, tp / objects, np.nan)
        f1 = np.where(objects > 0, 2 * tp / (tp + fp + objects), np.nan)
    return Curves(precision, recall, f1)


def _at_least(scores: np.ndarray) -> np.ndarray:
    """How many of the scores (n,) are at least each of SCORES, (S,)."""
    return len(scores) - np.searchsorted(np.sort(scores), SCORES, side="left")


def best_thresholds(curves: Curves) -> list[BestThreshold | None]:
    """The best score threshold of each class and of all, to a hundredth; None where a class has no object."""
    best = []
    for precision, recall, f1 in zip(curves.precision, curves.recall, curves.f1, strict=True):
        if np.isnan(f1).all() or np.nanmax(f1) == 0:
            best.append(None)
            continue
        place = int(np.nanargmax(f1))
        best.append(
            BestThreshold(float(SCORES[place]), float(precision[place]), float(recall[place]), float(f1[place]))
        )
    return best
