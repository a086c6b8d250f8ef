"""Read an XML file in Pascal VOC's format: a picture's name, size and boxes.

Corners are pixels counted from 1, the last one included: 1 is taken from xmin and ymin, as detectron2 does.  Many
programs count from 0 and mean the edges; where 0 occurs, or parts of pixels are usual, corners are read as they are.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from gndet.data.datasets.exports.engine import Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import read_text, stem_of
from gndet.data.datasets.faults import Fault
from gndet.text import brief, shown

SIDES = ("xmin", "ymin", "xmax", "ymax")
SAMPLE = 500  # XML files that are looked at to find out how corners are counted
FRACTIONS = 0.1  # share of boxes with parts of pixels from which on corners are edges; VOC 2012 has a few such boxes
_ENCODING = re.compile(rb"""^<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)["'][^>]*\?>""")

Unit = tuple[str, str, tuple[str, ...]]  # XML file, folder of its picture ("" or ending in /), pictures of its stem


def parse_voc(home: str, first: int, unit: Unit, size_of: SizeOf) -> list[Picture]:
    """Read the picture of an XML file.  home: the folder that files are relative to; first: the number of pixel 0.

    Raises Fault for a file that cannot be read.
    """
    file, below, names = unit
    root = read_xml(home, file)
    found: Found = []
    objects = []
    file = shown(file)
    name = _choose_picture(file, (root.findtext("filename") or "").strip(), names, found)
    for number, item in enumerate(root.findall("object"), start=1):
        parts = {part.tag: part for part in item}
        texts = {tag: (part.text or "").strip() for tag, part in parts.items()}
        place, label = f"{file}, object {number}", texts.get("name", "")
        fault, corners = _corners(parts)
        fault = fault or ("" if label else "no name")
        if fault:
            found.append(("object-malformed", f"{place}: {fault}"))
            continue
        x0, y0, x1, y1 = corners
        if x0 > x1 or y0 > y1:
            found.append(("box-swapped", f"{place}: xmin {x0:g}, ymin {y0:g}, xmax {x1:g}, ymax {y1:g}"))
            x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        if texts.get("difficult") == "1":
            found.append(("box-difficult", f"{place}: {brief(label)}"))
        if "polygon" in parts:
            found.append(("outline-unread", f"{place}: a polygon beside bndbox"))
        box = [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]
        box = box if any(corners) else corners  # 0 0 0 0 is no pixel, but how some programs write that there is none
        turn = {"attributes": {"rotation": turn}} if (turn := _turn(parts)) else {}
        objects.append({"bbox": box, "category": label, "place": place} | turn)
    return [Picture(below + name, _size(root), objects, found)]


def read_xml(home: str, file: str) -> ElementTree.Element:
    """Parse an XML file in the encoding that it declares.  Raises Fault for anything but VOC's annotations."""
    try:
        with open(os.path.join(home, file), "rb") as stream:
            text = stream.read()
        root = _parse(text)
    except OSError as error:
        raise Fault("json-unreadable", f"{shown(file)}: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        if text.lstrip().startswith(b"<") and not _ENCODING.match(text):
            read_text(os.path.join(home, file))  # raises the Fault of another encoding
        raise Fault("xml-broken", f"{shown(file)}: {error}") from None
    if root.tag != "annotation":
        raise Fault("data-unknown", f"{shown(file)}: its outermost element is {brief(root.tag)}, VOC's is 'annotation'")
    return root


def _parse(text: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in text or (b"\0" in text and b"<!ENTITY" in text.replace(b"\0", b"")):
        raise ValueError("it declares entities, which VOC does not; remove its <!DOCTYPE ...>")
    try:
        return ElementTree.fromstring(text)
    except ValueError:  # an encoding of several bytes per letter, which the parser does not know
        declared = _ENCODING.match(text)
        if not declared:
            raise
        return ElementTree.fromstring(text[declared.end() :].decode(declared[1].decode()))


def _choose_picture(file: str, tag: str, names: Sequence[str], found: Found) -> str:
    """Return which picture an XML file is of: the one of its own name, as VOC's lists mean it, else the one it names.

    tag: its filename; names: the pictures that have its own name.
    """
    tag = tag.replace("\\", "/").rpartition("/")[2]
    stem = stem_of(os.path.basename(file))
    if tag in names:
        return tag
    if not names:
        return tag or f"{stem}.jpg"
    if tag and stem not in (stem_of(tag), tag):
        found.append(("picture-renamed", f"{file}: filename {brief(tag)}, read {brief(names[0])}"))
    return names[0]


def _corners(parts: Mapping[str, ElementTree.Element]) -> tuple[str, list[float]]:
    """Return what is wrong with an object's bndbox, or "", and its corners; parts: the object's elements by tag."""
    if "bndbox" not in parts:
        others = ", ".join(tag for tag in parts if tag in ("polygon", "robndbox", "segm", "point"))
        return f"no bndbox{f', but {others}' if others else ''}", []
    texts = {side.tag: side.text for side in parts["bndbox"]}
    try:
        return "", [float(texts.get(side) or "") for side in SIDES]
    except ValueError:
        return f"bndbox {brief([texts.get(side) for side in SIDES])}, expected numbers {', '.join(SIDES)}", []


def _turn(parts: Mapping[str, ElementTree.Element]) -> str | None:
    """Return the attribute `rotation` of an object, degrees as CVAT writes them; None if it has none."""
    listed = parts["attributes"].findall("attribute") if "attributes" in parts else []
    return next((item.findtext("value") for item in listed if item.findtext("name") == "rotation"), None)


def _size(root: ElementTree.Element) -> tuple[Any, Any] | None:
    """Return height and width; None if they are missing or 0, as some programs write them."""
    sides: list[Any] = []
    texts = {side.tag: side.text for size in root.findall("size") for side in size}
    for side in ("height", "width"):
        text = (texts.get(side) or "").strip()
        try:
            number = float(text or 0)
        except ValueError:
            sides.append(text)
        else:
            sides.append(int(number) if number.is_integer() else number)
    return None if 0 in sides else (sides[0], sides[1])


def counted_from_0(home: str, files: Sequence[str]) -> str:
    """Return in words why the corners of an export are counted from 0; "" if nothing says so.

    One rule holds for the whole export.  A sample of the files decides.
    """
    total = fractions = 0
    for file in files[:: max(len(files) // SAMPLE, 1)]:
        try:
            items = read_xml(home, file).findall("object")
        except Fault:
            continue  # reported when it is parsed
        for number, item in enumerate(items, start=1):
            fault, corners = _corners({part.tag: part for part in item})
            if fault or corners[0] == corners[2] or corners[1] == corners[3] or not math.isfinite(sum(corners)):
                continue
            if any(0 <= value < 1 for value in corners):
                return f"{shown(file)}, object {number}: {' '.join(f'{value:g}' for value in corners)}"
            total += 1
            fractions += not all(value.is_integer() for value in corners)
    return f"{fractions} of {total} boxes have parts of pixels" if fractions > FRACTIONS * total else ""
