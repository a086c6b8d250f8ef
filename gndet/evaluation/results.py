"""Detections of a data set in columns that read as COCO results: the dicts are made on demand.

500,000 detections with masks take 600 MB as COCO dicts but 90 MB in columns, which the ranks exchange.
Masks are pasted into pictures as COCO run-length codes.  n detections, S mask side, (h, w) picture.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hotcoco import mask as hotcoco_mask
from pycocotools import mask as coco_mask

from gndet.files import Kind, written_whole

WRITTEN_AT_ONCE = 10_000  # detections held in memory as text
# whitespace that spells "gndet" in bits: the mark of a list of results, which has no place for a word
SIGNATURE = "".join("\t" if bit == "1" else " " for letter in b"gndet" for bit in f"{letter:08b}")
RESULTS = Kind("a file of detections that gndet wrote for --out", rb"\]\n" + SIGNATURE.encode() + rb"\n\Z")
MASK_THRESHOLD = 0.5  # Detectron, detectron2: a pixel of at least this probability belongs to the object
AT_ONCE = 1 << 20  # pixels of a mask to compute at once; all 12 million of a large picture take twice the time
MIN_BOX_EDGE = 1e-3  # pixels; avoids a division by zero for an empty box
FIELDS = ("image_ids", "category_ids", "boxes", "scores", "sizes", "areas")

Paste = Literal["exact", "rounded", "detectron"]


@dataclass(eq=False)
class Results(Sequence[dict[str, Any]]):
    """Detections in a fixed order; each reads as {"image_id", "category_id", "bbox", "score"[, "segmentation"]}."""

    image_ids: np.ndarray  # (n,) int64
    category_ids: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 xywh pixels of the picture
    scores: np.ndarray  # (n,) float64
    sizes: np.ndarray  # (n, 2) int64 height, width of the picture; meaningless without masks
    areas: np.ndarray  # (n,) float64 pixels of the mask; meaningless without masks
    codes: list[bytes] | None  # n masks as COCO's compressed run-length codes; None without masks

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            codes = None if self.codes is None else self.codes[index]
            return Results(**{field: getattr(self, field)[index] for field in FIELDS}, codes=codes)  # views
        return next(iter(self.take(np.array([range(len(self))[index]]))))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        nothing: list[Any] = [None] * len(self)
        rows = zip(*(column.tolist() for column in columns), self.masks() or nothing, strict=True)
        for image_id, category_id, box, score, mask in rows:
            result = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            if mask is not None:
                result["segmentation"] = mask | {"counts": mask["counts"].decode("ascii")}
            yield result

    def masks(self) -> list[Any] | None:
        """Return the n masks in pycocotools' form, {"size": [h, w], "counts": bytes}; None without masks."""
        if self.codes is None:
            return None
        _, first, index = np.unique(self.sizes @ (1 << 32, 1), return_index=True, return_inverse=True)
        sizes = self.sizes[first].tolist()  # few: masks of one size share the list
        return [{"size": sizes[i], "counts": code} for i, code in zip(index.tolist(), self.codes, strict=True)]

    def take(self, index: np.ndarray) -> "Results":
        """Return the detections with indices `index` (m,), in that order."""
        codes = None if self.codes is None else [self.codes[i] for i in index.tolist()]
        return Results(**{field: getattr(self, field)[index] for field in FIELDS}, codes=codes)

    def of_image(self, image_id: int) -> "Results":
        """Return the detections of an image."""
        return self.take(np.flatnonzero(self.image_ids == image_id))

    def in_order_of(self, image_ids: Sequence[int]) -> "Results":
        """Return the detections sorted by image in the order of image_ids; within an image the order stays."""
        ids = np.array(image_ids, dtype=np.int64)
        by_id = ids.argsort()
        place = by_id[np.searchsorted(ids, self.image_ids, sorter=by_id)]
        return self.take(place.argsort(kind="stable"))


def join(parts: Iterable[Results]) -> Results:
    """Concatenate parts; the result has masks only if every part that has detections has masks."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return from_coco([])
    codes = [part.codes for part in parts if part.codes is not None]
    whole = list(chain.from_iterable(codes)) if len(codes) == len(parts) else None
    return Results(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS}, codes=whole)


def from_coco(results: Sequence[dict[str, Any]]) -> Results:
    """Convert COCO results, all with compressed run-length codes or all without, to columns."""
    return with_areas(without_areas(results))


def without_areas(results: Sequence[dict[str, Any]]) -> Results:
    """Do the same, but leave the areas of masks 0."""
    codes, sizes = None, np.zeros((len(results), 2), dtype=np.int64)
    if all("segmentation" in result for result in results):
        masks = [result["segmentation"] for result in results]
        codes = [mask["counts"].encode("ascii") for mask in masks]
        sizes = np.fromiter(chain.from_iterable([mask["size"] for mask in masks]), np.int64).reshape(-1, 2)
    boxes = np.fromiter(chain.from_iterable([result["bbox"] for result in results]), np.float64).reshape(-1, 4)
    return Results(
        image_ids=np.array([result["image_id"] for result in results], dtype=np.int64),
        category_ids=np.array([result["category_id"] for result in results], dtype=np.int64),
        boxes=boxes, scores=np.array([result["score"] for result in results], dtype=np.float64),
        sizes=sizes, areas=np.zeros(len(results)), codes=codes,
    )  # fmt: skip


def with_areas(results: Results) -> Results:
    """Count the pixels of the masks.  Raises ValueError for a code that is malformed or overfills its picture."""
    masks = results.masks()
    return results if masks is None else replace(results, areas=mask_areas(masks))


def mask_areas(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Count the pixels of n run-length codes, (n,) float64.  pycocotools counts at most 255 masks at once."""
    return np.array(hotcoco_mask.area(list(masks)), dtype=np.float64)


