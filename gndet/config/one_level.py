"""What the necks c4 and dc5 ask of the parts of a model.

Sources of the conventions: detectron2 configs/Base-RCNN-C4.yaml and Base-RCNN-DilatedC5.yaml; Detectron core/config.
"""

from typing import TYPE_CHECKING

from gndet.config.presets import Convention

if TYPE_CHECKING:
    from gndet.config.model import ModelConfig

SHARED = ("pool_size", "sampling_ratio", "roi_align")  # options of how the heads of a C4 model pool the same regions
# options without effect in a C4 model, where res5 takes the place of the box head's convolutions and linear layers
C4_LACKS = tuple(f"box_head.{name}" for name in ("kind", "num_convs", "conv_channels", "fc_channels", "norm_last"))
_RPN = {"pre_nms_train": 12000, "pre_nms_test": 6000, "post_nms_train": 2000}
# only Detectron's FPN configs state a sampling ratio: e2e_mask_rcnn_R-50-C4_1x has the default of core/config, 0.
# detectron2 and mmdetection have 0 with every neck
DETECTRON_C4 = Convention(
    {"neck": "c4", "compat": "detectron"}, {"box_head": {"sampling_ratio": 0}, "mask_head": {"sampling_ratio": 0}}
)
C4 = Convention({"neck": "c4"}, {"rpn": _RPN, "box_head": {"pool_size": 14}, "mask_head": {"num_convs": 0}})
DC5 = Convention({"neck": "dc5"}, {"rpn": _RPN, "box_head": {"kind": "2fc"}})
CONVENTIONS = (DETECTRON_C4, C4, DC5)


def check_neck(model: "ModelConfig") -> None:
    """Raise ValueError for what does not fit the neck."""
    neck, rpn, backbone = model.neck, model.rpn, model.backbone
    anchors, dilated = len(rpn.anchor_sizes) * len(rpn.aspect_ratios), backbone.dilated_blocks
    if neck != "fpn" and model.detector == "classifier":
        raise ValueError(f"neck: {neck}; a classifier works on the backbone's last map; expected fpn")
    if neck == "fpn" and len(rpn.anchor_sizes) != 5:
        raise ValueError(f"rpn.anchor_sizes: {len(rpn.anchor_sizes)} sizes; expected 5, one for each of P2 to P6")
    if neck != "fpn" and anchors > 16:
        raise ValueError(f"rpn.anchor_sizes: {anchors} anchors per cell with rpn.aspect_ratios; expected up to 16")
    if neck != "fpn" and backbone.kind != "resnet":
        raise ValueError(f"neck: {neck} needs the stages of a resnet; got backbone.kind: {backbone.kind}")
    if neck == "dc5" and backbone.depth < 50:
        raise ValueError(f"neck: dc5 dilates bottlenecks; expected backbone.depth from 50 on, got {backbone.depth}")
    if neck != "dc5" and dilated != "all":
        raise ValueError(f"backbone.dilated_blocks: {dilated} has an effect with neck: dc5 only")
    if neck == "c4" and backbone.stochastic_depth:
        raise ValueError("backbone.stochastic_depth: res5 skips no block on the regions of neck: c4; expected 0")
    for option in SHARED if neck == "c4" and model.masks else ():
        box, mask = (getattr(head, option) for head in (model.box_head, model.mask_head))
        if box != mask:
            same = f"expected that of box_head, {box}: with neck: c4 the heads share their regions"
            raise ValueError(f"mask_head.{option}: {mask}; {same}")
