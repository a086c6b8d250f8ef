"""Turn the segmentations of an annotation file into arrays, checked before pycocotools sees them.

pycocotools crashes the process on NaN, infinite or huge polygon coordinates and returns uninitialized memory
for run lengths that do not fill the image, so it must not get what `check_masks` refuses.
Letters: n objects, P polygons.  Coordinates are pixels of the original.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import FAULTS, REFUSED, Fault
from gndet.data.datasets.json_items import Raw, decoded, parse_outlines
from gndet.data.datasets.outlines import in_coco_form
from gndet.data.datasets.segmentation import MAX_OUTLINE, box_frame_masks, num_pixels, outline_lengths, run_lengths
from gndet.data.records import MASK_SIDE
from gndet.text import brief

NUMBERS = {int, float}


class Masks(NamedTuple):
    """Segmentations, stored end to end; each has polygons, an RLE, or nothing."""

    num_polygons: np.ndarray  # (n,) int64
    num_numbers: np.ndarray  # (P,) int64: of each polygon, two per point
    points: np.ndarray  # float64 x0, y0, x1, ...
    num_letters: np.ndarray  # (n,) int64: of an RLE's counts
    texts: np.ndarray  # uint8 ASCII


@dataclass(frozen=True)
class Polygons:
    """The P polygons of n objects."""

    owner: np.ndarray  # (P,) int64, ascending: index of the object
    lengths: np.ndarray  # (P,) int64: numbers, two per point
    points: np.ndarray  # float64, end to end; NaN if not a number

    def only(self, keep: np.ndarray) -> "Polygons":
        """Return the polygons that keep (P,) selects."""
        if keep.all():
            return self
        points = self.points[np.repeat(keep, self.lengths)]
        return Polygons(self.owner[keep], self.lengths[keep], points)

    @cached_property
    def first(self) -> np.ndarray:
        """Where the numbers of each polygon begin, and where the last end, (P + 1,)."""
        return offsets(self.lengths)

    @cached_property
    def bounds(self) -> np.ndarray:
        """The box xyxy around each polygon, (4, P); each has a point."""
        x, y, starts = self.points[::2], self.points[1::2], self.first[:-1] // 2
        if not len(starts):
            return np.zeros((4, 0))
        return np.stack([edge.reduceat(side, starts) for edge in (np.minimum, np.maximum) for side in (x, y)])

    def parts(self, first: int, end: int) -> list[list[float]]:  # the polygons from first to end - 1
        return [self.points[i:j].tolist() for i, j in pairwise(self.first[first : end + 1].tolist())]


class MaskFault(NamedTuple):
    """A fault of one segmentation."""

    place: int  # index among the n
    code: str
    text: str
    count: int = 1  # type: ignore[assignment]  # hides tuple.count


class CheckedMasks(NamedTuple):
    """What is kept of n segmentations, and what is wrong with them."""

    polygons: Polygons
    rles: dict[int, dict[str, Any]]  # by place
    faults: list[MaskFault]  # by ascending place
    refused: np.ndarray  # (n,) bool
    areas: np.ndarray  # (n,) float64 pixels: the sum of the polygons' areas, or the RLE's; 0 without a mask
    extents: np.ndarray  # (n, 4) float64 xyxy: the box around the mask; zeros without one

    @property
    def kept(self) -> np.ndarray:
        """Which of the n have polygons or an RLE, (n,) bool."""
        kept = np.zeros(len(self.refused), dtype=bool)
        kept[self.polygons.owner] = kept[list(self.rles)] = True
        return kept

    def mask(self, place: int) -> Any:
        """Return what is kept of a segmentation: a list of polygons, an RLE, or None."""
        return self.polygons.parts(*np.searchsorted(self.polygons.owner, [place, place + 1])) or self.rles.get(place)

    def packed(self, keep: np.ndarray) -> Masks:
        """Pack the segmentations that keep (n,) bool selects; the others must be empty."""
        num_polygons = np.bincount(self.polygons.owner, minlength=len(keep))
        texts, num_letters = [rle["counts"] for rle in self.rles.values()], np.zeros(len(keep), dtype=np.int64)
        num_letters[list(self.rles)] = list(map(len, texts))
        return Masks(
            num_polygons[keep], self.polygons.lengths, self.polygons.points,
            num_letters[keep], np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8),
        )  # fmt: skip


def check_masks(segmentations: Sequence[Any], sizes: np.ndarray, boxes: np.ndarray | None = None) -> CheckedMasks:
    """Check n segmentations as they are in a file, as Python objects or all as JSON text.

    sizes (n, 2) height, width of the images; boxes (n, 4) xyxy, not empty: if given, polygons must cover a pixel.
    Reads outlines in another form if it is clear.  Drops refused ones, polygons below 3 points, RLEs without a pixel.
    """
    faults: list[MaskFault] = []
    segmentations, polygons = _read_polygons(segmentations, faults)
    outlined = (np.bincount(polygons.owner, minlength=len(segmentations)) > 0).tolist()
    rles: dict[int, dict[str, Any]] = {}
    areas = np.zeros(len(segmentations))
    for place, value in enumerate(segmentations):
        if outlined[place] or value in (None, [], {}):
            continue
        try:
            rles[place], areas[place] = _check_rle(value, tuple(sizes[place].tolist()))
        except Fault as fault:
            faults.append(MaskFault(place, fault.code, str(fault)))
    polygons = _refuse_far(polygons, segmentations, sizes, faults)
    polygons = _refuse_long(_drop_short(polygons, faults), sizes, faults)
    doubled = _doubled_areas(polygons)
    if boxes is not None:
        kept = _drawn(polygons, doubled, segmentations, boxes, sizes, faults)
        polygons, doubled = polygons.only(kept), doubled[kept]
    areas += np.bincount(polygons.owner, doubled / 2, len(segmentations))
    refused = np.zeros(len(segmentations), dtype=bool)
    refused[[fault.place for fault in faults if FAULTS[fault.code].severity == REFUSED]] = True
    extents = _extents(polygons, rles, len(segmentations))
    return CheckedMasks(polygons, rles, sorted(faults, key=lambda fault: fault.place), refused, areas, extents)


def _read_polygons(segmentations: Sequence[Any], faults: list[MaskFault]) -> tuple[Sequence[Any], Polygons]:
    """Return the segmentations in COCO's form, as far as they are clear, outlines perhaps Raw; and their polygons."""
    if set(map(type, segmentations)) == {Raw}:
        parsed = parse_outlines(segmentations)
        if parsed is not None and 2 not in parsed[1]:
            shaped = list(segmentations)
            for place in np.setdiff1d(np.arange(len(shaped)), parsed[0]).tolist():
                shaped[place] = decoded(shaped[place])
            return shaped, Polygons(*parsed)
        segmentations = list(map(decoded, segmentations))
    polygons, in_form = _join_polygons(segmentations)
    if 2 in polygons.lengths or np.isnan(polygons.points).any() or not in_form:
        segmentations = _reshaped(segmentations, faults)
        polygons, _ = _join_polygons(segmentations)
    return segmentations, polygons


