"""All parts of a model and all formats: tell which toolkit wrote a file, what that toolkit's files assume, and which
ModelConfig fits the tensors.

C channels, K classes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.trained import MAX_NAMED
from gndet.weights.foreign import classifier, dense, neck, one_level, resnet, two_stage
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.names import Names, of_norm, toolkit_of
from gndet.weights.foreign.part import Facts, Part, Reader
from gndet.weights.foreign.tensorpack import AUTHOR
from gndet.weights.read import PARTS as SECTIONS


def _activations(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    for part, norm in cfg.part_norms().items():
        if part in parts and norm.replaces_relu:
            yield f"model.{part}.norm: {norm.kind}; {toolkit} has no such norm and activation"


PARTS = (  # in model order
    *(classifier.PART, resnet.PART, one_level.PART, neck.PART),
    *(two_stage.RPN, two_stage.HEADS, dense.PART),
)
KIND_FIRST = (  # in the order of refusals and of settings: first what kind of model it is, then its details
    *(classifier.PART, one_level.PART, neck.PART, dense.PART, two_stage.RPN),
    *(Part({}, refusals=_activations), resnet.PART, two_stage.HEADS),
)
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, torchvision, timm, mmdetection
CAFFE_MEAN, NO_STD = (122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0)  # Detectron's, here as RGB
FACTS = {
    "resnet": Facts("torchvision or timm ResNet", False, RGB_MEAN, RGB_STD, False, "gndet"),
    "torchvision": Facts("torchvision detector", False, RGB_MEAN, RGB_STD, False, "torchvision"),
    "detectron2": Facts("detectron2", True, RGB_MEAN, NO_STD, True, "detectron2"),
    "detectron2_backbone": Facts("detectron2 backbone", True, RGB_MEAN, NO_STD, True, "detectron2"),
    "detectron": Facts("Detectron", True, CAFFE_MEAN, NO_STD, True, "detectron", frozen_eps=0.0),
    "mmdetection": Facts("mmdetection", False, RGB_MEAN, RGB_STD, False, "mmdetection"),
    "maskrcnn-benchmark": Facts("maskrcnn-benchmark", True, CAFFE_MEAN, NO_STD, True, "detectron", frozen_eps=0.0),
}
# torchvision's weights whose frozen BN has eps 0, as files and by name
KEYPOINT_V1 = "keypointrcnn_resnet50_fpn_coco-fc266e95"  # the older file of it has eps
RCNN_V1 = rf"(mask|faster)rcnn_resnet50_fpn_coco-|{KEYPOINT_V1}|(Mask|Faster|Keypoint)RCNN_ResNet50_FPN_W.*V1"
RETINANET_V1 = r"retinanet_resnet50_fpn_coco-|RetinaNet_ResNet50_FPN_W.*V1"
PIXEL = ("pixel_mean", "pixel_std")  # in files of early detectron2, in the channel order of its model
GROUPED = ("backbone.bottom_up.res2.0.conv2.weight", "res2.0.conv2.weight", "res2_0_branch2b_w")
MARKS = (  # (start of a key, format); the first that fits decides
    ("backbone.bottom_up.", "detectron2"),
    *one_level.MARKS,
    ("proposal_generator.", "detectron2"),
    ("roi_heads.box.feature_extractor.", "maskrcnn-benchmark"),
    ("backbone.body.stem.", "maskrcnn-benchmark"),
    ("backbone.body.", "torchvision"),
    ("roi_head.", "mmdetection"),
    ("neck.lateral_convs.", "mmdetection"),
    ("backbone.layer1.", "mmdetection"),
    ("stem.conv1.weight", "detectron2_backbone"),
    ("res2_0_branch2a_w", "detectron"),
    ("layer1.0.conv1.weight", "resnet"),
)
UNSUPPORTED = {  # what a file is, whose keys have all of these starts, but none after a !, in one of several cases
    **one_level.UNSUPPORTED,
    "a model of mmdetection 1 or a one-stage detector (bbox_head at the top); gndet reads the two-stage detectors of "
    "mmdetection 2 and later (roi_head.bbox_head)": (("bbox_head.fc_cls",), ("bbox_head.", "backbone.layer1.")),
}
FORMATS: dict[str, Names] = {
    format: {layer: name for part in PARTS for layer, name in part.names.get(format, {}).items()}
    for format in dict.fromkeys(format for part in PARTS for format in part.names)
}
for _format, _names in one_level.NAMES.items():
    _toolkit, _, _neck = _format.partition("_")
    FORMATS[_format] = FORMATS[_toolkit] | _names
    _title = f"{FACTS[_toolkit].title} {_neck.upper()}"
    FACTS[_format] = FACTS[_toolkit]._replace(title=_title, **one_level.CHANGES.get(_format, {}))


def layer_names(format: str, cfg: ModelConfig, sections: tuple[str, ...]) -> dict[str, str]:
    """Map gndet's layer names in those sections ("backbone.res2.0.conv1.conv") to the format's, in model order."""
    norms, names = cfg.part_norms(), FORMATS[format]
    result: dict[str, str] = {}
    for section, layer, name, numbers in (layer for part in PARTS for layer in part.layers(cfg)):
        if section not in sections:
            continue
        template = names[name]
        if isinstance(template, str):
            result[f"{section}.{layer}"] = template.format(**numbers)
            continue
        numbers = {**numbers, **of_norm("bn" if norms[section].has_running_statistics else "gn")}
        normed = norms[section].kind != "none"
        conv = template.conv if normed or template.bare is None else template.bare
        result[f"{section}.{layer}.conv"] = conv.format(**numbers)
        if normed:
            result[f"{section}.{layer}.norm"] = template.norm.format(**numbers)
    return result


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the layers of older torchvision detectors their present names, as torchvision does when loading them.

    detectron2's MSRA backbones have Caffe2's names except for the norms, which get Caffe2's names here.
    """
    if "layer1.0.gn1.weight" in tensors:  # backbones that mmdetection starts from (jhu/resnext50_32x4d_gn_ws)
        return {re.sub(r"(^|\.)gn(\d)\.", r"\1bn\2.", key): tensor for key, tensor in tensors.items()}
    if "res_conv1_bn_gamma" in tensors:
        suffixes = {"_gamma": "_s", "_beta": "_b", "_running_mean": "_rm", "_running_var": "_riv"}
        pattern = rf"(?<=_bn)({'|'.join(suffixes)})$"
        return {re.sub(pattern, lambda match: suffixes[match[1]], key): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("backbone.body.") for key in tensors) or "backbone.body.stem.conv1.weight" in tensors:
        return tensors
    rules: tuple[tuple[str, Any], ...] = (
        (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
        (
            r"^roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)$",
            lambda match: f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}",
        ),
    )
    if "head.regression_head.bbox_ctrness.weight" not in tensors:  # not an FCOS, whose towers are plain sequences
        rules = (*rules, (
            r"^(head\.(?:classification|regression)_head\.conv)\.(\d)\.(weight|bias)$",
            lambda match: f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}",
        ))  # fmt: skip
    result = {}
    for key, tensor in tensors.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        result[key] = tensor
    return result


