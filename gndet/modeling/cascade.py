"""Cascade R-CNN (Cai & Vasconcelos 2018): box heads in sequence, each on the boxes that the one before it refined.

B images, K proposals, R regions per image, D detections.

Batch independence: what a stage trains on is a function of the image's own regions and objects.  The first stage, and
with `resample` every stage, samples by the image's key, the stage and the ids of the proposals, which a region keeps
through all stages; so one region more or less does not change how the others are sampled.  A box that its stage made
empty is masked, and an image's losses are divided by the number of its own regions that are left.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.cascade import CascadeConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BoxHeadConfig, MaskHeadConfig
from gndet.modeling.box_head import BoxHead
from gndet.modeling.detection_model import RegionHead
from gndet.modeling.mask_head import MaskHead
from gndet.ops.roi_align import Pyramid
from gndet.structures import GROUND_TRUTH_IDS, Batch, Detections, Proposals, Regions

Losses = dict[str, Tensor]


class CascadeBoxHead(RegionHead):
    """Box heads of the same layout, each with its own IoU threshold and scale of the deltas; one box per region."""

    stages: Any  # a module list of BoxHead

    def __init__(
        self, cascade: CascadeConfig, cfg: BoxHeadConfig, norm: NormConfig, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.cascade = cascade
        self.stages = nn.ModuleList()
        for i, (iou, delta_weights) in enumerate(zip(cascade.positive_iou, cascade.delta_weights, strict=True)):
            own = cfg.model_copy(update={"positive_iou": iou})
            self.stages.append(BoxHead(own, norm, channels, num_classes, stage=i, delta_weights=delta_weights))

    def step(self, pyramid: Pyramid, regions: Proposals, batch: Batch) -> tuple[Losses, tuple[Regions, ...]]:
        """Return loss_cls_stage0, loss_box_reg_stage0 and so on, and the regions of each stage."""
        cascade, sampled = self.cascade, []
        losses: Losses = {}
        if cascade.scale_gradient:
            pyramid = _with_scaled_gradient(pyramid, 1 / len(self.stages))
        for i, (stage, weight) in enumerate(zip(self.stages, cascade.loss_weights, strict=True)):
            draws = i == 0 or cascade.resample
            chosen = stage.sample(regions, batch) if draws else stage.take_all(regions, batch)
            logits, deltas = stage(pyramid, chosen.boxes)
            found = stage.losses(logits, deltas, chosen, batch.gt)
            losses |= {f"{name}_stage{i}": weight * loss for name, loss in found.items()}
            sampled.append(chosen)
            regions = self._refined(stage, deltas.detach(), chosen, batch.sizes)
        return losses, tuple(sampled)

    def _refined(self, stage: BoxHead, deltas: Tensor, regions: Regions, sizes: Tensor) -> Proposals:
        """Return the regions of the next stage.  One that samples anew gets the ground truth as it is."""
        boxes = stage.refine(deltas, regions.boxes, sizes)
        valid = regions.valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)  # False for NaN
        if self.cascade.resample:
            valid = valid & (regions.ids < GROUND_TRUTH_IDS)
        return Proposals(boxes, regions.ids, valid)

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, found: Proposals, sizes: Tensor) -> Detections:
        """Return detections without masks: the boxes of the last stage, scored by all stages."""
        outputs, by_scores = [], self.cascade.average == "scores"
        boxes = found.boxes
        for stage in self.stages:
            found = found._replace(boxes=boxes)
            logits, deltas = stage(pyramid, boxes)
            outputs.append(logits.softmax(-1) if by_scores else logits)
            boxes = stage.refine(deltas, boxes, sizes)
        mean = torch.stack(outputs).mean(0)  # (B, K, num_classes + 1)
        detections: Detections = stage.select(mean if by_scores else mean.softmax(-1), deltas, found, sizes)
        return detections

    def probe(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> None:
        """Run every layer of every stage once on regions (B, R, 4); features: None."""
        for stage in self.stages:
            stage(pyramid, boxes)

    def rectified(self) -> list[nn.Module]:
        """Return the layers of the first stage, whose regions are those of a Step."""
        layers: list[nn.Module] = self.stages[0].rectified()
        return layers


class CascadeMaskHead(RegionHead):
    """A mask head per stage, trained on that stage's regions; the masks of detections are averaged (mmdetection)."""

    stages: Any  # a module list of MaskHead

    def __init__(
        self, cascade: CascadeConfig, cfg: MaskHeadConfig, norm: NormConfig, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.loss_weights = cascade.loss_weights
        self.stages = nn.ModuleList(
            MaskHead(cfg, norm, channels, num_classes, stage) for stage in range(len(cascade.positive_iou))
        )

    def step(self, pyramid: Pyramid, regions: Sequence[Regions], batch: Batch) -> tuple[Losses, tuple[Regions, ...]]:
        """Return loss_mask_stage0 and so on, and the regions of each stage; regions: of each stage."""
        losses: Losses = {}
        sampled: list[Regions] = []
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True)):
            found, chosen = stage.step(pyramid, regions, batch)
            losses |= {f"{name}_stage{i}": weight * loss for name, loss in found.items()}
            sampled += chosen
        return losses, tuple(sampled)

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, found: Detections, sizes: Tensor) -> Detections:
        """Add the mean of the stages' masks to the detections, (B, D, 28, 28) probabilities."""
        masks = [stage.detect(pyramid, found, sizes).masks for stage in self.stages]
        return found._replace(masks=torch.stack(masks).mean(0))

    def probe(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> None:
        """Run every layer of every stage once on regions (B, R, 4); features: None."""
        for stage in self.stages:
            stage.probe(pyramid, boxes, features)


def mask_head(
    cascade: CascadeConfig, cfg: MaskHeadConfig, norm: NormConfig, channels: int, num_classes: int
) -> MaskHead | CascadeMaskHead:
    """Build the mask head, or heads, of a cascade (cascade.mask_stages)."""
    if cascade.mask_stages == "each":
        return CascadeMaskHead(cascade, cfg, norm, channels, num_classes)
    return MaskHead(cfg, norm, channels, num_classes, stage=-1 if cascade.mask_stages == "last" else 0)


class _ScaledGradient(torch.autograd.Function):
    """The input; its gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _with_scaled_gradient(pyramid: Pyramid, scale: float) -> Pyramid:
    """Scale what all stages together add to the gradient of the levels, once for all of them."""
    return pyramid._replace(maps=[_ScaledGradient.apply(x, scale) for x in pyramid.maps])
