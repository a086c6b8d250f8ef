"""`python -m benchmarks step`: time a training step of gndet and of torchvision's Mask R-CNN, forward to update.

Both have the same architecture: ResNet-50 with its stride in the 3x3 convolution, a pyramid of 5 levels with 3 anchors
per cell, 1,000 proposals out of 2,000, 512 regions per picture (at most a quarter positive), masks of 28 x 28, 80
classes.  gn: group norm everywhere, a box head of 4 convolutions.  frozen_bn: stem and first stage frozen, a box head
of 2 layers.  On a GPU a turn is a few steps, which the host may issue ahead of the GPU, as in a run; the losses are
read after the turn.  B pictures, K proposals.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as PeerMaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNConvFCHead, RPNHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from benchmarks.parts import memory_by_part
from benchmarks.report import machine, table
from benchmarks.scene import CLASSES, NEAR, PROPOSALS, Scene, make_scenes
from benchmarks.timing import WARM_UPS, timed
from benchmarks.turns import WALL, Subject, Work, take_turns
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.segmentation import box_frame_masks
from gndet.data.records import MASK_SIDE
from gndet.distributed.process import Process, keep_freed_memory, place, process
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.recompute import set_memory
from gndet.structures import Batch, GroundTruth, Proposals
from gndet.training.memory import MIB
from gndet.training.optim import make_optimizer
from gndet.training.setup import compiled
from gndet.training.update import backward, buckets_for, to_device

RATE = 1e-6  # learning rate of both: the weights change, but the losses do not diverge
BATCHES = 2  # a subject alternates between so many batches
STEPS = {"cpu": 1, "cuda": 4}  # per turn
Losses = dict[str, Tensor]
SETTINGS = {  # {--norm: options of gndet's model}
    "gn": {"norm": {"kind": "gn"}, "backbone": {"depth": 50}, "box_head": {"kind": "4conv1fc"}},
    "frozen_bn": {
        "norm": {"kind": "none"}, "backbone": {"depth": 50, "norm": {"kind": "frozen_bn"}, "freeze_at": 2},
        "box_head": {"kind": "2fc"},
    },
}  # fmt: skip


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time the step of each gndet variant and of torchvision, or show gndet's memory by part."""
    cfgs = {name: step_config(options, overrides) for name, overrides in variants(options).items()}
    height, width = options.size
    say(f"training step: {height}x{width}, {options.batch} picture(s), {options.norm}, {options.precision}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here")
    if options.memory:
        for name, cfg in cfgs.items():
            say(f"\n{name} on {options.device}, MiB\n{step_memory(cfg, options.size)}")
        return
    subjects = [Subject(name, gndet_subject, (cfg, options.size)) for name, cfg in cfgs.items()]
    peer = (options.norm, options.size, options.batch, options.precision, options.device)
    subjects.append(Subject("torchvision", torchvision_subject, (*peer, False)))
    if options.tuned:
        subjects.append(Subject("torchvision, tuned", torchvision_subject, (*peer, True)))
    turns = take_turns(subjects, options.rounds, threads=options.threads, say=say)
    facts = ("loss", "CUDA MiB", "first CUDA MiB") if options.device == "cuda" else ("loss",)
    say(f"\n{machine(options.threads)}")
    say(table(turns, against="torchvision", per=STEPS[options.device], facts=facts))


