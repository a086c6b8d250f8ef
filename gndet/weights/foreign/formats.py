"""Which toolkit wrote a file, and what the file states about itself."""

import re

from torch import Tensor

from gndet.config.schema import SourceConfig
from gndet.errors import CheckpointError
from gndet.weights.foreign.describe import FACTS, NO_STD, RGB_MEAN, RGB_STD, Facts
from gndet.weights.foreign.files import MAX_NAMED, WeightFile

PIXEL = ("pixel_mean", "pixel_std")  # in files of early detectron2, in the order that the model takes
MARKS = (  # a key that tells a format, the first that fits
    ("backbone.bottom_up.", "detectron2"),
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


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give layers of older torchvision detectors their present names, as torchvision's own loading does.

    detectron2's MSRA backbones have Caffe2's names but for their norms: these get Caffe2's names, too.
    """
    if "res_conv1_bn_gamma" in tensors:
        suffixes = {"_gamma": "_s", "_beta": "_b", "_running_mean": "_rm", "_running_var": "_riv"}
        pattern = rf"(?<=_bn)({'|'.join(suffixes)})$"
        return {re.sub(pattern, lambda match: suffixes[match[1]], key): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("backbone.body.") for key in tensors) or "backbone.body.stem.conv1.weight" in tensors:
        return tensors
    rules = (
        (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    )
    result = {}
    for key, tensor in tensors.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if match := re.match(r"^roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)$", key):
            key = f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
        result[key] = tensor
    return result


def format_of(file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> str:
    """Return the format by the names of the tensors.  Raises CheckpointError where none fits, or not the stated one."""
    found = next((format for mark, format in MARKS if any(key.startswith(mark) for key in tensors)), None)
    refuse = _unsupported(tensors)
    if refuse:
        raise CheckpointError(f"{file.path}: {refuse}")
    if found is None or cfg.format not in ("auto", found.removesuffix("_backbone")):
        expected = f"train.source.format: {cfg.format}" if cfg.format != "auto" else "a known format"
        keys = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:MAX_NAMED])
        raise CheckpointError(
            f"{file.path}: expected {expected}, its tensors are named as {found or 'in no format that gndet knows'}: "
            f"{keys}; read are gndet, torchvision, timm (ResNet), detectron2, Detectron, mmdetection, "
            "maskrcnn-benchmark"
        )
    return found


def _unsupported(tensors: dict[str, Tensor]) -> str:
    """Say why a recognised model cannot be built; empty where it can."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    c4 = ("roi_heads.res5.", "conv_rpn_w", "roi_heads.box.feature_extractor.head.", "roi_head.shared_head.")
    if any(map(has, c4)) or (has("backbone.res2.") and has("proposal_generator.")):
        return "a C4 or DC5 model (no pyramid), which gndet does not have yet; its heads work on res4 or res5"
    if has("bbox_head.fc_cls") or (has("bbox_head.") and has("backbone.layer1.")):
        return (
            "a model of mmdetection 1 or a one-stage detector (bbox_head at the top); gndet reads the two-stage "
            "detectors of mmdetection 2 and later (roi_head.bbox_head)"
        )
    if has("conv1.0.weight") or has("backbone.stem.0."):
        return "a ResNet with a deep stem (three 3x3 convolutions, like resnet50d); gndet has the 7x7 stem only"
    if has("roi_heads.box_predictor.0.") or has("roi_head.bbox_head.0."):
        return "a cascade, which gndet does not have"
    return ""


def facts_of(format: str, file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> Facts:
    """Return the customs of the format, overridden by what this file states, and that by what the user states."""
    facts = FACTS[format]
    if file.extras.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's ResNets
        facts = facts._replace(bgr=False, std=RGB_STD, msra=False)
    if "res_conv1_bn_riv" in tensors:  # Detectron's BN has no statistics; these are detectron2's MSRA backbones
        facts = facts._replace(mean=RGB_MEAN, compat="detectron2", frozen_eps=1e-5)
    if format == "detectron2" and all(key in tensors and tensors[key].numel() == 3 for key in PIXEL):
        mean, std = ([float(f"{x:.6g}") for x in tensors[key].flatten()] for key in PIXEL)  # as written, before float32
        bgr = mean[0] <= mean[2]  # blue is the darkest of ImageNet's means; BGR is the default
        order = slice(None, None, -1 if bgr else 1)
        facts = facts._replace(bgr=bgr, mean=tuple(mean[order]), std=tuple(std[order]))
    if format == "mmdetection":
        facts = _of_mmdetection(facts, file, any(".gn" in key for key in tensors))
    said = {
        "bgr": cfg.bgr, "mean": cfg.pixel_mean, "std": cfg.pixel_std, "msra": cfg.stride_in_1x1,
        "gn_msra": cfg.stride_in_1x1, "groups": cfg.groups, "channels_per_group": cfg.channels_per_group,
        "standardized": cfg.weight_standardization, "compat": cfg.compat,
    }  # fmt: skip
    return facts._replace(**{key: value for key, value in said.items() if value is not None})


def _of_mmdetection(facts: Facts, file: WeightFile, gn: bool) -> Facts:
    """Apply what mmdetection's meta states; GN models without it are taken for Detectron's backbones (BGR, std 1)."""
    meta = file.extras.get("meta")
    text = str(meta.get("config") or meta.get("cfg") or "") if isinstance(meta, dict) else ""
    if not text:
        return facts._replace(bgr=True, std=NO_STD) if gn else facts
    flip = re.search(r"(?:bgr_to_rgb|to_rgb)['\"]?\s*[=:]\s*(True|False)", text)
    numbers = {key: re.search(rf"\b{key}['\"]?\s*[=:]\s*\[([-\d.,\s]+)\]", text) for key in ("mean", "std")}
    if flip:
        facts = facts._replace(bgr=flip[1] == "False")
    for key, match in numbers.items():
        values = [float(word) for word in match[1].split(",") if word.strip()] if match else []
        if len(values) == 3:  # mmdetection states them in the order its model takes
            facts = facts._replace(**{key: tuple(values[::-1] if facts.bgr else values)})
    caffe = bool(re.search(r"style['\"]?\s*[=:]\s*['\"]caffe", text))
    groups = re.search(r"num_groups['\"]?\s*[=:]\s*(\d+)", text)
    per_group = re.search(r"channels_per_group['\"]?\s*[=:]\s*(\d+)", text)  # gndet's own exports
    return facts._replace(
        msra=caffe, gn_msra=caffe, groups=int(groups[1]) if groups else 32, standardized="ConvWS" in text,
        channels_per_group=int(per_group[1]) if per_group else None,
    )  # fmt: skip
