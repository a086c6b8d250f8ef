"""Write a gndet detector in the form that detectron2, torchvision or mmdetection loads: their names and class order.

The weights absorb exactly what the toolkit's default settings cannot express: eps of each GN layer and of BN, weight
standardization, pixel_std, the channel order. Notes report the remaining differences. K classes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.conv_norm import StandardizedConv2d
from gndet.weights.foreign import classifier
from gndet.weights.foreign.formats import FACTS, KIND_FIRST, PARTS, layer_names
from gndet.weights.foreign.part import GROUPS, new_model
from gndet.weights.read import PARTS as SECTIONS
from gndet.weights.read import STEM

TOOLKITS = ("detectron2", "torchvision", "mmdetection")
EPS = 1e-5  # of every norm layer in the toolkits


class Export(NamedTuple):
    """The content of a file, and the settings that the toolkit needs with it."""

    content: dict[str, Any]  # of the file
    tensors: dict[str, Tensor]  # the state dict in it
    notes: list[str]


def export_weights(
    state: dict[str, Tensor], cfg: ModelConfig, classes: tuple[str, ...], toolkit: str, *, named: bool = True
) -> Export:
    """Turn a detector's tensors into those of another toolkit.

    state: by gndet's names; cfg: of its model; toolkit: one of TOOLKITS; named: whether classes holds the real names.
    Raises ConfigError for a model that the toolkit cannot build, e.g. with a norm in the RPN.
    """
    sections = tuple(section for section in SECTIONS if any(key.startswith(f"{section}.") for key in state))
    is_classifier = "classifier" in sections
    if refusal := next((words for part in KIND_FIRST for words in part.refusals(cfg, sections, toolkit)), ""):
        raise ConfigError(refusal)
    state = _folded(dict(state), cfg, toolkit)
    for part in PARTS:
        part.to_file(state, cfg, toolkit)
    format = cfg.backbone.kind if is_classifier else toolkit if cfg.neck == "fpn" else f"{toolkit}_{cfg.neck}"
    norms, tensors = cfg.part_norms(), dict[str, Tensor]()
    for layer, name in layer_names(format, cfg, sections).items():
        norm = norms.get(layer.partition(".")[0], NormConfig(kind="none"))  # a classifier's head has no norm
        for parameter in ("weight", "bias", "running_mean", "running_var"):
            key = f"{layer}.{parameter}"
            if key in state:
                tensors[f"{name}.{parameter}"] = state[key].contiguous().clone()
        key = f"{layer}.num_batches_tracked"  # torch's BatchNorm2d counts batches, frozen layers do not
        learns = norm.has_running_statistics and (norm.kind != "frozen_bn" or toolkit == "mmdetection")
        if layer.endswith(".norm") and (learns or key in state):
            tensors[f"{name}.num_batches_tracked"] = state.get(key, torch.tensor(0)).clone()
    content: dict[str, Any] = tensors
    if toolkit == "detectron2":
        content = {"model": tensors, "__author__": "gndet", "matching_heuristics": False}
    elif toolkit == "mmdetection":
        content = {"meta": _meta(cfg, classes if named else ()), "state_dict": tensors}
    num = len(classes)
    notes = classifier.notes(cfg, num) if is_classifier else _notes(cfg, sections, num, toolkit)
    return Export(content, tensors, notes)


def _folded(state: dict[str, Tensor], cfg: ModelConfig, toolkit: str) -> dict[str, Tensor]:
    """Fold into the weights what the toolkit's layers cannot express."""
    norms = cfg.part_norms()
    for key in [key for key in state if key.endswith(".conv.weight")]:
        norm, layer = norms[key.partition(".")[0]], key.removesuffix(".conv.weight") + ".norm"
        weight = state[key]
        if norm.weight_standardization:
            weight = StandardizedConv2d.standardize(weight, norm.standardization)
        if norm.has_running_statistics and norm.eps != EPS:
            var = state[f"{layer}.running_var"].double()
            gamma = state[f"{layer}.weight"].double() * ((var + EPS) / (var + norm.eps)).sqrt()
            state[f"{layer}.weight"] = gamma.float()
        elif f"{layer}.bias" in state and not norm.has_running_statistics:
            eps = float(state.pop(f"{layer}.eps", norm.eps))
            if eps != EPS:  # GN of s x with eps is GN of x with eps / s^2; a tiny eps stands for 0
                scale = (EPS / max(eps, 1e-12)) ** 0.5
                weight = (weight.double() * scale).float()
                if (bias := state.get(key.removesuffix("weight") + "bias")) is not None:
                    state[key.removesuffix("weight") + "bias"] = (bias.double() * scale).float()
        state[key] = weight
    if toolkit != "mmdetection":  # mmdetection takes any pixel_std
        scale = torch.tensor(FACTS[toolkit].std) / torch.tensor(cfg.pixel_std)
        state[STEM] = state[STEM] * scale[:, None, None]
    if FACTS[toolkit].bgr:
        state[STEM] = state[STEM].flip(1)
    return state


def _meta(cfg: ModelConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return mmdetection's meta: the classes, and the settings in its own syntax, as formats.py reads them."""
    style, norm = "caffe" if cfg.backbone.stride_in_1x1 else "pytorch", cfg.part_norms()["backbone"]
    settings = f"mean={list(cfg.pixel_mean)}, std={list(cfg.pixel_std)}, bgr_to_rgb=True, style='{style}'"
    if norm.kind == "gn":
        per_group = norm.channels_per_group
        settings += f", channels_per_group={per_group}" if per_group else f", num_groups={norm.groups}"
    meta = {"config": settings, "author": "gndet"}
    return meta | ({"dataset_meta": {"CLASSES": list(classes)}} if classes else {})


def _notes(cfg: ModelConfig, parts: tuple[str, ...], num_classes: int, toolkit: str) -> list[str]:
    """List what to set in the toolkit for the same results, and which differences remain."""
    norms = cfg.part_norms()
    lines = [line for part in KIND_FIRST for line in part.settings(cfg, num_classes, toolkit)]
    for part in [part for part in parts if part in cfg.normed_parts]:
        norm = norms[part]
        if norm.is_group_norm and (norm.kind != "gn" or norm.channels_per_group or norm.groups != GROUPS):
            lines.append(
                f"{part}: GN with {norm.grouping if norm.kind == 'gn' else norm.kind}; {toolkit} builds 32 groups "
                "unless your code passes another norm, and with 32 groups it computes something else"
            )
        if norm.weight_standardization:
            lines.append(f"{part}: weight standardization is folded into the weights, for inference")
    lines.append("norms: " + ", ".join(f"{part} {norms[part].kind}" for part in parts))
    if any(norms[part].masked and norms[part].kind != "none" for part in parts):
        lines.append(f"differs: norms are masked in this model; in {toolkit} the padding around a picture enters them")
    sections = {name: options for part in PARTS for name, options in part.defaults(cfg, toolkit).items()}
    preset = new_model(cfg, toolkit, sections)
    beside = [section for section in cfg.sections if section not in cfg.parts]  # a cascade's stages
    for part in [*(part for part in parts if part not in ("backbone", "fpn")), *beside]:
        defaults, options = getattr(preset, part).model_dump(), getattr(cfg, part).model_dump()
        lines += [
            f"differs: {part}.{option} is {options[option]} in this model, {defaults[option]} by {toolkit}'s default"
            for option in options
            if option != "norm" and f"{part}.{option}" not in cfg.lacks and options[option] != defaults[option]
        ]
    return lines
