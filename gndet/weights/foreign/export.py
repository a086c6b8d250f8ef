"""Write a gndet detector in the form that detectron2, torchvision or mmdetection loads: their names and class order.

The weights absorb exactly what the toolkit's default settings cannot express: eps of each GN layer and of BN, weight
standardization, pixel_std, the channel order. Notes report the remaining differences. K classes.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.conv_norm import StandardizedConv2d
from gndet.weights.foreign import dense_rows
from gndet.weights.foreign.formats import FACTS
from gndet.weights.foreign.names import layer_names, vgg_names
from gndet.weights.read import DENSE, PARTS, STEM, class_rows, has_background

TOOLKITS = ("detectron2", "torchvision", "mmdetection")
EPS = 1e-5  # of every norm layer in the toolkits
VGG_HEAD = (7, 4096, 4096)  # of torchvision's VGG: side of the pooled map, and widths of the layers before the logits
GROUPS = 32  # of GN in the toolkits, unless code chooses another number


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
    parts = tuple(part for part in PARTS if any(key.startswith(f"{part}.") for key in state))
    _refuse(cfg, parts, toolkit)
    state = _folded(dict(state), cfg, toolkit)
    dense_rows.to_file(state, cfg.dense, toolkit, background=FACTS[toolkit].background_first)
    norms, tensors = cfg.part_norms(), {}
    for layer, name in _names(cfg, parts, toolkit).items():
        norm = norms.get(layer.partition(".")[0], NormConfig(kind="none"))  # a classifier's head has no norm
        for parameter in ("weight", "bias", "running_mean", "running_var"):
            key = f"{layer}.{parameter}"
            if key in state:
                tensors[f"{name}.{parameter}"] = _rows(state[key], layer, cfg, toolkit).contiguous().clone()
        learns = norm.kind != "frozen_bn" or toolkit == "mmdetection" or cfg.backbone.kind == "vgg"
        has_counter = norm.has_running_statistics and learns
        if layer.endswith(".norm") and has_counter:  # torch's BatchNorm2d counts batches, frozen layers do not
            counter = state.get(f"{layer}.num_batches_tracked", torch.tensor(0))
            tensors[f"{name}.num_batches_tracked"] = counter.clone()
        if cfg.backbone.kind == "vgg" and layer.endswith(".conv") and f"{layer}.bias" not in state:
            tensors[f"{name}.bias"] = torch.zeros(len(state[f"{layer}.weight"]))  # vgg16_bn has one before each norm
    content: dict[str, Any] = tensors
    if toolkit == "detectron2":
        content = {"model": tensors, "__author__": "gndet", "matching_heuristics": False}
    elif toolkit == "mmdetection":
        content = {"meta": _meta(cfg, classes if named else ()), "state_dict": tensors}
    make_notes = _classifier_notes if "classifier" in parts else partial(_notes, parts=parts, toolkit=toolkit)
    return Export(content, tensors, make_notes(cfg, num_classes=len(classes)))


def _refuse(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> None:
    """Raise ConfigError for a model that the toolkit cannot build."""
    norms, is_vgg = cfg.part_norms(), "classifier" in parts and cfg.backbone.kind == "vgg"
    if "classifier" in parts:
        _refuse_classifier(cfg, toolkit)
    if cfg.neck != "fpn" and toolkit != "detectron2":
        raise ConfigError(f"model.neck: {cfg.neck}; {toolkit} has no such detector, --to detectron2 writes it")
    if cfg.backbone.dilated_blocks != "all":
        raise ConfigError(f"model.backbone.dilated_blocks: {cfg.backbone.dilated_blocks}; {toolkit} dilates all blocks")
    if "dense" in parts:
        _refuse_dense(cfg, toolkit)
    if "rpn" in parts and norms["rpn"].kind != "none":
        raise ConfigError(f"model.rpn.norm: {norms['rpn'].kind}; {toolkit} has no norm in the RPN")
    for part in [part for part in parts if part in norms and norms[part].replaces_relu]:
        raise ConfigError(f"model.{part}.norm: {norms[part].kind}; {toolkit} has no such norm and activation")
    if norms["backbone"].kind == "none" and not is_vgg:
        raise ConfigError(f"model.backbone.norm: none; {toolkit} has no ResNet without norms")
    if (cfg.backbone.kind != "resnet" and not is_vgg) or cfg.backbone.width != 1:
        raise ConfigError(
            f"model.backbone: {cfg.backbone.kind}, width {cfg.backbone.width:g}; {toolkit} has other ResNets"
        )
    if cfg.backbone.stem != "plain" or cfg.backbone.average_shortcuts:
        raise ConfigError(f"model.backbone: a deep stem or average_shortcuts; gndet writes no ResNet-D for {toolkit}")
    if toolkit == "torchvision" and cfg.backbone.stride_in_1x1:
        raise ConfigError("model.backbone.stride_in_1x1: torchvision has the stride in the 3x3 only")
    if "box_head" in parts and norms["box_head"].kind != "none" and not cfg.box_head.norm_last:
        raise ConfigError(f"model.box_head.norm_last: false; {toolkit} has the norm after every convolution or none")
    if "box_head" in parts and toolkit == "torchvision" and cfg.box_head.class_agnostic:
        raise ConfigError(
            "model.box_head.class_agnostic: torchvision's detectors have a box per class, and no cascades"
        )
    if "mask_head" in parts and cfg.detector == "cascade_rcnn":
        theirs = {"detectron2": ("first", "last"), "mmdetection": ("each",)}[toolkit]
        if cfg.cascade.mask_stages not in theirs:
            heads = "one mask head" if toolkit == "detectron2" else "a mask head per stage"
            raise ConfigError(
                f"model.cascade.mask_stages: {cfg.cascade.mask_stages}; a cascade of {toolkit} has {heads}"
            )
    if "box_head" in parts and len(cfg.rpn.aspect_ratios) != 3:
        raise ConfigError(f"model.rpn.aspect_ratios: {cfg.rpn.aspect_ratios}; expected three to export")


def _refuse_dense(cfg: ModelConfig, toolkit: str) -> None:
    """Raise ConfigError for a dense detector that the toolkit cannot build."""
    known = {"fcos": ("torchvision",), "retinanet": ("torchvision", "detectron2")}[cfg.detector]
    if toolkit not in known:
        raise ConfigError(f"--to {toolkit}: gndet writes model.detector: {cfg.detector} for {' and '.join(known)} only")
    like = ModelConfig.model_validate({"detector": cfg.detector, "masks": False, "compat": toolkit}).dense
    wanted: dict[str, Any] = {"quality": "centerness" if cfg.detector == "fcos" else "none"}
    wanted |= {name: getattr(like, name) for name in ("scales", "aspect_ratios")}
    if cfg.part_norms()["dense"].kind != "none":  # without a norm, every convolution has a bias
        wanted["conv_bias"] = cfg.detector == "fcos" or toolkit == "detectron2"
    for name, value in wanted.items():
        if (got := getattr(cfg.dense, name)) != value:
            raise ConfigError(f"model.dense.{name}: {got}; {toolkit}'s {cfg.detector} has {value}")
    if cfg.part_norms()["dense"].kind == "none" and cfg.detector == "fcos":
        raise ConfigError("model.dense.norm: none; torchvision's fcos has GN")


def _refuse_classifier(cfg: ModelConfig, toolkit: str) -> None:
    """Raise ConfigError for a classifier that no classifier of the toolkit equals."""
    head, norm = cfg.classifier, cfg.part_norms()["backbone"]
    if toolkit != "torchvision":
        raise ConfigError(f"--to {toolkit}: gndet writes classifiers for torchvision only, whose names timm reads, too")
    shape = f"pool_size {head.pool_size}, fc_channels {list(head.fc_channels)}"
    if cfg.backbone.kind != "vgg":
        if head.fc_channels or head.pool_size > 1:
            raise ConfigError(f"model.classifier: {shape}; torchvision's ResNets have one fully connected layer")
        return
    if (head.pool_size, *head.fc_channels) != VGG_HEAD:
        raise ConfigError(f"model.classifier: {shape}; torchvision's VGG has pool_size 7, fc_channels [4096, 4096]")
    if norm.kind != "none" and not norm.has_running_statistics:
        raise ConfigError(
            f"model.backbone.norm: {norm.kind}; torchvision has VGG-16 without norms (vgg16) and with BN (vgg16_bn), "
            "whose norm no argument replaces"
        )


def _names(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> dict[str, str]:
    """Return the toolkit's name of each layer."""
    if "classifier" not in parts:
        return layer_names(toolkit if cfg.neck == "fpn" else f"{toolkit}_{cfg.neck}", cfg, parts)
    return vgg_names(cfg) if cfg.backbone.kind == "vgg" else layer_names("resnet", cfg, parts)


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


