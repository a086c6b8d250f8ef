"""What a format's files assume by custom, and the ModelConfig that fits a file's tensors.

C channels, K classes.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor

from gndet.config.schema import ModelConfig, SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.resnet import BLOCKS
from gndet.weights.foreign.names import FORMATS, PARTS, STAGES, Brick, theirs

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, torchvision, timm, mmdetection
CAFFE_MEAN, NO_STD = (122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0)  # Detectron's, here as RGB


class Facts(NamedTuple):
    """What a format's files assume by custom."""

    title: str
    bgr: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    msra: bool  # BN backbones have their stride in the 1x1; GN ones only where gn_msra
    background_first: bool
    compat: str
    frozen_eps: float = 1e-5
    gn_msra: bool = False
    groups: int = 32
    channels_per_group: int | None = None
    standardized: bool = False  # weight standardization in its backbone, pyramid and heads


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


class Reader:
    """Look layers up in a file by the templates of its format."""

    def __init__(self, path: str, format: str, tensors: dict[str, Tensor]) -> None:
        self.path, self.format, self.tensors, self.names = path, format, tensors, FORMATS[format]

    def conv(self, brick: Brick | None, **numbers: Any) -> Tensor | None:
        """Return the weight of a brick's convolution, with or without a norm behind it."""
        for template in (brick.conv, brick.bare) if brick else ():
            key = theirs(self.format, template.format(**numbers), "weight") if template else ""
            if key in self.tensors:
                return self.tensors[key]
        return None

    def plain(self, template: str, **numbers: Any) -> Tensor | None:
        """Return the weight of a layer without a norm."""
        return self.tensors.get(theirs(self.format, template.format(**numbers), "weight")) if template else None

    def norm(self, brick: Brick | None, **numbers: Any) -> str:
        """Return the kind of a brick's norm: gn, bn, frozen_bn or none."""
        for kind in ("bn", "gn") if brick and brick.norm else ():
            name = brick.norm.format(norm=kind, conv1="res_conv1" if kind == "bn" else "conv1", **numbers)
            if theirs(self.format, name, "weight") not in self.tensors:
                continue
            if theirs(self.format, name, "num_batches_tracked") in self.tensors:
                return "bn"
            if theirs(self.format, name, "running_var") in self.tensors or (
                self.format == "detectron" and kind == "bn"
            ):
                return "frozen_bn"
            return "gn"
        return "none"


