"""The model that training starts with: built from its config, then filled from `train.weights`.

K classes; the background is the last row of box_head.cls_score.
"""

import statistics
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from gndet.config.schema import Config, ModelConfig
from gndet.data.batches.batch import sample_batch
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import DetectionModel
from gndet.weights.calibrate import Comparison, compare
from gndet.weights.foreign.names import CLASS_ROWS
from gndet.weights.foreign.source import Source
from gndet.weights.policy import (
    AS_IN_FILE,
    GROUP_NORMS,
    STATISTICS,
    Fate,
    carry_norms,
    mismatched,
    reference_norms,
    with_policy,
)
from gndet.weights.read import read_source

BACKGROUND = "box_head.cls_score"  # has one more row, the last
COUNTER = "num_batches_tracked"  # bn has one, frozen_bn has none, and neither needs it
SHAPING = (  # options of `model` that decide the shapes, named where shapes differ
    *("backbone.depth", "fpn.channels", "rpn.num_convs", "rpn.aspect_ratios"),
    *("box_head.kind", "box_head.num_convs", "box_head.conv_channels", "box_head.fc_channels", "box_head.pool_size"),
    *("mask_head.num_convs", "mask_head.channels"),
)
CONVENTIONS = (  # options of `model` that decide what the same weights compute, by the part that must be in the file
    ("backbone", "backbone.stride_in_1x1"),
    ("backbone", "pixel_mean"),
    ("rpn", "rpn.aspect_ratios"),
    ("rpn", "rpn.anchors"),
    ("box_head", "box_head.roi_align"),
    ("mask_head", "mask_head.roi_align"),
)
NOTED = (("rpn", "rpn.anchor_sizes"), ("rpn", "rpn.anchor_stride"))  # said, not refused
MAX_NAMED = 5  # tensors that an error names
FAR_APART = 0.8  # relative error of a level's features from which it is said
MEASURED_IMAGES = 4  # on which a conversion is compared with its original
CALIBRATION_EDGE = 256  # pixels, the longest shorter edge: the images are computed at once


class Start(NamedTuple):
    """A model to train, and where its numbers come from."""

    model: DetectionModel
    cfg: Config  # norm_policy: hybrid changes the norm of parts
    notes: list[str]  # the report, a line each
    fates: dict[str, Fate]  # what became of each norm layer that the file knows; the others are new


class _Plan(NamedTuple):
    """What a file gives to a model, key by key."""

    whole: list[str]  # taken as they are
    by_class: list[str]  # taken row by row
    wrong: list[str]  # a line for each tensor that does not fit
    anew: list[str]  # absent from the file, keep the model's initialisation
    unused: list[str]  # of the file


def initial_model(
    cfg: Config,
    classes: Sequence[str],
    *,
    load: bool = True,
    images: Dataset | None = None,
    source: Source | None = None,
    measure: bool = True,
) -> Start:
    """Build the model of a config as training starts with it: drawn from cfg.seed, then, if load, train.weights.

    classes: in the order of the labels.  images: training images; what norm_policy: calibrate fits on, and what any
    conversion is measured on.  source: what train.weights holds, where it has been read already.  measure: False where
    nothing is fitted or measured: another process does and hands the weights out, or only the layers count.
    Raises ConfigError, for frozen random stages too, CheckpointError, DataError; nothing is half loaded.
    """
    if cfg.model.backbone.freeze_at and not cfg.train.weights:
        raise ConfigError(
            f"model.backbone.freeze_at: {cfg.model.backbone.freeze_at} would freeze random weights; "
            "set train.weights to a checkpoint, or model.backbone.freeze_at=0 to train from scratch"
        )
    if not (load and cfg.train.weights):
        return Start(_built(cfg, len(classes)), cfg, [], {})
    source = source or read_source(cfg.train.weights, cfg.train.source)
    cfg = cfg.model_copy(update={"model": with_policy(source, cfg.model, cfg.train)})
    model = _built(cfg, len(classes))
    notes, fates = load_weights(model, source, classes, cfg)
    converted = {} if cfg.train.norm_policy == "reinit" else reference_norms(source, model, cfg.model)
    if measure and cfg.train.norm_policy == "calibrate" and converted and images is None:
        raise ConfigError("train.norm_policy: calibrate needs training images to fit on")
    if measure and images is not None and converted:
        fit = cfg.train.norm_policy == "calibrate"
        count = cfg.train.calibration_images if fit else MEASURED_IMAGES
        batch = sample_batch(images, cfg.data, count, CALIBRATION_EDGE)
        comparison = compare(model, converted, batch, fit=fit)
        fates = measured(fates, comparison, f"fitted on {len(batch.images)} images" if fit else "")
        notes.append(stages_line(comparison, source, len(batch.images)))
        if max(comparison.stages.values()) > FAR_APART and cfg.train.norm_policy != "affine":
            notes.append(
                "warning: the converted features are far from the file's own on these images; do they look like those "
                "it was trained on, with its pixel_mean and channel order? Larger groups are more faithful"
            )
    notes += fate_lines(fates)
    return Start(model, cfg, notes, fates)


