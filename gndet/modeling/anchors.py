"""Anchors of a cell, of a feature map and of a pyramid, and the integer ids that identify them.

A anchors per cell, L levels, (H, W) map."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gndet.modeling.norms.valid_area import ValidAreas
from gndet.structures import Anchors

AnchorStyle = Literal["exact", "rounded", "detectron"]


def cell_anchors(size: float, ratios: Sequence[float], stride: int, style: AnchorStyle) -> Tensor:
    """Return the anchors of the cell at the picture's top-left corner, (A, 4) float32 xyxy pixels.

    exact: of area size x size, centered on the cell's top-left corner (detectron2, mmdetection).  rounded: the same,
    with corners rounded to whole pixels (torchvision).  detectron: Detectron's generate_anchors, which rounds the sides
    of a stride x stride box, scales it, and centers it on the cell.
    """
    ratio = torch.tensor(ratios)
    if style == "detectron":
        width = (stride / ratio.sqrt()).round()
        sides = torch.stack([width, (width * ratio).round()], dim=-1) * (size / stride)  # (A, 2) width, height
        center = torch.full((1, 2), stride / 2)
    else:
        sides = torch.stack([size / ratio.sqrt(), size * ratio.sqrt()], dim=-1)
        center = torch.zeros(1, 2)
    anchors = torch.cat([center - sides / 2, center + sides / 2], dim=-1)
    return anchors.round() if style == "rounded" else anchors


def level_anchors(cell: Tensor, stride: tuple[int, int], height: int, width: int) -> Tensor:
    """Repeat the anchors of a cell (A, 4) over a map, row by row; stride (y, x) pixels.  Returns (H * W * A, 4)."""
    # whole numbers are exact in float32, and a range with a step is one launch on a GPU
    y = torch.arange(0, height * stride[0], stride[0], device=cell.device, dtype=cell.dtype)
    x = torch.arange(0, width * stride[1], stride[1], device=cell.device, dtype=cell.dtype)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4) + cell).reshape(-1, 4)


def cell_ids(level: int, height: int, width: int, num_anchors: int, device: torch.device) -> Tensor:
    """Return an id in [0, 2**31) per anchor, (N,), made of level, row, column and kind; independent of the canvas."""
    first = level << 28  # 3 bits for the level, 12 for each of row and column (maps to 4096 cells), 4 for the kind
    row = torch.arange(first, first + (height << 16), 1 << 16, device=device)[:, None, None]
    column = torch.arange(0, width << 4, 1 << 4, device=device)[:, None]
    return (row + (column + torch.arange(num_anchors, device=device))).flatten()


def pyramid_anchors(
    cells: Tensor, strides: Sequence[int], features: Sequence[Tensor], areas: ValidAreas, canvas: Sequence[int], *,
    in_padding: bool, by_canvas: bool,
) -> Anchors:  # fmt: skip
    """Return the anchors of maps L x (B, C, H, W).

    cells (L, A, 4): the anchors of each level's first cell; areas: of the pictures, by stride; canvas (height, width).
    in_padding: anchors in the padding count as inside.  by_canvas: space them by canvas side // map side, as
    torchvision does, which is not the stride if the stride does not divide the canvas.
    """
    anchors = Anchors([], [], [])
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        num_images, _, height, width = feature.shape
        area, kinds = None if in_padding else areas[stride], cells.shape[1]
        valid = feature.new_ones(num_images, height * width, dtype=torch.bool) if area is None else area.mask.flatten(1)
        steps = (canvas[0] // height, canvas[1] // width) if by_canvas else (stride, stride)
        anchors.boxes.append(level_anchors(cells[level].float(), steps, height, width))
        anchors.ids.append(cell_ids(level, height, width, kinds, feature.device))
        anchors.inside.append(valid[:, :, None].expand(*valid.shape, kinds).flatten(1))
    return anchors
