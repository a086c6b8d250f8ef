"""From `train.weights` to a Source: a gndet checkpoint, a file of another toolkit, or the name of published weights."""

import importlib
import re
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config.loading import config_from_dict
from gndet.config.schema import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.weights.foreign.files import WeightFile, read_weights
from gndet.weights.foreign.names import PARTS
from gndet.weights.foreign.source import Source, fused_parts, understand

TORCHVISION_NAME = re.compile(r"(?:torchvision:)?(\w+_Weights\.\w+)")  # as ResNet50_Weights.IMAGENET1K_V2
TIMM_NAME = re.compile(r"timm:([\w.]+)")  # as timm:resnet50_gn.a1h_in1k


def read_source(where: str, cfg: SourceConfig) -> Source:
    """Read the weights that `where` names.

    where: a gndet checkpoint or run folder; a file (.pth, .pkl, .safetensors ...); a weight name of torchvision, which
    downloads it (ResNet50_Weights.IMAGENET1K_V2), or of timm where that is installed (timm:resnet50_gn.a1h_in1k).
    Raises CheckpointError, ConfigError: nothing there, damaged, unsafe, of no known format or model, or no network,
    with the address of the file to fetch.
    """
    path = Path(where)
    if not path.exists():
        if match := TORCHVISION_NAME.fullmatch(where):
            return _torchvision(match[1], cfg)
        if match := TIMM_NAME.fullmatch(where):
            return _timm(match[1], cfg)
        raise CheckpointError(
            f"{where}: there is no such file or folder, nor is it a weight name like ResNet50_Weights.IMAGENET1K_V2 "
            "(torchvision) or timm:resnet50_gn.a1h_in1k (timm)"
        )
    if path.is_dir() or cfg.format == "gndet":
        return _gndet(path, cfg)
    return understand(read_weights(path), cfg)


def _gndet(path: Path, cfg: SourceConfig) -> Source:
    """Read a gndet checkpoint: its averaged weights if there are any, else its weights."""
    checkpoint = load_checkpoint(resolve(path))
    for key, kind in (("classes", list), ("config", dict)):
        if not isinstance(checkpoint.meta.get(key), kind):
            raise CheckpointError(f"{checkpoint.path}: its meta.json has no {key}; was it saved by gndet?")
    config = config_from_dict(checkpoint.meta["config"], f"{checkpoint.path}: config in meta.json")
    group = "ema" if "ema" in checkpoint.groups else "model"
    if group not in checkpoint.groups:
        raise CheckpointError(f"{checkpoint.path}: no group ema or model; it has {', '.join(checkpoint.groups)}")
    if told := [name for name, value in cfg if name not in ("format", "classes", "differences") and value is not None]:
        raise ConfigError(
            f"train.source.{told[0]}: {checkpoint.path} is a gndet checkpoint, which says itself what it is; "
            "train.source is for files of other toolkits"
        )
    if cfg.format not in ("auto", "gndet"):
        raise ConfigError(f"train.source.format: {cfg.format}, but {checkpoint.path} is a gndet checkpoint")
    state, classes = checkpoint.groups[group], tuple(checkpoint.meta["classes"])
    parts = tuple(part for part in PARTS if any(key.startswith(f"{part}.") for key in state))
    note = f"loaded {checkpoint.path}, group {group}, update {checkpoint.meta.get('update', 'unknown')}"
    named = checkpoint.meta.get("classes_named", True)
    if cfg.classes and len(cfg.classes) != len(classes):
        raise ConfigError(
            f"{checkpoint.path}: train.source.classes names {len(cfg.classes)} classes, its heads have {len(classes)}"
        )
    names = cfg.classes or (classes if named else None)
    return Source(
        str(checkpoint.path), "gndet", state, config.model, parts, names, len(classes), fused_parts(state, parts),
        [note], [], config, tuple(checkpoint.meta.get("category_ids", ())) or None,
    )  # fmt: skip


def _torchvision(name: str, cfg: SourceConfig) -> Source:
    """Read weights of torchvision by name, from its cached file or else a download, whose name holds its hash."""
    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{name}: torchvision has no such weights: {error}") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name  # where torchvision keeps it
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix, progress=False)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise CheckpointError(
            f"{name}: could not download {weights.url} ({error}); fetch that file where there is a network, and put "
            f"it at {file}, or set train.weights to it"
        ) from None
    # not torchvision's own loading, which runs what a file asks for
    source = understand(read_weights(file), cfg, origin=f"{type(weights).__name__}.{weights.name}")
    return source._replace(notes=[f"loaded torchvision {name}", *source.notes])


def _timm(name: str, cfg: SourceConfig) -> Source:
    """Read weights of timm by name, through timm."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise CheckpointError(
            f"timm:{name}: timm is not installed (pip install timm); or fetch model.safetensors of "
            f"https://huggingface.co/timm/{name} and set train.weights to the file"
        ) from None
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client raises; timm names no type
        raise CheckpointError(
            f"timm:{name}: timm could not load it ({type(error).__name__}: {error}); fetch model.safetensors of "
            f"https://huggingface.co/timm/{name} where there is a network, and set train.weights to the file"
        ) from None
    cfg = cfg.model_copy(
        update={
            "pixel_mean": cfg.pixel_mean or tuple(round(255 * x, 4) for x in model.default_cfg["mean"]),
            "pixel_std": cfg.pixel_std or tuple(round(255 * x, 4) for x in model.default_cfg["std"]),
        }
    )
    source = understand(WeightFile(Path(name), model.state_dict(), "flat", {}), cfg)
    return source._replace(path=f"timm:{name}", notes=[f"loaded timm {name}", *source.notes])
