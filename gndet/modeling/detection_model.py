"""What every detector and every region head is: the protocols by which the rest of gndet knows a model.

B images, C channels, L levels, R regions per image, (H, W) canvas; sizes (B, 2) are the pictures' heights and widths.

Batch independence: what a detector returns for an image is a function of that image and of its key alone.  `features`
keeps the padding out, `step` samples by the image's key and divides an image's loss by what that image alone decides;
`choices` and `rectified` let `gndet invariance` check it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.norms.valid_area import ValidArea, ValidAreas, picture_areas
from gndet.structures import Batch, Detections, Regions, Step

PROBED_REGIONS = 64  # per image, that `probe` passes through layers of regions
Choices = dict[str, set[tuple[int, ...]]]  # what was chosen for an image, by kind: ids, with what each is taken for


class Rectified(NamedTuple):
    """Modules whose output is positive where a ReLU is open, in the order they run."""

    maps: list[nn.Module]  # return (B, C, H/s, W/s)
    regions: list[nn.Module]  # return (B * R, ...)


class DetectionModel(nn.Module, ABC):
    """A detector: backbone, neck, and what stands behind the neck's levels."""

    backbone: Any  # a module; `frozen` lists its parts that are not trained
    pixel_mean: Tensor
    pixel_std: Tensor
    strides: tuple[int, ...]  # of the levels that `features` returns
    extends_edges = False  # whether regions find a picture's edge repeated beyond it, and not the padding

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.pixel_mean.device

    def normalize(self, images: Tensor, sizes: Tensor, padded: bool) -> tuple[Tensor, ValidAreas]:
        """Normalise images (B, 3, H, W) uint8 RGB; the padding is zero.  Also returns the pictures' areas by stride."""
        height, width = images.shape[2:]
        x = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        if padded:
            x = torch.where(ValidArea.of(sizes, height, width).mask, x, 0.0)
        return x.contiguous(memory_format=torch.channels_last), picture_areas(sizes, height, width, padded)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the training losses {name: (B,)}, one per image: functions of that image and its key alone."""
        return self.step(*self.features(batch.images, batch.sizes, batch.padded), batch).losses

    @abstractmethod
    def features(self, images: Tensor, sizes: Tensor, padded: bool) -> tuple[list[Tensor], ValidAreas]:
        """Return the levels L x (B, C, H/s, W/s) of images (B, 3, H, W), and the areas of the pictures by stride."""

    @abstractmethod
    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> Step:
        """Run the training forward behind `features`: the losses of each image, and what was sampled."""

    @abstractmethod
    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        """Detect objects; boxes in canvas pixels, with masks if the detector has any.  Arguments as Batch's fields."""

    @abstractmethod
    def probe(self, images: Tensor, sizes: Tensor, padded: bool, *, copies: int = 1, regions: bool = True) -> None:
        """Run every layer once, for those who listen by hooks: calibration, norm statistics and norm audit.

        copies: the batch holds the same pictures so many times; the regions of the first copy serve for all, so that
        copies differ by the layers alone.  regions: run the layers that see regions, too, and not just whole maps.
        """

    @abstractmethod
    def choices(self, step: Step, image: int) -> Choices:
        """Return what a step chose for an image, by what it is and not by where it stands."""

    @abstractmethod
    def rectified(self) -> Rectified:
        """Return the modules that tell where ReLUs are open, for the proof of batch independence."""

    @abstractmethod
    def sees_regions(self, module: str) -> bool:
        """Return whether the module of that name is given regions, and not whole maps."""

    @abstractmethod
    def behind_features(self) -> list[nn.Module]:
        """Return the parts that stand behind `features`."""

    @abstractmethod
    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose how 3x3 convolutions are computed on a CPU, by the shortest edge of the pictures in pixels.

        Never by the pictures of a batch: the rounding of an image does not depend on those beside it.
        """


class RegionHead(nn.Module, ABC):
    """A head on regions; `features` are the pooled levels L x (B, C, H/s, W/s), `strides` theirs."""

    @abstractmethod
    def sample(self, regions: Any, batch: Batch) -> Regions:
        """Choose the regions to train on among the proposals, or among those of the head before."""

    @abstractmethod
    def loss(
        self, features: Sequence[Tensor], strides: Sequence[int], regions: Regions, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the losses {name: (B,)} of the regions that `sample` chose."""

    @abstractmethod
    def detect(self, features: Sequence[Tensor], strides: Sequence[int], found: Any, sizes: Tensor) -> Detections:
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
