"""The two-stage detectors in the files of other toolkits: the RPN, the box and mask heads, and the stages of a cascade.

K classes; the background's row is the first in the toolkits of BACKGROUND_FIRST, and the last in the others and here.
Placeholders: n = 0.. and m = 1.. a layer, x = 3 n, x1 = x + 1, f = 6 + n, fc the name of a fully connected layer in
torchvision, stage "0.", "1." and so on in a cascade whose head has stages, otherwise empty.
"""

import itertools
from collections.abc import Iterator

import torch

from gndet.config.model import ModelConfig
from gndet.config.parts import RPNConfig
from gndet.errors import CheckpointError
from gndet.weights.foreign.names import ConvNames, Names, caffe2, module, nested, sequence, toolkit_of
from gndet.weights.foreign.part import BACKGROUND_FIRST, Layer, Part, Reader, State, Tree
from gndet.weights.read import class_rows, has_background

NUM_STAGES = 3  # of a cascade in every toolkit
_RPN = "proposal_generator.rpn_head."
RPN_NAMES: dict[str, Names] = {  # rpn: the only convolution, rpn_many: one of several
    "torchvision": {
        "rpn": sequence("rpn.head.conv.{n}"), "rpn_many": sequence("rpn.head.conv.{n}"),
        "objectness": "rpn.head.cls_logits", "deltas": "rpn.head.bbox_pred"},
    "detectron2": {
        "rpn": nested(_RPN + "conv"), "rpn_many": nested(_RPN + "conv.conv{n}"),
        "objectness": _RPN + "objectness_logits", "deltas": _RPN + "anchor_deltas"},
    "mmdetection": {
        "rpn": ConvNames("rpn_head.rpn_conv", ""), "rpn_many": module("rpn_head.rpn_conv.{n}"),
        "objectness": "rpn_head.rpn_cls", "deltas": "rpn_head.rpn_reg"},
    "maskrcnn-benchmark": {
        "rpn": ConvNames("rpn.head.conv", ""), "objectness": "rpn.head.cls_logits", "deltas": "rpn.head.bbox_pred"},
    "detectron": {
        "rpn": ConvNames("conv_rpn_fpn2", ""), "objectness": "rpn_cls_logits_fpn2", "deltas": "rpn_bbox_pred_fpn2"},
}  # fmt: skip
_BOX, _PREDICTOR, _MASK = "roi_heads.box_head.", "roi_heads.box_predictor.", "roi_heads.mask_head."
_BENCHMARK_BOX, _BENCHMARK_MASK = (f"roi_heads.{head}.feature_extractor." for head in ("box", "mask"))
NAMES: dict[str, Names] = {
    "torchvision": {
        "box_conv": sequence(_BOX + "{n}"), "fc": _BOX + "{fc}",
        "cls_score": _PREDICTOR + "cls_score", "bbox_pred": _PREDICTOR + "bbox_pred",
        "mask_conv": sequence(_MASK + "{n}"), "deconv": "roi_heads.mask_predictor.conv5_mask",
        "mask_logits": "roi_heads.mask_predictor.mask_fcn_logits"},
    "detectron2": {
        "box_conv": nested(_BOX + "{stage}conv{m}"), "fc": _BOX + "{stage}fc{m}",
        "cls_score": _PREDICTOR + "{stage}cls_score", "bbox_pred": _PREDICTOR + "{stage}bbox_pred",
        "mask_conv": nested(_MASK + "mask_fcn{m}"), "deconv": _MASK + "deconv", "mask_logits": _MASK + "predictor"},
    "mmdetection": {
        "box_conv": module("roi_head.bbox_head.{stage}shared_convs.{n}"),
        "fc": "roi_head.bbox_head.{stage}shared_fcs.{n}",
        "cls_score": "roi_head.bbox_head.{stage}fc_cls", "bbox_pred": "roi_head.bbox_head.{stage}fc_reg",
        "mask_conv": module("roi_head.mask_head.{stage}convs.{n}"), "deconv": "roi_head.mask_head.{stage}upsample",
        "mask_logits": "roi_head.mask_head.{stage}conv_logits"},
    "maskrcnn-benchmark": {
        "box_conv": ConvNames(_BENCHMARK_BOX + "xconvs.{x}", _BENCHMARK_BOX + "xconvs.{x1}"),
        "fc": _BENCHMARK_BOX + "fc{f}",
        "cls_score": "roi_heads.box.predictor.cls_score", "bbox_pred": "roi_heads.box.predictor.bbox_pred",
        "mask_conv": sequence(_BENCHMARK_MASK + "mask_fcn{m}", bare=_BENCHMARK_MASK + "mask_fcn{m}"),
        "deconv": "roi_heads.mask.predictor.conv5_mask", "mask_logits": "roi_heads.mask.predictor.mask_fcn_logits"},
    "detectron": {
        "box_conv": caffe2("head_conv{m}"), "fc": "fc{f}", "cls_score": "cls_score", "bbox_pred": "bbox_pred",
        "mask_conv": ConvNames("_mask_fcn{m}", "_mask_fcn{m}_{norm}", bare="_[mask]_fcn{m}"),
        "deconv": "conv5_mask", "mask_logits": "mask_fcn_logits"},
}  # fmt: skip


