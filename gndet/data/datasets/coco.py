"""Read a data set in COCO's JSON format: all is checked, all faults are listed, what is good is kept.

What can be mended without a guess is mended in memory and counted; no file of the user's is written.
Boxes are xywh in the file, xyxy from here on.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.config.schema import DataConfig, DatasetConfig
from gndet.data.datasets import cache
from gndet.data.datasets.annotations import Size
from gndet.data.datasets.columns import MAX_SIDE, Columns, Known, read_columns, whole, with_ids
from gndet.data.datasets.faults import Fault, Findings, in_order, refuse
from gndet.data.datasets.image_folder import FILE, HEAD, XML, ImageFolder, split_name, what_is
from gndet.data.datasets.json_parts import NotInParts, read_parts, take_apart
from gndet.data.datasets.packed import Image, PackedRecords, note_masks_elsewhere, pack
from gndet.data.workers import usable_cores
from gndet.data.records import Dataset
from gndet.data.datasets.segmentation import brief
import gc
from collections.abc import Iterator
from contextlib import contextmanager

LISTS = ("images", "annotations", "categories")


def read_coco(cfg: DatasetConfig, data: DataConfig) -> Dataset:
    """Read and check the COCO JSON file cfg.annotations and the listing of its image folder cfg.images.

    Returns the images in the file's order; labels count the categories by rising id.
    Raises DataError that lists what is refused: the kind, the number, the first few with id, value, what was expected.
    """
    return refuse(inspect_coco(cfg, data))


def inspect_coco(cfg: DatasetConfig, data: DataConfig, tell: cache.Tell | None = None) -> Dataset:
    """As `read_coco`, but what is refused stands in the findings, and the records are of the rest."""
    return inspect_file(Path(data.root) / cfg.annotations, Path(data.root) / cfg.images, data, tell)


def inspect_file(path: Path, folder: Path | None, data: DataConfig, tell: cache.Tell | None = None) -> Dataset:
    """Check an annotation file, and the listing of its image folder if that is given; from data.cache if it is there.

    Without the folder the pictures of the records cannot be loaded.  tell: called with a line before a long wait.
    """
    found, missing = Findings(), Findings()
    try:
        files = None if folder is None else ImageFolder(folder)
    except Fault as fault:
        missing.add(fault.code, str(fault))
        files = None
    try:
        with cache.opened(data.cache, path, partial(_digest, path), files, data.max_pixels, tell) as entry:
            dataset = entry.load()
            if dataset is None:
                with gc_paused():
                    dataset = entry.save(_inspect(path, entry.digest(), files, data.max_pixels, found))
    except Fault as fault:
        found.add(fault.code, str(fault))
        return Dataset(str(path), (), (), [], found.listed())
    return dataset._replace(findings=in_order(dataset.findings + missing.listed()))


def to_coco(dataset: Dataset) -> dict[str, Any]:
    """Write a data set as a COCO ground-truth dict for evaluators: original category ids, boxes as xywh."""
    images, annotations = [], []
    for record in dataset.records:
        image = {"id": record.image_id, "file_name": record.file_name}
        images.append(image | {"height": record.size[0], "width": record.size[1]})
        for index, (x0, y0, x1, y1) in enumerate(record.boxes.tolist()):
            annotation = {
                "id": int(record.annotation_ids[index]),
                "image_id": record.image_id,
                "category_id": dataset.category_ids[record.labels[index]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(record.area[index]),
                "iscrowd": int(record.crowd[index]),
            }
            segmentation = record.segmentations[index]
            if segmentation is not None:
                annotation["segmentation"] = segmentation
            annotations.append(annotation)
    classes = zip(dataset.category_ids, dataset.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _digest(path: Path) -> str:
    """A hash of the annotation file.  Raises Fault where it cannot be read, or is seen to be something else."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise Fault("json-unreadable", f"{path}: is {kind}, expected the annotation file")
        with path.open("rb") as file:
            kind = what_is(file.read(HEAD))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Fault("json-unreadable", f"{path}: cannot read the annotation file: {reason}") from None
    if kind != FILE:
        code = "json-archive" if "archive" in kind else "json-broken"
        kind += "; Pascal VOC is not read: convert it to COCO's format" if kind == XML else ""
        raise Fault(code, f"{path}: not a JSON file: it is {kind}")
    return digest


def _inspect(path: Path, digest: str, files: ImageFolder | None, max_pixels: int, found: Findings) -> Dataset:
    """Check the file's content; found gets what is wrong."""
    try:
        content = _in_parts(path, max_pixels, found) or _as_a_whole(path, digest, max_pixels, found)
    except Fault as fault:
        found.add(fault.code, str(fault))
        return Dataset(str(path), (), (), [], found.listed())
    items, sizes, categories, objects = content
    objects = with_ids(objects, found)
    images = _read_images(items, sizes, files, found)
    category_ids = tuple(sorted(categories))
    packed = pack(images, objects, category_ids)
    note_masks_elsewhere(packed, found)
    _note_unused(categories, set(np.unique(objects.category_ids).tolist()), found)
    with_objects = set(np.unique(objects.image_ids).tolist())
    for image in images:
        if image.image_id not in with_objects:
            found.add("image-empty", f"image {image.image_id}: {brief(image.file_name)}", image.image_id)
    classes = tuple(categories[category_id] for category_id in category_ids)
    records = PackedRecords(packed, path.parent if files is None else files.home, max_pixels)
    return Dataset(str(path), classes, category_ids, records, found.listed())


