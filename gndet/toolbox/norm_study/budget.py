"""How long a norm study takes, and the schedule that fits into a budget.  Pure functions of what was measured."""

import math
from collections.abc import Sequence

from gndet.errors import ConfigError
from gndet.toolbox.analysis.study_results import Speed

FEWEST_UPDATES = 50  # at the reference batch: a curve of shorter runs says nothing about training
RESERVE = 0.95  # share of the budget that is planned for


def per_image_at(speed: Speed, images: int) -> float:
    """Seconds an image at so many images per GPU, from the sizes that were measured.

    An update costs a part of its own and a part for each image: time an image is linear in 1 / images.
    """
    sizes = sorted(speed.per_image)
    small, large = sizes[0], sizes[-1]
    if small == large:
        return speed.per_image[small]
    share = (1 / images - 1 / large) / (1 / small - 1 / large)
    share = min(max(share, 0.0), 1.0)
    return share * speed.per_image[small] + (1 - share) * speed.per_image[large]


def estimate(speed: Speed, sizes: Sequence[int], images: int, jobs: int) -> float:
    """Seconds of cells of those images per GPU, each of which trains on so many images, jobs of them at once."""
    rounds = math.ceil(len(sizes) / jobs) / len(sizes)  # the last round may not be full
    return rounds * sum(per_image_at(speed, size) * images + speed.overhead for size in sizes)


def fit_budget(
    speed: Speed, sizes: Sequence[int], updates: int, reference_batch: int, jobs: int, budget: float
) -> tuple[float, int]:
    """The factor of the schedule, at most 1, with which the cells fit into budget seconds, and the updates it leaves.

    updates: of the config, each of reference_batch images.  Raises ConfigError where too few would be left.
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
