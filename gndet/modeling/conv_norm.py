"""Convolution, norm and ReLU: the building block of the whole network. B images or regions, C channels, (H, W) maps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.modeling.norms.activating import Affine, ThresholdLinear
from gndet.modeling.norms.layers import FrozenBatchNorm, NoNorm, make_norm, stored_map
from gndet.modeling.norms.valid_area import ValidArea, clear_padding
from gndet.ops import fused_conv
from gndet.ops.conv3x3 import Convolution, Convolved, fastest


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights are standardized per output channel over (in, kh, kw) (Qiao et al. 2019, eq. 5-7).

    Variants (NormConfig.standardization) without a gain, because the norm's gamma scales the result:
        bit   w_hat = (w - mean) / sqrt(var + 1e-10), with the biased variance: BiT (Kolesnikov et al. 2020)
        qiao  w_hat = (w - mean) / (std + 1e-5), with the unbiased std: Qiao et al.'s own code and mmdetection's ConvWS
    timm's ScaledStdConv2d (Brock et al. 2021), for networks without norms, adds a gain and divides by
    sqrt(in * kh * kw).
    """

    variant = "bit"
    shared: Tensor | None = None  # the standardized weights, within `standardized_once`

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)

    def standardized(self) -> Tensor:
        """Return the weights with which a plain convolution computes the same; (out, in, kh, kw)."""
        return self.standardize(self.weight, self.variant) if self.shared is None else self.shared

    @staticmethod
    def standardize(weight: Tensor, variant: str = "bit") -> Tensor:
        """Standardize a weight (out, in, kh, kw); the result lies in memory like it.

        The variant of BiT is layer norm without gamma and beta over each row.  Its kernels read a row once for both
        sums, and the gradient (g - mean(g) - w_hat mean(g w_hat)) / std is one more pass.
        """
        if variant == "qiao":
            std, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True)
            return (weight - mean) / (std + 1e-5)
        by_channel = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        rows = weight.permute(0, 2, 3, 1) if by_channel else weight
        rows = F.layer_norm(rows, rows.shape[1:], eps=1e-10)
        return rows.permute(0, 3, 1, 2) if by_channel else rows


@contextmanager
def standardized_once(model: nn.Module, each: Callable[..., Iterable[Tensor]] = map) -> Iterator[dict[Tensor, Tensor]]:
    """Standardize the weights of a model once for several passes, forward and backward.

    Yields {weight: the tensor that stands for it}; the passes leave the gradient in that tensor.  At the end the
    gradients, which are sums over the passes, are taken to the weights.  each: a `map` that may use threads.
    """
    convs = [module for module in model.modules() if isinstance(module, StandardizedConv2d)]
    whole = list(each(lambda conv: conv.standardize(conv.weight, conv.variant), convs))
    shared = [weight.detach().requires_grad_(weight.requires_grad) for weight in whole]
    try:
        for conv, weight in zip(convs, shared, strict=True):
            conv.shared = weight
        yield {conv.weight: weight for conv, weight in zip(convs, shared, strict=True)}
    finally:
        for conv in convs:
            conv.shared = None
    used = [(weight, leaf.grad) for weight, leaf in zip(whole, shared, strict=True) if leaf.grad is not None]
    list(each(lambda pair: torch.autograd.backward(*pair), used))


