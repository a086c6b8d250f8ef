"""Check whether the disk has room for a run's checkpoints, and for data sets in the cache."""

import os
import shutil
from pathlib import Path

import torch

from gndet.config.schema import Config
from gndet.modeling.build import build_model
from gndet.toolbox.doctor.facts import Fact, Facts
from gndet.training.batch_size import checkpoint_bytes

COCO_CLASSES = 80
USUAL = Config()  # a Mask R-CNN R50 with GN


def facts(cfg: Config | None) -> Facts:
    """Yield the free disk space of the run folder (without a config, of the current folder) and of the cache."""
    yield "building the model"
    used = cfg or USUAL
    with torch.device("meta"):  # no memory for the weights
        model = build_model(used.model, len(used.data.classes or ()) or COCO_CLASSES)
    size = checkpoint_bytes(model, used.train)
    folder = Path(os.path.expanduser(cfg.out) if cfg else ".")
    yield disk("run folder" if cfg else "this folder", folder, size, used.train.keep_last + 2)
    if used.data.cache:
        yield cache(Path(os.path.expanduser(used.data.cache)))


def disk(name: str, folder: Path, size: int, count: int) -> Fact:
    """Judge a folder for `count` checkpoints of `size` bytes: those kept, the best, and the one being written."""
    parent = existing(folder)
    free = shutil.disk_usage(parent).free
    text = f"{folder.absolute()}: {free / 1e9:.1f} GB free; {count} checkpoints of {size / 1e6:.0f} MB"
    if not os.access(parent, os.W_OK):
        return Fact(name, f"{text}; {parent} is not writable: choose another out=FOLDER", "wrong")
    if free < count * size:
        return Fact(name, f"{text} do not fit: make room, or choose another out=FOLDER", "wrong")
    return Fact(name, f"{text} fit", "ok")


def cache(folder: Path) -> Fact:
    """Judge the folder of the data cache."""
    parent = existing(folder)
    if not os.access(parent, os.W_OK):
        text = f"{folder} is not writable, so data is read again at every start; set data.cache=FOLDER"
        return Fact("data cache", text, "warning")
    return Fact("data cache", f"{folder}: {shutil.disk_usage(parent).free / 1e9:.1f} GB free", "ok")


def existing(folder: Path) -> Path:
    """Return the folder, or the innermost parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
