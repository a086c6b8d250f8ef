"""Mask R-CNN (He et al. 2017) with a pyramid, and the one place where its parts are chosen.

B images, N anchors, K proposals, R regions and P positive regions an image, D detections, (H, W) canvas.
"""

import torch
from torch import Tensor, nn

from gndet.config.schema import ModelConfig
from gndet.errors import ConfigError
from gndet.modeling.box_head import BoxHead
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.fpn import FPN, LEVELS
from gndet.modeling.mask_head import MaskHead
from gndet.modeling.norms.valid_area import ValidArea, ValidAreas, picture_areas
from gndet.modeling.resnet import ResNet
from gndet.modeling.rpn import RPN
from gndet.ops.roi_align import extend_edges
from gndet.ops.winograd import LEAST_TILES, TILE
from gndet.structures import Batch, Detections, Regions, Step

ROI_LEVELS = 4  # the heads pool from P2..P5


class MaskRCNN(nn.Module):
    """The detector; mask_head None makes it a Faster R-CNN."""

    def __init__(
        self,
        *,
        backbone: ResNet,
        fpn: FPN,
        rpn: RPN,
        box_head: BoxHead,
        mask_head: MaskHead | None,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.backbone, self.fpn, self.rpn = backbone, fpn, rpn
        self.box_head, self.mask_head = box_head, mask_head
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    def filter_minimally(self, shortest_edge: int) -> None:
        """Compute 3x3 convolutions by minimal filtering on a CPU where the maps are large enough for it to pay.

        shortest_edge: of the smallest pictures, pixels.  The choice hangs on it alone and never on the pictures of a
        batch: an image's rounding does not depend on those beside it.
        """
        large = [s for s in self.fpn.strides if (shortest_edge / s / TILE) ** 2 >= LEAST_TILES]
        stages = zip(self.backbone.stages(), self.fpn.strides[:-1], strict=True)  # P6 has none
        parts = [stage for stage, stride in stages if stride in large]
        parts += [self.fpn.get_submodule(f"output{level}") for level in LEVELS if 2**level in large]
        parts += [self.rpn, self.box_head, self.mask_head] if large[1:] else []
        for part in parts:
            for module in part.modules() if part is not None else ():
                if isinstance(module, ConvNorm):
                    module.winograd = True

    def features(self, images: Tensor, sizes: Tensor, padded: bool) -> tuple[list[Tensor], ValidAreas]:
        """P2..P6 of images (B, 3, H, W) uint8 RGB whose pictures have sizes (B, 2), and the pictures' areas."""
        height, width = images.shape[2:]
        areas = picture_areas(sizes, height, width, padded)
        x = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        if padded:
            x = torch.where(ValidArea.of(sizes, height, width).mask, x, 0.0)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.fpn(self.backbone(x, areas), areas), areas

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The training losses of each image, (B,): functions of that image and its key alone.

        Returns loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg and, with masks, loss_mask.
        """
        return self.step(*self.features(batch.images, batch.sizes, batch.padded), batch).losses

    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> Step:
        """The training forward behind the pyramid P2..P6: the losses of each image, and what was sampled."""
        logits, deltas = self.rpn(features, areas)  # L x (B, N_l), L x (B, N_l, 4)
        anchors = self.rpn.anchors(features, areas, batch.images.shape[2:])
        sample = self.rpn.sample_anchors(anchors, batch)
        losses = self.rpn.loss(logits, deltas, sample)
        proposals = self.rpn.propose(logits, deltas, anchors, batch.sizes)
        regions = self.box_head.sample_regions(proposals, batch)
        pyramid, strides = self.pooled_levels(features, areas)
        losses |= self.box_head.loss(pyramid, strides, regions, batch)
        if self.mask_head is not None:
            cfg = self.box_head.cfg
            most = max(int(cfg.regions_per_image * cfg.positive_fraction), 1)  # positives come first
            positives = Regions(*(field[:, :most] for field in regions))
            losses |= self.mask_head.loss(pyramid, strides, positives, batch)
        return Step(losses, sample, proposals, regions)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        """Detections in canvas pixels, with masks if there is a mask head; arguments as Batch's fields."""
        found, pyramid, strides = self.detect_boxes(images, sizes, padded)
        return found if self.mask_head is None else self.mask_head.detect(pyramid, strides, found)

    @torch.no_grad()
    def detect_boxes(
        self, images: Tensor, sizes: Tensor, padded: bool
    ) -> tuple[Detections, list[Tensor], tuple[int, ...]]:
        """Detections without masks, and the levels that masks are pooled from with their strides."""
        features, areas = self.features(images, sizes, padded)
        logits, deltas = self.rpn(features, areas)
        anchors = self.rpn.anchors(features, areas, images.shape[2:])
        proposals = self.rpn.propose(logits, deltas, anchors, sizes)
        pyramid, strides = self.pooled_levels(features, areas)
        return self.box_head.detect(pyramid, strides, proposals, sizes), pyramid, strides

    def pooled_levels(self, features: list[Tensor], areas: ValidAreas) -> tuple[list[Tensor], tuple[int, ...]]:
        """The levels that the heads pool from, their strides; beside a masked picture its edge is repeated once."""
        strides = self.fpn.strides[:ROI_LEVELS]
        levels = [
            feature if areas[stride] is None or not self.fpn.masked else extend_edges(feature, areas[stride].sizes)
            for feature, stride in zip(features[:ROI_LEVELS], strides, strict=True)
        ]
        return levels, strides


def build_model(cfg: ModelConfig, num_classes: int) -> MaskRCNN:
    """Choose and build the parts of a config; `part.norm or model.norm` decides each part's norm.

    Raises ConfigError that names the part whose norm does not fit its channels.
    """
    norms = cfg.part_norms()
    part = "backbone"
    try:
        backbone = ResNet(cfg.backbone, norms[part])
        part = "fpn"
        fpn = FPN(cfg.fpn, norms[part], backbone.channels)
        part = "rpn"
        rpn = RPN(cfg.rpn, norms[part], fpn.channels, fpn.strides)
        part = "box_head"
        box_head = BoxHead(cfg.box_head, norms[part], fpn.channels, num_classes)
        part = "mask_head"
        mask_head = MaskHead(cfg.mask_head, norms[part], fpn.channels, num_classes) if cfg.masks else None
    except ConfigError as error:
        raise ConfigError(f"model.{part}: {error}") from None
    return MaskRCNN(
        backbone=backbone,
        fpn=fpn,
        rpn=rpn,
        box_head=box_head,
        mask_head=mask_head,
        pixel_mean=cfg.pixel_mean,
        pixel_std=cfg.pixel_std,
    )