def format_of(file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> str:
    """Return the format, by the tensors' names.  Raises CheckpointError if it is unknown or not the stated one."""
    found = next((format for mark, format in MARKS if any(key.startswith(mark) for key in tensors)), None)
    for refusal, cases in UNSUPPORTED.items():
        if any(all(_has(tensors, mark) for mark in marks) for marks in cases):
            raise CheckpointError(f"{file.path}: {refusal}")
    if found is None or cfg.format not in ("auto", toolkit_of(found)):
        expected = f"train.source.format: {cfg.format}" if cfg.format != "auto" else "a known format"
        keys = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:MAX_NAMED])
        raise CheckpointError(
            f"{file.path}: expected {expected}, but its tensors are named as in {found or 'no format that gndet knows'}"
            f": {keys}; gndet reads files of gndet, torchvision, timm (ResNet), detectron2, Detectron, mmdetection, "
            "maskrcnn-benchmark and tensorpack"
        )
    return found


def _has(tensors: Iterable[str], mark: str) -> bool:
    return any(key.startswith(mark.removeprefix("!")) for key in tensors) != mark.startswith("!")


def facts_of(format: str, file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> Facts:
    """Return what to assume of a file: the format's usual facts, then the file's own, then what the user states."""
    facts = FACTS[format]
    if file.extras.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's ResNets
        facts = facts._replace(bgr=False, std=RGB_STD, msra=False)
    if file.extras.get("__author__") == AUTHOR:  # two samples per cell and axis, as gndet
        title = f"{AUTHOR} file, its names translated to those of {facts.title}"
        facts = facts._replace(title=title, mean=RGB_MEAN, std=RGB_STD, msra=False, compat="gndet")
    if "res_conv1_bn_riv" in tensors:  # Detectron's BN has no statistics, so this is an MSRA backbone of detectron2
        facts = facts._replace(mean=RGB_MEAN, compat="detectron2", frozen_eps=1e-5)
    middle = next((tensors[key] for key in GROUPED if key in tensors), None)
    if middle is not None and middle.shape[1] < len(middle):  # the ResNeXts of Detectron and detectron2 are their own
        own_export = format == "detectron" or file.extras.get("__author__") == "gndet"
        facts = facts._replace(std=facts.std if own_export else RGB_STD, msra=False)
    if format.startswith("detectron2") and all(key in tensors and tensors[key].numel() == 3 for key in PIXEL):
        mean, std = ([float(f"{x:.6g}") for x in tensors[key].flatten()] for key in PIXEL)  # undo float32's rounding
        bgr = mean[0] <= mean[2]  # blue has the smallest mean of ImageNet; BGR is the default
        mean, std = (mean[::-1], std[::-1]) if bgr else (mean, std)
        facts = facts._replace(bgr=bgr, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))
    if toolkit_of(format) == "mmdetection":
        facts = _of_mmdetection(facts, file, any(".gn" in key for key in tensors))
    stated: dict[str, Any] = {
        "bgr": cfg.bgr, "mean": cfg.pixel_mean, "std": cfg.pixel_std, "msra": cfg.stride_in_1x1,
        "gn_msra": cfg.stride_in_1x1, "groups": cfg.groups, "channels_per_group": cfg.channels_per_group,
        "standardized": cfg.weight_standardization, "standardization": cfg.standardization, "compat": cfg.compat,
    }  # fmt: skip
    return facts._replace(**{key: value for key, value in stated.items() if value is not None})


