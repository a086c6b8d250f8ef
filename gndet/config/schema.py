"""Every option with its type, default, unit and source. `loading.py` reads them from YAML.

The comment behind an option, or above it, says what the option does [unit], then the source of its default.
`docs/make_configuration.py` turns these comments into docs/configuration.md.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator, model_validator

from gndet.config.presets import CASCADE_PRESETS, DETECTOR_DEFAULTS, NECKS, PRESETS, beneath
from gndet.files import path_fault
from gndet.text import valid_text


def _a_file_can_have(path: str) -> str:
    if fault := path_fault(path):
        raise ValueError(fault)
    return path


NOT_UNICODE = "which is not valid Unicode (UTF-8); rename it, or start gndet in this folder"
FileName = Annotated[str, AfterValidator(_a_file_can_have)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# upper limits keep a stranger's checkpoint from asking for absurd memory; anchors have ids up to this side
MAX_EDGE = 16_384  # pixels
Edge = Annotated[int, Field(ge=16, le=MAX_EDGE)]  # pixels
Side = Annotated[float, Field(gt=0, le=MAX_EDGE)]  # pixels
Sizes = Annotated[tuple[Side, ...], Field(min_length=1, max_length=16)]
Clip = Literal["edges", "pixels"]  # boxes end at the picture's edges, or inside its last pixel (Detectron)
# to half pixels (detectron2, mmdetection) or not (torchvision; detectron: last pixel left out)
RoIAlign = Literal["aligned", "unaligned", "detectron"]


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A part of the config: immutable, and it refuses unknown keys and texts that are not valid Unicode."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and valid_text(text) != text:
                raise ValueError(f"got {text!r}, {NOT_UNICODE}")
        return value

    @field_validator("*")
    @classmethod
    def _fits_into_32_bits(cls, value: Any, field: ValidationInfo) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if field.field_name != "seed" and any(isinstance(n, int) and n.bit_length() > 31 for n in numbers):
            raise ValueError("expected integers of less than 2^31")
        return value


class NormConfig(Section):
    """A normalization layer (Wu & He, "Group Normalization", ECCV 2018)."""

    # gn, ln, in: statistics per image; bn, sync_bn, brn: per batch; frozen_bn: fixed; frn, evonorm_s0: per image, with
    # an activation of their own. Source: Wu & He 2018
    kind: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "frn", "evonorm_s0", "none"] = "gn"
    groups: int = Field(32, ge=1)  # number of channel groups of gn and evonorm_s0. Source: Wu & He 2018, table 3
    # size of a channel group [channels]; replaces `groups` when set. Source: Wu & He 2018, table 3
    channels_per_group: int | None = Field(None, ge=1)
    eps: float = Field(1e-5, ge=0)  # added to the variance. Source: torch, Detectron
    # weight of a batch in the running statistics of bn, sync_bn and brn. Source: torch
    momentum: float = Field(0.1, gt=0, le=1)
    # masked: exclude the padding around a picture from statistics and outputs; plain: include it, as other toolkits
    # do; auto: masked, except for kinds that mix images
    padding: Literal["auto", "masked", "plain"] = "auto"
    # standardize the weights of the convolutions before the norm. Source: Qiao et al. 2019
    weight_standardization: bool = False
    # how: bit divides by sqrt(variance + 1e-10), qiao by the unbiased deviation + 1e-5 (mmdetection's weights).
    # Source: Kolesnikov et al. 2020
    standardization: Literal["bit", "qiao"] = "bit"

    @property
    def grouping(self) -> str:
        """Return in words how GN divides its channels."""
        return f"{self.channels_per_group} channels per group" if self.channels_per_group else f"{self.groups} groups"

    @property
    def masked(self) -> bool:
        """Whether statistics and outputs exclude the padding around a picture."""
        if self.padding == "auto":
            return not self.mixes_images
        return self.padding == "masked"

    @property
    def mixes_images(self) -> bool:
        """Whether the statistics span all images, or regions, that are computed at once."""
        return self.kind in ("bn", "sync_bn", "brn")

    @property
    def activates(self) -> bool:
        """Whether the layer is its own activation, so that no ReLU follows it."""
        return self.kind == "evonorm_s0"

    @property
    def learns_threshold(self) -> bool:
        """Whether a TLU, max(x, tau) with a learned tau, follows the layer instead of ReLU."""
        return self.kind == "frn"

    @property
    def replaces_relu(self) -> bool:
        """Whether the activations are not ReLU, so that they may be negative."""
        return self.activates or self.learns_threshold

    @property
    def has_groups(self) -> bool:
        """Whether `groups` and `channels_per_group` have an effect."""
        return self.kind in ("gn", "evonorm_s0")

    @property
    def has_running_statistics(self) -> bool:
        """Whether the layer has a running mean and variance."""
        return self.mixes_images or self.kind == "frozen_bn"

    @property
    def trains_with_running_statistics(self) -> bool:
        """Whether the training forward uses the running statistics, so that all ranks need the same ones."""
        return self.kind == "brn"

    @property
    def communicates_in_forward(self) -> bool:
        """Whether ranks exchange statistics in the forward and backward passes."""
        return self.kind == "sync_bn"

    @property
    def is_group_norm(self) -> bool:
        """Whether the statistics span groups of channels of one image: GN and its extremes LN and IN."""
        return self.kind in ("gn", "ln", "in")

    @model_validator(mode="after")
    def _batch_statistics_are_plain(self) -> "NormConfig":
        if self.padding == "masked" and self.mixes_images:
            raise ValueError(f"padding: masked is not available for kind: {self.kind}, whose statistics mix images")
        return self


class BackboneConfig(Section):
    """The backbone: a ResNet (He et al. 2016) or ResNeXt (Xie et al. 2017), VGG-16 (Simonyan & Zisserman 2015), or
    timm's."""

    # backbone network; timm: the network `name` of timm (pip install timm). Source: He et al. 2016
    kind: Literal["resnet", "vgg", "timm"] = "resnet"
    name: str = ""  # timm: name of a convolutional network, like regnety_016; see [backbones](backbones.md)
    depth: Literal[16, 18, 34, 50, 101, 152] = 50  # number of weight layers; 16 with vgg, 18 and more with resnet
    # resnet: share of the usual channels, for small data and machines (Howard et al. 2017). Source: He et al. 2016
    width: float = Field(1.0, ge=0.125, le=4)
    # resnet from depth 50 on: groups of a bottleneck's 3x3 convolution; with ResNeXt 32x4d, 32. Source: Xie et al. 2017
    cardinality: int = Field(1, ge=1, le=1024)
    # width of such a group in res2 [channels]; with ResNeXt 32x4d, 4. Source: Xie et al. 2017, table 1
    group_width: int = Field(64, ge=1, le=1024)
    # resnet: one 7x7 convolution, or three 3x3 (ResNet-D). Source: He et al. 2019, "Bag of Tricks", section 4
    stem: Literal["plain", "deep"] = "plain"
    # resnet: shortcuts that halve a map average 2x2 cells before their 1x1 convolution (ResNet-D).
    # Source: He et al. 2019, "Bag of Tricks", section 4
    average_shortcuts: bool = False
    norm: NormConfig | None = None  # replaces model.norm as a whole for this part
    # put a bottleneck's stride in its first 1x1 convolution, as MSRA's BN weights do, not in its 3x3
    stride_in_1x1: bool = False
    # freeze the stem (1) and the stages res2 to res5 (2 to 5); 0 freezes nothing (Detectron: 2)
    freeze_at: int = Field(0, ge=0, le=5)
    # start the last norm of each block with gamma 0 (timm: those that timm starts so). Source: Goyal et al. 2017, 5.1;
    # Wu & He 2018
    zero_init_last_gamma: bool = False
    # neck dc5: blocks of res5 whose 3x3 is dilated by 2. all (detectron2), or after_first: the others (torchvision)
    dilated_blocks: Literal["all", "after_first"] = "all"

    @model_validator(mode="after")
    def _timm_is_named(self) -> "BackboneConfig":
        if (self.kind == "timm") != bool(self.name):
            raise ValueError(f"name: {self.name!r}; kind: timm needs the name of a network in timm, other kinds none")
        own = ("depth", "width", "cardinality", "group_width", "stem", "average_shortcuts", "stride_in_1x1")
        changed = [key for key in own if getattr(self, key) != BackboneConfig.model_fields[key].default]
        if self.kind == "timm" and changed:
            raise ValueError(f"{changed[0]}: kind: timm has no such option; its name says which network it is")
        if self.kind == "timm" and self.norm is not None:
            self.refuse_for_timm(self.norm)
        return self

    def refuse_for_timm(self, norm: NormConfig) -> None:
        """Raise ValueError for a norm that timm's layers do not go with."""
        if self.kind == "timm" and (norm.replaces_relu or norm.kind == "none" or norm.weight_standardization):
            what = "weight_standardization" if norm.weight_standardization else f"kind: {norm.kind}"
            raise ValueError(f"norm {what} is not available with backbone kind: timm; use gn, ln, in, bn or frozen_bn")

    @model_validator(mode="after")
    def _network_exists(self) -> "BackboneConfig":
        if (self.kind == "vgg") != (self.depth == 16):
            raise ValueError(f"depth: {self.depth}; vgg has depth 16, and resnet 18, 34, 50, 101 or 152")
        if self.depth < 50 and (self.cardinality, self.group_width) != (1, 64):
            raise ValueError("cardinality and group_width are of bottlenecks, which resnet has from depth 50 on")
        if self.kind == "vgg" and (self.stem != "plain" or self.average_shortcuts):
            raise ValueError("stem and average_shortcuts are of resnet")
        if self.kind == "vgg" and self.width != 1:
            raise ValueError(f"width: {self.width:g}; vgg has its usual channels only")
        return self


