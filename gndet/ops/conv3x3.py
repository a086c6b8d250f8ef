"""Convolutions, and which way to compute one is the fastest: torch's own, Winograd's, or one matrix product.

Only 3x3 convolutions in float32 on a CPU have a choice.  Winograd's way (winograd.py) saves multiplications on large
maps.  A CPU that multiplies 32 numbers per cycle does not gain from it: there, a training step of R50-FPN takes 0.85 of
the time without it (480 x 640, one thread, Intel Xeon with AMX, torch 2.14).  On small maps with many channels nearly
all of the time goes into the weight, which torch copies into a layout of its own in each pass.  The product of the
map's patches with the weight as it lies in memory copies nothing.
Maps are (n, C, H, W), channels last in memory.  Letters: n samples, C input and K output channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gndet.ops.winograd import (
    TILE,
    backward_weight,
    convolve,
    transform_weight,
    weight_from_transformed,
    weight_gradient,
)

_aten = torch.ops.aten
MIN_CHANNELS = 64  # with fewer, transforming the tiles costs more than Winograd's way saves
MIN_TILES = 64  # with fewer per map, transforming the weight does
MIN_WEIGHT = 12  # numbers of the weight per number of the maps, from which on the product is faster
MIN_SIZE = 1 << 18  # numbers of a weight; copying a smaller one, which stays in the cache, costs little
# AMX came to CPUs that have two units of 512 bits; not all with AVX-512 have two, and torch does not tell
MULTIPLIES_FAST = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


class Convolution:
    """A convolution of maps (n, C, H, W), computed by torch, that sums the gradients of all calls."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int = 1) -> None:
        self.weight, self.bias = weight, bias
        self._sides = (stride, stride), (padding, padding), (dilation, dilation)
        self._grad_weight: Tensor | None = None
        self._grad_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (n, C, H, W)."""
        return _aten.convolution(x, self.weight, self.bias, *self._sides, False, (0, 0), 1)

    def backward(self, grad: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        """Add to the gradients of weight and bias.  Returns the gradient of x if wanted, else None."""
        bias = None if self.bias is None else self.bias.shape
        mask = [wanted, self.weight.requires_grad, self.bias is not None and self.bias.requires_grad]
        grad_x, grad_weight, grad_bias = _aten.convolution_backward(
            grad, x, self.weight, bias, *self._sides, False, (0, 0), 1, mask
        )
        self._add(grad_weight, grad_bias)
        return grad_x

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the summed gradients of weight and bias; None for one that is not trained."""
        return self._grad_weight, self._grad_bias

    def _add(self, grad_weight: Tensor | None, grad_bias: Tensor | None) -> None:
        if grad_weight is not None:
            self._grad_weight = grad_weight if self._grad_weight is None else self._grad_weight + grad_weight
        if grad_bias is not None:
            self._grad_bias = grad_bias if self._grad_bias is None else self._grad_bias + grad_bias


class Winograd(Convolution):
    """A 3x3 convolution with stride 1, padding 1, dilation 1 by minimal filtering; it transforms its weight once."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(weight, bias, stride, padding, dilation)
        self._transformed = transform_weight(weight)
        self._backward_weight: Tensor | None = None  # the transformed weight that takes gradients back

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (n, C, H, W)."""
        y = convolve(_channels_last(x), self._transformed).permute(0, 3, 1, 2)
        return y if self.bias is None else y.add_(self.bias[:, None, None])

    def backward(self, grad: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        """Do what `Convolution.backward` does; sums the gradient of the transformed weight."""
        if self.weight.requires_grad:
            if self._grad_weight is None:
                self._grad_weight = torch.zeros_like(self._transformed)
            weight_gradient(_channels_last(x), _channels_last(grad), self._grad_weight)
        if self.bias is not None and self.bias.requires_grad:
            self._add(None, grad.sum((0, 2, 3)))
        if not wanted:
            return None
        if self._backward_weight is None:
            self._backward_weight = transform_weight(backward_weight(self.weight))
        return convolve(_channels_last(grad), self._backward_weight).permute(0, 3, 1, 2)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the summed gradients of weight and bias; None for one that is not trained."""
        weight = None if self._grad_weight is None else weight_from_transformed(self._grad_weight)
        return weight, self._grad_bias


class Product(Convolution):
    """A 3x3 convolution with padding 1 as a product of patches and weight: rows of a result depend on no other row."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (n, C, H, W)."""
        patches = self._patches(x)
        y = patches.flatten(3).flatten(0, 2) @ self.weight.flatten(1).t()
        y = y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)
        return y if self.bias is None else y.add_(self.bias[:, None, None])

    def backward(self, grad: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        """Do what `Convolution.backward` does."""
        rows = _channels_last(grad).flatten(0, 2)  # (n * H' * W', K)
        if self.weight.requires_grad:
            patches = self._patches(x).flatten(3).flatten(0, 2)
            self._add((rows.t() @ patches).view_as(self.weight), None)
        if self.bias is not None and self.bias.requires_grad:
            self._add(None, rows.sum(0))
        if not wanted:
            return None
        return self._sum(rows @ self.weight.flatten(1), grad.shape, x.shape)

    def _patches(self, x: Tensor) -> Tensor:
        """Return the patches of zero-padded x (n, C, H, W) as a view (n, H', W', C, 3, 3), in the weight's order."""
        (stride, _), *_ = self._sides
        num, channels, height, width = x.shape
        padded = F.pad(_channels_last(x), (0, 0, 1, 1, 1, 1))
        sample, row, column, _ = padded.stride()
        shape = (num, (height - 1) // stride + 1, (width - 1) // stride + 1, channels, 3, 3)
        return padded.as_strided(shape, (sample, stride * row, stride * column, 1, row, column))

    def _sum(self, patches: Tensor, shape: torch.Size, shape_x: torch.Size) -> Tensor:
        """Add up patches (n * H' * W', 9 * C) where `_patches` takes them from.  Returns (n, C, H, W) of shape_x."""
        (stride, _), *_ = self._sides
        num, channels, height, width = shape_x
        patches = patches.view(num, *shape[2:], channels, 3, 3)
        total = patches.new_zeros(num, height + 2, width + 2, channels)
        bottom, right = (stride * (side - 1) + 1 for side in shape[2:])
        for i in range(3):
            for j in range(3):
                total[:, i : i + bottom : stride, j : j + right : stride] += patches[..., i, j]
        return total[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


def fastest(weight: Tensor, stride: int, side: float) -> type[Convolution]:
    """Return the fastest way for a convolution with weight (K, C, kh, kw) whose results are about side x side."""
    if weight.shape[2:] != (3, 3):
        return Convolution
    out_channels, in_channels = weight.shape[:2]
    if weight.numel() >= max(MIN_WEIGHT * side**2 * (in_channels + out_channels), MIN_SIZE):
        return Product
    large = min(in_channels, out_channels) >= MIN_CHANNELS and (side / TILE) ** 2 >= MIN_TILES
    return Winograd if large and stride == 1 and not MULTIPLIES_FAST else Convolution


class Convolved(torch.autograd.Function):
    """The convolution of x (n, C, H, W) with weight (K, C, 3, 3), padding 1, in a given way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, way: type[Convolution]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.way = stride, way
        return way(weight, None, stride, 1).forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        convolution = ctx.way(weight, None, ctx.stride, 1)
        grad_x = convolution.backward(grad, x, ctx.needs_input_grad[0])
        return grad_x, convolution.gradients()[0], None, None


def _channels_last(x: Tensor) -> Tensor:
    """View maps (n, C, H, W) as (n, H, W, C)."""
    return x.permute(0, 2, 3, 1)
