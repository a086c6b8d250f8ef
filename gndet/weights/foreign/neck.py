"""The pyramid in the files of other toolkits.

Placeholders: L level 2..5, l = 0.. from the finest level, u = L - 1, last the last block's number in a stage, lateral
the end of the lateral's name, which Detectron's P5 lacks.
"""

from collections.abc import Iterator

from gndet.config.model import ModelConfig
from gndet.modeling.resnet import BLOCKS
from gndet.weights.foreign import resnet
from gndet.weights.foreign.names import Names, caffe2, module, nested, sequence
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
    """Infer the pyramid, and what P6 of a dense detector is made from."""
    is_dense, p6 = reader.weight("dense_cls") is not None, reader.weight("p6")
    finest = _levels(tree["backbone"]["depth"], dense=is_dense)[0]
    lateral = reader.weight("lateral", **finest)
    if lateral is None:
        return {}
    section: Tree = {"channels": len(lateral), "norm": reader.norm("lateral", **finest)}
    if is_dense and p6 is not None:
        section["p6"] = "p5" if p6.shape[1] == len(lateral) else "c5"
    return {"fpn": section}


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> Iterator[str]:
    if toolkit == "detectron2" and cfg.neck == "fpn" and cfg.region_heads:
        yield "_BASE_ Base-RCNN-FPN.yaml"


PART = Part(NAMES, _layers, infer=_infer, settings=_settings)
