"""Head of the dense detectors: two towers that score the classes and find the box at every anchor of the pyramid.

FCOS (Tian et al. 2019) with its own assignment or that of ATSS (Zhang et al. 2020), and RetinaNet (Lin et al. 2017).
B images, M ground-truth slots, N anchors of all levels (N_l of one), A anchors per cell, K classes, L levels.

Batch independence: anchors in the padding are neither assigned nor trained nor detected, nothing is sampled, and an
image's losses are divided by a constant or by its own number of positives, never by that of a batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.dense import DenseConfig
from gndet.config.norm import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.anchors import cell_anchors, pyramid_anchors
from gndet.modeling.conv_norm import conv_factory
from gndet.modeling.norms.valid_area import ValidArea, ValidAreas
from gndet.modeling.recompute import recomputed, tower
from gndet.ops.assigning import assign_atss, assign_centers, centerness
from gndet.ops.boxes import centers, clip_boxes, decode, encode, full, gather_rows, paired_iou
from gndet.ops.losses import focal_loss, giou_loss, mean_per_image, sum_per_image
from gndet.ops.matching import best, match, nms_keep
from gndet.structures import Anchors, Detections, GroundTruth

DELTA_WEIGHTS = (1.0, 1.0)  # scales of (dx, dy) and (dw, dh)
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017, table 1b), the same in every toolkit


class Predicted(NamedTuple):
    """What the head predicts at the anchors of a level, or a list of them per level."""

    logits: Tensor  # (B, N_l, K) float32 of the classes
    boxes: Tensor  # (B, N_l, 4) float32: distances in strides, or deltas
    quality: Tensor | None  # (B, N_l) float32 logits


class Assignment(NamedTuple):
    """What each anchor is trained on."""

    label: Tensor  # (B, N) int64: 1 positive, 0 background, -1 not trained
    matched: Tensor  # (B, N) int64 slot of the ground truth, meaningful if positive


class DenseHead(nn.Module):
    """Two towers of convolutions, shared by all levels, with their norm per image and level."""

    cells: Tensor

    def __init__(
        self, cfg: DenseConfig, norm: NormConfig, channels: int, strides: Sequence[int], num_classes: int, *,
        distances: bool,
    ) -> None:  # fmt: skip
        """distances: a box is the distances from the anchor's center to its sides (FCOS), not deltas of the anchor."""
        super().__init__()
        self.cfg, self.strides, self.num_classes, self.distances = cfg, tuple(strides), num_classes, distances
        self.memory = "fast"
        with torch.device("cpu"):  # no checkpoint has them, so they exist even if the model is built on the meta device
            levels = zip(cfg.anchor_sizes, self.strides, strict=True)
            cells = torch.stack([level_cell(cfg, size, stride) for size, stride in levels])
        self.register_buffer("cells", cells, persistent=False)  # (L, A, 4) float32
        conv = conv_factory(norm)
        self.cls_convs, self.box_convs = (
            nn.ModuleList(conv(channels, channels, 3, bias=cfg.conv_bias) for _ in range(cfg.num_convs))
            for _ in range(2)
        )
        self.cls_logits = nn.Conv2d(channels, num_classes * cfg.kinds, 3, padding=1)  # by class, then by kind
        self.boxes = nn.Conv2d(channels, cfg.kinds * 4, 3, padding=1)
        self.quality = None if cfg.quality == "none" else nn.Conv2d(channels, cfg.kinds, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - cfg.prior) / cfg.prior))

    def forward(self, features: Sequence[Tensor], areas: ValidAreas) -> list[Predicted]:
        """Return the predictions of maps L x (B, C, H, W); areas: of the pictures, by stride."""
        levels = zip(features, self.strides, strict=True)
        return [Predicted(*recomputed(self, self._predict, feature, areas[stride])) for feature, stride in levels]

    def _predict(self, feature: Tensor, area: ValidArea | None) -> tuple[Tensor, Tensor, Tensor | None]:
        num, kinds = len(feature), self.cfg.kinds
        x = tower(self.cls_convs, feature, [area] * len(self.cls_convs))
        logits = self.cls_logits(x).unflatten(1, (-1, kinds)).permute(0, 3, 4, 2, 1)  # (B, H, W, A, K)
        x = tower(self.box_convs, feature, [area] * len(self.box_convs))
        boxes = full(self.boxes(x).permute(0, 2, 3, 1).reshape(num, -1, 4))
        quality = None if self.quality is None else full(self.quality(x).permute(0, 2, 3, 1).flatten(1))
        return full(logits.reshape(num, -1, self.num_classes)), boxes, quality

    def anchors(self, features: Sequence[Tensor], areas: ValidAreas, canvas: Sequence[int]) -> Anchors:
        """Return the anchors of maps L x (B, C, H, W); areas: of the pictures, by stride; canvas (height, width)."""
        cfg, by_canvas = self.cfg, self.cfg.anchor_stride == "canvas"
        where = self.cells, self.strides, features, areas, canvas
        return pyramid_anchors(*where, in_padding=cfg.anchors_in_padding, by_canvas=by_canvas)

    @torch.no_grad()
    def assign(self, anchors: Anchors, gt: GroundTruth) -> Assignment:
        """Say which object each anchor is trained on; a function of boxes and objects alone."""
        cfg, inside = self.cfg, torch.cat(anchors.inside, 1)
        if cfg.assign == "iou":
            boxes, limits = torch.cat(anchors.boxes), (cfg.negative_iou, cfg.positive_iou)
            matched, label = match(gt.boxes, gt.valid, boxes[None], inside, *limits, keep_best=True)
            return Assignment(label, matched)
        given = gt.boxes, gt.valid, anchors.boxes, anchors.inside
        if cfg.assign == "atss":
            matched, positive = assign_atss(*given, cfg.candidates * cfg.kinds)
        else:
            matched, positive = assign_centers(*given, self.strides, cfg.center_radius)
        return Assignment(torch.where(inside, positive.long(), -1), matched)

    def loss(
        self, predicted: Sequence[Predicted], anchors: Anchors, assigned: Assignment, gt: GroundTruth
    ) -> dict[str, Tensor]:
        """Return the losses (B,): loss_cls, loss_box_reg, and loss_quality if it is trained."""
        cfg, positive = self.cfg, assigned.label == 1
        divisor = self._divisor(positive)
        sizes = [len(level) for level in anchors.boxes]
        classes = torch.where(positive, gt.labels.gather(1, assigned.matched), -1).split(sizes, 1)
        trained = (assigned.label >= 0).split(sizes, 1)
        levels = zip((level.logits for level in predicted), classes, trained, strict=True)
        cls = sum(recomputed(self, _class_loss, *level, cheap=True) for level in levels)

        places, raw = torch.cat(anchors.boxes), torch.cat([level.boxes for level in predicted], 1)
        parts = self._levels(predicted, anchors)
        decoded = [self._decode(level.boxes, place, stride) for level, place, stride in parts]
        # a box without an object stands for itself: with zero loss, and with finite gradients
        target = torch.where(positive[..., None], gather_rows(gt.boxes, assigned.matched), places)
        boxes = torch.where(positive[..., None], torch.cat(decoded, 1), places)
        central = centerness(target, places).to(raw.dtype)
        if cfg.box_loss == "giou":
            loc = giou_loss(boxes, target)
        else:
            difference = raw - encode(target, places, DELTA_WEIGHTS)
            loc = torch.where(positive[..., None], difference, 0.0).abs().sum(-1)
        if cfg.weigh_by_centerness:  # the weights of an image's positives have mean 1
            loc = loc * central / mean_per_image(central, positive).clamp(min=1e-6)[:, None]
        losses = {"loss_cls": cls / divisor, "loss_box_reg": cfg.box_weight * sum_per_image(loc, positive) / divisor}
        if self.quality is not None:
            wanted = central if cfg.quality == "centerness" else paired_iou(boxes.detach(), target)
            logits = torch.cat([level.quality for level in predicted if level.quality is not None], 1)
            error = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
            losses["loss_quality"] = sum_per_image(error, positive) / divisor
        return losses

    def _divisor(self, positive: Tensor) -> Tensor | float:
        """Return what the losses of images are divided by: a number, or (B,) of positive (B, N)."""
        if self.cfg.positives == "image":
            return positive.sum(1).clamp(min=1)
        if self.cfg.positives == "measure":
            raise ConfigError(
                "model.dense.positives: measure, which `gndet train` replaces by a number; expected a number here, the "
                "mean number of positives per image of the training set, or image"
            )
        return self.cfg.positives

    def _levels(self, predicted: Sequence[Predicted], anchors: Anchors) -> list[tuple[Predicted, Tensor, int]]:
        return list(zip(predicted, anchors.boxes, self.strides, strict=True))

    def _decode(self, raw: Tensor, anchors: Tensor, stride: int) -> Tensor:
        """Return the boxes (B, R, 4) of predictions (B, R, 4) at anchors (R, 4) or (B, R, 4) of a level."""
        if not self.distances:
            return decode(raw, anchors, DELTA_WEIGHTS)
        sides, middle = F.relu(raw) * stride, centers(anchors)
        return torch.cat([middle - sides[..., :2], middle + sides[..., 2:]], dim=-1)

    @torch.no_grad()
    def detect(self, predicted: Sequence[Predicted], anchors: Anchors, sizes: Tensor) -> Detections:
        """Return detections after NMS per class, without masks; sizes (B, 2) of the pictures."""
        cfg, levels = self.cfg, self._levels(predicted, anchors)
        found = [self._candidates(*level, cells) for level, cells in zip(levels, anchors.inside, strict=True)]
        scores, boxes, labels = (torch.cat(field, 1) for field in zip(*found, strict=True))
        scores, index = best(scores, scores.shape[1])
        whole, labels = gather_rows(boxes, index), labels.gather(1, index)
        boxes = clip_boxes(whole, sizes)
        usable = (scores > 0) & boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        keep = nms_keep(boxes if cfg.nms_boxes == "clipped" else whole, scores, labels, usable, cfg.nms_threshold)
        scores, index = best(torch.where(keep, scores, -1.0), cfg.detections_per_image)
        no_masks = boxes.new_zeros((*scores.shape, 0, 0))
        return Detections(gather_rows(boxes, index), scores.clamp(min=0), labels.gather(1, index), no_masks, scores > 0)

    def _candidates(
        self, predicted: Predicted, anchors: Tensor, stride: int, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best scores (B, P) of a level, -1 for none, with boxes (B, P, 4) and labels (B, P).

        The P best of all anchors and classes lie in the P anchors whose best class scores highest.
        """
        cfg, quality = self.cfg, predicted.quality
        top = _scores(predicted.logits.amax(-1), quality)
        _, place = best(torch.where(inside & top.isfinite(), top, -1.0), cfg.pre_nms)
        place = place.sort(dim=1, stable=True).values  # so that equal scores keep the order of the anchors
        logits, quality = gather_rows(predicted.logits, place), None if quality is None else quality.gather(1, place)
        scores = _scores(logits, None if quality is None else quality[..., None])  # (B, P, K)
        usable = inside.gather(1, place)[..., None] & (scores > cfg.score_threshold)
        scores, index = best(torch.where(usable, scores, -1.0).flatten(1), cfg.pre_nms)
        place, label = place.gather(1, index // self.num_classes), index % self.num_classes
        return scores, self._decode(gather_rows(predicted.boxes, place), anchors[place], stride), label


def level_cell(cfg: DenseConfig, size: float, stride: int) -> Tensor:
    """Return the anchors of a level's first cell, (A, 4) xyxy pixels, scale by scale."""
    sides = [size * scale for scale in cfg.scales]
    if cfg.anchors == "rounded":  # torchvision also drops the fractions of the sides
        sides = [math.floor(side) for side in sides]
    cell = torch.cat([cell_anchors(side, cfg.aspect_ratios, stride, cfg.anchors) for side in sides])
    return cell + cfg.offset * stride


def _class_loss(logits: Tensor, classes: Tensor, trained: Tensor) -> Tensor:
    """Return the focal loss (B,) of logits (B, N, K) for classes (B, N), -1 for background, where trained (B, N)."""
    target = classes[..., None] == torch.arange(logits.shape[2], device=logits.device)
    return sum_per_image(focal_loss(logits, target, ALPHA, GAMMA).sum(-1), trained)


def _scores(logits: Tensor, quality: Tensor | None) -> Tensor:
    """Return class scores in [0, 1], with the quality as the geometric mean of both (FCOS's code; torchvision)."""
    return logits.sigmoid() if quality is None else (logits.sigmoid() * quality.sigmoid()).sqrt()
