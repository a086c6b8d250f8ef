"""Turn masks into outlines, for formats that have no run-length codes: exact, along the edges of the pixels.

A ring is (V, 2) int64 x, y: corners of pixels along a border, alternately across and down.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.segmentation import to_rle


def outlines_of(segmentation: Any, size: tuple[int, int]) -> list[np.ndarray]:
    """Return the outlines of a checked segmentation: polygons as they are, an RLE traced.

    size: height, width of the picture.  Returns arrays (V, 2) x, y in pixels, one per part.
    """
    if isinstance(segmentation, list):
        return [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
    return trace(coco_mask.decode(to_rle(segmentation, size)).astype(bool))


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Trace each part of a mask (h, w) bool, whose pixels touch by their sides.

    Returns arrays (V, 2) float64 of the corners x, y, clockwise in the picture, straight runs of pixels joined.
    Bridges without width join the holes of a part to its outer border.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return []
    corner = np.array([columns[0], rows[0]])
    rings = _rings(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    areas = [_area(ring) for ring in rings]
    parts = [([ring], area) for ring, area in zip(rings, areas, strict=True) if area > 0]
    for hole in (ring for ring, area in zip(rings, areas, strict=True) if area < 0):  # its border runs the other way
        above = hole[0] - 0.5  # the center of the pixel above its first side
        around, _ = min((part for part in parts if _holds(part[0][0], above)), key=lambda part: part[1])
        around.append(hole)
    return [(joined(part) + corner).astype(np.float64) for part, _ in parts]


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


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """Walk along all borders with the mask on the right; where pixels touch at a corner, turn right."""
    padded = np.pad(mask, 1).astype(np.int8)
    across: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # {(x, y): x of the ends of edges from there}
    down: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # {(x, y): y of the ends of edges from there}
    for y, *ends, begins in _runs(np.diff(padded, axis=0)[:, 1:-1]):
        x, end = ends if begins > 0 else reversed(ends)
        across[x, y].append(end)
    for x, *ends, begins in _runs(np.diff(padded, axis=1)[1:-1].T):
        end, y = ends if begins > 0 else reversed(ends)
        down[x, y].append(end)
    rings = []
    for x, y in sorted(across, key=lambda corner: corner[::-1]):  # from above: at the first corner, one edge is left
        falling, ring = False, []
        while across[x, y]:
            end = _take(across[x, y], largest=not falling)
            ring += [(x, y), (end, y)]
            x, rightward = end, end > x
            end = _take(down[x, y], largest=rightward)
            y, falling = end, end > y
        if ring:
            rings.append(np.array(ring))
    return rings


def _take(ends: list[int], *, largest: bool) -> int:
    end = max(ends) if largest else min(ends)
    ends.remove(end)
    return end


def _runs(steps: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yield (row, first, end, step) of each run of one step, 1 or -1, in the rows of an array with zeros."""
    fenced = np.pad(steps, ((0, 0), (1, 1)))
    rows, firsts = np.nonzero(fenced[:, 1:] != fenced[:, :-1])
    values = fenced[rows, firsts + 1]
    runs = np.flatnonzero(values)  # each ends at the next change, in the same row
    columns = (rows[runs], firsts[runs], firsts[runs + 1], values[runs])
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _holds(ring: np.ndarray, point: np.ndarray) -> bool:
    """Return whether a point (2,), the center of a pixel, lies inside a ring."""
    x, y = ring[1::2].T  # from here, the edges go down
    _, end = np.roll(ring, -2, axis=0)[::2].T
    crossed = (x > point[0]) & ((y > point[1]) != (end > point[1]))
    return bool(crossed.sum() % 2)
