"""A training step of gndet for a harness that times toolkits beside each other: build(args) -> (model, step).

args: hw, batch, gt, fg, seed, device, amp, norm (GN or FrozenBN), box_head, freeze_at, and synthetic_batch(args, i),
which makes images, objects and, to stand first among the proposals, boxes near them: the same for every toolkit.
GNDET_OVERRIDES="key=value ..." changes the config, as on the command line.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gndet.config import Config
from gndet.config_file import config_from_dict, with_overrides
from gndet.data.segmentation import box_frame_masks
from gndet.distributed import place, process
from gndet.micro_batch import backward
from gndet.modeling.mask_rcnn import build_model
from gndet.modeling.tower import set_memory
from gndet.optim import make_optimizer
from gndet.structures import MASK_SIDE, Batch, GroundTruth, Proposals

CLASSES = 80
NORMS = {"GN": "gn", "FrozenBN": "frozen_bn", "BN": "bn"}
_alive = ExitStack()  # the process is gndet's until it ends


def build(args: Namespace) -> tuple[nn.Module, Callable[[], dict[str, float]]]:
    """The model and a function that trains it on the next of two batches."""
    cfg = config(args)
    proc = _alive.enter_context(process(args.device))
    torch.manual_seed(args.seed)
    model, autocast = place(build_model(cfg.model, CLASSES).train(), cfg.train.precision, proc)
    unlike_untrained(model)
    set_memory(model, cfg.train.memory)
    optimizer = make_optimizer(cfg.train.optimizer, model)
    made = [args.synthetic_batch(args, i) for i in range(2)]
    batches = [to_batch(pictures) for pictures in made]
    near = [torch.stack([picture["near"] for picture in pictures]).to(proc.device) for pictures in made]
    propose, steps = model.rpn.propose, iter(range(1 << 30))
    now = 0

    def proposals(*arguments: Any) -> Proposals:
        return near_objects(propose(*arguments), near[now], args.fg)

    if args.fg:
        model.rpn.propose = proposals

    def step() -> dict[str, float]:
        nonlocal now
        now = next(steps) % len(batches)
        optimizer.zero_grad()
        losses = backward(model, autocast, [batches[now]], args.batch, cfg)
        optimizer.step()
        return {name: float(loss) for name, loss in losses.items()}

    return model, step


def config(args: Namespace) -> Config:
    """The recipe all toolkits share: stride in the 3x3, 2,000 and 1,000 proposals, 512 regions an image."""
    tree = {
        "model": {
            "norm": {"kind": NORMS[args.norm]},
            "backbone": {"depth": 50, "freeze_at": args.freeze_at},
            "box_head": {"kind": args.box_head},
        },
        "train": {
            "global_batch": args.batch, "images_per_gpu": args.batch,
            "precision": "bf16" if args.amp else "float32", "optimizer": {"lr": 1e-6},
        },
    }  # fmt: skip
    overrides = os.environ.get("GNDET_OVERRIDES", "").split()
    return with_overrides(config_from_dict(tree, "the benchmark"), overrides, "the benchmark")


def unlike_untrained(model: nn.Module) -> None:
    """Keep an untrained network of frozen BN from growing its activations, as the other toolkits' are kept."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FrozenBatchNorm":
            module.weight.fill_(0.2 if name.endswith("conv3.norm") else 0.02 if "stem" in name else 1.0)


def to_batch(pictures: list[dict[str, Any]]) -> Batch:
    """The pictures with their objects as gndet's training step takes them."""
    height, width = pictures[0]["image"].shape[1:]
    boxes = torch.stack([picture["boxes"] for picture in pictures])  # (B, M, 4)
    masks = [
        torch.from_numpy(box_frame_masks(
            [[polygon.tolist() for polygon in polygons] for polygons in picture["polygons"]],
            picture["boxes"].numpy().astype(np.float64), (height, width), MASK_SIDE,
        ))
        for picture in pictures
    ]  # fmt: skip
    labels = torch.stack([picture["classes"] for picture in pictures])
    gt = GroundTruth(boxes, labels, torch.stack(masks), torch.ones(boxes.shape[:2], dtype=torch.bool))
    sizes = torch.tensor([[height, width]] * len(pictures))
    images = torch.stack([picture["image"] for picture in pictures])
    return Batch(images, sizes, torch.arange(len(pictures)), gt, padded=False)


def near_objects(own: Proposals, near: Tensor, num: int) -> Proposals:
    """Proposals (B, K, 4) of which the first num are near objects, and random ones follow where the model has too few.

    near (B, K, 4): num near objects, then random ones.
    """
    count = own.valid.sum(1, keepdim=True)  # (B, 1)
    place = torch.arange(own.boxes.shape[1], device=near.device)[None]  # (1, K)
    from_own = (place >= num) & (place < count)
    boxes = torch.where(from_own[..., None], own.boxes, near)
    return Proposals(boxes, torch.where(from_own, own.ids, place), torch.ones_like(own.valid))
