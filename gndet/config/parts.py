"""The options of the parts of a Mask R-CNN: backbone, feature pyramid, RPN, box head and mask head.

Cascade R-CNN has all of them, a dense detector the backbone and the pyramid, a classifier the backbone.
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from gndet.config.norm import NormConfig
from gndet.config.section import Positive, Section, Sizes

Clip = Literal["edges", "pixels"]  # boxes end at the picture's edges, or inside its last pixel (Detectron)
# to half pixels (detectron2, mmdetection) or not (torchvision; detectron: last pixel left out)
RoIAlign = Literal["aligned", "unaligned", "detectron"]


class BackboneConfig(Section):
    """The backbone: a ResNet (He et al. 2016) or ResNeXt (Xie et al. 2017), VGG-16 (Simonyan & Zisserman 2015), or
    timm's."""

    shapes: ClassVar = ("kind", "name", "depth", "stem", "width", "cardinality", "group_width")
    conventions: ClassVar = {"stride_in_1x1": "backbone", "average_shortcuts": "backbone", "dilated_blocks": "rpn"}

    # backbone network; timm: the network `name` of timm (pip install timm). Source: He et al. 2016
    kind: Literal["resnet", "vgg", "timm"] = "resnet"
    name: str = ""  # timm: name of a convolutional network, like regnety_016; see [backbones](backbones.md)
    depth: Literal[16, 18, 34, 50, 101, 152] = 50  # number of weight layers; 16 with vgg, 18 and more with resnet
    # resnet: share of the usual channels, for small data and machines (Howard et al. 2017); with less than 0.25 torch's
    # gradient of a shortcut crashes on a CPU. Source: He et al. 2016
    width: float = Field(1.0, ge=0.25, le=4)
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
    # resnet: in training, share of the images that skip the last residual block; of the others it grows linearly from 0
    # at the first one, drawn per image (Huang et al. 2016; A2 of Wightman et al. 2021: 0.05). Source: He et al. 2016
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
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
            self.check_norm(self.norm)
        return self

    def check_norm(self, norm: NormConfig) -> None:
        """Raise ValueError for a norm that the network cannot have."""
        if self.kind == "timm" and (norm.replaces_relu or norm.kind == "none" or norm.weight_standardization):
            what = "weight_standardization" if norm.weight_standardization else f"kind: {norm.kind}"
            others = "gn, ln, in, bn, sync_bn, brn or frozen_bn"
            raise ValueError(f"norm {what} is not available with backbone kind: timm; use {others}")

    @model_validator(mode="after")
    def _network_exists(self) -> "BackboneConfig":
        if (self.kind == "vgg") != (self.depth == 16):
            raise ValueError(f"depth: {self.depth}; vgg has depth 16, and resnet 18, 34, 50, 101 or 152")
        if self.depth < 50 and (self.cardinality, self.group_width) != (1, 64):
            raise ValueError("cardinality and group_width are of bottlenecks, which resnet has from depth 50 on")
        if self.kind == "vgg" and (self.stem != "plain" or self.average_shortcuts or self.stride_in_1x1):
            raise ValueError("stem, average_shortcuts and stride_in_1x1 are of resnet")
        if self.kind == "vgg" and self.zero_init_last_gamma:
            raise ValueError("zero_init_last_gamma: true; vgg has no residual blocks; expected false")
        if self.kind == "vgg" and self.width != 1:
            raise ValueError(f"width: {self.width:g}; vgg has its usual channels only")
        if self.kind != "resnet" and self.stochastic_depth:
            raise ValueError(f"stochastic_depth: {self.stochastic_depth:g}; only resnet has residual blocks to skip")
        return self


class FPNConfig(Section):
    """Feature pyramid P2 to P6 (Lin et al. 2017), or P3 to P7 for dense detectors (Lin et al. 2017, "Focal Loss")."""

    shapes: ClassVar = ("channels", "p6")

    # width of every pyramid level [channels]. Source: Lin et al. 2017, section 3
    channels: int = Field(256, ge=1, le=8192)
    norm: NormConfig | None = None  # replaces model.norm as a whole for this part
    # dense detectors: P6 is a convolution of P5 (FCOS, ATSS) or of C5 (detectron2's RetinaNet, torchvision's v2)
    p6: Literal["p5", "c5"] = "p5"


class RPNConfig(Section):
    """Region proposal network (Ren et al. 2015), with one anchor size per level of a pyramid (Lin et al. 2017)."""

    shapes: ClassVar = ("num_convs", "aspect_ratios", "anchor_sizes")
    conventions: ClassVar = {"aspect_ratios": "rpn", "anchors": "rpn"}

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
    """Box head: 2fc (Lin et al. 2017) or 4conv1fc (Wu & He 2018); neck c4 averages what res5 makes of a region."""

    shapes: ClassVar = ("kind", "num_convs", "conv_channels", "fc_channels", "pool_size", "norm_last", "class_agnostic")
    conventions: ClassVar = {"roi_align": "box_head"}

    # two fully connected layers (Lin et al. 2017), or four convolutions and one; neck c4 has neither.
    # Source: Wu & He 2018, 4.2
    kind: Literal["2fc", "4conv1fc"] = "4conv1fc"
    # width of the convolutions of 4conv1fc [channels]. Source: Wu & He 2018, 4.2
    conv_channels: int = Field(256, ge=1, le=8192)
    num_convs: int = Field(4, ge=1, le=32)  # number of convolutions of 4conv1fc. Source: Wu & He 2018, 4.2
    # width of the fully connected layers [channels]. Source: Lin et al. 2017
    fc_channels: int = Field(1024, ge=1, le=65_536)
    # replaces model.norm as a whole for this part; 2fc has no norm, and res5 that of the backbone
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

    @property
    def layers(self) -> tuple[int, int]:
        """The numbers of convolutions and of hidden linear layers."""
        return (0, 2) if self.kind == "2fc" else (self.num_convs, 1)

    @model_validator(mode="after")
    def _has_a_last_norm(self) -> "BoxHeadConfig":
        if self.kind != "4conv1fc" and not self.norm_last:
            raise ValueError(f"norm_last: false; kind: {self.kind} has no norms of its own; expected true")
        return self


class MaskHeadConfig(Section):
    """Mask head: convolutions, a deconvolution to 28 x 28, one mask per class (He et al. 2017)."""

    shapes: ClassVar = ("num_convs", "channels")
    conventions: ClassVar = {"roi_align": "mask_head"}

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
