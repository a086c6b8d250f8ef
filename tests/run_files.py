"""Helpers for training tests: load a tiny config, read the content of a run folder."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from faults.launch import PATIENCE

from gndet.checkpoint import load_checkpoint
from gndet.config.loading import load_config
from gndet.config.schema import Config


def load(config: Path, out: str, *overrides: str) -> Config:
    return load_config(config, [f"out={config.parent / out}", *overrides])


def last(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder / "last")
    return {f"{group}/{name}": value for group, tensors in saved.groups.items() for name, value in tensors.items()}


def assert_same(a: Path, b: Path) -> None:
    one, two = last(a), last(b)
    assert one.keys() == two.keys() and any(name.startswith("ema/") for name in one)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["update"], line["loss"]) for line in lines if line["kind"] == "train"]


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until something is true, however slow the machine is."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"not true after {PATIENCE:.0f} s"
        time.sleep(0.01)


def forget(folder: Path, *updates: int) -> None:
    """Remove the newest checkpoints of a finished run, as if it had been killed earlier."""
    for update in updates:
        shutil.rmtree(folder / "checkpoints" / f"update-{update:07d}")
