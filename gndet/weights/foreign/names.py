"""The names of a detector's layers in other toolkits: one table for import and export.

Placeholders: s stage 2..5, t = s - 1, i block, k convolution 1..3 of a block,
abc its letter, L level 2..5, l = 0.. from the finest level, u = L - 1, last the last block's number in a stage,
n = 0.. and m = 1.. a layer of a head, x = 3 n, x1 = x + 1, e = 2 n, f = 6 + n, flat the place of the layer after the
box head's convolutions, norm "bn" or "gn", owner where C4 models keep a stage, stage "0.", "1." and so on
in a cascade whose head has stages, otherwise empty.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from gndet.config.model import ModelConfig
from gndet.modeling.resnet import BLOCKS
from gndet.modeling.vgg import STAGES as VGG_STAGES

STAGES = (2, 3, 4, 5)  # of the ResNet, and levels of the pyramid


class ConvNames(NamedTuple):
    """The names of a convolution, of its norm, and of the convolution if it has no norm and another name then."""

    conv: str
    norm: str
    bare: str | None = None


def _with_endings(conv: str, norm: str, name: str, bare: str | None = None) -> ConvNames:
    """Build the names of a convolution and its norm from a common name and two endings."""
    return ConvNames(name + conv, name + norm, bare)


_nested = partial(_with_endings, "", ".norm")  # detectron2: the norm is a part of the convolution
_sequence = partial(_with_endings, ".0", ".1")  # torchvision: a sequence of convolution and norm
_module = partial(_with_endings, ".conv", ".{norm}")  # mmcv's ConvModule
_caffe2 = partial(_with_endings, "", "_{norm}")


def _resnet(prefix: str, stem: str = "", norm: str = "bn") -> dict[str, ConvNames | str]:
    block = f"{prefix}layer{{t}}.{{i}}."
    return {
        "stem": ConvNames(f"{prefix}{stem}conv1", f"{prefix}{stem}{norm}1"),
        "block": ConvNames(f"{block}conv{{k}}", f"{block}{norm}{{k}}"),
        "shortcut": ConvNames(f"{block}downsample.0", f"{block}downsample.1"),
        "average_shortcut": ConvNames(f"{block}downsample.1", f"{block}downsample.2"),
        "deep_stem": ConvNames(f"{prefix}conv1.{{c}}", f"{prefix}conv1.{{d}}"),
        "deep_stem_end": ConvNames(f"{prefix}conv1.6", f"{prefix}{norm}1"),
    }


def _detectron2(prefix: str) -> dict[str, ConvNames | str]:
    names = {"stem": "stem.conv1", "block": "res{s}.{i}.conv{k}", "shortcut": "res{s}.{i}.shortcut"}
    return {layer: _nested(prefix + name) for layer, name in names.items()}


TOWERS = {"classification": "cls_convs", "regression": "box_convs"}  # of a dense head
_BOX, _MASK = "roi_heads.box_predictor.", "roi_heads.mask_head."
# Names by layer; a format lists only the layers that its files can hold.  rpn: the only convolution, rpn_many: one of
# several; fc: in the 2fc head, fc_after_convs: in the 4conv1fc head; top: lateral of P5, if its name differs.
FORMATS: dict[str, dict[str, ConvNames | str]] = {
    "resnet": {**_resnet(""), "class_logits": "fc"},  # classifiers of torchvision and timm
    "torchvision": {
        **_resnet("backbone.body."),
        "lateral": _sequence("backbone.fpn.inner_blocks.{l}"), "output": _sequence("backbone.fpn.layer_blocks.{l}"),
        "rpn": _sequence("rpn.head.conv.{n}"), "rpn_many": _sequence("rpn.head.conv.{n}"),
        "objectness": "rpn.head.cls_logits", "deltas": "rpn.head.bbox_pred",
        "box_conv": _sequence("roi_heads.box_head.{n}"), "fc": "roi_heads.box_head.fc{f}",
        "fc_after_convs": "roi_heads.box_head.{flat}", "cls_score": _BOX + "cls_score", "bbox_pred": _BOX + "bbox_pred",
        "mask_conv": _sequence(_MASK + "{n}"), "deconv": "roi_heads.mask_predictor.conv5_mask",
        "mask_logits": "roi_heads.mask_predictor.mask_fcn_logits",
        "p6": "backbone.fpn.extra_blocks.p6", "p7": "backbone.fpn.extra_blocks.p7",
        **{f"retinanet_{kind}": _sequence(f"head.{kind}_head.conv.{{n}}") for kind in TOWERS},
        **{f"fcos_{kind}": _with_endings(".{x}", ".{x1}", f"head.{kind}_head.conv") for kind in TOWERS},
        "dense_cls": "head.classification_head.cls_logits", "dense_boxes": "head.regression_head.bbox_reg",
        "quality": "head.regression_head.bbox_ctrness",
    },
    "detectron2_backbone": _detectron2(""),
    "detectron2": {
        **_detectron2("backbone.bottom_up."),
        "lateral": _nested("backbone.fpn_lateral{L}"), "output": _nested("backbone.fpn_output{L}"),
        "rpn": _nested("proposal_generator.rpn_head.conv"),
        "rpn_many": _nested("proposal_generator.rpn_head.conv.conv{n}"),
        "objectness": "proposal_generator.rpn_head.objectness_logits",
        "deltas": "proposal_generator.rpn_head.anchor_deltas",
        "box_conv": _nested("roi_heads.box_head.{stage}conv{m}"), "fc": "roi_heads.box_head.{stage}fc{m}",
        "fc_after_convs": "roi_heads.box_head.{stage}fc{m}",
        "cls_score": _BOX + "{stage}cls_score", "bbox_pred": _BOX + "{stage}bbox_pred",
        "mask_conv": _nested(_MASK + "mask_fcn{m}"), "deconv": _MASK + "deconv", "mask_logits": _MASK + "predictor",
        "p6": "backbone.top_block.p6", "p7": "backbone.top_block.p7",
        "retinanet_classification": ConvNames("head.cls_subnet.{x}", "head.cls_subnet.{x1}", "head.cls_subnet.{e}"),
        "retinanet_regression": ConvNames("head.bbox_subnet.{x}", "head.bbox_subnet.{x1}", "head.bbox_subnet.{e}"),
        "dense_cls": "head.cls_score", "dense_boxes": "head.bbox_pred",
    },
    "mmdetection": {
        **_resnet("backbone.", norm="{norm}"),
        "deep_stem": ConvNames("backbone.stem.{c}", "backbone.stem.{d}"),
        "deep_stem_end": ConvNames("backbone.stem.6", "backbone.stem.7"),
        "lateral": _module("neck.lateral_convs.{l}"), "output": _module("neck.fpn_convs.{l}"),
        "rpn": ConvNames("rpn_head.rpn_conv", ""), "rpn_many": _module("rpn_head.rpn_conv.{n}"),
        "objectness": "rpn_head.rpn_cls", "deltas": "rpn_head.rpn_reg",
        "box_conv": _module("roi_head.bbox_head.{stage}shared_convs.{n}"),
        "fc": "roi_head.bbox_head.{stage}shared_fcs.{n}",
        "fc_after_convs": "roi_head.bbox_head.{stage}shared_fcs.{n}",
        "cls_score": "roi_head.bbox_head.{stage}fc_cls", "bbox_pred": "roi_head.bbox_head.{stage}fc_reg",
        "mask_conv": _module("roi_head.mask_head.{stage}convs.{n}"), "deconv": "roi_head.mask_head.{stage}upsample",
        "mask_logits": "roi_head.mask_head.{stage}conv_logits",
    },
    "maskrcnn-benchmark": {
        **_resnet("backbone.body.", stem="stem."),
        "lateral": _sequence("backbone.fpn.fpn_inner{u}", bare="backbone.fpn.fpn_inner{u}"),
        "output": _sequence("backbone.fpn.fpn_layer{u}", bare="backbone.fpn.fpn_layer{u}"),
        "rpn": ConvNames("rpn.head.conv", ""), "objectness": "rpn.head.cls_logits", "deltas": "rpn.head.bbox_pred",
        "box_conv": ConvNames(
            "roi_heads.box.feature_extractor.xconvs.{x}", "roi_heads.box.feature_extractor.xconvs.{x1}"
        ),
        "fc": "roi_heads.box.feature_extractor.fc{f}", "fc_after_convs": "roi_heads.box.feature_extractor.fc{f}",
        "cls_score": "roi_heads.box.predictor.cls_score", "bbox_pred": "roi_heads.box.predictor.bbox_pred",
        "mask_conv": _sequence(
            "roi_heads.mask.feature_extractor.mask_fcn{m}", bare="roi_heads.mask.feature_extractor.mask_fcn{m}"
        ),
        "deconv": "roi_heads.mask.predictor.conv5_mask", "mask_logits": "roi_heads.mask.predictor.mask_fcn_logits",
    },
    "detectron": {
        "stem": ConvNames("conv1", "{conv1}_{norm}"), "block": _caffe2("res{s}_{i}_branch2{abc}"),
        "shortcut": _caffe2("res{s}_{i}_branch1"),
        "lateral": _caffe2("fpn_inner_res{L}_{last}_sum_lateral"), "top": _caffe2("fpn_inner_res{L}_{last}_sum"),
        "output": _caffe2("fpn_res{L}_{last}_sum"), "rpn": ConvNames("conv_rpn_fpn2", ""),
        "objectness": "rpn_cls_logits_fpn2", "deltas": "rpn_bbox_pred_fpn2",
        "box_conv": _caffe2("head_conv{m}"), "fc": "fc{f}", "fc_after_convs": "fc{f}",
        "cls_score": "cls_score", "bbox_pred": "bbox_pred",
        "mask_conv": ConvNames("_mask_fcn{m}", "_mask_fcn{m}_{norm}", bare="_[mask]_fcn{m}"),
        "deconv": "conv5_mask", "mask_logits": "mask_fcn_logits",
    },
}  # fmt: skip
FORMATS["detectron2_dc5"] = {**FORMATS["detectron2"], **_detectron2("backbone.")}
FORMATS["detectron2_c4"] = {
    **FORMATS["detectron2"], **_detectron2("{owner}."), "stem": _nested("backbone.stem.conv1"),
}  # fmt: skip
FORMATS["mmdetection_c4"] = FORMATS["mmdetection"] | {
    layer: name for layer, name in _resnet("{owner}.", norm="{norm}").items() if "stem" not in layer
}
FORMATS["detectron_c4"] = {
    **FORMATS["detectron"], "rpn": ConvNames("conv_rpn", ""), "objectness": "rpn_cls_logits", "deltas": "rpn_bbox_pred",
}  # fmt: skip

SUFFIXES = {"weight": "_w", "bias": "_b"}  # of Detectron's convolutions and fully connected layers
NORM_SUFFIXES = {"weight": "_s", "bias": "_b", "running_mean": "_rm", "running_var": "_riv"}  # of its norms


def toolkit_of(format: str) -> str:
    """Return the toolkit of a format, which may have several of them, like detectron2_c4."""
    return format.partition("_")[0]


def stage_owner(format: str, stage: int) -> str:
    """Return where the C4 models of detectron2 and mmdetection keep a stage of the ResNet: res5 runs on regions."""
    if stage < 5:
        return "backbone"
    return "roi_head.shared_head" if format == "mmdetection_c4" else "roi_heads"


def file_key(format: str, layer: str, parameter: str) -> str:
    """Return the key of a layer's parameter ("weight", "bias", "running_mean" ...) in a file of the format."""
    if toolkit_of(format) != "detectron":
        return f"{layer}.{parameter}"
    suffixes = NORM_SUFFIXES if layer.endswith(("_bn", "_gn")) else SUFFIXES
    return layer + suffixes.get(parameter, f"_{parameter}")


