"""Classifiers, with a ResNet or a VGG, in the files of torchvision and timm.

gndet reads the backbones of classifiers, and writes classifiers.
Placeholders: place and after, the places of a layer and of the norm behind it in torchvision's sequence.
"""

from collections.abc import Iterator

import torch

from gndet.config.model import ModelConfig
from gndet.modeling.vgg import STAGES
from gndet.weights.foreign.names import ConvNames, Names
from gndet.weights.foreign.part import GROUPS, Layer, Part, State

VGG_HEAD = (7, 4096, 4096)  # of torchvision's VGG: side of the pooled map, and widths of the layers before the logits
NAMES: dict[str, Names] = {  # by kind of backbone
    "resnet": {"class_logits": "fc"},
    "vgg": {"vgg_conv": ConvNames("features.{place}", "features.{after}"), "vgg_fc": "classifier.{place}"},
}


def _layers(cfg: ModelConfig) -> Iterator[Layer]:
    if cfg.backbone.kind != "vgg":
        yield "classifier", "logits", "class_logits", {}
        return
    place, normed = 0, cfg.part_norms()["backbone"].kind != "none"
    for number, widths in enumerate(STAGES, start=1):
        for i in range(len(widths)):
            before = number > 1  # in the first stage, the stem is the first convolution
            layer = f"stage{number}.{i - 1 + before}" if i or before else "stem"
            yield "backbone", layer, "vgg_conv", {"place": place, "after": place + 1}
            place += 3 if normed else 2  # and the ReLU
        place += 1  # the pooling
    for i, layer in enumerate(("fcs.0", "fcs.1", "logits")):
        yield "classifier", layer, "vgg_fc", {"place": 3 * i}  # ReLU and dropout between


def _to_file(state: State, cfg: ModelConfig, toolkit: str) -> None:
    """Add what torchvision's vgg16_bn has beside gndet's tensors: biases before the norms, which count batches."""
    for key in [*state] if cfg.backbone.kind == "vgg" else ():
        layer, _, parameter = key.rpartition(".")
        if layer.endswith(".conv"):
            state.setdefault(f"{layer}.bias", torch.zeros(len(state[f"{layer}.weight"])))
        if parameter == "running_var":
            state.setdefault(f"{layer}.num_batches_tracked", torch.tensor(0))


def _refusals(cfg: ModelConfig, parts: tuple[str, ...], toolkit: str) -> Iterator[str]:
    head, norm, is_vgg = cfg.classifier, cfg.part_norms()["backbone"], cfg.backbone.kind == "vgg"
    shape = f"pool_size {head.pool_size}, fc_channels {list(head.fc_channels)}"
    if "classifier" not in parts:
        return
    if toolkit != "torchvision":
        yield f"--to {toolkit}: gndet writes classifiers for torchvision only, whose names timm reads, too"
    if not is_vgg and (head.fc_channels or head.pool_size > 1):
        yield f"model.classifier: {shape}; torchvision's ResNets have one fully connected layer"
    if is_vgg and (head.pool_size, *head.fc_channels) != VGG_HEAD:
        yield f"model.classifier: {shape}; torchvision's VGG has pool_size 7, fc_channels [4096, 4096]"
    if is_vgg and norm.kind != "none" and not norm.has_running_statistics:
        yield (
            f"model.backbone.norm: {norm.kind}; torchvision has VGG-16 without norms (vgg16) and with BN (vgg16_bn), "
            "whose norm no argument replaces"
        )


def notes(cfg: ModelConfig, num_classes: int) -> list[str]:
    """Say how torchvision and timm build the same classifier, and how its pictures are prepared."""
    norm, backbone = cfg.part_norms()["backbone"], cfg.backbone
    mean = [round(x / 255, 6) for x in cfg.pixel_mean]
    pictures = f"transforms.Normalize({mean}, [0.229, 0.224, 0.225])"
    if backbone.kind == "vgg":
        name, dropout = "vgg16" if norm.kind == "none" else "vgg16_bn", f"dropout={cfg.classifier.dropout:g}"
        sides = "differs: if 32 does not divide a picture's sides, torchvision drops the last rows and columns of a map"
        return [f"torchvision.models.{name}(num_classes={num_classes}, {dropout})", pictures, sides]
    per_group = norm.channels_per_group
    groups = {"gn": f"channels // {per_group}" if per_group else str(norm.groups), "ln": "1", "in": "channels"}
    layer = ", norm_layer=torchvision.ops.FrozenBatchNorm2d" if norm.kind == "frozen_bn" else ""
    if norm.kind in groups:
        layer = f", norm_layer=lambda channels: torch.nn.GroupNorm({groups[norm.kind]}, channels)"
    is_wide, width, timm_width = backbone.cardinality > 1 or backbone.group_width != 64, "", ""
    if is_wide:
        width = f", groups={backbone.cardinality}, width_per_group={backbone.group_width}"
        timm_width = f", cardinality={backbone.cardinality}, base_width={backbone.group_width}"
    lines = [f"torchvision.models.resnet{backbone.depth}(num_classes={num_classes}{width}{layer})", pictures]
    if norm.kind == "gn" and not per_group and norm.groups == GROUPS:
        timm_width += ", norm_layer=timm.layers.GroupNorm"
    elif norm.is_group_norm or norm.kind == "frozen_bn":
        return lines
    return [*lines, f"timm.create_model('resnet{backbone.depth}', num_classes={num_classes}{timm_width})"]


PART = Part(NAMES, _layers, to_file=_to_file, refusals=_refusals)
