"""The head of the dense detectors, FCOS and RetinaNet, in the files of other toolkits.

K classes, A anchors per cell: scales times ratios.  gndet orders class scores as (K, A), so that a class has its own
rows; toolkits order them as (A, K).  Anchors come scale by scale, except in torchvision, ratio by ratio.
Placeholders: n = 0.. a convolution, x = 3 n, x1 = x + 1, e = 2 n.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gndet.config.dense import DenseConfig
from gndet.config.model import ModelConfig
from gndet.errors import CheckpointError
from gndet.weights.foreign.names import ConvNames, Names, sequence, toolkit_of, with_endings
from gndet.weights.foreign.part import BACKGROUND_FIRST, Layer, Part, Reader, State, Tree, new_model
from gndet.weights.read import DENSE

BOXES = "dense.boxes"
NEVER = -100.0  # logit of torchvision's background class, whose score must not count
TOWERS = {"classification": "cls_convs", "regression": "box_convs"}
NAMES: dict[str, Names] = {
    "torchvision": {
        **{f"retinanet_{kind}": sequence(f"head.{kind}_head.conv.{{n}}") for kind in TOWERS},
        **{f"fcos_{kind}": with_endings(".{x}", ".{x1}", f"head.{kind}_head.conv") for kind in TOWERS},
        "dense_cls": "head.classification_head.cls_logits", "dense_boxes": "head.regression_head.bbox_reg",
        "quality": "head.regression_head.bbox_ctrness"},
    "detectron2": {
        "retinanet_classification": ConvNames("head.cls_subnet.{x}", "head.cls_subnet.{x1}", "head.cls_subnet.{e}"),
        "retinanet_regression": ConvNames("head.bbox_subnet.{x}", "head.bbox_subnet.{x1}", "head.bbox_subnet.{e}"),
        "dense_cls": "head.cls_score", "dense_boxes": "head.bbox_pred"},
}  # fmt: skip


def _defaults(cfg: ModelConfig, toolkit: str) -> Tree:
    """Return the options of a new model of the toolkit, of cfg's kind, that depend on the norm of its towers."""
    has_norm = cfg.part_norms()["dense"].kind != "none"
    is_v2 = (cfg.detector, toolkit, has_norm) == ("retinanet", "torchvision", True)
    bias = {} if has_norm else {"conv_bias": cfg.dense.conv_bias}  # without norms, every convolution has a bias
    return {"dense": {**bias, **({"box_loss": "giou"} if is_v2 else {})}}


def _place(n: int) -> dict[str, object]:
    return {"n": n, "e": 2 * n, "x": 3 * n, "x1": 3 * n + 1}


def _layers(cfg: ModelConfig) -> Iterator[Layer]:
    if not cfg.is_dense:
        return
    for kind, convs in TOWERS.items():
        for n in range(cfg.dense.num_convs):
            yield "dense", f"{convs}.{n}", f"{cfg.detector}_{kind}", _place(n)
    yield "dense", "cls_logits", "dense_cls", {}
    yield "dense", "boxes", "dense_boxes", {}
    if cfg.dense.quality != "none":
        yield "dense", "quality", "quality", {}


def _infer(reader: Reader, tree: Tree) -> Tree:
    """Infer the head.  Raises CheckpointError for other anchors than RetinaNet's 9 per cell and FCOS's one."""
    if reader.weight("dense_cls") is None:
        return {}
    is_fcos = reader.weight("quality") is not None
    detector = {"detector": "fcos" if is_fcos else "retinanet"}
    if "fpn" not in tree:
        return detector
    conv = f"{detector['detector']}_classification"
    norm, boxes, scores = (reader.norm(conv, **_place(0)), reader.weight("dense_boxes"), reader.weight("dense_cls"))
    keys = [_key(reader, conv, norm, n) for n in range(16)]
    rows, expected = [0 if each is None else len(each) for each in (boxes, scores)], 1 if is_fcos else 9
    if rows[0] != 4 * expected or rows[1] % expected:
        raise CheckpointError(
            f"{reader.path}: {rows[0]} rows of boxes and {rows[1]} of class scores; expected {expected} anchors per "
            f"cell: {4 * expected} rows, and a multiple of {expected}"
        )
    section: Tree = {"num_convs": max(sum(key in reader.tensors for key in keys), 1), "norm": norm}
    stated = () if is_fcos else ("aspect_ratios", "anchor_sizes")
    section |= {name: values for name in stated if (values := getattr(reader.stated, name))}
    if not is_fcos and norm != "none" and toolkit_of(reader.format) == "torchvision":  # v2
        section["box_loss"] = "giou"
    section["conv_bias"] = norm == "none" or keys[0].removesuffix("weight") + "bias" in reader.tensors
    return {**detector, "dense": section}


def _key(reader: Reader, layer: str, norm: str, n: int) -> str:
    """Return the key of the weight of a tower's convolution that is followed by a norm of that kind."""
    names = reader.names[layer]
    assert isinstance(names, ConvNames)
    return (names.conv if norm != "none" or names.bare is None else names.bare).format(**_place(n)) + ".weight"


