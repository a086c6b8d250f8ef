"""The annotations of a COCO file as arrays, checked column by column; what is not plainly good is checked one by one.

`annotations.read_one` judges and words every fault; here those are picked out that it would pass without a word, most
of them, a hundred times as fast.  Letters: n objects, P polygons.  Boxes are xyxy float64 pixels.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.annotations import MAX_COORDINATE, MAX_SIDE, ROUNDING, Annotation, Size, read_one, whole
from gndet.data.datasets.faults import Findings
from gndet.data.datasets.segmentation import NUMBERS, to_rle


class Masks(NamedTuple):
    """Segmentations end to end: of mask i polygons [polygons_first[i], polygons_first[i + 1]) or an RLE."""

    polygons_first: np.ndarray  # (n + 1,) into the P polygons
    points_first: np.ndarray  # (P + 1,) into points
    points: np.ndarray  # float64 x0, y0, x1, ...
    counts_first: np.ndarray  # (n + 1,) into counts: RLE as lists
    counts: np.ndarray  # int64
    texts_first: np.ndarray  # (n + 1,) into texts: RLE as strings
    texts: np.ndarray  # uint8 ASCII


class Columns(NamedTuple):
    """The n annotations that are kept, in the file's order."""

    image_ids: np.ndarray  # (n,) int64
    category_ids: np.ndarray  # (n,) int64
    annotation_ids: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 xyxy
    area: np.ndarray  # (n,) float64
    crowd: np.ndarray  # (n,) bool
    masks_at: np.ndarray  # (n,) int64, the place of each one's mask in masks
    masks: Masks
    all_ids: np.ndarray  # int64, of all annotations that have one, dropped ones too


class Known(NamedTuple):
    """What annotations refer to."""

    sizes: dict[int, Size | None]  # (height, width) of each image id, None where it is wrong
    category_ids: set[int]
    image_ids: np.ndarray  # (N,) int64, rising: those whose size is right
    heights: np.ndarray  # (N,) of these
    widths: np.ndarray
    categories: np.ndarray  # rising

    @staticmethod
    def of(sizes: dict[int, Size | None], category_ids: Iterable[int]) -> "Known":
        """The images and categories of a file."""
        good = sorted((number, *size) for number, size in sizes.items() if size is not None)
        table = np.array(good, dtype=np.int64).reshape(-1, 3)
        categories = np.array(sorted(category_ids), dtype=np.int64)
        return Known(sizes, set(category_ids), table[:, 0].copy(), table[:, 1], table[:, 2], categories)


def read_columns(
    items: Sequence[dict[str, Any]],
    exactly: Callable[[list[int]], Sequence[dict[str, Any]]],
    known: Known,
    found: Findings,
) -> Columns:
    """Check annotations; found gets what is wrong but ids that occur twice, which `with_ids` finds.

    exactly: given the places of those that are looked at one by one, gives them with integers of any size kept.
    """
    plain = _plain(items, known)
    places = plain.places.tolist()
    odd = sorted(set(range(len(items))) - set(places)) if len(places) < len(items) else []
    if not odd:
        return plain.columns
    exact = exactly(odd)
    kept, kept_places, ids, id_places = [], [], [], []
    for place in odd:
        item = exact[place]
        number = whole(item.get("id"))
        if number is not None:
            ids.append(number)
            id_places.append(place)
        annotation = read_one(item, number, known.sizes, known.category_ids, found)
        if annotation is not None:
            kept.append(annotation)
            kept_places.append(place)
    both = Together()
    both.add(plain.columns)
    both.add(_of_annotations(kept))
    columns = both.columns()
    order = np.argsort(np.concatenate([plain.places, np.array(kept_places, dtype=np.int64)]), kind="stable")
    all_ids = np.concatenate([plain.columns.annotation_ids, np.array(ids, dtype=np.int64)])
    id_order = np.argsort(np.concatenate([plain.places, np.array(id_places, dtype=np.int64)]), kind="stable")
    scalars = [column[order] for column in columns[:7]]
    return Columns(*scalars, columns.masks, all_ids[id_order])


