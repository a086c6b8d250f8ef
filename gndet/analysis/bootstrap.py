"""How sure an AP is: intervals by drawing the images anew, with replacement (Efron 1979).

n detections by falling score, m objects, T IoU thresholds, K classes, N images.
"""

from typing import NamedTuple

import numpy as np

from gndet.analysis.matches import Matches

RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
WORK = 3e8  # detections x thresholds x draws: some seconds
FEWEST, MOST = 40, 400  # draws


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


class Sample(NamedTuple):
    """AP of each draw: (draws, K) at all thresholds, and at 0.5; nan where a draw has no object of a class."""

    ap: np.ndarray
    ap50: np.ndarray


def intervals(found: Matches, *, seed: int = 0) -> Intervals:
    """95 % intervals of AP, by percentiles over the draws."""
    sample = draw(found, seed=seed)
    return Intervals(
        _percentiles(_class_mean(sample.ap)), _percentiles(_class_mean(sample.ap50)),
        [_percentiles(column) for column in sample.ap.T], len(sample.ap),
    )  # fmt: skip


def difference(first: Matches, second: Matches, *, seed: int = 0) -> tuple[Interval, Interval]:
    """95 % intervals of AP and AP50 of the second less the first, over the same draws of the same images."""
    draws = min(num_draws(first), num_draws(second))
    a, b = (draw(found, seed=seed, draws=draws) for found in (first, second))
    return (
        _percentiles(_class_mean(b.ap) - _class_mean(a.ap)), _percentiles(_class_mean(b.ap50) - _class_mean(a.ap50))
    )  # fmt: skip


def num_draws(found: Matches) -> int:
    """As many draws as some seconds allow."""
    return int(np.clip(WORK / max(found.matched.size, 1), FEWEST, MOST))


def draw(found: Matches, *, seed: int, draws: int | None = None) -> Sample:
    """AP of each class over draws of as many images as there are; an image that comes twice counts twice."""
    draws, images = draws or num_draws(found), len(found.image_ids)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=draws) if images else np.zeros((draws, 0))
    ap = np.full((draws, len(found.classes), found.matched.shape[1]), np.nan)
    for k in range(len(found.classes)):
        mine = np.flatnonzero(found.label == k)
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        counted = ~found.ignored[mine]
        hit = (found.matched[mine] > 0) & counted
        objects = found.object_image[(found.object_label == k) & ~found.object_ignored]
        for number, weight in enumerate(weights):
            ap[number, k] = average_precision(hit, counted & ~hit, weight[found.image[mine]], weight[objects].sum())
    with np.errstate(invalid="ignore"):
        return Sample(ap.mean(2), ap[:, :, 0])


def average_precision(hit: np.ndarray, wrong: np.ndarray, weight: np.ndarray, objects: float) -> np.ndarray:
    """COCO's average precision at 101 recalls, at each threshold, (T,); nan without an object.

    hit, wrong (n, T) bool by falling score; weight (n,) how often each counts; objects: how many are to be found.
    """
    if objects == 0:
        return np.full(hit.shape[1], np.nan)
    tp, fp = ((of * weight[:, None]).cumsum(0, dtype=np.float64) for of in (hit, wrong))  # (n, T)
    precision = tp / np.maximum(tp + fp, np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]  # the best at that recall or a higher one
    recall, value = tp / objects, np.zeros(hit.shape[1])
    for t in range(hit.shape[1]):
        place = np.searchsorted(recall[:, t], RECALLS, side="left")
        value[t] = precision[place[place < len(recall)], t].sum() / len(RECALLS)
    return value


def _class_mean(values: np.ndarray) -> np.ndarray:
    """(draws, K) to (draws,): over the classes that a draw has."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _percentiles(values: np.ndarray) -> Interval:
    known = values[~np.isnan(values)]
    return Interval(*np.percentile(known, (2.5, 97.5)).tolist()) if len(known) else Interval(np.nan, np.nan)
