"""The ResNet in the files of other toolkits.

Placeholders: s stage 2..5, t = s - 1, i block, k convolution 1..3 of a block, abc its letter, owner and shared where
the C4 models of detectron2 and mmdetection keep a stage, c and d the places of a convolution and its norm in a deep
stem, conv1 the start of the name of Detectron's first norm.
"""

import itertools
from collections.abc import Iterator

from gndet.config.model import ModelConfig
from gndet.errors import CheckpointError
from gndet.modeling.resnet import BLOCKS
from gndet.weights.foreign.names import ConvNames, Names, caffe2, nested
from gndet.weights.foreign.part import Layer, Part, Reader, Tree

STAGES = (2, 3, 4, 5)


def torchvision(prefix: str, stem: str = "", norm: str = "bn") -> Names:
    """Return torchvision's names; other toolkits name the stem and the norms in their way."""
    block = f"{prefix}layer{{t}}.{{i}}."
    return {
        "stem": ConvNames(f"{prefix}{stem}conv1", f"{prefix}{stem}{norm}1"),
        "block": ConvNames(f"{block}conv{{k}}", f"{block}{norm}{{k}}"),
        "shortcut": ConvNames(f"{block}downsample.0", f"{block}downsample.1"),
        "average_shortcut": ConvNames(f"{block}downsample.1", f"{block}downsample.2"),
        "deep_stem": ConvNames(f"{prefix}conv1.{{c}}", f"{prefix}conv1.{{d}}"),
        "deep_stem_end": ConvNames(f"{prefix}conv1.6", f"{prefix}{norm}1"),
    }


def detectron2(prefix: str) -> Names:
    """Return detectron2's names."""
    names = {"stem": "stem.conv1", "block": "res{s}.{i}.conv{k}", "shortcut": "res{s}.{i}.shortcut"}
    return {layer: nested(prefix + name) for layer, name in names.items()}


NAMES: dict[str, Names] = {
    "resnet": torchvision(""),  # classifiers of torchvision and timm
    "torchvision": torchvision("backbone.body."),
    "detectron2_backbone": detectron2(""),
    "detectron2": detectron2("backbone.bottom_up."),
    "mmdetection": {
        **torchvision("backbone.", norm="{norm}"), "deep_stem": ConvNames("backbone.stem.{c}", "backbone.stem.{d}"),
        "deep_stem_end": ConvNames("backbone.stem.6", "backbone.stem.7")},
    "maskrcnn-benchmark": torchvision("backbone.body.", stem="stem."),
    "detectron": {
        "stem": ConvNames("conv1", "{conv1}_{norm}"), "block": caffe2("res{s}_{i}_branch2{abc}"),
        "shortcut": caffe2("res{s}_{i}_branch1")},
}  # fmt: skip


def _place(s: int, i: int = 0, k: int = 1) -> dict[str, object]:
    """Return the values of the placeholders for a convolution of a block, or for the shortcut of a block."""
    owner, shared = ("roi_heads", "roi_head.shared_head") if s == 5 else ("backbone", "backbone")  # res5: on regions
    return {"s": s, "t": s - 1, "i": i, "k": k, "abc": "abc"[k - 1], "owner": owner, "shared": shared}


def _layers(cfg: ModelConfig) -> Iterator[Layer]:
    depth = cfg.backbone.depth
    if cfg.backbone.kind != "resnet":
        return
    if cfg.backbone.stem == "deep":
        for k in (1, 2):
            yield "backbone", f"stem.conv{k}", "deep_stem", {"c": 3 * k - 3, "d": 3 * k - 2}
        yield "backbone", "stem.conv3", "deep_stem_end", {}
    else:
        yield "backbone", "stem", "stem", {}
    for s, count in zip(STAGES, BLOCKS[depth], strict=True):
        for i, k in itertools.product(range(count), (1, 2, 3) if depth >= 50 else (1, 2)):
            if i == 0 and k == 1 and (s > 2 or depth >= 50):
                name = "average_shortcut" if cfg.backbone.average_shortcuts else "shortcut"
                yield "backbone", f"res{s}.{i}.shortcut", name, _place(s)
            yield "backbone", f"res{s}.{i}.conv{k}", "block", _place(s, i, k)


