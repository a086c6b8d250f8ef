"""Tell which toolkit wrote a file, what that toolkit's files assume, and which ModelConfig fits the tensors.

C channels, K classes.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor

from gndet.config.schema import ModelConfig, SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.resnet import BLOCKS
from gndet.modeling.trained import MAX_NAMED
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.names import FORMATS, STAGES, ConvNames, file_key

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, torchvision, timm, mmdetection
CAFFE_MEAN, NO_STD = (122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0)  # Detectron's, here as RGB


class Facts(NamedTuple):
    """What the files of a format assume without stating it."""

    title: str
    bgr: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    msra: bool  # BN backbones have the stride in the 1x1; GN backbones only if gn_msra
    background_first: bool
    compat: str
    frozen_eps: float = 1e-5
    gn_msra: bool = False
    groups: int = 32
    channels_per_group: int | None = None
    standardized: bool = False  # weight standardization in backbone, pyramid and heads


FACTS = {
    "resnet": Facts("torchvision or timm ResNet", False, RGB_MEAN, RGB_STD, False, False, "gndet"),
    "torchvision": Facts("torchvision detector", False, RGB_MEAN, RGB_STD, False, True, "torchvision"),
    "detectron2": Facts("detectron2", True, RGB_MEAN, NO_STD, True, False, "detectron2"),
    "detectron2_backbone": Facts("detectron2 backbone", True, RGB_MEAN, NO_STD, True, False, "detectron2"),
    "detectron": Facts("Detectron", True, CAFFE_MEAN, NO_STD, True, True, "detectron", frozen_eps=0.0),
    "mmdetection": Facts("mmdetection", False, RGB_MEAN, RGB_STD, False, False, "mmdetection"),
    "maskrcnn-benchmark": Facts(
        "maskrcnn-benchmark", True, CAFFE_MEAN, NO_STD, True, True, "detectron", frozen_eps=0.0
    ),
}
# torchvision's weights whose frozen BN has eps 0, as files and by name
RCNN_V1 = r"(maskrcnn|fasterrcnn)_resnet50_fpn_coco-|(Mask|Faster)RCNN_ResNet50_FPN_W.*V1"
RETINANET_V1 = r"retinanet_resnet50_fpn_coco-|RetinaNet_ResNet50_FPN_W.*V1"
PIXEL = ("pixel_mean", "pixel_std")  # in files of early detectron2, in the channel order of its model
MARKS = (  # (start of a key, format); the first that fits decides
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
    """Give the layers of older torchvision detectors their present names, as torchvision does when loading them.

    detectron2's MSRA backbones have Caffe2's names except for the norms, which get Caffe2's names here.
    """
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
    if refusal := _unsupported(tensors):
        raise CheckpointError(f"{file.path}: {refusal}")
    if found is None or cfg.format not in ("auto", found.removesuffix("_backbone")):
        expected = f"train.source.format: {cfg.format}" if cfg.format != "auto" else "a known format"
        keys = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:MAX_NAMED])
        raise CheckpointError(
            f"{file.path}: expected {expected}, but its tensors are named as in {found or 'no format that gndet knows'}"
            f": {keys}; gndet reads files of gndet, torchvision, timm (ResNet), detectron2, Detectron, mmdetection and "
            "maskrcnn-benchmark"
        )
    return found


def _unsupported(tensors: dict[str, Tensor]) -> str:
    """Return why a recognized model cannot be built; empty if it can."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    c4 = ("roi_heads.res5.", "conv_rpn_w", "roi_heads.box.feature_extractor.head.", "roi_head.shared_head.")
    if any(map(has, c4)) or (has("backbone.res2.") and has("proposal_generator.")):
        return "a C4 or DC5 model, whose heads work on res4 or res5; gndet has only models with a pyramid"
    if has("bbox_head.fc_cls") or (has("bbox_head.") and has("backbone.layer1.")):
        return (
            "a model of mmdetection 1 or a one-stage detector (bbox_head at the top); gndet reads the two-stage "
            "detectors of mmdetection 2 and later (roi_head.bbox_head)"
        )
    if has("conv1.0.weight") or has("backbone.stem.0."):
        return "a ResNet with a deep stem (three 3x3 convolutions, like resnet50d); gndet has only the 7x7 stem"
    if has("roi_heads.box_predictor.0.") or has("roi_head.bbox_head.0."):
        return "a cascade, which gndet does not support"
    return ""


