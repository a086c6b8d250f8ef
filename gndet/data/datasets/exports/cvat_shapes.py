"""Turn the shapes of CVAT's XML into objects with COCO's boxes and masks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gndet.data.datasets.columns import Item, Size
from gndet.data.datasets.exports.engine import Found
from gndet.data.datasets.exports.geometry import check_window, ellipse, window_rle
from gndet.data.datasets.faults import Fault
from gndet.text import brief, printable

OTHERS = ("polyline", "points", "cuboid", "skeleton", "tag")  # what is no object

Attributes = dict[str, str]


class Shape(NamedTuple):
    """An element that may be an object."""

    element: str
    attributes: Attributes
    label: str | None
    place: str


def add_object(shape: Shape, size: Callable[[], Size], items: list[tuple[Any, Item]], findings: Found) -> None:
    """Add a shape and its group to the items; if it is faulty, add a finding instead."""
    try:
        if shape.element in OTHERS:
            raise Fault("shape-other", f"a {shape.element}")
        if not shape.label:
            raise Fault("shape-label", f"a {shape.element} without a label")
        item = {"category": shape.label, "place": shape.place} | _geometry(shape.element, shape.attributes, size)
        group = shape.attributes.get("group_id")
        items.append((None if group in (None, "", "0") else group, item))
    except Fault as fault:
        findings.append((fault.code, f"{shape.place}: {fault}"))


def _geometry(element: str, attributes: Attributes, size: Callable[[], Size]) -> Item:
    """Return the box or the mask of a shape, in COCO's form.  Raises Fault."""
    if element == "box":
        left, top, right, bottom, turn = _numbers(attributes, "xtl", "ytl", "xbr", "ybr", rotation=0)
        item: Item = {"bbox": [left, top, right - left, bottom - top]}
        return item | {"attributes": {"rotation": turn}} if turn else item  # CVAT states the box before the turn
    if element == "polygon":
        return {"segmentation": [_points(attributes.get("points", ""))]}
    if element == "ellipse":
        x, y, rx, ry, turn = _numbers(attributes, "cx", "cy", "rx", "ry", rotation=0)
        return {"segmentation": ellipse(x, y, rx, ry, math.radians(turn))}
    if element == "mask":
        return {"segmentation": _mask(attributes, size())}
    raise Fault("shape-other", f"a {printable(element)}")


def _numbers(attributes: Attributes, *names: str, **optional: float) -> list[float]:
    """Return the values of attributes.  Raises Fault for a missing one, or one that is not a number."""
    values = []
    for name in (*names, *optional):
        text = attributes.get(name, optional.get(name))
        try:
            values.append(float(text))  # type: ignore[arg-type]  # None is what the except is for
        except (TypeError, ValueError):
            raise Fault("shape-malformed", f"{name} {brief(text)}, expected a number") from None
    return values


def _points(text: str) -> list[float]:
    """Return x0, y0, x1, y1, ... of the text "x0,y0;x1,y1;...".  Raises Fault."""
    pairs = [pair.split(",") for pair in text.strip().strip(";").split(";")]
    try:
        if set(map(len, pairs)) != {2}:
            raise ValueError
        points = [float(number) for pair in pairs for number in pair]
    except ValueError:
        raise Fault("shape-malformed", f"points {brief(text)}, expected x,y;x,y;...") from None
    if len(pairs) < 3:
        raise Fault("polygon-short", f"a polygon of {len(pairs)} points")
    return points


def _mask(attributes: Attributes, size: Size) -> Item:
    """Turn a mask, whose runs go along the rows of a window and begin outside, into an RLE of the picture's size."""
    numbers = _numbers(attributes, "left", "top", "width", "height")
    if not all(map(math.isfinite, numbers)):
        raise Fault("shape-malformed", f"left, top, width, height {brief(numbers)}, expected whole numbers")
    left, top, width, height = map(int, numbers)
    check_window(left, top, height, width, size)
    text = attributes.get("rle", "")
    try:
        runs = [int(run) for run in text.split(",")]
    except ValueError:
        raise Fault("shape-malformed", f"rle {brief(text)}, expected whole numbers with commas between them") from None
    if min(runs) < 0 or sum(runs) != width * height:
        raise Fault("rle-counts", f"run lengths add up to {sum(runs)}, expected {width} x {height}")
    return window_rle(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width), left, top, size)


def to_size(height: str | None, width: str | None) -> Size | None:
    """Return the stated size of a picture, None if it is missing or not in whole numbers."""
    sides = to_integer(height), to_integer(width)
    return None if None in sides else sides  # type: ignore[return-value]


def to_integer(text: str | None) -> int | None:
    try:
        return int(float(text or ""))
    except (OverflowError, ValueError):
        return None
