"""Compute confidence intervals of AP by resampling the images with replacement (Efron 1979).

An interval is the value plus and minus 1.96 standard deviations over the draws.  Percentiles of the draws would be
biased: the AP of a draw tends to exceed that of all images, because fewer distinct images compete in it.
n detections by descending score, m objects, D draws, T IoU thresholds, K classes, N images.
"""

from typing import NamedTuple

import numpy as np

from gndet.evaluation.coco_metrics import RECALLS
from gndet.toolbox.analysis.matches import Matches

WORK = 5e7  # detections x thresholds x draws: less than a second
AT_ONCE = 1e6  # detections x draws that are held in memory at a time
FEWEST, MOST = 40, 400  # draws
Z = 1.96  # standard deviations: 95 % of a normal distribution


class Interval(NamedTuple):
    """Ends of a 95 % interval; nan if it is undefined."""

    low: float
    high: float


class Intervals(NamedTuple):
    """Intervals of AP and AP50 for the mean over classes, and of AP for each class."""

    ap: Interval
    ap50: Interval
    class_ap: list[Interval]
    draws: int


def ap_intervals(matches: Matches, *, seed: int = 0) -> Intervals:
    """Return the 95 % intervals of AP and AP50."""
    ap = resample(matches, seed=seed)
    return Intervals(
        ap=_interval(_class_mean(ap.mean(2))), ap50=_interval(_class_mean(ap[:, :, 0])),
        class_ap=[_interval(column) for column in ap.mean(2).T], draws=len(ap) - 1,
    )  # fmt: skip


def paired_interval(first: Matches, second: Matches, *, seed: int = 0) -> Interval:
    """Return the 95 % interval of AP(second) - AP(first), over the same draws of the same images."""
    draws = min(_num_draws(first), _num_draws(second))
    a, b = (_class_mean(resample(matches, seed=seed, draws=draws).mean(2)) for matches in (first, second))
    return _interval(b - a, floor=-1.0)


def _num_draws(matches: Matches) -> int:
    return int(np.clip(WORK / max(matches.matched.size, 1), FEWEST, MOST))


def resample(matches: Matches, *, seed: int, draws: int | None = None) -> np.ndarray:
    """Return the AP (1 + D, K, T) of all images, then of D draws of N images; an image drawn twice counts twice.

    A class without any object gets nan.  A class without an object in one draw keeps its AP of all images in that
    draw.  Leaving it out of the draw's mean would underrepresent classes with few images, which often have a low AP.
    """
    images = len(matches.image_ids)
    drawn = np.random.default_rng(seed).multinomial(
        images, np.full(images, 1 / max(images, 1)), size=draws or _num_draws(matches)
    )
    weights = np.concatenate([np.ones((1, images)), drawn])  # how often each image counts
    ap = np.full((len(weights), len(matches.classes), matches.matched.shape[1]), np.nan)
    for k in range(len(matches.classes)):
        rows = np.flatnonzero(matches.label == k)
        rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
        counted = ~matches.ignored[rows]
        hit = (matches.matched[rows] > 0) & counted
        objects = matches.object_image[(matches.object_label == k) & ~matches.object_ignored]
        at_once = max(int(AT_ONCE // max(len(rows), 1)), 1)
        for first in range(0, len(weights), at_once):
            part = weights[first : first + at_once]
            ap[first : first + at_once, k] = average_precision(
                hit, counted & ~hit, part[:, matches.image[rows]], part[:, objects].sum(1)
            )
    return np.where(np.isnan(ap), ap[0], ap)


def average_precision(hit: np.ndarray, wrong: np.ndarray, weight: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return COCO's average precision at 101 recalls for each draw and threshold, (D, T); nan without objects.

    hit, wrong: (n, T) bool by descending score; weight: (D, n) how often each detection counts; objects: (D,) how many
    there are to find.
    """
    num = np.where(objects > 0, objects, np.nan)[:, None]
    before, values = weight.cumsum(1), []  # (D, n) how many detections there are up to each
    for found, out in zip(hit.T, ~(hit | wrong).T, strict=True):
        at, uncounted = np.flatnonzero(found), np.flatnonzero(out)  # the precision is highest at hits
        tp = weight[:, at].cumsum(1)  # (D, hits)
        skipped = np.pad(weight[:, uncounted].cumsum(1), ((0, 0), (1, 0)))[:, np.searchsorted(uncounted, at)]
        precision = tp / (before[:, at] - skipped + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best at this or any higher recall
        reached = np.searchsorted(RECALLS, tp / num, side="right")  # number of recalls reached
        steps = np.diff(reached, axis=1, prepend=0)  # number of recalls that each hit is the first to reach
        values.append((precision * steps).sum(1) / len(RECALLS))
    return np.where(objects[:, None] > 0, np.stack(values, axis=1), np.nan)


def _class_mean(values: np.ndarray) -> np.ndarray:
    """Average (1 + D, K) over the classes that have objects, to (1 + D,)."""
    known = ~np.isnan(values).any(0)
    return values[:, known].mean(1) if known.any() else np.full(len(values), np.nan)


def _interval(values: np.ndarray, floor: float = 0.0) -> Interval:
    """Return the interval of a value, cut to [floor, 1]; values: (1 + D,) over all images, then over D draws."""
    reach = Z * values[1:].std()
    return Interval(*np.clip((values[0] - reach, values[0] + reach), floor, 1.0).tolist())
