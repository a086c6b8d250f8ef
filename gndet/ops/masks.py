"""Mask targets from box-frame masks. P positive regions, S side of the stored masks."""

import torch
import torchvision
from torch import Tensor


def mask_targets(masks: Tensor, gt_boxes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop each region's target out of its object's mask.

    masks (P, S, S) bool, each in the frame of its gt_boxes (P, 4); boxes (P, 4) the regions.
    Returns (P, size, size) float32 in {0, 1}; outside the object's box the target is 0.
    """
    side = masks.shape[-1]
    origin, extent = gt_boxes[:, :2], (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=1e-3)
    frame = torch.cat([(boxes[:, :2] - origin) / extent, (boxes[:, 2:] - origin) / extent], dim=1) * side
    frame = frame.nan_to_num(0.0, 0.0, 0.0).clamp(-16 * side, 16 * side)  # a junk slot must not grow the grid
    index = torch.arange(len(masks), device=masks.device, dtype=frame.dtype)
    rois = torch.cat([index[:, None], frame], dim=1)
    # 4 samples a bin: a 28 x 28 target from 112 x 112; fixed, since the adaptive grid explodes on junk boxes
    crop = torchvision.ops.roi_align(masks[:, None].to(frame.dtype), rois, size, 1.0, 4, aligned=True)
    return (crop[:, 0] >= 0.5).to(frame.dtype)
