"""The pyramid in the files of other toolkits, and the models on one level (C4, DC5), whose names differ.

Placeholders: L level 2..5, l = 0.. from the finest level, u = L - 1, last the last block's number in a stage, lateral
the end of the lateral's name, which Detectron's P5 lacks; owner as in resnet.py.
"""

from collections.abc import Iterator

from gndet.config.model import ModelConfig
from gndet.modeling.resnet import BLOCKS
from gndet.weights.foreign import resnet
from gndet.weights.foreign.names import ConvNames, Names, caffe2, module, nested, sequence
from gndet.weights.foreign.part import Layer, Part, Reader, Tree

NAMES: dict[str, Names] = {
    "torchvision": {
        "lateral": sequence("backbone.fpn.inner_blocks.{l}"), "output": sequence("backbone.fpn.layer_blocks.{l}"),
        "p6": "backbone.fpn.extra_blocks.p6", "p7": "backbone.fpn.extra_blocks.p7"},
    "detectron2": {
        "lateral": nested("backbone.fpn_lateral{L}"), "output": nested("backbone.fpn_output{L}"),
        "p6": "backbone.top_block.p6", "p7": "backbone.top_block.p7"},
    "mmdetection": {"lateral": module("neck.lateral_convs.{l}"), "output": module("neck.fpn_convs.{l}")},
    "maskrcnn-benchmark": {
        "lateral": sequence("backbone.fpn.fpn_inner{u}", bare="backbone.fpn.fpn_inner{u}"),
        "output": sequence("backbone.fpn.fpn_layer{u}", bare="backbone.fpn.fpn_layer{u}")},
    "detectron": {
        "lateral": caffe2("fpn_inner_res{L}_{last}_sum{lateral}"), "output": caffe2("fpn_res{L}_{last}_sum")},
}  # fmt: skip
ONE_LEVEL: dict[str, Names] = {  # by format, a toolkit and a neck: the names in which it differs from the toolkit's
    "detectron2_c4": {**resnet.detectron2("{owner}."), "stem": nested("backbone.stem.conv1")},
    "detectron2_dc5": resnet.detectron2("backbone."),
    "mmdetection_c4": {
        layer: name for layer, name in resnet.torchvision("{shared}.", norm="{norm}").items() if "stem" not in layer
    },
    "detectron_c4": {"rpn": ConvNames("conv_rpn", ""), "objectness": "rpn_cls_logits", "deltas": "rpn_bbox_pred"},
}
MARKS = (  # as formats.MARKS, which they precede
    ("backbone.bottom_up.", "detectron2"),
    ("roi_heads.res5.", "detectron2_c4"),
    ("backbone.res2.", "detectron2_dc5"),
    ("roi_head.shared_head.", "mmdetection_c4"),
    ("conv_rpn_w", "detectron_c4"),
)
UNSUPPORTED: dict[str, tuple[tuple[str, ...], ...]] = {  # as formats.UNSUPPORTED
    "a C4 model of maskrcnn-benchmark; gndet reads the C4 files of detectron2, Detectron and mmdetection": (
        ("roi_heads.box.feature_extractor.head.",),
    ),
    "a model of mmdetection without a pyramid (neck), like DC5; gndet reads the DC5 files of detectron2": (
        ("roi_head.", "!neck.", "!roi_head.shared_head."),
    ),
    "a Detectron model that works on res5 without a pyramid; gndet reads such files of detectron2 (DC5)": (
        ("conv_rpn_w", "fc6_w"),
    ),
}  # fmt: skip


def _levels(depth: int, *, dense: bool) -> list[dict[str, object]]:
    """Return the values of the placeholders for each level, from the finest: P2, or P3 of a dense detector."""
    levels = list(zip(resnet.STAGES, BLOCKS[depth], strict=True))[dense:]
    return [
        {"L": level, "l": n, "u": level - 1, "last": count - 1, "lateral": "" if level == 5 else "_lateral"}
        for n, (level, count) in enumerate(levels)
    ]


def _layers(cfg: ModelConfig) -> Iterator[Layer]:
    for numbers in _levels(cfg.backbone.depth, dense=cfg.is_dense) if cfg.backbone.kind == "resnet" else ():
        yield "fpn", f"lateral{numbers['L']}", "lateral", numbers
        yield "fpn", f"output{numbers['L']}", "output", numbers
    if cfg.is_dense:
        yield "fpn", "p6", "p6", {}
        yield "fpn", "p7", "p7", {}


def _infer(reader: Reader, tree: Tree) -> Tree:
    """Infer the neck, and what P6 of a dense detector is made from."""
    neck = {"neck": reader.format.partition("_")[2] if reader.format in ONE_LEVEL else "fpn"}
    is_dense, p6 = reader.weight("dense_cls") is not None, reader.weight("p6")
    finest = _levels(tree["backbone"]["depth"], dense=is_dense)[0]
    lateral = reader.weight("lateral", **finest)
    if lateral is None:
        return neck
    section: Tree = {"channels": len(lateral), "norm": reader.norm("lateral", **finest)}
    if is_dense and p6 is not None:
        section["p6"] = "p5" if p6.shape[1] == len(lateral) else "c5"
    return {**neck, "fpn": section}


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    if cfg.neck != "fpn" and toolkit != "detectron2":
        yield f"model.neck: {cfg.neck}; {toolkit} has no such detector, --to detectron2 writes it"
    if cfg.backbone.dilated_blocks != "all":
        yield f"model.backbone.dilated_blocks: {cfg.backbone.dilated_blocks}; {toolkit} dilates all blocks"


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> list[str]:
    base = {"fpn": "RCNN-FPN", "c4": "RCNN-C4", "dc5": "RCNN-DilatedC5"}[cfg.neck]
    return [f"_BASE_ Base-{base}.yaml"] if toolkit == "detectron2" and not cfg.is_dense else []


PART = Part(NAMES, _layers, infer=_infer, refusals=_refusals, settings=_settings)