def _join_polygons(segmentations: Sequence[Any]) -> tuple[Polygons, bool]:  # and whether all lists are of lists
    outlines = [value if type(value) is list else [] for value in segmentations]
    all_lists = set(map(type, chain.from_iterable(outlines))) <= {list}
    if not all_lists:
        outlines = [outline if set(map(type, outline)) <= {list} else [] for outline in outlines]
    raw = list(chain.from_iterable(outlines))
    owner = np.repeat(np.arange(len(outlines)), np.array(list(map(len, outlines)), dtype=np.int64))
    lengths = np.array(list(map(len, raw)), dtype=np.int64)
    return Polygons(owner, lengths, to_floats(list(chain.from_iterable(raw)))), all_lists


def _reshaped(segmentations: Sequence[Any], faults: list[MaskFault]) -> list[Any]:
    """Return the segmentations in COCO's form, as far as they are clear."""
    shaped = [in_coco_form(value) if type(value) is list and value else value for value in segmentations]
    for place, (value, new) in enumerate(zip(segmentations, shaped, strict=True)):
        if new is not value:
            faults.append(MaskFault(place, "segmentation-shape", f"segmentation {brief(value)}"))
    return shaped


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> Any:
    """Check one segmentation of an image of size height, width.

    Returns what is kept of it, or None.  Raises Fault with the value and what was expected.
    """
    checked = check_masks([segmentation], np.array([size]))
    for fault in checked.faults:
        if checked.refused[0] and FAULTS[fault.code].severity == REFUSED:
            raise Fault(fault.code, fault.text)
    return checked.mask(0)


