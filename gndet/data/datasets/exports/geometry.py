"""Turn the shapes of labelling tools into COCO's boxes and segmentations, and join the parts of an object.

Coordinates are pixels; pixel i covers [i, i + 1).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.columns import Item, Size
from gndet.data.datasets.exports.engine import Found
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import MAX_PIXELS
from gndet.data.datasets.masks import check_segmentation
from gndet.data.datasets.segmentation import to_rle
from gndet.text import printable

FLATNESS = 0.05  # pixels: how far the outline of an ellipse may lie inside it
MAX_CORNERS = 720  # of the outline of an ellipse


def box_around(points: Iterable[Sequence[float]]) -> list[float]:
    """Return the box [x, y, width, height] around points x, y."""
    x, y = zip(*points, strict=True)
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> list[list[float]]:
    """Return an ellipse as a segmentation, a polygon with its corners on it, four of them at its vertices.

    x, y: center; rx, ry: half axes; turn: radians from x to y.  Raises Fault if it has no size.
    """
    if not (math.isfinite(x + y + rx + ry + turn) and min(rx, ry) > 0):
        raise Fault("shape-malformed", f"an ellipse or circle with the radii {rx:g} and {ry:g}")
    quarter = math.pi / 4 / math.acos(max(1 - FLATNESS / max(rx, ry), 0.98))  # corners per quarter, 4 or more
    angles = np.linspace(0, 2 * math.pi, 4 * math.ceil(min(quarter, MAX_CORNERS / 4)), endpoint=False)
    along, across = rx * np.cos(angles), ry * np.sin(angles)
    cos, sin = math.cos(turn), math.sin(turn)
    points = np.stack((x + along * cos - across * sin, y + along * sin + across * cos), axis=1)
    return [points.ravel().tolist()]


def check_window(left: int, top: int, height: int, width: int, size: Size) -> None:
    """Raise Fault if the window of a mask is not of a plausible size in a picture of size height, width."""
    if not (0 < height <= size[0] + 1 and 0 < width <= size[1] + 1 and height * width <= MAX_PIXELS):
        where = f"a mask of {width} x {height} pixels at {left}, {top}"
        raise Fault("shape-malformed", f"{where}, in a picture of {size[1]} x {size[0]}")


def window_rle(window: np.ndarray, left: int, top: int, size: Size) -> Item:
    """Return a mask (h, w) bool, whose first pixel is left, top, as an RLE of a picture of size height, width.

    What lies outside the picture is cut off.  Raises Fault if nothing is left.
    """
    height, width = size
    words = f"a mask of {window.shape[1]} x {window.shape[0]} pixels at {left}, {top}"
    window = window[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    left, top = max(left, 0), max(top, 0)
    columns, rows = np.nonzero(np.diff(window.astype(np.int8), axis=0, prepend=0, append=0).T)
    edges = (columns + left) * height + rows + top  # where runs begin and end, in turn, column by column
    touching = 2 * np.flatnonzero(edges[1:-1:2] == edges[2::2])  # a run goes on at the top of the next column
    edges = np.delete(edges, np.concatenate((touching + 1, touching + 2)))
    if not len(edges):
        raise Fault("mask-empty", words)
    ends = [height * width] if edges[-1] < height * width else []
    return {"size": [height, width], "counts": np.diff([0, *edges.tolist(), *ends]).tolist()}


def join_groups(items: Sequence[tuple[Any, Item]], size: Callable[[], Size], findings: Found) -> list[Item]:
    """Join the objects of one class and group to one object, as the tools do themselves when they write COCO's JSON.

    items: group and object; an object whose group is None stays alone.  size: returns height, width of the picture.
    Returns the objects in the order of their first parts.
    """
    parts: dict[Any, list[Item]] = {}
    for number, (group, item) in enumerate(items):
        parts.setdefault((item["category"], str(group)) if group is not None else number, []).append(item)
    objects = []
    for members in parts.values():
        place = members[0]["place"]
        try:
            objects.append(with_box(members[0] if len(members) == 1 else _join(members, size)))
        except Fault as fault:
            findings.append((fault.code, f"{place}: {fault}"))
        if len(members) > 1:
            words = f"{place}: {len(members)} shapes of {printable(members[0]['category'])} with one group_id"
            findings.append(("shape-joined", words))
    return objects


def with_box(item: Item) -> Item:
    """Return an object with the box around its mask, if it has no box."""
    if "bbox" in item:
        return item
    mask = item["segmentation"]
    if isinstance(mask, list):
        return item | {"bbox": box_around(point for part in mask for point in zip(part[::2], part[1::2], strict=True))}
    return item | {"bbox": coco_mask.toBbox(to_rle(mask, tuple(mask["size"]))).tolist()}


def _join(members: list[Item], size_of: Callable[[], Size]) -> Item:
    """Return one object: its mask is the union of the members, or, if all are boxes, its box holds all of them."""
    first = {key: members[0][key] for key in ("category", "place")}
    shapes = [member["segmentation"] for member in members if "segmentation" in member]
    corners = [_corners(member) for member in members if "segmentation" not in member]
    if not shapes:
        return first | {"bbox": box_around(chain.from_iterable(corners))}
    shapes += [[list(chain.from_iterable(box))] for box in corners]
    if all(isinstance(shape, list) for shape in shapes):
        return first | {"segmentation": list(chain.from_iterable(shapes))}
    size = size_of()
    checked = filter(None, (check_segmentation(shape, size) for shape in shapes))
    rle = coco_mask.merge([to_rle(shape, size) for shape in checked])
    return first | {"segmentation": {"size": list(size), "counts": rle["counts"].decode()}}


def _corners(item: Item) -> list[tuple[float, float]]:
    """Return the four corners of an object's box, turned about its center if it has a rotation."""
    x, y, width, height = item["bbox"]
    turn = math.radians(item.get("attributes", {}).get("rotation", 0))
    cos, sin = math.cos(turn), math.sin(turn)
    steps = [(dx * width / 2, dy * height / 2) for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return [(x + width / 2 + dx * cos - dy * sin, y + height / 2 + dx * sin + dy * cos) for dx, dy in steps]
