"""RoIAlign over a feature pyramid. B images, R regions per image, C channels, L levels."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.ops import roi_align_kernels, torchvision_ops

Alignment = Literal["aligned", "unaligned", "detectron"]
OUTSIDE = -1e5  # pixels: left of and above every picture


class Pyramid(NamedTuple):
    """The levels of a feature pyramid that regions are pooled from."""

    maps: Sequence[Tensor]  # L x (B, C, H/s, W/s)
    strides: Sequence[int]
    sizes: Sequence[Tensor] | None = None  # L x (B, 2) height, width in cells: pictures whose edges are to be repeated
    # runs on what RoIAlign returns, (R, C, P, P), before the heads do: the last stage of the backbone in a C4 model
    last_stage: Callable[[Callable[[], Tensor]], Tensor] | None = None


def pyramid_level(boxes: Tensor, num_levels: int) -> Tensor:
    """Return the level that each box is pooled from (Lin et al. 2017, eq. 1: k0 = 4 at 224 px; level 0 is P2).

    boxes (..., 4).  Returns (...) int64 in [0, num_levels).
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    side = (size[..., 0] * size[..., 1]).sqrt()
    return (2 + torch.log2(side / 224 + 1e-8)).floor().clamp(0, num_levels - 1).long()


def extend_edges(feature: Tensor, sizes: Tensor) -> Tensor:
    """Repeat the last valid row and column once into the padding.

    RoIAlign reads up to half a cell beyond the picture.  For a picture alone on its canvas it repeats the edge there,
    so it must find the same on a larger canvas.  feature (B, C, H, W); sizes (B, 2) valid height, width in cells.
    """
    row = torch.arange(feature.shape[2], device=feature.device)[None, None, :, None]
    column = torch.arange(feature.shape[3], device=feature.device)[None, None, None, :]
    height, width = sizes[:, 0, None, None, None], sizes[:, 1, None, None, None]
    # the first of two layouts is kept, and `roll` does not keep channels last
    feature = torch.where(row != height, feature, feature.roll(1, dims=2))
    return torch.where(column != width, feature, feature.roll(1, dims=3))


def extended(pyramid: Pyramid) -> Pyramid:
    """Repeat the edges of the pictures in the maps, unless the kernels do it while they pool."""
    sizes = pyramid.sizes
    if sizes is None or roi_align_kernels.usable(pyramid.maps):
        return pyramid
    maps = [extend_edges(x, size) for x, size in zip(pyramid.maps, sizes, strict=True)]
    return pyramid._replace(maps=maps, sizes=None)


def roi_align_pyramid(
    pyramid: Pyramid,
    boxes: Tensor,
    image: Tensor,
    size: int,
    sampling_ratio: int,
    alignment: Alignment = "aligned",
) -> Tensor:
    """Pool each region from its pyramid level (RoIAlign of He et al. 2017).

    boxes (R, 4) xyxy canvas pixels; image (R,) int64 in [0, B); size P, the side of the output in bins;
    sampling_ratio: samples along a bin's side, 0 for as many as it has cells.
    alignment: "aligned" to half pixels, as in detectron2; "unaligned", as in torchvision, where a region has at least
    one cell; "detectron": unaligned, and a region ends at the first edge of its last pixel.
    Returns (R, C, P, P).  NaN boxes count as empty.

    On a GPU one kernel pools from all levels; `roi_align_kernels.usable` tells what happens where it cannot.
    """
    features, strides, sizes, _ = extended(pyramid)
    boxes = boxes.nan_to_num(0.0, 0.0, 0.0)  # torchvision's CPU kernel crashes on NaN
    level = pyramid_level(boxes, len(features))  # (R,)
    if alignment == "detectron":
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - 1], dim=1)
    aligned = alignment == "aligned"
    if roi_align_kernels.usable(features):
        limits = None if sizes is None else torch.stack(list(sizes), 1)  # (B, L, 2)
        return roi_align_kernels.roi_align(
            features, boxes, level, image, limits, strides, size, sampling_ratio, aligned
        )
    dtype = features[0].dtype
    exact = torch.promote_types(dtype, torch.float32)  # in bf16 a coordinate of 1000 px is off by 2 px
    features, boxes = [feature.to(exact) for feature in features], boxes.to(exact)
    if sampling_ratio and boxes.device.type == "cpu" and not torch.onnx.is_in_onnx_export():
        return _pool_bags(features, strides, boxes, image, level, size, sampling_ratio, aligned).to(dtype)
    rois = torch.cat([image[:, None].to(exact), boxes], dim=1)  # (R, 5)
    elsewhere = torch.cat([rois[:, :1], torch.full_like(boxes, OUTSIDE)], dim=1)
    pooled = torch.zeros((), dtype=exact, device=boxes.device)
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        on_level = (level == i)[:, None]  # regions of other levels lie outside, where nothing is sampled or added
        part = torchvision_ops.roi_align(
            feature, torch.where(on_level, rois, elsewhere), size, 1.0 / stride, sampling_ratio, aligned=aligned
        )
        pooled = pooled + torch.where(on_level[:, :, None, None], part, 0.0)
    return pooled.to(dtype)


