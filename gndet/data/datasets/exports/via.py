"""Read the annotations of VIA 1 and 2 (VGG Image Annotator): a project, its JSON, or its CSV.

VIA has no classes, only attributes of regions; the one that is the class is known by being alone, or by its name.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gndet.data.datasets.columns import Item
from gndet.data.datasets.exports.engine import Export, Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import find_images, read_json, read_text
from gndet.data.datasets.exports.geometry import ellipse, with_box
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.formats import name_format, sniff
from gndet.data.datasets.image_folder import read_head
from gndet.text import brief, printable

FOLDERS = ("", "images", "../images", "..")  # where the pictures may lie, from the file
CLASS_NAMES = ("class", "label", "category", "name", "type", "object")  # of the attribute that is the class
ALONE = "object"  # the class of all regions, if none has an attribute
COLUMNS = ("filename", "file_size", "region_shape_attributes", "region_attributes")  # of CSV
NUMBERS = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy", "r"), "ellipse": ("cx", "cy", "rx", "ry")}


class Region(NamedTuple):
    """A region as the file has it."""

    place: str
    shape: Any
    attributes: Any


class Unit(NamedTuple):
    """A picture with its regions."""

    file_name: str
    regions: list[Region]


def open_via(annotations: Path, images: Path | None, split: str) -> Export:
    """Open a file; the classes are the options of a project's attribute, or else the values that occur.

    images: the image folder; None: it is found near the file.  split is unused: VIA knows no sets.
    Raises Fault if the file is not VIA's, or if several attributes may be the class.
    """
    units, declared, folders = _read_file(annotations)
    if not units:
        raise Fault("data-unknown", f"{annotations}: holds no picture")
    regions = [region for unit in units for region in unit.regions]
    chosen = _class_attribute(annotations, regions)
    names = _options(declared.get(chosen) if chosen else None)
    classes = None
    if names:
        values = {names.get(value, value) for region in regions for value in _values(region.attributes, chosen)}
        classes = tuple(dict.fromkeys([*names.values(), *sorted(values)]))
    notes = []
    if chosen is None and regions:
        notes.append(f"the regions have no attributes: all are of the class {ALONE}")
    elif chosen is not None:
        notes.append(f"the attribute {printable(chosen)} of the regions is their class")
    if images is None:
        images = find_images(annotations.parent, (*folders, *FOLDERS), [unit.file_name for unit in units])
    return Export(units, partial(_parse, chosen, names), classes, images, [annotations], notes=tuple(notes))


def _read_file(path: Path) -> tuple[list[Unit], dict[str, Any], list[str]]:
    """Return the pictures of a file, the attributes that a project declares, and its folder of pictures."""
    if sniff(path) != "via":
        raise Fault("data-unknown", f"{path}: not VIA's" + (f": {named}" if (named := name_format(path)) else ""))
    if not read_head(path).strip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"{"):
        return list(_rows(path, read_text(path))), {}, []
    content = read_json(path)
    folder = str(_inside(content, "_via_settings", "core").get("default_filepath", ""))
    near = ".." not in folder and not PurePosixPath(folder).is_absolute()
    files = _inside(content, "_via_img_metadata") if "_via_settings" in content else content
    return list(_entries(path, files)), _inside(content, "_via_attributes", "region"), [folder] if near else []


def _inside(value: Any, *keys: str) -> dict[str, Any]:
    """Return the object at nested keys, {} if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _entries(path: Path, files: dict[str, Any]) -> Iterator[Unit]:
    """Yield the pictures of JSON."""
    for key, entry in files.items():
        entry = entry if isinstance(entry, dict) else {}
        name, regions = entry.get("filename", key), entry.get("regions", [])
        regions = list(regions.values()) if isinstance(regions, dict) else regions  # VIA 1 numbers them
        listed = [
            region if isinstance(region, dict) else {} for region in (regions if isinstance(regions, list) else [])
        ]
        places = (f"{path.name}, {printable(str(name))}, regions[{number}]" for number in range(len(listed)))
        yield Unit(str(name), [
            Region(place, region.get("shape_attributes"), region.get("region_attributes"))
            for place, region in zip(places, listed, strict=True)
        ])  # fmt: skip


