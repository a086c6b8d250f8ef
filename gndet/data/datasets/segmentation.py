"""Draw COCO's segmentations, once `masks.check_masks` has checked them, in the frame of their box.

Letters: n objects, S mask side. Boxes are xyxy float64 pixels of the original; pixel i covers [i, i + 1).
"""

from itertools import chain
from typing import Any

import numpy as np
from hotcoco.mask import decode
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Fault
from gndet.text import brief

MAX_FRAME_REACH = 16  # how many box sides a polygon may leave its box by; beyond, its outline is too long to trace
MAX_OUTLINE = 4_000_000  # pixels of an object's outline, or runs of its RLE: tracing it takes a second and 200 MB
MAX_CHAIN = 7  # characters of a run length: 7 x 5 bits hold every uint32
MERGED_AT_ONCE = 64  # merging thousands of polygons one by one takes the square of their number


def num_pixels(polygons: list[list[float]], sizes: np.ndarray) -> np.ndarray:
    """Count the pixels of an image that each of P checked polygons covers, (P,); sizes (P, 2) height, width of it."""
    counts = np.zeros(len(polygons), dtype=np.int64)
    for size in np.unique(sizes, axis=0).tolist():
        same = np.flatnonzero((sizes == size).all(1))
        counts[same] = coco_mask.area(coco_mask.frPyObjects([polygons[i] for i in same.tolist()], *size))
    return counts


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Turn a checked segmentation into one compressed RLE of the image's size (height, width)."""
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, *size)
        while len(parts) > MERGED_AT_ONCE:
            parts = [coco_mask.merge(parts[i : i + MERGED_AT_ONCE]) for i in range(0, len(parts), MERGED_AT_ONCE)]
        return coco_mask.merge(parts) if len(parts) != 1 else parts[0]
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def box_frame_masks(segmentations: list[Any], boxes: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """Draw each object's mask in the frame of its own box.

    segmentations: n, checked; boxes (n, 4) inside the image, not empty; size: height, width of the image;
    side: S.  Returns (n, S, S) bool.  Polygons are moved into the frame and rasterized there, all at once; an RLE is
    decoded, one at a time to bound the memory, and sampled bilinearly.
    """
    masks = np.zeros((len(boxes), side, side), dtype=bool)
    outlined = [index for index, segmentation in enumerate(segmentations) if isinstance(segmentation, list)]
    frames = into_frames([segmentations[index] for index in outlined], boxes[outlined], side)
    drawn = {index: polygons for index, polygons in zip(outlined, frames, strict=True) if polygons is not None}
    if drawn:
        masks[list(drawn)] = _draw(list(drawn.values()), side)
    for index in set(range(len(boxes))) - drawn.keys():
        masks[index] = _sample_rle(to_rle(segmentations[index], size), boxes[index], side)
    return masks


def into_frames(outlines: list[list[list[float]]], boxes: np.ndarray, side: int) -> list[list[np.ndarray] | None]:
    """Map the polygons of n objects into the frames of their boxes (n, 4).

    None stands for polygons that reach too far out of their frame, or are too long to trace there.

    Returns n lists of polygons (2 x points,) x0, y0, x1, ... in cells of the S x S frame.
    """
    polygons = list(chain.from_iterable(outlines))
    if not polygons:
        return []
    owner = np.repeat(np.arange(len(outlines)), list(map(len, outlines)))  # of each polygon
    lengths = np.array(list(map(len, polygons)))
    points = np.fromiter(chain.from_iterable(polygons), dtype=np.float64, count=lengths.sum()).reshape(-1, 2)
    point_owner = np.repeat(owner, lengths // 2)
    scale = side / (boxes[:, 2:] - boxes[:, :2])  # (n, 2) x, y
    points = (points - boxes[point_owner, :2]) * scale[point_owner]
    first = np.flatnonzero(np.diff(point_owner, prepend=-1))  # an object's first point; each has a polygon
    near = np.maximum.reduceat(np.abs(points).max(1), first) <= MAX_FRAME_REACH * side
    if len(points) * 2 * MAX_FRAME_REACH * side > MAX_OUTLINE:
        near &= np.bincount(owner, outline_lengths(points, lengths // 2)) <= MAX_OUTLINE
    moved = iter(np.split(points.ravel(), lengths.cumsum()[:-1]))
    lists = [[next(moved) for _ in outline] for outline in outlines]
    return [polygons if ok else None for polygons, ok in zip(lists, near, strict=True)]


def outline_lengths(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how many pixels COCO's tracing steps along each of P closed polygons, (P,).

    points (N, 2), end to end; counts (P,): of each polygon, at least 1.
    """
    end = counts.cumsum()
    following = np.arange(1, len(points) + 1)
    following[end - 1] = end - counts  # the last point joins the first
    return np.add.reduceat(np.abs(points[following] - points).max(1), end - counts)


def _draw(outlines: list[list[np.ndarray]], side: int) -> np.ndarray:
    """Rasterize the union of the polygons of each object.  Returns (n, S, S) uint8."""
    drawn = iter(coco_mask.frPyObjects(list(chain.from_iterable(outlines)), side, side))
    codes = [[next(drawn) for _ in outline] for outline in outlines]
    wholes = [parts[0] if len(parts) == 1 else coco_mask.merge(parts) for parts in codes]
    return decode(wholes).transpose(2, 0, 1)  # hotcoco decodes in a third of the time that pycocotools takes


def _sample_rle(rle: dict[str, Any], box: np.ndarray, side: int) -> np.ndarray:
    """Sample the mask of an RLE on a side x side grid over the box; bilinear, threshold 0.5."""
    (height, width), (top, left, window) = rle["size"], mask_window(rle)
    window = np.pad(window.T, 1).T  # around its box, the mask is empty
    rows = _interpolate(window, top - 1, height, box[1], box[3], side)  # (S, w)
    return _interpolate(rows.T, left - 1, width, box[0], box[2], side).T >= 0.5


def _interpolate(values: np.ndarray, first: int, size: int, start: float, end: float, side: int) -> np.ndarray:
    """Interpolate rows linearly at the centers of `side` cells from start to end.

    values (n, m): the rows from `first` on, of `size` rows; the others are like the nearest of them.  Returns (S, m).
    """
    place = start + (np.arange(side) + 0.5) * ((end - start) / side) - 0.5
    place = place.clip(0, size - 1)
    low = np.floor(place).astype(int)
    high = (low + 1).clip(max=size - 1)
    share = (place - low)[:, None]
    low, high = ((row - first).clip(0, len(values) - 1) for row in (low, high))
    return values[low] * (1 - share) + values[high] * share


def mask_window(code: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    """Decode a compressed RLE within its box.  Returns the box's first row and column, and (rows, columns) bool."""
    height, counts = code["size"][0], code["counts"]
    left, top, across, down = coco_mask.toBbox(code).astype(int).tolist()
    ends = np.cumsum(run_lengths(counts if isinstance(counts, str) else counts.decode("ascii")), dtype=np.int64)
    ends = ends.clip(left * height, (left + across) * height)  # runs go down the columns
    inside = np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(ends, prepend=left * height))
    return top, left, inside.reshape(across, height)[:, top : top + down].T


def run_lengths(counts: str) -> list[int]:
    """Read the run lengths of a compressed RLE, to check them (format: rleFrString in COCO's maskApi.c).

    A number is a chain of characters of 5 bits each, low bits first, in ASCII 48 to 111: bit 5 says that more
    follow, bit 4 of the last is the sign.  The fourth number and later ones are differences to the number two before.
    Raises Fault for a string that does not hold run lengths.
    """
    code = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if code.size == 0:
        return []
    ends = np.flatnonzero(code & 0x20 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if code.min() < 0 or code.max() > 63 or code[-1] & 0x20 or lengths.max() > MAX_CHAIN:
        raise Fault("rle-malformed", f"RLE counts {brief(counts)}, not a compressed run-length string")
    place = np.arange(code.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((code & 0x1F) << 5 * place, starts)
    runs -= np.where(code[ends] & 0x10, 1 << 5 * lengths, 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist()
