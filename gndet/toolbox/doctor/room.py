"""Whether what a run writes finds room: checkpoints in its folder, and data sets in the cache."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from gndet.config.schema import Config
from gndet.modeling.build import build_model
from gndet.toolbox.doctor.facts import Fact, Facts
from gndet.training.optim import checkpoint_bytes

COCO_CLASSES = 80
USUAL = Config()  # a Mask R-CNN R50 with GN


def facts(cfg: Config | None) -> Facts:
    """Free disk of the run folder (without a config: of this one), and of the cache."""
    yield "building the model"
    chosen = cfg or USUAL
    each = checkpoint_bytes(build(chosen), chosen.train)
    yield disk("run folder" if cfg else "this folder", Path(cfg.out if cfg else "."), each, chosen.train.keep_last + 2)
    if chosen.data.cache:
        yield cache(Path(chosen.data.cache).expanduser())


def build(cfg: Config) -> nn.Module:
    """The model, without memory for its weights."""
    with torch.device("meta"):
        return build_model(cfg.model, len(cfg.data.classes or ()) or COCO_CLASSES)


def disk(name: str, folder: Path, each: int, count: int) -> Fact:
    """Judge a folder for `count` checkpoints of `each` bytes: those that are kept, best, and one being written."""
    there = existing(folder)
    free = shutil.disk_usage(there).free
    text = f"{folder.absolute()}: {free / 1e9:.1f} GB free; {count} checkpoints of {each / 1e6:.0f} MB"
    if not os.access(there, os.W_OK):
        return Fact(name, f"{text}; {there} cannot be written: out=FOLDER chooses another", "wrong")
    if free < count * each:
        return Fact(name, f"{text} do not fit: make room, or choose another out=FOLDER", "wrong")
    return Fact(name, f"{text} fit", "ok")


def cache(folder: Path) -> Fact:
    """Judge the folder of data sets as read and checked."""
    there = existing(folder)
    if not os.access(there, os.W_OK):
        return Fact(
            "data cache", f"{folder} cannot be written: data is read anew each time; data.cache=FOLDER", "warning"
        )
    return Fact("data cache", f"{folder}: {shutil.disk_usage(there).free / 1e9:.1f} GB free", "ok")


def existing(folder: Path) -> Path:
    """The folder, or the innermost one above it that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
