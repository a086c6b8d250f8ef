"""The section `model.dense`, and what a dense detector asks of the others: FCOS with ATSS, and RetinaNet."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from gndet.config.norm import NormConfig
from gndet.config.presets import Convention
from gndet.config.section import Positive, Section, Side

if TYPE_CHECKING:
    from gndet.config.model import ModelConfig


class DenseConfig(Section):
    """Head of the dense detectors: FCOS (Tian et al. 2019), with ATSS (Zhang et al. 2020), and RetinaNet.

    Where RetinaNet (Lin et al. 2017, "Focal Loss") has another default, the option names it.
    """

    shapes: ClassVar = ("num_convs", "conv_bias", "scales", "aspect_ratios", "quality")
    conventions: ClassVar = dict.fromkeys(("scales", "aspect_ratios", "anchors", "offset", "quality"), "dense")

    num_convs: int = Field(4, ge=1, le=32)  # convolutions of each of the two towers. Source: Lin et al. 2017, section 4
    norm: NormConfig | None = None  # replaces model.norm as a whole for this part
    # the towers' convolutions have a bias before a norm, too; retinanet: false. Source: Tian et al. 2019 (code)
    conv_bias: bool = True
    # which anchors an object trains. atss: by their overlaps' mean and deviation; center: points near its center, by
    # size; iou: by IoU, retinanet's default. Source: Zhang et al. 2020, 3.3
    assign: Literal["atss", "center", "iou"] = "atss"
    # atss: candidates per level, for each kind of anchor. Source: Zhang et al. 2020, 3.4
    candidates: int = Field(9, ge=1, le=1000)
    # center: distance from the object's center within which points are positive [strides]. Source: Tian et al. 2020
    center_radius: float = Field(1.5, gt=0)
    # iou: an anchor is positive from this IoU on. Source: Lin et al. 2017, section 4
    positive_iou: float = Field(0.5, ge=0, le=1)
    # iou: an anchor is negative below this IoU. Source: Lin et al. 2017, section 4
    negative_iou: float = Field(0.4, ge=0, le=1)
    # side of the square anchor on P3 to P7 [pixels]; with fcos it only assigns; retinanet: 32, 64, 128, 256, 512.
    # Source: Zhang et al. 2020, 3.2
    anchor_sizes: tuple[Side, Side, Side, Side, Side] = (64, 128, 256, 512, 1024)
    # sizes per level, as multiples of anchor_sizes; retinanet: 1, 2^(1/3), 2^(2/3). Source: Lin et al. 2017, section 4
    scales: tuple[Positive, ...] = Field((1.0,), min_length=1, max_length=16)
    # anchor height / width; retinanet: 0.5, 1, 2. Source: Zhang et al. 2020, 3.2
    aspect_ratios: tuple[Positive, ...] = Field((1.0,), min_length=1, max_length=16)
    # exact sides and corners (detectron2), or rounded to pixels (torchvision)
    anchors: Literal["exact", "rounded"] = "exact"
    # place of the anchors' centers in their cell; retinanet: 0, its corner [strides]. Source: Tian et al. 2019, 3.1
    offset: float = Field(0.5, ge=0, lt=1)
    # level: 8 to 128; canvas: canvas side // map side, which is not always the stride (torchvision: canvas)
    anchor_stride: Literal["level", "canvas"] = "level"
    # train and detect in the padding around a picture, as other toolkits do; couples the images of a batch
    anchors_in_padding: bool = False
    # trained beside the box, and multiplies the score: centerness, or the IoU of the box; retinanet: none.
    # Source: Tian et al. 2019, 3.3
    quality: Literal["none", "centerness", "iou"] = "centerness"
    # what measures a box's error; retinanet: l1, of its deltas. Source: Rezatofighi et al. 2019
    box_loss: Literal["giou", "l1"] = "giou"
    # weight of the box loss; retinanet: 1 (FCOS, torchvision, detectron2: 1). Source: Zhang et al. 2020 (code)
    box_weight: float = Field(2.0, gt=0)
    # weigh the box losses of an image's positives by their centerness; retinanet: false.
    # Source: Tian et al. 2019 (code)
    weigh_by_centerness: bool = True
    # what an image's losses are divided by. measure: the mean number of positives per image of data.train, found when
    # the run starts; a number: that mean; image: the image's own number (torchvision's RetinaNet)
    positives: Positive | Literal["measure", "image"] = "measure"
    # score that a class starts with everywhere. Source: Lin et al. 2017, 4.1
    prior: float = Field(0.01, gt=0, lt=1)
    pre_nms: int = Field(1000, ge=1, le=100_000)  # candidates per level before NMS. Source: Lin et al. 2017, section 4
    score_threshold: float = Field(0.05, ge=0, le=1)  # lowest score of a detection. Source: Lin et al. 2017, section 4
    # IoU above which NMS drops a detection of the same class; retinanet: 0.5. Source: Zhang et al. 2020 (code)
    nms_threshold: float = Field(0.6, gt=0, le=1)
    # what NMS compares: boxes clipped to the picture, or whole ones, clipped after it (detectron2). Source: torchvision
    nms_boxes: Literal["clipped", "whole"] = "clipped"
    # largest number of detections. Source: Zhang et al. 2020 (code)
    detections_per_image: int = Field(100, ge=1, le=100_000)

    @property
    def kinds(self) -> int:
        """Number of anchors per cell."""
        return len(self.scales) * len(self.aspect_ratios)

    @model_validator(mode="before")
    @classmethod
    def _reads_positives(cls, values: object) -> object:
        positives = values.get("positives") if isinstance(values, dict) else None
        is_number = isinstance(positives, int | float) and not isinstance(positives, bool) and 0 < positives < math.inf
        if positives is not None and not is_number and positives not in ("measure", "image"):
            raise ValueError(f"positives: got {positives!r}; expected measure, image or a positive number")
        return values

    @model_validator(mode="after")
    def _anchors_are_told_apart(self) -> "DenseConfig":
        if self.kinds > 16:
            raise ValueError(f"{self.kinds} anchors per cell (scales x aspect_ratios); expected at most 16")
        if self.assign == "center" and self.kinds > 1:
            raise ValueError(f"assign: center needs one anchor per cell, got {self.kinds} (scales x aspect_ratios)")
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou: {self.negative_iou:g} is above positive_iou: {self.positive_iou:g}")
        return self


RETINANET = Convention(
    {"detector": "retinanet"},
    {
        "dense": {
            "conv_bias": False, "assign": "iou", "anchor_sizes": (32, 64, 128, 256, 512),
            "scales": (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), "aspect_ratios": (0.5, 1.0, 2.0), "offset": 0.0,
            "quality": "none", "box_loss": "l1", "box_weight": 1.0, "weigh_by_centerness": False, "nms_threshold": 0.5,
        },
    },
)  # fmt: skip
PRESETS: dict[str, dict[str, object]] = {  # by model.compat
    "torchvision": {
        "anchors": "rounded", "anchor_stride": "canvas", "anchors_in_padding": True, "offset": 0.0,
        "box_weight": 1.0, "weigh_by_centerness": False, "positives": "image",
    },
    "detectron2": {
        "anchors_in_padding": True, "box_weight": 1.0, "weigh_by_centerness": False, "nms_boxes": "whole",
    },
    "mmdetection": {"anchors_in_padding": True},
    "detectron": {"anchors_in_padding": True},
}  # fmt: skip
# where a toolkit's detector differs from the defaults of the toolkit and of the detector: torchvision
# models/detection/fcos and retinanet; detectron2 modeling/meta_arch/retinanet
OF_TOOLKITS = (
    Convention({"detector": "fcos", "compat": "torchvision"}, {"dense": {"assign": "center", "score_threshold": 0.2}}),
    Convention({"detector": "retinanet", "compat": "torchvision"}, {"dense": {"detections_per_image": 300}}),
    Convention({"detector": "retinanet", "compat": "detectron2"}, {"dense": {"conv_bias": True}}),
)
CONVENTIONS = (
    *OF_TOOLKITS,
    *(Convention({"compat": name}, {"dense": options}) for name, options in PRESETS.items()),
    RETINANET,
)


def check_dense(model: "ModelConfig") -> None:
    """Raise ValueError for what a dense detector cannot have."""
    if model.is_dense and model.masks:
        raise ValueError(f"masks: detector: {model.detector} finds boxes only; expected model.masks=false")
    if model.is_dense and model.neck != "fpn":
        raise ValueError(f"neck: {model.neck}; detector: {model.detector} works on the levels of fpn only")
    if model.detector == "fcos" and (model.dense.kinds > 1 or model.dense.box_loss == "l1"):
        raise ValueError(
            "dense: fcos has one anchor per cell and box_loss: giou, got "
            f"{model.dense.kinds} (scales x aspect_ratios) and {model.dense.box_loss}; retinanet takes others"
        )
