"""Read the weights of a network of timm that has no counterpart among gndet's own backbones."""

from typing import Any

import torch
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.timm_backbone import TimmBackbone, norm_of, timm_network
from gndet.modeling.trained import first_few
from gndet.weights.foreign.files import WeightFile
from gndet.weights.read import Source, fused_parts


def from_timm(file: WeightFile, cfg: SourceConfig) -> Source:
    """Give a file's tensors gndet's names for the network cfg.name of timm.

    Raises ConfigError if no network is named, if timm is missing or has no such network; CheckpointError, with names
    and shapes, if tensors are missing or have other shapes.
    """
    if not cfg.name:
        raise ConfigError(f"{file.path}: train.source.name is not set; expected the name of its network in timm")
    used = ("name", "pixel_mean", "pixel_std", "parts", "differences")
    if stated := [option for option, value in cfg if option not in used and value not in (None, "auto", "timm")]:
        raise ConfigError(f"train.source.{stated[0]}: remove this option; it has no effect on a network of timm")
    with torch.device("meta"):
        network: Any = timm_network(cfg.name)
    stated = network.default_cfg
    norm = norm_of(cfg.name) or NormConfig(padding="plain")
    model = ModelConfig(
        backbone=BackboneConfig(kind="timm", name=cfg.name, norm=norm),
        pixel_mean=cfg.pixel_mean or tuple(round(255 * x, 4) for x in stated["mean"]),
        pixel_std=cfg.pixel_std or tuple(round(255 * x, 4) for x in stated["std"]),
    )
    with torch.device("meta"):
        backbone = TimmBackbone(model.backbone, norm)
    names, state = backbone.timm_names(), dict[str, Tensor]()
    wrong = []
    for key, like in backbone.state_dict().items():
        found = file.tensors.get(names[key])
        if found is not None and found.shape == like.shape:
            state[f"backbone.{key}"] = found
        elif found is not None or not key.endswith("num_batches_tracked"):
            wrong.append(
                f"{names[key]}: {'absent' if found is None else list(found.shape)}, expected {list(like.shape)}"
            )
    if wrong:
        lines = "\n  ".join(first_few(wrong))
        raise CheckpointError(
            f"{file.path}: {len(wrong)} tensors do not fit timm's {cfg.name}:\n  {lines}\n  is it the file of another "
            "network? name it in train.source.name"
        )
    kind = f"norm {norm.kind}, eps {norm.eps:g}" if norm_of(cfg.name) else "no norm that gndet replaces"
    note = f"read as timm's {cfg.name}: {kind}, RGB, mean {model.pixel_mean}, std {model.pixel_std}"
    unused = [key for key in file.tensors if key not in names.values()]
    return Source(
        str(file.path), "timm", state, model, ("backbone",), None, 0, fused_parts(state, ("backbone",)), [note], unused
    )
