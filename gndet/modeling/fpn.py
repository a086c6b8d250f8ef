"""The feature pyramid network (Lin et al. 2017): C2..C5 to P2..P6, or to P3..P7 for dense detectors.

B images, C channels.

Batch independence: each level is cleared in the padding before a convolution reads it, if the norm is masked.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import FPNConfig
from gndet.modeling.conv_norm import choose_ways, conv_factory
from gndet.modeling.image_model import Neck
from gndet.modeling.norms.valid_area import ValidAreas, clear_padding
from gndet.modeling.recompute import tower

LEVELS = (2, 3, 4, 5)  # of the backbone


class FPN(Neck):
    """Lateral 1x1 and output 3x3 convolutions with a nearest-neighbor top-down path, and what lies above P5.

    finest 2 (Lin et al. 2017): P2..P5, and P6, which is P5 subsampled by 2.  finest 3 (Lin et al. 2017, "Focal Loss"):
    P3..P5, P6 by a 3x3 convolution with stride 2 of P5 or C5 (cfg.p6), and P7 by another one after a ReLU; both without
    norms.
    """

    part = "fpn"

    def __init__(self, cfg: FPNConfig, norm: NormConfig, in_channels: Sequence[int], finest: int = 2) -> None:
        super().__init__()
        conv = conv_factory(norm)
        self.channels, self.masked, self.finest = cfg.channels, norm.masked, finest
        self.levels, self.strides = LEVELS[finest - 2 :], tuple(2**level for level in range(finest, finest + 5))
        for level in self.levels:
            self.add_module(f"lateral{level}", conv(in_channels[level - 2], cfg.channels, 1, relu=False))
            self.add_module(f"output{level}", conv(cfg.channels, cfg.channels, 3, relu=False))
        self.from_c5 = cfg.p6 == "c5"
        if finest == 3:
            self.p6 = nn.Conv2d(in_channels[-1] if self.from_c5 else cfg.channels, cfg.channels, 3, 2, 1)
            self.p7 = nn.Conv2d(cfg.channels, cfg.channels, 3, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Xavier over fan-in, as Caffe2's XavierFill
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU; see `Neck`."""
        for level in self.levels:
            choose_ways(self.get_submodule(f"output{level}"), shortest_edge / 2**level)

    def forward(self, features: Sequence[Tensor], areas: ValidAreas) -> list[Tensor]:
        """Map C2..C5 (B, C, H/s, W/s) to the levels of `strides` (B, channels, H/s, W/s); areas: by stride."""
        top = None
        outputs: list[Tensor] = []
        for level in reversed(self.levels):
            area = areas[2**level]
            x = tower([getattr(self, f"lateral{level}")], features[level - 2], [area])
            if top is not None:
                upsampled = F.interpolate(top, scale_factor=2.0, mode="nearest")
                x = x + upsampled[:, :, : x.shape[2], : x.shape[3]]
                x = clear_padding(x, area) if self.masked else x
            top = x
            outputs.insert(0, tower([getattr(self, f"output{level}")], x, [area]))
        if self.finest == 2:
            return [*outputs, F.max_pool2d(outputs[-1], 1, 2)]
        p6 = halved(self.p6, features[-1] if self.from_c5 else outputs[-1])
        p6 = clear_padding(p6, areas[64]) if self.masked else p6
        p7 = halved(self.p7, F.relu(p6))
        return [*outputs, p6, clear_padding(p7, areas[128]) if self.masked else p7]


def halved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 3x3 convolution with stride 2 and padding 1 to x (B, C, H, W).

    A map with a side of 1 gets zeros to its right and below, which change no result: without them oneDNN leaves a
    part of the weight's gradient unset in bf16, NaN or any number (torch 2.14).
    """
    if torch.is_grad_enabled() and 1 in x.shape[2:]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return conv(x)
