"""Read LabelMe's JSON files, one per picture; X-AnyLabeling writes the same."""

import base64
import io
import math
import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gndet.data.datasets.columns import Item, Size
from gndet.data.datasets.exports.engine import Export, Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import files_below, find_images, read_json
from gndet.data.datasets.exports.geometry import box_around, check_window, ellipse, join_groups, window_rle
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.formats import name_format, sniff
from gndet.data.datasets.image_folder import HEAD
from gndet.data.datasets.images import DECODER_ERRORS, PICTURES
from gndet.text import brief, printable, shown

FOLDERS = ("", "images", "../images", "../JPEGImages", "..", "../img")  # where the pictures may lie, from the files
OUTLINES = ("polygon", "rotation", "oriented_rectangle", "quadrilateral")
NO_CLASSES = ("__ignore__", "_background_")  # LabelMe's labels of what is no object


def open_labelme(annotations: Path, images: Path | None, split: str) -> Export:
    """Open the files of a folder, or one file; the classes are the labels that occur.

    annotations: if the folder itself has no JSON file, those below it are taken.  images: the image folder; None: it is
    found near the files.  split is unused: LabelMe knows no sets.  Raises Fault if no file is LabelMe's.
    """
    home, found = annotations.parent, [annotations.name]
    if annotations.is_dir():
        home, found = annotations, files_below(annotations, (".json",))
        found = [name for name in found if "/" not in name] or found
    units = [name for name in found if _is_labelme(home / name)]
    if not units:
        named = name_format(home / found[0]) if found else None
        other = f"; {shown(found[0])}: {named}" if named else ""
        raise Fault("data-unknown", f"{annotations}: no JSON file of LabelMe's{other}")
    others = len(found) - len(units)
    notes = (f"{others} of {len(found)} JSON files are not LabelMe's; they are left out",) if others else ()
    if images is None:
        folders = (*FOLDERS, _stated_folder(home / units[0]))
        images = find_images(home, folders, [posixpath.splitext(unit)[0] for unit in units])
    files = [home / name for name in units]
    return Export(units, partial(_parse_file, home, images), None, images, files, notes=notes)


def _is_labelme(path: Path) -> bool:
    with path.open("rb") as file:  # most files show it at once: an export may have 100,000
        return b'"shapes"' in file.read(HEAD) or sniff(path) == "labelme"


def _stated_folder(path: Path) -> str:
    """Return the folder of the picture that a file names, relative to the file; "" if it is none here."""
    try:
        content = read_json(path)
    except (Fault, OSError):  # reported when it is parsed
        return ""
    stated = content.get("imagePath") if isinstance(content, dict) else None
    folder = posixpath.dirname(stated.replace("\\", "/")) if isinstance(stated, str) else ""
    return "" if folder.startswith("/") or ":" in folder else folder


def _parse_file(home: Path, images: Path, name: str, size_of: SizeOf) -> list[Picture]:
    """Parse the file of a picture; name: relative to home."""
    content = read_json(home / name)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise Fault("data-unknown", f"{home / name}: not LabelMe's: shapes is not a list")
    findings: Found = []
    file_name = _find_picture(images, name, content, size_of, findings)
    sides = content.get("imageHeight"), content.get("imageWidth")

    def size() -> Size:
        height, width = sides
        return (height, width) if type(height) is type(width) is int else size_of(file_name)

    items: list[tuple[Any, Item]] = []
    for number, shape in enumerate(content["shapes"]):
        place = f"{shown(name)}, shapes[{number}]"
        try:
            item = _to_object(shape if isinstance(shape, dict) else {}, size)
            items.append((shape.get("group_id"), item | {"place": place}))
        except Fault as fault:
            findings.append((fault.code, f"{place}: {fault}"))
    stated = None if None in sides else sides
    return [Picture(file_name, stated, join_groups(items, size, findings), findings)]


