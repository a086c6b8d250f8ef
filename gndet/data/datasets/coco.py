"""Read a data set in COCO's JSON format: check all of it, list all faults, keep what is valid.

What can be fixed without guessing is fixed in memory and counted; the user's files are never written.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gndet.config.data import DataConfig
from gndet.data.datasets.cache import cached
from gndet.data.datasets.columns import Columns, Known, read_columns, with_ids
from gndet.data.datasets.entries import Category, numbered, read_categories, read_images, settle_categories, valid_names
from gndet.data.datasets.faults import Fault, Findings, in_order, with_totals
from gndet.data.datasets.formats import name_format
from gndet.data.datasets.image_folder import FILE, HEAD, XML, ImageFolder, what_is
from gndet.data.datasets.images import Reading
from gndet.data.datasets.json_parts import Cut, NotInParts, read_around, read_parts, take_apart
from gndet.data.datasets.packed import Image, PackedRecords, pack
from gndet.data.datasets.plausible import judge_boxes
from gndet.data.records import Dataset, Tell
from gndet.text import brief, printable

LISTS = ("images", "annotations", "categories")
KEYS_SHOWN = 8  # of a file that lacks one of them
FIRST = 1 << 16  # bytes that hold the first annotation, unless it is of another format and long


def inspect_file(path: Path, folder: Path | None, data: DataConfig, tell: Tell | None = None) -> Dataset:
    """Check an annotation file, and the listing of its image folder if one is given; use data.cache if it has them.

    Without a folder, the records cannot load their pictures.  tell: called with a line before a long wait.
    """
    found, found_in_folder = Findings(), Findings()
    files = dataset = None
    try:
        files = ImageFolder(folder, data.follow_links) if folder else None
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
        kind = (kind == XML and name_format(path)) or kind
        raise Fault(code, f"{path}: not a JSON file: it is {kind}")


def _inspect(path: Path, files: ImageFolder | None, reading: Reading, found: Findings) -> Dataset:
    """Check the file's content, and add its faults to found.  Raises Fault if the file is not in COCO's format."""
    cuts, noted = take_apart(path), Findings()
    try:
        content = _read(path, cuts, files, reading, noted) if cuts else None
        found.take(noted.listed())
    except (OSError, Fault, NotInParts):
        content = None  # the cuts were wrong, so their findings are discarded
    images, categories, objects = content or _read(path, [], files, reading, found)
    objects = with_ids(objects, found)
    names, left_out = settle_categories(categories, set(np.unique(objects.category_ids).tolist()), found)
    folder = path.parent if files is None else files.home
    return assemble(str(path), images, names, objects, folder, reading, found)._replace(left_out=left_out)


def assemble(
    name: str, images: list[Image], names: dict[int, str], objects: Columns, folder: Path, reading: Reading,
    found: Findings,
) -> Dataset:  # fmt: skip
    """Make a data set of checked images, categories {id: name} and objects; note what only the whole of them shows.

    name: of the data set; folder: of the pictures; found: the findings so far, to which the notes are added.
    """
    category_ids, names = tuple(sorted(names)), valid_names(names, found)
    packed = pack(images, objects, category_ids)
    judge_boxes(packed, objects.extents[packed.masks_at], found)
    for category_id in np.setdiff1d(category_ids, objects.category_ids).tolist():
        found.add("category-unused", f"category {category_id}: {brief(names[category_id])}")
    for place in np.flatnonzero(~np.isin(packed.image_ids, objects.image_ids)).tolist():
        image = images[place]
        found.add("image-empty", f"image {image.image_id}: {brief(image.file_name)}", image.image_id)
    classes = tuple(names[category_id] for category_id in category_ids)
    records = PackedRecords(packed, folder, reading, range(len(images)))
    return Dataset(name, classes, category_ids, records, with_totals(found.listed(), len(objects.all_ids)))


def _read(
    path: Path, cuts: list[Cut], files: ImageFolder | None, reading: Reading, found: Findings
) -> tuple[list[Image], dict[int, Category], Columns]:
    """Read a file, in several processes if it is cut.

    Returns the images that are kept, the categories by id, and the objects.  Raises Fault and OSError; with cuts also
    NotInParts, and MachineError if a process is killed.
    """
    tree = _parse(path, read_around(path, cuts) if cuts else path.read_bytes(), found)
    _refuse_other_annotations(path, cuts, tree["annotations"])
    numbers = {key: numbered(tree[key], kind, found) for key, kind in (("images", "image"), ("categories", "category"))}
    categories = read_categories(tree["categories"], numbers["categories"], found)
    images, sizes = read_images(tree.pop("images"), files, reading, found, numbers["images"])
    known = Known.of(sizes, categories)
    known = known._replace(image_numbers=numbers["images"], category_numbers=numbers["categories"])
    objects = read_parts(path, cuts, known, found) if cuts else read_columns(tree["annotations"], known, found)
    return images, categories, objects


def _parse(path: Path, text: bytes, found: Findings) -> dict[str, list[dict[str, Any]]]:
    """Parse the text of a file.  Raises Fault if it lacks one of COCO's three lists of objects."""

    def constant(name: str) -> float:
        found.add("json-nan", f"{path.name}: the word {name}")
        return float(name.replace("Infinity", "inf"))

    try:
        tree = json.loads(text, parse_constant=constant)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} ({error.object[error.start]:#04x})"
        raise Fault("text-encoding", f"{path}: {where} is not {error.encoding.upper()}") from None
    except (ValueError, RecursionError) as error:
        named = name_format(path)
        raise Fault(
            "json-other" if named else "json-broken", f"{path}: {named or f'not a JSON file: {error}'}"
        ) from None
    missing = [key for key in LISTS if not isinstance(tree, dict) or key not in tree]
    if missing and (named := name_format(path)):
        raise Fault("json-other", f"{path}: {named}")
    if not isinstance(tree, dict):
        raise Fault("json-other", f"{path}: a JSON {type(tree).__name__}, expected an object, as in COCO's format")
    if missing:
        present = f"it has {', '.join(map(printable, list(tree)[:KEYS_SHOWN]))}" if tree else "it is empty"
        verb = "is" if len(missing) == 1 else "are"
        raise Fault("json-other", f"{path}: {' and '.join(missing)} {verb} missing; {present}")
    for key in LISTS:
        _refuse_other_values(path, key, tree[key])
    return tree


def _refuse_other_values(path: Path, key: str, items: Any) -> None:
    """Raise Fault if the value of one of COCO's three keys is not a list of objects."""
    if not isinstance(items, list):
        raise Fault("json-other", f"{path}: {key}: {brief(items)}, expected a list of objects, as in COCO")
    for place, item in enumerate(items):
        if not isinstance(item, dict):
            raise Fault("json-other", f"{path}: {key}[{place}]: {brief(item)}, expected an object, as in COCO")
    if not items and key != "annotations":
        raise Fault("json-other", f"{path}: {key}: the list is empty")


def _refuse_other_annotations(path: Path, cuts: list[Cut], items: list[dict[str, Any]]) -> None:
    """Raise Fault if the first annotation has neither a box nor a mask, and is one of another format of COCO."""
    first = items[0] if items else {}
    if cuts:
        with path.open("rb") as file, suppress(ValueError):
            file.seek(cuts[0][0])
            first = json.JSONDecoder().raw_decode(file.read(FIRST).decode("utf-8", "ignore").lstrip())[0]
    if (
        isinstance(first, dict)
        and "bbox" not in first
        and "segmentation" not in first
        and (named := name_format(json.dumps({"annotations": [first]})))
    ):
        raise Fault("json-other", f"{path}: {named}")


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