def infer_config(reader: Reader, facts: Facts, cfg: SourceConfig, name: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the config of the model that a file's tensors fit, and the parts that the file holds."""
    names, tree, depth = reader.names, {}, _depth(reader)
    norms = {"backbone": reader.norm(names.stem)}
    tree["backbone"] = {"depth": depth, "stride_in_1x1": False}
    if depth >= 50:
        tree["backbone"]["stride_in_1x1"] = facts.gn_msra if norms["backbone"] == "gn" else facts.msra
    last = BLOCKS[depth][0] - 1
    lateral = reader.conv(names.lateral, L=2, l=0, u=1, last=last)
    if lateral is not None:
        tree["fpn"] = {"channels": len(lateral)}
        norms["fpn"] = reader.norm(names.lateral, L=2, l=0, u=1, last=last)
    objectness = reader.plain(names.objectness)
    if objectness is not None:
        if len(objectness) != 3:
            raise CheckpointError(f"{reader.path}: {len(objectness)} anchors per cell, expected 3 (ratios 0.5, 1, 2)")
        many = sum(reader.conv(names.rpn_many, n=n) is not None for n in range(8)) if names.rpn_many else 0
        tree["rpn"] = {"aspect_ratios": cfg.aspect_ratios or (0.5, 1.0, 2.0), "num_convs": max(many, 1)}
        if cfg.anchor_sizes:
            tree["rpn"]["anchor_sizes"] = cfg.anchor_sizes
        norms["rpn"] = "none"
    tree |= _heads(reader, norms)
    eps = cfg.norm_eps
    if eps is None and re.match(r"(maskrcnn|fasterrcnn)_resnet50_fpn_coco-|(Mask|Faster)RCNN_ResNet50_FPN_W.*V1", name):
        eps = 0.0  # torchvision sets it for these weights (overwrite_eps)
    for part, kind in norms.items():
        default = facts.frozen_eps if kind == "frozen_bn" else 1e-5
        tree[part]["norm"] = {
            "kind": kind, "eps": default if eps is None else eps, "padding": "plain", "groups": facts.groups,
            "channels_per_group": facts.channels_per_group,
            "weight_standardization": facts.standardized and kind != "none",
        }  # fmt: skip
    parts = tuple(part for part in PARTS if part in norms)
    tree |= {"compat": facts.compat, "pixel_mean": facts.mean, "pixel_std": facts.std, "masks": "mask_head" in parts}
    tree["norm"] = tree["backbone"]["norm"]
    return ModelConfig.model_validate(tree), parts


def _depth(reader: Reader) -> int:
    """Return the depth of the ResNet by its blocks.  Raises CheckpointError where gndet has no such ResNet."""
    block = reader.names.block

    def conv(s: int, i: int, k: int) -> Tensor | None:
        return reader.conv(block, s=s, t=s - 1, i=i, k=k, abc="abc"[k - 1])

    counts = tuple(next(i for i in range(99) if conv(s, i, 1) is None) for s in STAGES)
    bottleneck = conv(2, 0, 3) is not None
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths:
        raise CheckpointError(
            f"{reader.path}: its backbone has {counts} {'bottleneck' if bottleneck else 'basic'} blocks, which is no "
            f"ResNet of gndet: {', '.join(f'{d} {b}' for d, b in BLOCKS.items())}; is a part of the file missing?"
        )
    middle = conv(2, 0, 2)
    if bottleneck and middle is not None and (middle.shape[1] != len(middle) or len(middle) != 64):
        raise CheckpointError(
            f"{reader.path}: its 3x3 convolutions in res2 are {list(middle.shape)}, expected [64, 64, 3, 3]; grouped "
            "or wide ResNets (ResNeXt) are not in gndet"
        )
    return depths[0]


def _heads(reader: Reader, norms: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the config sections of the heads that the file holds; add their norms to norms."""
    names, sections = reader.names, {}
    scores, deltas = reader.plain(names.cls_score), reader.plain(names.bbox_pred)
    if scores is not None and deltas is not None:
        first = FACTS[reader.format].background_first
        if len(deltas) != 4 * (len(scores) if first else len(scores) - 1):
            raise CheckpointError(
                f"{reader.path}: {names.bbox_pred} has {len(deltas)} rows beside {len(scores)} of {names.cls_score}: "
                "class-agnostic boxes, which gndet does not have"
            )
        numbers = [{"n": n, "m": n + 1, "x": 3 * n, "x1": 3 * n + 1} for n in range(16)]
        convs = [conv for conv in (reader.conv(names.box_conv, **place) for place in numbers) if conv is not None]
        section: dict[str, Any] = {"kind": "4conv1fc" if convs else "2fc", "fc_channels": scores.shape[1]}
        norms["box_head"] = "none"
        if convs:
            section |= {"num_convs": len(convs), "conv_channels": len(convs[0])}
            norms["box_head"] = reader.norm(names.box_conv, **numbers[0])
        sections["box_head"] = section
    logits = reader.plain(names.mask_logits)
    if logits is not None:
        convs = [reader.conv(names.mask_conv, n=n, m=n + 1) for n in range(16)]
        convs = [conv for conv in convs if conv is not None]
        sections["mask_head"] = {"num_convs": max(len(convs), 1), "channels": logits.shape[1]}
        norms["mask_head"] = reader.norm(names.mask_conv, n=0, m=1)
    return sections
