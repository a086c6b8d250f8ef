"""The area of each picture on padded feature maps. B images, C channels, (H, W) maps.

The images of a batch share a canvas. `area=None` means that nothing is padded.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ValidArea(NamedTuple):
    """Where the pictures lie on feature maps of one stride."""

    sizes: Tensor  # (B, 2) int64 valid height, width in cells
    mask: Tensor  # (B, 1, H, W) bool
    count: Tensor  # type: ignore[assignment]  # hides tuple.count; (B, 1) float32 number of valid cells

    @staticmethod
    def of(sizes: Tensor, height: int, width: int) -> "ValidArea":
        """Return the area of pictures of sizes (B, 2), in cells, on (height, width) maps."""
        row = torch.arange(height, device=sizes.device)[None, None, :, None]
        column = torch.arange(width, device=sizes.device)[None, None, None, :]
        mask = (row < sizes[:, 0, None, None, None]) & (column < sizes[:, 1, None, None, None])
        return ValidArea(sizes, mask, (sizes[:, :1] * sizes[:, 1:]).float())


ValidAreas = dict[int, ValidArea | None]  # by stride; None if nothing is padded


def picture_areas(sizes: Tensor, height: int, width: int, padded: bool) -> ValidAreas:
    """Return the areas of pictures of sizes (B, 2) on a (height, width) canvas, at strides 2 to 64.

    Every layer that halves a map rounds up, so a picture has ceil(size / stride) cells.
    """
    if not padded:
        return dict.fromkeys((2, 4, 8, 16, 32, 64))
    return {s: ValidArea.of((sizes + s - 1) // s, -(-height // s), -(-width // s)) for s in (2, 4, 8, 16, 32, 64)}


def clear_padding(x: Tensor, area: ValidArea | None) -> Tensor:
    """Set the padding of x (B, C, H, W) to zero; area None means that nothing is padded."""
    return x if area is None else torch.where(area.mask, x, 0.0)
