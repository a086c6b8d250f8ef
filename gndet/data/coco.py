"""Read a data set in COCO's JSON format: all is checked before training, all mistakes are reported at once.

What can be mended without a guess is mended in memory and counted in `Dataset.fixes`; no file is written.
Letters: n annotations. Boxes are xywh in the file, xyxy from here on.
"""

import difflib
import functools
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gndet.config import DataConfig, DatasetConfig
from gndet.data.images import MAX_PIXELS, read_image
from gndet.data.segmentation import NUMBERS, brief, check_segmentation, to_rle
from gndet.errors import DataError
from gndet.structures import Dataset, Record

MAX_SIDE = 65_535  # pixels, JPEG's limit
MAX_COORDINATE = 1e6  # pixels, far beyond MAX_SIDE; a box with larger numbers (or inf, NaN) is no box
ROUNDING = 0.01  # pixels: COCO's boxes are rounded to hundredths
EXAMPLES = 5  # mistakes spelt out in an error

Size = tuple[int, int]


def read_coco(cfg: DatasetConfig, data: DataConfig) -> Dataset:
    """Read and check the COCO JSON file cfg.annotations and the listing of its image folder cfg.images.

    Returns the images in the file's order; labels count the categories by rising id.
    Raises DataError that names the file and the number of mistakes, and for the first EXAMPLES of them
    the id, the value and what was expected.
    """
    path, folder = Path(data.root) / cfg.annotations, Path(data.root) / cfg.images
    tree = _read_json(path)
    mistakes: list[str] = []
    fixes: Counter[str] = Counter()
    categories = _read_categories(tree["categories"], mistakes)
    sizes = _read_sizes(tree["images"], mistakes)
    files = _find_files(tree["images"], folder, mistakes)
    annotations = _read_annotations(tree["annotations"], sizes, categories, mistakes, fixes)
    if mistakes:
        listed = "".join(f"\n  {mistake}" for mistake in mistakes[:EXAMPLES])
        more = f"\n  and {len(mistakes) - EXAMPLES} more" if len(mistakes) > EXAMPLES else ""
        raise DataError(f"{path}: {len(mistakes)} mistake(s):{listed}{more}")
    _number_from_one(annotations, fixes)
    category_ids = tuple(sorted(categories))
    return Dataset(
        name=str(path),
        classes=tuple(categories[category_id] for category_id in category_ids),
        category_ids=category_ids,
        records=_to_records(tree["images"], files, annotations, category_ids),
        fixes=dict(fixes),
    )


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
            if record.segmentations[index] is not None:
                annotation["segmentation"] = record.segmentations[index]
            annotations.append(annotation)
    classes = zip(dataset.category_ids, dataset.classes, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the file and check that it has COCO's three lists of objects."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: a JSON {type(tree).__name__}, expected an object, as in COCO's format")
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree.get(key), list) or not all(isinstance(item, dict) for item in tree[key]):
            raise DataError(f"{path}: {key}: {brief(tree.get(key))}, expected a list of objects, as in COCO")
        if not tree[key] and key != "annotations":
            raise DataError(f"{path}: {key}: the list is empty")
    return tree


def _new_id(item: dict[str, Any], kind: str, seen: set[int], mistakes: list[str]) -> bool:
    """Note the id of an item in seen; report one that is no integer or was there before."""
    number = item.get("id")
    if type(number) is not int or abs(number) >= 2**63 or (number < 0 and kind != "annotation"):
        mistakes.append(f"{kind} id {brief(number)}, expected an integer of 0 or more")
        return False
    if number in seen:
        mistakes.append(f"{kind} id {number} occurs twice, expected unique ids")
    seen.add(number)
    return True


def _read_categories(items: list[dict[str, Any]], mistakes: list[str]) -> dict[int, str]:
    """Check the categories.  Returns the name of each id."""
    names: dict[int, str] = {}
    seen: set[int] = set()
    for item in items:
        if not _new_id(item, "category", seen, mistakes):
            continue
        name = item.get("name")
        if not isinstance(name, str) or not name:
            mistakes.append(f"category {item['id']}: name {brief(name)}, expected text")
        elif name in names.values():
            mistakes.append(f"category {item['id']}: name {name!r} occurs twice, expected unique names")
        names[item["id"]] = str(name)
    return names