class FPNConfig(Section):
    """Feature pyramid P2 to P6 (Lin et al. 2017), or P3 to P7 for dense detectors (Lin et al. 2017, "Focal Loss")."""

    # width of every pyramid level [channels]. Source: Lin et al. 2017, section 3
    channels: int = Field(256, ge=1, le=8192)
    norm: NormConfig | None = None  # replaces model.norm as a whole for this part
    # dense detectors: P6 is a convolution of P5 (FCOS, ATSS) or of C5 (detectron2's RetinaNet, torchvision's v2)
    p6: Literal["p5", "c5"] = "p5"


class RPNConfig(Section):
    """Region proposal network (Ren et al. 2015), with one anchor size per level of a pyramid (Lin et al. 2017)."""

    # sides of the square anchors: one on each of P2 to P6; all of them on the only level of c4 and dc5 [pixels].
    # Source: Lin et al. 2017, 4.1
    anchor_sizes: Sizes = (32, 64, 128, 256, 512)
    # anchor height / width. Source: Ren et al. 2015, 3.1.1
    aspect_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, max_length=16)
    # 3x3 convolutions before the predictors (torchvision's v2 models: 2). Source: Ren et al. 2015
    num_convs: int = Field(1, ge=1, le=32)
    norm: NormConfig | None = NormConfig(kind="none")  # the RPN has no norm in any toolkit; null takes model.norm
    # exact corners (detectron2), corners rounded to pixels (torchvision), or Detectron's rounding
    anchors: Literal["exact", "rounded", "detectron"] = "exact"
    # level: 4 to 64; canvas: canvas side // map side, which is not always 64 on P6 (torchvision: canvas)
    anchor_stride: Literal["level", "canvas"] = "level"
    # place anchors in the padding around a picture, as other toolkits do; couples the images of a batch
    anchors_in_padding: bool = False
    straddling_anchors: bool = True  # train on anchors that reach over the picture's edge (Detectron: false)
    # an anchor is positive from this IoU on. Source: Ren et al. 2015, 3.1.2
    positive_iou: float = Field(0.7, ge=0, le=1)
    negative_iou: float = Field(0.3, ge=0, le=1)  # an anchor is negative below this IoU. Source: Ren et al. 2015, 3.1.2
    # anchors sampled for the loss. Source: Ren et al. 2015, 3.1.3
    anchors_per_image: int = Field(256, ge=2, le=1_000_000)
    # largest share of positives among the sampled anchors. Source: Ren et al. 2015, 3.1.3
    positive_fraction: float = Field(0.5, gt=0, le=1)
    nms_threshold: float = Field(0.7, gt=0, le=1)  # IoU above which NMS drops a proposal. Source: Ren et al. 2015, 3.3
    # candidates per level and image before NMS, in training. Source: detectron2
    pre_nms_train: int = Field(2000, ge=1, le=100_000)
    # candidates per level and image before NMS, in evaluation. Source: detectron2
    pre_nms_test: int = Field(1000, ge=1, le=100_000)
    # proposals per image after NMS, in training; never per batch. Source: detectron2
    post_nms_train: int = Field(1000, ge=1, le=100_000)
    # proposals per image after NMS, in evaluation. Source: detectron2
    post_nms_test: int = Field(1000, ge=1, le=100_000)
    min_size: float = Field(0.0, ge=0)  # drop proposals with a side of at most this [pixels] (torchvision: 0.001)
    clip: Clip = "edges"  # clip boxes to the picture's edges, or to its last pixel (Detectron: pixels)
    # transition of the smooth L1 loss; 0 is plain L1 (Detectron: 1/9). Source: detectron2
    loss_beta: float = Field(0.0, ge=0)

    def sizes_by_level(self, num_levels: int) -> list[tuple[float, ...]]:
        """Return the anchor sizes of each level: all of them if there is only one, else one for each."""
        return [self.anchor_sizes] if num_levels == 1 else [(size,) for size in self.anchor_sizes]


