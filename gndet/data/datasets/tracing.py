"""Turn masks into outlines, for formats that have no run-length codes: exact, along the edges of the pixels."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.segmentation import to_rle


def outlines_of(segmentation: Any, size: tuple[int, int]) -> list[np.ndarray]:
    """Return the outlines of a checked segmentation: polygons as they are, an RLE traced.

    size: height, width of the picture.  Returns arrays (V, 2) x, y in pixels, one per part; the holes of an RLE are
    filled, because a list of outlines cannot tell them from parts.
    """
    if isinstance(segmentation, list):
        return [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
    return trace(coco_mask.decode(to_rle(segmentation, size)).astype(bool))


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the outer border of each part of a mask (h, w) bool, whose pixels touch by their sides.

    Returns arrays (V, 2) of the corners x, y, clockwise in the picture, straight runs of pixels joined.
    """
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner: the corners that follow it
    # each side of a pixel that has no neighbor there, with the pixel to the right of the way along it
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # above: from the left corner to the right one
        (padded[1:-1, 2:], (1, 0), (1, 1)),  # to the right: downward
        (padded[2:, 1:-1], (1, 1), (0, 1)),  # below: leftward
        (padded[1:-1, :-2], (0, 1), (0, 0)),  # to the left: upward
    )
    for neighbor, first, second in sides:
        for y, x in np.argwhere(inner & ~neighbor).tolist():
            starts.setdefault((x + first[0], y + first[1]), []).append((x + second[0], y + second[1]))
    outlines = []
    while starts:
        outline = _follow(starts)
        if _area(outline) > 0:  # the border of a hole runs the other way
            outlines.append(outline)
    return outlines


def _follow(starts: dict[tuple[int, int], list[tuple[int, int]]]) -> np.ndarray:
    """Take one closed border out of the sides that are left.  Returns its corners (V, 2)."""
    begin = here = min(starts)
    before = (0, 0)
    corners: list[tuple[int, int]] = []
    while True:
        following = starts[here]
        turns = [(x - here[0], y - here[1]) for x, y in following]
        # where two pixels touch by a corner, turn right: they belong to two parts
        right = (-before[1], before[0])
        chosen = turns.index(right) if len(turns) > 1 and right in turns else 0
        there, step = following.pop(chosen), turns[chosen]
        if not following:
            del starts[here]
        if step != before:
            corners.append(here)
        here, before = there, step
        if here == begin:
            return np.array(corners, dtype=np.float64)


def joined(outlines: list[np.ndarray]) -> np.ndarray:
    """Join the outlines of an object to one, by bridges without width, for formats that have one outline per object.

    Each outline is put in at the nearest corner of those before it.  Returns (V, 2).
    """
    whole = outlines[0]
    for part in outlines[1:]:
        distance = np.square(whole[:, None] - part[None]).sum(2)
        at, begin = np.unravel_index(distance.argmin(), distance.shape)
        turned = np.concatenate((part[begin:], part[: begin + 1]))  # ends where it begins
        whole = np.concatenate((whole[: at + 1], turned, whole[at:]))
    return whole


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