def layer_names(format: str, cfg: ModelConfig, parts: tuple[str, ...]) -> dict[str, str]:
    """Map gndet's layer names in those parts ("backbone.res2.0.conv1.conv") to the format's, in model order."""
    norms, names = cfg.part_norms(), FORMATS[format]
    result: dict[str, str] = {}
    for part, layer, name, numbers in _layers(format, cfg):
        if part not in parts:
            continue
        template = names[name]
        if isinstance(template, str):
            result[f"{part}.{layer}"] = template.format(**numbers)
            continue
        norm = "bn" if norms[part].has_running_statistics else "gn"
        numbers = {**numbers, "norm": norm, "conv1": "res_conv1" if norm == "bn" else "conv1"}
        normed = norms[part].kind != "none"
        conv = template.conv if normed or template.bare is None else template.bare
        result[f"{part}.{layer}.conv"] = conv.format(**numbers)
        if normed:
            result[f"{part}.{layer}.norm"] = template.norm.format(**numbers)
    return result


def vgg_names(cfg: ModelConfig) -> dict[str, str]:
    """Map the layers of a VGG-16 classifier to the names in torchvision's vgg16, or in its vgg16_bn with norms."""
    names, place, normed = dict[str, str](), 0, cfg.part_norms()["backbone"].kind != "none"
    for number, widths in enumerate(VGG_STAGES, start=1):
        for i in range(len(widths)):
            before = number > 1  # in the first stage, the stem is the first convolution
            layer = f"backbone.stage{number}.{i - 1 + before}" if i or before else "backbone.stem"
            names[f"{layer}.conv"] = f"features.{place}"
            if normed:
                names[f"{layer}.norm"] = f"features.{place + 1}"
            place += 3 if normed else 2  # and the ReLU
        place += 1  # the pooling
    head = ("classifier.fcs.0", "classifier.fcs.1", "classifier.logits")
    return names | {layer: f"classifier.{3 * i}" for i, layer in enumerate(head)}  # ReLU and dropout between


