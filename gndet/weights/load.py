"""Build the model that training starts with from its config, then load `train.weights` into it.

K classes; the background is the last row of a layer that has one (read.has_background).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from gndet.config.model import WHOLE_PICTURES, ModelConfig
from gndet.config.schema import Config
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.image_model import ImageModel
from gndet.modeling.trained import first_few
from gndet.weights.convert import Fate, measure_norms
from gndet.weights.policy import (
    AS_IN_FILE,
    STATISTICS,
    carry_norms,
    fate_lines,
    mismatched,
    own_parameters,
    reference_norms,
    with_policy,
)
from gndet.weights.positives import with_positives
from gndet.weights.read import STEM, Source, class_rows, has_background, read_source

COUNTER = "num_batches_tracked"  # bn has it, frozen_bn does not, and neither needs it
# differences to report, not to refuse
NOTED = ("anchor_sizes", "anchor_stride")  # options of the part with the anchors


class InitialModel(NamedTuple):
    """A model to train, and where its weights come from."""

    model: ImageModel
    cfg: Config  # norm_policy: hybrid has changed the norm of parts; model.dense.positives has become a number
    notes: list[str]  # the lines of the report
    fates: dict[str, Fate]  # what became of each norm layer that is in the file; the others are new


def initial_model(
    cfg: Config,
    classes: Sequence[str],
    *,
    load: bool = True,
    images: Dataset | None = None,
    source: Source | None = None,
    measure: bool = True,
) -> InitialModel:
    """Build the model that training starts with: initialized from cfg.seed, then, if load, from train.weights.

    classes: in the order of the labels.  images: training images, to fit on (norm_policy: calibrate), to measure any
    conversion on, and to count the positives of a dense detector (model.dense.positives: measure).  source: the content
    of train.weights, if it has been read already.  measure: False to skip fitting and measuring, if rank 0 does both
    and broadcasts the weights, or if only the layers matter.
    Raises ConfigError (also for frozen random stages), CheckpointError, DataError; never returns a half-loaded model.
    """
    if cfg.model.backbone.freeze_at and not cfg.train.weights:
        raise ConfigError(
            f"model.backbone.freeze_at: {cfg.model.backbone.freeze_at} would freeze random weights; "
            "set train.weights to a checkpoint, or model.backbone.freeze_at=0 to train from scratch"
        )
    if not load or not cfg.train.weights:
        source = None
    else:
        source = source or read_source(cfg.train.weights, cfg.train.source, cfg.model.backbone.name)
        cfg = cfg.model_copy(update={"model": with_policy(source, cfg.model, cfg.train)})
    cfg, counted = (cfg, []) if images is None or not load else with_positives(cfg, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = build_model(cfg.model, len(classes))
    if source is None:
        return InitialModel(model, cfg, counted, {})
    notes, fates = load_weights(model, source, classes, cfg)
    notes = [*counted, *notes]
    references = {} if cfg.train.norm_policy == "reinit" else reference_norms(source, model, cfg.model)
    if measure and references:
        fates, report = measure_norms(model, references, fates, cfg, images, pyramid="fpn" in source.parts)
        notes += report
    return InitialModel(model, cfg, [*notes, *fate_lines(fates)], fates)


def load_weights(
    model: ImageModel, source: Source, classes: Sequence[str], cfg: Config
) -> tuple[list[str], dict[str, Fate]]:
    """Load a source into a model for other classes.

    model: built from cfg.model for `classes`, in the order of its labels.
    Rows of classes that the source has under the same name, and the background's, are carried over.  Rows of other
    classes, and parts that the source lacks, keep their initialization.
    Returns the report (what was loaded, and every tensor and class that was not) and what became of each norm layer.
    Raises CheckpointError, and leaves the model untouched, if tensors are missing or do not fit, or conventions differ.
    """
    state, fates = carry_norms(source, model, cfg)
    scale = torch.tensor(cfg.model.pixel_std) / torch.tensor(source.model.pixel_std)
    if (scale != 1).any() and STEM in state:
        state[STEM] = state[STEM] * scale[:, None, None]
    model_state, known = model.state_dict(), source.classes or ()
    carried = [(classes.index(name), known.index(name)) for name in classes if name in known]
    fitting, wrong = _fitting(model_state, state, source, fates, carried, cfg.model)
    if wrong:
        cause = _differences(cfg.model.shaping(), source.model, cfg.model) or [
            "unknown: the options that decide the shapes are the same; was the file edited or cut short?"
        ]
        lines = [*first_few(wrong), "likely cause: " + "; ".join(cause)]
        fit = [part for part in source.parts if not any(line.startswith(f"{part}.") for line in wrong)]
        if fit := [part for part in fit if part in cfg.model.parts]:
            lines.append(f"train.source.parts=[{','.join(fit)}] takes only the parts that fit")
        raise CheckpointError("\n  ".join([f"{source.path}: {len(wrong)} tensors do not fit this model", *lines]))
    notes = [*source.notes, *_compare_conventions(source, cfg)]
    model.load_state_dict(model_state | fitting)
    anew = [key for key in model_state if key not in fitting and not key.endswith(COUNTER)]
    return [*notes, *_report(fitting, anew, _unused(model_state, state), classes, source, cfg.model)], fates


def _fitting(
    model_state: dict[str, Tensor],
    state: dict[str, Tensor],
    source: Source,
    fates: dict[str, Fate],
    carried: Sequence[tuple[int, int]],
    model: ModelConfig,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors to load over the model's own, and a line for each that does not fit.

    state: of the file; carried: the classes whose rows are copied, as (index in the model, index in the file).
    If the file has a part, it must have all of its tensors, except those of norms that a policy replaced, and their
    convolutions' biases.
    """
    changed = [name for name, fate in fates.items() if not fate.what.startswith(AS_IN_FILE)]
    free = {f"{name}.{key}" for name in changed for key in STATISTICS}
    free |= {name.removesuffix("norm") + "conv.bias" for name in changed}
    free |= {key for name in changed for key in own_parameters(name)}
    held = {"backbone", *source.parts}
    fitting = {
        key: state[key]
        for key in state
        if key.endswith(".norm.eps") and key.removesuffix("eps") + "weight" in model_state
    }
    wrong = []
    for key, tensor in model_state.items():
        layer, part = key.rpartition(".")[0], key.partition(".")[0]
        if key not in state:
            if part in held and not key.endswith(COUNTER) and key not in free:
                wrong.append(f"{key}: absent from the file, {list(tensor.shape)} here")
            continue
        rows, expected = class_rows(layer, model), tuple(tensor.shape)
        if rows:
            expected = (source.num_classes * rows + has_background(layer), *tensor.shape[1:])
        if state[key].shape != expected:
            wrong.append(f"{key}: {list(state[key].shape)} in the file, expected {list(expected)}")
        elif rows:
            background = [(-1, -1)] if has_background(layer) else []
            fitting[key] = _with_rows(tensor, state[key], rows, [*carried, *background])
        else:
            fitting[key] = state[key]
    built = {key.partition(".")[0] for key in model_state}
    for key in _unused(model_state, state):  # a deeper backbone holds all tensors of a shallower one
        if key.partition(".")[0] in built.intersection(source.parts):
            wrong.append(f"{key}: {list(state[key].shape)} in the file, absent here")
    return fitting, wrong


