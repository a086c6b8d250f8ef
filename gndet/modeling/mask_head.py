"""Mask head (He et al. 2017): a 28 x 28 mask per class for each region. P regions, S side of the stored masks.

In a C4 model its deconvolution works on what res5 makes of the region, 7 x 7, so that a mask has 14 x 14 cells.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import MaskHeadConfig
from gndet.modeling.conv_norm import conv_factory
from gndet.modeling.detection_model import RegionHead, image_index, region_features
from gndet.modeling.recompute import recomputed, tower
from gndet.ops.boxes import full
from gndet.ops.losses import mask_targets, mean_per_image
from gndet.ops.roi_align import Pyramid
from gndet.structures import Batch, Detections, Regions


class MaskHead(RegionHead):
    """Convolutions, a deconvolution and a 1x1 convolution to num_classes masks; stage: whose regions it trains on."""

    def __init__(self, cfg: MaskHeadConfig, norm: NormConfig, channels: int, num_classes: int, stage: int = 0) -> None:
        super().__init__()
        self.cfg, self.stage, self.memory = cfg, stage, "fast"
        conv = conv_factory(norm, regions=True)
        self.convs = nn.ModuleList()
        for _ in range(cfg.num_convs):
            self.convs.append(conv(channels, cfg.channels, 3))
            channels = cfg.channels
        self.deconv = nn.ConvTranspose2d(channels, cfg.channels, 2, 2)
        self.logits = nn.Conv2d(cfg.channels, num_classes, 1)
        for module in [*self.convs.modules(), self.deconv]:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight, bias = self.logits.parameters()
        nn.init.normal_(weight, std=0.001)
        nn.init.zeros_(bias)

    def forward(
        self, pyramid: Pyramid, boxes: Tensor, image: Tensor, labels: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """Return mask logits (P, 28, 28) of boxes (P, 4) in images (P,), each for its label in labels (P,).

        features: of the regions, if the heads share them.
        """
        return recomputed(self, self._predict, pyramid, boxes, image, labels, features)

    def _predict(
        self, pyramid: Pyramid, boxes: Tensor, image: Tensor, labels: Tensor, features: Tensor | None
    ) -> Tensor:
        pool = partial(region_features, pyramid, boxes, image, self.cfg)
        x = pool() if features is None else features
        if self.convs:
            x = tower(self.convs, x, make_input=pool if features is None else None)
        return full(recomputed(self, self._masks, x, labels, cheap=True))

    def _masks(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the mask logits of x (P, C, 14, 14) for its labels only: one class of 80 is needed."""
        x = F.relu(self.deconv(x), inplace=True)  # (P, C, 28, 28)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (P, 28 * 28, C)
        assert self.logits.bias is not None
        weight, bias = self.logits.weight[labels, :, 0, 0], self.logits.bias[labels]  # (P, C), (P,)
        return (torch.matmul(pixels, weight[:, :, None]) + bias[:, None, None]).view(x.shape[0], *x.shape[2:])

    def sample(self, regions: Regions, batch: Batch) -> Regions:
        """Keep the slots of the box head's regions that can be positive."""
        num_slots = regions.positive_slots
        *fields, _, features = regions
        features = None if features is None else features[:, :num_slots]
        return Regions._make([*(field[:, :num_slots] for field in fields), num_slots, features])

    def step(
        self, pyramid: Pyramid, regions: Sequence[Regions], batch: Batch
    ) -> tuple[dict[str, Tensor], tuple[Regions, ...]]:
        """Return the losses of the box head's positive regions; as `RegionHead.step`, regions: of each stage."""
        chosen = self.sample(regions[self.stage], batch)
        return self.loss(pyramid, chosen, batch), (chosen,)

    def loss(self, pyramid: Pyramid, regions: Regions, batch: Batch) -> dict[str, Tensor]:
        """Return the masks' cross-entropy (B,), the mean over each image's positive regions."""
        num_images, num_slots = regions.positive.shape
        rows = _rows(regions.positive)
        image = image_index(num_images, num_slots, rows.device)[rows]
        boxes, matched = regions.boxes.flatten(0, 1)[rows], regions.matched.flatten()[rows]
        labels = torch.where(regions.positive, regions.labels, 0).flatten()[rows]
        features = None if regions.features is None else regions.features.flatten(0, 1)[rows]
        logits = self(pyramid, boxes, image, labels, features)
        with torch.no_grad():
            target = mask_targets(
                batch.gt.masks[image, matched], batch.gt.boxes[image, matched], boxes, logits.shape[-1],
                soft=self.cfg.targets == "soft",
            )  # fmt: skip
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").mean(
            (1, 2)
        )  # (P,)
        padded = loss.new_zeros(num_images * num_slots).index_put((rows,), loss).view(num_images, num_slots)
        return {"loss_mask": mean_per_image(padded, regions.positive)}

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, found: Detections, sizes: Tensor) -> Detections:
        """Add masks to the detections, (B, D, 28, 28) probabilities."""
        num_images, num_slots = found.valid.shape
        rows = _rows(found.valid)
        image = image_index(num_images, num_slots, rows.device)[rows]
        labels = torch.where(found.valid, found.labels, 0).flatten()[rows]
        masks = self(pyramid, found.boxes.flatten(0, 1)[rows], image, labels).sigmoid()
        side = masks.shape[-1]
        padded = masks.new_zeros(num_images * num_slots, side, side).index_put((rows,), masks)
        return found._replace(masks=padded.view(num_images, num_slots, side, side))

    def probe(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> None:
        """Run every layer once on regions (B, R, 4), predicting masks of the first class."""
        image = image_index(boxes.shape[0], boxes.shape[1], boxes.device)
        features = None if features is None else features.flatten(0, 1)
        self(pyramid, boxes.flatten(0, 1), image, torch.zeros_like(image), features)


def _rows(wanted: Tensor) -> Tensor:
    """Return the slots to compute, as indices into the flattened wanted (B, P).

    On a GPU these are all slots, to keep a single graph without host syncs.  On a CPU, where the amount of work counts,
    these are the wanted slots and always the first one, so that no layer sees an empty batch.
    """
    if wanted.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.arange(wanted.numel(), device=wanted.device)
    wanted = wanted.flatten().clone()
    wanted[0] = True
    return wanted.nonzero()[:, 0]
