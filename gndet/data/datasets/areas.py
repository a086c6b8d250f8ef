"""Judge whether the areas that a file states fit its masks and boxes: COCO's metric divides objects by them.

Letters: n annotations.  Areas are float64 pixels of the original.
"""

from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Marks
from gndet.data.datasets.masks import CheckedMasks
from gndet.data.datasets.segmentation import to_rle

FIT = 0.25  # share by which an area may differ from the mask's; the areas of COCO's crowd regions differ by 0.33
HOLLOW = 0.05  # share of its box that an object without a mask is expected to fill at least
EXCESS = 1.01  # of the box's area, beyond which no area of a mask in it can lie, its rounded outline aside


class Misfits(NamedTuple):
    """Which of n areas do not fit; NaN, a missing area, is none of these."""

    wrong: np.ndarray  # (n,) bool: 0, or over that of the box
    box: np.ndarray  # (n,) bool: of the box, where there is a smaller mask
    odd: np.ndarray  # (n,) bool: other


def misfits(
    area: np.ndarray, box_area: np.ndarray, mask_area: np.ndarray, margin: np.ndarray, crowd: np.ndarray
) -> Misfits:
    """Find areas that do not fit; all arguments (n,).

    mask_area: 0 without a mask.  margin: pixels that counting an outline's pixels may gain or lose, half the
    perimeter of the box.  crowd (n,) bool: of these only a wrong area is found, because COCO's own do not fit.
    """
    fits = (mask_area > 0) & (np.abs(area - mask_area) <= FIT * mask_area + margin)
    wrong = (area == 0) | (~fits & (area > EXCESS * box_area + margin))
    odd = ~(wrong | crowd) & np.where(mask_area > 0, ~fits, area < HOLLOW * box_area) & ~np.isnan(area)
    box = odd & (mask_area > 0) & (np.abs(area - box_area) <= (EXCESS - 1) * box_area + margin)
    return Misfits(wrong, box, odd & ~box)


def check_areas(
    area: np.ndarray, box_area: np.ndarray, masks: CheckedMasks, margin: np.ndarray, crowd: np.ndarray,
    sizes: np.ndarray, marks: Marks,
) -> None:  # fmt: skip
    """Compute the areas (n,) that are missing or impossible, and note others that do not fit.

    sizes (n, 2) height, width of the images; margin and crowd as in `misfits`.
    """

    def drawn(place: int) -> float:
        return coco_mask.area(to_rle(masks.mask(place), tuple(sizes[place].tolist())))

    found = misfits(area, box_area, masks.areas, margin, crowd)
    if found.odd.any():  # to be sure, draw polygons that may overlap, or cross themselves
        mask_area, num_polygons = masks.areas.copy(), np.bincount(masks.polygons.owner, minlength=len(area))
        crossing = (num_polygons == 1) & (area > mask_area)  # its pixels are at least as many as the formula gives
        for place in np.flatnonzero(marks.left & found.odd & (crossing | (num_polygons > 1))).tolist():
            mask_area[place] = drawn(place)
        found = misfits(area, box_area, mask_area, margin, crowd)
    missing = np.isnan(area)
    marks.note("area-missing", missing)
    marks.note("area-wrong", found.wrong)
    marks.note("area-box", found.box)
    marks.note("area-odd", found.odd)
    unknown = marks.left & (missing | found.wrong)
    area[unknown] = box_area[unknown]
    for place in np.flatnonzero(unknown & masks.kept).tolist():
        area[place] = drawn(place)
