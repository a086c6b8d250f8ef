"""Fine-tuning: put the weights of a gndet checkpoint into a model, class rows matched by class name.

K classes; the background is the last row of box_head.cls_score.
"""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.checkpoint import Checkpoint, load_checkpoint, resolve
from gndet.config import Config, ModelConfig, NormConfig
from gndet.config_file import config_from_dict
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.mask_rcnn import MaskRCNN, build_model

REQUIRED = ("backbone",)  # parts that a checkpoint must hold whole; the others may start anew
CLASS_ROWS = {"box_head.cls_score": 1, "box_head.bbox_pred": 4, "mask_head.logits": 1}  # rows a class
BACKGROUND = "box_head.cls_score"  # has one more row, the last
COUNTER = "num_batches_tracked"  # bn has one, frozen_bn has none, and neither needs it
SAME_TENSORS = ("bn", "sync_bn", "frozen_bn")  # these load each other's weights and compute the same at test time
SHAPING = (  # options of `model` that decide the shapes, named where shapes differ
    *("backbone.depth", "fpn.channels", "rpn.aspect_ratios"),
    *("box_head.kind", "box_head.num_convs", "box_head.conv_channels", "box_head.fc_channels", "box_head.pool_size"),
    *("mask_head.num_convs", "mask_head.channels"),
)
MAX_NAMED = 5  # tensors that an error names


class _Plan(NamedTuple):
    """What a file gives to a model, key by key."""

    whole: list[str]  # taken as they are
    by_class: list[str]  # taken row by row
    wrong: list[str]  # a line for each tensor that does not fit
    anew: list[str]  # absent from the file, keep the model's initialisation
    unused: list[str]  # of the file