def _built(cfg: Config, num_classes: int) -> DetectionModel:
    """The model of a config, its weights drawn from cfg.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return build_model(cfg.model, num_classes)


def load_weights(
    model: DetectionModel, source: Source, classes: Sequence[str], cfg: Config
) -> tuple[list[str], dict[str, Fate]]:
    """Load a source into a model for other classes.

    model: built from cfg.model for `classes`, in the order of its labels.
    Rows of a class that the source knows by the same name, and the background's, are carried over; those of other
    classes and parts that the source lacks keep their initialisation.
    Returns the report (what was loaded, every tensor and class that was not) and what became of each norm layer.
    Raises CheckpointError, the model untouched, where tensors are missing or do not fit, or where conventions differ.
    """
    state, fates = carry_norms(source.state, source, model, cfg.model, cfg.train)
    scale = torch.tensor(cfg.model.pixel_std) / torch.tensor(source.model.pixel_std)
    if (scale != 1).any() and "backbone.stem.conv.weight" in state:
        state["backbone.stem.conv.weight"] = state["backbone.stem.conv.weight"] * scale[:, None, None]
    own, known = model.state_dict(), source.classes or ()
    plan = _plan(own, state, len(classes), source, fates)
    if plan.wrong:
        raise CheckpointError(_misfit(source, plan.wrong, cfg.model))
    conventions = _compare_conventions(source, cfg)
    carried = [(classes.index(name), known.index(name)) for name in classes if name in known]
    loaded = dict(own) | {key: state[key] for key in plan.whole}
    for key in plan.by_class:
        loaded[key] = _with_rows(own[key], state[key], key, carried)
    model.load_state_dict(loaded)
    return [*source.notes, *conventions, *_report(plan, classes, source)], fates


def _compare_conventions(source: Source, cfg: Config) -> list[str]:
    """Refuse a model that computes something else from the file's weights; return what is only worth a line."""
    config, lines = cfg.model, []
    there, here = source.model.part_norms(), config.part_norms()
    parts = [part for part in source.parts if part != "mask_head" or config.masks]
    different = [
        f"model.{name}: {attrgetter(name)(source.model)} in the file, {attrgetter(name)(config)} here"
        for part, name in CONVENTIONS
        if part in parts and attrgetter(name)(source.model) != attrgetter(name)(config)
        and (name != "backbone.stride_in_1x1" or config.backbone.depth >= 50)
    ]  # fmt: skip
    if here["backbone"].weight_standardization and source.model.pixel_std != config.pixel_std:
        different.append(f"model.pixel_std: {source.model.pixel_std} in the file, {config.pixel_std} here")
    if different and cfg.train.source.differences == "refuse":
        preset = f"; model.compat={source.model.compat} sets all of its toolkit's conventions"
        raise CheckpointError(
            "\n  ".join([f"{source.path}: its weights mean something else in this model:", *different])
            + f"\n  set these options as in the file{preset if source.model.compat != config.compat else ''}; where "
            "the file cannot tell and its toolkit's custom was assumed, train.source.* states what is true; "
            "train.source.differences=report fine-tunes anyway"
        )
    lines += [f"warning: {line}" for line in different]
    if source.model.pixel_std != config.pixel_std:
        lines.append(f"pixel_std {source.model.pixel_std} of the file folded into the stem, exactly")
    lines += [
        f"model.{name}: {attrgetter(name)(source.model)} in the file, {attrgetter(name)(config)} here"
        for part, name in NOTED
        if part in parts and attrgetter(name)(source.model) != attrgetter(name)(config)
    ]
    differing = mismatched(source, config)
    if source.parts != ("backbone",):  # classifiers see no padding
        lines += padding_warnings(source.model, config, [part for part in parts if part not in differing])
    for part in [part for part in parts if part not in differing and here[part].kind in GROUP_NORMS]:
        if there[part].eps != here[part].eps and not (part == "box_head" and config.box_head.kind == "2fc"):
            lines.append(
                f"{part}.norm: eps {there[part].eps:g} of the file is kept, {here[part].eps:g} is the config's"
            )
    return lines


