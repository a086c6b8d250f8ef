"""Read a file of another toolkit, or published weights by name, into a Source that states what the weights assume.

K classes.
"""

import importlib
import os
import re
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from gndet.config.model import ModelConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.trained import MAX_NAMED, first_few
from gndet.weights.foreign import resnet
from gndet.weights.foreign.files import WeightFile, read_weights
from gndet.weights.foreign.formats import FORMATS, PARTS, facts_of, format_of, infer_config, layer_names, renamed
from gndet.weights.foreign.names import file_key, toolkit_of
from gndet.weights.foreign.part import BACKGROUND_FIRST, Facts, Reader
from gndet.weights.foreign.tensorpack import translated
from gndet.weights.foreign.timm_files import from_timm
from gndet.weights.read import BACKGROUND, DEEP_STEM, STEM, Source, class_rows, fused_parts, has_background

TORCHVISION_NAME = re.compile(r"(?:torchvision:)?(\w+_Weights\.\w+)")  # e.g. ResNet50_Weights.IMAGENET1K_V2
TIMM_NAME = re.compile(r"timm:([\w.]+)")  # e.g. timm:resnet50_gn.a1h_in1k
PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
COCO_ROWS = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # the background, then COCO's ids 1 to 90
CATEGORY_IDS = tuple(id for id, name in enumerate(COCO_ROWS) if name not in ("__background__", "N/A"))
COCO_NAMES = tuple(COCO_ROWS[id] for id in CATEGORY_IDS)
PREFIXES = {  # of tensors in the parts that gndet reads, in formats whose names have no section in front
    "resnet": ("conv1.", "bn1.", "layer"),
    "detectron2_backbone": ("stem.", "res"),
    "detectron": ("res", "fpn_", "head_conv", "conv_rpn", "rpn_"),
}
HARMLESS = re.compile(r"(^|\.)fc\.|keypoint|kps|anchor_generator|num_batches_tracked")  # of classifiers and other heads


def read_foreign(weights: str, cfg: SourceConfig, network: str) -> Source:
    """Read weights of another toolkit: a file, or the name of torchvision's or timm's.  Raises as read_source does."""
    if network and cfg.format == "auto":  # only timm's networks have names
        cfg = cfg.model_copy(update={"format": "timm", "name": cfg.name or network})
    path = Path(os.path.expanduser(weights))
    if path.exists():
        return from_timm(read_weights(path), cfg) if cfg.format == "timm" else understand(read_weights(path), cfg)
    if match := TORCHVISION_NAME.fullmatch(weights):
        return _torchvision(match[1], cfg)
    if match := TIMM_NAME.fullmatch(weights):
        return _timm(match[1], cfg)
    raise CheckpointError(
        f"{weights}: there is no such file or folder, and it is not a weight name like ResNet50_Weights.IMAGENET1K_V2 "
        "(torchvision) or timm:resnet50_gn.a1h_in1k (timm)"
    )


def _torchvision(name: str, cfg: SourceConfig) -> Source:
    """Read torchvision's weights by name, from its cache or a download, which is checked by the hash in its name."""
    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{name}: torchvision has no such weights: {error}") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name  # where torchvision caches it
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix, progress=False)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        raise CheckpointError(
            f"{name}: could not download {weights.url} ({error}); fetch the file on a machine with a network, and put "
            f"it at {file} or set train.weights to its path"
        ) from None
    # not torchvision's own loader, which may run code from the file
    source = understand(read_weights(file), cfg, origin=f"{type(weights).__name__}.{weights.name}")
    return source._replace(notes=[f"loaded torchvision {name}", *source.notes])


def _timm(name: str, cfg: SourceConfig) -> Source:
    try:
        model = importlib.import_module("timm").create_model(name, pretrained=True)
    except Exception as error:  # no timm, or anything that the hub's client raises; timm documents no type
        raise CheckpointError(
            f"timm:{name}: timm could not load it ({type(error).__name__}: {error}); pip install timm if it is "
            f"missing, or download model.safetensors from https://huggingface.co/timm/{name} on a machine with a "
            "network, and set train.weights to its path"
        ) from None
    stated = {key: tuple(round(255 * x, 4) for x in model.default_cfg[key]) for key in ("mean", "std")}
    pixels = {"pixel_mean": cfg.pixel_mean or stated["mean"], "pixel_std": cfg.pixel_std or stated["std"]}
    file, cfg = WeightFile(Path(name), model.state_dict(), {}), cfg.model_copy(update=pixels)
    is_resnet = "layer1.0.conv1.weight" in file.tensors and cfg.format != "timm"
    pools = [getattr(module, "aa", None) for module in model.modules()]  # they have no parameters
    if is_resnet and any(isinstance(pool, nn.Module) and not isinstance(pool, nn.Identity) for pool in pools):
        raise CheckpointError(
            f"timm:{name}: its strides are anti-aliased, which gndet's ResNet lacks; model.backbone.kind=timm "
            f"model.backbone.name={name.partition('.')[0]} takes this network"
        )
    source = understand(file, cfg) if is_resnet else from_timm(file, cfg.model_copy(update={"name": name}))
    return source._replace(path=f"timm:{name}", notes=[f"loaded timm {name}", *source.notes])


