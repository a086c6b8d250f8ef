"""Every option, typed, with its default, unit and source. `loading.py` reads them from YAML.

What an option means stands behind it, or in the line above it where that is too long.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from gndet.config.presets import PRESETS, beneath

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Edge = Annotated[int, Field(ge=16)]  # pixels
Five = tuple[Positive, Positive, Positive, Positive, Positive]
Clip = Literal["edges", "pixels"]  # boxes end at the picture's edges, or inside its last pixel (Detectron)
# to half pixels (detectron2, mmdetection) or not (torchvision; detectron: last pixel left out)
RoIAlign = Literal["aligned", "unaligned", "detectron"]


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A part of the config: frozen, unknown keys refused."""


class NormConfig(Section):
    """A normalisation layer. Wu & He, "Group Normalization", ECCV 2018."""

    kind: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "none"] = "gn"
    groups: int = Field(32, ge=1)  # number of groups, gn only; the paper's default is 32
    channels_per_group: int | None = Field(None, ge=1)  # gn only; set, it takes the place of `groups`
    eps: float = Field(1e-5, ge=0)  # added to the variance; torch's and Detectron's default
    momentum: float = Field(0.1, gt=0, le=1)  # of the running statistics: bn, sync_bn, brn
    # masked: statistics over the picture only, padding zero after the layer; auto: masked unless the kind mixes images
    padding: Literal["auto", "masked", "plain"] = "auto"
    weight_standardization: bool = False  # of the convolutions before this norm (Qiao et al. 2019)

    @property
    def grouping(self) -> str:
        """How GN divides its channels, in words."""
        return f"{self.channels_per_group} channels per group" if self.channels_per_group else f"{self.groups} groups"

    @property
    def masked(self) -> bool:
        """Whether the padding around a picture is kept out of statistics and results."""
        if self.padding == "auto":
            return not self.mixes_images
        return self.padding == "masked"

    @property
    def mixes_images(self) -> bool:
        """Whether the statistics are taken over all images, or regions, that are computed at once."""
        return self.kind in ("bn", "sync_bn", "brn")

    @property
    def has_running_statistics(self) -> bool:
        """Whether the layer holds a running mean and variance."""
        return self.mixes_images or self.kind == "frozen_bn"

    @property
    def trains_with_running_statistics(self) -> bool:
        """Whether the running statistics are part of the training forward, so that all ranks need the same ones."""
        return self.kind == "brn"

    @property
    def communicates_in_forward(self) -> bool:
        """Whether the ranks exchange statistics within the forward and backward passes."""
        return self.kind == "sync_bn"

    @property
    def is_group_norm(self) -> bool:
        """Whether the statistics are taken over groups of channels of one image: GN, and its ends LN and IN."""
        return self.kind in ("gn", "ln", "in")

    @model_validator(mode="after")
    def _batch_statistics_are_plain(self) -> "NormConfig":
        if self.padding == "masked" and self.mixes_images:
            raise ValueError(f"padding: masked is not available for kind: {self.kind}, whose statistics mix images")
        return self


