"""Paste the masks of detections into pictures, as COCO run-length codes. n detections, S mask side, (h, w) picture."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

Paste = Literal["exact", "rounded", "detectron"]
MASK_THRESHOLD = 0.5  # Detectron, detectron2: a pixel belongs to the object from this probability on
MIN_BOX_EDGE = 1e-3  # pixels; keeps an empty box from dividing by zero


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], paste: Paste = "exact"
) -> Iterator[dict[str, Any]]:
    """Sample each mask into the picture and yield it as a COCO run-length code.

    masks (n, S, S) probabilities in the frame of the box; boxes (n, 4) xyxy pixels; size (h, w) of the
    picture.  Bilinear, zero outside the map, as two products of small matrices.
    paste: exact, at pixel centres: detectron2's paste, which is grid_sample with align_corners=False; rounded, into a
    box of whole pixels, after a border of one empty cell: torchvision's; detectron: the same for a box that names its
    last pixel.
    Yields n of {"size": [h, w], "counts": str}.
    """
    height, width = size
    picture = np.zeros(size, dtype=np.uint8, order="F")
    for mask, box in zip(masks, boxes, strict=True):
        if paste == "exact":
            rows, row_weights = _sampling(box[1], box[3], height, masks.shape[1])
            columns, column_weights = _sampling(box[0], box[2], width, masks.shape[2])
        else:
            last = 1 if paste == "detectron" else 0
            rows, row_weights = _whole_pixels(box[1], box[3] - last, height, masks.shape[1])
            columns, column_weights = _whole_pixels(box[0], box[2] - last, width, masks.shape[2])
        picture[rows, columns] = row_weights @ mask @ column_weights.T >= MASK_THRESHOLD
        code = coco_mask.encode(picture)
        picture[rows, columns] = 0
        yield {"size": [height, width], "counts": code["counts"].decode("ascii")}


def _sampling(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """Find the pixels in [0, limit) that a box edge from low to high touches, and their bilinear weights.

    Returns the p pixels as a slice and (p, side) float32: the weight of each mask cell at each pixel centre.
    """
    edge = max(high - low, MIN_BOX_EDGE)
    # a map fades to half its value at most on the border of its box: no pixel outside reaches MASK_THRESHOLD
    pixels = slice(*np.clip([int(np.floor(low)), int(np.ceil(high))], 0, limit))
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - low) / edge * side - 0.5  # in cells; cell 0's centre is 0
    return pixels, _weights(position, side)


def _whole_pixels(low: float, high: float, limit: int, side: int) -> tuple[slice, np.ndarray]:
    """The same for a box that is grown by the border of one cell and cut to whole pixels, its last pixel included."""
    center, half = (low + high) / 2, (high - low) / 2 * (side + 2) / side
    first, last = int(center - half), int(center + half)  # towards zero, as torchvision and Detectron
    count = max(last - first + 1, 1)
    pixels = slice(*np.clip([first, last + 1], 0, limit))
    position = (np.arange(pixels.start, pixels.stop) + 0.5 - first) / count * (side + 2) - 0.5  # the border's is 0
    return pixels, _weights(position - 1, side)


def _weights(position: np.ndarray, side: int) -> np.ndarray:
    """The bilinear weights (p, side) of mask cells at positions (p,) in cells."""
    return np.clip(1 - np.abs(position[:, None] - np.arange(side)), 0, None).astype(np.float32)