def _rpn_layers(cfg: ModelConfig) -> Iterator[Layer]:
    for n in range(cfg.rpn.num_convs):
        yield "rpn", f"convs.{n}", "rpn" if cfg.rpn.num_convs == 1 else "rpn_many", {"n": n}
    yield "rpn", "objectness", "objectness", {}
    yield "rpn", "deltas", "deltas", {}


def _infer_rpn(reader: Reader, tree: Tree) -> Tree:
    """Infer the RPN.  Raises CheckpointError if the anchors of a cell do not fit."""
    objectness, has_levels = reader.weight("objectness"), tree["neck"] == "fpn"
    if objectness is None:
        return {}
    num_anchors, ratios = len(objectness), reader.stated.aspect_ratios or (0.5, 1.0, 2.0)
    sizes = reader.stated.anchor_sizes or RPNConfig().anchor_sizes
    if num_anchors != (expected := len(ratios) * (1 if has_levels else len(sizes))):
        of_sizes = "" if has_levels else f", sizes {', '.join(f'{size:g}' for size in sizes)}"
        words = f"expected {expected} (ratios {', '.join(f'{ratio:g}' for ratio in ratios)}{of_sizes})"
        hint = "" if has_levels else "; train.source.anchor_sizes states the file's sizes"
        raise CheckpointError(f"{reader.path}: {num_anchors} anchors per cell, {words}{hint}")
    num_convs = sum(reader.weight("rpn_many", n=n) is not None for n in range(8))
    section = {"aspect_ratios": ratios, "anchor_sizes": sizes, "num_convs": max(num_convs, 1), "norm": "none"}
    return {"rpn": section}


def _rpn_refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    if "rpn" in parts and (kind := cfg.part_norms()["rpn"].kind) != "none":
        yield f"model.rpn.norm: {kind}; {toolkit} has no norm in the RPN"


def _place(n: int, stage: str) -> dict[str, object]:
    """Return the values of the placeholders for layer n of a head."""
    return {"n": n, "m": n + 1, "x": 3 * n, "x1": 3 * n + 1, "f": 6 + n, "stage": stage}