def understand(file: WeightFile, cfg: SourceConfig, origin: str = "") -> Source:
    """Rename a file's tensors to gndet's names and state what the weights assume.

    cfg: what the user states about the file.  origin: the name that the weights were downloaded by, if any.
    Raises CheckpointError, with keys and shapes, if the format is unknown, if a layer or a part of one is missing, or
    if gndet does not support the model.
    """
    file = translated(file, cfg.parts)
    tensors = renamed(file.tensors)
    format = format_of(file, tensors, cfg)
    facts = facts_of(format, file, tensors, cfg)
    reader = Reader(str(file.path), format, FORMATS[format], tensors, facts, cfg)
    model, parts = infer_config(reader, origin or file.path.name)
    names = layer_names(format, model, parts)
    keys = {f"{layer}.{key}": file_key(format, name, key) for layer, name in names.items() for key in PARAMETERS}
    state = {name: tensors[key] for name, key in keys.items() if key in tensors}
    known = set(keys.values())
    unused = [key for key in tensors if key not in known]
    _complete_fused(state, model)
    fused = fused_parts(state, parts)
    _drop_conv_biases(state, names, reader.path, model)
    for part in PARTS:
        part.from_file(state, model, format)
    if facts.bgr:
        stem = STEM if STEM in state else DEEP_STEM
        state[stem] = state[stem].flip(1)
    num_classes = _order_classes(state, format, cfg, model)
    classes, notes = _classes(num_classes, file, cfg)
    notes = [_assumptions(format, facts, model, parts, fused), *notes]
    if wrong := _misfits(state, model, parts, num_classes, keys):
        cause = "likely cause: a part of the file is missing, or the model is a variant that gndet does not support"
        lines = "\n  ".join([*first_few(wrong), cause])
        raise CheckpointError(f"{reader.path}: {len(wrong)} tensors of a {facts.title} model:\n  {lines}")
    _refuse_unknown(reader, unused)
    ids = CATEGORY_IDS if classes == COCO_NAMES else None
    return Source(
        str(file.path), format, state, model, parts, classes, num_classes, fused, notes, unused, category_ids=ids
    )


def _complete_fused(state: dict[str, Tensor], model: ModelConfig) -> None:
    """Give a part's BN layers mean 0 and variance 1 if the file has no statistics for any: they are affine maps."""
    for part in [part for part, norm in model.part_norms().items() if norm.has_running_statistics]:
        keys = [key for key in state if key.startswith(f"{part}.")]
        for key in [] if any("running_" in key for key in keys) else keys:
            if key.endswith(".norm.weight"):
                layer = key.removesuffix(".weight")
                state[f"{layer}.running_mean"] = torch.zeros_like(state[key])
                state[f"{layer}.running_var"] = torch.ones_like(state[key])


def _refuse_unknown(reader: Reader, unused: list[str]) -> None:
    """Raise CheckpointError for unknown tensors in a part that gndet reads: without them it computes something else."""
    toolkit = toolkit_of(reader.format)
    templates = (name if isinstance(name, str) else name.conv for name in FORMATS[toolkit].values())
    sections = {name.partition(".")[0] + "." for name in templates}
    prefixes = PREFIXES.get(reader.format) or PREFIXES.get(toolkit) or tuple(sections)
    strange = [key for key in unused if key.startswith(prefixes) and not HARMLESS.search(key)]
    if strange:
        named = ", ".join(f"{key} {list(reader.tensors[key].shape)}" for key in strange[:MAX_NAMED])
        raise CheckpointError(
            f"{reader.path}: {len(strange)} tensors of parts that gndet reads have no place in its model: {named}; "
            "expected a plain Faster or Mask R-CNN (ResNet with FPN, C4 or DC5), RetinaNet or FCOS; likely cause: a "
            "variant (deformable convolutions, squeeze-and-excitation, another pyramid or head)"
        )


def _drop_conv_biases(state: dict[str, Tensor], names: dict[str, str], path: str, model: ModelConfig) -> None:
    """Fold the biases of convolutions before a norm into BN's mean; Detectron's MSRA backbones have zero biases there.

    Those of a section with conv_bias stay.

    Raises CheckpointError if the norm is GN and the bias is not zero.
    """
    kept = tuple(f"{section}." for section, options in model if getattr(options, "conv_bias", False))
    for norm in [layer for layer in names if layer.endswith(".norm") and not layer.startswith(kept)]:
        conv = norm.removesuffix("norm") + "conv"
        bias = state.pop(f"{conv}.bias", None)
        if bias is None or not bias.any():
            continue
        if f"{norm}.running_mean" not in state:
            raise CheckpointError(f"{path}: {names[conv]} has a bias before {names[norm]}, a GN; expected none there")
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias


