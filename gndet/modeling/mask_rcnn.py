"""Mask R-CNN (He et al. 2017) on a pyramid (Lin et al. 2017) or on one level (C4, DC5), or Faster R-CNN if the box
head is the only head.

B images, N anchors, K proposals, R regions per image, D detections, (H, W) canvas.

Batch independence: the RPN ignores anchors in the padding and samples by the image's key, as does each region head
(detection_model.py).  A masked picture's edge is repeated once beyond the picture, so that RoIAlign reads no padding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gndet.modeling.conv_norm import choose_ways
from gndet.modeling.detection_model import PROBED_REGIONS, DetectionModel, RegionHead
from gndet.modeling.image_model import Backbone, Choices, Features, Neck, Rectified
from gndet.modeling.norms.valid_area import ValidAreas
from gndet.modeling.rpn import RPN
from gndet.ops.roi_align import Pyramid, extended, pyramid_level
from gndet.structures import Batch, Detections, Proposals, Regions, Step

SMALLEST = 7  # side of a region's map in most heads [cells]
ROI_LEVELS = 4  # the heads pool from P2..P5, or from the only level


class MaskRCNN(DetectionModel):
    """Backbone, neck, RPN, and region heads that run one after the other."""

    def __init__(
        self, backbone: Backbone, neck: Neck, rpn: RPN, heads: Mapping[str, RegionHead], *,
        pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float],
    ) -> None:  # fmt: skip
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.neck_name = neck.part
        self.add_module(neck.part, neck)
        self.rpn = rpn
        self.head_names, self.strides, self.extends_edges = tuple(heads), neck.strides, neck.masked
        for name, head in heads.items():
            self.add_module(name, head)

    @property
    def neck(self) -> Neck:
        """Return what turns the backbone's maps into levels."""
        neck: Neck = getattr(self, self.neck_name)
        return neck

    @property
    def heads(self) -> list[RegionHead]:
        """Return the region heads in the order they run."""
        return [getattr(self, name) for name in self.head_names]

    def features(self, images: Tensor, sizes: Tensor, padded: bool, keys: Tensor | None = None) -> Features:
        """Return P2..P6 of images (B, 3, H, W) uint8 RGB whose pictures have sizes (B, 2), and the pictures' areas.

        With another neck than a pyramid it returns the only level.
        """
        x, areas = self.normalize(images, sizes, padded)
        return self.neck(self.backbone(x, areas, keys), areas), areas

    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> Step:
        """Run the training forward pass after P2..P6: loss_rpn_cls, loss_rpn_loc, and the losses of the heads."""
        logits, deltas = self.rpn(features, areas)  # L x (B, N_l), L x (B, N_l, 4)
        anchors = self.rpn.anchors(features, areas, batch.images.shape[2:])
        sample = self.rpn.sample_anchors(anchors, batch)
        losses = self.rpn.loss(logits, deltas, sample)
        proposals = self.rpn.propose(logits, deltas, anchors, batch.sizes)
        pyramid = self.pooled_levels(features, areas)
        regions: Any = proposals
        sampled: list[tuple[Regions, ...]] = []
        for head in self.heads:
            head_losses, regions = head.step(pyramid, regions, batch)
            losses |= head_losses
            sampled.append(regions)
        first, *later = sampled[0]
        return Step(losses, sample, proposals, first, tuple(later))

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        """Detect objects; boxes in canvas pixels, with masks if there is a mask head.  Arguments as in Batch."""
        proposals, pyramid = self._propose(images, sizes, padded)
        found: Any = proposals
        for head in self.heads:
            found = head.detect(pyramid, found, sizes)
        return found

    def _propose(self, images: Tensor, sizes: Tensor, padded: bool) -> tuple[Proposals, Pyramid]:
        """Return the proposals and the levels that the heads pool from."""
        features, areas = self.features(images, sizes, padded)
        logits, deltas = self.rpn(features, areas)
        anchors = self.rpn.anchors(features, areas, images.shape[2:])
        proposals = self.rpn.propose(logits, deltas, anchors, sizes)
        return proposals, self.pooled_levels(features, areas)

    def pooled_levels(self, features: list[Tensor], areas: ValidAreas) -> Pyramid:
        """Return the levels that the heads pool from; RoIAlign finds the edges of masked pictures repeated."""
        strides = self.strides[:ROI_LEVELS]
        valid = [areas[stride] for stride in strides] if self.extends_edges else []
        sizes = [area.sizes for area in valid if area is not None]
        return extended(Pyramid(features[:ROI_LEVELS], strides, sizes or None, self.backbone.last_stage))

    # --- for inspection: norm statistics, calibration, the proof of batch independence

    def probe(self, images: Tensor, sizes: Tensor, padded: bool, *, copies: int = 1, regions: bool = True) -> None:
        """Run images through the pyramid and the RPN, and the best proposals of each image through the heads."""
        if not regions:
            self.rpn(*self.features(images, sizes, padded))
            return
        proposals, pyramid = self._propose(images, sizes, padded)
        first = Proposals(*(field[: len(images) // copies, :PROBED_REGIONS] for field in proposals))
        best = first.boxes[:, :1]  # fills empty slots
        boxes = torch.where(first.valid[..., None], first.boxes, best)  # (B, R, 4)
        boxes = torch.cat([boxes] * copies)
        features = self.heads[0].shared(pyramid, boxes)
        for head in self.heads:
            head.probe(pyramid, boxes, features)

    def choices(self, step: Step, image: int) -> Choices:
        """Return the sampled anchors, the proposals and the sampled regions of an image as ids."""

        def chosen(valid: Tensor, *columns: Tensor) -> set[tuple[int, ...]]:
            rows = [column[image][valid[image]].long() for column in columns]
            return set(map(tuple, torch.stack(rows, dim=1).tolist()))

        anchors, proposals = step.anchors, step.proposals
        found = {
            "sampled anchors": chosen(anchors.valid, anchors.ids, anchors.positive),
            "proposals": chosen(proposals.valid, proposals.ids),
        }
        for i, regions in enumerate((step.regions, *step.later)):
            level = pyramid_level(regions.boxes, len(self.strides[:ROI_LEVELS]))  # that each region is pooled from
            kind = f"regions of stage {i}" if i else "sampled regions"
            found[kind] = chosen(regions.valid, regions.ids, regions.labels, regions.matched, level)
        return found

    def rectified(self) -> Rectified:
        """Return the layers of the backbone, the RPN and the first head, which the regions of a Step belong to."""
        maps, regions = self.backbone.rectified()
        return Rectified([*maps, *self.rpn.convs], [*regions, *self.heads[0].rectified()])

    def sees_regions(self, module: str) -> bool:
        """Return whether the module belongs to a head, or to a stage of the backbone that runs on regions."""
        stages = {id(stage) for stage in self.backbone.after_maps()}
        names = [f"backbone.{name}" for name, child in self.backbone.named_children() if id(child) in stages]
        return f"{module}.".startswith(tuple(f"{name}." for name in (*self.head_names, *names)))

    def after_features(self) -> list[nn.Module]:
        """Return the RPN, the stages of the backbone that run on regions, and the heads."""
        return [self.rpn, *self.backbone.after_maps(), *self.heads]

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""
        self.backbone.choose_convolutions(shortest_edge)
        self.neck.choose_convolutions(shortest_edge)
        for part in [self.rpn, *self.heads]:  # they see maps of all sizes or many regions
            choose_ways(part, max(shortest_edge / self.strides[:2][-1], SMALLEST))