class BackboneConfig(Section):
    """ResNet (He et al. 2016)."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 50
    norm: NormConfig | None = None  # whole override of model.norm for this part
    stride_in_1x1: bool = False  # stride of a bottleneck in its first 1x1, as in MSRA's BN weights; else in its 3x3
    freeze_at: int = Field(0, ge=0, le=5)  # freeze the stem (1) and stages res2..res5 (2..5); 0: nothing. Detectron: 2
    zero_init_last_gamma: bool = False  # in the last norm of a block (Goyal et al. 2017, 5.1; the GN paper, too)


class FPNConfig(Section):
    """Feature pyramid P2-P6 (Lin et al. 2017)."""

    channels: int = Field(256, ge=1)
    norm: NormConfig | None = None


class RPNConfig(Section):
    """Region proposal network (Ren et al. 2015; FPN: one anchor size per level)."""

    anchor_sizes: Five = (32, 64, 128, 256, 512)  # side of the square anchor on P2..P6, pixels
    aspect_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, max_length=16)  # height / width
    num_convs: int = Field(1, ge=1)  # 3x3 convolutions before the predictors; torchvision's v2 models: 2
    norm: NormConfig | None = NormConfig(kind="none")  # the RPN has no norm in any toolkit; null takes model.norm
    # corners as computed (detectron2), in whole pixels (torchvision), or Detectron's rounding
    anchors: Literal["exact", "rounded", "detectron"] = "exact"
    anchor_stride: Literal["level", "canvas"] = "level"  # canvas: canvas side // map side (torchvision); not 64 on P6
    anchors_in_padding: bool = False  # anchors in the padding beside a picture, as other toolkits
    straddling_anchors: bool = True  # train on anchors that reach over the edge; Detectron: false
    positive_iou: float = Field(0.7, ge=0, le=1)
    negative_iou: float = Field(0.3, ge=0, le=1)
    anchors_per_image: int = Field(256, ge=2)  # sampled for the loss
    positive_fraction: float = Field(0.5, gt=0, le=1)
    nms_threshold: float = Field(0.7, gt=0, le=1)
    pre_nms_train: int = Field(2000, ge=1)  # candidates per level and image before NMS (detectron2)
    pre_nms_test: int = Field(1000, ge=1)
    post_nms_train: int = Field(1000, ge=1)  # proposals per image, never per batch (detectron2)
    post_nms_test: int = Field(1000, ge=1)
    min_size: float = Field(0.0, ge=0)  # pixels; a proposal's sides are longer (torchvision: 0.001)
    clip: Clip = "edges"
    loss_beta: float = Field(0.0, ge=0)  # smooth-L1 transition; 0 is L1 (detectron2), 1/9 Detectron


class BoxHeadConfig(Section):
    """Box head: 2fc (Lin et al. 2017) or 4conv1fc (the GN paper's)."""

    kind: Literal["2fc", "4conv1fc"] = "4conv1fc"
    conv_channels: int = Field(256, ge=1)
    num_convs: int = Field(4, ge=1)  # of 4conv1fc
    fc_channels: int = Field(1024, ge=1)
    norm: NormConfig | None = None  # whole override of model.norm; the 2fc head has no norm
    pool_size: int = Field(7, ge=1)  # side of the RoIAlign output
    sampling_ratio: int = Field(2, ge=0)  # RoIAlign samples per bin; 0 is adaptive (detectron2)
    roi_align: RoIAlign = "aligned"
    regions_per_image: int = Field(512, ge=1)
    positive_fraction: float = Field(0.25, gt=0, le=1)
    positive_iou: float = Field(0.5, ge=0, le=1)
    loss_beta: float = Field(0.0, ge=0)  # smooth-L1 transition; 0 is L1 (detectron2), 1 Detectron
    score_threshold: float = Field(0.05, ge=0, le=1)  # of detections
    min_size: float = Field(0.0, ge=0)  # pixels; a detection's sides are longer (torchvision: 0.01)
    clip: Clip = "edges"
    nms_threshold: float = Field(0.5, gt=0, le=1)  # of detections, class by class
    detections_per_image: int = Field(100, ge=1)


class MaskHeadConfig(Section):
    """Mask head: convolutions, a deconvolution to 28 x 28, one mask per class (He et al. 2017)."""

    channels: int = Field(256, ge=1)
    num_convs: int = Field(4, ge=1)
    norm: NormConfig | None = None
    pool_size: int = Field(14, ge=1)  # side of the RoIAlign output; masks have twice that
    sampling_ratio: int = Field(2, ge=0)
    roi_align: RoIAlign = "aligned"
    targets: Literal["binary", "soft"] = "binary"  # soft: not thresholded (torchvision)
    # exact: at pixel centres (detectron2); rounded: into whole pixels (torchvision, Detectron)
    paste: Literal["exact", "rounded", "detectron"] = "exact"


class ModelConfig(Section):
    """A Mask R-CNN; masks: false makes it a Faster R-CNN."""

    # a toolkit's conventions as defaults of the options below: `presets.py`
    compat: Literal["gndet", "torchvision", "detectron2", "detectron", "mmdetection"] = "gndet"
    detector: Literal["mask_rcnn"] = "mask_rcnn"  # the kind of detector: `modeling/build.py`
    neck: Literal["fpn"] = "fpn"  # what makes the feature maps of the backbone's stages into levels
    norm: NormConfig = NormConfig()
    masks: bool = True
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, 0-255 (ImageNet)
    pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)  # RGB, 0-255 (ImageNet)
    backbone: BackboneConfig = BackboneConfig()
    fpn: FPNConfig = FPNConfig()
    rpn: RPNConfig = RPNConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()

    @model_validator(mode="before")
    @classmethod
    def _conventions_are_defaults(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("compat") in PRESETS:
            return beneath(PRESETS[values["compat"]], values)
        return values

    def part_norms(self) -> dict[str, NormConfig]:
        """The norm of each part: its own, or model.norm."""
        parts = ("backbone", "fpn", "rpn", "box_head", "mask_head")
        return {part: getattr(self, part).norm or self.norm for part in parts}

    @property
    def mask_paste(self) -> Literal["exact", "rounded", "detectron"]:
        """How the masks of detections are put into the picture."""
        return self.mask_head.paste

    @property
    def region_heads(self) -> tuple[str, ...]:
        """The sections of the region heads, in the order they run."""
        return ("box_head", "mask_head") if self.masks else ("box_head",)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model: sections of this config, and prefixes of its tensors' names."""
        return ("backbone", "fpn", "rpn", *self.region_heads)

    @property
    def normed_parts(self) -> tuple[str, ...]:
        """The parts that have norm layers, unless their kind is none: a 2fc head has fully connected layers alone."""
        return tuple(part for part in self.parts if not (part == "box_head" and self.box_head.kind == "2fc"))

    @property
    def max_positives(self) -> int:
        """Positive regions per image that are trained on at most."""
        return int(self.box_head.regions_per_image * self.box_head.positive_fraction)

    @property
    def detection_limits(self) -> tuple[float, int]:
        """The least score of a detection, and the largest number of detections per image."""
        return self.box_head.score_threshold, self.box_head.detections_per_image

    def with_score_threshold(self, threshold: float) -> "ModelConfig":
        """Return the config of the same model whose detections have at least this score."""
        return self.model_copy(update={"box_head": self.box_head.model_copy(update={"score_threshold": threshold})})

    def batch_coupling(self) -> str | None:
        """What first makes an image's result depend on the images computed beside it, in words; or None."""
        norms = self.part_norms()
        for part in self.normed_parts:
            key = f"model.{part}.norm" if getattr(self, part).norm else "model.norm"
            if norms[part].mixes_images:
                return f"{key}.kind: {norms[part].kind} takes its statistics over the images that are computed at once"
            if not norms[part].masked and part in ("backbone", "fpn", "rpn"):
                return f"{key}.padding: plain lets the padding beside a picture, which depends on its batch, into it"
        if self.rpn.anchors_in_padding:
            return "model.rpn.anchors_in_padding: true proposes regions in the padding, which depends on the batch"
        if self.rpn.anchor_stride == "canvas":
            return "model.rpn.anchor_stride: canvas places anchors by the canvas, which depends on the batch"
        return None


class DatasetConfig(Section):
    """One data set. kind: coco reads a COCO JSON file; kind: shapes draws its images from a seed."""

    kind: Literal["coco", "shapes"] = "coco"
    annotations: str = ""  # coco: the JSON file, relative to data.root
    images: str = ""  # coco: the image folder, relative to data.root
    limit: int | None = Field(None, ge=1)  # use the first so many images only, to try things out
    count: int = Field(400, ge=1)  # shapes: number of images
    size: int = Field(160, ge=64)  # shapes: side of the square image, pixels
    seed: int = Field(0, ge=0, lt=1 << 63)  # shapes: another seed draws another set

    @model_validator(mode="after")
    def _coco_names_its_file(self) -> "DatasetConfig":
        if self.kind == "coco" and not self.annotations:
            raise ValueError("kind: coco needs `annotations`, a COCO JSON file relative to data.root")
        return self


class DataConfig(Section):
    """Data sets, sizes and augmentation."""

    root: str = "datasets"  # folder that annotations and images are relative to
    train: DatasetConfig = DatasetConfig(annotations="annotations/instances_train2017.json", images="train2017")
    val: DatasetConfig = DatasetConfig(annotations="annotations/instances_val2017.json", images="val2017")
    classes: tuple[str, ...] | None = None  # class names to use, in this order; all by default
    shortest_edge: tuple[Edge, ...] = Field((640, 672, 704, 736, 768, 800), min_length=1)  # training: one of these
    shortest_edge_test: int = Field(800, ge=16)
    max_edge: int = Field(1333, ge=16)  # limit of the longer edge, pixels
    flip: float = Field(0.5, ge=0, le=1)  # probability of a left-right flip
    flip_vertical: float = Field(0.0, ge=0, le=1)  # probability of an upside-down flip
    keep_empty: bool = False  # keep training images without objects (as negatives)
    workers: int = Field(2, ge=0)  # loader processes per rank; results do not depend on it
    max_pixels: int = Field(100_000_000, ge=1, le=2_000_000_000)  # a larger picture is refused before it is decoded
    skip_unreadable: bool = False  # train although `gndet check` found pictures that cannot be read; they are left out
    cache: str = "~/.cache/gndet"  # folder for data sets as read and checked; '' keeps nothing between starts
    max_unreadable: float = Field(0.01, ge=0, le=1)  # share of a data set that may be unreadable before the run stops
    antialias: bool = True  # of resizing, as PIL and detectron2; false: torchvision, OpenCV
    canvas_multiple: int = Field(32, ge=1)  # canvas edges are multiples of this, so that few shapes occur
    exact_canvas: bool = True  # no padding around pictures of one size; false: multiples even there, as elsewhere
    # training: heights and widths of the only canvases, for train.compile, which makes a graph for each; []: any
    canvases: tuple[tuple[Edge, Edge], ...] = Field((), max_length=4)


class OptimizerConfig(Section):
    """SGD with momentum, or AdamW."""

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.02, gt=0)  # for the reference batch; scaled linearly with global_batch for sgd
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # adamw
    weight_decay: float = Field(1e-4, ge=0)
    norm_weight_decay: float = Field(0.0, ge=0)  # of gamma and beta; 0 as in Detectron (WEIGHT_DECAY_GN)
    clip_grad_norm: float = Field(0.0, ge=0)  # limit of the global gradient norm; 0 is off


