"""Convolutions and pooling over padded maps whose pictures may have odd sides. B images, C channels, (H, W) maps.

Batch independence: each window sees the cells of its picture alone, and a map has ceil(side / stride) cells whether its
canvas ends with the picture or not.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.modeling.norms.valid_area import ValidArea, below_all, channel_means, clear_padding


class Window(NamedTuple):
    """The window of a convolution or pooling, (along the height, along the width) [cells]."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def missing(self, size: int, axis: int) -> int:
        """Return how many cells a side of that size lacks at its end for ceil(size / stride) windows."""
        kernel, stride, padding = self.kernel[axis], self.stride[axis], self.padding[axis]
        return max((-(-size // stride) - 1) * stride + kernel - 2 * padding - size, 0)

    def extend(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Append the missing cells to maps x (B, C, H, W)."""
        below, right = self.missing(x.shape[2], 0), self.missing(x.shape[3], 1)
        return F.pad(x, (0, right, 0, below), value=value) if below or right else x


def max_pool(x: Tensor, window: Window, area: ValidArea | None, result: ValidArea | None) -> Tensor:
    """Return the maxima over windows of x (B, C, H, W); area, result: of the pictures on x and on the result."""
    x = window.extend(below_all(x, area), -torch.inf)
    return clear_padding(F.max_pool2d(x, window.kernel, window.stride, window.padding), result)


def average_pool(
    x: Tensor, window: Window, area: ValidArea | None, result: ValidArea | None, *, counts_border: bool = False
) -> Tensor:
    """Return the means over windows of x (B, C, H, W); area, result: of the pictures on x and on the result.

    A mean is over the cells of the picture alone; counts_border: also over those of window.padding, as zeros.
    """
    means = F.avg_pool2d(window.extend(clear_padding(x, area)), window.kernel, window.stride, window.padding)
    if not counts_border:
        inside = x.new_ones(1, 1, *x.shape[2:]) if area is None else area.mask.to(x.dtype)
        share = F.avg_pool2d(window.extend(inside), window.kernel, window.stride, window.padding)  # (B or 1, 1, h, w)
        means = means / torch.where(share > 0, share, 1.0)
    return clear_padding(means, result)


def global_mean(x: Tensor, area: ValidArea | None, *, keepdim: bool) -> Tensor:
    """Return the mean of each channel of x (B, C, H, W) over its picture: (B, C, 1, 1), or (B, C) without keepdim."""
    means = channel_means(x, area)
    return means if keepdim else means.flatten(1)
