"""How long a norm study takes, and the schedule that fits a budget.  Pure functions of the measured speed."""

import math
from collections.abc import Sequence

import numpy as np

from gndet.errors import ConfigError
from gndet.toolbox.analysis.study_results import Speed

FEWEST_UPDATES = 50  # at the reference batch; shorter runs say nothing about training
RESERVE = 0.95  # share of the budget to plan for


def per_image_at(speed: Speed, images: int) -> float:
    """Interpolate the seconds per image at `images` per GPU between the measured sizes.

    An update has a fixed cost and a cost per image, so that seconds per image are linear in 1 / images.
    """
    sizes = sorted(speed.per_image, reverse=True)  # 1 / size ascending, as np.interp needs
    return float(np.interp(1 / images, [1 / size for size in sizes], [speed.per_image[size] for size in sizes]))


def estimate(speed: Speed, sizes: Sequence[int], images: int, jobs: int) -> float:
    """Return the seconds that cells take, of these images per GPU, each training on `images`, `jobs` at a time."""
    rounds = math.ceil(len(sizes) / jobs) / len(sizes)  # the last round may be incomplete
    return rounds * sum(per_image_at(speed, size) * images + speed.overhead for size in sizes)


def fit_budget(
    speed: Speed, sizes: Sequence[int], updates: int, reference_batch: int, jobs: int, budget: float
) -> tuple[float, int]:
    """Return the factor of the schedule, at most 1, with which the cells fit `budget` seconds, and the updates left.

    updates: of the config, each of reference_batch images.  Raises ConfigError if too few are left.
    """
    room = RESERVE * budget
    whole = estimate(speed, sizes, updates * reference_batch, jobs)
    if whole <= room:
        return 1.0, updates
    fixed = estimate(speed, sizes, 0, jobs)
    factor = max(room - fixed, 0.0) / (whole - fixed)
    left = math.floor(updates * factor)
    if left < min(FEWEST_UPDATES, updates):
        fewest = min(FEWEST_UPDATES, updates)
        needed = estimate(speed, sizes, fewest * reference_batch, jobs)
        cells = math.floor(len(sizes) * room / needed)
        raise ConfigError(
            f"--budget: {budget:.0f} s are left, which is {left} updates of {reference_batch} images for each of "
            f"{len(sizes)} cells; expected {fewest} at the least.  --budget {math.ceil(needed / RESERVE / 60) + 2}m "
            f"would do, or a grid of {cells} cells: fewer norms, sizes or --seeds"
        )
    return left / updates, left
