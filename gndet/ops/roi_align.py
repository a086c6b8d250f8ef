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
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)  # (R, 5)
    pool = torchvision.ops.roi_align
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():  # here work counts, not launches
        rows = [(level == i).nonzero()[:, 0] for i in range(len(features))]
        parts = [
            pool(f, rois[r].to(f.dtype), size, 1.0 / s, sampling_ratio, aligned=True)
            for f, s, r in zip(features, strides, rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]
    empty = torch.zeros_like(rois)
    parts = [
        pool(
            f, torch.where((level == i)[:, None], rois, empty).to(f.dtype), size, 1.0 / s, sampling_ratio, aligned=True
        )
        for i, (f, s) in enumerate(zip(features, strides, strict=True))
    ]
    here = [(level == i)[:, None, None, None] for i in range(len(features))]
    return sum((torch.where(h, p, 0.0) for h, p in zip(here, parts, strict=True)), torch.zeros_like(parts[0]))
