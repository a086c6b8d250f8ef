"""The section `model`: which model it is, its parts, and the options of each detector that is not a Mask R-CNN.

To add a detector: its section and its name in ModelConfig here, and defaults that differ from these in presets.py.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig, BoxHeadConfig, FPNConfig, MaskHeadConfig, RPNConfig
from gndet.config.presets import C4_PRESETS, CASCADE_PRESETS, DETECTOR_DEFAULTS, NECKS, PRESETS, beneath
from gndet.config.section import Positive, Section, Side


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


class ClassifierConfig(Section):
    """What classifies a picture: pooling, fully connected layers, one logit per class (task: classification)."""

    shapes: ClassVar = ("fc_channels", "pool_size")

    # side of the map that each picture is pooled to [cells]; VGG with its own head: 7. Source: He et al. 2016
    pool_size: int = Field(1, ge=1, le=64)
    # widths of fully connected layers before the logits [channels]; VGG: [4096, 4096]. Source: He et al. 2016
    fc_channels: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field((), max_length=4)
    dropout: float = Field(0.0, ge=0, lt=1)  # share of their outputs set to 0 in training (VGG: 0.5)
    # softmax: cross-entropy; sigmoid: binary cross-entropy, mean over the classes. Source: He et al. 2016
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target spread over all classes (Szegedy et al. 2016)
    # sigmoid: each class with more than this share of a mixed picture has the target 1, the others 0, before smoothing
    # (A2, A3 of Wightman et al. 2021: 0.2); null: the target is the share
    target_threshold: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _softmax_takes_shares(self) -> "ClassifierConfig":
        if self.loss == "softmax" and self.target_threshold is not None:
            raise ValueError(
                f"target_threshold: {self.target_threshold:g} is for loss: sigmoid; softmax takes the shares"
            )
        return self


class ModelConfig(Section):
    """The detector, or the classifier."""

    shapes: ClassVar = ("detector", "neck")
    conventions: ClassVar = {"pixel_mean": "backbone", "neck": "rpn", "detector": "dense"}

    # a toolkit's conventions as the defaults of the options below; see the table of presets
    compat: Literal["gndet", "torchvision", "detectron2", "detectron", "mmdetection"] = "gndet"
    # kind of model: mask_rcnn; cascade_rcnn (Cai & Vasconcelos 2018); fcos and retinanet, dense detectors of boxes
    # (masks: false); classifier (task sets it). Source: He et al. 2017
    detector: Literal["mask_rcnn", "cascade_rcnn", "fcos", "retinanet", "classifier"] = "mask_rcnn"
    # the levels that RPN and heads work on. fpn: P2 to P6; c4: res4's map, and res5 on each region; dc5: the map of
    # res5 with stride 16 and dilation 2. c4 and dc5 have defaults of their own, see the last table.
    # Source: Lin et al. 2017
    neck: Literal["fpn", "c4", "dc5"] = "fpn"
    norm: NormConfig = NormConfig()
    masks: bool = True  # train and predict masks; false makes the model a Faster R-CNN
    # subtracted from the picture, RGB [0 to 255]. Source: ImageNet statistics, torchvision
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    # the picture is divided by this, RGB [0 to 255]. Source: ImageNet statistics, torchvision
    pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    backbone: BackboneConfig = BackboneConfig()
    fpn: FPNConfig = FPNConfig()
    rpn: RPNConfig = RPNConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    cascade: CascadeConfig = CascadeConfig()
    dense: DenseConfig = DenseConfig()
    classifier: ClassifierConfig = ClassifierConfig()

    @model_validator(mode="before")
    @classmethod
    def _conventions_are_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        tables: list[tuple[object, dict[str, dict[str, Any]]]] = [
            (values.get("neck"), NECKS),
            (values.get("compat"), C4_PRESETS if values.get("neck") == "c4" else {}),
            (values.get("compat", "gndet"), CASCADE_PRESETS if values.get("detector") == "cascade_rcnn" else {}),
            (values.get("compat"), PRESETS),
            (values.get("detector"), DETECTOR_DEFAULTS),
        ]
        for chosen, defaults in tables:
            if isinstance(chosen, str) and chosen in defaults:
                values = beneath(defaults[chosen], values)
        return values

    @model_validator(mode="after")
    def _cascades_refine_one_box(self) -> "ModelConfig":
        if self.detector == "cascade_rcnn" and not self.box_head.class_agnostic:
            raise ValueError(
                "box_head.class_agnostic: false; a stage of a cascade refines one box per region; expected true"
            )
        if self.detector == "cascade_rcnn" and self.neck != "fpn":
            raise ValueError(f"neck: {self.neck}; detector: cascade_rcnn works on the levels of fpn only")
        return self

    @model_validator(mode="after")
    def _a_dense_detector_has_boxes_only(self) -> "ModelConfig":
        if self.is_dense and self.masks:
            raise ValueError(f"masks: detector: {self.detector} finds boxes only; expected model.masks=false")
        if self.is_dense and self.neck != "fpn":
            raise ValueError(f"neck: {self.neck}; detector: {self.detector} works on the levels of fpn only")
        if self.detector == "fcos" and (self.dense.kinds > 1 or self.dense.box_loss == "l1"):
            raise ValueError(
                "dense: fcos has one anchor per cell and box_loss: giou, got "
                f"{self.dense.kinds} (scales x aspect_ratios) and {self.dense.box_loss}; retinanet takes others"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_the_neck(self) -> "ModelConfig":
        neck, rpn, backbone = self.neck, self.rpn, self.backbone
        anchors = len(rpn.anchor_sizes) * len(rpn.aspect_ratios)
        if neck != "fpn" and self.detector == "classifier":
            raise ValueError(f"neck: {neck}; a classifier works on the backbone's last map; expected fpn")
        if neck == "fpn" and len(rpn.anchor_sizes) != 5:
            raise ValueError(f"rpn.anchor_sizes: {len(rpn.anchor_sizes)} sizes; expected 5, one for each of P2 to P6")
        if neck != "fpn" and anchors > 16:
            raise ValueError(f"rpn.anchor_sizes: {anchors} anchors per cell with rpn.aspect_ratios; expected up to 16")
        if neck != "fpn" and backbone.kind != "resnet":
            raise ValueError(f"neck: {neck} needs the stages of a resnet; got backbone.kind: {backbone.kind}")
        if neck == "dc5" and backbone.depth < 50:
            raise ValueError(f"neck: dc5 dilates bottlenecks; expected backbone.depth from 50 on, got {backbone.depth}")
        if neck != "dc5" and backbone.dilated_blocks != "all":
            raise ValueError(f"backbone.dilated_blocks: {backbone.dilated_blocks} has an effect with neck: dc5 only")
        if neck == "c4" and backbone.stochastic_depth:
            raise ValueError("backbone.stochastic_depth: res5 skips no block on the regions of neck: c4; expected 0")
        if (self.box_head.kind == "res5") != (neck == "c4"):
            raise ValueError(f"box_head.kind: {self.box_head.kind} does not fit neck: {neck}; c4 has res5, and only c4")
        for option in ("pool_size", "sampling_ratio", "roi_align") if neck == "c4" and self.masks else ():
            box, mask = (getattr(head, option) for head in (self.box_head, self.mask_head))
            if box != mask:
                same = f"expected that of box_head, {box}: with neck: c4 the heads share their regions"
                raise ValueError(f"mask_head.{option}: {mask}; {same}")
        return self

    @model_validator(mode="after")
    def _norm_fits_the_backbone(self) -> "ModelConfig":
        self.backbone.check_norm(self.backbone.norm or self.norm)
        return self

    def part_norms(self) -> dict[str, NormConfig]:
        """Return the norm of each part: its own, or model.norm."""
        parts = ("backbone", "fpn", "rpn", "box_head", "mask_head", "dense")
        return {part: getattr(self, part).norm or self.norm for part in parts}

    @property
    def is_dense(self) -> bool:
        """Whether the model detects at every cell of the pyramid, without regions."""
        return self.detector in ("fcos", "retinanet")

    @property
    def final_head(self) -> str:
        """The section whose score_threshold, nms_threshold and detections_per_image choose the detections."""
        return "dense" if self.is_dense else "box_head"

    @property
    def mask_paste(self) -> Literal["exact", "rounded", "detectron"]:
        """How to paste the masks of detections into the picture."""
        return self.mask_head.paste

    @property
    def region_heads(self) -> tuple[str, ...]:
        """The sections of the region heads, in the order they run."""
        if self.detector == "classifier" or self.is_dense:
            return ()
        return ("box_head", "mask_head") if self.masks else ("box_head",)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model: sections of this config, and prefixes of its tensors' names."""
        if self.detector == "classifier":
            return ("backbone", "classifier")
        if self.is_dense:
            return ("backbone", "fpn", "dense")
        return ("backbone", *(["fpn"] if self.neck == "fpn" else []), "rpn", *self.region_heads)

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections of this config that the model uses: its parts, and the stages of a cascade."""
        return (*self.parts, *(["cascade"] if self.detector == "cascade_rcnn" else []))

    def shaping(self) -> list[str]:
        """Return the options of all sections that decide the shapes of weights: "fpn.channels" and so on."""
        return [*self.shapes, *(f"{name}.{option}" for name, section in self._inner() for option in section.shapes)]

    def meaning(self) -> Iterator[tuple[str, str]]:
        """Yield (part, option) for each option in use that changes what the weights of a part compute."""
        for option, part in self.conventions.items():
            yield part, option
        for name, section in self._inner():
            if name in self.sections:
                yield from ((part, f"{name}.{option}") for option, part in section.conventions.items())

    def _inner(self) -> list[tuple[str, Section]]:
        return [
            (name, getattr(self, name)) for name in type(self).model_fields if isinstance(getattr(self, name), Section)
        ]

    @property
    def normed_parts(self) -> tuple[str, ...]:
        """The parts that may have norm layers: all with convolutions, which a 2fc box head and a classifier lack."""
        bare = {
            "classifier": True, "box_head": self.box_head.kind != "4conv1fc", "mask_head": not self.mask_head.num_convs,
        }  # fmt: skip
        return tuple(part for part in self.parts if not bare.get(part))

    @property
    def max_positives(self) -> int:
        """The largest number of positive regions per image in training."""
        cascade, regions = self.cascade, self.box_head.regions_per_image
        if not self.region_heads:
            return 0
        if self.detector == "cascade_rcnn" and cascade.mask_stages != "first" and not cascade.resample:
            return regions
        return max(int(regions * self.box_head.positive_fraction), 1)

    @property
    def detection_limits(self) -> tuple[float, int]:
        """The lowest score of a detection, and the largest number of detections per image."""
        head = getattr(self, self.final_head)
        return head.score_threshold, head.detections_per_image

    def with_score_threshold(self, threshold: float) -> "ModelConfig":
        """Return the config of the same model whose detections have at least this score."""
        head = getattr(self, self.final_head).model_copy(update={"score_threshold": threshold})
        return self.model_copy(update={self.final_head: head})

    def batch_coupling(self) -> str | None:
        """Return in words what first makes an image's result depend on its batch; None if nothing does."""
        norms = self.part_norms()
        for part in self.normed_parts:
            key = f"model.{part}.norm" if getattr(self, part).norm else "model.norm"
            if norms[part].mixes_images:
                return f"{key}.kind: {norms[part].kind} takes its statistics over all images that are computed at once"
            if not norms[part].masked and part in ("backbone", "fpn", "rpn", "dense"):
                return f"{key}.padding: plain includes the padding around a picture, which depends on its batch"
        for part in [part for part in ("rpn", "dense") if part in self.parts]:
            if getattr(self, part).anchors_in_padding:
                return (
                    f"model.{part}.anchors_in_padding: true places anchors in the padding, of which its batch decides"
                )
            if getattr(self, part).anchor_stride == "canvas":
                return f"model.{part}.anchor_stride: canvas places anchors by the canvas, which depends on the batch"
        return None
