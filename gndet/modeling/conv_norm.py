"""Convolution, norm and ReLU: the building block of the whole network. B images or regions, C channels, (H, W) maps."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.schema import NormConfig
from gndet.modeling.norms.layers import make_norm
from gndet.modeling.norms.valid_area import ValidArea
from gndet.ops.conv3x3 import MinimalConvolution, winograd_supports


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights are standardized per output channel over (in, kh, kw) (Qiao et al. 2019, eq. 5-7)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardize(self.weight), self.bias)

    @staticmethod
    def standardize(weight: Tensor) -> Tensor:
        """Return the weights with which a plain convolution computes the same; (out, in, kh, kw) like weight."""
        var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        return (weight - mean) * (var + 1e-10).rsqrt()


class ConvNorm(nn.Module):
    """Convolution, norm and, by default, ReLU.

    The convolution has a bias only if no norm follows.
    regions: the layer will see many small maps, one per region.
    cheap: in a tower, recompute its result instead of keeping it; by default True for 1x1 convolutions.
    `winograd`: run a 3x3 convolution by minimal filtering on a CPU (set by DetectionModel.choose_convolutions).
    `memory`: what `tower` keeps for the backward pass (train.memory); outside a tower everything is kept ("fast").
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, norm: NormConfig, *, stride: int = 1, relu: bool = True,
        regions: bool = False, cheap: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        layer = StandardizedConv2d if norm.weight_standardization else nn.Conv2d
        self.conv = layer(in_channels, out_channels, kernel, stride, kernel // 2, bias=norm.kind == "none")
        self.norm = make_norm(norm, out_channels)
        self.relu, self.regions, self.memory, self.winograd = relu, regions, "fast", False
        self.cheap = kernel == 1 if cheap is None else cheap

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Map x (B, C, H, W) to (B, out_channels, H/stride, W/stride); area: of the result, or None."""
        x = self.norm(self.convolve(x), area)
        return F.relu(x, inplace=True) if self.relu else x

    def convolve(self, x: Tensor) -> Tensor:
        """Run the convolution alone, by minimal filtering if that is faster."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type) or not self.by_winograd():
            return self.conv(x)
        y = MinimalConvolution.apply(x, self.weight())
        return y if self.conv.bias is None else y + self.conv.bias[:, None, None]

    def by_winograd(self) -> bool:
        """Return whether float32 maps are convolved by minimal filtering."""
        supported = winograd_supports(self.conv.weight, self.conv.stride)
        return self.winograd and supported and not torch.compiler.is_compiling()

    def weight(self) -> Tensor:
        """Return the weight (out, in, kh, kw) that the convolution applies: standardized, if the config says so."""
        conv = self.conv
        return conv.standardize(conv.weight) if isinstance(conv, StandardizedConv2d) else conv.weight


ConvFactory = Callable[..., ConvNorm]  # (in_channels, out_channels, kernel, stride=1, relu=True)


def conv_factory(norm: NormConfig, *, regions: bool = False) -> ConvFactory:
    """Return ConvNorm with the norm filled in, so that a module can build layers without knowing the norm."""
    return partial(ConvNorm, norm=norm, regions=regions)
