"""Build a model from its config: a table of the available kinds of each part, and the code that joins the parts.

To add a detector, backbone, neck or head: add a file to this folder, a row here, and its options to config/schema.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gndet.config.schema import ModelConfig
from gndet.errors import ConfigError
from gndet.modeling.box_head import BoxHead
from gndet.modeling.classifier import ClassHead, Classifier
from gndet.modeling.detection_model import DetectionModel, RegionHead
from gndet.modeling.fpn import FPN
from gndet.modeling.image_model import ImageModel
from gndet.modeling.mask_head import MaskHead
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.resnet import ResNet
from gndet.modeling.rpn import RPN
from gndet.modeling.timm_backbone import TimmBackbone
from gndet.modeling.vgg import VGG

BACKBONES: dict[str, Callable[..., Any]] = {  # model.backbone.kind: (options, norm)
    "resnet": ResNet,
    "vgg": VGG,
    "timm": TimmBackbone,
}
NECKS: dict[str, Callable[..., FPN]] = {"fpn": FPN}  # model.neck: (options, norm, channels of the stages)
HEADS: dict[str, Callable[..., RegionHead]] = {  # by config section: (options, norm, channels, num_classes)
    "box_head": BoxHead,
    "mask_head": MaskHead,
}


def build_model(cfg: ModelConfig, num_classes: int) -> ImageModel:
    """Build the model of a config.  Raises ConfigError naming the part whose norm does not fit its channels."""
    return DETECTORS[cfg.detector](cfg, num_classes)


def _mask_rcnn(cfg: ModelConfig, num_classes: int) -> DetectionModel:
    """Build a Mask R-CNN, or a Faster R-CNN if masks are off."""
    norms, backbone = cfg.part_norms(), _backbone(cfg)
    with _part_in_errors("fpn"):
        neck = NECKS[cfg.neck](cfg.fpn, norms["fpn"], backbone.channels)
    with _part_in_errors("rpn"):
        rpn = RPN(cfg.rpn, norms["rpn"], neck.channels, neck.strides)
    heads = {}
    for part in cfg.region_heads:
        with _part_in_errors(part):
            heads[part] = HEADS[part](getattr(cfg, part), norms[part], neck.channels, num_classes)
    return MaskRCNN(backbone, neck, rpn, heads, pixel_mean=cfg.pixel_mean, pixel_std=cfg.pixel_std)


def _classifier(cfg: ModelConfig, num_classes: int) -> Classifier:
    """Build a classifier."""
    backbone = _backbone(cfg)
    head = ClassHead(cfg.classifier, backbone.channels[-1], num_classes)
    return Classifier(backbone, head, pixel_mean=cfg.pixel_mean, pixel_std=cfg.pixel_std)


def _backbone(cfg: ModelConfig) -> Any:
    with _part_in_errors("backbone"):
        return BACKBONES[cfg.backbone.kind](cfg.backbone, cfg.part_norms()["backbone"])


DETECTORS: dict[str, Callable[[ModelConfig, int], ImageModel]] = {  # model.detector
    "mask_rcnn": _mask_rcnn,
    "classifier": _classifier,
}


@contextmanager
def _part_in_errors(part: str) -> Iterator[None]:
    """Prefix a ConfigError with the part's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"model.{part}: {error}") from None
