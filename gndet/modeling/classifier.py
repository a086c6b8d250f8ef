"""A classifier of pictures: a backbone, pooling over each picture, fully connected layers, and a loss per picture.

B images, C channels, K classes, P cells along a side of the pooled map, (H, W) canvas.

Batch independence: pooling sees the picture without the padding, dropout draws by the image's key, and the loss of an
image is divided by nothing that comes from other images.  A mixed picture (mixup, CutMix) was mixed when it was loaded,
with a picture of the data set and not of its batch; here it has two classes, with their shares.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.model import ClassifierConfig
from gndet.modeling.image_model import Choices, Features, ImageModel, Rectified
from gndet.modeling.norms.valid_area import ValidArea, ValidAreas
from gndet.ops.boxes import full
from gndet.ops.matching import kept_by_key
from gndet.ops.noise import Stream
from gndet.structures import Batch

HEAD = "classifier"  # the part of the model that follows the backbone
DEVIATION = 0.01  # of the first weights of the fully connected layers (Goyal et al. 2017, 5.1; VGG)


class Classified(NamedTuple):
    """The result of a training forward."""

    losses: dict[str, Tensor]  # {name: (B,)}, one loss per image
    logits: Tensor  # (B, K)


class ClassHead(nn.Module):
    """Pooling, fully connected layers with ReLU and dropout, and the logits."""

    def __init__(self, cfg: ClassifierConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cfg = cfg
        widths = [channels * cfg.pool_size**2, *cfg.fc_channels]
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.logits = nn.Linear(widths[-1], num_classes)
        for layer in (*self.fcs, self.logits):
            nn.init.normal_(layer.weight, std=DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, area: ValidArea | None, keys: Tensor | None = None) -> Tensor:
        """Classify maps x (B, C, H, W) whose pictures lie in `area`.  Returns logits (B, K).

        keys (B,): of the images, for dropout in training; None: no dropout.
        """
        x = pool_pictures(x, area, self.cfg.pool_size).flatten(1)  # (B, C * P * P)
        for number, layer in enumerate(self.fcs):
            x = F.relu(layer(x))
            if keys is not None and self.cfg.dropout:
                x = drop_by_key(x, self.cfg.dropout, keys, number)
        return self.logits(x)

    def loss(self, logits: Tensor, labels: Tensor, shares: Tensor | None = None) -> Tensor:
        """Return the loss (B,) of logits (B, K) for labels (B,), with smoothed labels (Szegedy et al. 2016, 7).

        shares (B, M): of mixed pictures; labels are then (B, M).
        """
        logits, smoothing = logits.to(self.logits.weight.dtype), self.cfg.label_smoothing
        if self.cfg.loss == "softmax" and shares is None:
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)  # (B, K), or (B, M, K)
        target = target if shares is None else (shares.to(target.dtype)[..., None] * target).sum(1)
        if self.cfg.loss == "softmax":
            return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        if self.cfg.target_threshold is not None:
            target = (target > self.cfg.target_threshold).to(logits.dtype)
        target = target * (1 - smoothing) + smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, K) of logits: by softmax, or with loss: sigmoid, each class by itself."""
        return logits.softmax(1) if self.cfg.loss == "softmax" else logits.sigmoid()


def pool_pictures(x: Tensor, area: ValidArea | None, side: int) -> Tensor:
    """Average maps x (B, C, H, W) over side x side cells of each picture, as adaptive pooling of each alone does.

    area: where the pictures lie; None: they fill the map.  Returns (B, C, side, side).
    """
    # torch's pooling into several cells has no deterministic gradient on a GPU
    if area is None and not (side > 1 and torch.are_deterministic_algorithms_enabled()):
        return F.adaptive_avg_pool2d(x, side)
    inside = full(x if area is None else torch.where(area.mask, x, 0.0))
    sizes = torch.tensor(x.shape[2:], device=x.device).expand(len(x), 2) if area is None else area.sizes
    rows, columns = (_shares(sizes[:, axis], x.shape[2 + axis], side).to(inside.dtype) for axis in (0, 1))
    with torch.autocast(x.device.type, enabled=False):  # in half precision, the shares of a mean do not add up to 1
        return torch.einsum("bph,bchw,bqw->bcpq", rows, inside, columns).to(x.dtype)


def _shares(sizes: Tensor, length: int, side: int) -> Tensor:
    """Return how much each of `length` rows adds to each of `side` means over the first sizes (B,) rows, (B, P, H)."""
    cell, row = torch.arange(side, device=sizes.device)[:, None], torch.arange(length, device=sizes.device)
    size = sizes[:, None, None]
    first, last = cell * size // side, -(-(cell + 1) * size // side)  # (B, P, 1), as adaptive pooling chooses them
    return ((row >= first) & (row < last)).double() / (last - first)


def drop_by_key(x: Tensor, share: float, keys: Tensor, layer: int) -> Tensor:
    """Set a share of x (B, N) to 0 and scale the rest up (dropout, Srivastava et al. 2014), by the images' keys alone.

    layer: number of the layer, so that two layers drop different units.
    """
    ids = torch.arange(x.shape[1], device=x.device) + (layer << 24)
    return torch.where(kept_by_key(keys, Stream.DROPOUT, ids, share), x / (1 - share), 0.0)


class Classifier(ImageModel):
    """A backbone and a ClassHead on its last map."""

    strides = (32,)

    def __init__(
        self, backbone: Any, head: ClassHead, *, pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:  # fmt: skip
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.classifier = head

    def features(self, images: Tensor, sizes: Tensor, padded: bool, keys: Tensor | None = None) -> Features:
        """Return [C5] of images (B, 3, H, W) uint8 RGB whose pictures have sizes (B, 2), and the pictures' areas."""
        x, areas = self.normalize(images, sizes, padded)
        return self.backbone(x, areas, keys)[-1:], areas

    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> Classified:
        """Run the training forward pass after C5: loss_class.

        An image's class is that of its first object; a mixed picture has the classes of all its objects.
        """
        logits = self.classifier(features[-1], areas[32], batch.keys)  # (B, K)
        labels = batch.gt.labels[:, 0] if batch.shares is None else torch.where(batch.gt.valid, batch.gt.labels, 0)
        return Classified({"loss_class": self.classifier.loss(logits, labels, batch.shares)}, logits)

    @torch.no_grad()
    def classify(self, images: Tensor, sizes: Tensor, padded: bool) -> Tensor:
        """Return the logits (B, K) of images without dropout.  Arguments as in Batch."""
        features, areas = self.features(images, sizes, padded)
        logits: Tensor = self.classifier(features[-1], areas[32])
        return logits

    def probe(self, images: Tensor, sizes: Tensor, padded: bool, *, copies: int = 1, regions: bool = True) -> None:
        """Run images through the backbone and, if regions, the pooled pictures through the head."""
        features, areas = self.features(images, sizes, padded)
        if regions:
            self.classifier(features[-1], areas[32])

    def choices(self, step: Classified, image: int) -> Choices:
        """Return nothing: a classifier samples nothing."""
        return {}

    def rectified(self) -> Rectified:
        """Return the layers of the backbone."""
        return self.backbone.rectified()

    def sees_regions(self, module: str) -> bool:
        """Return whether the module belongs to the head, which sees pooled pictures."""
        return module.partition(".")[0] == HEAD

    def after_features(self) -> list[nn.Module]:
        """Return the head."""
        return [self.classifier]

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""
        self.backbone.choose_convolutions(shortest_edge)
