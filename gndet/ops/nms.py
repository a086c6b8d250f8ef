"""Non-maximum suppression as a mask: one operator, so that a compiled graph holds it. B images, N boxes."""

import torch
import torchvision
from torch import Tensor

from gndet.ops.boxes import pairwise_iou

# On a GPU the fixed point below needs as many rounds as the longest chain of boxes that suppress each other in turn;
# 7 were the most in 8 sets of 2,000 boxes. A fixed number keeps the host from waiting.
GPU_ROUNDS = 32


@torch.library.custom_op("gndet::nms_keep", mutates_args=(), device_types="cpu")
def nms_keep(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Keep the boxes that no better one of their group overlaps by more than threshold.

    boxes (B, N, 4) xyxy pixels, by falling score; scores (B, N); groups (B, N) int64, class or level; valid (B, N).
    Returns keep (B, N) bool.  An image's result does not depend on the other images.
    """
    keep = torch.zeros_like(valid)
    for image in range(boxes.shape[0]):
        for group in groups[image][valid[image]].unique():
            rows = ((groups[image] == group) & valid[image]).nonzero()[:, 0]
            kept = torchvision.ops.nms(boxes[image, rows], scores[image, rows], threshold)
            keep[image, rows[kept]] = True
    return keep


@nms_keep.register_kernel("cuda")
def _(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return fixed_point(boxes, groups, valid, threshold)


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(valid)


def fixed_point(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """NMS as the fixed point of keep = valid & ~(suppressed by a kept one); arguments as nms_keep's."""
    same = groups[:, :, None] == groups[:, None, :]
    suppresses = ((pairwise_iou(boxes, boxes) > threshold) & same).triu(diagonal=1)  # (B, N, N)
    keep = valid
    for _ in range(GPU_ROUNDS):
        keep = valid & ~(suppresses & keep[:, :, None]).any(dim=1)
    return keep
