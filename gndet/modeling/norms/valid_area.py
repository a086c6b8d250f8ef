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

    @property
    def num_cells(self) -> Tensor:
        """Return the number of valid cells, (B, 1) float32."""
        return self.sizes.prod(1, keepdim=True).float()

    @staticmethod
    def of(sizes: Tensor, height: int, width: int) -> "ValidArea":
        """Return the area of pictures of sizes (B, 2), in cells, on (height, width) maps."""
        cell = torch.arange(max(height, width), device=sizes.device)
        row, column = cell[:height, None], cell[:width]
        inside = (row < sizes[:, 0, None, None, None]) & (column < sizes[:, 1, None, None, None])
        return ValidArea(sizes, inside)


ValidAreas = dict[int, ValidArea | None]  # by stride; None if nothing is padded


def picture_areas(sizes: Tensor, height: int, width: int, padded: bool, coarsest: int = 64) -> ValidAreas:
    """Return the areas of pictures of sizes (B, 2) on a (height, width) canvas, at strides 1, 2, 4 to coarsest.

    Every layer that halves a map rounds up, so a picture has ceil(size / stride) cells.
    """
    areas: ValidAreas = dict.fromkeys(2**level for level in range(coarsest.bit_length()))
    for stride in areas if padded else ():
        if stride > 1:
            sizes, height, width = (sizes + 1) // 2, -(-height // 2), -(-width // 2)
        areas[stride] = ValidArea.of(sizes, height, width)
    return areas


def clear_padding(x: Tensor, area: ValidArea | None) -> Tensor:
    """Set the padding of x (B, C, H, W) to zero; area None means that nothing is padded."""
    return x if area is None else torch.where(area.mask, x, 0.0)


def below_all(x: Tensor, area: ValidArea | None) -> Tensor:
    """Set the padding of x (B, C, H, W) to minus infinity, so that it never is a maximum."""
    return x if area is None else torch.where(area.mask, x, -torch.inf)


def channel_means(x: Tensor, area: ValidArea | None) -> Tensor:
    """Return the mean of each channel of x (B, C, H, W) over its map, or only over `area`, as (B, C, 1, 1)."""
    if area is None:
        return x.mean(tuple(range(2, x.dim())), keepdim=True)
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision counts cells in steps, from 257 on
    total = torch.where(area.mask, x, 0.0).sum((2, 3), keepdim=True, dtype=wide)
    return (total / area.num_cells.to(wide)[:, :, None, None]).to(x.dtype)


def along(values: Tensor, x: Tensor) -> Tensor:
    """View values (C,) so that they broadcast over the maps x (B, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def checked(area: ValidArea | None, x: Tensor) -> ValidArea | None:
    """Return the area.  Raises ValueError if there is one for videos (B, C, T, H, W): it would mask something else."""
    if area is not None and x.dim() != 4:
        raise ValueError(f"maps with {x.dim()} dimensions cannot be padded: expected area=None")
    return area