def _layers(cfg: ModelConfig) -> Iterator[Layer]:
    is_cascade, kind = cfg.detector == "cascade_rcnn", cfg.box_head.kind
    stages = [f"{i}." for i in range(len(cfg.cascade.positive_iou))] if is_cascade else [""]
    convs, num_fcs = cfg.box_layers
    for stage in stages:
        prefix = f"stages.{stage}" if stage else ""
        for n in range(convs):
            yield "box_head", f"{prefix}convs.{n}", "box_conv", _place(n, stage)
        for n in range(num_fcs):
            fc = f"fc{6 + n}" if kind == "2fc" else convs + 1  # torchvision flattens the map between
            yield "box_head", f"{prefix}fcs.{n}", "fc", {**_place(n, stage), "fc": fc}
        yield "box_head", f"{prefix}cls_score", "cls_score", {"stage": stage}
        yield "box_head", f"{prefix}bbox_pred", "bbox_pred", {"stage": stage}
    for stage in stages if cfg.cascade.mask_stages == "each" else [""]:
        prefix = f"stages.{stage}" if stage else ""
        for n in range(cfg.mask_head.num_convs):
            yield "mask_head", f"{prefix}convs.{n}", "mask_conv", _place(n, stage)
        yield "mask_head", f"{prefix}deconv", "deconv", {"stage": stage}
        yield "mask_head", f"{prefix}logits", "mask_logits", {"stage": stage}


def _infer(reader: Reader, tree: Tree) -> Tree:
    """Infer the heads and a cascade.  Raises CheckpointError for other rows of boxes and for another cascade."""
    num, num_masks = _stages(reader, "cls_score"), _stages(reader, "mask_logits")
    box, mask = ([_place(n, "0." if count else "") for n in range(16)] for count in (num, num_masks))
    found: Tree = {}
    scores, deltas = (reader.weight(layer, **box[0]) for layer in ("cls_score", "bbox_pred"))
    logits = reader.weight("mask_logits", **mask[0])
    box_convs, mask_convs = (
        [conv for place in places if (conv := reader.weight(layer, **place)) is not None]
        for layer, places in (("box_conv", box), ("mask_conv", mask))
    )
    if scores is not None and deltas is not None:
        background_first = toolkit_of(reader.format) in BACKGROUND_FIRST
        by_class = len(deltas) == 4 * (len(scores) - (not background_first))
        if not by_class and (len(deltas) != 4 or background_first):
            box_layer, score_layer = (str(reader.names[x]).format(**box[0]) for x in ("bbox_pred", "cls_score"))
            hint = "; class-agnostic boxes are read from detectron2 and mmdetection only" if background_first else ""
            raise CheckpointError(
                f"{reader.path}: {box_layer} has {len(deltas)} rows beside {len(scores)} of {score_layer}: "
                f"expected 4 per class{hint}"
            )
        if num and len(deltas) != 4:
            raise CheckpointError(
                f"{reader.path}: {str(reader.names['bbox_pred']).format(**box[0])} has {len(deltas)} rows, a box for "
                "each class; expected 4, because a stage of gndet's cascade refines one box per region; choose a "
                "cascade with reg_class_agnostic=True, or a file without cascade"
            )
        hidden = tree["neck"] == "fpn" or box_convs or reader.weight("fc", **box[0], fc="fc6") is not None
        layout = {"kind": "2fc", "fc_channels": scores.shape[1]} if hidden else {}
        found["box_head"] = {**layout, "norm": "none", "class_agnostic": not by_class or num > 0}
        if box_convs:
            convs = {"kind": "4conv1fc", "num_convs": len(box_convs), "conv_channels": len(box_convs[0])}
            found["box_head"] |= {**convs, "norm": reader.norm("box_conv", **box[0])}
    if logits is not None:
        num_convs, norm = len(mask_convs), reader.norm("mask_conv", **mask[0])
        found["mask_head"] = {"num_convs": num_convs, "channels": logits.shape[1], "norm": norm}
    if not num:
        return found
    if num != NUM_STAGES or num_masks not in (0, NUM_STAGES):
        raise CheckpointError(
            f"{reader.path}: a cascade of {num} stages with {num_masks} mask heads in stages; expected "
            f"{NUM_STAGES} stages, whose IoU thresholds and scales of deltas are known, and 0 or {NUM_STAGES}"
        )
    cascade = {"cascade": {"mask_stages": "each" if num_masks else "first"}} if logits is not None else {}
    return {**found, "detector": "cascade_rcnn", **cascade}