def _find_picture(images: Path, name: str, content: dict[str, Any], size_of: SizeOf, findings: Found) -> str:
    """Return the name of the picture of a file, from imagePath, which is relative to the file, or from the file's name.

    Raises Fault if the picture is missing, but embedded in the file.
    """
    stated, folder = content.get("imagePath"), posixpath.dirname(name)
    if isinstance(stated, str) and stated:
        path = posixpath.normpath(stated.replace("\\", "/"))
        inside = not path.startswith(("/", "../")) or None
        leaf = posixpath.basename(path)
        for place in (inside and posixpath.join(folder, path), posixpath.join(folder, leaf), leaf):
            if place and (images / place).is_file():
                return place
    start = posixpath.splitext(name)[0]
    for suffix in (*PICTURES, *map(str.upper, PICTURES)):
        if (images / (start + suffix)).is_file():
            findings.append(
                ("picture-renamed", f"{shown(name)}: imagePath {brief(stated)}, read {brief(start + suffix)}")
            )
            return start + suffix
    file_name = stated if isinstance(stated, str) and stated else start
    if content.get("imageData"):
        try:
            size_of(file_name)
        except Fault:
            raise Fault("picture-embedded", f"{shown(name)}: imagePath {brief(stated)} is not in {images}") from None
    return file_name


def _to_object(shape: dict[str, Any], size: Callable[[], Size]) -> Item:
    """Return the class and the box or mask of a shape, in COCO's form.  Raises Fault."""
    label, kind = shape.get("label"), shape.get("shape_type") or "polygon"
    if label in NO_CLASSES:
        raise Fault("shape-other", f"a {printable(str(kind))} of {label}")
    if not isinstance(label, str) or not label.strip():
        raise Fault("shape-label", f"label {brief(label)}, expected text")
    points = _points(shape.get("points"))
    if kind in OUTLINES:
        if len(points) < 3:
            raise Fault("polygon-short", f"a polygon of {len(points)} points")
        return {"category": label, "segmentation": [[number for point in points for number in point]]}
    if kind in ("rectangle", "circle", "mask") and len(points) != 2 and not (kind == "rectangle" and len(points) == 4):
        raise Fault("shape-malformed", f"a {kind} of {len(points)} points, expected 2")
    if kind == "rectangle":
        return {"category": label, "bbox": box_around(points)}
    if kind == "circle":
        (x, y), radius = points[0], math.dist(*points)
        return {"category": label, "segmentation": ellipse(x, y, radius, radius)}
    if kind == "mask":
        return {"category": label, "segmentation": _mask(shape.get("mask"), points, size())}
    raise Fault("shape-other", f"a {printable(str(kind))}")


def _points(points: Any) -> list[list[float]]:
    """Return points x, y.  Raises Fault."""
    numbers = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    if not numbers or not all(type(number) in (int, float) for point in points for number in point):
        raise Fault("shape-malformed", f"points {brief(points)}, expected [[x, y], ...]")
    return points


def _mask(text: Any, points: list[list[float]], size: Size) -> Item:
    """Decode a mask, a PNG in base64 that fills the window from the first point to the last.  Returns an RLE."""
    x, y, width, height = box_around(points)
    if not math.isfinite(x + y + width + height):
        raise Fault("shape-malformed", f"points {brief(points)}, expected numbers")
    left, top, width, height = int(x), int(y), int(x + width) - int(x) + 1, int(y + height) - int(y) + 1
    check_window(left, top, height, width, size)
    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
            if max(abs(image.width - width), abs(image.height - height)) > 1:  # LabelMe rounds the points
                found = f"a mask of {image.width} x {image.height} pixels"
                raise Fault("shape-malformed", f"{found} between points {width} x {height} pixels apart")
            window = np.asarray(image.convert("L")) > 0
    except DECODER_ERRORS as error:
        raise Fault("shape-malformed", f"mask {brief(text)}, expected a PNG in base64: {error}") from None
    return window_rle(window, left, top, size)