def _order_classes(state: dict[str, Tensor], format: str, cfg: SourceConfig, model: ModelConfig) -> int:
    """Put the background last, and pick COCO's 80 classes out of torchvision's 91 rows.  Returns K."""
    layers = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    rows = {layer: n for layer in layers if (n := class_rows(layer, model))}
    if not rows:
        return 0
    background_first = toolkit_of(format) in BACKGROUND_FIRST
    counts = {layer: len(state[f"{layer}.weight"]) // n for layer, n in rows.items()}
    scores = [layer for layer in rows if has_background(layer)]
    total = counts[scores[0]] if scores else next(iter(counts.values())) + (not background_first)
    sparse = format == "torchvision" and total == len(COCO_ROWS) != len(cfg.classes or ()) + 1
    gather = torch.tensor(CATEGORY_IDS) if sparse else None
    for layer, n in rows.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            tensor = state[key].unflatten(0, (-1, n))  # (classes, n, ...)
            if background_first:
                foreground = tensor[1:] if gather is None else tensor[gather]
                tensor = torch.cat([foreground, tensor[:1]]) if has_background(layer) else foreground
            state[key] = tensor.flatten(0, 1)
    return len(CATEGORY_IDS) if gather is not None else total - 1


def _classes(num: int, file: WeightFile, cfg: SourceConfig) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the class names from the user, the file's meta, or COCO if there are 80, and notes on them."""
    meta = file.extras.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    inner = meta.get("dataset_meta")
    inner = inner if isinstance(inner, dict) else {}
    named = cfg.classes or meta.get("CLASSES") or inner.get("CLASSES") or inner.get("classes")
    if not num:
        return None, []
    if isinstance(named, list | tuple) and named and all(isinstance(name, str) for name in named):
        if len(named) != num:
            where = "train.source.classes" if cfg.classes else "its meta"
            raise ConfigError(f"{file.path}: {where} names {len(named)} classes, its heads have {num}")
        return tuple(named), [f"classes: {', '.join(named[:MAX_NAMED])}{', ...' if num > MAX_NAMED else ''}"]
    if num == len(COCO_NAMES):
        return COCO_NAMES, ["classes: 80, assumed to be COCO's in COCO's order (if not, set train.source.classes)"]
    return None, [f"classes: {num} without names; name them with train.source.classes=[...], so that rows carry over"]


def _misfits(
    state: dict[str, Tensor], model: ModelConfig, parts: tuple[str, ...], num_classes: int, keys: dict[str, str]
) -> list[str]:
    """Return a line for each tensor of the parts that is absent or whose shape differs from the config's.

    keys: the file's key of each gndet key.
    """
    with torch.device("meta"):
        built = build_model(model, max(num_classes, 1)).state_dict()
    found, expected = (
        {
            key: list(tensor.shape) for key, tensor in tensors.items()
            if key.partition(".")[0] in parts and not key.endswith(".num_batches_tracked")
        }
        for tensors in (state, built)
    )  # fmt: skip
    return [
        f"{keys[key]} ({key} here): {found.get(key, 'absent')} in the file, expected {expected.get(key, 'none')}"
        for key in expected | found if found.get(key) != expected.get(key)
    ]  # fmt: skip


def _assumptions(format: str, facts: Facts, model: ModelConfig, parts: tuple[str, ...], fused: tuple[str, ...]) -> str:
    """Return one line that says what the file is assumed to be."""
    norms = model.part_norms()
    words = [
        *resnet.describe(model),
        f"norms {', '.join(sorted({norms[part].kind for part in parts if part in norms}))}",
        "BGR, converted to RGB in the stem" if facts.bgr else "RGB",
        f"mean {facts.mean}, std {facts.std} (RGB)",
        f"conventions {model.compat}",
        norms["backbone"].grouping if norms["backbone"].kind == "gn" else "",
        f"eps {norms['backbone'].eps:g}",
        f"stride in the {'1x1' if model.backbone.stride_in_1x1 else '3x3'}" if model.backbone.depth >= 50 else "",
        *(word for part in PARTS for word in part.describe(model, parts)),
        f"background row {'moved from first to last' if BACKGROUND.startswith(model.final_head) else 'left out'}"
        if toolkit_of(format) in BACKGROUND_FIRST and model.final_head in parts
        else "",
        f"the BN layers of {', '.join(fused)} are affine maps without statistics" if fused else "",
    ]
    return f"read as {facts.title}: " + ", ".join(filter(None, words))
