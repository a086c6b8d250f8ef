"""Word what `columns.read_columns` finds in an annotation: the value got and what was expected."""

from collections.abc import Callable
from typing import Any

from gndet.data.datasets.segmentation import brief

Size = tuple[int, int]  # height, width
Item = dict[str, Any]  # an annotation as the file has it


def _in_image(item: Item, size: Size) -> str:
    return f"bbox {item['bbox']} in an image of width {size[1]}, height {size[0]}"


WORDS: dict[str, Callable[[Item, Size], str]] = {
    "annotation-id": lambda item, size: f"annotation id {brief(item.get('id'))}, expected an integer",
    "image-unknown": lambda item, size: f"image_id {brief(item.get('image_id'))} is not in the file",
    "category-unknown": lambda item, size: f"category_id {brief(item.get('category_id'))} is not in the file",
    "number-float": lambda item, size: "its id, image_id or category_id",
    "crowd-value": lambda item, size: f"iscrowd {brief(item['iscrowd'])}, expected 0 or 1",
    "area-value": lambda item, size: f"area {brief(item['area'])}, expected a number of pixels",
    "area-missing": lambda item, size: "no area",
    "box-malformed": lambda item, size: (
        f"bbox {brief(item.get('bbox'))}, expected 4 finite numbers x, y, width, height"
    ),
    "box-empty": lambda item, size: f"bbox {item['bbox']}",
    "box-tiny": lambda item, size: f"bbox {item['bbox']}",
    "box-outside": _in_image,
    "box-clipped": _in_image,
    "box-overhang": _in_image,
    "crowd": lambda item, size: "iscrowd 1",
    "crowd-polygon": lambda item, size: f"iscrowd 1 with {len(item['segmentation'])} polygon(s)",
    "mask-missing": lambda item, size: f"segmentation {brief(item.get('segmentation'))}",
}


def describe_fault(code: str, item: Item, number: int, size: Size) -> str:
    """Return what is wrong with the annotation of id number, in an image of that size, by the code in FAULTS."""
    words = WORDS[code](item, size)
    return words if code == "annotation-id" else f"annotation {number}: {words}"