def variants(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the overrides of each gndet subject by name: one subject, or one per value of --vary."""
    if options.vary is None:
        return {"gndet": options.overrides}
    key, values = options.vary
    return {f"gndet {key.rpartition('.')[2]}={value}": [*options.overrides, f"{key}={value}"] for value in values}


def step_config(options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """Return gndet's config for the shared work, with overrides applied.  Raises ConfigError for a wrong override."""
    train = {
        "global_batch": options.batch, "images_per_gpu": options.batch, "precision": options.precision,
        "optimizer": {"lr": RATE},
    }  # fmt: skip
    tree = {"model": SETTINGS[options.norm], "train": train, "device": options.device}
    return with_overrides(config_from_dict(tree, "benchmarks step"), overrides, "benchmarks step")


# --- gndet


def gndet_subject(cfg: Config, size: tuple[int, int]) -> Work:
    """Return gndet's step on synthetic pictures."""
    batches = [make_scenes(size, cfg.train.global_batch, number) for number in range(BATCHES)]
    _, step = gndet_step(cfg, [to_batch(scenes) for scenes in batches], [near(scenes) for scenes in batches])
    return work(step, cfg.device)


def gndet_step(
    cfg: Config, batches: Sequence[Batch], near: Sequence[Tensor], num_near: int = NEAR
) -> tuple[DetectionModel, Callable[[], Losses]]:
    """Return a model, and a function that trains it on the next batch, as a run does, and returns the update's losses.

    near: (B, K, 4) boxes of each batch; the first num_near precede the model's own proposals.  num_near 0: leave the
    model's proposals alone.
    """
    model, autocast = gndet_model(cfg)
    device = model.pixel_mean.device
    optimizer = make_optimizer(cfg.train.optimizer, model)
    if device.type == "cuda":
        batches = [pinned(batch) for batch in batches]
    if cfg.data.canvases:  # whose batches a run takes to be padded
        batches = [batch._replace(padded=True) for batch in batches]
    boxes = [batch_boxes.to(device) for batch_boxes in near]
    current = boxes[0].clone()
    if num_near:
        guide(model, current, num_near)
    forward, buckets = compiled(model, cfg.train, device), buckets_for(cfg, model, Process(0, 1, device))
    number = 0

    def step() -> Losses:
        nonlocal number
        index = number % len(batches)
        number += 1
        current.copy_(boxes[index])
        model.zero_grad() if buckets is None else buckets.clear()
        losses = backward(forward, autocast, [batches[index]], cfg.train.global_batch, cfg)
        nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        return losses

    return model, step


def pinned(batch: Batch) -> Batch:
    """Return a batch in memory that a GPU reads while the host goes on, as the data loader returns it."""
    images, sizes, keys = (field.pin_memory() for field in batch[:3])
    return Batch(images, sizes, keys, GroundTruth(*(field.pin_memory() for field in batch.gt)), batch.padded)


def gndet_model(cfg: Config) -> tuple[DetectionModel, Callable[[], AbstractContextManager]]:
    """Return the untrained model of a config on its device, as in a run, and the autocast context for it."""
    with process(cfg.device) as proc:  # its settings stay in force afterwards
        torch.manual_seed(cfg.seed)
        model, autocast = place(build_model(cfg.model, CLASSES).train(), cfg.train.precision, proc)
    set_memory(model, cfg.train.memory)
    model.choose_convolutions(min(cfg.data.shortest_edge))
    calm(model)
    return model, autocast


def guide(model: DetectionModel, near: Tensor, num_near: int) -> None:
    """Make the model put the first num_near boxes of near, (B, K, 4), before its own proposals from now on."""
    own = model.rpn.propose

    def propose(*arguments: Any) -> Proposals:
        return near_objects(own(*arguments), near, num_near)

    model.rpn.propose = propose


def near_objects(own: Proposals, near: Tensor, num_near: int) -> Proposals:
    """Return proposals (B, K, 4): num_near boxes of near, then the model's own, then random ones if it has too few.

    near: (B, K, 4), of which num_near boxes are near objects and the rest are random.
    """
    count = own.valid.sum(1, keepdim=True)  # (B, 1)
    slot = torch.arange(own.boxes.shape[1], device=near.device)[None]  # (1, K)
    from_own = (slot >= num_near) & (slot < count)
    boxes = torch.where(from_own[..., None], own.boxes, near)
    return Proposals(boxes, torch.where(from_own, own.ids, slot), torch.ones_like(own.valid))


def to_batch(scenes: Sequence[Scene]) -> Batch:
    """Return scenes of one size as a batch for gndet's training step."""
    height, width = scenes[0].image.shape[1:]
    masks = [
        torch.from_numpy(
            box_frame_masks(scene.polygons, scene.boxes.numpy().astype(np.float64), (height, width), MASK_SIDE)
        )
        for scene in scenes
    ]
    boxes = torch.stack([scene.boxes for scene in scenes])  # (B, M, 4)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    gt = GroundTruth(boxes, torch.stack([scene.labels for scene in scenes]), torch.stack(masks), valid)
    images = torch.stack([scene.image for scene in scenes])
    sizes = torch.tensor([[height, width]] * len(scenes))
    return Batch(images, sizes, torch.arange(len(scenes)), gt, padded=False)


def near(scenes: Sequence[Scene]) -> Tensor:
    """Return the scenes' boxes near objects, (B, K, 4)."""
    return torch.stack([scene.near for scene in scenes])


def step_memory(cfg: Config, size: tuple[int, int]) -> str:
    """Return a table of the peak memory of each part of gndet's step, and of what it keeps for backward."""
    scenes = make_scenes(size, cfg.train.global_batch, 0)
    model, autocast = gndet_model(cfg)
    device = model.pixel_mean.device
    guide(model, near(scenes).to(device), NEAR)
    batch = to_device(to_batch(scenes), device)
    return memory_by_part(model, lambda: backward(model, autocast, [batch], cfg.train.global_batch, cfg))


# --- torchvision


def torchvision_subject(norm: str, size: tuple[int, int], num: int, precision: str, device: str, tuned: bool) -> Work:
    """Return torchvision's step on the same pictures, tuned or not."""
    return work(torchvision_step(norm, size, num, precision, device, tuned), device)


def torchvision_step(
    norm: str, size: tuple[int, int], num: int, precision: str, device: str, tuned: bool
) -> Callable[[], Losses]:
    """Return a function that trains torchvision's model on the next of the same batches and returns the losses.

    tuned: keep freed memory on a CPU, and channels last on a GPU, as gndet does.
    """
    if tuned and device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model = peer_model(norm, size).to(device).train()
    if tuned and device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    calm(model)
    guide_peer(model)
    batches = [
        [peer_sample(scene, device == "cuda") for scene in make_scenes(size, num, number)] for number in range(BATCHES)
    ]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=RATE, momentum=0.9, weight_decay=1e-4, fused=True)
    number = 0

    def step() -> Losses:
        nonlocal number
        samples = batches[number % len(batches)]
        number += 1
        images = [image.to(device, non_blocking=True) for image, _ in samples]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for _, target in samples
        ]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def guide_peer(model: nn.Module) -> None:
    """Make torchvision's model put the boxes near its targets' objects before its own proposals from now on."""
    proposed: Any = model.rpn.forward

    def guided(images: Any, features: Any, targets: Any = None) -> tuple[list[Tensor], dict[str, Tensor]]:
        own, losses = proposed(images, features, targets)
        boxes = [
            torch.cat([target["near"][:NEAR], proposals[NEAR:], target["near"][NEAR:]])[:PROPOSALS]
            for proposals, target in zip(own, targets or (), strict=targets is not None)
        ]
        return boxes or own, losses

    model.rpn.forward = guided


