"""Box geometry on padded batches. B images, M ground-truth slots, N boxes; xyxy float32 pixels, float32 throughout."""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # Detectron: a 16 px anchor may grow to 1000 px


def full(x: Tensor) -> Tensor:
    """Return x as float32 or wider: geometry and losses are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair.

    a (B, M, 4), b (B or 1, N, 4).  Returns (B, M, N) in [0, 1]; empty or inverted boxes give 0.
    """
    ax0, ay0, ax1, ay1 = a[:, :, None].unbind(-1)  # (B, M, 1)
    bx0, by0, bx1, by1 = b[:, None].unbind(-1)  # (B, 1, N)
    width = torch.minimum(ax1, bx1).sub_(torch.maximum(ax0, bx0)).clamp_(min=0)  # (B, M, N)
    height = torch.minimum(ay1, by1).sub_(torch.maximum(ay0, by0)).clamp_(min=0)
    intersection = width.mul_(height)
    del height  # at most three (B, M, N) live at once
    area_a = (ax1 - ax0).clamp(min=0) * (ay1 - ay0).clamp(min=0)
    area_b = (bx1 - bx0).clamp(min=0) * (by1 - by0).clamp(min=0)
    return intersection.div_((area_a + area_b).sub_(intersection).clamp_(min=1e-6))


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes a and b (..., 4), broadcastable, pair by pair; empty boxes give 0."""
    intersection, union = overlap(a, b)
    return intersection / union.clamp(min=1e-6)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas (...) of intersection and union of boxes a and b (..., 4), broadcastable, pair by pair."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = sides.clamp(min=0).unbind(-1)
    (aw, ah), (bw, bh) = ((box[..., 2:] - box[..., :2]).clamp(min=0).unbind(-1) for box in (a, b))
    intersection = width * height
    return intersection, aw * ah + bw * bh - intersection


def centers(boxes: Tensor) -> Tensor:
    """Return the centers (..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def clip_boxes(boxes: Tensor, sizes: Tensor, *, to_pixels: bool = False) -> Tensor:
    """Limit boxes to their picture.

    boxes (B, N, 4); sizes (B, 2) height, width in pixels.  Returns (B, N, 4).  A box wholly outside becomes
    empty (zero area); none is removed.  to_pixels: clip as Detectron does, whose boxes name their first and last pixel,
    so that a box wholly outside keeps the pixel at the edge.
    """
    limit = sizes.flip(-1).to(boxes.dtype)[:, None]  # (B, 1, 2) width, height
    min_side = 1 if to_pixels else 0
    low = torch.minimum(boxes[..., :2].clamp(min=0), limit - min_side)
    return torch.cat([low, torch.minimum(boxes[..., 2:].clamp(min=min_side), limit)], dim=-1)


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Compute the regression targets of boxes relative to anchors (Girshick et al. 2014, appendix C).

    boxes, anchors (..., 4).  weights multiply (dx, dy) and (dw, dh).  Returns (..., 4), finite unless a box holds NaN.
    """
    anchor_size = (anchors[..., 2:] - anchors[..., :2]).clamp(min=1e-3)
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    shift = ((boxes[..., 2:] + boxes[..., :2]) - (anchors[..., 2:] + anchors[..., :2])) / 2 / anchor_size
    return torch.cat([shift * weights[0], (size / anchor_size).log() * weights[1]], dim=-1)


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Compute boxes from regression deltas, the inverse of `encode`; growth is limited to a factor of 1000 / 16.

    deltas, anchors (..., 4), broadcastable.  Returns (..., 4), float32 or wider.
    """
    shift, growth = full(deltas[..., :2]) / weights[0], full(deltas[..., 2:]) / weights[1]
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., 2:] + anchors[..., :2]) / 2 + shift * size
    half = size * growth.clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Take rows of each image: values (B, N, ...), index (B, R) int64 in [0, N).  Returns (B, R, ...)."""
    trailing = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *(1,) * len(trailing)).expand(*index.shape, *trailing))