class BoxHeadConfig(Section):
    """Box head: 2fc (Lin et al. 2017), 4conv1fc (Wu & He 2018), or the backbone's res5 (He et al. 2016)."""

    # two fully connected layers (Lin et al. 2017), four convolutions and one, or with neck c4 the average of res5,
    # which runs on each region. Source: Wu & He 2018, 4.2
    kind: Literal["2fc", "4conv1fc", "res5"] = "4conv1fc"
    # width of the convolutions of 4conv1fc [channels]. Source: Wu & He 2018, 4.2
    conv_channels: int = Field(256, ge=1, le=8192)
    num_convs: int = Field(4, ge=1, le=32)  # number of convolutions of 4conv1fc. Source: Wu & He 2018, 4.2
    # width of the fully connected layers [channels]. Source: Lin et al. 2017
    fc_channels: int = Field(1024, ge=1, le=65_536)
    # replaces model.norm as a whole for this part; the 2fc head has no norm, and res5 that of the backbone
    norm: NormConfig | None = None
    # whether the last convolution of 4conv1fc has a norm, too; without it a region's features keep their strength
    norm_last: bool = True
    pool_size: int = Field(7, ge=1, le=64)  # side of the RoIAlign output [cells]. Source: He et al. 2017, figure 4
    # RoIAlign samples per cell and axis; 0 adapts to the region (detectron2). Source: Detectron
    sampling_ratio: int = Field(2, ge=0, le=16)
    # aligned: shifted by half a pixel (detectron2); unaligned (torchvision); detectron: last pixel left out
    roi_align: RoIAlign = "aligned"
    regions_per_image: int = Field(512, ge=1, le=100_000)  # regions sampled for the loss. Source: Lin et al. 2017, 5.2
    # largest share of positives among the sampled regions. Source: Girshick 2015, 2.3
    positive_fraction: float = Field(0.25, gt=0, le=1)
    positive_iou: float = Field(0.5, ge=0, le=1)  # a region is positive from this IoU on. Source: Girshick 2015, 2.3
    # one box per region for all classes, not one per class; a cascade needs true. Source: Girshick 2015, 2.1
    class_agnostic: bool = False
    # transition of the smooth L1 loss; 0 is plain L1 (Detectron: 1). Source: detectron2
    loss_beta: float = Field(0.0, ge=0)
    score_threshold: float = Field(0.05, ge=0, le=1)  # lowest score of a detection. Source: Detectron
    min_size: float = Field(0.0, ge=0)  # drop detections with a side of at most this [pixels] (torchvision: 0.01)
    clip: Clip = "edges"  # clip boxes to the picture's edges, or to its last pixel (Detectron: pixels)
    # IoU above which NMS drops a detection of the same class. Source: Detectron
    nms_threshold: float = Field(0.5, gt=0, le=1)
    # largest number of detections. Source: He et al. 2017, 3.1
    detections_per_image: int = Field(100, ge=1, le=100_000)

    @model_validator(mode="after")
    def _has_a_last_norm(self) -> "BoxHeadConfig":
        if self.kind != "4conv1fc" and not self.norm_last:
            raise ValueError(f"norm_last: false; kind: {self.kind} has no norms of its own; leave norm_last out")
        return self