def _stages(reader: Reader, layer: str) -> int:
    """Return how many stages of a cascade have the layer; 0 if it is not in stages."""
    template = reader.names.get(layer)
    if not isinstance(template, str) or "{stage}" not in template:
        return 0
    return next(i for i in itertools.count() if reader.weight(layer, stage=f"{i}.") is None)


def _to_file(state: State, cfg: ModelConfig, toolkit: str) -> None:
    """Put the background's row first if the toolkit has it there; a row that gndet lacks is zero."""
    heads = ("box_head.", "mask_head.") if toolkit in BACKGROUND_FIRST else ()
    for key in [key for key in state if key.startswith(heads)]:
        tensor, layer = state[key], key.rpartition(".")[0]
        if has_background(layer):
            state[key] = torch.cat([tensor[-1:], tensor[:-1]])
        elif rows := class_rows(layer, cfg):
            state[key] = torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])


def _describe(model: ModelConfig, parts: tuple[str, ...]) -> Iterator[str]:
    if "rpn" in parts:
        yield f"anchor ratios {', '.join(f'{ratio:g}' for ratio in model.rpn.aspect_ratios)}"
        yield f"RoIAlign {model.box_head.roi_align}"
    if "rpn" in parts and any(model.box_layers):
        yield f"box deltas {'of all classes' if model.box_head.class_agnostic else 'by class'}, fc over (C, H, W)"
    if model.detector == "cascade_rcnn":
        yield f"a cascade of {len(model.cascade.positive_iou)} stages"


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    if "box_head" in cfg.normed_parts and cfg.part_norms()["box_head"].kind != "none" and not cfg.box_head.norm_last:
        yield f"model.box_head.norm_last: false; {toolkit} has the norm after every convolution or none"
    if "box_head" in parts and toolkit == "torchvision" and cfg.box_head.class_agnostic:
        yield "model.box_head.class_agnostic: torchvision's detectors have a box per class, and no cascades"
    if "mask_head" in parts and cfg.detector == "cascade_rcnn":
        theirs = {"detectron2": ("first", "last"), "mmdetection": ("each",)}[toolkit]
        heads = "one mask head" if toolkit == "detectron2" else "a mask head per stage"
        if cfg.cascade.mask_stages not in theirs:
            yield f"model.cascade.mask_stages: {cfg.cascade.mask_stages}; a cascade of {toolkit} has {heads}"
    if "box_head" in parts and len(cfg.rpn.aspect_ratios) != 3:
        yield f"model.rpn.aspect_ratios: {cfg.rpn.aspect_ratios}; expected three to export"


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> Iterator[str]:
    ious, weights = list(cfg.cascade.positive_iou), [[xy, xy, wh, wh] for xy, wh in cfg.cascade.delta_weights]
    is_cascade, stds = cfg.detector == "cascade_rcnn", [[1 / weight for weight in stage] for stage in weights]
    if toolkit == "detectron2" and cfg.region_heads:
        yield f"MODEL.ROI_HEADS.NUM_CLASSES {num_classes}"
    if cfg.box_head.class_agnostic and toolkit == "detectron2":
        yield "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
    if cfg.box_head.class_agnostic and toolkit == "mmdetection":
        yield "bbox_head: reg_class_agnostic=True"
    if is_cascade and toolkit == "detectron2":
        name = "MODEL.ROI_HEADS.NAME CascadeROIHeads, MODEL.ROI_BOX_CASCADE_HEAD"
        yield f"{name}.IOUS {ious}, BBOX_REG_WEIGHTS {weights}"
    if is_cascade and toolkit == "mmdetection":
        yield f"roi_head: type='CascadeRoIHead'; target_stds by stage: {stds}"


RPN = Part(RPN_NAMES, _rpn_layers, _infer_rpn, refusals=_rpn_refusals)
HEADS = Part(NAMES, _layers, _infer, to_file=_to_file, describe=_describe, refusals=_refusals, settings=_settings)