def save_results(path: Path, results: Results, *, marked: bool = False) -> None:
    """Write COCO results as JSON, whole or not at all; marked: with the mark of RESULTS.  Raises OutputError."""
    with written_whole(path) as file:
        for first in range(0, len(results), WRITTEN_AT_ONCE):
            text = json.dumps(list(results[first : first + WRITTEN_AT_ONCE]))
            file.write((("[" if first == 0 else ", ") + text[1:-1]).encode())
        file.write(b"]" if len(results) else b"[]")
        file.write(f"\n{SIGNATURE}\n".encode() if marked else b"")


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], paste: Paste = "exact"
) -> list[dict[str, Any]]:
    """Paste each mask into the picture as a COCO run-length code.

    masks (n, S, S) probabilities in the frame of the box; boxes (n, 4) xyxy pixels; size (h, w) of the
    picture.  Bilinear, zero outside the map, as two products of small matrices.
    paste: exact: at pixel centers, like detectron2 (grid_sample with align_corners=False); rounded: into a box of whole
    pixels, with a border of one empty cell, like torchvision; detectron: like rounded, but the box includes its last
    pixel.
    Returns n of {"size": [h, w], "counts": bytes}, as pycocotools encodes them.
    """
    height, width = size
    runs = []
    for mask, box in zip(masks, boxes, strict=True):
        if paste == "exact":
            rows, row_weights = _sampling(box[1], box[3], height, masks.shape[1])
            columns, column_weights = _sampling(box[0], box[2], width, masks.shape[2])
        else:
            last = 1 if paste == "detectron" else 0
            rows, row_weights = _whole_pixels(box[1], box[3] - last, height, masks.shape[1])
            columns, column_weights = _whole_pixels(box[0], box[2] - last, width, masks.shape[2])
        runs.append(_run_lengths(column_weights @ mask.T, row_weights, columns.start, rows.start, size))
    codes = [{"size": [height, width], "counts": lengths} for lengths in runs]
    return coco_mask.frPyObjects(codes, height, width) if codes else []


def _run_lengths(across: np.ndarray, row_weights: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths of a picture that is empty except for one part, AT_ONCE pixels at a time.

    across (columns, S) and row_weights (rows, S): a pixel of the part is inside where their product is at least
    MASK_THRESHOLD.  The first column of the part is `left`, its first row is `top` in the picture (h, w).
    The lengths are those of outside, inside, outside ..., column by column.
    """
    (height, width), num_rows = size, len(row_weights)
    borders, step = [np.zeros(0, dtype=np.int64)], max(AT_ONCE // max(num_rows, 1), 1)
    for first in range(0, len(across), step):
        inside = across[first : first + step] @ row_weights.T >= MASK_THRESHOLD  # (columns, rows)
        fenced = np.zeros((len(inside), num_rows + 2), dtype=bool)
        fenced[:, 1:-1] = inside
        # rows at which the inside begins, ends, begins ...
        column, row = divmod(np.flatnonzero(fenced[:, 1:] != fenced[:, :-1]), num_rows + 1)
        borders.append((left + first + column) * height + top + row)
    border = np.concatenate(borders)
    # a run that ends at the bottom of the picture continues at the top of the next column
    through = np.flatnonzero(border[1:] == border[:-1])
    if through.size:
        border = np.delete(border, np.concatenate((through, through + 1)))
    lengths = np.diff(border, prepend=0, append=height * width)
    return lengths if lengths[-1] else lengths[:-1]


def _sampling(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """Find the pixels in [0, limit) that a box edge from low to high touches, and their bilinear weights.

    Returns the p pixels as a slice and (p, side) float32: the weight of each mask cell at each pixel center.
    """
    edge = max(high - low, MIN_BOX_EDGE)
    # on the border of its box a map fades to at most half its value: no pixel outside reaches MASK_THRESHOLD
    pixels = _limited(math.floor(low), math.ceil(high), limit)
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - low) / edge * side - 0.5  # in cells; cell 0 is at 0
    return pixels, _weights(position, side)


def _whole_pixels(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """Do the same for a box that is grown by a border of one cell and cut to whole pixels, including its last pixel."""
    center, half = (low + high) / 2, (high - low) / 2 * (side + 2) / side
    first, last = int(center - half), int(center + half)  # rounded toward zero, like torchvision and Detectron
    count = max(last - first + 1, 1)
    pixels = _limited(first, last + 1, limit)
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - first) / count * (side + 2) - 0.5  # the border is at 0
    return pixels, _weights(position - 1, side)


def _limited(start: int, stop: int, limit: int) -> slice:
    return slice(min(max(start, 0), limit), min(max(stop, 0), limit))


def _weights(position: np.ndarray, side: int) -> np.ndarray:
    """Return the bilinear weights (p, side) of mask cells at positions (p,) in cells."""
    return np.maximum(1 - np.abs(position[:, None] - np.arange(side)), 0).astype(np.float32)
