"""Build a model from its config: a table of the available kinds of each part, and the code that joins the parts.

To add a detector, backbone, neck or head: add a file to this folder, a row here, and its options to a file of config/.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.errors import ConfigError
from gndet.modeling import cascade
from gndet.modeling.box_head import BoxHead
from gndet.modeling.classifier import ClassHead, Classifier
from gndet.modeling.dense import DenseDetector
from gndet.modeling.dense_head import DenseHead
from gndet.modeling.detection_model import DetectionModel, RegionHead
from gndet.modeling.fpn import FPN
from gndet.modeling.image_model import Backbone, ImageModel, Neck
from gndet.modeling.mask_head import MaskHead
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.one_level import OneLevel, Res5BoxHead
from gndet.modeling.resnet import ResNet
from gndet.modeling.rpn import RPN
from gndet.modeling.vgg import VGG


def _timm(cfg: BackboneConfig, norm: NormConfig) -> Backbone:
    """Build a network of timm, an optional extra."""
    from gndet.modeling.timm_backbone import TimmBackbone

    return TimmBackbone(cfg, norm)


BACKBONES: dict[str, Callable[..., Backbone]] = {  # model.backbone.kind: (options, norm)
    "resnet": ResNet,
    "vgg": VGG,
    "timm": _timm,
}
NECKS: dict[str, Callable[..., Neck]] = {  # model.neck: (options, norm, channels of the backbone's maps)
    "fpn": FPN,
    "c4": OneLevel,
    "dc5": OneLevel,
}
RES5 = {"c4": "regions", "dc5": "dilated"}  # how a ResNet runs res5, by model.neck
HEADS: dict[str, Callable[..., RegionHead]] = {  # by config section: (options, norm, channels, num_classes)
    "box_head": BoxHead,
    "mask_head": MaskHead,
}
C4_HEADS = {**HEADS, "box_head": Res5BoxHead}
CASCADE_HEADS: dict[str, Callable[..., RegionHead]] = {  # by config section: (options of model.cascade, as above)
    "box_head": cascade.CascadeBoxHead,
    "mask_head": cascade.mask_head,
}


def build_model(cfg: ModelConfig, num_classes: int) -> ImageModel:
    """Build the model of a config.  Raises ConfigError naming the part whose norm does not fit its channels."""
    return DETECTORS[cfg.detector](cfg, num_classes)


def _mask_rcnn(
    cfg: ModelConfig, num_classes: int, kinds: Mapping[str, Callable[..., RegionHead]] | None = None
) -> DetectionModel:
    """Build a Mask R-CNN, or a Faster R-CNN if masks are off; kinds: of heads, as HEADS; None: those of the neck."""
    kinds = kinds or (C4_HEADS if cfg.neck == "c4" else HEADS)
    norms, backbone = cfg.part_norms(), _backbone(cfg)
    with _part_in_errors("fpn"):
        neck = NECKS[cfg.neck](cfg.fpn, norms["backbone" if cfg.neck in RES5 else "fpn"], backbone.channels)
    with _part_in_errors("rpn"):
        rpn = RPN(cfg.rpn, norms["rpn"], neck.channels, neck.strides)
    heads = {}
    for part in cfg.region_heads:
        with _part_in_errors(part):
            channels = backbone.region_channels or neck.channels
            heads[part] = kinds[part](getattr(cfg, part), norms[part], channels, num_classes)
    return MaskRCNN(backbone, neck, rpn, heads, pixel_mean=cfg.pixel_mean, pixel_std=cfg.pixel_std)


def _cascade_rcnn(cfg: ModelConfig, num_classes: int) -> DetectionModel:
    """Build a Cascade Mask R-CNN, or a Cascade R-CNN if masks are off."""
    return _mask_rcnn(cfg, num_classes, {part: partial(head, cfg.cascade) for part, head in CASCADE_HEADS.items()})


def _dense(cfg: ModelConfig, num_classes: int) -> DenseDetector:
    """Build an FCOS or a RetinaNet."""
    norms, backbone, distances = cfg.part_norms(), _backbone(cfg), cfg.detector == "fcos"
    with _part_in_errors("fpn"):
        neck = FPN(cfg.fpn, norms["fpn"], backbone.channels, finest=3)
    with _part_in_errors("dense"):
        head = DenseHead(cfg.dense, norms["dense"], neck.channels, neck.strides, num_classes, distances=distances)
    return DenseDetector(backbone, neck, head, pixel_mean=cfg.pixel_mean, pixel_std=cfg.pixel_std)


def _classifier(cfg: ModelConfig, num_classes: int) -> Classifier:
    """Build a classifier."""
    backbone = _backbone(cfg)
    head = ClassHead(cfg.classifier, backbone.channels[-1], num_classes)
    return Classifier(backbone, head, pixel_mean=cfg.pixel_mean, pixel_std=cfg.pixel_std)


def _backbone(cfg: ModelConfig) -> Backbone:
    with _part_in_errors("backbone"):
        options = {"res5": RES5[cfg.neck]} if cfg.neck in RES5 else {}
        return BACKBONES[cfg.backbone.kind](cfg.backbone, cfg.part_norms()["backbone"], **options)


DETECTORS: dict[str, Callable[[ModelConfig, int], ImageModel]] = {  # model.detector
    "mask_rcnn": _mask_rcnn,
    "cascade_rcnn": _cascade_rcnn,
    "fcos": _dense,
    "retinanet": _dense,
    "classifier": _classifier,
}


@contextmanager
def _part_in_errors(part: str) -> Iterator[None]:
    """Prefix a ConfigError with the part's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"model.{part}: {error}") from None