class ScheduleConfig(Section):
    """Learning rate over time, stated for `reference_batch` images per update and rescaled to global_batch."""

    kind: Literal["step", "cosine"] = "step"
    updates: int = Field(90_000, ge=1)
    steps: tuple[int, ...] = (60_000, 80_000)  # kind: step: updates at which lr is multiplied
    gamma: float = Field(0.1, gt=0, le=1)
    warmup: int = Field(1000, ge=0)  # updates of linear warm-up
    warmup_factor: float = Field(0.001, ge=0, le=1)  # lr at update 0 as a fraction (detectron2: 0.001)
    reference_batch: int = Field(16, ge=1)


class SourceConfig(Section):
    """What a weights file of another toolkit is taken for, where it does not say so; null is the format's usual."""

    # resnet: a classifier of torchvision or timm; auto: by the names of its tensors
    format: Literal[
        "auto", "gndet", "resnet", "torchvision", "detectron2", "detectron", "mmdetection", "maskrcnn-benchmark"
    ] = "auto"  # fmt: skip
    bgr: bool | None = None  # its stem takes blue, green, red
    pixel_mean: tuple[float, float, float] | None = None  # RGB, 0-255
    pixel_std: tuple[Positive, Positive, Positive] | None = None  # RGB, 0-255
    stride_in_1x1: bool | None = None
    norm_eps: float | None = Field(None, ge=0)  # of its norms
    groups: int | None = Field(None, ge=1)  # of its GN layers; 32 in every toolkit
    channels_per_group: int | None = Field(None, ge=1)  # of its GN layers, in place of groups
    weight_standardization: bool | None = None
    compat: Literal["torchvision", "detectron2", "detectron", "mmdetection"] | None = None  # it was trained with
    anchor_sizes: Five | None = None
    aspect_ratios: tuple[Positive, Positive, Positive] | None = None
    classes: tuple[str, ...] | None = None  # its class names, in the order of its labels
    # what becomes of a model whose conventions are not the file's; report: fine-tune anyway
    differences: Literal["refuse", "report"] = "refuse"