def initial_model(cfg: Config, classes: Sequence[str], *, load: bool = True) -> tuple[MaskRCNN, list[str]]:
    """Build the model of a config as training starts with it: drawn from cfg.seed, then, if load, train.weights.

    Returns it with the report of `load_weights`.  Raises ConfigError, for frozen random stages too, CheckpointError.
    """
    if cfg.model.backbone.freeze_at and not cfg.train.weights:
        raise ConfigError(
            f"model.backbone.freeze_at: {cfg.model.backbone.freeze_at} would freeze random weights; "
            "set train.weights to a checkpoint, or model.backbone.freeze_at=0 to train from scratch"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = build_model(cfg.model, len(classes))
    notes = load_weights(model, Path(cfg.train.weights), classes, cfg.model) if load and cfg.train.weights else []
    return model, notes


def load_weights(model: nn.Module, path: Path, classes: Sequence[str], config: ModelConfig) -> list[str]:
    """Load a checkpoint's averaged weights, or else its weights, into a model for other classes.

    model: built from config for `classes`, in the order of its labels.  path: checkpoint or run folder.
    Rows of a class that the checkpoint knows by the same name, and the background's, are carried over; those
    of other classes and what the file lacks outside the backbone keep their initialisation.
    Returns the report: what was loaded, and every tensor and class that was not.
    Raises CheckpointError, the model untouched, where the norms differ or tensors are missing or do not fit.
    """
    checkpoint = load_checkpoint(resolve(path))
    known, trained = _origin(checkpoint)
    different = _compare_norms(checkpoint.path, trained, config)
    group = "ema" if "ema" in checkpoint.groups else "model"
    if group not in checkpoint.groups:
        raise CheckpointError(f"{checkpoint.path}: no group ema or model; it has {', '.join(checkpoint.groups)}")
    source, own = checkpoint.groups[group], model.state_dict()
    plan = _plan(own, source, len(classes), len(known))
    if plan.wrong:
        raise CheckpointError(_misfit(checkpoint.path, plan.wrong, trained, config))
    carried = [(classes.index(name), known.index(name)) for name in classes if name in known]
    with torch.no_grad():
        for key in plan.whole:
            own[key].copy_(source[key])
        for key in plan.by_class:
            _copy_rows(own[key], source[key], key, carried)
    return [
        f"loaded {checkpoint.path}, group {group}, update {checkpoint.meta.get('update', 'unknown')}",
        *different,
        *_report(plan, classes, known),
    ]


def _origin(checkpoint: Checkpoint) -> tuple[list[str], ModelConfig]:
    """The classes and the model config that a checkpoint was trained with."""
    for key, kind in (("classes", list), ("config", dict)):
        if not isinstance(checkpoint.meta.get(key), kind):
            raise CheckpointError(f"{checkpoint.path}: its meta.json has no {key}; was it saved by gndet train?")
    config = config_from_dict(checkpoint.meta["config"], f"{checkpoint.path}: config in meta.json")
    return checkpoint.meta["classes"], config.model


def _compare_norms(path: Path, trained: ModelConfig, config: ModelConfig) -> list[str]:
    """Refuse weights of another norm; return a line for each part whose norm has other settings."""
    before, now = trained.part_norms(), config.part_norms()
    lines = []
    for part in before:
        if part == "mask_head" and not (trained.masks and config.masks):
            continue
        if part == "box_head" and "2fc" in (trained.box_head.kind, config.box_head.kind):
            continue  # the 2fc head has no norm
        if _family(before[part]) != _family(now[part]):
            old, new = before[part].kind, now[part].kind
            raise CheckpointError(
                f"{path}: its {part} was trained with {old}, this model has {new}; "
                f"set model.{part}.norm: {{kind: {old}}} or take a checkpoint trained with {new}"
            )
        grouping = ("groups", "channels_per_group") if now[part].kind == "gn" else ()
        for name in (*grouping, "weight_standardization", "eps", "masked"):
            old, new = getattr(before[part], name), getattr(now[part], name)
            if old != new:
                lines.append(f"{part}.norm: {name} {old} in the file, {new} here")
    return lines


def _family(norm: NormConfig) -> str:
    return SAME_TENSORS[0] if norm.kind in SAME_TENSORS else norm.kind


def _plan(own: dict[str, Tensor], source: dict[str, Tensor], num_classes: int, num_known: int) -> _Plan:
    """Decide for every tensor of the model and of the file what becomes of it."""
    plan = _Plan([], [], [], [], [key for key in source if key not in own and not key.endswith(COUNTER)])
    for key, tensor in own.items():
        layer, part = key.rpartition(".")[0], key.partition(".")[0]
        if key not in source:
            if part in REQUIRED and not key.endswith(COUNTER):
                plan.wrong.append(f"{key}: absent from the file, {list(tensor.shape)} here")
            elif not key.endswith(COUNTER):
                plan.anew.append(key)
            continue
        expected = tensor.shape
        if layer in CLASS_ROWS:
            expected = (_num_rows(layer, num_known), *tensor.shape[1:])
            assert len(tensor) == _num_rows(layer, num_classes), f"{key} {list(tensor.shape)}, {num_classes} classes"
        if source[key].shape != expected:
            plan.wrong.append(f"{key}: {list(source[key].shape)} in the file, expected {list(expected)}")
        else:
            (plan.by_class if layer in CLASS_ROWS else plan.whole).append(key)
    for key in plan.unused:  # a deeper backbone holds all tensors of a shallower one
        if key.partition(".")[0] in REQUIRED:
            plan.wrong.append(f"{key}: {list(source[key].shape)} in the file, absent here")
    return plan


def _num_rows(layer: str, num_classes: int) -> int:
    return num_classes * CLASS_ROWS[layer] + (layer == BACKGROUND)


def _copy_rows(target: Tensor, source: Tensor, key: str, carried: Sequence[tuple[int, int]]) -> None:
    """Copy the rows of the classes in carried (index here, index in the file), and the background's."""
    layer = key.rpartition(".")[0]
    count = CLASS_ROWS[layer]
    for here, there in carried:
        target[here * count : (here + 1) * count] = source[there * count : (there + 1) * count].to(target.device)
    if layer == BACKGROUND:
        target[-1] = source[-1].to(target.device)


def _misfit(path: Path, wrong: list[str], trained: ModelConfig, config: ModelConfig) -> str:
    """Say which tensors do not fit, and which options differ."""
    options = [
        f"model.{name}: {attrgetter(name)(trained)} in the file, {attrgetter(name)(config)} here"
        for name in SHAPING
        if attrgetter(name)(trained) != attrgetter(name)(config)
    ]
    more = [f"and {len(wrong) - MAX_NAMED} more"] if len(wrong) > MAX_NAMED else []
    cause = options or ["unknown: the options that decide the shapes are the same; was the file edited?"]
    lines = [*wrong[:MAX_NAMED], *more, "likely cause: " + "; ".join(cause)]
    return "\n  ".join([f"{path}: {len(wrong)} tensors do not fit this model", *lines])


def _report(plan: _Plan, classes: Sequence[str], known: Sequence[str]) -> list[str]:
    """List what was loaded, by part and by class, and everything that was not."""
    counts: dict[str, int] = {}
    for key in plan.whole:
        part = key.partition(".")[0]
        counts[part] = counts.get(part, 0) + 1
    lines = ["tensors: " + ", ".join(f"{part} {count}" for part, count in counts.items())]
    if plan.by_class:
        rows = {
            "classes carried over by name": [name for name in classes if name in known],
            "classes that start anew": [name for name in classes if name not in known],
            "classes of the file not used": [name for name in known if name not in classes],
        }
        lines += [f"{title}: {', '.join(names)}" for title, names in rows.items() if names]
    if plan.anew:
        lines.append(f"tensors that start anew: {', '.join(plan.anew)}")
    if plan.unused:
        lines.append(f"tensors of the file not used: {', '.join(plan.unused)}")
    return lines
