"""Read `train.weights`, a gndet checkpoint or a file of another toolkit, into a Source with gndet's names.

K classes; the background is the last row of the layer BACKGROUND.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gndet.checkpoint import led_to
from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.trained import model_without_memory, read_trained

PARTS = ("backbone", "fpn", "rpn", "box_head", "mask_head", "dense", "classifier")  # parts that a file may hold
STEM = "backbone.stem.conv.weight"
DEEP_STEM = "backbone.stem.conv1.conv.weight"
BACKGROUND = "box_head.cls_score"  # this layer has a row for the background
CLASS_ROWS = {BACKGROUND: 1, "box_head.bbox_pred": 4, "mask_head.logits": 1, "classifier.logits": 1}  # rows per class
DENSE = "dense.cls_logits"  # this layer has a row per class and anchor of a cell
STAGE = re.compile(r"\.stages\.\d+")  # of a cascade, in the name of a layer


class Source(NamedTuple):
    """The content of a weights file: its tensors, the model in which they compute the same, and what was assumed."""

    path: str
    format: str
    state: dict[str, Tensor]  # by gndet's names
    model: ModelConfig
    parts: tuple[str, ...]  # those of PARTS that the file holds
    classes: tuple[str, ...] | None  # None if the file does not name them
    num_classes: int
    fused: tuple[str, ...]  # parts whose BN layers are affine maps without statistics
    notes: list[str]  # what was assumed and adapted, in words
    unused: list[str]  # keys of the file that gndet does not use
    config: Config | None = None  # the whole config of a gndet checkpoint
    category_ids: tuple[int, ...] | None = None  # of its classes, if the file states them


def read_source(weights: str, cfg: SourceConfig, network: str = "") -> Source:
    """Read the weights that `weights` names.

    network: model.backbone.name of the model to load them into.

    weights: a gndet checkpoint or run folder; a file (.pth, .pkl, .safetensors ...); the name of weights that
    torchvision downloads (ResNet50_Weights.IMAGENET1K_V2), or that timm does, if installed (timm:resnet50_gn.a1h_in1k).
    Raises CheckpointError or ConfigError if there is no such file, if it is damaged, unsafe, or of an unknown format or
    model, or if there is no network; that error says which file to download.  Also if cfg.parts names a part that the
    weights lack.
    """
    source = _read(weights, cfg, network)
    if cfg.parts is None:
        return source
    if missing := [part for part in cfg.parts if part not in source.parts]:
        raise CheckpointError(
            f"{source.path}: train.source.parts: it has no {missing[0]}, only {', '.join(source.parts)}"
        )
    left = [part for part in source.parts if part not in cfg.parts]
    return source._replace(
        parts=tuple(part for part in source.parts if part in cfg.parts),
        state={key: tensor for key, tensor in source.state.items() if key.partition(".")[0] in cfg.parts},
        fused=tuple(part for part in source.fused if part in cfg.parts),
        notes=[*source.notes, *([f"left out by train.source.parts: {', '.join(left)}"] if left else [])],
    )


def _read(weights: str, cfg: SourceConfig, network: str) -> Source:
    path = led_to(Path(os.path.expanduser(weights)))
    if path.is_dir() or (path.exists() and cfg.format == "gndet"):
        return _gndet(path, cfg)
    # imported here because training from scratch does not need the readers of other toolkits
    from gndet.weights.foreign.source import read_foreign

    return read_foreign(weights, cfg, network)


def class_rows(layer: str, cfg: ModelConfig) -> int:
    """Return how many rows of a layer belong to each class; 0 if its rows do not belong to classes."""
    layer = STAGE.sub("", layer)
    if layer == DENSE:
        return cfg.dense.kinds
    return 0 if cfg.box_head.class_agnostic and layer == "box_head.bbox_pred" else CLASS_ROWS.get(layer, 0)


def has_background(layer: str) -> bool:
    """Return whether a layer has a row for the background."""
    return STAGE.sub("", layer) == BACKGROUND


def _gndet(path: Path, cfg: SourceConfig) -> Source:
    """Read a gndet checkpoint: its averaged weights if it has any, else its weights."""
    trained = read_trained(path)
    if trained.nonfinite:
        raise CheckpointError(trained.fault)
    model_without_memory(trained, trained.config.model)
    allowed = ("classes", "parts", "differences")  # the other options describe files of other toolkits
    if stated := [name for name, value in cfg if name not in allowed and value not in (None, "auto", "gndet")]:
        raise ConfigError(
            f"train.source.{stated[0]}: {trained.path} is a gndet checkpoint, which describes itself; remove the "
            "option: it is for files of other toolkits"
        )
    state, classes, meta = trained.state, trained.classes, trained.meta
    if cfg.classes and len(cfg.classes) != len(classes):
        raise ConfigError(
            f"{trained.path}: train.source.classes names {len(cfg.classes)} classes, its heads have {len(classes)}"
        )
    parts = tuple(part for part in PARTS if any(key.startswith(f"{part}.") for key in state))
    return Source(
        str(trained.path), "gndet", state, trained.config.model, parts,
        cfg.classes or (classes if meta.get("classes_named", True) else None), len(classes), fused_parts(state, parts),
        [f"loaded {trained.path}, group {trained.group}, update {meta.get('update', 'unknown')}"], [],
        trained.config, trained.category_ids or None,
    )  # fmt: skip


def fused_parts(state: dict[str, Tensor], parts: Sequence[str]) -> tuple[str, ...]:
    """Return the parts whose BN layers all have mean 0 and variance 1: gamma and beta absorbed the real statistics."""
    identity = defaultdict(list)
    for key in state:
        layer, _, parameter = key.rpartition(".")
        if layer.endswith(".norm") and parameter == "running_var" and f"{layer}.running_mean" in state:
            mean, var = state[f"{layer}.running_mean"], state[key]
            alike = not mean.any() and bool((var == var[0]).all()) and abs(float(var[0]) - 1) < 1e-3
            identity[layer.partition(".")[0]].append(alike)
    return tuple(part for part in parts if identity[part] and all(identity[part]))
