"""The interfaces of models that are trained on images, and of their parts.  The rest of gndet relies on nothing else.

B images, C channels, L levels, R regions per image, (H, W) canvas; sizes (B, 2) are the pictures' heights and widths.

Batch independence: a model's output for an image depends only on that image and its key.  `features` keeps the padding
out; `step` draws by the image's key and divides an image's loss by numbers that come from that image alone.  `choices`
and `rectified` let `gndet invariance` check this.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from gndet.modeling.norms.valid_area import ValidAreas, clear_padding, picture_areas
from gndet.structures import Batch

Features = tuple[list[Tensor], ValidAreas]  # maps by level, and the pictures' areas by stride
Choices = dict[str, set[tuple[int, ...]]]  # what a step chose for an image, by kind: ids, and what they were assigned


class Rectified(NamedTuple):
    """Modules whose output is positive where a ReLU is open, in the order they run."""

    maps: list[nn.Module]  # return (B, C, H/s, W/s)
    regions: list[nn.Module]  # return (B * R, ...)


class Backbone(nn.Module, ABC):
    """What turns pictures into maps; its last stages may run on regions of the last map instead."""

    channels: tuple[int, ...]  # of the maps
    region_channels = 0  # of what `last_stage` returns, if stages run on regions

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []  # parts that are not trained

    @abstractmethod
    def forward(self, x: Tensor, areas: ValidAreas, keys: Tensor | None = None) -> list[Tensor]:
        """Map x (B, 3, H, W), normalized and zero in the padding, to C2..C5; areas: of the pictures, by stride.

        keys (B,): of the images, for stochastic depth in training; None: no block is skipped.
        Returns maps (B, C, ceil(H/s), ceil(W/s)), zero in the padding if the norm is masked.
        """

    @abstractmethod
    def rectified(self) -> Rectified:
        """Return the modules that end with a ReLU; other activations have no zeros."""

    @abstractmethod
    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""

    def check(self) -> None:
        """Raise ConfigError where a picture's maps depend on its batch.

        Networks that gndet did not write have to show this when a run starts; for the others, tests do.
        """

    def after_maps(self) -> list[nn.ModuleList]:
        """Return the stages that run on regions: children of the backbone."""
        return []

    @property
    def last_stage(self) -> Callable[[Callable[[], Tensor]], Tensor] | None:
        """What runs the stages of `after_maps` on regions; None if there are none.

        It takes a function that returns the regions' features (R, C, P, P), which with train.memory "lean" is called
        again in the backward pass, and returns (R, region_channels, P', P').
        """
        return None

    def stop_training(self, parts: list[nn.Module]) -> None:
        """Freeze parts: their parameters, and the statistics of their BN layers."""
        self.frozen = parts
        for part in parts:
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; frozen parts stay in evaluation mode, so that BN keeps its statistics."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self


class Neck(nn.Module, ABC):
    """What turns the backbone's maps into levels."""

    part: str  # prefix of its tensors' names
    channels: int  # of each level
    strides: tuple[int, ...]  # of the levels, from the finest
    masked: bool  # whether the levels are zero in the padding

    @abstractmethod
    def forward(self, features: Sequence[Tensor], areas: ValidAreas) -> list[Tensor]:
        """Map the backbone's maps (B, C, H/s, W/s) to the levels (B, channels, H/s, W/s); areas: by stride."""

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""


class ImageModel(nn.Module, ABC):
    """A detector or a classifier: a backbone, and the parts that work on its maps."""

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor
    strides: tuple[int, ...]  # of the levels that `features` returns
    extends_edges = False  # whether RoIAlign reads a picture's repeated edge beyond the picture, not the padding

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        # no checkpoint has these two, so they exist on the CPU even if the model is built on the meta device
        mean, std = torch.tensor(pixel_mean, device="cpu"), torch.tensor(pixel_std, device="cpu")
        self.register_buffer("pixel_mean", mean[:, None, None], persistent=False)
        self.register_buffer("pixel_std", std[:, None, None], persistent=False)

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.pixel_mean.device

    def normalize(self, images: Tensor, sizes: Tensor, padded: bool) -> tuple[Tensor, ValidAreas]:
        """Normalize images (B, 3, H, W) uint8 RGB and zero the padding.  Also returns the pictures' areas by stride."""
        areas = picture_areas(sizes, images.shape[2], images.shape[3], padded, coarsest=max(64, *self.strides))
        x = clear_padding((images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std, areas[1])
        return x.contiguous(memory_format=torch.channels_last), areas

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the training losses {name: (B,)}, one per image; each depends only on that image and its key."""
        found = self.features(batch.images, batch.sizes, batch.padded, batch.keys)
        losses: dict[str, Tensor] = self.step(*found, batch).losses
        return losses

    @abstractmethod
    def features(self, images: Tensor, sizes: Tensor, padded: bool, keys: Tensor | None = None) -> Features:
        """Return the levels L x (B, C, H/s, W/s) of images (B, 3, H, W), and the pictures' areas by stride.

        keys (B,): of the images, for stochastic depth in training; None: no block is skipped.
        """

    @abstractmethod
    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> Any:
        """Run the training forward pass after `features`.  Returns a NamedTuple whose `losses` are {name: (B,)}."""

    @abstractmethod
    def probe(self, images: Tensor, sizes: Tensor, padded: bool, *, copies: int = 1, regions: bool = True) -> None:
        """Run every layer once for its forward hooks, as calibration, norm statistics and the norm audit need it.

        copies: how many times the batch repeats the same pictures; all copies use the regions of the first, so that
        they differ by the layers alone.  regions: also run the layers on regions, and not only those on whole maps.
        """

    @abstractmethod
    def choices(self, step: Any, image: int) -> Choices:
        """Return what a step chose for an image, identified by ids and not by positions."""

    @abstractmethod
    def rectified(self) -> Rectified:
        """Return the modules that show where ReLUs are open, for the proof of batch independence."""

    @abstractmethod
    def sees_regions(self, module: str) -> bool:
        """Return whether the module of that name runs on regions and not on whole maps."""

    @abstractmethod
    def after_features(self) -> list[nn.Module]:
        """Return the parts that run after `features`."""

    @abstractmethod
    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose how 3x3 convolutions are computed on a CPU, from the pictures' shortest edge in pixels.

        The choice never depends on the pictures of a batch, so an image's rounding does not depend on its batch mates.
        """