def peer_model(norm: str, size: tuple[int, int]) -> nn.Module:
    """Return torchvision's Mask R-CNN with the shared architecture, for pictures of size (height, width)."""
    group_norm = partial(nn.GroupNorm, 32)
    gn = norm == "gn"
    body = torchvision.models.resnet50(weights=None, norm_layer=group_norm if gn else FrozenBatchNorm2d)
    heads = group_norm if gn else None
    backbone = _resnet_fpn_extractor(body, 5 if gn else 3, extra_blocks=LastLevelMaxPool(), norm_layer=heads)
    box_head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], heads) if gn else TwoMLPHead(256 * 49, 1024)
    levels = ["0", "1", "2", "3"]
    return PeerMaskRCNN(
        backbone, num_classes=CLASSES + 1, min_size=min(size), max_size=max(size),
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_head=RPNHead(256, 3, conv_depth=1), rpn_pre_nms_top_n_train=2000, rpn_post_nms_top_n_train=PROPOSALS,
        box_head=box_head, mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=heads),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2), mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
    )  # fmt: skip


def peer_sample(scene: Scene, pin: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a scene as torchvision's model takes it, in which class 0 is the background; pin: in pinned memory."""
    image = scene.image.float() / 255
    target = {"boxes": scene.boxes, "labels": scene.labels + 1, "masks": scene.bitmaps(), "near": scene.near}
    if not pin:
        return image, target
    return image.pin_memory(), {name: value.pin_memory() for name, value in target.items()}


# --- both


def calm(model: nn.Module) -> None:
    """Scale frozen norms so that an untrained network's activations, which they do not normalize, stay small."""
    for name, module in model.named_modules():
        if type(module).__name__ in ("FrozenBatchNorm", "FrozenBatchNorm2d"):
            stem, last = "stem" in name or name.endswith("body.bn1"), name.endswith(("conv3.norm", "bn3"))
            module.weight.fill_(0.02 if stem else 0.2 if last else 1.0)


def work(step: Callable[[], Losses], device: str) -> Work:
    """Return a turn's steps as work.  On a GPU some steps first warm up, so that all subjects do so at the same time.

    The facts are the last loss, on a GPU also the peak of its memory, with and without the steps that warm up.
    """
    if device == "cpu":
        return partial(_turn, step, device, {})
    for _ in range(WARM_UPS[device]):
        step()
    first = torch.cuda.max_memory_allocated() / MIB
    torch.cuda.reset_peak_memory_stats()
    return partial(_turn, step, device, {"first CUDA MiB": first})


def _turn(step: Callable[[], Losses], device: str, facts: dict[str, float]) -> dict[str, float]:
    losses, wall_s = timed(lambda: [step() for _ in range(STEPS[device])][-1], device)
    facts = facts | {"loss": float(sum(losses.values())), WALL: wall_s}
    if device == "cuda":
        facts |= {"CUDA MiB": torch.cuda.max_memory_allocated() / MIB}
    return facts
