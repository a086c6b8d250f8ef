"""What every region head is: a part that looks at regions of the pyramid, one after the other as build.py lists them.

B images, R regions per image, L levels.  Batch independence: a head sees each region by itself, samples by the image's
key, and divides an image's loss by what that image alone decides.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gndet.structures import Batch, Detections, Proposals, Regions


class RegionHead(nn.Module, ABC):
    """A head on regions; `features` are the pooled levels L x (B, C, H/s, W/s), `strides` theirs."""

    @abstractmethod
    def sample(self, regions: Proposals | Regions, batch: Batch) -> Regions:
        """Choose the regions to train on among the proposals, or among those of the head before."""

    @abstractmethod
    def loss(
        self, features: Sequence[Tensor], strides: Sequence[int], regions: Regions, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the losses {name: (B,)} of the regions that `sample` chose."""

    @abstractmethod
    def detect(
        self, features: Sequence[Tensor], strides: Sequence[int], found: Proposals | Detections, sizes: Tensor
    ) -> Detections:
        """Make detections of proposals, or add to those of the head before; sizes (B, 2) of the pictures."""

    @abstractmethod
    def probe(self, features: Sequence[Tensor], strides: Sequence[int], boxes: Tensor) -> None:
        """Run every layer on regions (B, R, 4) once."""

    def rectified(self) -> list[nn.Module]:
        """Return the layers whose output (B * R, ...) is positive where a ReLU is open, in the order they run."""
        return []


def image_index(num_images: int, num_regions: int, device: torch.device) -> Tensor:
    """Return the image of each region of a flattened (B, R), (B * R,) int64."""
    return torch.arange(num_images, device=device).repeat_interleave(num_regions)
