"""A small detector and a synthetic batch for tests of the model and the training step."""

import torch

from gndet.config.cascade import CascadeConfig
from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig, BoxHeadConfig, FPNConfig, MaskHeadConfig, RPNConfig
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.ops.boxes import clip_boxes
from gndet.ops.noise import hash_ints
from gndet.structures import Batch, GroundTruth

NUM_CLASSES = 5


def small_config(norm: NormConfig | None = None, **changes: object) -> ModelConfig:
    """Return the config of a ResNet-18 Mask R-CNN with narrow heads."""
    return ModelConfig(
        norm=norm or NormConfig(channels_per_group=16),
        backbone=BackboneConfig(depth=18),
        fpn=FPNConfig(channels=32),
        rpn=RPNConfig(anchor_sizes=(16, 32, 64, 96, 128), anchors_per_image=64, pre_nms_train=100, post_nms_train=50),
        box_head=BoxHeadConfig(conv_channels=32, num_convs=1, fc_channels=64, regions_per_image=32),
        mask_head=MaskHeadConfig(channels=32, num_convs=1),
    ).model_copy(update=changes)


def small_model(norm: NormConfig | None = None, seed: int = 0, **changes: object) -> MaskRCNN:
    torch.manual_seed(seed)
    return build_model(small_config(norm, **changes), NUM_CLASSES)


def cascade_model(seed: int = 0, box_head: dict[str, object] | None = None, **options: object) -> MaskRCNN:
    """Return a small Cascade Mask R-CNN; options: of model.cascade."""
    own = {"class_agnostic": True, **(box_head or {})}
    changes = {"detector": "cascade_rcnn", "cascade": CascadeConfig(**options)}
    return small_model(seed=seed, **changes, box_head=small_config().box_head.model_copy(update=own))


def make_batch(sizes: list[tuple[int, int]], canvas: tuple[int, int] | None = None, first: int = 0) -> Batch:
    """Make a batch of pictures of the given (height, width); picture i has i + 1 objects, the fourth has none.

    Picture number first + i does not depend on its batch.
    """
    height, width = canvas or (max(h for h, _ in sizes), max(w for _, w in sizes))
    batch = len(sizes)
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    boxes = torch.zeros(batch, 8, 4)
    masks = torch.zeros(batch, 8, 112, 112, dtype=torch.bool)
    labels, valid = torch.zeros(batch, 8, dtype=torch.long), torch.zeros(batch, 8, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        generator = torch.Generator().manual_seed(first + i)
        images[i, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator).to(torch.uint8)
        count = 0 if first + i == 3 else first + i + 1
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([w, h]) * 0.6
        far = corner + 12 + torch.rand(count, 2, generator=generator) * 50
        size = torch.tensor([[h, w]])
        boxes[i, :count] = clip_boxes(torch.cat([corner, far], dim=1)[None], size)[0]
        labels[i, :count] = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        masks[i, :count] = torch.rand(count, 112, 112, generator=generator) > 0.3
        valid[i, :count] = True
    keys = torch.tensor([hash_ints(0, 0, first + i) for i in range(batch)])
    padded = any(size != (height, width) for size in sizes)
    return Batch(images, torch.tensor(sizes), keys, GroundTruth(boxes, labels, masks, valid), padded)


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Return images first to last - 1 of a batch, on the same canvas."""
    gt = GroundTruth(*(field[first:last] for field in batch.gt))
    return Batch(batch.images[first:last], batch.sizes[first:last], batch.keys[first:last], gt, batch.padded)