class TrainConfig(Section):
    """The run: batch, optimiser, schedule, what is written when."""

    weights: str = ""  # start from this: a gndet run or checkpoint, a file of another toolkit, or a weight name
    source: SourceConfig = SourceConfig()
    # what becomes of a part whose norm in the file is not the model's: README, Fine-tuning
    norm_policy: Literal["error", "hybrid", "convert", "calibrate", "affine", "reinit"] = "error"
    norm_damp: float = Field(1.0, ge=0)  # convert, calibrate: share of the group variance added to GN's eps
    calibration_images: int = Field(32, ge=1)  # calibrate: training images that gamma and beta are fitted on
    global_batch: int = Field(16, ge=1)  # images per update, over all ranks
    images_per_gpu: int | Literal["auto"] = 2  # images a rank computes at once; auto: as many as fit in memory
    memory_limit_mib: float | None = Field(None, gt=0)  # of tensors per rank; null: the GPU's. auto on a CPU needs it
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    # auto: bf16 autocast on GPU; float64 shows what is equal but for rounding, slowly
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    # kept for the backward pass. fast: all; balanced: below half, a tenth slower; lean: a fifth, a third slower
    memory: Literal["fast", "balanced", "lean"] = "balanced"
    # torch.compile, a graph for each of data.canvases; reduce-overhead: as CUDA graphs. Only rounding changes
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the averaged weights per update; 0 is off
    log_every: int = Field(20, ge=1)  # updates
    eval_every: int = Field(5000, ge=0)  # updates; 0 evaluates at the end only
    checkpoint_every: int = Field(1000, ge=0)  # updates; 0 saves with evaluations only
    keep_last: int = Field(2, ge=1)  # newest checkpoints kept; best/ and last/ point beside them
    vis_images: int = Field(4, ge=0)  # validation images drawn at each evaluation
    report: bool = True  # write report.html when the run ends
    norm_images: int = Field(4, ge=0, le=16)  # validation images that the norm report looks at; 0: none
    on_nonfinite: str = Field("stop", pattern=r"^(stop|skip:[1-9]\d{0,5})$")  # skip:N passes over N updates, then stops
    timeout_s: float = Field(600.0, gt=0)  # seconds a rank waits for the others before the run ends: one is lost

    @field_validator("images_per_gpu", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"got {value!r}; expected a number of images from 1 on, or auto")
        return value


