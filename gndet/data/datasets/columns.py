"""Check the annotations of a COCO file, all at once, column by column, and keep them as arrays.

The rules are here and in `masks`.  A value of the wrong type becomes a number that no rule accepts, so that each fault
is decided in one place.
Letters: n annotations.  Boxes are xywh in the file, xyxy from here on, float64 pixels of the original.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gndet.data.datasets.areas import check_areas
from gndet.data.datasets.boxes import check_boxes
from gndet.data.datasets.faults import EXAMPLES, SHOWN, Findings, Marks
from gndet.data.datasets.ids import NO_ID, Numbers, to_integer, to_integers, without_text
from gndet.data.datasets.json_items import CATEGORY, PLACE, Item, Raw, column
from gndet.data.datasets.masks import CheckedMasks, Masks, check_masks, to_floats
from gndet.text import brief

MAX_SIDE = 65_535  # pixels, JPEG's limit

Size = tuple[int, int]  # height, width


def _box(item: Item) -> str:
    return f"bbox {brief(item['bbox'])}" if "bbox" in item else "bbox is missing"


def _in_image(item: Item, size: Size) -> str:
    return f"{_box(item)} in an image of width {size[1]}, height {size[0]}"


def _flags(item: Item) -> str:
    return ", ".join(f"{key} {brief(item[key])}" for key in ("iscrowd", "ignore") if key in item)


def _area(item: Item, size: Size) -> str:
    return f"area {brief(item['area'])}, {_box(item)}"


def _of_no_class(item: Item) -> str:
    if CATEGORY in item:  # of an export
        return f"class {brief(item[CATEGORY])} is not among the classes that the export declares"
    return f"category_id {brief(item.get('category_id'))} is not in the file"


WORDS: dict[str, Callable[[Item, Size], str]] = {  # by code: the value got and what was expected
    "annotation-id": lambda item, size: "no integer id",
    "image-unknown": lambda item, size: f"image_id {brief(item.get('image_id'))} is not in the file",
    "category-unknown": lambda item, size: _of_no_class(item),
    "number-float": lambda item, size: "its id, image_id or category_id",
    "number-text": lambda item, size: "numbers written as text",
    "crowd-value": lambda item, size: f"{_flags(item)}, expected 0 or 1",
    "ignore-flag": lambda item, size: _flags(item),
    "area-value": lambda item, size: f"area {brief(item['area'])}, expected a number of pixels",
    "area-missing": lambda item, size: "no area",
    "area-wrong": _area,
    "area-odd": _area,
    "area-box": _area,
    "box-malformed": lambda item, size: f"{_box(item)}, expected 4 finite numbers x, y, width, height",
    "box-missing": lambda item, size: _box(item),
    "box-none": lambda item, size: f"{_box(item)}, segmentation {brief(item.get('segmentation'))}",
    "box-rotated": lambda item, size: f"{_box(item)}, attributes.rotation {brief(item['attributes']['rotation'])}",
    "box-empty": lambda item, size: _box(item),
    "box-tiny": lambda item, size: _box(item),
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
    extents: np.ndarray  # (n, 4) float64 xyxy around the mask; zeros without one
    places: np.ndarray  # (n,) int64: index in the file's list
    all_ids: np.ndarray  # int64, of all annotations, including dropped ones; NO_ID if an annotation has none
    masks: Masks  # n


class Known(NamedTuple):
    """The N images and the categories that annotations may refer to."""

    image_ids: np.ndarray  # (N,) int64, ascending
    sizes: np.ndarray  # (N + 1, 2) int64 height, width; zeros if wrong, and in the last row
    category_ids: np.ndarray  # int64, ascending
    image_numbers: Numbers  # of image ids, if some are names
    category_numbers: Numbers  # of category ids, if some are names

    @staticmethod
    def of(sizes: dict[int, Size | None], category_ids: Iterable[int]) -> "Known":
        """Take the images of a file, None for a wrong size, and its categories; their ids are integers."""
        rows = [sizes[image_id] or (0, 0) for image_id in sorted(sizes)]
        image_ids, categories = (np.array(sorted(ids), dtype=np.int64) for ids in (sizes, category_ids))
        return Known(image_ids, np.array([*rows, (0, 0)]), categories, {}, {})


def read_columns(items: Sequence[Item], known: Known, found: Findings, texts: Sequence[int] = ()) -> Columns:
    """Check n annotations, and add their faults to found, except ids that occur twice: `with_ids` finds them.

    texts: indices of annotations in which text has been read as numbers.  Returns the annotations that are kept.
    """
    marks = Marks(len(items))
    ids = to_integers(column(items, "id"), {})
    images = to_integers(column(items, "image_id"), known.image_numbers)
    categories = to_integers(column(items, "category_id"), known.category_numbers)
    image_ids, category_ids = images.values, categories.values
    sizes = known.sizes[np.searchsorted(known.image_ids, image_ids)]  # (n, 2)
    marks.drop("image-unknown", images.wrong | ~np.isin(image_ids, known.image_ids))
    marks.drop("category-unknown", categories.wrong | ~np.isin(category_ids, known.category_ids))
    marks.left &= sizes[:, 0] > 0  # a wrong size has been reported with the image
    marks.note("number-float", ids.floats & ~ids.wrong | images.floats | categories.floats)
    textual = ids.texts | images.texts | categories.texts
    textual[list(texts)] = True
    marks.note("number-text", textual)
    crowd, area = _check_crowd(items, marks), _check_area(items, marks)
    boxes, box_area = check_boxes(items, sizes, marks)
    segmentations = column(items, "segmentation")
    for place in np.flatnonzero(~marks.left).tolist():
        segmentations[place] = Raw(b"null") if type(segmentations[place]) is Raw else None
    masks = check_masks(segmentations, sizes, boxes)
    marks.left &= ~masks.refused
    if not texts and (numeric := without_text(items, np.flatnonzero(~marks.left).tolist())):
        items = [numeric.get(place, item) for place, item in enumerate(items)]
        return read_columns(items, known, found, list(numeric))
    _note_masks(masks, crowd, marks)
    check_areas(area, box_area, masks, (boxes[:, 2:] - boxes[:, :2]).sum(1) + 1, crowd, sizes, marks)
    marks.note("annotation-id", ids.wrong)
    _report(items, image_ids, sizes, marks, found)
    for fault in masks.faults:
        text = f"{_named(items[fault.place], fault.place)}: {fault.text}"
        image_id = int(image_ids[fault.place])
        found.add(fault.code, text, image_id, fault.count)
    keep = marks.left
    return Columns(
        image_ids[keep], category_ids[keep], ids.values[keep], boxes[keep], area[keep], crowd[keep],
        masks.extents[keep], np.flatnonzero(keep), ids.values, masks.packed(keep),
    )  # fmt: skip


def _report(items: Sequence[Item], image_ids: np.ndarray, sizes: np.ndarray, marks: Marks, found: Findings) -> None:
    """Add all marks to found, and describe the first few of each kind."""
    for code, places in marks.places.items():
        shown = _first(places, image_ids)
        for place in shown:
            image_id = None if code == "image-unknown" else int(image_ids[place])
            text = ""
            if found.wants_example(code):
                words = WORDS[code](items[place], tuple(sizes[place].tolist()))
                text = f"{_named(items[place], place)}: {words}"
            found.add(code, text, image_id)
        if len(places) > len(shown):
            found.add(code, "", count=len(places) - len(shown))


def _first(places: np.ndarray, image_ids: np.ndarray) -> list[int]:
    """Return the places of the first EXAMPLES annotations, and of the first annotation of the first SHOWN images."""
    first = np.unique(image_ids[places], return_index=True)[1]
    return places[np.union1d(np.sort(first)[:SHOWN], np.arange(min(EXAMPLES, len(places))))].tolist()


def _named(item: Item, place: int) -> str:
    """Return words that name an annotation: its place in an export, its id, or its index in the file's list."""
    number = to_integer(item.get("id"))
    if PLACE in item or number is not None:
        return item.get(PLACE) or f"annotation {number}"
    return f"annotations[{place}]" + ("" if item.get("id") is None else f" (id {brief(item['id'])})")