class Together:
    """Columns end to end, grown part by part: 30 million points are not held twice."""

    def __init__(self) -> None:
        self._scalars: list[list[np.ndarray]] = [[] for _ in range(8)]  # all but the masks
        self._firsts = [[np.zeros(1, dtype=np.int64)] for _ in range(4)]
        self._ends = [0, 0, 0, 0]  # of the polygons, points, counts and texts so far
        self._values = [bytearray() for _ in range(3)]  # points, counts and texts

    def add(self, part: Columns) -> None:
        """Put a part at the end."""
        *scalars, masks_at, masks, all_ids = part
        shift = sum(map(len, self._firsts[0])) - 1
        for mine, its in zip(self._scalars, (*scalars, masks_at + shift, all_ids), strict=True):
            mine.append(its)
        firsts = (masks.polygons_first, masks.points_first, masks.counts_first, masks.texts_first)
        for i, its in enumerate(firsts):
            self._firsts[i].append(its[1:] + self._ends[i])
            self._ends[i] += int(its[-1])
        for mine, its in zip(self._values, (masks.points, masks.counts, masks.texts), strict=True):
            mine += its.tobytes()

    def columns(self) -> Columns:
        """All of them; there must have been a part."""
        *scalars, all_ids = map(np.concatenate, self._scalars)
        polygons_first, points_first, counts_first, texts_first = map(np.concatenate, self._firsts)
        points, counts, texts = map(np.frombuffer, self._values, (np.float64, np.int64, np.uint8))
        masks = Masks(polygons_first, points_first, points, counts_first, counts, texts_first, texts)
        return Columns(*scalars, masks, all_ids)


def with_ids(columns: Columns, found: Findings) -> Columns:
    """Find ids of a file's annotations that occur twice, or are under 1.

    If any is under 1 all are numbered anew: COCO's evaluators take id 0 for "no match".
    """
    ids = columns.all_ids
    order = np.argsort(ids, kind="stable")
    again = np.sort(order[1:][ids[order][1:] == ids[order][:-1]])
    for number in ids[again].tolist():
        found.add("annotation-id-twice", f"annotation id {number} occurs twice, expected unique ids")
    numbers = columns.annotation_ids
    low = numbers[numbers < 1]
    if len(low):
        found.add("annotation-id-low", f"annotation id {low[0]}", count=len(numbers))
        numbers = np.arange(1, len(numbers) + 1)
    return columns._replace(annotation_ids=numbers)


def pack_masks(segmentations: Iterable[Any]) -> Masks:
    """Put checked segmentations end to end."""
    points, points_first, polygons_first = array("d"), array("q", [0]), array("q", [0])
    counts, counts_first = array("q"), array("q", [0])
    texts, texts_first = bytearray(), array("q", [0])
    for one in segmentations:
        if isinstance(one, list):
            for polygon in one:
                points.extend(polygon)
                points_first.append(len(points))
        elif one is not None and isinstance(one["counts"], list):
            counts.extend(one["counts"])
        elif one is not None:
            texts += one["counts"].encode("ascii")
        polygons_first.append(len(points_first) - 1)
        counts_first.append(len(counts))
        texts_first.append(len(texts))
    whole_numbers = (polygons_first, points_first, counts_first, counts, texts_first)
    a, b, c, d, e = (np.frombuffer(values, dtype=np.int64) for values in whole_numbers)
    return Masks(a, b, np.frombuffer(points, dtype=np.float64), c, d, e, np.frombuffer(texts, dtype=np.uint8))


# --- those that are plainly good


class _Plain(NamedTuple):
    """The annotations of a list that nothing can be said against, and their places in it."""

    places: np.ndarray
    columns: Columns


