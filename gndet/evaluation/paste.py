"""Paste the masks of detections into pictures, as COCO run-length codes. n detections, S mask side, (h, w) picture."""

import math
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

Paste = Literal["exact", "rounded", "detectron"]
MASK_THRESHOLD = 0.5  # Detectron, detectron2: a pixel belongs to the object from this probability on
MIN_BOX_EDGE = 1e-3  # pixels; keeps an empty box from dividing by zero


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], paste: Paste = "exact"
) -> list[dict[str, Any]]:
    """Sample each mask into the picture, as a COCO run-length code.

    masks (n, S, S) probabilities in the frame of the box; boxes (n, 4) xyxy pixels; size (h, w) of the
    picture.  Bilinear, zero outside the map, as two products of small matrices.
    paste: exact, at pixel centres: detectron2's paste, which is grid_sample with align_corners=False; rounded, into a
    box of whole pixels, after a border of one empty cell: torchvision's; detectron: the same for a box that names its
    last pixel.
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
        inside = column_weights @ mask.T @ row_weights.T >= MASK_THRESHOLD  # (columns, rows)
        runs.append(_run_lengths(inside, columns.start, rows.start, size))
    codes = [{"size": [height, width], "counts": lengths} for lengths in runs]
    return coco_mask.frPyObjects(codes, height, width) if codes else []


def _run_lengths(inside: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Find the run lengths of a picture that is empty but for one part, from that part alone.

    inside (columns, rows) bool, of which the first column is `left` and the first row `top` of the picture (h, w).
    Returns lengths of outside, inside, outside ..., column by column.
    """
    height, width = size
    fenced = np.zeros((inside.shape[0], inside.shape[1] + 2), dtype=bool)
    fenced[:, 1:-1] = inside
    # rows where the inside begins, ends, begins ...
    column, row = divmod(np.flatnonzero(fenced[:, 1:] != fenced[:, :-1]), inside.shape[1] + 1)
    border = (left + column) * height + top + row
    # a run that ends at the bottom of the picture goes on at the top of the next column
    through = np.flatnonzero(border[1:] == border[:-1])
    if through.size:
        border = np.delete(border, np.concatenate((through, through + 1)))
    lengths = np.diff(border, prepend=0, append=height * width)
    return lengths if lengths[-1] else lengths[:-1]


def _sampling(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """Find the pixels in [0, limit) that a box edge from low to high touches, and their bilinear weights.

    Returns the p pixels as a slice and (p, side) float32: the weight of each mask cell at each pixel centre.
    """
    edge = max(high - low, MIN_BOX_EDGE)
    # a map fades to half its value at most on the border of its box: no pixel outside reaches MASK_THRESHOLD
    pixels = _limited(math.floor(low), math.ceil(high), limit)
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - low) / edge * side - 0.5  # in cells; cell 0's centre is 0
    return pixels, _weights(position, side)


def _whole_pixels(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """Do the same for a box grown by a border of one cell and cut to whole pixels, its last pixel included."""
    center, half = (low + high) / 2, (high - low) / 2 * (side + 2) / side
    first, last = int(center - half), int(center + half)  # towards zero, as torchvision and Detectron
    count = max(last - first + 1, 1)
    pixels = _limited(first, last + 1, limit)
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - first) / count * (side + 2) - 0.5  # the border's is 0
    return pixels, _weights(position - 1, side)


def _limited(start: int, stop: int, limit: int) -> slice:
    """Return the pixels from start to stop that lie in [0, limit)."""
    return slice(min(max(start, 0), limit), min(max(stop, 0), limit))


def _weights(position: np.ndarray, side: int) -> np.ndarray:
    """Return the bilinear weights (p, side) of mask cells at positions (p,) in cells."""
    return np.maximum(1 - np.abs(position[:, None] - np.arange(side)), 0).astype(np.float32)