def to_floats(values: list[Any]) -> np.ndarray:
    """Return values (n,) as float64: NaN if not a number, inf for an integer too large for a float."""
    if set(map(type, values)) <= NUMBERS:
        with suppress(OverflowError):
            return np.array(values, dtype=np.float64)
    return np.array(list(map(_as_float, values)), dtype=np.float64)


def _as_float(value: Any) -> float:
    try:
        return float(value) if type(value) in NUMBERS else np.nan
    except OverflowError:
        return np.inf


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where each of n parts begins, and where the last ends, (n + 1,)."""
    return np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])


def _refuse_far(polygons: Polygons, raw: Sequence[Any], sizes: np.ndarray, faults: list[MaskFault]) -> Polygons:
    """Refuse objects with a coordinate that is not a number near the image.

    An outline may overhang the image; numbers farther out belong to another image.
    """
    if _are_near(polygons, sizes):
        return polygons
    owner = np.repeat(polygons.owner, polygons.lengths)  # of each number
    limit = sizes.max(1)[owner]
    wrong = np.flatnonzero(~((polygons.points >= -limit) & (polygons.points <= 2 * limit)))
    places, index = np.unique(owner[wrong], return_index=True)
    for place, number in zip(places.tolist(), wrong[index].tolist(), strict=True):
        values = list(chain.from_iterable(decoded(raw[place])))
        value = values[number - polygons.first[np.searchsorted(polygons.owner, place)]]
        expected = f"expected a number from {-limit[number]} to {2 * limit[number]}"
        faults.append(MaskFault(place, "polygon-number", f"polygon coordinate {brief(value)}, {expected}"))
    return polygons.only(~np.isin(polygons.owner, places))


def _are_near(polygons: Polygons, sizes: np.ndarray) -> bool:
    """Return whether all coordinates are numbers near their image, by the extremes of each polygon: NaN is neither."""
    filled = polygons.lengths > 0
    starts = polygons.first[:-1][filled]
    if not len(starts):
        return True
    limit = sizes.max(1)[polygons.owner[filled]]
    low, high = np.minimum.reduceat(polygons.points, starts), np.maximum.reduceat(polygons.points, starts)
    return bool(((low >= -limit) & (high <= 2 * limit)).all())


def _is_short(lengths: Any) -> Any:
    """Return whether polygons have fewer than 3 points, or half of one."""
    return (lengths < 6) | (lengths % 2 == 1)


def _drop_short(polygons: Polygons, faults: list[MaskFault]) -> Polygons:
    short = _is_short(polygons.lengths)
    places, index, counts = np.unique(polygons.owner[short], return_index=True, return_counts=True)
    for place, length, count in zip(places.tolist(), polygons.lengths[short][index], counts.tolist(), strict=True):
        faults.append(MaskFault(place, "polygon-short", f"polygon of {length} numbers", count))
    return polygons.only(~short)


def _refuse_long(polygons: Polygons, sizes: np.ndarray, faults: list[MaskFault]) -> Polygons:
    """Refuse objects whose outlines are too long to trace."""
    # an edge spans at most three pictures: few outlines can be too long, and only these are measured
    points, longer = np.bincount(polygons.owner, polygons.lengths // 2, len(sizes)), np.maximum(*sizes.T)  # (n,)
    may_be_long = points * 3 * longer > MAX_OUTLINE
    if not may_be_long.any():
        return polygons
    measured = polygons.only(may_be_long[polygons.owner])
    lengths = outline_lengths(measured.points.reshape(-1, 2), measured.lengths // 2)
    pixels = np.bincount(measured.owner, lengths, len(sizes))
    for place in np.flatnonzero(pixels > MAX_OUTLINE).tolist():
        faults.append(MaskFault(place, "mask-long", _too_long(f"an outline of {pixels[place]:,.0f} pixels")))
    return polygons.only((pixels <= MAX_OUTLINE)[polygons.owner])


def _too_long(what: str) -> str:
    return f"{what}, expected at most {MAX_OUTLINE:,}"


def _drawn(
    polygons: Polygons, doubled: np.ndarray, segmentations: Sequence[Any], boxes: np.ndarray, sizes: np.ndarray,
    faults: list[MaskFault],
) -> np.ndarray:  # fmt: skip
    """Return (P,) bool whether the outline covers a pixel of its image or of the finer frame that training uses."""
    drawn = np.ones(len(boxes), dtype=bool)
    drawn[polygons.owner] = False
    drawn[polygons.owner[_is_large(polygons, doubled, sizes)]] = True
    unsure = polygons.only(~drawn[polygons.owner])
    drawn[unsure.owner[num_pixels(unsure.parts(0, len(unsure.owner)), sizes[unsure.owner]) > 0]] = True
    for place in np.flatnonzero(~drawn).tolist():
        parts = polygons.parts(*np.searchsorted(polygons.owner, [place, place + 1]))
        height, width = sizes[place].tolist()
        box = boxes[place].clip(0, (width, height, width, height))
        within = (box[2:] > box[:2]).all()
        drawn[place] = within and box_frame_masks([parts], box[None], (height, width), MASK_SIDE).any()
        if not drawn[place]:
            outline = [part for part in decoded(segmentations[place]) if not _is_short(len(part))]
            faults.append(MaskFault(place, "mask-empty", f"no pixel of the image lies in {brief(outline)}"))
    return drawn[polygons.owner]


def _doubled_areas(polygons: Polygons) -> np.ndarray:
    """Return twice the area of each polygon, (P,), by the shoelace formula."""
    if not len(polygons.owner):
        return np.zeros(0)
    x, y = polygons.points[::2], polygons.points[1::2]
    first = polygons.first // 2
    following = np.arange(1, len(x) + 1)
    following[first[1:] - 1] = first[:-1]  # the last point joins the first
    return np.abs(np.add.reduceat(x * y[following] - y * x[following], first[:-1]))


def _is_large(polygons: Polygons, doubled: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which polygons surely cover a pixel, being thick and inside the image; these need not be drawn."""
    (left, top, right, bottom), (height, width) = polygons.bounds, sizes[polygons.owner].T
    inside = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)
    # area / perimeter is a lower bound of the radius of a disk inside a convex polygon: 0.5 pixels
    return inside & (doubled >= 2 * (right - left + bottom - top + 1))