def _infer(reader: Reader, tree: Tree) -> Tree:
    """Infer the backbone.  Raises CheckpointError if gndet has no such ResNet."""
    is_deep = reader.weight("deep_stem", c=0) is not None
    depth, norm = _depth(reader), reader.norm("deep_stem", c=0, d=1) if is_deep else reader.norm("stem")
    in_1x1 = reader.facts.gn_msra if norm == "gn" else reader.facts.msra
    average = reader.weight("average_shortcut", **_place(3))  # elsewhere a norm has this name
    section: Tree = {
        "depth": depth, "stride_in_1x1": depth >= 50 and in_1x1, "norm": norm, "stem": "deep" if is_deep else "plain",
        "average_shortcuts": getattr(average, "ndim", 0) == 4,
    }  # fmt: skip
    middle = reader.weight("block", **_place(2, 0, 2))
    if depth >= 50 and middle is not None:  # (width, width / cardinality, 3, 3)
        per_group = middle.shape[1]
        section |= {"cardinality": len(middle) // per_group, "group_width": per_group}
    return {"backbone": section}


def _depth(reader: Reader) -> int:
    counts = tuple(next(i for i in range(99) if reader.weight("block", **_place(s, i)) is None) for s in STAGES)
    bottleneck = reader.weight("block", **_place(2, 0, 3)) is not None
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths:
        raise CheckpointError(
            f"{reader.path}: its backbone has {counts} {'bottleneck' if bottleneck else 'basic'} blocks; gndet's "
            f"ResNets have {', '.join(f'{d} {b}' for d, b in BLOCKS.items())}; is a part of the file missing?"
        )
    return depths[0]


def describe(model: ModelConfig) -> Iterator[str]:
    """Yield in words which ResNet a file holds."""
    groups, width = model.backbone.cardinality, model.backbone.group_width
    yield f"ResNet-{model.backbone.depth}"
    if model.backbone.stem == "deep":
        yield "deep stem"
    if (groups, width) != (1, 64):
        yield f"cardinality {groups}, group width {width}"


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    backbone, is_vgg = cfg.backbone, "classifier" in parts and cfg.backbone.kind == "vgg"
    if cfg.part_norms()["backbone"].kind == "none" and not is_vgg:
        yield f"model.backbone.norm: none; {toolkit} has no ResNet without norms"
    if (backbone.kind != "resnet" and not is_vgg) or backbone.width != 1:
        yield f"model.backbone: {backbone.kind}, width {backbone.width:g}; {toolkit} has other ResNets"
    if backbone.stem != "plain" or backbone.average_shortcuts:
        yield f"model.backbone: a deep stem or average_shortcuts; gndet writes no ResNet-D for {toolkit}"
    if toolkit == "torchvision" and backbone.stride_in_1x1:
        yield "model.backbone.stride_in_1x1: torchvision has the stride in the 3x3 only"


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> Iterator[str]:
    mean, depth, in_1x1 = list(cfg.pixel_mean), cfg.backbone.depth, cfg.backbone.stride_in_1x1
    groups, width = cfg.backbone.cardinality, cfg.backbone.group_width
    grouped = (groups, width) != (1, 64)
    if toolkit == "detectron2":
        wide = f", MODEL.RESNETS.NUM_GROUPS {groups}, WIDTH_PER_GROUP {width}" if grouped else ""
        yield f"MODEL.PIXEL_MEAN {mean[::-1]}, PIXEL_STD [1.0, 1.0, 1.0], INPUT.FORMAT BGR"
        yield f"MODEL.RESNETS.DEPTH {depth}, STRIDE_IN_1X1 {in_1x1}{wide}"
    elif toolkit == "torchvision":
        wide = f"; backbone with groups={groups}, width_per_group={width}" if grouped else ""
        classes = f"num_classes {num_classes + 1} (background first)"
        yield f"image_mean {[round(x / 255, 6) for x in mean]}, image_std [0.229, 0.224, 0.225], {classes}{wide}"
    elif toolkit == "mmdetection":
        wide = f"type='ResNeXt', groups={groups}, base_width={width}, " if grouped else ""
        style = "caffe" if in_1x1 else "pytorch"
        yield f"data_preprocessor: mean={mean}, std={list(cfg.pixel_std)}, bgr_to_rgb=True"
        yield f"backbone: {wide}depth={depth}, style={style}; num_classes={num_classes}"


PART = Part(NAMES, _layers, infer=_infer, refusals=_refusals, settings=_settings)