class MaskHeadConfig(Section):
    """Mask head: convolutions, a deconvolution to 28 x 28, one mask per class (He et al. 2017)."""

    channels: int = Field(256, ge=1, le=8192)  # width of the convolutions [channels]. Source: He et al. 2017, figure 4
    # convolutions before the deconvolution (neck c4: 0). Source: He et al. 2017, figure 4
    num_convs: int = Field(4, ge=0, le=32)
    norm: NormConfig | None = None  # replaces model.norm as a whole for this part
    # side of the RoIAlign output; masks have twice that, or with neck c4 as much [cells]. Source: He et al. 2017,
    # figure 4
    pool_size: int = Field(14, ge=1, le=64)
    # RoIAlign samples per cell and axis; 0 adapts to the region (detectron2). Source: Detectron
    sampling_ratio: int = Field(2, ge=0, le=16)
    # aligned: shifted by half a pixel (detectron2); unaligned (torchvision); detectron: last pixel left out
    roi_align: RoIAlign = "aligned"
    # binary: threshold the mask targets at 0.5; soft: keep their fractions (torchvision: soft)
    targets: Literal["binary", "soft"] = "binary"
    # exact: sample the mask at pixel centers (detectron2); rounded: resize it to whole pixels (torchvision);
    # detectron: Detectron's own rounding
    paste: Literal["exact", "rounded", "detectron"] = "exact"


class DenseConfig(Section):
    """Head of the dense detectors: FCOS (Tian et al. 2019), with ATSS (Zhang et al. 2020), and RetinaNet.

    Where RetinaNet (Lin et al. 2017, "Focal Loss") has another default, the option names it.
    """

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

    # side of the map that each picture is pooled to [cells]; VGG with its own head: 7. Source: He et al. 2016
    pool_size: int = Field(1, ge=1, le=64)
    # widths of fully connected layers before the logits [channels]; VGG: [4096, 4096]. Source: He et al. 2016
    fc_channels: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field((), max_length=4)
    dropout: float = Field(0.0, ge=0, lt=1)  # share of their outputs set to 0 in training (VGG: 0.5)
    # softmax: cross-entropy; sigmoid: binary cross-entropy, mean over the classes. Source: He et al. 2016
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target spread over all classes (Szegedy et al. 2016)