def _unused(model_state: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if key not in model_state and not key.endswith((COUNTER, ".norm.eps"))]


def _with_rows(model_tensor: Tensor, file_tensor: Tensor, rows: int, carried: Sequence[tuple[int, int]]) -> Tensor:
    result = model_tensor.clone().unflatten(0, (-1, rows))  # (classes, rows, ...)
    file_rows = file_tensor.unflatten(0, (-1, rows))
    for row, file_row in carried:
        result[row] = file_rows[file_row]
    return result.flatten(0, 1)


def _report(
    fitting: dict[str, Tensor], anew: list[str], unused: list[str], classes: Sequence[str], source: Source,
    model: ModelConfig,
) -> list[str]:  # fmt: skip
    """List what was loaded, by part and by class, and everything that was not loaded."""
    by_class = [key for key in fitting if class_rows(key.rpartition(".")[0], model)]
    counts = Counter(key.partition(".")[0] for key in fitting if key not in by_class)
    known = source.classes or ()
    names = {
        "tensors": [f"{part} {count}" for part, count in counts.items()],
        "classes carried over by name": [name for name in classes if name in known],
        "newly initialized classes": [name for name in classes if name not in known],
        "classes of the file not used": [name for name in known if name not in classes],
        "newly initialized tensors": anew,
        "tensors of the file not used": [*unused, *source.unused],
    }
    if not by_class:
        names = {title: listed for title, listed in names.items() if not title.startswith("classes")}
    return [f"{title}: {', '.join(listed)}" for title, listed in names.items() if listed]