def padding_warnings(
    there: ModelConfig, here: ModelConfig, parts: Sequence[str] = ("backbone", "fpn", "rpn")
) -> list[str]:
    """A line for each part whose GN, LN or IN was trained with padding in its statistics and runs without, or so."""
    words = {True: "masked", False: "plain"}
    return [
        f"warning: {part}.norm was trained with padding: {words[old.masked]}, here it is {words[new.masked]}; they "
        "differ where pictures of a batch have different sizes"
        for part, old, new in ((p, there.part_norms()[p], here.part_norms()[p]) for p in parts)
        if part in ("backbone", "fpn", "rpn") and new.kind in GROUP_NORMS and old.masked != new.masked
    ]


def _plan(
    own: dict[str, Tensor], state: dict[str, Tensor], num_classes: int, source: Source, fates: dict[str, Fate]
) -> _Plan:
    """Decide for every tensor of the model and of the file what becomes of it.

    A part that the file holds must be there whole, but for norms that are not as in the file, and their biases.
    """
    changed = [name for name, fate in fates.items() if not fate.what.startswith(AS_IN_FILE)]
    free = {f"{name}.{key}" for name in changed for key in STATISTICS}
    free |= {name.removesuffix("norm") + "conv.bias" for name in changed}
    unused = [key for key in state if key not in own and not key.endswith((COUNTER, ".norm.eps"))]
    damped = [key for key in state if key.endswith(".norm.eps") and key.removesuffix("eps") + "weight" in own]
    plan = _Plan(damped, [], [], [], unused)
    for key, tensor in own.items():
        layer, part = key.rpartition(".")[0], key.partition(".")[0]
        if key not in state:
            if (part in source.parts or part == "backbone") and not key.endswith(COUNTER) and key not in free:
                plan.wrong.append(f"{key}: absent from the file, {list(tensor.shape)} here")
            elif not key.endswith(COUNTER):
                plan.anew.append(key)
            continue
        expected = tensor.shape
        if layer in CLASS_ROWS:
            expected = (_num_rows(layer, source.num_classes), *tensor.shape[1:])
            assert len(tensor) == _num_rows(layer, num_classes), f"{key} {list(tensor.shape)}, {num_classes} classes"
        if state[key].shape != expected:
            plan.wrong.append(f"{key}: {list(state[key].shape)} in the file, expected {list(expected)}")
        else:
            (plan.by_class if layer in CLASS_ROWS else plan.whole).append(key)
    built = {key.partition(".")[0] for key in own}
    for key in unused:  # a deeper backbone holds all tensors of a shallower one
        if key.partition(".")[0] in built and key.partition(".")[0] in source.parts:
            plan.wrong.append(f"{key}: {list(state[key].shape)} in the file, absent here")
    return plan


def _num_rows(layer: str, num_classes: int) -> int:
    return num_classes * CLASS_ROWS[layer] + (layer == BACKGROUND)


