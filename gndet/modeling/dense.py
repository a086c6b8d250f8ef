"""Dense detectors: FCOS, with ATSS, and RetinaNet.  They find boxes at the cells of a pyramid P3..P7, without regions.

B images, N anchors of all levels, (H, W) canvas.

Batch independence: as dense_head.py says; the pyramid keeps the padding out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.conv_norm import choose_ways
from gndet.modeling.dense_head import Assignment, DenseHead
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.fpn import FPN
from gndet.modeling.image_model import Choices, Features, Rectified
from gndet.modeling.norms.valid_area import ValidAreas
from gndet.structures import Batch, Detections


class DenseStep(NamedTuple):
    """The result of a training forward: the losses, and what each anchor was trained on."""

    losses: dict[str, Tensor]  # {name: (B,)}, one loss per image
    ids: Tensor  # (N,) int64, Anchors.ids
    assigned: Assignment


class DenseDetector(DetectionModel):
    """Backbone, pyramid, and a head on all levels."""

    def __init__(
        self, backbone: Any, fpn: FPN, head: DenseHead, *, pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:  # fmt: skip
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.fpn, self.dense, self.strides = fpn, head, fpn.strides

    def features(self, images: Tensor, sizes: Tensor, padded: bool, keys: Tensor | None = None) -> Features:
        """Return P3..P7 of images (B, 3, H, W) uint8 RGB whose pictures have sizes (B, 2), and the pictures' areas."""
        x, areas = self.normalize(images, sizes, padded)
        return self.fpn(self.backbone(x, areas, keys), areas), areas

    def step(self, features: list[Tensor], areas: ValidAreas, batch: Batch) -> DenseStep:
        """Run the training forward pass after P3..P7: loss_cls, loss_box_reg, loss_quality."""
        predicted = self.dense(features, areas)
        anchors = self.dense.anchors(features, areas, batch.images.shape[2:])
        assigned = self.dense.assign(anchors, batch.gt)
        losses = self.dense.loss(predicted, anchors, assigned, batch.gt)
        return DenseStep(losses, torch.cat(anchors.ids), assigned)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        """Detect objects; boxes in canvas pixels, without masks.  Arguments as in Batch."""
        features, areas = self.features(images, sizes, padded)
        anchors = self.dense.anchors(features, areas, images.shape[2:])
        return self.dense.detect(self.dense(features, areas), anchors, sizes)

    # --- for inspection: norm statistics, calibration, the proof of batch independence

    def probe(self, images: Tensor, sizes: Tensor, padded: bool, *, copies: int = 1, regions: bool = True) -> None:
        """Run images through the pyramid and the head, which has no layers on regions."""
        self.dense(*self.features(images, sizes, padded))

    def choices(self, step: DenseStep, image: int) -> Choices:
        """Return the positive anchors of an image as ids, with their objects."""
        label, matched = step.assigned.label[image], step.assigned.matched[image]
        positive = label == 1
        rows = torch.stack([step.ids[positive], matched[positive]], dim=1)
        return {"positive anchors": set(map(tuple, rows.tolist()))}

    def rectified(self) -> Rectified:
        """Return the layers of the backbone and of the head's towers."""
        return Rectified([*self.backbone.rectified().maps, *self.dense.cls_convs, *self.dense.box_convs], [])

    def sees_regions(self, module: str) -> bool:
        """Return False: every module runs on whole maps."""
        return False

    def after_features(self) -> list[nn.Module]:
        """Return the head."""
        return [self.dense]

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""
        self.backbone.choose_convolutions(shortest_edge)
        self.fpn.choose_convolutions(shortest_edge)
        choose_ways(self.dense, shortest_edge / self.strides[0])  # most of its cells are on the finest level
