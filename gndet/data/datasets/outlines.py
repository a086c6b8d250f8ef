"""Read outlines that are not in COCO's form, where only one reading is possible."""

from itertools import chain
from typing import Any

POINTS = 3  # the fewest points of a polygon


def in_coco_form(segmentation: list[Any]) -> Any:
    """Convert a segmentation that is a list to COCO's form if only one reading is possible.

    The other forms are one flat polygon [x0, y0, x1, y1, ...]; points as pairs, [[x, y], ...] or [[[x, y], ...], ...];
    polygons in one list too many; and a list that holds one RLE.  Anything else is returned as it is.
    """
    if len(segmentation) == 1 and type(segmentation[0]) is dict:
        return segmentation[0]
    if _is_flat(segmentation):
        return [segmentation]
    if _are_points(segmentation) and len(segmentation) >= POINTS:
        return [_flattened(segmentation)]
    polygons = [_polygon(part) for part in segmentation]
    same = all(polygon is part for polygon, part in zip(polygons, segmentation, strict=True))
    return segmentation if same or not all(type(polygon) is list for polygon in polygons) else polygons


def _polygon(part: Any) -> Any:
    while type(part) is list and len(part) == 1 and type(part[0]) is list and not _are_points(part):
        part = part[0]
    return _flattened(part) if _are_points(part) else part


def _is_flat(values: list[Any]) -> bool:
    numbers = all(type(value) in (int, float) for value in values)
    return numbers and len(values) >= 2 * POINTS and len(values) % 2 == 0


def _are_points(values: Any) -> bool:
    """Return whether these are pairs that hold no further list; their values may still be faulty."""
    return (
        type(values) is list
        and bool(values)
        and all(type(pair) is list and len(pair) == 2 for pair in values)
        and (list not in set(map(type, chain.from_iterable(values))))
    )


def _flattened(points: list[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(points))
