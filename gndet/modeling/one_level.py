"""Detectors on one level of stride 16: DC5, and C4, whose heads share the backbone's res5 (He et al. 2016, appendix A).

B images, K proposals, R regions per image, C channels.

Batch independence: the level is the backbone's last map, which is clear in the padding.  res5 sees each region by
itself and normalizes it by itself, and a region has no padding; so regions in parts of any size have the same result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gndet.config.norm import NormConfig
from gndet.config.parts import FPNConfig
from gndet.modeling.box_head import BoxHead
from gndet.modeling.detection_model import image_index, region_features
from gndet.modeling.image_model import Neck
from gndet.modeling.norms.valid_area import ValidAreas
from gndet.ops.roi_align import Pyramid

AT_ONCE = 128  # regions per image that res5 sees at once in detection: 1,000 of them would take 3 GiB


class OneLevel(Neck):
    """The backbone's last map as the only level: C4, or a dilated C5."""

    part = "level"  # it has no tensors
    strides = (16,)

    def __init__(self, cfg: FPNConfig, norm: NormConfig, in_channels: Sequence[int]) -> None:
        """norm: the backbone's.  in_channels: of its maps, the last of which becomes the level.  cfg has no effect."""
        super().__init__()
        self.channels, self.masked = in_channels[-1], norm.masked

    def forward(self, features: Sequence[Tensor], areas: ValidAreas) -> list[Tensor]:
        """Return the last of the features."""
        return [features[-1]]


class Res5BoxHead(BoxHead):
    """Class scores and box deltas of the average of what the backbone's res5 makes of a region.

    A mask head works on the same result, (R, C, P, P).
    """

    def layers(self) -> tuple[int, int]:
        """Return (0, 0): res5 takes their place."""
        return 0, 0

    def flat_channels(self, channels: int) -> int:
        """Return the channels of res5."""
        return channels

    def flat(self, x: Tensor) -> Tensor:
        """Average maps (R, C, P, P) to (R, C)."""
        return x.mean((2, 3))

    def shared(self, pyramid: Pyramid, boxes: Tensor) -> Tensor:
        """Return what res5 makes of regions (B, R, 4), as (B, R, C, P, P)."""
        image = image_index(boxes.shape[0], boxes.shape[1], boxes.device)
        return region_features(pyramid, boxes.flatten(0, 1), image, self.cfg).unflatten(0, boxes.shape[:2])

    def predict_all(self, pyramid: Pyramid, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of `forward` for all proposals (B, K, 4), computed in parts to save memory."""
        whole = torch.onnx.is_in_onnx_export()  # a trace would fix the number of parts
        parts = [boxes] if whole else boxes.split(AT_ONCE, dim=1)
        logits, deltas = (torch.cat(part, dim=1) for part in zip(*[self(pyramid, part) for part in parts], strict=True))
        return logits, deltas