class ModelConfig(Section):
    """The detector, or the classifier."""

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
        self.backbone.refuse_for_timm(self.backbone.norm or self.norm)
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
        if self.is_dense:
            return 0
        if self.detector == "cascade_rcnn" and cascade.mask_stages != "first" and not cascade.resample:
            return regions
        return int(regions * self.box_head.positive_fraction)

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


class DatasetConfig(Section):
    """One data set."""

    # auto: what the files are; folders: a folder of pictures per class; shapes: pictures drawn from a seed
    kind: Literal["auto", "coco", "yolo", "voc", "labelme", "cvat", "via", "folders", "shapes"] = "auto"
    # the file or folder with the annotations, relative to data.root; empty: found in data.root
    annotations: FileName = ""
    images: FileName = ""  # the image folder, relative to data.root; empty: found near the annotations
    split: str = ""  # which set of a folder that holds several: train, val, test (default: the name of the section)
    # val: take this share of the images of data.train, which then trains on the others
    share: float | None = Field(None, gt=0, lt=1)
    limit: int | None = Field(None, ge=1)  # use the first so many images only [images]
    count: int = Field(400, ge=1)  # shapes: size of the data set [images]
    size: int = Field(160, ge=64, le=4096)  # shapes: side of the square picture [pixels]
    # shapes: another seed draws other pictures; share: another seed takes other images
    seed: int = Field(0, ge=0, lt=1 << 63)


class CropConfig(Section):
    """How a classifier sees a picture: a part of it in training, its middle in evaluation (Szegedy et al. 2015)."""

    size: Edge = 224  # side of the square that the network sees [pixels]. Source: He et al. 2016
    # training: least and largest part of the picture's area. Source: Szegedy et al. 2015, section 6
    area: tuple[float, float] = (0.08, 1.0)
    # training: least and largest width / height of the part. Source: Szegedy et al. 2015, section 6
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.0  # largest change of the brightness, as a share (fb.resnet.torch: 0.4)
    contrast: Fraction = 0.0  # largest change of the contrast, as a share (fb.resnet.torch: 0.4)
    saturation: Fraction = 0.0  # largest change of the saturation, as a share (fb.resnet.torch: 0.4)
    # standard deviation of the color shift along ImageNet's principal components (fb.resnet.torch: 0.1).
    # Source: Krizhevsky et al. 2012, 4.1
    lighting: float = Field(0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "CropConfig":
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area: got {self.area}, expected two shares of 1, the smaller one first")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio: got {self.ratio}, expected the smaller one first")
        return self