class _Content(NamedTuple):
    """What an annotation file holds: images as they stand in it, all else checked."""

    images: list[dict[str, Any]]
    sizes: dict[int, Size | None]
    categories: dict[int, str]
    objects: Columns


def _in_parts(path: Path, max_pixels: int, found: Findings) -> _Content | None:
    """Read a large file in several processes; None where it is small, or must be read as a whole.

    Raises MachineError where a process is killed.
    """
    noted = Findings()
    try:
        before = path.stat()
        parts = take_apart(path)
        if parts is None or parts.around.count(b'"annotations"') > 1:
            return None
        tree, parts = _parse(path, parts.around, noted), parts._replace(around=b"")
        categories, sizes = _read_categories(tree["categories"], noted), _read_sizes(tree["images"], max_pixels, noted)
        objects = read_parts(parts, Known.of(sizes, categories), usable_cores(), noted)
        if path.stat() != before:  # but for the time of the last access, which nothing here changes
            return None
    except (OSError, Fault, NotInParts):
        return None
    found.take(noted)
    return _Content(tree["images"], sizes, categories, objects)


def _as_a_whole(path: Path, digest: str, max_pixels: int, found: Findings) -> _Content:
    """Read a file at once.  Raises Fault."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise Fault("json-unreadable", f"{path}: cannot read the annotation file: {error.strerror}") from None
    if hashlib.sha256(text).hexdigest() != digest:
        raise Fault("json-unreadable", f"{path}: was changed while it was read")
    tree = _parse(path, text, found)
    categories, sizes = _read_categories(tree["categories"], found), _read_sizes(tree["images"], max_pixels, found)
    objects, _ = read_columns(tree.pop("annotations"), Known.of(sizes, categories), found)
    return _Content(tree["images"], sizes, categories, objects)


def _parse(path: Path, text: bytes, found: Findings) -> dict[str, list[dict[str, Any]]]:
    """Parse the text of a file.  Raises Fault where it has not COCO's three lists of objects."""

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


def _new_id(item: dict[str, Any], kind: str, seen: set[int], found: Findings) -> int | None:
    """The id of an image or category; None where it is no integer of 0 or more, or was there before."""
    number = whole(item.get("id"))
    if number is None or number < 0:
        found.add(f"{kind}-id", f"{kind} id {brief(item.get('id'))}, expected an integer of 0 or more")
        return None
    if type(item["id"]) is float:
        found.add("number-float", f"{kind} {number}: its id", number if kind == "image" else None)
    if number in seen:
        found.add(f"{kind}-id-twice", f"{kind} id {number} occurs twice, expected unique ids")
        return None
    seen.add(number)
    return number


def _read_categories(items: list[dict[str, Any]], found: Findings) -> dict[int, str]:
    """Check the categories.  Returns the name of each id."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    seen: set[int] = set()
    for item in items:
        number = _new_id(item, "category", seen, found)
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


def _note_unused(categories: dict[int, str], used: set[int], found: Findings) -> None:
    """Note the categories of which there is no object."""
    for number, name in sorted(categories.items()):
        if number not in used:
            found.add("category-unused", f"category {number}: {brief(name)}")


def _read_sizes(items: list[dict[str, Any]], max_pixels: int, found: Findings) -> dict[int, Size | None]:
    """Check ids, widths and heights of the images.  Returns (height, width) of each id, None where wrong."""
    sizes: dict[int, Size | None] = {}
    seen: set[int] = set()
    for item in items:
        number = _new_id(item, "image", seen, found)
        if number is None:
            continue
        height, width = whole(item.get("height")), whole(item.get("width"))
        sizes[number] = None
        if not all(side is not None and 1 <= side <= MAX_SIDE for side in (height, width)):
            sides = f"width {brief(item.get('width'))}, height {brief(item.get('height'))}"
            found.add("image-size", f"image {number}: {sides}, expected integers from 1 to {MAX_SIDE}", number)
        elif height * width > max_pixels:
            found.add("image-pixels", f"image {number}: {width} x {height} pixels, the limit is {max_pixels}", number)
        else:
            sizes[number] = (height, width)
            if float in (type(item["height"]), type(item["width"])):
                found.add("number-float", f"image {number}: its width or height", number)
    return sizes


def _read_images(
    items: list[dict[str, Any]], sizes: dict[int, Size | None], files: ImageFolder | None, found: Findings
) -> list[Image]:
    """Find the file of each image.  Returns the images with which nothing is wrong, or only their file is empty."""
    images: list[Image] = []
    owners: dict[str, int | None] = {}
    kept: set[int | None] = set()
    for item in items:
        number, name = whole(item.get("id")), item.get("file_name")
        size = sizes.get(number)
        try:
            suggest = found.wants_example("file-missing")  # it takes a while
            path = "/".join(filter(None, split_name(name))) if files is None else files.find(name, suggest)
        except Fault as fault:
            found.add(fault.code, f"{_named(item)} {fault}", number)
            continue
        if files is not None and files.is_empty(path):
            found.add("file-empty", f"{_named(item)} is an empty file", number)
        if path in owners:
            found.add("file-twice", f"{_named(item)} is the file of image {owners[path]} too", number)
        owners.setdefault(path, number)
        if size is not None and number not in kept:
            kept.add(number)
            images.append(Image(number, name, path, size))
    return images


def _named(item: dict[str, Any]) -> str:
    """An image in words."""
    return f"image {brief(item.get('id'))}: file_name {brief(item.get('file_name'))}"


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector while building millions of objects: its passes would take as long as that."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
