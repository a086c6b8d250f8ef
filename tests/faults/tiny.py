"""A run small enough to be interrupted a hundred times, and a check that two runs are bit for bit equal."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from gndet.checkpoint import Checkpoint, load_checkpoint
from gndet.training.log import read_metrics

CONFIG = {
    "model": {
        "norm": {"kind": "gn", "channels_per_group": 16},
        "backbone": {"depth": 18},
        "fpn": {"channels": 16},
        "rpn": {
            "anchor_sizes": [16, 32, 64, 96, 128], "anchors_per_image": 32, "pre_nms_train": 50, "pre_nms_test": 50,
            "post_nms_train": 20, "post_nms_test": 20,
        },
        "box_head": {"conv_channels": 16, "num_convs": 1, "fc_channels": 32, "regions_per_image": 16},
        "mask_head": {"channels": 16, "num_convs": 1},
    },
    "data": {
        "train": {"kind": "shapes", "count": 7, "size": 64, "seed": 1},
        "val": {"kind": "shapes", "count": 3, "size": 64, "seed": 2},
        "shortest_edge": [64, 72], "shortest_edge_test": 64, "workers": 0, "cache": "",
    },
    "train": {
        "global_batch": 2, "images_per_gpu": 1, "ema": 0.9, "log_every": 1, "eval_every": 0, "checkpoint_every": 2,
        "keep_last": 9, "vis_images": 0, "norm_images": 1, "report": False,
        "schedule": {"updates": 6, "warmup": 2, "steps": [4], "reference_batch": 2},
    },
}  # fmt: skip
THIN = 16  # channels of the stem, for resnet.WIDTH: a checkpoint takes 8 MB instead of 130
SPEEDS = ("images_per_s", "data_wait", "memory_mib", "eta_s")  # in metrics.jsonl; these differ from run to run
PROGRESS = (
    "update", "evaluation_due", "best", "best_update", "nonfinite", "sums", "summed", "metrics", "unreadable",
    "total_updates",
)  # fmt: skip


class BrokenPromise(Exception):
    """A promise was not kept; the text says what was expected and what was seen."""


def check(kept: bool, text: str) -> None:
    """Raise BrokenPromise with the text if a promise was not kept."""
    if not kept:
        raise BrokenPromise(text)


def write_config(folder: Path) -> Path:
    """Write the tiny config, for the CPU, into a folder.  Returns the file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}), encoding="utf-8")
    return path


def newest_update(run: Path) -> int:
    """Read and verify the checkpoint that `last` points to.  Returns its update."""
    return int(load_checkpoint(run / "last").meta["update"])


def check_same(run: Path, unbroken: Path, what: str) -> None:
    """Check that two runs ended bit for bit equal: weights, optimizer, averaged weights, progress, losses, metrics."""
    one, two = load_checkpoint(run / "last"), load_checkpoint(unbroken / "last")
    different = [*different_tensors(one, two), *different_progress(one, two), *different_lines(run, unbroken)]
    shown = "\n  ".join(different[:8])
    check(not different, f"{what}: differs from the unbroken run in {len(different)} places:\n  {shown}")


def different_tensors(one: Checkpoint, two: Checkpoint) -> Iterator[str]:
    """Name the tensors that differ between two checkpoints."""
    flat = [
        {f"{group}/{key}": tensor for group, tensors in saved.groups.items() for key, tensor in tensors.items()}
        for saved in (one, two)
    ]
    for name in sorted(flat[0].keys() | flat[1].keys()):
        a, b = (tensors.get(name) for tensors in flat)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{name} of {one.path} and {two.path}"


def different_progress(one: Checkpoint, two: Checkpoint) -> Iterator[str]:
    """Name the differences in the progress of two runs."""
    for key in PROGRESS:
        if one.meta[key] != two.meta[key]:
            yield f"{key}: {one.meta[key]} in {one.path}, {two.meta[key]} in {two.path}"


def different_lines(run: Path, unbroken: Path) -> Iterator[str]:
    """Name the lines of metrics.jsonl in which two runs differ, except for speeds."""
    one, two = (
        [{key: value for key, value in line.items() if key not in SPEEDS} for line in read_metrics(f / "metrics.jsonl")]
        for f in (run, unbroken)
    )
    if len(one) != len(two):
        yield f"metrics.jsonl has {len(one)} lines in {run}, {len(two)} in {unbroken}"
    yield from (f"metrics.jsonl: {a}, unbroken {b}" for a, b in zip(one, two, strict=False) if a != b)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Read what the processes of a run noted in a file, in order of time."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def note(path: str, **values: Any) -> None:
    """Append a line to a trace atomically, even if other processes write to it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{json.dumps(values)}\n".encode())
    finally:
        os.close(descriptor)
