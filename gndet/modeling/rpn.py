"""Region proposal network on a pyramid or on one level (Ren et al. 2015; Lin et al. 2017).

B images, M ground-truth slots, N anchors of all levels, K proposals, A anchors per cell, L levels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import RPNConfig
from gndet.modeling.anchors import cell_anchors, pyramid_anchors
from gndet.modeling.conv_norm import conv_factory
from gndet.modeling.norms.valid_area import ValidArea, ValidAreas
from gndet.modeling.recompute import recomputed, tower
from gndet.ops.boxes import clip_boxes, decode, encode, full, gather_rows
from gndet.ops.losses import smooth_l1, sum_per_image
from gndet.ops.matching import best, match, nms_keep, ranks, sample_balanced
from gndet.ops.noise import Stream
from gndet.structures import Anchors, AnchorSample, Batch, Proposals

DELTA_WEIGHTS = (1.0, 1.0)  # scales of (dx, dy) and (dw, dh)


class RPN(nn.Module):
    """Scores and refines anchors, and proposes regions."""

    cells: Tensor

    def __init__(self, cfg: RPNConfig, norm: NormConfig, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.cfg, self.strides = cfg, tuple(strides)
        self.memory = "fast"
        on_levels = cfg.sizes_by_level(len(self.strides))  # L x the sizes of a level
        self.num_anchors = len(on_levels[0]) * len(cfg.aspect_ratios)
        with torch.device("cpu"):  # no checkpoint has them, so they exist even if the model is built on the meta device
            cells = [
                torch.cat([cell_anchors(size, cfg.aspect_ratios, stride, cfg.anchors) for size in sizes])
                for sizes, stride in zip(on_levels, self.strides, strict=True)
            ]
        self.register_buffer("cells", torch.stack(cells), persistent=False)  # (L, A, 4) float32
        conv = conv_factory(norm)
        self.convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(cfg.num_convs))
        self.objectness = nn.Conv2d(channels, self.num_anchors, 1)
        self.deltas = nn.Conv2d(channels, self.num_anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor], areas: ValidAreas) -> tuple[list[Tensor], list[Tensor]]:
        """Return the objectness logits L x (B, H * W * A) and deltas L x (B, H * W * A, 4) of P2..P6, float32."""
        logits, deltas = [], []
        for feature, stride in zip(features, self.strides, strict=True):
            score, delta = recomputed(self, self._predict, feature, areas[stride])
            logits.append(score)
            deltas.append(delta)
        return logits, deltas

    def _predict(self, feature: Tensor, area: ValidArea | None) -> tuple[Tensor, Tensor]:
        x = tower(self.convs, feature, [area] * len(self.convs))
        logits = full(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
        return logits, full(self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))

    def anchors(self, features: Sequence[Tensor], areas: ValidAreas, canvas: Sequence[int]) -> Anchors:
        """Return the anchors of maps L x (B, C, H, W); areas: of the pictures, by stride; canvas (height, width)."""
        cfg, by_canvas = self.cfg, self.cfg.anchor_stride == "canvas"  # torchvision's: not 64 on P6 of every canvas
        where = self.cells, self.strides, features, areas, canvas
        return pyramid_anchors(*where, in_padding=cfg.anchors_in_padding, by_canvas=by_canvas)

    @torch.no_grad()
    def sample_anchors(self, anchors: Anchors, batch: Batch) -> AnchorSample:
        """Sample anchors_per_image anchors of each image, with their regression targets."""
        cfg, gt = self.cfg, batch.gt
        boxes, ids = torch.cat(anchors.boxes), torch.cat(anchors.ids)  # (N, 4), (N,)
        inside = torch.cat(anchors.inside, 1)
        if not cfg.straddling_anchors:
            inside = inside & (clip_boxes(boxes[None], batch.sizes) == boxes).all(-1)
        limits = cfg.negative_iou, cfg.positive_iou
        matched, label = match(gt.boxes, gt.valid, boxes[None], inside, *limits, keep_best=True)
        order = ranks(batch.keys, Stream.ANCHORS, ids)
        index, positive, valid = sample_balanced(label, order, cfg.anchors_per_image, cfg.positive_fraction)
        targets = encode(gather_rows(gt.boxes, matched.gather(1, index)), boxes[index], DELTA_WEIGHTS)
        return AnchorSample(index, ids[index], targets, positive, valid)

    def loss(self, logits: list[Tensor], deltas: list[Tensor], sample: AnchorSample) -> dict[str, Tensor]:
        """Return the losses (B,) of the sampled anchors, each image's divided by anchors_per_image."""
        score = torch.cat(logits, 1).gather(1, sample.index)
        delta = gather_rows(torch.cat(deltas, 1), sample.index)
        cls = F.binary_cross_entropy_with_logits(score, sample.positive.to(score.dtype), reduction="none")
        difference = torch.where(sample.positive[..., None], delta - sample.targets, 0.0)
        loc = smooth_l1(difference, self.cfg.loss_beta).sum(-1)
        return {
            "loss_rpn_cls": sum_per_image(cls, sample.valid) / self.cfg.anchors_per_image,
            "loss_rpn_loc": sum_per_image(loc, sample.positive) / self.cfg.anchors_per_image,
        }

    @torch.no_grad()
    def propose(self, logits: list[Tensor], deltas: list[Tensor], anchors: Anchors, sizes: Tensor) -> Proposals:
        """Return the best regions of each image after NMS per level; more in training than in evaluation.

        sizes (B, 2) of the pictures, to which the boxes are clipped.
        """
        pre = self.cfg.pre_nms_train if self.training else self.cfg.pre_nms_test
        post = self.cfg.post_nms_train if self.training else self.cfg.post_nms_test
        logit = torch.cat(logits, 1)  # (B, N)
        logit = torch.where(torch.cat(anchors.inside, 1) & logit.isfinite(), logit, -torch.inf)
        first, scores, places = 0, [], []
        for level in logits:
            score, place = best(logit[:, first : first + level.shape[1]], pre)
            scores.append(score)
            places.append(first + place)
            first += level.shape[1]
        num, total = scores[0].shape[1], sum(score.shape[1] for score in scores)
        padding = [(0, num - score.shape[1]) for score in scores]  # to the finest level, which has the most anchors
        score = torch.cat([F.pad(x, pad, value=-torch.inf) for x, pad in zip(scores, padding, strict=True)], 1)
        index = torch.cat([F.pad(x, pad) for x, pad in zip(places, padding, strict=True)], 1)  # (B, L * num)
        boxes = decode(gather_rows(torch.cat(deltas, 1), index), torch.cat(anchors.boxes)[index], DELTA_WEIGHTS)
        boxes = clip_boxes(boxes, sizes, to_pixels=self.cfg.clip == "pixels")
        valid = (score > -torch.inf) & (boxes[..., 2:] - boxes[..., :2] > self.cfg.min_size).all(-1)
        levels = (x.reshape(-1, num, *x.shape[2:]) for x in (boxes, score, torch.zeros_like(index), valid))
        keep = nms_keep(*levels, self.cfg.nms_threshold)  # (B * L, num): each level of each image by itself
        score, place = best(torch.where(keep.view_as(score), score, -torch.inf), post)
        score, place = score[:, :total], place[:, :total]  # without padding
        ids = torch.cat(anchors.ids)[index.gather(1, place)]
        return Proposals(gather_rows(boxes, place), ids, score > -torch.inf)
