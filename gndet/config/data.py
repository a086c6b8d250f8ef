"""The section `data`: data sets, the sizes of their pictures, and augmentation."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from gndet.config.presets import edges_of
from gndet.config.section import Edge, FileName, Fraction, Positive, Section


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
    # evaluation: that side, if it is another one [pixels] (A3 of Wightman et al. 2021: 224, trained at 160)
    size_test: Edge | None = None
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
    # training: number of RandAugment's operations per picture; 0 is off (Cubuk et al. 2020: 2)
    rand_augment: int = Field(0, ge=0, le=16)
    # RandAugment: strength of its operations [of 30] (A2 of Wightman et al. 2021: 21, A3: 18). Source: torchvision
    magnitude: int = Field(9, ge=0, le=30)
    # training: blend a picture with another; its share is drawn from Beta(mixup, mixup); 0 is off. With cutmix, too,
    # half of the pictures are blended (Zhang et al. 2018; A2, A3 of Wightman et al. 2021: 0.1)
    mixup: float = Field(0.0, ge=0, le=100)
    # training: paste a box of another picture; the share of the rest is drawn from Beta(cutmix, cutmix); 0 is off
    # (Yun et al. 2019; A2, A3: 1)
    cutmix: float = Field(0.0, ge=0, le=100)

    @property
    def tested(self) -> int:
        """Side of the square that the network sees in evaluation, in pixels."""
        return self.size_test or self.size

    @property
    def mixes(self) -> bool:
        """Whether training mixes pictures."""
        return self.mixup > 0 or self.cutmix > 0

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
        return edges_of(values.get("crop")) | values if isinstance(values, dict) else values

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
        if self.val.share is not None and self.val.split not in ("", "val"):
            raise ValueError("val.share takes images of train; val.share=null lets val have a split of its own")
        return self
