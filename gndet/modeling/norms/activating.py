"""Norms that replace ReLU as well: FRN with its threshold, and EvoNorm-S0.  `layers.py` lists them with the others.

x is (B, C, H, W), or a video's (B, C, T, H, W), which is not padded; G groups.  Statistics are taken over each picture
alone, and the padding is zero after each layer.  Activations may be negative: the zeros in the padding must not win in
a max pooling (resnet.py).
"""

import torch
from torch import Tensor, nn

from gndet.modeling.norms.valid_area import ValidArea, along, channel_means, checked, clear_padding


class FilterResponseNorm(nn.Module):
    """FRN: gamma x / sqrt(mean(x^2) + eps) + beta, over (H, W) of one sample and channel (Singh & Krishnan 2020).

    No mean is subtracted, so the zero of a ReLU would be arbitrary: the `ThresholdLinear` of ConvNorm replaces it.
    The paper's eps is 1e-6.  On maps of one cell y is only the sign of x; there the paper learns eps, which we do not.
    """

    def __init__(self, channels: int, eps: float, masked: bool) -> None:
        super().__init__()
        self.groups, self.eps, self.masked = channels, eps, masked
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Normalize x (B, C, H, W); area: of the pictures, or None.  Same shape and type; statistics in float32."""
        area = checked(area, x) if self.masked else None
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.weight.dtype)
            scale = along(self.weight, x) * (channel_means(wide.square(), area) + self.eps).rsqrt()  # (B, C, 1, 1)
            return clear_padding(torch.addcmul(along(self.bias, x), wide, scale), area).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)} channels, eps={self.eps}, masked={self.masked}"


class ThresholdLinear(nn.Module):
    """TLU: max(x, tau), with a learned tau per channel that starts at ReLU's 0 (Singh & Krishnan 2020)."""

    def __init__(self, channels: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        y = torch.maximum(x, along(self.tau, x).to(x.dtype))
        return clear_padding(y, checked(area, x)) if self.masked else y


class EvoNormS0(nn.Module):
    """EvoNorm-S0: gamma x sigmoid(v x) / sqrt(var + eps) + beta, norm and activation in one (Liu et al. 2020, table 2).

    var: GN's, over (H, W) and the C/G channels of a group, biased; v per channel, 1 at the start.
    """

    def __init__(self, channels: int, groups: int, eps: float, masked: bool) -> None:
        super().__init__()
        self.groups, self.eps, self.masked = groups, eps, masked
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Normalize and activate x (B, C, H, W); area: of the pictures, or None.  Same shape and type."""
        area = checked(area, x) if self.masked else None
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.weight.dtype)
            var = self._of_group(channel_means((wide - self._of_group(channel_means(wide, area))).square(), area))
            scale = along(self.weight, x) * (var + self.eps).rsqrt()  # (B, C, 1, 1)
            active = wide * torch.sigmoid(along(self.v, x) * wide)
            return clear_padding(torch.addcmul(along(self.bias, x), active, scale), area).to(x.dtype)

    def _of_group(self, means: Tensor) -> Tensor:
        """Replace the means (B, C, 1, 1) of channels by those of their groups."""
        grouped = means.unflatten(1, (self.groups, len(self.weight) // self.groups))  # (B, G, C/G, 1, 1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.groups} groups, {len(self.weight)} channels, eps={self.eps}, masked={self.masked}"


class Affine(nn.Module):
    """gamma x + beta: what remains of EvoNorm where no activation follows (Liu et al.'s code, `nonlinearity=False`)."""

    def __init__(self, channels: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        y = torch.addcmul(along(self.bias, x).to(x.dtype), x, along(self.weight, x).to(x.dtype))
        return clear_padding(y, checked(area, x)) if self.masked else y