class EvaluationConfig(Section):
    """COCO metrics."""

    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"  # pycocotools is the reference, slower
    max_detections: int = Field(100, ge=1)  # per image, as in COCO; raise it where images hold more objects
    images_per_gpu: int = Field(1, ge=1)


class Config(Section):
    """The whole config of a run."""

    task: Literal["detection"] = "detection"  # what is learned: `training/task.py`
    out: str = ""  # run folder; runs/<config name> by default
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # deterministic GPU algorithms; the CPU is deterministic as it is
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _canvases_hold_all(self) -> "Config":
        longest = self.data.max_edge
        shorter = min(max(self.data.shortest_edge), longest)
        needed = [(shorter, longest), (longest, shorter)]  # a picture; two of them, one upright and one lying:
        needed += [] if self.train.images_per_gpu == 1 else [(longest, longest)]
        canvases = self.data.canvases
        if self.train.compile != "none" and not canvases:
            edges = [[-(-edge // 32) * 32 for edge in canvas] for canvas in needed]
            raise ValueError(
                f"train.compile: {self.train.compile} makes a graph for each canvas and needs data.canvases, the few "
                f"there are to be, like data.canvases={str(edges).replace(' ', '')}"
            )
        for height, width in needed if canvases else ():
            if not any(height <= canvas[0] and width <= canvas[1] for canvas in canvases):
                raise ValueError(
                    f"data.canvases: none of {', '.join(f'{h} x {w}' for h, w in canvases)} holds {height} x {width}, "
                    "as large as a batch may be by data.shortest_edge, data.max_edge and train.images_per_gpu"
                )
        return self

    @model_validator(mode="after")
    def _batch_splits(self) -> "Config":
        if mistake := self.split_mistake(world=1):
            raise ValueError(mistake)
        return self

    def split_mistake(self, world: int) -> str | None:
        """Say why an update cannot be split over `world` ranks as train.images_per_gpu asks; None where it can."""
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