def _compare_conventions(source: Source, cfg: Config) -> list[str]:
    """Refuse a model that computes something else from the file's weights.  Returns lines on smaller differences."""
    file_model, model = source.model, cfg.model
    parts = [part for part in source.parts if part in model.parts]
    ignored = "" if model.backbone.depth >= 50 else "backbone.stride_in_1x1"  # basic blocks have no 1x1
    names = [name for part, name in model.meaning() if part in parts and name != ignored]
    if model.part_norms()["backbone"].weight_standardization or STEM not in source.state:  # it cannot be folded
        names.append("pixel_std")
    different = _differences(names, file_model, model)
    for part in parts:
        old, new = (norms.get(part) for norms in (file_model.part_norms(), model.part_norms()))
        if old and new and old.weight_standardization and new.weight_standardization:
            key = f"model.{part}.norm" if getattr(model, part).norm else "model.norm"
            if old.standardization != new.standardization:
                different.append(
                    f"{key}.standardization: {old.standardization} in the file, {new.standardization} here"
                )
    if different and cfg.train.source.differences == "refuse":
        preset = f"; model.compat={file_model.compat} sets all of its toolkit's conventions"
        raise CheckpointError(
            "\n  ".join([f"{source.path}: its weights mean something else in this model:", *different])
            + f"\n  set these options as in the file{preset if file_model.compat != model.compat else ''}; if the "
            "file does not state them and gndet assumed its toolkit's usual values, state the true ones in "
            "train.source.*; train.source.differences=report fine-tunes anyway"
        )
    lines = [f"warning: {line}" for line in different]
    if file_model.pixel_std != model.pixel_std and STEM in source.state:
        lines.append(f"pixel_std {file_model.pixel_std} of the file is folded into the stem, exactly")
    lines += _differences([f"{model.anchored}.{name}" for name in NOTED if model.anchored in parts], file_model, model)
    differing = mismatched(source, model)
    same = [part for part in parts if part not in differing]
    if not {*source.parts} <= {"backbone", "classifier"}:  # classifiers see no padding
        lines += padding_warnings(file_model, model, [part for part in WHOLE_PICTURES if part in same])
    for part in [part for part in same if part in model.normed_parts]:
        file_norm, norm = file_model.part_norms()[part], model.part_norms()[part]
        if norm.is_group_norm and file_norm.eps != norm.eps:
            lines.append(f"{part}.norm: eps {file_norm.eps:g} of the file is kept, not {norm.eps:g} of the config")
    return lines


def padding_warnings(file_model: ModelConfig, model: ModelConfig, parts: Sequence[str] = WHOLE_PICTURES) -> list[str]:
    """Warn of each part whose GN, LN or IN was trained with another padding (masked or plain) than the model's."""
    words = {True: "masked", False: "plain"}
    return [
        f"warning: {part}.norm was trained with padding: {words[old.masked]}, here it is {words[new.masked]}; "
        "results differ if a batch mixes picture sizes"
        for part, old, new in ((part, file_model.part_norms()[part], model.part_norms()[part]) for part in parts)
        if new.is_group_norm and old.masked != new.masked
    ]


def _differences(options: Iterable[str], file_model: ModelConfig, model: ModelConfig) -> list[str]:
    values = [(name, attrgetter(name)(file_model), attrgetter(name)(model)) for name in options]
    return [f"model.{name}: {old} in the file, {new} here" for name, old, new in values if old != new]