def _of_mmdetection(facts: Facts, file: WeightFile, gn: bool) -> Facts:
    """Apply what mmdetection's meta states; assume Detectron's backbone (BGR, std 1) for GN without meta."""
    meta = file.extras.get("meta")
    text = str(meta.get("config") or meta.get("cfg") or "") if isinstance(meta, dict) else ""
    if not text:
        return facts._replace(bgr=True, std=NO_STD) if gn else facts
    if flip := re.search(r"(?:bgr_to_rgb|to_rgb)['\"]?\s*[=:]\s*(True|False)", text):
        facts = facts._replace(bgr=flip[1] == "False")
    for key in ("mean", "std"):
        match = re.search(rf"\b{key}['\"]?\s*[=:]\s*\[([-\d.,\s]+)\]", text)
        values = [float(word) for word in match[1].split(",") if word.strip()] if match else []
        if len(values) == 3:  # mmdetection states them in the channel order of its model
            stated: dict[str, Any] = {key: tuple(values[::-1] if facts.bgr else values)}
            facts = facts._replace(**stated)
    caffe = bool(re.search(r"style['\"]?\s*[=:]\s*['\"]caffe", text))
    groups = re.search(r"num_groups['\"]?\s*[=:]\s*(\d+)", text)
    per_group = re.search(r"channels_per_group['\"]?\s*[=:]\s*(\d+)", text)  # gndet's own exports
    return facts._replace(
        msra=caffe, gn_msra=caffe, groups=int(groups[1]) if groups else 32, standardized="ConvWS" in text,
        channels_per_group=int(per_group[1]) if per_group else None,
    )  # fmt: skip


def infer_config(reader: Reader, name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the config of the model that fits a file's tensors, and the sections of it that the file holds."""
    tree: dict[str, Any] = {}
    for part in PARTS:
        tree |= part.infer(reader, tree)
    facts, eps = reader.facts, reader.stated.norm_eps
    sections = {key: tree.pop(key) for key in SECTIONS if key in tree}
    if eps is None and re.match(f"{RCNN_V1}|{RETINANET_V1}", name):
        eps = 0.0  # torchvision sets it for these weights (overwrite_eps)
    for section in sections.values():
        kind = section["norm"]
        default = facts.frozen_eps if kind == "frozen_bn" else 1e-5
        section["norm"] = {
            "kind": kind, "eps": default if eps is None else eps, "padding": "plain", "groups": facts.groups,
            "channels_per_group": facts.channels_per_group,
            "weight_standardization": facts.standardized and kind != "none",
            "standardization": facts.standardization if facts.standardized and kind != "none" else "bit",
        }  # fmt: skip
    stated = {
        "compat": facts.compat, "neck": tree.pop("neck"), "pixel_mean": facts.mean, "pixel_std": facts.std,
        "masks": "mask_head" in sections, "norm": sections["backbone"]["norm"],
    }  # fmt: skip
    return ModelConfig.model_validate({**sections, **stated, **tree}), tuple(sections)
