"""The detectors on one level, C4 and DC5, in the files of other toolkits: formats of their own, as their names differ.

Detectron and mmdetection have the anchors of a cell size by size within ratios; gndet has ratios within sizes.

Placeholders as in resnet.py.
"""

from collections.abc import Iterator
from typing import Any

from gndet.config.model import ModelConfig
from gndet.weights.foreign import resnet
from gndet.weights.foreign.names import ConvNames, Names, nested, toolkit_of
from gndet.weights.foreign.part import Part, Reader, State, Tree

NAMES: dict[str, Names] = {  # by format, a toolkit and a neck: the layers whose names differ from the toolkit's
    "detectron2_c4": {**resnet.detectron2("{owner}."), "stem": nested("backbone.stem.conv1")},
    "detectron2_dc5": resnet.detectron2("backbone."),
    "mmdetection_c4": {
        layer: name for layer, name in resnet.torchvision("{shared}.", norm="{norm}").items() if "stem" not in layer
    },
    "detectron_c4": {"rpn": ConvNames("conv_rpn", ""), "objectness": "rpn_cls_logits", "deltas": "rpn_bbox_pred"},
}
CHANGES: dict[str, dict[str, Any]] = {  # by format: facts that differ from the toolkit's
    "mmdetection_c4": {"bgr": True, "std": (1.0, 1.0, 1.0), "msra": True},  # style caffe
}
MARKS = (  # as formats.MARKS, which they precede
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


def _infer(reader: Reader, tree: Tree) -> Tree:
    """Infer the neck."""
    return {"neck": reader.format.partition("_")[2] if reader.format in NAMES else "fpn"}


def _order_anchors(state: State, model: ModelConfig, format: str) -> None:
    """Put the rows of a cell's anchors in gndet's order, ratios within sizes, from sizes within ratios."""
    if toolkit_of(format) not in ("detectron", "mmdetection") or model.neck == "fpn":
        return
    for layer, values in (("rpn.objectness", 1), ("rpn.deltas", 4)):
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key in state:
                rows = state[key].unflatten(0, (len(model.rpn.aspect_ratios), -1, values))
                state[key] = rows.transpose(0, 1).flatten(0, 2)


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    if cfg.neck != "fpn" and toolkit != "detectron2":
        yield f"model.neck: {cfg.neck}; {toolkit} has no such detector, --to detectron2 writes it"
    if cfg.backbone.dilated_blocks != "all":
        yield f"model.backbone.dilated_blocks: {cfg.backbone.dilated_blocks}; {toolkit} dilates all blocks"


def _settings(cfg: ModelConfig, num_classes: int, toolkit: str) -> Iterator[str]:
    base = {"c4": "RCNN-C4", "dc5": "RCNN-DilatedC5"}.get(cfg.neck)
    if base and toolkit == "detectron2":
        yield f"_BASE_ Base-{base}.yaml"


PART = Part({}, infer=_infer, from_file=_order_anchors, refusals=_refusals, settings=_settings)
