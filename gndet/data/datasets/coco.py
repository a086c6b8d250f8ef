"""Read a data set in COCO's JSON format: check all of it, list all faults, keep what is valid.

What can be fixed without guessing is fixed in memory and counted; the user's files are never written.
"""

import gc
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gndet.config.schema import DataConfig
from gndet.data.datasets.cache import cached
from gndet.data.datasets.columns import MAX_SIDE, Columns, Known, Size, read_columns, to_integer, with_ids
from gndet.data.datasets.faults import Fault, Findings, in_order, with_totals
from gndet.data.datasets.image_folder import FILE, HEAD, ImageFolder, split_name, what_is
from gndet.data.datasets.images import Reading
from gndet.data.datasets.json_parts import Cut, NotInParts, read_around, read_parts, take_apart
from gndet.data.datasets.packed import Image, PackedRecords, pack
from gndet.data.datasets.plausible import judge_boxes
from gndet.data.datasets.segmentation import brief
from gndet.data.records import Dataset, Tell

LISTS = ("images", "annotations", "categories")


def inspect_file(path: Path, folder: Path | None, data: DataConfig, tell: Tell | None = None) -> Dataset:
    """Check an annotation file, and the listing of its image folder if one is given; use data.cache if it has them.

    Without a folder, the records cannot load their pictures.  tell: called with a line before a long wait.
    """
    found, found_in_folder = Findings(), Findings()
    files = dataset = None
    try:
        files = ImageFolder(folder) if folder else None
    except Fault as fault:
        found_in_folder.add(fault.code, str(fault))
    try:
        _refuse_other_kinds(path)
        reading = Reading.of(data)
        read = partial(_inspect, path, files, reading, found)
        with gc_paused():
            dataset = cached(data.cache, path, files, reading, read, tell)
    except Fault as fault:
        found.add(fault.code, str(fault))
    except OSError as error:
        found.add("json-unreadable", f"{path}: cannot read the annotation file: {error.strerror}")
    dataset = dataset or Dataset(str(path), (), (), [], found.listed())
    return dataset._replace(findings=in_order(dataset.findings + found_in_folder.listed()))


