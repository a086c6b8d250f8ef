"""Detections from a file in COCO's results format, of gndet or another toolkit, checked against a data set.

A detection is {"image_id", "category_id", "bbox": [x, y, width, height], "score"[, "segmentation": RLE]}.
"""

import math
from pathlib import Path
from typing import Any

import orjson
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.masks import check_segmentation
from gndet.data.datasets.segmentation import brief, to_rle
from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.results import Results, from_coco

SHOWN = 5  # faults that are named


def read_results(path: Path, dataset: Dataset) -> Results:
    """Read detections of a data set; return them image by image in its order.

    Detections without a box get the box of their mask.  Raises DataError where the file is not in this format, or
    names images or classes that the data set does not have: the place in the list, the value, and what was expected.
    """
    listed = _parse(path)
    sizes = {record.image_id: record.size for record in dataset.records}
    categories, faults, rows = set(dataset.category_ids), [], []
    for place, detection in enumerate(listed):
        try:
            rows.append(_checked(detection, sizes, categories))
        except Fault as fault:
            faults.append(f"  detection {place}: {fault}")
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        head = f"{path}: {len(faults)} of {len(listed)} detections do not belong to {dataset.name}, or are none:"
        raise DataError("\n".join([head, *faults[:SHOWN], *more]))
    bare = sum("segmentation" not in row for row in rows)
    if 0 < bare < len(rows):
        raise DataError(f"{path}: {bare} of {len(rows)} detections have no segmentation; expected all or none")
    return from_coco(rows).in_order_of([record.image_id for record in dataset.records])


def _parse(path: Path) -> list[Any]:
    try:
        listed = orjson.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read this file: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if isinstance(listed, dict) and "annotations" in listed:
        raise DataError(f"{path}: holds annotations, expected detections: a list of image_id, category_id, bbox, score")
    if not isinstance(listed, list):
        raise DataError(f"{path}: holds {brief(listed)}, expected a list of detections (COCO's results format)")
    return listed


def _checked(detection: Any, sizes: dict[int, tuple[int, int]], categories: set[int]) -> dict[str, Any]:
    """Return the parts of a detection that are used.  Raises Fault."""
    if not isinstance(detection, dict):
        raise Fault("", f"{brief(detection)}, expected an object with image_id, category_id, bbox and score")
    image, category, score, box = (detection.get(key) for key in ("image_id", "category_id", "score", "bbox"))
    if type(image) is not int or image not in sizes:
        raise Fault("", f"image_id {brief(image)}, expected the id of one of {len(sizes)} images")
    if type(category) is not int or category not in categories:
        raise Fault("", f"category_id {brief(category)}, expected one of {brief(sorted(categories))}")
    if not _is_number(score):
        raise Fault("", f"score {brief(score)}, expected a finite number")
    row = {"image_id": image, "category_id": category, "score": float(score)}
    if detection.get("segmentation"):
        row["segmentation"] = _code(detection["segmentation"], sizes[image])
        box = coco_mask.toBbox(row["segmentation"]).tolist() if box is None else box
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        raise Fault("", f"bbox {brief(box)}, expected 4 finite numbers: x, y, width, height, the last two not negative")
    return row | {"bbox": [float(side) for side in box]}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return the compressed code of a checked mask; an empty mask where it covers no pixel."""
    checked = check_segmentation(segmentation, size)
    rle = to_rle(checked if checked is not None else {"size": list(size), "counts": [size[0] * size[1]]}, size)
    counts = rle["counts"]
    return {"size": list(size), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