def _from_file(state: State, model: ModelConfig, format: str) -> None:
    cfg, order = model.dense, _anchors(model.dense, format)
    for key in _keys(state, DENSE):
        state[key] = state[key].unflatten(0, (cfg.kinds, -1))[order].transpose(0, 1).flatten(0, 1).contiguous()
    for key in _keys(state, BOXES):
        state[key] = state[key].unflatten(0, (cfg.kinds, 4))[order].flatten(0, 1)


def _to_file(state: State, model: ModelConfig, toolkit: str) -> None:
    """Undo `_from_file`, and add a class that is never found before the others if the toolkit has a background."""
    cfg, order = model.dense, _anchors(model.dense, toolkit).argsort()
    for key in _keys(state, DENSE):
        rows = state[key].unflatten(0, (-1, cfg.kinds))  # (K, A, ...)
        if toolkit in BACKGROUND_FIRST:
            fill = NEVER if key.endswith(".bias") else 0.0
            rows = torch.cat([torch.full_like(rows[:1], fill), rows])
        state[key] = rows.transpose(0, 1)[order].flatten(0, 1)
    for key in _keys(state, BOXES):
        state[key] = state[key].unflatten(0, (cfg.kinds, 4))[order].flatten(0, 1)


def _keys(state: State, layer: str) -> list[str]:
    return [key for key in (f"{layer}.weight", f"{layer}.bias") if key in state]


def _anchors(cfg: DenseConfig, format: str) -> Tensor:
    """Return the place in the toolkit's order of each anchor in gndet's, (A,) int64."""
    order, ratios = torch.arange(cfg.kinds), len(cfg.aspect_ratios)
    return order.view(ratios, -1).t().flatten() if format == "torchvision" else order


def _describe(model: ModelConfig, parts: tuple[str, ...]) -> Iterator[str]:
    if "dense" in parts:
        yield f"{model.detector} with {model.dense.kinds} anchor(s) per cell, P6 from {model.fpn.p6.upper()}"


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    if "dense" not in parts:
        return
    known = {"fcos": ("torchvision",), "retinanet": ("torchvision", "detectron2")}[cfg.detector]
    if toolkit not in known:
        yield f"--to {toolkit}: gndet writes model.detector: {cfg.detector} for {' and '.join(known)} only"
    like = new_model(cfg, toolkit, _defaults(cfg, toolkit)).dense
    wanted: dict[str, Any] = {"quality": "centerness" if cfg.detector == "fcos" else "none"}
    wanted |= {name: getattr(like, name) for name in ("scales", "aspect_ratios", "conv_bias")}
    for name, value in wanted.items():
        if (got := getattr(cfg.dense, name)) != value:
            yield f"model.dense.{name}: {got}; {toolkit}'s {cfg.detector} has {value}"
    if cfg.part_norms()["dense"].kind == "none" and cfg.detector == "fcos":
        yield "model.dense.norm: none; torchvision's fcos has GN"
    p6, channels = _p6_channels(cfg)
    if "fpn" in parts and toolkit == "torchvision" and cfg.fpn.p6 == "c5" and p6 == channels:
        yield f"model.fpn.p6: c5; torchvision makes P6 from P5 if C5 has as many channels as the pyramid, {channels}"


def _p6_channels(cfg: ModelConfig) -> tuple[int, int]:
    """Return the channels of the map that P6 is made from, and of the pyramid, for a ResNet of width 1."""
    c5 = 2048 if cfg.backbone.depth >= 50 else 512
    return c5 if cfg.fpn.p6 == "c5" else cfg.fpn.channels, cfg.fpn.channels


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> Iterator[str]:
    """Yield the base config of detectron2, and what P6 is made from, where that is no default."""
    p6, channels = _p6_channels(cfg)
    if not cfg.is_dense:
        return
    if toolkit == "detectron2" and cfg.fpn.p6 == "c5":
        yield "_BASE_ Base-RetinaNet.yaml"
    elif toolkit == "detectron2":  # in_feature is no option of the YAML configs
        yield (
            f"configs/common/models/retinanet.py (LazyConfig), model.backbone.top_block.in_channels {p6}, in_feature "
            "p5; Base-RetinaNet.yaml makes P6 from res5"
        )
    elif toolkit == "torchvision":
        is_v2 = cfg.detector == "retinanet" and cfg.part_norms()["dense"].kind != "none"  # v2 has GN in the head
        default = (2048, 256) if is_v2 else (256, 256)
        if (p6, channels) != default:
            builder = f"{cfg.detector}_resnet50_fpn{'_v2' if is_v2 else ''}"
            yield f"backbone with extra_blocks=LastLevelP6P7{p6, channels}; {builder} has LastLevelP6P7{default}"
    if toolkit == "detectron2":
        yield f"MODEL.RETINANET.NUM_CLASSES {num_classes}"


PART = Part(NAMES, _layers, _infer, _from_file, _to_file, _describe, _refusals, _settings, _defaults)
