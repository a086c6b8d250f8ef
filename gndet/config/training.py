"""The sections `train` and `evaluation`: batch, optimizer, schedule, initial weights, what is written, and scoring."""

from typing import Literal

from pydantic import Field, field_validator

from gndet.config.section import FileName, Fraction, Positive, Section, Sizes


class OptimizerConfig(Section):
    """The optimizer."""

    # SGD with momentum, AdamW (Loshchilov & Hutter 2019), or timm's LAMB (You et al. 2020; pip install timm)
    kind: Literal["sgd", "adamw", "lamb"] = "sgd"
    # learning rate for the reference batch; follows global_batch linearly with sgd (Goyal et al. 2017, 2.1), by its
    # square root with adamw (Malladi et al. 2022) and lamb (You et al. 2020). Source: Detectron
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # momentum of sgd. Source: Detectron
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # averaging of the two moments of adamw and lamb. Source: torch
    weight_decay: float = Field(1e-4, ge=0)  # decay of the weights. Source: Detectron
    # decay of gamma and beta of the norms; with lamb, as in timm, of all biases. Source: Detectron (WEIGHT_DECAY_GN)
    norm_weight_decay: float = Field(0.0, ge=0)
    clip_grad_norm: float = Field(0.0, ge=0)  # limit of the global gradient norm; 0 is off


class ScheduleConfig(Section):
    """Learning rate over time, stated for `reference_batch` images per update and rescaled to `global_batch`."""

    # step: multiply by gamma at `steps`; cosine: half a cosine down to final_factor
    kind: Literal["step", "cosine"] = "step"
    # length of the training at the reference batch [updates]. Source: Detectron's 1x
    updates: int = Field(90_000, ge=1)
    steps: tuple[int, ...] = (60_000, 80_000)  # step: when the learning rate drops [updates]. Source: Detectron's 1x
    gamma: float = Field(0.1, gt=0, le=1)  # step: factor of each drop. Source: Detectron
    final_factor: float = Field(0.0, ge=0, le=1)  # cosine: last learning rate, as a fraction
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
    # take these parts of the model only, for example [backbone] for another kind of detector; null: all that it holds
    parts: tuple[str, ...] | None = Field(None, min_length=1)
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
    # auto: bf16 autocast on GPUs since Ampere, else float32; float64 is slow and shows what differs by rounding only
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
    vis_images: int = Field(4, ge=0)  # drawn: training images at the start, validation images at evaluations [images]
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