def _extents(polygons: Polygons, rles: dict[int, dict[str, Any]], num: int) -> np.ndarray:
    """Return the boxes xyxy around n masks (n, 4), zeros if there is no mask."""
    extents = np.zeros((4, num))
    places, first = np.unique(polygons.owner, return_index=True)
    if len(places):
        extents[:2, places] = np.minimum.reduceat(polygons.bounds[:2], first, axis=1)
        extents[2:, places] = np.maximum.reduceat(polygons.bounds[2:], first, axis=1)
    for place, rle in rles.items():
        x, y, width, height = coco_mask.toBbox(rle).tolist()
        extents[:, place] = x, y, x + width, y + height
    return extents.T.copy()


def _check_rle(rle: Any, size: tuple[int, int]) -> tuple[dict[str, Any], int]:
    """Return an RLE with only its size and counts, compressed, and the number of its pixels.

    Raises Fault for a value that is not an RLE, differs in size from the image, does not fill it, or is empty.
    """
    if type(rle) is not dict:
        raise Fault("segmentation-malformed", f"segmentation {brief(rle)}, expected a list of polygons or an RLE")
    counts = rle.get("counts")
    if isinstance(counts, str | list) and len(counts) > MAX_OUTLINE:
        raise Fault("mask-long", _too_long(f"RLE counts of length {len(counts):,}"))
    if isinstance(counts, str):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and set(map(type, counts)) <= {int}:
        runs = counts
    else:
        raise Fault("rle-malformed", f"RLE counts {brief(counts)}, expected a compressed string or a list of integers")
    if rle.get("size") != list(size):
        raise Fault("rle-size", f"RLE size {brief(rle.get('size'))}, expected [height, width] {list(size)}")
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise Fault(
            "rle-counts",
            f"RLE counts {brief(counts)}: run lengths sum to {brief(sum(runs))}, the least is "
            f"{brief(min(runs, default=0))}; expected lengths >= 0 that sum to height x width = {size[0] * size[1]}",
        )
    pixels = sum(runs[1::2])
    if not pixels:
        raise Fault("mask-empty", "its RLE sets no pixel")
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode("ascii")
    return {"size": list(size), "counts": counts}, pixels
