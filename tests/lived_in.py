"""Small detectors with used norm statistics, as gndet checkpoints from which conversions start."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from faults.tiny import CONFIG
from torch import Tensor, nn

from gndet.checkpoint import save_checkpoint
from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.data.batches.batch import sample_batch
from gndet.data.batches.stream import train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.layers import NORM_LAYERS, NoNorm
from gndet.structures import Batch

CLASSES = ("disc", "box", "triangle", "star")
GN, BN, NONE = {"kind": "gn", "channels_per_group": 16}, {"kind": "bn"}, {"kind": "none"}
STATISTICS = ("running_mean", "running_var")


def config(norm: dict[str, Any] = GN, *, train: dict[str, Any] | None = None, **model: Any) -> Config:
    """Return a config of a ResNet-18 with narrow heads on drawn pictures of 64 pixels; model: more sections of it."""
    tree = deepcopy(CONFIG)
    tree["model"] |= {"norm": norm}
    for part, section in model.items():
        tree["model"][part] = {**tree["model"].get(part, {}), **section} if isinstance(section, dict) else section
    tree["train"] |= train or {}
    return config_from_dict(tree, "test")


def dataset(cfg: Config) -> Dataset:
    return read_dataset(cfg.data.train, cfg.data)


def pictures(cfg: Config, num: int = 4) -> Batch:
    return sample_batch(dataset(cfg), cfg.data, num, 64)


def lived_in(cfg: Config, classes: Sequence[str] = CLASSES) -> MaskRCNN:
    """Return a model with BN statistics of real pictures, and with gamma, beta and biases off their initial values.

    One gamma of the stem is 0.
    """
    torch.manual_seed(7)
    model = build_model(cfg.model, len(classes))
    for name, module in model.named_modules():
        if isinstance(module, NORM_LAYERS):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
        elif isinstance(module, NoNorm):
            model.get_submodule(name.removesuffix("norm") + "conv").bias.data.normal_(0, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over all pictures
    if isinstance(model.backbone.stem.norm, NORM_LAYERS):
        model.backbone.stem.norm.weight.data[5] = 0
    with torch.no_grad():
        model.train()(next(train_batches(
            dataset(cfg), cfg.data, seed=0, start=0, stop=1, images_per_gpu=4, global_batch=4, rank=0, world=1,
            masks=cfg.model.masks, pin_memory=False,
        )).batch)  # fmt: skip
    return model.eval()


def save(path: Path, cfg: Config, state: dict[str, Tensor], parts: Sequence[str] = (), **meta: Any) -> str:
    """Write a checkpoint of some parts (default: all).  Returns its path for train.weights."""
    kept = {key: value for key, value in state.items() if not parts or key.partition(".")[0] in parts}
    about = {"update": 7, "classes": list(CLASSES), "category_ids": [1, 2, 3, 4]}
    save_checkpoint(path, {"model": kept}, about | {"config": cfg.model_dump(mode="json")} | meta)
    return str(path)


def norm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORM_LAYERS)]


@torch.no_grad()
def features(model: MaskRCNN, batch: Batch) -> dict[str, Tensor]:
    """Return C2..C5 and P2..P6 in eval mode."""
    found: dict[str, Tensor] = {}

    def keep(letter: str) -> Any:
        return lambda module, inputs, maps: found.update({f"{letter}{i}": x for i, x in enumerate(maps, start=2)})

    hooks = [model.backbone.register_forward_hook(keep("C")), model.fpn.register_forward_hook(keep("P"))]
    model.eval().features(batch.images, batch.sizes, batch.padded)
    for hook in hooks:
        hook.remove()
    return found
