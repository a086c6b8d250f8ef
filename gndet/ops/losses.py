"""Losses that keep images apart: the divisor of an image's loss depends on that image only.  Also the mask targets.

B images, P positive regions, S side of the stored masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.ops.boxes import overlap
from gndet.ops.torchvision_ops import operators

_roi_align = operators().roi_align  # also if algorithms must be deterministic: only gradients are not


def sum_per_image(values: Tensor, mask: Tensor) -> Tensor:
    """Sum values (B, R) where mask (B, R) is true; other values may be NaN.  Returns (B,)."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def mean_per_image(values: Tensor, mask: Tensor) -> Tensor:
    """Average values (B, R) where mask (B, R) is true; 0 for an image whose mask is empty.  Returns (B,)."""
    return sum_per_image(values, mask) / mask.sum(dim=1).clamp(min=1)


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Compute smooth L1 (Girshick 2015, eq. 3) with its transition at beta; beta 0 is L1.  Same shape."""
    size = difference.abs()
    return size if beta == 0 else torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss (Lin et al. 2017, "Focal Loss", eq. 5) of logits for targets bool.  Same shape.

    alpha weighs positives, 1 - alpha negatives; gamma: how much less an easy example counts.
    """
    signed = torch.where(targets, logits, -logits)  # of the true answer
    weight = torch.where(targets, alpha, 1 - alpha)
    return -weight * torch.sigmoid(-signed).pow(gamma) * F.logsigmoid(signed)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - GIoU (Rezatofighi et al. 2019, algorithm 1) of boxes and targets (..., 4), pair by pair; (...)."""
    intersection, union = overlap(boxes, targets)
    hull = torch.maximum(boxes[..., 2:], targets[..., 2:]) - torch.minimum(boxes[..., :2], targets[..., :2])
    area = hull[..., 0] * hull[..., 1]
    tiny = 1e-7  # as in torchvision and in ATSS's code
    return 1 - intersection / (union + tiny) + (area - union) / (area + tiny)


def mask_targets(masks: Tensor, gt_boxes: Tensor, boxes: Tensor, size: int, *, soft: bool = False) -> Tensor:
    """Crop each region's target out of its object's mask.

    masks (P, S, S) bool, each in the frame of its gt_boxes (P, 4); boxes (P, 4) the regions.
    Returns (P, size, size) float32 in {0, 1}; outside the object's box the target is 0.
    soft: torchvision's targets in [0, 1], the mean of the mask over a bin, not aligned to half pixels.
    """
    side = masks.shape[-1]
    origin, extent = gt_boxes[:, :2], (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=1e-3)
    frame = torch.cat([(boxes[:, :2] - origin) / extent, (boxes[:, 2:] - origin) / extent], dim=1) * side
    frame = frame.nan_to_num(0.0, 0.0, 0.0).clamp(-16 * side, 16 * side)  # a junk slot must not grow the grid
    index = torch.arange(len(masks), device=masks.device, dtype=frame.dtype)
    if soft:  # add a border of one empty cell, because the kernel repeats the last cell beyond the edge
        rois = torch.cat([index[:, None], frame + 1], dim=1)
        bordered = F.pad(masks[:, None].to(frame.dtype), (1, 1, 1, 1))
        return _roi_align(bordered, rois, 1.0, size, size, -1, False)[:, 0]
    rois = torch.cat([index[:, None], frame], dim=1)
    # 4 samples per bin: a 28 x 28 target from 112 x 112; fixed, because the adaptive grid explodes on junk boxes
    crop = _roi_align(masks[:, None].to(frame.dtype), rois, 1.0, size, size, 4, True)
    return (crop[:, 0] >= 0.5).to(frame.dtype)