def _rows(path: Path, text: str) -> Iterator[Unit]:
    """Yield the pictures of CSV, in the order of their first rows.  Raises Fault."""
    units: dict[tuple[str, str], Unit] = {}
    comma = max(",;\t", key=text.partition("\n")[0].count)  # a table program may have written it anew
    table = csv.reader(io.StringIO(text, newline=""), delimiter=comma)
    try:
        heading = [name.strip(" #") for name in next(table)]
        for row in filter(None, table):
            extra = len(row) - len(heading)  # commas in the name of the picture, which VIA does not quote
            row = [comma.join(row[: extra + 1]), *row[extra + 1 :]] if extra > 0 else row
            name, file_size, shape, attributes = (row[heading.index(column)] for column in COLUMNS)
            unit = units.setdefault((name, file_size), Unit(name, []))
            if shape.strip() != "{}":  # which is a picture without regions
                unit.regions.append(Region(f"{path.name}, line {table.line_num}", _parsed(shape), _parsed(attributes)))
    except csv.Error as error:
        raise Fault("csv-broken", f"{path}, line {table.line_num}: {error}") from None
    except (IndexError, ValueError):
        raise Fault("csv-broken", f"{path}, line {table.line_num}: expected the columns {', '.join(COLUMNS)}") from None
    yield from units.values()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _values(attributes: Any, name: str | None) -> list[str]:
    """Return the values of an attribute: one, or of a checkbox those that are set."""
    value = attributes.get(name) if isinstance(attributes, dict) else None
    if isinstance(value, dict):
        return [key for key, is_set in value.items() if is_set]
    return [str(value).strip()] if value not in (None, "") and str(value).strip() else []


def _class_attribute(path: Path, regions: Iterable[Region]) -> str | None:
    """Return the attribute that is the class, None if no region has any.  Raises Fault if it may be one of several."""
    used = {
        name: True
        for region in regions
        if isinstance(region.attributes, dict)
        for name in region.attributes
        if _values(region.attributes, name)
    }
    likely = [name for name in used if name.strip().casefold() in CLASS_NAMES]
    if len(used) < 2 or len(likely) == 1:
        return next(iter(likely or used), None)
    raise Fault("class-attribute", f"{path}: the class may be any of the attributes {', '.join(map(brief, used))}")


def _options(declared: Any) -> dict[str, str]:
    """Return the options of an attribute that a project declares: their names by id, {} for a text."""
    options = declared.get("options") if isinstance(declared, dict) else None
    if not isinstance(options, dict):
        return {}
    return {key: name if isinstance(name, str) and name.strip() else key for key, name in options.items() if key}


def _parse(chosen: str | None, names: dict[str, str], unit: Unit, size_of: SizeOf) -> list[Picture]:
    """Parse the regions of a picture."""
    objects: list[Item] = []
    findings: Found = []
    for region in unit.regions:
        try:
            values = [ALONE] if chosen is None else _values(region.attributes, chosen)
            if len(values) != 1:
                found = brief(region.attributes.get(chosen) if isinstance(region.attributes, dict) else None)
                raise Fault("shape-label", f"{printable(str(chosen))} {found}, expected one value")
            category = names.get(values[0], values[0])
            objects.append(with_box({"category": category, "place": region.place} | _geometry(region.shape)))
        except Fault as fault:
            findings.append((fault.code, f"{region.place}: {fault}"))
    return [Picture(unit.file_name, None, objects, findings)]


def _geometry(shape: Any) -> Item:
    """Return the box or the mask of a shape, in COCO's form.  Raises Fault."""
    name = shape.get("name") if isinstance(shape, dict) else None
    if name == "polygon":
        x, y = (shape.get(f"all_points_{axis}") for axis in "xy")
        if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y) and all(map(_is_number, [*x, *y]))):
            raise Fault(
                "shape-malformed", f"all_points_x {brief(x)}, all_points_y {brief(y)}, expected as many numbers"
            )
        if len(x) < 3:
            raise Fault("polygon-short", f"a polygon of {len(x)} points")
        return {"segmentation": [[number for point in zip(x, y, strict=True) for number in point]]}
    if not isinstance(name, str) or name not in NUMBERS:
        known = isinstance(name, str) and name
        raise Fault("shape-other" if known else "shape-malformed", f"a {name}" if known else f"shape {brief(shape)}")
    numbers = [shape.get(key) for key in NUMBERS[name]]
    turn = shape.get("theta", 0)  # radians
    if not all(map(_is_number, (*numbers, turn))):
        raise Fault("shape-malformed", f"a {name} of {brief(shape)}, expected numbers {', '.join(NUMBERS[name])}")
    if name == "rect":
        return {"bbox": numbers}
    x, y, *radii = numbers
    return {"segmentation": ellipse(x, y, radii[0], radii[-1], turn)}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