def _layers(format: str, cfg: ModelConfig) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Yield each layer of a model: its part, gndet's name, its name in FORMATS, and the values of the placeholders."""
    depth = cfg.backbone.depth
    yield "classifier", "logits", "class_logits", {}
    if cfg.backbone.stem == "deep":
        for k in (1, 2):
            yield "backbone", f"stem.conv{k}", "deep_stem", {"c": 3 * k - 3, "d": 3 * k - 2}
        yield "backbone", "stem.conv3", "deep_stem_end", {}
    else:
        yield "backbone", "stem", "stem", {}
    for s, count in zip(STAGES, BLOCKS[depth], strict=True):
        for i, k in itertools.product(range(count), (1, 2, 3) if depth >= 50 else (1, 2)):
            numbers = {"s": s, "t": s - 1, "i": i, "k": k, "abc": "abc"[k - 1], "owner": stage_owner(format, s)}
            if i == 0 and k == 1 and (s > 2 or depth >= 50):
                name = "average_shortcut" if cfg.backbone.average_shortcuts else "shortcut"
                yield "backbone", f"res{s}.{i}.shortcut", name, numbers
            yield "backbone", f"res{s}.{i}.conv{k}", "block", numbers
    levels = list(zip(STAGES, BLOCKS[depth], strict=True))[cfg.is_dense :]
    for number, (level, count) in enumerate(levels):
        numbers = {"L": level, "l": number, "u": level - 1, "last": count - 1}
        yield "fpn", f"lateral{level}", "top" if level == 5 and "top" in FORMATS[format] else "lateral", numbers
        yield "fpn", f"output{level}", "output", numbers
    if cfg.is_dense:
        yield from _dense_layers(cfg)
    for n in range(cfg.rpn.num_convs):
        yield "rpn", f"convs.{n}", "rpn" if cfg.rpn.num_convs == 1 else "rpn_many", {"n": n}
    yield "rpn", "objectness", "objectness", {}
    yield "rpn", "deltas", "deltas", {}
    yield from _heads(cfg)