def _rows(tensor: Tensor, layer: str, cfg: ModelConfig, toolkit: str) -> Tensor:
    """Put the background's row first if the toolkit has it there; a row that gndet lacks is zero.

    `dense_rows.to_file` has done it for dense detectors.
    """
    rows = class_rows(layer, cfg)
    if not rows or layer == DENSE or layer.startswith("classifier.") or not FACTS[toolkit].background_first:
        return tensor
    if has_background(layer):
        return torch.cat([tensor[-1:], tensor[:-1]])
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])


def _meta(cfg: ModelConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return mmdetection's meta: the classes, and the settings in its own syntax, as formats.py reads them."""
    style, norm = "caffe" if cfg.backbone.stride_in_1x1 else "pytorch", cfg.part_norms()["backbone"]
    settings = f"mean={list(cfg.pixel_mean)}, std={list(cfg.pixel_std)}, bgr_to_rgb=True, style='{style}'"
    if norm.kind == "gn":
        per_group = norm.channels_per_group
        settings += f", channels_per_group={per_group}" if per_group else f", num_groups={norm.groups}"
    meta = {"config": settings, "author": "gndet"}
    return meta | ({"dataset_meta": {"CLASSES": list(classes)}} if classes else {})


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> list[str]:
    """List the settings with which the toolkit reads pictures and builds the model like gndet."""
    mean, depth, in_1x1 = list(cfg.pixel_mean), cfg.backbone.depth, cfg.backbone.stride_in_1x1
    agnostic, is_cascade, cascade = cfg.box_head.class_agnostic, cfg.detector == "cascade_rcnn", cfg.cascade
    weights = [[xy, xy, wh, wh] for xy, wh in cascade.delta_weights]
    ious = list(cascade.positive_iou)
    base = "RetinaNet" if cfg.is_dense else {"fpn": "RCNN-FPN", "c4": "RCNN-C4", "dc5": "RCNN-DilatedC5"}[cfg.neck]
    head = "RETINANET" if cfg.is_dense else "ROI_HEADS"
    groups, width = cfg.backbone.cardinality, cfg.backbone.group_width
    grouped = (groups, width) != (1, 64)
    settings = {
        "detectron2": [
            f"_BASE_ Base-{base}.yaml",
            f"MODEL.PIXEL_MEAN {mean[::-1]}, PIXEL_STD [1.0, 1.0, 1.0], INPUT.FORMAT BGR",
            f"MODEL.RESNETS.DEPTH {depth}, STRIDE_IN_1X1 {in_1x1}, MODEL.{head}.NUM_CLASSES {num_classes}"
            + (f", MODEL.RESNETS.NUM_GROUPS {groups}, WIDTH_PER_GROUP {width}" if grouped else ""),
        ],
        "torchvision": [
            f"image_mean {[round(x / 255, 6) for x in mean]}, image_std [0.229, 0.224, 0.225], num_classes "
            f"{num_classes + 1} (background first)"
            + (f"; backbone with groups={groups}, width_per_group={width}" if grouped else ""),
        ],
        "mmdetection": [
            f"data_preprocessor: mean={mean}, std={list(cfg.pixel_std)}, bgr_to_rgb=True",
            "backbone: "
            + (f"type='ResNeXt', groups={groups}, base_width={width}, " if grouped else "")
            + f"depth={depth}, style={'caffe' if in_1x1 else 'pytorch'}; num_classes={num_classes}",
        ],
    }[toolkit]
    more = {
        "detectron2": [
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True" if agnostic else "",
            f"MODEL.ROI_HEADS.NAME CascadeROIHeads, MODEL.ROI_BOX_CASCADE_HEAD.IOUS {ious}, BBOX_REG_WEIGHTS {weights}"
            if is_cascade else "",
        ],
        "mmdetection": [
            "bbox_head: reg_class_agnostic=True" if agnostic else "",
            f"roi_head: type='CascadeRoIHead'; target_stds by stage: {[[1 / w for w in stage] for stage in weights]}"
            if is_cascade else "",
        ],
    }  # fmt: skip
    return settings + list(filter(None, more.get(toolkit, [])))


def _classifier_notes(cfg: ModelConfig, num_classes: int) -> list[str]:
    """Say how torchvision and timm build the same classifier, and how its pictures are prepared."""
    norm, backbone = cfg.part_norms()["backbone"], cfg.backbone
    mean = [round(x / 255, 6) for x in cfg.pixel_mean]
    pictures = f"transforms.Normalize({mean}, [0.229, 0.224, 0.225])"
    if backbone.kind == "vgg":
        name, dropout = "vgg16" if norm.kind == "none" else "vgg16_bn", f"dropout={cfg.classifier.dropout:g}"
        sides = "differs: if 32 does not divide a picture's sides, torchvision drops the last rows and columns of a map"
        return [f"torchvision.models.{name}(num_classes={num_classes}, {dropout})", pictures, sides]
    per_group = norm.channels_per_group
    groups = {"gn": f"channels // {per_group}" if per_group else str(norm.groups), "ln": "1", "in": "channels"}
    layer = ", norm_layer=torchvision.ops.FrozenBatchNorm2d" if norm.kind == "frozen_bn" else ""
    if norm.kind in groups:
        layer = f", norm_layer=lambda channels: torch.nn.GroupNorm({groups[norm.kind]}, channels)"
    is_wide, width, timm_width = backbone.cardinality > 1 or backbone.group_width != 64, "", ""
    if is_wide:
        width = f", groups={backbone.cardinality}, width_per_group={backbone.group_width}"
        timm_width = f", cardinality={backbone.cardinality}, base_width={backbone.group_width}"
    lines = [f"torchvision.models.resnet{backbone.depth}(num_classes={num_classes}{width}{layer})", pictures]
    if norm.kind == "gn" and not per_group and norm.groups == GROUPS:
        timm_width += ", norm_layer=timm.layers.GroupNorm"
    elif norm.is_group_norm or norm.kind == "frozen_bn":
        return lines
    return [*lines, f"timm.create_model('resnet{backbone.depth}', num_classes={num_classes}{timm_width})"]


def _notes(cfg: ModelConfig, parts: tuple[str, ...], num_classes: int, toolkit: str) -> list[str]:
    """List what to set in the toolkit for the same results, and which differences remain."""
    norms, lines = cfg.part_norms(), _settings(cfg, num_classes, toolkit)
    for part in parts:
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
    preset = ModelConfig.model_validate(
        {"compat": toolkit, "neck": cfg.neck, "detector": cfg.detector, "masks": cfg.masks}
    )
    sections = [part for part in parts if part not in ("backbone", "fpn")]
    for part in sections + ["cascade"] * (cfg.detector == "cascade_rcnn"):
        defaults, options = getattr(preset, part).model_dump(), getattr(cfg, part).model_dump()
        lines += [
            f"differs: {part}.{option} is {options[option]} in this model, {defaults[option]} by {toolkit}'s default"
            for option in options
            if option != "norm" and options[option] != defaults[option]
        ]
    return lines