@np.errstate(invalid="ignore", over="ignore")  # NaN and inf compare as what is not plain
def _plain(items: Sequence[dict[str, Any]], known: Known) -> _Plain:
    """Pick the plain annotations out: no crowd, one polygon or more, nothing to note or to mend."""
    places = _usual(items)
    if not len(places) or not len(known.image_ids):
        return _Plain(places[:0], _of_annotations([]))
    ids, image_ids, category_ids, bboxes, area, outlines = zip(
        *(_fields(items[i]) for i in places.tolist()), strict=True
    )
    try:
        ids, image_ids, category_ids = (np.array(one, dtype=np.int64) for one in (ids, image_ids, category_ids))
        area, bboxes = np.array(area, dtype=np.float64), np.array(bboxes, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # an integer of more than 64 bits
        return _Plain(places[:0], _of_annotations([]))
    image = np.searchsorted(known.image_ids, image_ids).clip(max=len(known.image_ids) - 1)
    good = (ids >= 1) & (known.image_ids[image] == image_ids) & np.isin(category_ids, known.categories)
    good &= (area >= 0) & (area <= MAX_SIDE**2)
    height, width = known.heights[image], known.widths[image]
    corners = bboxes.copy()
    corners[:, 2:] += bboxes[:, :2]
    good &= (np.abs(bboxes) <= MAX_COORDINATE).all(1) & (bboxes[:, 2:] >= 1).all(1)
    good &= np.maximum(corners[:, 2] - width, corners[:, 3] - height) <= ROUNDING
    good &= -corners[:, :2].min(1) <= ROUNDING
    masks, drawn = _plain_outlines(outlines, height, width)
    keep = np.flatnonzero(good & drawn)
    columns = Columns(
        image_ids[keep], category_ids[keep], ids[keep], corners[keep], area[keep], np.zeros(len(keep), dtype=bool),
        np.arange(len(keep)), _chosen(masks, good & drawn), ids[keep],
    )  # fmt: skip
    return _Plain(places[keep], columns)


_KEYS = frozenset(("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"))
_fields = itemgetter("id", "image_id", "category_id", "bbox", "area", "segmentation")


def _usual(items: Sequence[dict[str, Any]]) -> np.ndarray:
    """The places of annotations that have what most have: numbers, a box of four, polygons of three points or more."""
    places = [i for i, one in enumerate(items) if one.get("iscrowd", 1) == 0 and type(one.get("segmentation")) is list]
    if not _all_usual([items[i] for i in places]):
        places = [i for i in places if _all_usual([items[i]])]
    return np.array(places, dtype=np.int64)


def _all_usual(items: Sequence[dict[str, Any]]) -> bool:
    """Whether annotations with lists of polygons have all keys, and values of the right types and lengths."""
    if not all(map(_KEYS.issubset, items)):
        return False
    ids, image_ids, category_ids, bboxes, area, outlines = zip(*map(_fields, items), strict=True) if items else [()] * 6
    whole_numbers = chain(ids, image_ids, category_ids, (one["iscrowd"] for one in items))
    if not (set(map(type, whole_numbers)) <= {int} and set(map(type, area)) <= NUMBERS and all(outlines)):
        return False
    polygons = list(chain.from_iterable(outlines))
    if not (set(map(type, bboxes)) <= {list} and set(map(len, bboxes)) <= {4} and set(map(type, polygons)) <= {list}):
        return False
    lengths = set(map(len, polygons))
    return set(map(type, chain.from_iterable(bboxes))) <= NUMBERS and all(n >= 6 and n % 2 == 0 for n in lengths)


def _plain_outlines(
    outlines: Sequence[list[list[float]]], height: np.ndarray, width: np.ndarray
) -> tuple[Masks, np.ndarray]:
    """The polygons of n objects end to end, and (n,) whether all their numbers are sane and one surely has a pixel.

    height, width (n,) of their images.  What is thick and inside the image, as `segmentation.has_pixels` takes it,
    is not drawn for it.
    """
    polygons = list(chain.from_iterable(outlines))
    numbers = list(map(len, outlines))
    lengths = np.array(list(map(len, polygons)), dtype=np.int64)
    flat = list(chain.from_iterable(polygons))
    points, numeric = _as_floats(flat, lengths)
    polygons_first, points_first = _ends(np.array(numbers, dtype=np.int64)), _ends(lengths)
    none, empty = np.zeros(len(outlines) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    masks = Masks(polygons_first, points_first, points, none, empty, none, np.zeros(0, dtype=np.uint8))
    if not polygons:
        return masks, np.zeros(len(outlines), dtype=bool)
    owner = np.repeat(np.arange(len(outlines)), numbers)
    wide, high = width[owner], height[owner]  # (P,)
    x, y, first = points[::2], points[1::2], points_first[:-1] // 2
    left, right = np.minimum.reduceat(x, first), np.maximum.reduceat(x, first)
    top, bottom = np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)
    reach = np.maximum(wide, high)
    sane = numeric & (np.minimum(left, top) >= -reach) & (np.maximum(right, bottom) <= 2 * reach)
    following = np.arange(1, len(x) + 1)
    following[points_first[1:] // 2 - 1] = first  # the last point is joined to the first
    twice = np.add.reduceat(x * y[following] - y * x[following], first)
    large = (left >= 0) & (top >= 0) & (right <= wide) & (bottom <= high)
    large &= np.abs(twice) >= 2 * (right - left + bottom - top + 1)
    starts = polygons_first[:-1]
    good, shown = np.logical_and.reduceat(sane, starts), np.logical_or.reduceat(large, starts)
    for i in np.flatnonzero(good & ~shown).tolist():
        shown[i] = coco_mask.area(to_rle(outlines[i], (int(height[i]), int(width[i])))) > 0
    return masks, good & shown


def _as_floats(flat: list[Any], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as float64, and (P,) which polygons hold nothing else; those that hold text, lists or bools are zeros."""
    numeric = np.ones(len(lengths), dtype=bool)
    if not set(map(type, flat)) <= NUMBERS:
        ends = lengths.cumsum().tolist()
        for i, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True)):
            if not set(map(type, flat[end - length : end])) <= NUMBERS:
                numeric[i] = False
                flat[end - length : end] = [0.0] * length
    try:
        return np.array(flat, dtype=np.float64), numeric
    except OverflowError:  # an integer beyond any float
        return np.zeros(len(flat)), np.zeros(len(lengths), dtype=bool)


# --- putting together


def _of_annotations(kept: Sequence[Annotation]) -> Columns:
    """Annotations that were checked one by one, as columns."""
    numbers = np.array([one[:3] for one in kept], dtype=np.int64).reshape(-1, 3)
    return Columns(
        numbers[:, 0], numbers[:, 1], numbers[:, 2],
        np.array([one.box for one in kept], dtype=np.float64).reshape(-1, 4),
        np.array([one.area for one in kept], dtype=np.float64), np.array([one.crowd for one in kept], dtype=bool),
        np.arange(len(kept)), pack_masks(one.segmentation for one in kept), numbers[:, 2],
    )  # fmt: skip


def _chosen(masks: Masks, keep: np.ndarray) -> Masks:
    """Some of masks that are polygons, keep (n,)."""
    if keep.all():
        return masks
    numbers, lengths = np.diff(masks.polygons_first), np.diff(masks.points_first)
    of_polygon = np.repeat(keep, numbers)
    points = masks.points[np.repeat(of_polygon, lengths)]
    none = np.zeros(int(keep.sum()) + 1, dtype=np.int64)
    return masks._replace(
        polygons_first=_ends(numbers[keep]), points_first=_ends(lengths[of_polygon]), points=points, counts_first=none,
        texts_first=none,
    )  # fmt: skip


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
