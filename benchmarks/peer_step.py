"""A training step of gndet for a harness that times toolkits beside each other: build(args) -> (model, step).

args: hw, batch, gt, fg, seed, device, amp, norm (GN or FrozenBN), box_head, freeze_at, and synthetic_batch(args, i),
which makes images, objects and, to stand first among the proposals, boxes near them: the same for every toolkit.
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
    """The model and a function that trains it on the next of two batches."""
    scenes = [[scene(picture) for picture in args.synthetic_batch(args, i)] for i in range(2)]
    return gndet_step(config(args), [to_batch(some) for some in scenes], [near(some) for some in scenes], args.fg)


def scene(picture: dict[str, Any]) -> Scene:
    """A picture of the harness."""
    polygons = [[outline.tolist() for outline in outlines] for outlines in picture["polygons"]]
    return Scene(picture["image"], picture["boxes"], picture["classes"], polygons, picture["near"])


def config(args: Namespace) -> Config:
    """The recipe all toolkits share: stride in the 3x3, 2,000 and 1,000 proposals, 512 regions an image."""
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
