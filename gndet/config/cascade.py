"""The section `model.cascade`, and what a Cascade R-CNN asks of the others.

Sources of the conventions: detectron2 configs/Misc/cascade_mask_rcnn_R_50_FPN_1x and modeling/roi_heads/cascade_rcnn;
mmdetection configs/_base_/models/cascade_mask_rcnn_r50_fpn and models/roi_heads.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from gndet.config.presets import Convention
from gndet.config.section import Positive, Section

if TYPE_CHECKING:
    from gndet.config.model import ModelConfig


class CascadeConfig(Section):
    """The stages of a Cascade R-CNN (detector: cascade_rcnn): box heads with the options of model.box_head."""

    shapes: ClassVar = ("positive_iou", "mask_stages")
    conventions: ClassVar = {"delta_weights": "box_head", "average": "box_head"}

    # a region is positive from this IoU on, per stage; replaces box_head.positive_iou. Source: Cai & Vasconcelos
    # 2018
    positive_iou: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((0.5, 0.6, 0.7), min_length=1, max_length=8)
    # scale of the deltas (dx, dy) and (dw, dh), per stage. Source: detectron2
    delta_weights: tuple[tuple[Positive, Positive], ...] = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))
    # weight of the losses, per stage (mmdetection: 1, 0.5, 0.25). Source: detectron2
    loss_weights: tuple[Positive, ...] = (1.0, 1.0, 1.0)
    # divide the gradient of the box heads' features by the number of stages (mmdetection: false). Source: detectron2
    scale_gradient: bool = True
    # later stages: sample refined boxes and ground truth anew (mmdetection), or train on all refined boxes (detectron2)
    resample: bool = False
    # what a detection's score averages over the stages: probabilities (scores), or logits (mmdetection). Source:
    # detectron2
    average: Literal["scores", "logits"] = "scores"
    # stage on whose regions the mask head trains; each: a mask head per stage, masks averaged (mmdetection). With
    # resample: false, all regions of a later stage may be positive, which takes more memory. Source: detectron2
    mask_stages: Literal["first", "last", "each"] = "first"

    @model_validator(mode="after")
    def _options_name_the_same_stages(self) -> "CascadeConfig":
        counts = {name: len(getattr(self, name)) for name in ("positive_iou", "delta_weights", "loss_weights")}
        if len(set(counts.values())) > 1:
            words = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"got values for {words}; expected one value of each per stage")
        return self


MMDETECTION = Convention(
    {"detector": "cascade_rcnn", "compat": "mmdetection"},
    {
        "rpn": {"loss_beta": 1 / 9},
        "box_head": {"loss_beta": 1.0},
        "cascade": {
            "delta_weights": ((10.0, 5.0), (20.0, 10.0), (1 / 0.033, 1 / 0.067)),
            "loss_weights": (1.0, 0.5, 0.25), "scale_gradient": False, "resample": True, "average": "logits",
            "mask_stages": "each",
        },
    },
)  # fmt: skip
CASCADE = Convention(
    {"detector": "cascade_rcnn"}, {"rpn": {"post_nms_train": 2000}, "box_head": {"class_agnostic": True}}
)
CONVENTIONS = (MMDETECTION, CASCADE)


def check_cascade(model: "ModelConfig") -> None:
    """Raise ValueError for what a cascade cannot have."""
    if model.detector == "cascade_rcnn" and not model.box_head.class_agnostic:
        raise ValueError(
            "box_head.class_agnostic: false; a stage of a cascade refines one box per region; expected true"
        )
    if model.detector == "cascade_rcnn" and model.neck != "fpn":
        raise ValueError(f"neck: {model.neck}; detector: cascade_rcnn works on the levels of fpn only")