def _check_crowd(items: Sequence[Item], marks: Marks) -> np.ndarray:
    """Return which annotations are crowd regions, by iscrowd or ignore, (n,) bool; a missing one means 0."""
    crowd, wrong = _to_flags(column(items, "iscrowd"))
    ignored = np.zeros_like(crowd)
    if any(ignore := column(items, "ignore")):
        ignored, unclear = _to_flags(ignore)
        wrong |= unclear
    marks.drop("crowd-value", wrong)
    marks.note("ignore-flag", ignored & ~crowd)
    return crowd | ignored


def _to_flags(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return which of n values are 1 or true, and which are neither that nor 0, false or empty, (n,) bool."""
    wrong = np.array([bool(value) and value != 1 for value in values], dtype=bool)
    return np.array([value == 1 for value in values], dtype=bool), wrong


def _check_area(items: Sequence[Item], marks: Marks) -> np.ndarray:
    """Return the areas (n,), NaN for a missing one."""
    values = column(items, "area")
    area, missing = to_floats(values), np.array([value is None for value in values], dtype=bool)
    marks.drop("area-value", ~missing & ~((area >= 0) & (area <= MAX_SIDE**2)))
    return area


def _note_masks(masks: CheckedMasks, crowd: np.ndarray, marks: Marks) -> None:
    regions = crowd.copy()
    regions[marks.places.get("ignore-flag", [])] = False
    outlined = np.zeros_like(crowd)
    outlined[masks.polygons.owner] = True
    marks.note("crowd", regions)
    marks.note("crowd-polygon", regions & outlined)
    marks.note("mask-missing", ~(crowd | masks.kept))


def end_to_end(parts: Iterable[Columns]) -> Columns:
    """Join the columns of at least one part.  Frees parts one by one, so as not to hold 30 million points twice."""
    joined = [bytearray() for _ in (*Columns._fields[:-1], *Masks._fields)]
    before = 0  # annotations in the parts so far
    for part in parts:
        arrays = (*part._replace(places=part.places + before)[:-1], *part.masks)
        before += len(part.all_ids)
        for array, values in zip(joined, arrays, strict=True):
            array.extend(values)  # its bytes
    columns = [
        np.frombuffer(column, values.dtype).reshape(-1, *values.shape[1:])
        for column, values in zip(joined, arrays, strict=True)
    ]
    num = len(Columns._fields) - 1
    return Columns._make([*columns[:num], Masks._make(columns[num:])])


def with_ids(columns: Columns, found: Findings) -> Columns:
    """Find annotation ids of a file that occur twice or are below 1.

    If any is below 1 or missing, all annotations are numbered by their place in the file, from 1: nothing refers to
    their ids, and COCO's evaluators read id 0 as "no match".
    """
    given = columns.all_ids[columns.all_ids != NO_ID]
    again = np.ones(len(given), dtype=bool)
    again[np.unique(given, return_index=True)[1]] = False
    for number in given[again].tolist():
        found.add("annotation-id-twice", f"annotation id {number} occurs twice, expected unique ids")
    numbers = columns.annotation_ids
    low = numbers[(numbers < 1) & (numbers != NO_ID)]
    if len(low):
        found.add("annotation-id-low", f"annotation id {low[0]}", count=len(numbers))
    return columns._replace(annotation_ids=columns.places + 1) if (numbers < 1).any() else columns