def _heads(cfg: ModelConfig) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Yield the layers of the region heads as `_layers` does."""
    is_cascade, bare = cfg.detector == "cascade_rcnn", cfg.box_head.kind == "2fc"
    stages = [f"{i}." for i in range(len(cfg.cascade.positive_iou))] if is_cascade else [""]
    convs = cfg.box_head.num_convs if cfg.box_head.kind == "4conv1fc" else 0
    for stage in stages:
        prefix = f"stages.{stage}" if stage else ""
        for n in range(convs):
            numbers = {"n": n, "m": n + 1, "x": 3 * n, "x1": 3 * n + 1, "stage": stage}
            yield "box_head", f"{prefix}convs.{n}", "box_conv", numbers
        for n in range({"2fc": 2, "4conv1fc": 1, "res5": 0}[cfg.box_head.kind]):
            numbers = {"n": n, "m": n + 1, "f": 6 + n, "flat": convs + 1, "stage": stage}
            yield "box_head", f"{prefix}fcs.{n}", "fc" if bare else "fc_after_convs", numbers
        yield "box_head", f"{prefix}cls_score", "cls_score", {"stage": stage}
        yield "box_head", f"{prefix}bbox_pred", "bbox_pred", {"stage": stage}
    for stage in stages if cfg.cascade.mask_stages == "each" else [""]:
        prefix = f"stages.{stage}" if stage else ""
        for n in range(cfg.mask_head.num_convs):
            yield "mask_head", f"{prefix}convs.{n}", "mask_conv", {"n": n, "m": n + 1, "stage": stage}
        yield "mask_head", f"{prefix}deconv", "deconv", {"stage": stage}
        yield "mask_head", f"{prefix}logits", "mask_logits", {"stage": stage}


def _dense_layers(cfg: ModelConfig) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Yield the layers of a dense detector above the pyramid's P5, as `_layers` does."""
    yield "fpn", "p6", "p6", {}
    yield "fpn", "p7", "p7", {}
    for (kind, convs), n in itertools.product(TOWERS.items(), range(cfg.dense.num_convs)):
        yield "dense", f"{convs}.{n}", f"{cfg.detector}_{kind}", {"n": n, "e": 2 * n, "x": 3 * n, "x1": 3 * n + 1}
    yield "dense", "cls_logits", "dense_cls", {}
    yield "dense", "boxes", "dense_boxes", {}
    if cfg.dense.quality != "none":
        yield "dense", "quality", "quality", {}