def _read_sizes(items: list[dict[str, Any]], mistakes: list[str]) -> dict[int, Size | None]:
    """Check ids, widths and heights of the images.  Returns (height, width) of each id, None where wrong."""
    sizes: dict[int, Size | None] = {}
    seen: set[int] = set()
    for item in items:
        if not _new_id(item, "image", seen, mistakes):
            continue
        height, width = item.get("height"), item.get("width")
        good = all(type(side) is int and 1 <= side <= MAX_SIDE for side in (height, width))
        if good and height * width <= MAX_PIXELS:
            sizes[item["id"]] = (height, width)
        else:
            sizes[item["id"]] = None
            mistakes.append(
                f"image {item['id']}: width {brief(width)}, height {brief(height)}, expected integers from 1 "
                f"to {MAX_SIDE} with at most {MAX_PIXELS} pixels in all"
            )
    return sizes


def _find_files(items: list[dict[str, Any]], folder: Path, mistakes: list[str]) -> list[Path]:
    """Find the file of each image, by one listing a folder; report those missing or leading out."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder")
    home = folder.resolve()
    listings: dict[PurePosixPath, dict[str, str]] = {}
    paths = []
    for item in items:
        name = item.get("file_name")
        where = f"image {brief(item.get('id'))}: file_name {brief(name)}"
        if not isinstance(name, str) or not name:
            mistakes.append(f"{where}, expected the name of a file in {folder}")
            continue
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            mistakes.append(f"{where} leads out of {folder}")
            continue
        if relative.parent not in listings:
            listings[relative.parent] = _list_folder(folder / relative.parent, home)
        listing = listings[relative.parent]
        found = listing.get(relative.name) or listing.get(unicodedata.normalize("NFC", relative.name))
        if found is None:
            near = _nearest(relative.name, listing) if len(mistakes) < EXAMPLES else ""
            mistakes.append(f"{where}: no such file in {folder / relative.parent}{near}")
        elif not found:
            mistakes.append(f"{where} is empty, or a link that leads out of {folder}")
        else:
            paths.append(folder / relative.parent / found)
    return paths


def _list_folder(folder: Path, home: Path) -> dict[str, str]:
    """List a folder as {name or its composed form: name on disk}, "" for an empty file and a link that leaves home."""
    try:
        inside = folder.resolve().is_relative_to(home)
        with os.scandir(folder) as entries:
            names = {
                entry.name: entry.name
                if inside
                and (not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(home))
                and entry.stat().st_size
                else ""
                for entry in entries
                if entry.is_file()
            }
    except (OSError, ValueError):  # no such folder, or a name that no folder can have
        return {}
    return {unicodedata.normalize("NFC", name): found for name, found in names.items()} | names


def _nearest(name: str, listing: dict[str, str]) -> str:
    """Suggest the file meant: another spelling of upper and lower case, or the closest name."""
    same = [known for known in listing if known.casefold() == name.casefold()]
    close = same or difflib.get_close_matches(name, listing, n=1)
    return f"; the nearest name there is {close[0]!r}" if close else ""


def _read_annotations(
    items: list[dict[str, Any]],
    sizes: dict[int, Size | None],
    categories: dict[int, str],
    mistakes: list[str],
    fixes: Counter[str],
) -> list[dict[str, Any]]:
    """Check the annotations.  Returns those whose box has an area, complete as in the file format."""
    seen: set[int] = set()
    kept = []
    for item in items:
        if not _new_id(item, "annotation", seen, mistakes):
            continue
        try:
            annotation = _read_annotation(item, sizes, categories, fixes)
        except DataError as error:
            mistakes.append(f"annotation {item['id']}: {error}")
            continue
        if annotation is not None:
            kept.append(annotation)
    return kept


def _read_annotation(
    item: dict[str, Any], sizes: dict[int, Size | None], categories: dict[int, str], fixes: Counter[str]
) -> dict[str, Any] | None:
    """Check and complete one annotation; None if its box has no area.  Raises DataError without its id."""
    for key, known in (("image_id", sizes), ("category_id", categories)):
        if type(item.get(key)) is not int or item[key] not in known:
            raise DataError(f"{key} {brief(item.get(key))} is not in the file")
    size = sizes[item["image_id"]]
    if size is None:
        return None  # the image has been reported
    crowd, area = item.get("iscrowd") or 0, item.get("area")
    if crowd not in (0, 1):
        raise DataError(f"iscrowd {brief(crowd)}, expected 0 or 1")
    if area is not None and not (type(area) in NUMBERS and 0 <= area <= MAX_PIXELS):
        raise DataError(f"area {brief(area)}, expected a number of pixels")
    if not _check_box(item.get("bbox"), size, fixes):
        return None
    segmentation, dropped = item.get("segmentation"), 0
    if segmentation in (None, [], {}):
        segmentation = None
    else:
        segmentation, dropped = check_segmentation(segmentation, size)
        if segmentation is None:
            fixes["objects without a usable polygon, left without a mask"] += 1
        elif dropped:
            fixes["polygons of fewer than 3 points dropped"] += dropped
    if area is None:
        box_area = item["bbox"][2] * item["bbox"][3]
        area = box_area if segmentation is None else int(coco_mask.area(to_rle(segmentation, size)))
    return item | {"area": area, "iscrowd": int(crowd), "segmentation": segmentation}


def _check_box(bbox: Any, size: Size, fixes: Counter[str]) -> bool:
    """Check an xywh box; False for one without area.  Raises DataError for one not in the image."""
    good = isinstance(bbox, list) and len(bbox) == 4
    if not good or not all(type(number) in NUMBERS and abs(number) <= MAX_COORDINATE for number in bbox):
        raise DataError(f"bbox {brief(bbox)}, expected 4 finite numbers x, y, width, height")
    x, y, width, height = bbox
    if width < 0 or height < 0:
        raise DataError(f"bbox {bbox} has a negative width or height, expected x, y, width, height")
    if width == 0 or height == 0:
        fixes["zero-area boxes dropped"] += 1
        return False
    if x + width <= 0 or y + height <= 0 or x >= size[1] or y >= size[0]:
        raise DataError(f"bbox {bbox} lies outside the image of width {size[1]}, height {size[0]}")
    if min(x, y) < -ROUNDING or x + width > size[1] + ROUNDING or y + height > size[0] + ROUNDING:
        fixes["boxes partly outside the image, clipped in training"] += 1
    return True


def _number_from_one(annotations: list[dict[str, Any]], fixes: Counter[str]) -> None:
    """Renumber all annotations if any id is under 1: COCO's evaluators take id 0 for "no match"."""
    if any(annotation["id"] < 1 for annotation in annotations):
        fixes["annotations renumbered from 1, for an id was under 1"] = len(annotations)
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number


def _to_records(
    images: list[dict[str, Any]],
    files: list[Path],
    annotations: list[dict[str, Any]],
    category_ids: tuple[int, ...],
) -> list[Record]:
    """Group the annotations by image, in the file's order."""
    label = {category_id: index for index, category_id in enumerate(category_ids)}
    groups: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        groups[annotation["image_id"]].append(annotation)
    records = []
    for image, path in zip(images, files, strict=True):
        group, size = groups[image["id"]], (image["height"], image["width"])
        boxes = np.array([annotation["bbox"] for annotation in group], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
        records.append(
            Record(
                image_id=image["id"],
                file_name=image["file_name"],
                size=size,
                load=functools.partial(read_image, path, size),
                boxes=boxes,
                labels=np.array([label[annotation["category_id"]] for annotation in group], dtype=np.int64),
                crowd=np.array([annotation["iscrowd"] == 1 for annotation in group], dtype=bool),
                area=np.array([annotation["area"] for annotation in group], dtype=np.float64),
                annotation_ids=np.array([annotation["id"] for annotation in group], dtype=np.int64),
                segmentations=[annotation["segmentation"] for annotation in group],
            )
        )
    return records
