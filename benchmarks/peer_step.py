"""gndet's training step for a harness that compares toolkits: build(args) -> (model, step).

args: hw, batch, gt, fg, seed, device, amp, norm (GN or FrozenBN), box_head, freeze_at, and synthetic_batch(args, i),
which makes the same images, objects and boxes near objects for every toolkit; the boxes come first among the proposals.
GNDET_OVERRIDES="key=value ..." changes the config, as on the command line.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.scene import Scene
from benchmarks.step import gndet_step, near, to_batch
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.schema import Config

NORMS = {"GN": "gn", "FrozenBN": "frozen_bn", "BN": "bn"}


def build(args: Namespace) -> tuple[nn.Module, Callable[[], dict[str, float]]]:
    """Return the model, and a function that trains it on the next of two batches."""
    batches = [[scene(picture) for picture in args.synthetic_batch(args, i)] for i in range(2)]
    near_boxes = [near(scenes) for scenes in batches]
    model, step = gndet_step(config(args), [to_batch(scenes) for scenes in batches], near_boxes, args.fg)
    return model, lambda: {name: float(loss) for name, loss in step().items()}


def scene(picture: dict[str, Any]) -> Scene:
    """Return a picture of the harness as a scene."""
    polygons = [[outline.tolist() for outline in outlines] for outlines in picture["polygons"]]
    return Scene(picture["image"], picture["boxes"], picture["classes"], polygons, picture["near"])


def config(args: Namespace) -> Config:
    """Return the config that all toolkits share: stride in the 3x3, 1,000 of 2,000 proposals, 512 regions per image."""
    norm = {"kind": NORMS[args.norm]}
    heads = norm if args.norm == "GN" else {"kind": "none"}
    tree = {
        "seed": args.seed, "device": args.device,
        "model": {
            "norm": heads, "backbone": {"depth": 50, "norm": norm, "freeze_at": args.freeze_at},
            "box_head": {"kind": args.box_head},
        },
        "train": {
            "global_batch": args.batch, "images_per_gpu": args.batch,
            "precision": "bf16" if args.amp else "float32", "optimizer": {"lr": 1e-6},
        },
    }  # fmt: skip
    overrides = os.environ.get("GNDET_OVERRIDES", "").split()
    return with_overrides(config_from_dict(tree, "the benchmark"), overrides, "the benchmark")
