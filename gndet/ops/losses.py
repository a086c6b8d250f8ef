"""Reductions that keep images apart: the divisor of an image's loss depends on that image only."""

import torch
from torch import Tensor


def sum_per_image(values: Tensor, mask: Tensor) -> Tensor:
    """Sum values (B, R) where mask (B, R); what is not masked may be NaN.  Returns (B,)."""
    return torch.where(mask, values, 0.0).sum(dim=1)


def mean_per_image(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, R) where mask (B, R); 0 for an image whose mask is empty.  Returns (B,)."""
    return sum_per_image(values, mask) / mask.sum(dim=1).clamp(min=1)


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Smooth L1 (Girshick 2015, eq. 3) with its transition at beta; beta 0 is L1.  Same shape."""
    size = difference.abs()
    return size if beta == 0 else torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)
