"""From `train.weights` to a Source: what a gndet checkpoint or a file of another toolkit holds, in gndet's names.

K classes; the background is the last row of the layer BACKGROUND.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config.loading import config_from_dict
from gndet.config.schema import Config, ModelConfig, SourceConfig
from gndet.errors import CheckpointError, ConfigError

PARTS = ("backbone", "fpn", "rpn", "box_head", "mask_head")  # those that a file may hold
STEM = "backbone.stem.conv.weight"
BACKGROUND = "box_head.cls_score"  # this layer has a row for the background
CLASS_ROWS = {BACKGROUND: 1, "box_head.bbox_pred": 4, "mask_head.logits": 1}  # rows per class
MAX_NAMED = 5  # tensors or keys that an error names


class Source(NamedTuple):
    """A weights file, understood: its tensors, the model in which they compute what they did, and the assumptions."""

    path: str
    format: str
    state: dict[str, Tensor]  # by gndet's names
    model: ModelConfig
    parts: tuple[str, ...]  # of PARTS, those it holds
    classes: tuple[str, ...] | None  # None where the file does not tell
    num_classes: int
    fused: tuple[str, ...]  # parts whose BN layers are affine maps, their statistics gone
    notes: list[str]  # what was assumed and adapted, in words
    unused: list[str]  # its keys that gndet has no use for
    config: Config | None = None  # of a gndet checkpoint, the whole
    category_ids: tuple[int, ...] | None = None  # of its classes, where the file tells


def read_source(where: str, cfg: SourceConfig) -> Source:
    """Read the weights that `where` names.

    where: a gndet checkpoint or run folder; a file (.pth, .pkl, .safetensors ...); a weight name of torchvision, which
    downloads it (ResNet50_Weights.IMAGENET1K_V2), or of timm where that is installed (timm:resnet50_gn.a1h_in1k).
    Raises CheckpointError, ConfigError: nothing there, damaged, unsafe, of no known format or model, or no network,
    with the address of the file to fetch.
    """
    path = Path(where)
    if path.is_dir() or (path.exists() and cfg.format == "gndet"):
        return _gndet(path, cfg)
    # the readers of other toolkits are an optional extra of fine-tuning: training from scratch does not load them
    from gndet.weights.foreign.source import read_foreign

    return read_foreign(where, cfg)


def _gndet(path: Path, cfg: SourceConfig) -> Source:
    """Read a gndet checkpoint: its averaged weights if there are any, else its weights."""
    checkpoint = load_checkpoint(resolve(path))
    meta, groups = checkpoint.meta, checkpoint.groups
    for key, kind in (("classes", list), ("config", dict)):
        if not isinstance(meta.get(key), kind):
            raise CheckpointError(f"{checkpoint.path}: its meta.json has no {key}; was it saved by gndet?")
    config = config_from_dict(meta["config"], f"{checkpoint.path}: config in meta.json")
    group = "ema" if "ema" in groups else "model"
    if group not in groups:
        raise CheckpointError(f"{checkpoint.path}: no group ema or model; it has {', '.join(groups)}")
    free = ("classes", "differences")  # the rest describes files of other toolkits
    if told := [name for name, value in cfg if name not in free and value not in (None, "auto", "gndet")]:
        raise ConfigError(
            f"train.source.{told[0]}: {checkpoint.path} is a gndet checkpoint, which says itself what it is; "
            "train.source is for files of other toolkits"
        )
    state, classes = groups[group], tuple(meta["classes"])
    if cfg.classes and len(cfg.classes) != len(classes):
        raise ConfigError(
            f"{checkpoint.path}: train.source.classes names {len(cfg.classes)} classes, its heads have {len(classes)}"
        )
    parts = tuple(part for part in PARTS if any(key.startswith(f"{part}.") for key in state))
    return Source(
        str(checkpoint.path), "gndet", state, config.model, parts,
        cfg.classes or (classes if meta.get("classes_named", True) else None), len(classes), fused_parts(state, parts),
        [f"loaded {checkpoint.path}, group {group}, update {meta.get('update', 'unknown')}"], [],
        config, tuple(meta.get("category_ids", ())) or None,
    )  # fmt: skip


def fused_parts(state: dict[str, Tensor], parts: Sequence[str]) -> tuple[str, ...]:
    """Return the parts whose BN layers all have mean 0 and variance 1: gamma and beta hold the real statistics."""
    identity = defaultdict(list)
    for key in state:
        layer, _, parameter = key.rpartition(".")
        if layer.endswith(".norm") and parameter == "running_var" and f"{layer}.running_mean" in state:
            mean, var = state[f"{layer}.running_mean"], state[key]
            alike = not mean.any() and bool((var == var[0]).all()) and abs(float(var[0]) - 1) < 1e-3
            identity[layer.partition(".")[0]].append(alike)
    return tuple(part for part in parts if identity[part] and all(identity[part]))


def first_few(lines: Sequence[str]) -> list[str]:
    """Return as many lines as an error names, and how many more there are."""
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return [*lines[:MAX_NAMED], *more]
