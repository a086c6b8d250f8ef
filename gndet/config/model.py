"""The section `model`: which model it is, its parts, and the options of a classifier.

To add a detector: a file with its section, its conventions and what it checks, as dense.py, and its lines here.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from gndet.config import cascade, dense, one_level
from gndet.config.cascade import CascadeConfig, check_cascade
from gndet.config.dense import DenseConfig, check_dense
from gndet.config.norm import NormConfig
from gndet.config.one_level import check_neck
from gndet.config.parts import BackboneConfig, BoxHeadConfig, FPNConfig, MaskHeadConfig, RPNConfig
from gndet.config.presets import TOOLKITS, Convention, beneath
from gndet.config.section import Positive, Section

# the first that applies and has an option decides its default
CONVENTIONS: tuple[Convention, ...] = (
    *one_level.CONVENTIONS,
    *cascade.CONVENTIONS,
    *TOOLKITS,
    *dense.CONVENTIONS,
)
WHOLE_PICTURES = ("backbone", "fpn", "rpn", "dense")  # parts that see whole pictures, including the padding


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
    # the levels that RPN and heads work on. fpn: P2 to P6 for the RPN, P2 to P5 for the heads; c4: res4's map, and res5
    # on each region; dc5: the map of res5 with stride 16 and dilation 2. c4 and dc5 have defaults of their own, see the
    # last table. Source: Lin et al. 2017
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
        for convention in CONVENTIONS:
            if convention.applies(values):
                values = beneath(convention.defaults, values)
        return values

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> "ModelConfig":
        check_cascade(self)
        check_dense(self)
        check_neck(self)
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
    def anchored(self) -> str:
        """The section with the anchors of a detector."""
        return "dense" if self.is_dense else "rpn"

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
        found = [*self.shapes, *(f"{name}.{option}" for name, section in self._inner() for option in section.shapes)]
        return [option for option in found if option not in self.lacks]

    @property
    def lacks(self) -> tuple[str, ...]:
        """The options of sections in use that have no effect: "box_head.kind" and so on."""
        return one_level.C4_LACKS if self.neck == "c4" else ()

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
        convs = {"classifier": 0, "box_head": self.box_layers[0], "mask_head": self.mask_head.num_convs}
        return tuple(part for part in self.parts if convs.get(part, 1))

    @property
    def box_layers(self) -> tuple[int, int]:
        """The numbers of convolutions and of hidden linear layers in the box head; c4 has its own head without any."""
        return (0, 0) if self.neck == "c4" else self.box_head.layers

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
            if not norms[part].masked and part in WHOLE_PICTURES:
                return f"{key}.padding: plain includes the padding around a picture, which depends on its batch"
        part = self.anchored
        if part in self.parts and getattr(self, part).anchors_in_padding:
            return f"model.{part}.anchors_in_padding: true places anchors in the padding, whose size the batch decides"
        if part in self.parts and getattr(self, part).anchor_stride == "canvas":
            return f"model.{part}.anchor_stride: canvas places anchors by the canvas, which depends on the batch"
        return None