def to_coco(dataset: Dataset) -> dict[str, Any]:
    """Write a data set as a COCO ground-truth dict for evaluators: original category ids, boxes as xywh."""
    images, annotations = [], []
    for record in dataset.records:
        height, width = record.size
        images.append({"id": record.image_id, "file_name": record.file_name, "height": height, "width": width})
        columns = (record.annotation_ids, record.labels, record.boxes, record.area, record.crowd)
        rows = zip(*(column.tolist() for column in columns), record.segmentations, strict=True)
        for number, label, (x0, y0, x1, y1), area, crowd, segmentation in rows:
            annotation = {
                "id": number,
                "image_id": record.image_id,
                "category_id": dataset.category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": area,
                "iscrowd": int(crowd),
            }
            annotations.append(annotation if segmentation is None else annotation | {"segmentation": segmentation})
    classes = zip(dataset.category_ids, dataset.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _refuse_other_kinds(path: Path) -> None:
    """Raise Fault if the file is clearly not an annotation file, and OSError if it cannot be read."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise Fault("json-unreadable", f"{path}: is {kind}, expected the annotation file")
    with path.open("rb") as file:
        kind = what_is(file.read(HEAD))
    if kind != FILE:
        code = "json-archive" if "archive" in kind else "json-broken"
        raise Fault(code, f"{path}: not a JSON file: it is {kind}")


def _inspect(path: Path, files: ImageFolder | None, reading: Reading, found: Findings) -> Dataset:
    """Check the file's content, and add its faults to found.  Raises Fault if the file is not in COCO's format."""
    cuts, noted = take_apart(path), Findings()
    try:
        content = _read(path, cuts, files, reading.max_pixels, noted) if cuts else None
        found.take(noted.listed())
    except (OSError, Fault, NotInParts):
        content = None  # the cuts were wrong, so their findings are discarded
    images, names, objects = content or _read(path, [], files, reading.max_pixels, found)
    objects = with_ids(objects, found)
    folder = path.parent if files is None else files.home
    return assemble(str(path), images, names, objects, folder, reading, found)


def assemble(
    name: str, images: list[Image], names: dict[int, str], objects: Columns, folder: Path, reading: Reading,
    found: Findings,
) -> Dataset:  # fmt: skip
    """Make a data set of checked images, categories {id: name} and objects; note what only the whole of them shows.

    name: of the data set; folder: of the pictures; found: the findings so far, to which the notes are added.
    """
    category_ids = tuple(sorted(names))
    packed = pack(images, objects, category_ids)
    judge_boxes(packed, found)
    for category_id in np.setdiff1d(category_ids, objects.category_ids).tolist():
        found.add("category-unused", f"category {category_id}: {brief(names[category_id])}")
    for place in np.flatnonzero(~np.isin(packed.image_ids, objects.image_ids)).tolist():
        image = images[place]
        found.add("image-empty", f"image {image.image_id}: {brief(image.file_name)}", image.image_id)
    classes = tuple(names[category_id] for category_id in category_ids)
    records = PackedRecords(packed, folder, reading, range(len(images)))
    return Dataset(name, classes, category_ids, records, with_totals(found.listed(), len(objects.all_ids)))


def _read(
    path: Path, cuts: list[Cut], files: ImageFolder | None, max_pixels: int, found: Findings
) -> tuple[list[Image], dict[int, str], Columns]:
    """Read a file, in several processes if it is cut.

    Returns the images that are kept, the names of the categories by id, and the objects.  Raises Fault and OSError;
    with cuts also NotInParts, and MachineError if a process is killed.
    """
    tree = _parse(path, read_around(path, cuts) if cuts else path.read_bytes(), found)
    names = _read_categories(tree["categories"], found)
    images, sizes = read_images(tree.pop("images"), files, max_pixels, found)
    known = Known.of(sizes, names)
    objects = read_parts(path, cuts, known, found) if cuts else read_columns(tree["annotations"], known, found)[0]
    return images, names, objects


def _parse(path: Path, text: bytes, found: Findings) -> dict[str, list[dict[str, Any]]]:
    """Parse the text of a file.  Raises Fault if it lacks one of COCO's three lists of objects."""

    def constant(name: str) -> float:
        found.add("json-nan", f"{path.name}: the word {name}")
        return float(name.replace("Infinity", "inf"))

    try:
        tree = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Fault("json-broken", f"{path}: not a JSON file: {error}") from None
    if not isinstance(tree, dict):
        kind = f"a JSON {type(tree).__name__}"
        if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "score" in tree[0]:
            kind = "a list of detections (COCO's results format)"
        raise Fault("json-other", f"{path}: {kind}, expected an object, as in COCO's format")
    for key in LISTS:
        if not isinstance(tree.get(key), list) or not all(isinstance(item, dict) for item in tree[key]):
            raise Fault("json-other", f"{path}: {key}: {brief(tree.get(key))}, expected a list of objects, as in COCO")
        if not tree[key] and key != "annotations":
            raise Fault("json-other", f"{path}: {key}: the list is empty")
    return tree


def _new_id(item: dict[str, Any], kind: str, known: Collection[int], found: Findings) -> int | None:
    """Return the id of an image or category; None if it is not an integer of 0 or more, or is already known."""
    number = to_integer(item.get("id"))
    if number is None or number < 0:
        found.add(f"{kind}-id", f"{kind} id {brief(item.get('id'))}, expected an integer of 0 or more")
        return None
    if type(item["id"]) is float:
        found.add("number-float", f"{kind} {number}: its id", number if kind == "image" else None)
    if number in known:
        found.add(f"{kind}-id-twice", f"{kind} id {number} occurs twice, expected unique ids")
        return None
    return number


def _read_categories(items: list[dict[str, Any]], found: Findings) -> dict[int, str]:
    """Check the categories.  Returns their names by id."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for item in items:
        number = _new_id(item, "category", names, found)
        if number is None:
            continue
        name = item.get("name")
        if not isinstance(name, str) or not name.strip():
            found.add("category-name", f"category {number}: name {brief(name)}, expected text")
        elif name in taken:
            text = f"category {number}: name {brief(name)} occurs twice, expected unique names"
            found.add("category-name-twice", text)
        names[number] = str(name)
        taken.add(names[number])
    if names and max(names) - min(names) >= len(names):
        label, number = max(enumerate(sorted(names)), key=lambda pair: pair[1])
        text = f"ids from {min(names)} to {number}; id {number}, {brief(names[number])}, is label {label}"
        found.add("category-gaps", text, count=len(names))
    return names


def read_images(
    items: list[dict[str, Any]], files: ImageFolder | None, max_pixels: int, found: Findings
) -> tuple[list[Image], dict[int, Size | None]]:
    """Check the images, and find the file of each.

    Returns the images without a fault (an empty file is allowed), and the size of every image by id, None if it is
    wrong.
    """
    images: list[Image] = []
    sizes: dict[int, Size | None] = {}
    owners: dict[str, int | None] = {}
    for item in items:
        number, size = _new_id(item, "image", sizes, found), None
        if number is not None:
            size = sizes[number] = _read_size(item, number, max_pixels, found)
        path = _find_file(item, files, owners, found)
        if number is not None and size is not None and path is not None:
            images.append(Image(number, item["file_name"], path, size))
    return images, sizes


def _read_size(item: dict[str, Any], number: int, max_pixels: int, found: Findings) -> Size | None:
    height, width = to_integer(item.get("height")), to_integer(item.get("width"))
    if height is None or width is None or not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        sides = f"width {brief(item.get('width'))}, height {brief(item.get('height'))}"
        found.add("image-size", f"image {number}: {sides}, expected integers from 1 to {MAX_SIDE}", number)
        return None
    if height * width > max_pixels:
        found.add("image-pixels", f"image {number}: {width} x {height} pixels, the limit is {max_pixels}", number)
        return None
    if float in (type(item["height"]), type(item["width"])):
        found.add("number-float", f"image {number}: its width or height", number)
    return height, width


def _find_file(
    item: dict[str, Any], files: ImageFolder | None, owners: dict[str, int | None], found: Findings
) -> str | None:
    """Return the path of an image's file below the folder, None if the name is wrong; owners: image ids by path."""
    number, name = to_integer(item.get("id")), item.get("file_name")
    try:
        if files is None:
            path, size = "/".join(filter(None, split_name(name))), None
        else:
            path, size = files.find(name, suggest=found.wants_example("file-missing"))  # suggesting takes a while
    except Fault as fault:
        found.add(fault.code, f"{_named(item)} {fault}", number)
        return None
    if size == 0:
        found.add("file-empty", f"{_named(item)} is an empty file", number)
    if path in owners:
        found.add("file-twice", f"{_named(item)} is also the file of image {owners[path]}", number)
    owners.setdefault(path, number)
    return path


def _named(item: dict[str, Any]) -> str:
    where = item["place"] if "place" in item else f"image {brief(item.get('id'))}"
    return f"{where}: file_name {brief(item.get('file_name'))}"


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector while building millions of objects: its passes would double the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
