"""The annotations of a COCO file, checked one by one: each is kept, mended, dropped or refused as FAULTS says.

Boxes are xywh in the file, xyxy from here on, float64 pixels of the original.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Fault, Findings
from gndet.data.datasets.segmentation import NUMBERS, brief, check_segmentation, has_pixels, to_rle

MAX_SIDE = 65_535  # pixels, JPEG's limit
MAX_COORDINATE = 1e6  # pixels, far beyond MAX_SIDE; a box with larger numbers (or inf, NaN) is no box
ROUNDING = 0.01  # pixels: COCO's boxes are rounded to hundredths
OVERHANG = 2  # pixels a box may reach over the edge before it is noted: rounding and outlines do so

Size = tuple[int, int]
Box = tuple[float, float, float, float]


class Annotation(NamedTuple):
    """An object that is kept."""

    image_id: int
    category_id: int
    number: int  # its id
    box: Box  # xyxy
    area: float
    crowd: bool
    segmentation: Any


def whole(value: Any) -> int | None:
    """An integer of 64 bits, 5.0 taken as 5; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) < value < 2**63 else None


def read_one(
    item: dict[str, Any], number: int | None, sizes: dict[int, Size | None], category_ids: set[int], found: Findings
) -> Annotation | None:
    """Check an annotation; None where it is not kept.

    number: its id, None where that is none.  sizes: (height, width) of each image id, None where it is wrong.
    """
    if number is None:
        found.add("annotation-id", f"annotation id {brief(item.get('id'))}, expected an integer")
        return None
    try:
        return _read(item, number, sizes, category_ids, found)
    except Fault as fault:
        image_id = whole(item.get("image_id"))
        found.add(fault.code, f"annotation {number}: {fault}", image_id if image_id in sizes else None)
        return None


def _read(
    item: dict[str, Any], number: int, sizes: dict[int, Size | None], category_ids: set[int], found: Findings
) -> Annotation | None:
    """Check and complete one annotation; None if it is dropped.  Raises Fault without its id."""
    image_id, category_id = whole(item.get("image_id")), whole(item.get("category_id"))
    if image_id not in sizes:
        raise Fault("image-unknown", f"image_id {brief(item.get('image_id'))} is not in the file")
    if category_id not in category_ids:
        raise Fault("category-unknown", f"category_id {brief(item.get('category_id'))} is not in the file")
    size = sizes[image_id]
    if size is None:
        return None  # the image has been reported
    where = f"annotation {number}: "
    if float in (type(item["id"]), type(item["image_id"]), type(item["category_id"])):
        found.add("number-float", f"{where}its id, image_id or category_id", image_id)
    crowd, area = item.get("iscrowd") or 0, item.get("area")
    if crowd not in (0, 1):
        raise Fault("crowd-value", f"iscrowd {brief(crowd)}, expected 0 or 1")
    if area is not None and not (type(area) in NUMBERS and 0 <= area <= MAX_SIDE**2):
        raise Fault("area-value", f"area {brief(area)}, expected a number of pixels")
    box = _read_box(item.get("bbox"), size, where, image_id, found)
    if box is None:
        return None
    segmentation = _read_mask(item.get("segmentation"), box, size, where, image_id, found)
    if crowd:
        found.add("crowd", f"{where}iscrowd 1", image_id)
        if isinstance(segmentation, list):
            found.add("crowd-polygon", f"{where}iscrowd 1 with {len(segmentation)} polygon(s)", image_id)
    elif segmentation is None:
        found.add("mask-missing", f"{where}segmentation {brief(item.get('segmentation'))}", image_id)
    if area is None:
        found.add("area-missing", f"{where}no area", image_id)
        width, height = item["bbox"][2:]
        area = width * height if segmentation is None else int(coco_mask.area(to_rle(segmentation, size)))
    return Annotation(image_id, category_id, number, box, float(area), bool(crowd), segmentation)


def _read_box(bbox: Any, size: Size, where: str, image_id: int, found: Findings) -> Box | None:
    """Check an xywh box; None for one without area.  Raises Fault for one that is none, or not in the image."""
    good = isinstance(bbox, list) and len(bbox) == 4 and set(map(type, bbox)) <= NUMBERS
    # min and max pass over NaN unless it comes first; the sum does not
    if not good or not (min(bbox) >= -MAX_COORDINATE and max(bbox) <= MAX_COORDINATE and not math.isnan(sum(bbox))):
        raise Fault("box-malformed", f"bbox {brief(bbox)}, expected 4 finite numbers x, y, width, height")
    x, y, width, height = bbox
    right, bottom = x + width, y + height
    if right <= x or bottom <= y:  # and so for a width that is lost in rounding
        found.add("box-empty", f"{where}bbox {bbox}", image_id)
        return None
    over = max(-x, -y, right - size[1], bottom - size[0])
    if over > ROUNDING:
        in_image = f"bbox {bbox} in an image of width {size[1]}, height {size[0]}"
        if right <= 0 or bottom <= 0 or x >= size[1] or y >= size[0]:
            raise Fault("box-outside", in_image)
        found.add("box-clipped", f"{where}{in_image}", image_id)
        if over > OVERHANG:
            found.add("box-overhang", f"{where}{in_image}", image_id)
    if width < 1 or height < 1:
        found.add("box-tiny", f"{where}bbox {bbox}", image_id)
    return x, y, right, bottom


def _read_mask(segmentation: Any, box: Box, size: Size, where: str, image_id: int, found: Findings) -> Any:
    """Check a segmentation.  Returns what is left of it, or None.  Raises Fault."""
    if segmentation in (None, [], {}):
        return None
    kept, dropped = check_segmentation(segmentation, size)
    if dropped:
        short = next(one for one in segmentation if len(one) < 6 or len(one) % 2)
        found.add("polygon-short", f"{where}polygon of {len(short)} numbers", image_id, dropped)
    elif kept is None:
        found.add("mask-empty", f"{where}no run of its RLE is set", image_id)
    if isinstance(kept, list) and not has_pixels(kept, np.array(box), size):
        found.add("mask-empty", f"{where}no pixel of the image lies in {brief(kept)}", image_id)
        return None
    return kept
