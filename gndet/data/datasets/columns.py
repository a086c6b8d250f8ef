"""Check the annotations of a COCO file, all at once, column by column, and keep them as arrays.

The rules are here and in `masks`.  A value of the wrong type becomes a number that no rule accepts, so that each fault
is decided in one place.
Letters: n annotations.  Boxes are xywh in the file, xyxy from here on, float64 pixels of the original.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Findings
from gndet.data.datasets.masks import CheckedMasks, Masks, check_masks, to_floats
from gndet.data.datasets.segmentation import brief, to_rle

MAX_SIDE = 65_535  # pixels, JPEG's limit
MAX_COORDINATE = 1e6  # pixels, far beyond MAX_SIDE; larger numbers (or inf, NaN) do not make a box
ROUNDING = 0.01  # pixels: COCO's boxes are rounded to hundredths
OVERHANG = 2  # pixels that a box may reach over the edge before it is noted: rounding and outlines cause that much
NO_BOX = [float("nan")] * 4

Size = tuple[int, int]  # height, width
Item = dict[str, Any]  # an annotation as the file has it


def _in_image(item: Item, size: Size) -> str:
    return f"bbox {item['bbox']} in an image of width {size[1]}, height {size[0]}"


def _of_no_class(item: Item) -> str:
    if "category" in item:  # of an export
        return f"class {brief(item['category'])} is not among the classes that the export declares"
    return f"category_id {brief(item.get('category_id'))} is not in the file"


WORDS: dict[str, Callable[[Item, Size], str]] = {  # by code: the value got and what was expected
    "annotation-id": lambda item, size: f"annotation id {brief(item.get('id'))}, expected an integer",
    "image-unknown": lambda item, size: f"image_id {brief(item.get('image_id'))} is not in the file",
    "category-unknown": lambda item, size: _of_no_class(item),
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


class Columns(NamedTuple):
    """The n annotations that are kept, in the file's order."""

    image_ids: np.ndarray  # (n,) int64
    category_ids: np.ndarray  # (n,) int64
    annotation_ids: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 xyxy
    area: np.ndarray  # (n,) float64
    crowd: np.ndarray  # (n,) bool
    all_ids: np.ndarray  # int64, of all annotations that have an id, including dropped ones
    masks: Masks  # n


class Known(NamedTuple):
    """The N images and the categories that annotations may refer to."""

    image_ids: np.ndarray  # (N,) int64, ascending
    sizes: np.ndarray  # (N + 1, 2) int64 height, width; zeros if wrong, and in the last row
    category_ids: np.ndarray  # int64, ascending

    @staticmethod
    def of(sizes: dict[int, Size | None], category_ids: Iterable[int]) -> "Known":
        """Take the images of a file, None for a wrong size, and its categories."""
        rows = [sizes[image_id] or (0, 0) for image_id in sorted(sizes)]
        image_ids, categories = (np.array(sorted(ids), dtype=np.int64) for ids in (sizes, category_ids))
        return Known(image_ids, np.array([*rows, (0, 0)]), categories)


