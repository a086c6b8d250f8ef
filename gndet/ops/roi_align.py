"""RoIAlign over a feature pyramid. B images, R regions an image, C channels, L levels."""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor


def pyramid_level(boxes: Tensor, num_levels: int) -> Tensor:
    """The level each box is pooled from (Lin et al. 2017, eq. 1: k0 = 4 at 224 px; level 0 is P2).

    boxes (..., 4).  Returns (...) int64 in [0, num_levels).
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    side = (size[..., 0] * size[..., 1]).sqrt()
    return (2 + torch.log2(side / 224 + 1e-8)).floor().clamp(0, num_levels - 1).long()


def extend_edges(feature: Tensor, sizes: Tensor) -> Tensor:
    """Repeat the last valid row and column once into the padding.

    RoIAlign interpolates up to half a cell beyond the picture; alone on its canvas it repeats the edge there, so it
    must find the same beside a larger picture.  feature (B, C, H, W); sizes (B, 2) valid height, width in cells.
    """
    row = torch.arange(feature.shape[2], device=feature.device)[None, None, :, None]
    column = torch.arange(feature.shape[3], device=feature.device)[None, None, None, :]
    height, width = sizes[:, 0, None, None, None], sizes[:, 1, None, None, None]
    feature = torch.where(row == height, feature.roll(1, dims=2), feature)
    return torch.where(column == width, feature.roll(1, dims=3), feature)


def roi_align_pyramid(
    features: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor, size: int, sampling_ratio: int
) -> Tensor:
    """Pool each region from its pyramid level (RoIAlign of He et al. 2017, half-pixel aligned as detectron2's).

    features L x (B, C, H/s, W/s); boxes (R, 4) xyxy canvas pixels; image (R,) int64 in [0, B); size side of the output
    in bins.  Returns (R, C, size, size).  NaN boxes count as empty.
    """
    boxes = boxes.nan_to_num(0.0, 0.0, 0.0)  # torchvision's CPU kernel crashes on NaN
    level = pyramid_level(boxes, len(features))
    exact = torch.promote_types(features[0].dtype, torch.float32)  # in bf16 a coordinate of 1000 px is off by 2 px
    rois = torch.cat([image[:, None], boxes], dim=1).to(exact)  # (R, 5)

    def pool(feature: Tensor, stride: int, rois: Tensor) -> Tensor:
        pooled = torchvision.ops.roi_align(feature.to(exact), rois, size, 1.0 / stride, sampling_ratio, aligned=True)
        return pooled.to(feature.dtype)

    levels = list(enumerate(zip(features, strides, strict=True)))
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():  # here work counts, not launches
        rows = [(level == i).nonzero()[:, 0] for i, _ in levels]
        parts = [pool(feature, stride, rois[rows[i]]) for i, (feature, stride) in levels]
        return torch.cat(parts)[torch.cat(rows).argsort()]
    pooled = torch.zeros((), dtype=features[0].dtype, device=boxes.device)
    for i, (feature, stride) in levels:  # a region of another level is an empty box here, and adds nothing
        here = (level == i)[:, None]
        part = pool(feature, stride, torch.where(here, rois, 0.0))
        pooled = pooled + torch.where(here[:, :, None, None], part, 0.0)
    return pooled
