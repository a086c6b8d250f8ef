"""The interfaces of detectors and region heads.  The rest of gndet relies on nothing else.

B images, R regions per image, (H, W) canvas; sizes (B, 2) are the pictures' heights and widths.

Batch independence: as `ImageModel` says; a region head samples by the image's key.
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.parts import BoxHeadConfig, MaskHeadConfig
from gndet.modeling.image_model import ImageModel
from gndet.ops.roi_align import Pyramid, roi_align_pyramid
from gndet.structures import Batch, Detections, Regions

PROBED_REGIONS = 64  # per image, that `probe` runs through the heads


class DetectionModel(ImageModel):
    """A detector: a backbone, a neck, and the parts that work on the neck's levels."""

    @abstractmethod
    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        """Detect objects; boxes in canvas pixels, with masks if there is a mask head.  Arguments as in Batch."""


class RegionHead(nn.Module, ABC):
    """A head on regions of the pyramid's levels."""

    @abstractmethod
    def step(self, pyramid: Pyramid, regions: Any, batch: Batch) -> tuple[dict[str, Tensor], tuple[Regions, ...]]:
        """Choose the regions to train on, among the proposals or among those of the previous head.

        Returns the losses {name: (B,)}, and the regions of each stage: several in a cascade, otherwise one.
        """

    @abstractmethod
    def detect(self, pyramid: Pyramid, found: Any, sizes: Tensor) -> Detections:
        """Turn proposals into detections, or extend those of the previous head; sizes (B, 2) of the pictures."""

    @abstractmethod
    def probe(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> None:
        """Run every layer once on regions (B, R, 4); features: of the regions, if the heads share them."""

    def shared(self, pyramid: Pyramid, boxes: Tensor) -> Tensor | None:
        """Return the features (B, R, C, P, P) of regions (B, R, 4) that all heads work on; None if there are none."""
        return None

    def rectified(self) -> list[nn.Module]:
        """Return the layers whose output (B * R, ...) is positive where a ReLU is open, in the order they run."""
        return []


def region_features(pyramid: Pyramid, boxes: Tensor, image: Tensor, cfg: BoxHeadConfig | MaskHeadConfig) -> Tensor:
    """Pool each region by RoIAlign, and run the backbone's last stage on it in a C4 model.

    boxes (R, 4) in images (R,); cfg: of the head.  Returns (R, C, P, P).
    """
    pool = partial(roi_align_pyramid, pyramid, boxes, image, cfg.pool_size, cfg.sampling_ratio, cfg.roi_align)
    return pool() if pyramid.last_stage is None else pyramid.last_stage(pool)


def image_index(num_images: int, num_regions: int, device: torch.device) -> Tensor:
    """Return the image index of each region of a flattened (B, R), as (B * R,) int64."""
    return torch.arange(num_images, device=device).repeat_interleave(num_regions)