class _Marks:
    """Records which of n annotations have which fault.  Refused or dropped annotations are not checked further."""

    def __init__(self, num: int) -> None:
        self.left = np.ones(num, dtype=bool)  # those still being checked
        self.places: dict[str, np.ndarray] = {}  # indices, by code of FAULTS

    def note(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left."""
        self.places[code] = np.flatnonzero(self.left & faulty)

    def drop(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left, and stop checking them."""
        self.note(code, faulty)
        self.left &= ~faulty


def read_columns(items: Sequence[Item], known: Known, found: Findings) -> tuple[Columns, list[int]]:
    """Check n annotations, and add their faults to found, except ids that occur twice: `with_ids` finds them.

    Returns the annotations that are kept, and the indices among the n of those with a finding or an RLE.
    """
    marks = _Marks(len(items))
    ids, no_id, id_floats = _to_integers([item.get("id") for item in items])
    image_ids, no_image, image_floats = _to_integers([item.get("image_id") for item in items])
    category_ids, no_category, category_floats = _to_integers([item.get("category_id") for item in items])
    sizes = known.sizes[np.searchsorted(known.image_ids, image_ids)]  # (n, 2)
    marks.drop("annotation-id", no_id)
    marks.drop("image-unknown", no_image | ~np.isin(image_ids, known.image_ids))
    marks.drop("category-unknown", no_category | ~np.isin(category_ids, known.category_ids))
    marks.left &= sizes[:, 0] > 0  # a wrong size has been reported with the image
    marks.note("number-float", id_floats | image_floats | category_floats)
    crowd, area = _check_crowd(items, marks), _check_area(items, marks)
    boxes = _check_boxes(items, sizes, marks)
    segmentations = [
        item.get("segmentation") if left else None for item, left in zip(items, marks.left.tolist(), strict=True)
    ]
    masks = check_masks(segmentations, sizes, boxes)
    marks.left &= ~masks.refused
    _note_masks(masks, crowd, marks)
    _fill_areas(area, items, masks, sizes, marks)
    _report(items, ids, image_ids, sizes, marks, found)
    for fault in masks.faults:
        text = f"{_named(items[fault.place], ids[fault.place])}: {fault.text}"
        image_id = int(image_ids[fault.place])
        found.add(fault.code, text, image_id, fault.count)
    keep = marks.left
    columns = Columns(
        image_ids[keep], category_ids[keep], ids[keep], boxes[keep], area[keep], crowd[keep], ids[~no_id],
        masks.packed(keep),
    )  # fmt: skip
    marked = np.concatenate(list(marks.places.values())).tolist()
    return columns, sorted({*marked, *masks.rles, *(fault.place for fault in masks.faults)})


def _report(
    items: Sequence[Item], ids: np.ndarray, image_ids: np.ndarray, sizes: np.ndarray, marks: _Marks, found: Findings
) -> None:
    """Add all marks to found, and describe the first few of each kind."""
    for code, places in marks.places.items():
        for place in places.tolist():
            image_id = None if code in ("annotation-id", "image-unknown") else int(image_ids[place])
            text = ""
            if found.wants_example(code):
                text = WORDS[code](items[place], tuple(sizes[place].tolist()))
                text = text if code == "annotation-id" else f"{_named(items[place], ids[place])}: {text}"
            found.add(code, text, image_id)


def _named(item: Item, number: int) -> str:
    """Return words that name an annotation: its place in an export, or its id in a COCO file."""
    return item.get("place") or f"annotation {number}"


def _to_integers(values: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values (n,) as int64, 0 if not a 64-bit integer; (n,) bool which are not; and which are written as 5.0."""
    if set(map(type, values)) <= {int}:
        with suppress(OverflowError):
            return np.array(values, dtype=np.int64), *np.zeros((2, len(values)), dtype=bool)
    numbers = list(map(to_integer, values))
    return (
        np.array([number or 0 for number in numbers], dtype=np.int64),
        np.array([number is None for number in numbers]),
        np.array([type(value) is float for value in values]),
    )


def to_integer(value: Any) -> int | None:
    """Return a 64-bit integer, reading 5.0 as 5; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) < value < 2**63 else None


def _check_crowd(items: Sequence[Item], marks: _Marks) -> np.ndarray:
    """Return which annotations are crowd regions, (n,) bool; a missing iscrowd means 0."""
    values = [item.get("iscrowd") or 0 for item in items]
    marks.drop("crowd-value", np.array([value not in (0, 1) for value in values], dtype=bool))
    return np.array([value == 1 for value in values], dtype=bool)


def _check_area(items: Sequence[Item], marks: _Marks) -> np.ndarray:
    """Return the areas (n,), NaN for a missing one."""
    values = [item.get("area") for item in items]
    area, missing = to_floats(values), np.array([value is None for value in values], dtype=bool)
    marks.drop("area-value", ~missing & ~((area >= 0) & (area <= MAX_SIDE**2)))
    return area


def _check_boxes(items: Sequence[Item], sizes: np.ndarray, marks: _Marks) -> np.ndarray:
    """Return the boxes (n, 4) xyxy; sizes (n, 2) of their images."""
    values: list[Any] = [item.get("bbox") for item in items]
    if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}):
        values = [value if type(value) is list and len(value) == 4 else NO_BOX for value in values]
    boxes = to_floats(list(chain.from_iterable(values))).reshape(-1, 4)
    marks.drop("box-malformed", ~(np.abs(boxes) <= MAX_COORDINATE).all(1))  # also true for NaN
    boxes[~marks.left] = 0
    (x, y, width, height), (image_height, image_width) = boxes.T.copy(), sizes.T
    boxes[:, 2:] += boxes[:, :2]
    right, bottom = boxes[:, 2:].T
    marks.drop("box-empty", (right <= x) | (bottom <= y))  # also true for a width that rounding has lost
    over = np.maximum(np.maximum(-x, -y), np.maximum(right - image_width, bottom - image_height))
    outside = (right <= 0) | (bottom <= 0) | (x >= image_width) | (y >= image_height)
    marks.drop("box-outside", outside & (over > ROUNDING))
    marks.note("box-clipped", over > ROUNDING)
    marks.note("box-overhang", over > OVERHANG)
    marks.note("box-tiny", (width < 1) | (height < 1))
    return boxes