def facts_of(format: str, file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> Facts:
    """Return what to assume of a file: the format's usual facts, then the file's own, then what the user states."""
    facts = FACTS[format]
    if file.extras.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's ResNets
        facts = facts._replace(bgr=False, std=RGB_STD, msra=False)
    if "res_conv1_bn_riv" in tensors:  # Detectron's BN has no statistics, so this is an MSRA backbone of detectron2
        facts = facts._replace(mean=RGB_MEAN, compat="detectron2", frozen_eps=1e-5)
    if format == "detectron2" and all(key in tensors and tensors[key].numel() == 3 for key in PIXEL):
        mean, std = ([float(f"{x:.6g}") for x in tensors[key].flatten()] for key in PIXEL)  # undo float32's rounding
        bgr = mean[0] <= mean[2]  # blue has the smallest mean of ImageNet; BGR is the default
        mean, std = (mean[::-1], std[::-1]) if bgr else (mean, std)
        facts = facts._replace(bgr=bgr, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))
    if format == "mmdetection":
        facts = _of_mmdetection(facts, file, any(".gn" in key for key in tensors))
    stated: dict[str, Any] = {
        "bgr": cfg.bgr, "mean": cfg.pixel_mean, "std": cfg.pixel_std, "msra": cfg.stride_in_1x1,
        "gn_msra": cfg.stride_in_1x1, "groups": cfg.groups, "channels_per_group": cfg.channels_per_group,
        "standardized": cfg.weight_standardization, "compat": cfg.compat,
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


class Reader:
    """Look up layers in a file by the names of its format; a layer that the format or the file lacks is None."""

    def __init__(self, path: str, format: str, tensors: dict[str, Tensor]) -> None:
        self.path, self.format, self.tensors, self.names = path, format, tensors, FORMATS[format]

    def weight(self, layer: str, **numbers: Any) -> Tensor | None:
        """Return the weight of a layer, or of a convolution with or without a norm."""
        name = self.names.get(layer)
        for template in (name.conv, name.bare) if isinstance(name, ConvNames) else (name,):
            key = file_key(self.format, template.format(**numbers), "weight") if template else ""
            if key in self.tensors:
                return self.tensors[key]
        return None

    def norm(self, layer: str, **numbers: Any) -> str:
        """Return the kind of the norm after a convolution: gn, bn, frozen_bn or none."""
        names = self.names[layer]
        assert isinstance(names, ConvNames)
        for kind in ("bn", "gn"):
            name = names.norm.format(norm=kind, conv1="res_conv1" if kind == "bn" else "conv1", **numbers)
            keys = ("weight", "num_batches_tracked", "running_var")
            weight, counter, var = (file_key(self.format, name, key) in self.tensors for key in keys)
            if weight and counter:
                return "bn"
            if weight:
                return "frozen_bn" if var or (self.format == "detectron" and kind == "bn") else "gn"
        return "none"


def infer_config(reader: Reader, facts: Facts, cfg: SourceConfig, name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the config of the model that fits a file's tensors, and the parts that the file holds."""
    depth, backbone_norm = _depth(reader), reader.norm("stem")
    in_1x1 = facts.gn_msra if backbone_norm == "gn" else facts.msra
    tree: dict[str, Any] = {
        "backbone": {"depth": depth, "stride_in_1x1": depth >= 50 and in_1x1, "norm": backbone_norm}
    }
    is_dense = reader.weight("dense_cls") is not None
    finest = {"L": 2 + is_dense, "l": 0, "u": 1, "last": BLOCKS[depth][0] - 1}
    lateral, objectness = reader.weight("lateral", **finest), reader.weight("objectness")
    if lateral is not None:
        tree["fpn"] = {"channels": len(lateral), "norm": reader.norm("lateral", **finest)}
    if objectness is not None:
        if len(objectness) != 3:
            raise CheckpointError(f"{reader.path}: {len(objectness)} anchors per cell, expected 3 (ratios 0.5, 1, 2)")
        num_convs = sum(reader.weight("rpn_many", n=n) is not None for n in range(8))
        ratios = cfg.aspect_ratios or (0.5, 1.0, 2.0)
        tree["rpn"] = {"aspect_ratios": ratios, "num_convs": max(num_convs, 1), "norm": "none"}
        if cfg.anchor_sizes:
            tree["rpn"]["anchor_sizes"] = cfg.anchor_sizes
    tree |= _heads(reader)
    tree |= _dense(reader, tree["fpn"]) if is_dense and "fpn" in tree else {}
    parts = tuple(tree)
    eps = cfg.norm_eps
    if eps is None and re.match(f"{RCNN_V1}|{RETINANET_V1}", name):
        eps = 0.0  # torchvision sets it for these weights (overwrite_eps)
    for section in tree.values():
        kind = section["norm"]
        default = facts.frozen_eps if kind == "frozen_bn" else 1e-5
        section["norm"] = {
            "kind": kind, "eps": default if eps is None else eps, "padding": "plain", "groups": facts.groups,
            "channels_per_group": facts.channels_per_group,
            "weight_standardization": facts.standardized and kind != "none",
        }  # fmt: skip
    tree |= {"compat": facts.compat, "pixel_mean": facts.mean, "pixel_std": facts.std, "masks": "mask_head" in parts}
    tree["norm"] = tree["backbone"]["norm"]
    if is_dense:
        tree["detector"] = "retinanet" if reader.weight("quality") is None else "fcos"
    return ModelConfig.model_validate(tree), parts


def _dense(reader: Reader, fpn: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config section of a dense detector's head, and note in that of the pyramid what P6 is made from.

    Raises CheckpointError for other anchors than RetinaNet's 9 per cell and FCOS's one.
    """
    is_fcos = reader.weight("quality") is not None
    conv = "fcos_classification" if is_fcos else "retinanet_classification"
    numbers = [{"n": n, "e": 2 * n, "x": 3 * n, "x1": 3 * n + 1} for n in range(16)]
    norm = reader.norm(conv, **numbers[0])
    convs = [place for place in numbers if _named(reader, conv, norm, place) in reader.tensors]
    boxes, p6 = reader.weight("dense_boxes"), reader.weight("p6")
    kinds, expected = 0 if boxes is None else len(boxes) // 4, 1 if is_fcos else 9
    if kinds != expected:
        raise CheckpointError(f"{reader.path}: {kinds} anchors per cell, expected {expected}")
    if p6 is not None:
        fpn["p6"] = "p5" if p6.shape[1] == fpn["channels"] else "c5"
    section: dict[str, Any] = {"num_convs": max(len(convs), 1), "norm": norm}
    bias = _named(reader, conv, norm, numbers[0]).removesuffix("weight") + "bias"
    section["conv_bias"] = norm == "none" or bias in reader.tensors
    if is_fcos:  # torchvision's
        section |= {"assign": "center", "score_threshold": 0.2}
    elif reader.format == "torchvision":  # v2 has GN in the heads
        section |= {"box_loss": "l1" if norm == "none" else "giou", "detections_per_image": 300}
    return {"dense": section}


def _named(reader: Reader, layer: str, norm: str, numbers: dict[str, int]) -> str:
    """Return the key of the weight of a convolution that is followed by a norm of that kind."""
    names = reader.names[layer]
    assert isinstance(names, ConvNames)
    return (names.conv if norm != "none" or names.bare is None else names.bare).format(**numbers) + ".weight"


def _depth(reader: Reader) -> int:
    """Return the depth of the ResNet, inferred from its blocks.  Raises CheckpointError if gndet has no such ResNet."""

    def conv(s: int, i: int, k: int) -> Tensor | None:
        return reader.weight("block", s=s, t=s - 1, i=i, k=k, abc="abc"[k - 1])

    counts = tuple(next(i for i in range(99) if conv(s, i, 1) is None) for s in STAGES)
    bottleneck = conv(2, 0, 3) is not None
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths:
        raise CheckpointError(
            f"{reader.path}: its backbone has {counts} {'bottleneck' if bottleneck else 'basic'} blocks; gndet's "
            f"ResNets have {', '.join(f'{d} {b}' for d, b in BLOCKS.items())}; is a part of the file missing?"
        )
    middle = conv(2, 0, 2)
    if bottleneck and middle is not None and middle.shape[:2] != (64, 64):
        raise CheckpointError(
            f"{reader.path}: its 3x3 convolutions in res2 are {list(middle.shape)}, expected [64, 64, 3, 3]; grouped "
            "or wide ResNets (ResNeXt) are not supported"
        )
    return depths[0]


def _heads(reader: Reader) -> dict[str, dict[str, Any]]:
    """Return the config sections of the heads in the file, with the kind of their norm."""
    sections: dict[str, dict[str, Any]] = {}
    scores, deltas, logits = (reader.weight(layer) for layer in ("cls_score", "bbox_pred", "mask_logits"))
    numbers = [{"n": n, "m": n + 1, "x": 3 * n, "x1": 3 * n + 1} for n in range(16)]
    box_convs, mask_convs = (
        [conv for conv in (reader.weight(layer, **place) for place in numbers) if conv is not None]
        for layer in ("box_conv", "mask_conv")
    )
    if scores is not None and deltas is not None:
        if len(deltas) != 4 * (len(scores) - (not FACTS[reader.format].background_first)):
            raise CheckpointError(
                f"{reader.path}: {reader.names['bbox_pred']} has {len(deltas)} rows beside {len(scores)} of "
                f"{reader.names['cls_score']}: class-agnostic boxes, which gndet does not support"
            )
        sections["box_head"] = {"kind": "2fc", "fc_channels": scores.shape[1], "norm": "none"}
        if box_convs:
            convs = {"kind": "4conv1fc", "num_convs": len(box_convs), "conv_channels": len(box_convs[0])}
            sections["box_head"] |= {**convs, "norm": reader.norm("box_conv", **numbers[0])}
    if logits is not None:
        norm = reader.norm("mask_conv", **numbers[0])
        sections["mask_head"] = {"num_convs": max(len(mask_convs), 1), "channels": logits.shape[1], "norm": norm}
    return sections