class ConvNorm(nn.Module):
    """Convolution, norm and, by default, ReLU.

    The convolution has a bias only if no norm follows.  bias: it has one in any case (FCOS's heads).
    relu: whether an activation follows the norm at once.  adds: whether `forward` gets a residual instead, which is
    added before the activation.  FRN's TLU replaces ReLU in both cases, as in Wu's ResNet-50 with FRN (the paper's
    ResNets have no activation after the addition).  EvoNorm-S0 is its own activation, so it stands only where relu is
    true; elsewhere it is `Affine`, and ReLU follows the addition, as in its authors' ResNets.
    regions: the layer will see many small maps, one per region.
    cheap: in a tower, recompute its result instead of keeping it; by default True for 1x1 convolutions.
    groups: of the convolution (ResNeXt); with more than one, torch computes it in its own way.
    dilation: of the convolution (DC5); with more than 1, torch computes it in its own way.
    `way`: how a CPU computes the convolution in float32 (set by `choose_ways`).
    `memory`: what `tower` keeps for the backward pass (train.memory); outside a tower everything is kept ("fast").
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, norm: NormConfig, *, stride: int = 1, relu: bool = True,
        adds: bool = False, regions: bool = False, cheap: bool | None = None, groups: int = 1, dilation: int = 1,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        layer = StandardizedConv2d if norm.weight_standardization else nn.Conv2d
        bias, padding = bias or norm.kind == "none", dilation * (kernel // 2)
        self.conv = layer(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias)
        if isinstance(self.conv, StandardizedConv2d):
            self.conv.variant = norm.standardization
        self.norm = make_norm(norm, out_channels) if relu or not norm.activates else Affine(out_channels, norm.masked)
        self.tlu = ThresholdLinear(out_channels, norm.masked) if norm.learns_threshold and (relu or adds) else None
        self.relu, self.regions, self.memory = relu and not norm.activates, regions, "fast"
        self.way: type[Convolution] = Convolution
        self.cheap = kernel == 1 if cheap is None else cheap

    def forward(self, x: Tensor, area: ValidArea | None = None, residual: Tensor | None = None) -> Tensor:
        """Map x (B, C, H, W) to (B, out_channels, H/stride, W/stride); area: of the result, or None.

        residual: added before a final activation, as in a residual block.
        """
        if (fused := self._fused(x, area, residual)) is not None:
            return fused
        x = self.norm(self.convolve(x), area)
        x = x if residual is None else x + residual
        return self.activate(x, area) if self.relu or residual is not None else x

    def activate(self, x: Tensor, area: ValidArea | None) -> Tensor:
        """Apply the activation to maps x (B, C, H, W), whose memory it may reuse; area: of the pictures."""
        return F.relu(x, inplace=True) if self.tlu is None else self.tlu(x, area)

    def _fused(self, x: Tensor, area: ValidArea | None, residual: Tensor | None) -> Tensor | None:
        """Do the same in one pass over the map, without a gradient; None if that is not possible."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.conv.groups > 1 or self.conv.dilation[0] > 1 or not fused_conv.usable(x):
            return None
        if self.norm._forward_hooks or self.norm._forward_pre_hooks:
            return None
        if (folded := self.folded()) is None:
            return None
        weight, bias = folded[0].to(x.dtype), None if folded[1] is None else folded[1].to(x.dtype)
        relu = self.relu or residual is not None
        way, stride, padding = self.way_for(x.dtype), self.conv.stride[0], self.conv.kernel_size[0] // 2
        if way is Convolution:
            y = fused_conv.convolve(x, weight, bias, stride, padding, relu=relu, residual=residual)
        else:
            y = way(weight, bias, stride, padding).forward(x)
            y = y if residual is None else y.add_(residual)
            y = y.relu_() if relu else y
        return clear_padding(y, area) if getattr(self.norm, "masked", False) else y

    def folded(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight and bias of the convolution with its norm; None if the norm takes statistics."""
        norm = self.norm
        if isinstance(norm, NoNorm):
            return self.weight(), self.conv.bias
        takes_its_own = isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)
        if not isinstance(norm, FrozenBatchNorm | nn.BatchNorm2d) or takes_its_own:
            return None
        scale, shift = stored_map(norm)
        shift = shift if self.conv.bias is None else shift + scale * self.conv.bias
        return self.weight() * scale[:, None, None, None], shift

    def convolve(self, x: Tensor) -> Tensor:
        """Run the convolution alone, in the fastest way."""
        way = Convolution if torch.is_autocast_enabled(x.device.type) else self.way_for(x.dtype)
        if way is Convolution:
            return self.conv(x)
        y = Convolved.apply(x, self.weight(), self.conv.stride[0], way)
        return y if self.conv.bias is None else y + self.conv.bias[:, None, None]

    def way_for(self, dtype: torch.dtype) -> type[Convolution]:
        """Return how maps of a dtype are convolved: torch's way, except for float32 on a CPU."""
        weight = self.conv.weight
        chosen = weight.device.type == "cpu" and weight.dtype == dtype == torch.float32
        traced = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
        return self.way if chosen and not traced else Convolution

    def weight(self) -> Tensor:
        """Return the weight (out, in, kh, kw) that the convolution applies: standardized, if the config says so."""
        conv = self.conv
        return conv.standardized() if isinstance(conv, StandardizedConv2d) else conv.weight


def choose_ways(part: nn.Module, side: float) -> None:
    """Set how a CPU computes the convolutions of a part whose maps are about side x side."""
    for module in part.modules():
        if isinstance(module, ConvNorm) and module.conv.groups == 1 and module.conv.dilation[0] == 1:
            module.way = fastest(module.conv.weight, module.conv.stride[0], side)


def initialize(part: nn.Module) -> None:
    """Apply MSRA initialization (He et al. 2015) to the convolutions of a part."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


ConvFactory = Callable[..., ConvNorm]  # (in_channels, out_channels, kernel, stride=1, relu=True)


def conv_factory(norm: NormConfig, *, regions: bool = False) -> ConvFactory:
    """Return ConvNorm with the norm filled in, so that a module can build layers without knowing the norm."""
    return partial(ConvNorm, norm=norm, regions=regions)
