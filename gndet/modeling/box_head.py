"""Box head: classifies regions and refines their boxes.

B images, M ground-truth slots, K proposals, R regions per image, D detections; the background's label is num_classes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import BoxHeadConfig
from gndet.modeling.conv_norm import conv_factory, initialize
from gndet.modeling.detection_model import RegionHead, image_index, region_features
from gndet.modeling.recompute import recomputed, tower
from gndet.ops.boxes import clip_boxes, decode, encode, full, gather_rows
from gndet.ops.losses import mean_per_image, smooth_l1, sum_per_image
from gndet.ops.matching import best, match, nms_keep, ranks, sample_balanced
from gndet.ops.noise import Stream, hash_ints
from gndet.ops.roi_align import Pyramid
from gndet.structures import GROUND_TRUTH_IDS, Batch, Detections, GroundTruth, Proposals, Regions

DELTA_WEIGHTS = (10.0, 5.0)  # scales of (dx, dy) and (dw, dh), as in Detectron
MAX_CANDIDATES = 2000  # best class-wise boxes per image that enter NMS; ten times what COCO images have


class BoxHead(RegionHead):
    """2fc (Lin et al. 2017) or 4conv1fc (Wu & He 2018), then class scores, and box deltas per class or for all.

    A norm per region gives every group of channels the same energy, whatever the region shows.  Before the linear
    layer this takes away how strongly a feature is there; `norm_last` false leaves out that norm (docs/results.md).
    """

    def __init__(
        self, cfg: BoxHeadConfig, norm: NormConfig, channels: int, num_classes: int, *,
        stage: int = 0, delta_weights: tuple[float, float] = DELTA_WEIGHTS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cfg, self.num_classes, self.memory = cfg, num_classes, "fast"
        self.stage, self.delta_weights = stage, delta_weights  # of a cascade
        self.num_boxes = 1 if cfg.class_agnostic else num_classes  # per region
        num_convs, num_fcs = self.layers()
        norms = [norm] * num_convs
        if norms and not cfg.norm_last:
            norms[-1] = NormConfig(kind="none")
        self.convs = nn.ModuleList()
        for i, norm_of_layer in enumerate(norms):
            layer = conv_factory(norm_of_layer, regions=True)(
                channels, cfg.conv_channels, 3, cheap=i == cfg.num_convs - 1
            )
            initialize(layer)
            self.convs.append(layer)
            channels = cfg.conv_channels
        width = self.flat_channels(channels)
        self.fcs = nn.ModuleList()
        for _ in range(num_fcs):
            fc = nn.Linear(width, cfg.fc_channels)
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
            self.fcs.append(fc)
            width = cfg.fc_channels
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, self.num_boxes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def layers(self) -> tuple[int, int]:
        """Return the numbers of convolutions and of hidden linear layers."""
        return self.cfg.layers

    def flat_channels(self, channels: int) -> int:
        """Return the number of values of a region that enter the linear layers, from maps of that many channels."""
        return channels * self.cfg.pool_size**2

    def flat(self, x: Tensor) -> Tensor:
        """Turn maps (R, C, P, P) into the values (R, flat_channels(C)) that enter the linear layers."""
        return x.flatten(1)

    def forward(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map boxes (B, R, 4) on P2..P5 to class logits (B, R, num_classes + 1) and deltas (B, R, num_boxes, 4).

        features: what `shared` returned for the boxes, if it was called.
        """
        return recomputed(self, self._predict, pyramid, boxes, features)

    def _predict(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        num_images, num_regions = boxes.shape[:2]
        image = image_index(num_images, num_regions, boxes.device)
        pool = partial(region_features, pyramid, boxes.flatten(0, 1), image, self.cfg)
        x = pool() if features is None else features.flatten(0, 1)
        x = tower(self.convs, x, make_input=pool) if self.convs else x
        x = self.flat(x)
        for fc in self.fcs:
            x = F.relu(fc(x))
        logits = full(self.cls_score(x)).unflatten(0, (num_images, num_regions))
        deltas = full(self.bbox_pred(x)).view(num_images, num_regions, self.num_boxes, 4)
        return logits, deltas

    @torch.no_grad()
    def sample(self, regions: Proposals, batch: Batch) -> Regions:
        """Sample regions_per_image of the proposals and the ground truth, positives first.

        The random order depends on a proposal's anchor and not on its position, so that one proposal more or less does
        not change how the others are sampled.
        """
        cfg, gt = self.cfg, batch.gt
        objects = torch.arange(gt.boxes.shape[1], device=gt.boxes.device) + GROUND_TRUTH_IDS
        ids = torch.cat([regions.ids, objects.expand(len(gt.boxes), -1)], dim=1)  # (B, K + M)
        boxes = torch.cat([regions.boxes, gt.boxes], dim=1)
        valid = torch.cat([regions.valid, gt.valid], dim=1)
        matched, label = match(gt.boxes, gt.valid, boxes, valid, cfg.positive_iou, cfg.positive_iou, keep_best=False)
        keys = batch.keys ^ hash_ints(self.stage) if self.stage else batch.keys  # each stage draws anew
        order = ranks(keys, Stream.REGIONS, ids)
        index, positive, chosen = sample_balanced(label, order, cfg.regions_per_image, cfg.positive_fraction)
        chosen_boxes = Proposals(gather_rows(boxes, index), ids.gather(1, index), chosen)
        positive_slots = max(int(cfg.regions_per_image * cfg.positive_fraction), 1)
        return self._labeled(chosen_boxes, gt, matched.gather(1, index), positive, positive_slots)

    @torch.no_grad()
    def take_all(self, regions: Proposals, batch: Batch) -> Regions:
        """Train on all regions, without the ground truth; any of them may be positive."""
        cfg, gt, (boxes, _, valid) = self.cfg, batch.gt, regions
        matched, label = match(gt.boxes, gt.valid, boxes, valid, cfg.positive_iou, cfg.positive_iou, keep_best=False)
        return self._labeled(regions, gt, matched, label == 1, boxes.shape[1])

    def _labeled(
        self, regions: Proposals, gt: GroundTruth, matched: Tensor, positive: Tensor, positive_slots: int
    ) -> Regions:
        boxes, ids, valid = regions
        labels = torch.where(positive, gt.labels.gather(1, matched), self.num_classes)
        boxes = torch.where(valid[..., None], boxes, torch.zeros((), device=boxes.device))
        return Regions(boxes, ids, labels, matched, positive, valid, positive_slots)

    def step(self, pyramid: Pyramid, regions: Proposals, batch: Batch) -> tuple[dict[str, Tensor], tuple[Regions, ...]]:
        """Sample regions and return their losses; as `RegionHead.step`."""
        chosen = self.sample(regions, batch)
        chosen = chosen._replace(features=self.shared(pyramid, chosen.boxes))
        return self.loss(pyramid, chosen, batch), (chosen,)

    def loss(self, pyramid: Pyramid, regions: Regions, batch: Batch) -> dict[str, Tensor]:
        """Return the losses (B,) of the regions, each image's divided by its number of regions."""
        logits, deltas = self(pyramid, regions.boxes, regions.features)
        return self.losses(logits, deltas, regions, batch.gt)

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions, gt: GroundTruth) -> dict[str, Tensor]:
        """Return the losses of `loss`, given the predictions for the regions."""
        target = encode(gather_rows(gt.boxes, regions.matched), regions.boxes, self.delta_weights)
        label = regions.labels.clamp(max=self.num_boxes - 1)
        delta = deltas.gather(2, label[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]  # (B, R, 4)
        cls = F.cross_entropy(logits.flatten(0, 1), regions.labels.flatten(), reduction="none")
        loc = smooth_l1(torch.where(regions.positive[..., None], delta - target, 0.0), self.cfg.loss_beta).sum(-1)
        count = regions.valid.sum(dim=1).clamp(min=1)
        return {
            "loss_cls": mean_per_image(cls.view_as(regions.labels), regions.valid),
            "loss_box_reg": sum_per_image(loc, regions.positive) / count,
        }

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, found: Proposals, sizes: Tensor) -> Detections:
        """Return detections after NMS per class, without masks; sizes (B, 2) of the pictures."""
        logits, deltas = self.predict_all(pyramid, found.boxes)
        return self.select(logits.softmax(-1), deltas, found, sizes)

    def predict_all(self, pyramid: Pyramid, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of `forward` for all proposals (B, K, 4)."""
        logits, deltas = self(pyramid, boxes)
        return logits, deltas

    def refine(self, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Apply class-agnostic deltas (B, R, 1, 4) to boxes (B, R, 4), and clip the result to the pictures."""
        refined = decode(deltas[:, :, 0], boxes, self.delta_weights)
        return clip_boxes(refined, sizes, to_pixels=self.cfg.clip == "pixels")

    def select(self, scores: Tensor, deltas: Tensor, found: Proposals, sizes: Tensor) -> Detections:
        """Return the detections of `detect`; scores (B, K, num_classes + 1), deltas (B, K, num_boxes, 4)."""
        cfg, num_classes = self.cfg, self.num_classes
        scores = scores[..., :-1]  # (B, K, num_classes)
        usable = found.valid[..., None] & (scores > cfg.score_threshold)
        scores = torch.where(usable, scores, -1.0).flatten(1)  # (B, K * num_classes)
        scores, index = best(scores, max(MAX_CANDIDATES, cfg.detections_per_image))
        label = index % num_classes
        row = index // num_classes if cfg.class_agnostic else index
        refined = decode(deltas, found.boxes[:, :, None], self.delta_weights).flatten(1, 2)
        boxes = clip_boxes(gather_rows(refined, row), sizes, to_pixels=cfg.clip == "pixels")
        usable = (scores > 0) & boxes.isfinite().all(-1) & (boxes[..., 2:] - boxes[..., :2] > cfg.min_size).all(-1)
        keep = nms_keep(boxes, scores, label, usable, cfg.nms_threshold)
        scores = torch.where(keep, scores, -1.0)
        scores, index = best(scores, cfg.detections_per_image)
        no_masks = boxes.new_zeros((*scores.shape, 0, 0))
        return Detections(gather_rows(boxes, index), scores.clamp(min=0), label.gather(1, index), no_masks, scores > 0)

    def probe(self, pyramid: Pyramid, boxes: Tensor, features: Tensor | None) -> None:
        """Run every layer once on regions (B, R, 4)."""
        self(pyramid, boxes, features)

    def rectified(self) -> list[nn.Module]:
        """Return the convolutions and the hidden linear layers."""
        return [*self.convs, *self.fcs]
