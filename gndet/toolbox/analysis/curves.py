"""Precision, recall and F1 against the score, from the evaluator's matches at IoU 0.5.  S = 101 scores, K classes."""

from typing import NamedTuple

import numpy as np

from gndet.toolbox.analysis.matches import Matches, false_positives, true_positives

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