class DataConfig(Section):
    """Data sets, sizes and augmentation."""

    root: FileName = "datasets"  # folder of the data; `annotations` and `images` are relative to it
    train: DatasetConfig = DatasetConfig(split="train")
    val: DatasetConfig = DatasetConfig(split="val")
    classes: tuple[str, ...] | None = None  # names of the classes to use, in this order; null uses all
    # training: resize the shorter edge to one of these, drawn per image [pixels]. Source: detectron2
    shortest_edge: tuple[Edge, ...] = Field((640, 672, 704, 736, 768, 800), min_length=1)
    # evaluation: resize the shorter edge to this [pixels]. Source: Lin et al. 2017, 5.1
    shortest_edge_test: Edge = 800
    max_edge: Edge = 1333  # upper limit of the longer edge [pixels]. Source: Detectron
    crop: CropConfig | None = None  # task: classification: the part of a picture that the network sees
    flip: float = Field(0.5, ge=0, le=1)  # probability of a left-right flip. Source: Detectron
    flip_vertical: float = Field(0.0, ge=0, le=1)  # probability of an upside-down flip
    keep_empty: bool = False  # train on images without objects, too
    workers: int = Field(2, ge=0, le=512)  # loader processes per rank; results do not depend on it
    max_pixels: int = Field(100_000_000, ge=1, le=2_000_000_000)  # refuse a larger picture before decoding it [pixels]
    exif: Literal["turn", "stored"] = "turn"  # turn pictures as their EXIF orientation says, or take them as stored
    # pictures of more than 8 bits per channel: the values that become black and white; null: 0 and 65535 of 16 bits
    pixel_range: tuple[float, float] | None = None
    follow_links: bool = False  # read pictures behind links that lead out of the image folder, as DVC makes them
    skip_unreadable: bool = False  # leave out the pictures that `gndet check` could not read, and train on the rest
    cache: FileName = "~/.cache/gndet"  # folder that keeps checked data sets between starts; '' keeps nothing
    max_unreadable: float = Field(0.01, ge=0, le=1)  # stop when more than this share of a data set cannot be read
    antialias: bool = True  # filter when shrinking, as PIL and detectron2 do; false: as torchvision and OpenCV do
    canvas_multiple: int = Field(32, ge=1, le=1024)  # round canvas edges up to a multiple of this [pixels]
    exact_canvas: bool = True  # add no padding to a batch whose pictures have one size; false: round up even then
    # training: the only canvases, as (height, width) [pixels]; train.compile makes one graph for each; empty: any
    # canvas
    canvases: tuple[tuple[Edge, Edge], ...] = Field((), max_length=4)

    @field_validator("pixel_range")
    @classmethod
    def _black_is_below_white(cls, values: tuple[float, float] | None) -> tuple[float, float] | None:
        if values is not None and not values[0] < values[1]:
            raise ValueError(
                f"expected the value of black, then a larger one of white, got {values[0]:g}, {values[1]:g}"
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def _a_crop_sets_the_edges(cls, values: object) -> object:
        crop = values.get("crop") if isinstance(values, dict) else None
        size = crop.get("size", 224) if isinstance(crop, dict) else None
        if not isinstance(values, dict) or not isinstance(size, int):
            return values
        edges = {"shortest_edge": [size], "shortest_edge_test": round(size * 256 / 224), "max_edge": MAX_EDGE}
        return edges | values

    @model_validator(mode="before")
    @classmethod
    def _sections_name_their_split(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        parts = {name: values[name] for name in ("train", "val") if isinstance(values.get(name), dict)}
        return values | {name: part | {"split": part.get("split") or name} for name, part in parts.items()}

    @property
    def smallest_edge(self) -> int:
        """Shortest edge of the smallest training pictures that the network sees, in pixels."""
        return self.crop.size if self.crop else min(self.shortest_edge)

    @model_validator(mode="after")
    def _a_share_is_taken_from_train(self) -> "DataConfig":
        if self.train.share is not None:
            raise ValueError("train.share: only val takes a share, of the images of train; set val.share")
        if self.val.share is not None and self.train.kind == "shapes":
            raise ValueError("val.share takes images of train, whose pictures are drawn; val.count draws some for val")
        if self.val.share is not None and (self.val.annotations or self.val.images):
            raise ValueError("val.share takes images of train; val.share=null lets val have annotations and images")
        return self


class OptimizerConfig(Section):
    """The optimizer."""

    kind: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum, or AdamW (Loshchilov & Hutter 2019)
    # learning rate for the reference batch; follows global_batch linearly with sgd (Goyal et al. 2017, 2.1), by its
    # square root with adamw (Malladi et al. 2022). Source: Detectron
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # momentum of sgd. Source: Detectron
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # averaging of adamw's two moments. Source: torch
    weight_decay: float = Field(1e-4, ge=0)  # decay of the weights. Source: Detectron
    # decay of gamma and beta of the norms. Source: Detectron (WEIGHT_DECAY_GN)
    norm_weight_decay: float = Field(0.0, ge=0)
    clip_grad_norm: float = Field(0.0, ge=0)  # limit of the global gradient norm; 0 is off


class ScheduleConfig(Section):
    """Learning rate over time, stated for `reference_batch` images per update and rescaled to `global_batch`."""

    kind: Literal["step", "cosine"] = "step"  # step: multiply by gamma at `steps`; cosine: half a cosine down to 0
    # length of the training at the reference batch [updates]. Source: Detectron's 1x
    updates: int = Field(90_000, ge=1)
    steps: tuple[int, ...] = (60_000, 80_000)  # step: when the learning rate drops [updates]. Source: Detectron's 1x
    gamma: float = Field(0.1, gt=0, le=1)  # step: factor of each drop. Source: Detectron
    warmup: int = Field(1000, ge=0)  # length of the linear warm-up [updates]. Source: detectron2
    warmup_factor: float = Field(0.001, ge=0, le=1)  # learning rate at update 0, as a fraction. Source: detectron2
    # global batch that lr, updates, steps and warmup are stated for [images]. Source: Detectron
    reference_batch: int = Field(16, ge=1)


class SourceConfig(Section):
    """How to read a weights file that does not describe itself; null takes the usual value of its format."""

    # resnet: a classifier of torchvision or timm; timm: the network `name` of timm; auto: timm if model.backbone is,
    # else recognize the format by the tensors' names
    format: Literal[
        "auto", "gndet", "resnet", "timm", "torchvision", "detectron2", "detectron", "mmdetection",
        "maskrcnn-benchmark",
    ] = "auto"  # fmt: skip
    name: str | None = None  # timm: name of its network; null: model.backbone.name
    bgr: bool | None = None  # its stem takes blue, green, red
    pixel_mean: tuple[float, float, float] | None = None  # what it subtracts from a picture, RGB [0 to 255]
    pixel_std: tuple[Positive, Positive, Positive] | None = None  # what it divides a picture by, RGB [0 to 255]
    stride_in_1x1: bool | None = None  # its bottlenecks have their stride in the first 1x1 convolution
    norm_eps: float | None = Field(None, ge=0)  # eps of its norms
    groups: int | None = Field(None, ge=1)  # number of groups of its GN layers; 32 in every toolkit
    channels_per_group: int | None = Field(None, ge=1)  # size of its GN layers' groups [channels]; replaces `groups`
    weight_standardization: bool | None = None  # its convolutions are weight-standardized
    standardization: Literal["bit", "qiao"] | None = None  # in which way; qiao in every toolkit that gndet reads
    # conventions that it was trained with
    compat: Literal["torchvision", "detectron2", "detectron", "mmdetection"] | None = None
    anchor_sizes: Sizes | None = None  # sides of its anchors on P2 to P6, or of all on the only level [pixels]
    aspect_ratios: tuple[Positive, Positive, Positive] | None = None  # height / width of its anchors
    classes: tuple[str, ...] | None = None  # its class names, in the order of its labels
    # refuse a model whose conventions differ from the file's, or report them and fine-tune anyway
    differences: Literal["refuse", "report"] = "refuse"


class TrainConfig(Section):
    """The run: batch, optimizer, schedule, and what is written when."""

    # start from this: a gndet run or checkpoint, a file of another toolkit, or the name of torchvision or timm
    # weights
    weights: FileName = ""
    source: SourceConfig = SourceConfig()
    # what to do with a part whose norm in the file differs from the model's; see [fine-tuning](fine_tuning.md)
    norm_policy: Literal["error", "hybrid", "convert", "calibrate", "affine", "reinit"] = "error"
    norm_damp: float = Field(1.0, ge=0)  # convert, calibrate: add this multiple of the mean group variance to GN's eps
    calibration_images: int = Field(32, ge=1)  # calibrate: training images that gamma and beta are fitted on [images]
    global_batch: int = Field(16, ge=1)  # images per update, over all ranks [images]. Source: Detectron
    # images that a rank computes at once [images]; the rest of its share is accumulated; auto: as many as fit in
    # memory
    images_per_gpu: int | Literal["auto"] = 2
    # limit for tensors per rank [MiB]; null: the GPU's memory; `auto` on a CPU needs a limit
    memory_limit_mib: float | None = Field(None, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    # auto: bf16 autocast on a GPU, float32 on a CPU; float64 is slow and shows what differs by rounding only
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    # what the forward pass keeps for backward. fast: everything; balanced: less than half, about 5 % slower;
    # lean: about a fifth, about 11 % slower
    memory: Literal["fast", "balanced", "lean"] = "balanced"
    # torch.compile, one graph per canvas of data.canvases; reduce-overhead adds CUDA graphs; changes rounding only
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the averaged weights per update; 0 is off
    log_every: int = Field(20, ge=1)  # interval of log lines [updates]
    eval_every: int = Field(5000, ge=0)  # interval of evaluations [updates]; 0: at the end only
    checkpoint_every: int = Field(1000, ge=0)  # interval of checkpoints [updates]; 0: with evaluations only
    keep_last: int = Field(2, ge=1)  # number of newest checkpoints to keep, in addition to the best one
    vis_images: int = Field(4, ge=0)  # validation images drawn at each evaluation [images]
    report: bool = True  # write report.html when the run ends
    # validation images that the norm report looks at [images]; 0: no norm report
    norm_images: int = Field(4, ge=0, le=16)
    # a loss or gradient is not finite. stop: end the run; skip:N: skip up to N such updates, then stop
    on_nonfinite: str = Field("stop", pattern=r"^(stop|skip:[1-9]\d{0,5})$")
    # how long a rank waits for the others before it considers one lost and ends the run [seconds]
    timeout_s: float = Field(600.0, gt=0, le=10_000_000)

    @field_validator("images_per_gpu", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"got {value!r}; expected a positive number of images, or auto")
        return value


class EvaluationConfig(Section):
    """Evaluation by COCO's metrics."""

    # hotcoco is fast; pycocotools is the reference and gives the same numbers
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"
    # scored per image and class; raise it for crowded images. Source: COCO
    max_detections: int = Field(100, ge=1, le=100_000)
    images_per_gpu: int = Field(1, ge=1, le=4096)  # images that a rank detects at once [images]
    # bn, sync_bn: evaluate with the statistics of so many training images instead of running averages; 0: off [images].
    # Source: Wu & Johnson 2021, section 3
    precise_bn: int = Field(0, ge=0)
    # bn, sync_bn, brn: evaluate with the statistics of the images that are detected at once
    batch_statistics: bool = False


CLASSIFICATION = {  # defaults of task: classification
    "model": {"detector": "classifier", "masks": False},
    "data": {"crop": {}, "train": {"kind": "folders"}, "val": {"kind": "folders"}},
}


class Config(Section):
    """The config of a run."""

    task: Literal["detection", "classification"] = "detection"  # what to train
    out: FileName = ""  # run folder; empty: runs/NAME for NAME.yaml
    seed: int = Field(0, ge=0, lt=1 << 63)  # seed of weights, order, augmentation and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    deterministic: bool = False  # use deterministic GPU algorithms; a CPU is always deterministic
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _classification_has_its_defaults(cls, values: object) -> object:
        is_one = isinstance(values, dict) and values.get("task") == "classification"
        return beneath(CLASSIFICATION, values) if is_one and isinstance(values, dict) else values

    @model_validator(mode="after")
    def _model_fits_the_task(self) -> "Config":
        is_classifier, crop = self.model.detector == "classifier", self.data.crop
        if (self.task == "classification") != is_classifier:
            raise ValueError(f"task: {self.task} does not train model.detector: {self.model.detector}")
        if is_classifier != (crop is not None):
            raise ValueError("data.crop: task: classification needs it, and no other task uses it")
        if is_classifier and self.model.masks:
            raise ValueError("model.masks: a classifier has no masks; expected false")
        if is_classifier and self.data.keep_empty:
            raise ValueError("data.keep_empty: a classifier trains on pictures of a class only; expected false")
        return self

    @model_validator(mode="after")
    def _canvases_hold_all(self) -> "Config":
        longest = self.data.crop.size if self.data.crop else self.data.max_edge
        shorter = min(max(self.data.shortest_edge), longest)
        needed = [(shorter, longest), (longest, shorter)]  # a picture; two of them, one portrait and one landscape:
        needed += [] if self.train.images_per_gpu == 1 else [(longest, longest)]
        canvases = self.data.canvases
        if self.train.compile != "none" and not canvases:
            edges = [[-(-edge // 32) * 32 for edge in canvas] for canvas in needed]
            raise ValueError(
                f"train.compile: {self.train.compile} compiles one graph per canvas, so data.canvases must list the "
                f"canvases, like data.canvases={str(edges).replace(' ', '')}"
            )
        for height, width in needed if canvases else ():
            if not any(height <= canvas[0] and width <= canvas[1] for canvas in canvases):
                raise ValueError(
                    f"data.canvases: none of {', '.join(f'{h} x {w}' for h, w in canvases)} holds {height} x {width}, "
                    "the largest batch that data.shortest_edge, data.max_edge and train.images_per_gpu allow"
                )
        return self

    @model_validator(mode="after")
    def _norms_have_the_statistics(self) -> "Config":
        evaluation, norms = self.evaluation, [self.model.part_norms()[part] for part in self.model.normed_parts]
        asked = f"evaluation.precise_bn: {evaluation.precise_bn}" if evaluation.precise_bn else ""
        if asked and evaluation.batch_statistics:
            raise ValueError(f"{asked} and evaluation.batch_statistics: true are two ways to evaluate; choose one")
        if evaluation.batch_statistics:
            asked = "evaluation.batch_statistics: true"
        if asked and not any(norm.mixes_images for norm in norms):
            kinds = ", ".join(sorted({norm.kind for norm in norms}))
            raise ValueError(
                f"{asked} changes nothing: no norm of the model mixes images (bn, sync_bn, brn); got {kinds}"
            )
        if evaluation.precise_bn and any(norm.trains_with_running_statistics for norm in norms):
            raise ValueError(f"{asked} is not available for brn, which trains with its running averages")
        return self

    @model_validator(mode="after")
    def _batch_splits(self) -> "Config":
        if mistake := self.split_mistake(world=1):
            raise ValueError(mistake)
        return self

    def split_mistake(self, world: int) -> str | None:
        """Return why `world` ranks cannot split an update as train.images_per_gpu asks; None if they can."""
        whole, size, coupling = self.train.global_batch, self.train.images_per_gpu, self.model.batch_coupling()
        if whole < world:
            return f"train.global_batch: {whole} is less than the number of ranks, {world}"
        if size == "auto":
            return coupling and f"train.images_per_gpu: auto would change what is learned: {coupling}; give a number"
        if size > (share := -(-whole // world)):
            return f"train.images_per_gpu: {size} is more than {share} images per rank of train.global_batch: {whole}"
        if coupling and whole % (size * world):
            part = f"{size} x {world} ranks" if world > 1 else size
            return f"train.global_batch: {whole} is not a multiple of train.images_per_gpu: {part}, and {coupling}"
        return None