def _note_masks(masks: CheckedMasks, crowd: np.ndarray, marks: _Marks) -> None:
    outlined, coded = np.zeros((2, len(crowd)), dtype=bool)
    outlined[masks.polygons.owner] = coded[list(masks.rles)] = True
    marks.note("crowd", crowd)
    marks.note("crowd-polygon", crowd & outlined)
    marks.note("mask-missing", ~(crowd | outlined | coded))


def _fill_areas(area: np.ndarray, items: Sequence[Item], masks: CheckedMasks, sizes: np.ndarray, marks: _Marks) -> None:
    marks.note("area-missing", np.isnan(area))
    for place in marks.places["area-missing"].tolist():
        mask = masks.mask(place)
        width, height = items[place]["bbox"][2:]
        area[place] = width * height if mask is None else coco_mask.area(to_rle(mask, tuple(sizes[place].tolist())))


def end_to_end(parts: Iterable[Columns]) -> Columns:
    """Join the columns of at least one part.  Frees parts one by one, so as not to hold 30 million points twice."""
    joined = [bytearray() for _ in (*Columns._fields[:-1], *Masks._fields)]
    for part in parts:
        arrays = (*part[:-1], *part.masks)
        for column, values in zip(joined, arrays, strict=True):
            column += values.tobytes()
    columns = [
        np.frombuffer(column, values.dtype).reshape(-1, *values.shape[1:])
        for column, values in zip(joined, arrays, strict=True)
    ]
    num = len(Columns._fields) - 1
    return Columns._make([*columns[:num], Masks._make(columns[num:])])


def with_ids(columns: Columns, found: Findings) -> Columns:
    """Find annotation ids of a file that occur twice or are below 1.

    If any is below 1, all annotations are renumbered, because COCO's evaluators read id 0 as "no match".
    """
    again = np.ones(len(columns.all_ids), dtype=bool)
    again[np.unique(columns.all_ids, return_index=True)[1]] = False
    for number in columns.all_ids[again].tolist():
        found.add("annotation-id-twice", f"annotation id {number} occurs twice, expected unique ids")
    numbers = columns.annotation_ids
    low = numbers[numbers < 1]
    if len(low):
        found.add("annotation-id-low", f"annotation id {low[0]}", count=len(numbers))
        numbers = np.arange(1, len(numbers) + 1)
    return columns._replace(annotation_ids=numbers)
