"""How sure an AP is: intervals by drawing the images anew, with replacement (Efron 1979).

An interval is the value and 1.96 standard deviations of the draws either way.  Not the draws' own percentiles: AP of a
draw tends to lie above that of all images, since fewer different ones compete in it.
n detections by falling score, m objects, T IoU thresholds, K classes, N images.
"""

from typing import NamedTuple

import numpy as np

from gndet.evaluation.coco_metrics import RECALLS
from gndet.toolbox.analysis.matches import Matches

WORK = 5e7  # detections x thresholds x draws: some seconds
AT_ONCE = 2e6  # of them: what stands in memory
FEWEST, MOST = 40, 400  # draws
Z = 1.96  # standard deviations: 95 % of a normal distribution


class Interval(NamedTuple):
    """Ends of a 95 % interval; nan where it is undefined."""

    low: float
    high: float


class Intervals(NamedTuple):
    """Intervals of AP and AP50: of the mean over classes, and of each class."""

    ap: Interval
    ap50: Interval
    class_ap: list[Interval]
    draws: int


class ResampledAP(NamedTuple):
    """AP of each draw: (draws, K) at all thresholds, and at 0.5; nan where a class has no object at all."""

    ap: np.ndarray
    ap50: np.ndarray


def ap_intervals(found: Matches, *, seed: int = 0) -> Intervals:
    """95 % intervals of AP."""
    sample, whole = resample(found, seed=seed), ap_of_all_images(found)
    return Intervals(
        _interval(_class_mean(sample.ap), _class_mean(whole.ap)),
        _interval(_class_mean(sample.ap50), _class_mean(whole.ap50)),
        [_interval(column, value) for column, value in zip(sample.ap.T, whole.ap.T, strict=True)], len(sample.ap),
    )  # fmt: skip


def paired_intervals(first: Matches, second: Matches, *, seed: int = 0) -> tuple[Interval, Interval]:
    """95 % intervals of AP and AP50 of the second less the first, over the same draws of the same images."""
    draws = min(num_draws(first), num_draws(second))
    a, b = (resample(found, seed=seed, draws=draws) for found in (first, second))
    x, y = map(ap_of_all_images, (first, second))
    return (
        _interval(_class_mean(b.ap) - _class_mean(a.ap), _class_mean(y.ap) - _class_mean(x.ap), -1.0),
        _interval(_class_mean(b.ap50) - _class_mean(a.ap50), _class_mean(y.ap50) - _class_mean(x.ap50), -1.0),
    )


def num_draws(found: Matches) -> int:
    """As many draws as some seconds allow."""
    return int(np.clip(WORK / max(found.matched.size, 1), FEWEST, MOST))


def ap_of_all_images(found: Matches) -> ResampledAP:
    """AP of each class over all images, as a single draw that holds each once."""
    return _sample(found, np.ones((1, len(found.image_ids))))


def resample(found: Matches, *, seed: int, draws: int | None = None) -> ResampledAP:
    """AP of each class over draws of as many images as there are; an image that comes twice counts twice.

    A class that a draw holds no object of keeps its AP of all images: were it left out of that draw's mean, classes of
    few images, which are often the poor ones, would be missing there.
    """
    draws, images = draws or num_draws(found), len(found.image_ids)
    generator = np.random.default_rng(seed)
    return _sample(found, generator.multinomial(images, np.full(images, 1 / max(images, 1)), size=draws))


def _sample(found: Matches, weights: np.ndarray) -> ResampledAP:
    """AP of each class where each image counts so often; weights (draws, N)."""
    draws, weights = len(weights), weights.astype(np.float64)
    ap = np.full((draws, len(found.classes), found.matched.shape[1]), np.nan)
    for k in range(len(found.classes)):
        mine = np.flatnonzero(found.label == k)
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        counted = ~found.ignored[mine]
        hit = (found.matched[mine] > 0) & counted
        objects = found.object_image[(found.object_label == k) & ~found.object_ignored]
        whole = average_precision(hit, counted & ~hit, np.ones((1, len(mine))), np.array([float(len(objects))]))
        at_once = max(int(AT_ONCE // max(hit.size, 1)), 1)
        for first in range(0, draws, at_once):
            some = weights[first : first + at_once]
            part = average_precision(hit, counted & ~hit, some[:, found.image[mine]], some[:, objects].sum(1))
            ap[first : first + at_once, k] = np.where(np.isnan(part), whole, part)
    return ResampledAP(ap.mean(2), ap[:, :, 0])


def average_precision(hit: np.ndarray, wrong: np.ndarray, weight: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """COCO's average precision at 101 recalls of D draws, at each threshold, (D, T); nan without an object.

    hit, wrong (n, T) bool by falling score; weight (D, n) how often each counts; objects (D,) how many are to be found.
    """
    tp, fp = ((of[None] * weight[:, :, None]).cumsum(1) for of in (hit, wrong))  # (D, n, T)
    precision = tp / (tp + fp + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best at that recall or a higher one
    recall = tp / np.where(objects > 0, objects, np.nan)[:, None, None]
    reached = np.searchsorted(RECALLS, recall, side="right")  # how many of the recalls up to there
    steps = np.diff(reached, axis=1, prepend=0)  # those that each detection is the first to reach
    value = (precision * steps).sum(1) / len(RECALLS)
    return np.where(objects[:, None] > 0, value, np.nan)


def _class_mean(values: np.ndarray) -> np.ndarray:
    """(draws, K) to (draws,): over the classes that have objects."""
    known = ~np.isnan(values).any(0)
    return values[:, known].mean(1) if known.any() else np.full(len(values), np.nan)


def _interval(values: np.ndarray, value: np.ndarray, floor: float = 0.0) -> Interval:
    """The interval of a value (1,) in [floor, 1], from those of the draws (draws,)."""
    reach = Z * values.std()
    return Interval(*np.clip((value[0] - reach, value[0] + reach), floor, 1.0).tolist())