def _with_rows(own: Tensor, there: Tensor, key: str, carried: Sequence[tuple[int, int]]) -> Tensor:
    """Put the rows of the classes in carried (index here, index in the file), and the background's, over own ones."""
    layer, result = key.rpartition(".")[0], own.clone()
    count = CLASS_ROWS[layer]
    for here, index in carried:
        result[here * count : (here + 1) * count] = there[index * count : (index + 1) * count]
    if layer == BACKGROUND:
        result[-1] = there[-1]
    return result


# --- what is said


def _misfit(source: Source, wrong: list[str], config: ModelConfig) -> str:
    """Say which tensors do not fit, and which options differ."""
    trained = source.model
    options = [
        f"model.{name}: {attrgetter(name)(trained)} in the file, {attrgetter(name)(config)} here"
        for name in SHAPING
        if attrgetter(name)(trained) != attrgetter(name)(config)
    ]
    more = [f"and {len(wrong) - MAX_NAMED} more"] if len(wrong) > MAX_NAMED else []
    cause = options or ["unknown: the options that decide the shapes are the same; was the file edited, or cut short?"]
    lines = [*wrong[:MAX_NAMED], *more, "likely cause: " + "; ".join(cause)]
    return "\n  ".join([f"{source.path}: {len(wrong)} tensors do not fit this model", *lines])


def _report(plan: _Plan, classes: Sequence[str], source: Source) -> list[str]:
    """List what was loaded, by part and by class, and everything that was not."""
    counts: dict[str, int] = {}
    for key in plan.whole:
        part = key.partition(".")[0]
        counts[part] = counts.get(part, 0) + 1
    lines = ["tensors: " + ", ".join(f"{part} {count}" for part, count in counts.items())]
    known = source.classes or ()
    if plan.by_class:
        rows = {
            "classes carried over by name": [name for name in classes if name in known],
            "classes that start anew": [name for name in classes if name not in known],
            "classes of the file not used": [name for name in known if name not in classes],
        }
        lines += [f"{title}: {', '.join(names)}" for title, names in rows.items() if names]
    if plan.anew:
        lines.append(f"tensors that start anew: {', '.join(plan.anew)}")
    unused = [*plan.unused, *source.unused]
    if unused:
        lines.append(f"tensors of the file not used: {', '.join(unused)}")
    return lines


def measured(fates: dict[str, Fate], comparison: Comparison, what: str) -> dict[str, Fate]:
    """Put measured errors, and what else was done, into the fates of the layers that were compared."""
    result = dict(fates)
    for name, error in comparison.layers.items():
        fate = fates[name]
        words = f"{fate.what}, {what}" if what else fate.what
        result[name] = fate._replace(what=words, measured_error=error)
    return result


def stages_line(comparison: Comparison, source: Source, num_images: int) -> str:
    """The errors of the pyramid's levels in one line."""
    levels = [level for level in comparison.stages if level.startswith("C") or "fpn" in source.parts]
    return f"features against the file's own norms, relative error on {num_images} images: " + ", ".join(
        f"{level} {comparison.stages[level]:.2f}" for level in levels
    )


def fate_lines(fates: dict[str, Fate]) -> list[str]:
    """What became of the norms: a line for each part and fate, with the range of the errors."""
    groups: dict[tuple[str, str], list[Fate]] = {}
    for name, fate in fates.items():
        groups.setdefault((name.partition(".")[0], fate.what), []).append(fate)
    lines = []
    for (part, what), members in groups.items():
        line = f"{part}: {len(members)} norm layer{'s' if len(members) > 1 else ''} {what}"
        for word, attribute in (("expected", "expected_error"), ("measured", "measured_error")):
            errors = [getattr(one, attribute) for one in members if getattr(one, attribute) is not None]
            if len(errors) == 1:
                line += f"; {word} error {errors[0]:.2f}"
            elif errors:
                line += f"; {word} error {min(errors):.2f} to {max(errors):.2f}, median {statistics.median(errors):.2f}"
        lines.append(line)
    return lines
