"""3x3 convolutions on a CPU by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, sections 4.1 and 4.3).

A tile of 4 x 4 outputs takes 36 multiplications per pair of input and output channel instead of 144; the transforms
cost little in comparison.  In float32 the error is 5e-6 of the largest value; that of a direct convolution is 2e-6.
Maps are (n, H, W, C) here, channels last.  Letters: n samples, t tiles, C input and K output channels.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, PATCH = 4, 6  # outputs along a side of a tile, and the inputs that they depend on
TILES = 256  # transformed at once, so that they and their 36 products stay in the cache

# Lavin & Gray 2016, equation 4.3 ff: Y = A^T [ (G g G^T) * (B^T d B) ] A
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # B^T
_WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)  # G
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))  # A^T


def samples_at_once(height: int, width: int) -> int:
    """Return how many maps of that size make up TILES tiles, at least one."""
    return max(TILES // (-(-height // TILE) * -(-width // TILE)), 1)


def transform_weight(weight: Tensor) -> Tensor:
    """Return G g G^T of a weight (K, C, 3, 3), in the form that `convolve` takes, (36, C, K)."""
    out_channels, in_channels = weight.shape[:2]
    taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (_kron(_WEIGHT) @ taps).view(PATCH * PATCH, in_channels, out_channels)


def backward_weight(weight: Tensor) -> Tensor:
    """Return the weight that maps a gradient from output to input: channels swapped, turned by 180 degrees."""
    return weight.transpose(0, 1).flip(2, 3)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve zero-padded x (n, H, W, C) with a transformed weight (36, C, K).  Returns (n, H, W, K)."""
    num, height, width, _ = x.shape
    y = x.new_empty(num, height, width, weight.shape[2])
    for samples, rows, patches in _patches(x):
        products = torch.bmm(_transformed(_INPUT, patches), weight)  # (36, t, K)
        tiles = _apply(_OUTPUT, products.view(PATCH, PATCH, -1))  # (4, 4, t * K)
        tiles = tiles.view(TILE, TILE, len(samples), len(rows), -(-width // TILE), -1).permute(2, 3, 0, 4, 1, 5)
        tiles = tiles.reshape(len(samples), TILE * len(rows), -1, weight.shape[2])
        top = TILE * rows.start
        bottom = min(TILE * rows.stop, height)
        y[samples.start : samples.stop, top:bottom] = tiles[:, : bottom - top, :width]
    return y


def weight_gradient(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """Add the gradient of the transformed weight to total (36, C, K).

    x (n, H, W, C) is the input, grad (n, H, W, K) the gradient of the output.
    """
    height, width, channels = grad.shape[1:]
    across = -(-width // TILE)
    for samples, rows, patches in _patches(x):
        top, bottom = TILE * rows.start, min(TILE * rows.stop, height)
        part = grad[samples.start : samples.stop, top:bottom]
        part = F.pad(part, (0, 0, 0, TILE * across - width, 0, TILE * len(rows) - (bottom - top)))
        tiles = part.view(len(samples), len(rows), TILE, across, TILE, channels).permute(2, 4, 0, 1, 3, 5)
        products = _transformed(tuple(zip(*_OUTPUT, strict=True)), tiles)  # (36, t, K)
        total.baddbmm_(_transformed(_INPUT, patches).transpose(1, 2), products)


def weight_from_transformed(gradient: Tensor) -> Tensor:
    """Return the gradient (K, C, 3, 3) of a weight from the gradient (36, C, K) of its transform."""
    in_channels, out_channels = gradient.shape[1:]
    taps = _kron(_WEIGHT).t() @ gradient.reshape(PATCH * PATCH, -1)
    return taps.view(3, 3, in_channels, out_channels).permute(3, 2, 0, 1)


def _patches(x: Tensor) -> Iterator[tuple[range, range, Tensor]]:
    """Cut x (n, H, W, C) into overlapping patches, about TILES at a time.

    Yields the ranges of samples and of rows of tiles, and the patches as a view (6, 6, samples, rows, tiles across, C).
    """
    num, height, width, channels = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    count, rows_at_once = samples_at_once(height, width), min(max(TILES // across, 1), down)
    for first in range(0, num, count):
        samples = range(first, min(first + count, num))
        for row in range(0, down, rows_at_once):
            rows = range(row, min(row + rows_at_once, down))
            top, bottom = TILE * rows.start - 1, TILE * rows.stop + 1  # of the padded input
            part = x[samples.start : samples.stop, max(top, 0) : min(bottom, height)]
            edges = (0, 0, 1, TILE * across + 1 - width, max(-top, 0), max(bottom - height, 0))
            part = F.pad(part, edges)
            sample, line, column, _ = part.stride()
            shape = (PATCH, PATCH, len(samples), len(rows), across, channels)
            yield samples, rows, part.as_strided(shape, (line, column, sample, TILE * line, TILE * column, 1))


def _transformed(matrix: tuple[tuple[float, ...], ...], tiles: Tensor) -> Tensor:
    """Transform tiles (side, side, ..., C) along both sides.  Returns (36, t, C)."""
    return _apply(matrix, tiles.reshape(*tiles.shape[:2], -1)).view(PATCH * PATCH, -1, tiles.shape[-1])


def _apply(matrix: tuple[tuple[float, ...], ...], tiles: Tensor) -> Tensor:
    """Multiply tiles (m, m, N) along both sides by a matrix (k, m).  Returns (k, k, N)."""
    factor, side = _tensor(matrix), tiles.shape[0]
    across = factor @ tiles.reshape(side, -1)  # (k, m * N)
    return torch.matmul(factor, across.view(len(matrix), side, -1))


@cache
@torch.inference_mode(False)  # a later backward pass uses them, too
def _tensor(matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.tensor(matrix, dtype=torch.float32)


@cache
@torch.inference_mode(False)
def _kron(matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return the transform along both sides of a flattened tile, computed in float64."""
    factor = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(factor, factor).float()
