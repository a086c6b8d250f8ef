"""Anchors of a cell and of a feature map, and the integer ids that identify them.

A anchors per cell, (H, W) map."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AnchorStyle = Literal["exact", "rounded", "detectron"]


def cell_anchors(size: float, ratios: Sequence[float], stride: int, style: AnchorStyle, device: torch.device) -> Tensor:
    """Return the anchors of the cell at the picture's top-left corner, (A, 4) float32 xyxy pixels.

    exact: of area size x size, centered on the cell's top-left pixel (detectron2, mmdetection).  rounded: the same,
    with corners rounded to whole pixels (torchvision).  detectron: Detectron's generate_anchors, which rounds the sides
    of a stride x stride box, scales it, and centers it on the cell.
    """
    ratio = torch.tensor(ratios).to(device, non_blocking=True)  # without making the host wait
    if style == "detectron":
        width = (stride / ratio.sqrt()).round()
        sides = torch.stack([width, (width * ratio).round()], dim=-1) * (size / stride)  # (A, 2) width, height
        center = torch.full((1, 2), stride / 2, device=device)
    else:
        sides = torch.stack([size / ratio.sqrt(), size * ratio.sqrt()], dim=-1)
        center = torch.zeros(1, 2, device=device)
    anchors = torch.cat([center - sides / 2, center + sides / 2], dim=-1)
    return anchors.round() if style == "rounded" else anchors


def level_anchors(cell: Tensor, stride: tuple[int, int], height: int, width: int) -> Tensor:
    """Repeat the anchors of a cell (A, 4) over a map, row by row; stride (y, x) pixels.  Returns (H * W * A, 4)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=cell.device) * stride[0],
        torch.arange(width, device=cell.device) * stride[1],
        indexing="ij",
    )
    shift = torch.stack([x, y, x, y], dim=-1).to(cell.dtype).reshape(-1, 1, 4)  # (H * W, 1, 4)
    return (shift + cell).reshape(-1, 4)


def cell_ids(level: int, height: int, width: int, num_anchors: int, device: torch.device) -> Tensor:
    """Return an id in [0, 2**31) per anchor, (N,), made of level, row, column and kind; independent of the canvas."""
    row = torch.arange(height, device=device)[:, None, None]
    column = torch.arange(width, device=device)[None, :, None]
    kind = torch.arange(num_anchors, device=device)[None, None, :]
    return ((((level << 12 | row) << 12) | column) << 4 | kind).flatten()  # 3 + 12 + 12 + 4 bits: maps to 4096 cells