def _pool_bags(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    size: int,
    ratio: int,
    aligned: bool,
) -> Tensor:
    """Compute RoIAlign of all levels as one weighted sum of rows: a bin is a bag of 4 * ratio^2 cells.

    torch's embedding_bag works along the channels, forward and backward; torchvision's CPU kernel goes cell by cell
    (1,024 regions of 256 channels, forward and backward: 0.17 s against 1.43 s on one core).  R regions, P bins a side.
    """
    channels = features[0].shape[1]
    cells = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features])  # (L * B * H * W, C)
    height, width = boxes.new_tensor([f.shape[2:] for f in features]).long()[level].unbind(1)  # (R,) each
    counts = boxes.new_tensor([f.shape[0] * f.shape[2] * f.shape[3] for f in features]).long()
    first = (counts.cumsum(0) - counts)[level] + image * height * width  # (R,) row of the picture's first cell
    scaled = boxes / boxes.new_tensor(strides)[level, None]  # (R, 4) in cells
    if aligned:
        scaled = scaled - 0.5
    else:
        scaled = torch.cat([scaled[:, :2], torch.maximum(scaled[:, 2:], scaled[:, :2] + 1)], dim=1)
    column, weight_x = _samples(scaled[:, 0], scaled[:, 2], width, size * ratio)  # (R, P * ratio, 2)
    row, weight_y = _samples(scaled[:, 1], scaled[:, 3], height, size * ratio)
    shape_x, shape_y = (-1, 1, size, 1, ratio * 2), (-1, size, 1, ratio * 2, 1)  # (R, P, P, samples y, samples x)
    index = first[:, None, None, None, None] + column.view(shape_x)
    index = index + row.view(shape_y) * width[:, None, None, None, None]
    weight = weight_x.view(shape_x) * weight_y.view(shape_y) / ratio**2
    bags = (len(boxes) * size * size, 4 * ratio * ratio)
    pooled = F.embedding_bag(index.reshape(bags), cells, per_sample_weights=weight.reshape(bags), mode="sum")
    return pooled.view(len(boxes), size, size, channels).permute(0, 3, 1, 2)


def _samples(low: Tensor, high: Tensor, limit: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the two cells on either side of each of num samples from low to high, and their bilinear weights.

    low, high (R,) in cells; limit (R,) number of cells.  Returns (R, num, 2) int64 in [0, limit) and the weights,
    which are 0 for a sample more than one cell outside, as in torchvision.
    """
    step = (torch.arange(num, device=low.device, dtype=low.dtype) + 0.5) / num
    position = low[:, None] + (high - low)[:, None] * step  # (R, num)
    last = limit[:, None] - 1
    inside = (position >= -1) & (position <= limit[:, None])
    position = position.clamp(min=0)
    floor = torch.minimum(position.floor().long(), last)
    fraction = torch.where(floor == last, 0.0, position - floor)
    cells = torch.stack([floor, torch.minimum(floor + 1, last)], dim=-1)
    return cells, torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
