"""Tell which toolkit wrote a file, what that toolkit's files assume, and which ModelConfig fits the tensors.

C channels, K classes.
"""

import itertools
import re
from typing import Any, NamedTuple

from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.parts import RPNConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.resnet import BLOCKS
from gndet.modeling.trained import MAX_NAMED
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.names import FORMATS, STAGES, ConvNames, file_key, stage_owner, toolkit_of

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
    standardization: str = "qiao"  # its variant


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
FACTS |= {
    "detectron2_c4": FACTS["detectron2"]._replace(title="detectron2 C4"),
    "detectron2_dc5": FACTS["detectron2"]._replace(title="detectron2 DC5"),
    "detectron_c4": FACTS["detectron"]._replace(title="Detectron C4"),
    "mmdetection_c4": FACTS["mmdetection"]._replace(title="mmdetection C4", bgr=True, std=NO_STD, msra=True),  # caffe
}
NUM_STAGES = 3  # of a cascade in every toolkit
PIXEL = ("pixel_mean", "pixel_std")  # in files of early detectron2, in the channel order of its model
GROUPED = ("backbone.bottom_up.res2.0.conv2.weight", "res2.0.conv2.weight", "res2_0_branch2b_w")
MARKS = (  # (start of a key, format); the first that fits decides
    ("backbone.bottom_up.", "detectron2"),
    ("roi_heads.res5.", "detectron2_c4"),
    ("backbone.res2.", "detectron2_dc5"),
    ("conv_rpn_w", "detectron_c4"),
    ("proposal_generator.", "detectron2"),
    ("roi_heads.box.feature_extractor.", "maskrcnn-benchmark"),
    ("backbone.body.stem.", "maskrcnn-benchmark"),
    ("backbone.body.", "torchvision"),
    ("roi_head.shared_head.", "mmdetection_c4"),
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
    if refusal := _unsupported(tensors):
        raise CheckpointError(f"{file.path}: {refusal}")
    if found is None or cfg.format not in ("auto", toolkit_of(found)):
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

    if has("roi_heads.box.feature_extractor.head."):
        return "a C4 model of maskrcnn-benchmark; gndet reads the C4 files of detectron2, Detectron and mmdetection"
    if has("roi_head.") and not has("neck.") and not has("roi_head.shared_head."):
        return "a model of mmdetection without a pyramid (neck), like DC5; gndet reads the DC5 files of detectron2"
    if has("conv_rpn_w") and has("fc6_w"):
        return "a Detectron model that works on res5 without a pyramid; gndet reads such files of detectron2 (DC5)"
    if has("bbox_head.fc_cls") or (has("bbox_head.") and has("backbone.layer1.")):
        return (
            "a model of mmdetection 1 or a one-stage detector (bbox_head at the top); gndet reads the two-stage "
            "detectors of mmdetection 2 and later (roi_head.bbox_head)"
        )
    return ""


def facts_of(format: str, file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> Facts:
    """Return what to assume of a file: the format's usual facts, then the file's own, then what the user states."""
    facts = FACTS[format]
    if file.extras.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's ResNets
        facts = facts._replace(bgr=False, std=RGB_STD, msra=False)
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


class Reader:
    """Look up layers in a file by the names of its format; a layer that the format or the file lacks is None."""

    def __init__(self, path: str, format: str, tensors: dict[str, Tensor]) -> None:
        self.path, self.format, self.tensors, self.names = path, format, tensors, FORMATS[format]

    def weight(self, layer: str, **numbers: Any) -> Tensor | None:
        """Return the weight of a layer, or of a convolution with or without a norm."""
        name, numbers = self.names.get(layer), {"stage": "", **numbers}
        for template in (name.conv, name.bare) if isinstance(name, ConvNames) else (name,):
            key = file_key(self.format, template.format(**numbers), "weight") if template else ""
            if key in self.tensors:
                return self.tensors[key]
        return None

    def stages(self, layer: str) -> int:
        """Return how many stages of a cascade have the layer; 0 if it is not in stages."""
        template = self.names.get(layer)
        if not isinstance(template, str) or "{stage}" not in template:
            return 0
        return next(i for i in itertools.count() if self.weight(layer, stage=f"{i}.") is None)

    def norm(self, layer: str, **numbers: Any) -> str:
        """Return the kind of the norm after a convolution: gn, bn, frozen_bn or none."""
        names = self.names[layer]
        assert isinstance(names, ConvNames)
        for kind in ("bn", "gn"):
            places = {"stage": "", "conv1": "res_conv1" if kind == "bn" else "conv1", **numbers}
            name = names.norm.format(norm=kind, **places)
            keys = ("weight", "num_batches_tracked", "running_var")
            weight, counter, var = (file_key(self.format, name, key) in self.tensors for key in keys)
            if weight and counter:
                return "bn"
            if weight:
                return "frozen_bn" if var or (toolkit_of(self.format) == "detectron" and kind == "bn") else "gn"
        return "none"


def infer_config(reader: Reader, facts: Facts, cfg: SourceConfig, name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the config of the model that fits a file's tensors, and the parts that the file holds."""
    is_deep = reader.weight("deep_stem", c=0) is not None
    depth, backbone_norm = _depth(reader), reader.norm("deep_stem", c=0, d=1) if is_deep else reader.norm("stem")
    neck = {"c4": "c4", "dc5": "dc5"}.get(reader.format.partition("_")[2], "fpn")
    in_1x1 = facts.gn_msra if backbone_norm == "gn" else facts.msra
    tree: dict[str, Any] = {
        "backbone": {"depth": depth, "stride_in_1x1": depth >= 50 and in_1x1, "norm": backbone_norm}
    }
    average = reader.weight("average_shortcut", s=3, t=2, i=0, owner="backbone")  # elsewhere a norm has this name
    tree["backbone"] |= {"stem": "deep" if is_deep else "plain", "average_shortcuts": getattr(average, "ndim", 0) == 4}
    middle = reader.weight("block", s=2, t=1, i=0, k=2, abc="b", owner="backbone")
    if depth >= 50 and middle is not None:  # (width, width / cardinality, 3, 3)
        per_group = middle.shape[1]
        tree["backbone"] |= {"cardinality": len(middle) // per_group, "group_width": per_group}
    is_dense = reader.weight("dense_cls") is not None
    finest = {"L": 2 + is_dense, "l": 0, "u": 1, "last": BLOCKS[depth][0] - 1}
    lateral, objectness = reader.weight("lateral", **finest), reader.weight("objectness")
    if lateral is not None:
        tree["fpn"] = {"channels": len(lateral), "norm": reader.norm("lateral", **finest)}
    if objectness is not None:
        tree["rpn"] = _rpn(reader, cfg, neck, len(objectness))
    tree |= _heads(reader, neck)
    tree |= _dense(reader, tree["fpn"]) if is_dense and "fpn" in tree else {}
    parts = tuple(tree)
    cascade = _cascade(reader)
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
            "standardization": facts.standardization if facts.standardized and kind != "none" else "bit",
        }  # fmt: skip
    tree |= {
        "compat": facts.compat,
        "neck": neck,
        "pixel_mean": facts.mean,
        "pixel_std": facts.std,
        "masks": "mask_head" in parts,
    }
    tree |= {"norm": tree["backbone"]["norm"], **cascade}
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
        return reader.weight("block", s=s, t=s - 1, i=i, k=k, abc="abc"[k - 1], owner=stage_owner(reader.format, s))

    counts = tuple(next(i for i in range(99) if conv(s, i, 1) is None) for s in STAGES)
    bottleneck = conv(2, 0, 3) is not None
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths:
        raise CheckpointError(
            f"{reader.path}: its backbone has {counts} {'bottleneck' if bottleneck else 'basic'} blocks; gndet's "
            f"ResNets have {', '.join(f'{d} {b}' for d, b in BLOCKS.items())}; is a part of the file missing?"
        )
    return depths[0]


def _rpn(reader: Reader, cfg: SourceConfig, neck: str, num_anchors: int) -> dict[str, Any]:
    """Return the config section of the RPN in the file.  Raises CheckpointError if the anchors of a cell do not fit."""
    ratios, sizes = cfg.aspect_ratios or (0.5, 1.0, 2.0), cfg.anchor_sizes or RPNConfig().anchor_sizes
    if num_anchors != (expected := len(ratios) * (1 if neck == "fpn" else len(sizes))):
        of_sizes = "" if neck == "fpn" else f", sizes {', '.join(f'{size:g}' for size in sizes)}"
        words = f"expected {expected} (ratios {', '.join(f'{ratio:g}' for ratio in ratios)}{of_sizes})"
        hint = "" if neck == "fpn" else "; train.source.anchor_sizes states the file's sizes"
        raise CheckpointError(f"{reader.path}: {num_anchors} anchors per cell, {words}{hint}")
    num_convs = sum(reader.weight("rpn_many", n=n) is not None for n in range(8))
    return {"aspect_ratios": ratios, "anchor_sizes": sizes, "num_convs": max(num_convs, 1), "norm": "none"}


def _cascade(reader: Reader) -> dict[str, Any]:
    """Return the options of a cascade in the file; empty if it holds none.  Raises CheckpointError for another one."""
    num, num_masks = reader.stages("cls_score"), reader.stages("mask_logits")
    if not num:
        return {}
    if num != NUM_STAGES or num_masks not in (0, NUM_STAGES):
        raise CheckpointError(
            f"{reader.path}: a cascade of {num} stages with {num_masks} mask heads in stages; expected "
            f"{NUM_STAGES} stages, whose IoU thresholds and scales of deltas are known, and 0 or {NUM_STAGES}"
        )
    has_one = reader.weight("mask_logits") is not None
    stages = {"cascade": {"mask_stages": "each" if num_masks else "first"}} if num_masks or has_one else {}
    return {"detector": "cascade_rcnn", **stages}


def _heads(reader: Reader, neck: str) -> dict[str, dict[str, Any]]:
    """Return the config sections of the heads in the file, with the kind of their norm."""
    sections: dict[str, dict[str, Any]] = {}
    box_stage, mask_stage = ("0." if reader.stages(layer) else "" for layer in ("cls_score", "mask_logits"))
    scores, deltas = (reader.weight(layer, stage=box_stage) for layer in ("cls_score", "bbox_pred"))
    logits = reader.weight("mask_logits", stage=mask_stage)
    box_places, mask_places = (
        [{"n": n, "m": n + 1, "x": 3 * n, "x1": 3 * n + 1, "stage": stage} for n in range(16)]
        for stage in (box_stage, mask_stage)
    )
    box_convs, mask_convs = (
        [conv for conv in (reader.weight(layer, **place) for place in places) if conv is not None]
        for layer, places in (("box_conv", box_places), ("mask_conv", mask_places))
    )
    if scores is not None and deltas is not None:
        background_first = FACTS[reader.format].background_first
        by_class = len(deltas) == 4 * (len(scores) - (not background_first))
        if not by_class and (len(deltas) != 4 or background_first):
            box_layer, score_layer = (str(reader.names[x]).format(stage=box_stage) for x in ("bbox_pred", "cls_score"))
            raise CheckpointError(
                f"{reader.path}: {box_layer} has {len(deltas)} rows beside {len(scores)} of "
                f"{score_layer}: expected 4 per class"
                + ("; class-agnostic boxes are read from detectron2 and mmdetection only" if background_first else "")
            )
        if box_stage and len(deltas) != 4:
            raise CheckpointError(
                f"{reader.path}: {str(reader.names['bbox_pred']).format(stage=box_stage)} has {len(deltas)} rows, a "
                "box for each class; expected 4, because a stage of gndet's cascade refines one box per region; choose "
                "a cascade with reg_class_agnostic=True, or a file without cascade"
            )
        sections["box_head"] = {"kind": "2fc", "fc_channels": scores.shape[1], "norm": "none"}
        sections["box_head"]["class_agnostic"] = not by_class or bool(box_stage)
        if neck == "c4":
            sections["box_head"] = {"kind": "res5", "norm": "none"}
        if box_convs:
            convs = {"kind": "4conv1fc", "num_convs": len(box_convs), "conv_channels": len(box_convs[0])}
            sections["box_head"] |= {**convs, "norm": reader.norm("box_conv", **box_places[0])}
    if logits is not None:
        norm, least = reader.norm("mask_conv", **mask_places[0]), 0 if neck == "c4" else 1
        sections["mask_head"] = {"num_convs": max(len(mask_convs), least), "channels": logits.shape[1], "norm": norm}
    return sections
