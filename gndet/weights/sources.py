"""What a file of another toolkit holds, in gndet's names, with everything that its numbers silently assume.

`read_source` gives a `Source`: tensors by gndet's names, the ModelConfig under which they compute what they computed
there, the classes, and the assumptions in words. C channels, K classes; row 0 is the background's in torchvision,
Detectron and maskrcnn-benchmark, the last row in detectron2, mmdetection and gndet.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from gndet.config import Config, ModelConfig, SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.mask_rcnn import build_model
from gndet.weights.coco_classes import CATEGORY_IDS, NAMES
from gndet.weights.describe import FACTS, NO_STD, RGB_MEAN, RGB_STD, Facts, Reader, describe
from gndet.weights.files import WeightFile
from gndet.weights.names import BATCH_NORMS, layer_names, theirs

PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
COCO_ROWS = 91  # torchvision's COCO models: the background and the ids 1..90
STATISTICS = ("running_mean", "running_var")
PIXEL = ("pixel_mean", "pixel_std")  # in files of early detectron2, in the order that the model takes
MAX_NAMED = 5


class Source(NamedTuple):
    """A weights file, understood."""

    path: str
    format: str
    state: dict[str, Tensor]  # by gndet's names
    model: ModelConfig
    parts: tuple[str, ...]  # of PARTS, those it holds
    classes: tuple[str, ...] | None  # None where the file does not tell
    num_classes: int
    fused: tuple[str, ...]  # parts whose BN layers are affine maps, their statistics gone
    notes: list[str]  # what was assumed and adapted, in words
    unused: list[str]  # its keys that gndet has no use for
    config: Config | None = None  # of a gndet checkpoint, the whole
    category_ids: tuple[int, ...] | None = None  # of its classes, where the file tells


MARKS = (  # a key that tells a format, the first that fits
    ("backbone.bottom_up.", "detectron2"),
    ("proposal_generator.", "detectron2"),
    ("roi_heads.box.feature_extractor.", "maskrcnn-benchmark"),
    ("backbone.body.stem.", "maskrcnn-benchmark"),
    ("backbone.body.", "torchvision"),
    ("roi_head.", "mmdetection"),
    ("neck.lateral_convs.", "mmdetection"),
    ("backbone.layer1.", "mmdetection"),
    ("stem.conv1.weight", "detectron2_backbone"),
    ("res2_0_branch2a_w", "detectron"),
    ("layer1.0.conv1.weight", "resnet"),
)

PREFIXES = {  # of the tensors of the parts that gndet reads
    "resnet": ("conv1.", "bn1.", "layer"),
    "torchvision": ("backbone.", "rpn.", "roi_heads."),
    "detectron2": ("backbone.", "proposal_generator.", "roi_heads."),
    "detectron2_backbone": ("stem.", "res"),
    "mmdetection": ("backbone.", "neck.", "rpn_head.", "roi_head."),
    "maskrcnn-benchmark": ("backbone.", "rpn.", "roi_heads."),
    "detectron": ("res", "fpn_", "head_conv", "conv_rpn", "rpn_"),
}
HARMLESS = re.compile(r"(^|\.)fc\.|keypoint|kps|anchor_generator|num_batches_tracked")  # classifiers, other heads


def understand(file: WeightFile, cfg: SourceConfig, origin: str = "") -> Source:
    """Name a file's tensors as gndet does and state what they assume.

    cfg: what the user knows better.  origin: the weight name it was fetched by, if any.
    Raises CheckpointError where the format is unknown, a layer or half a part is missing, or the model is none of
    gndet's (C4, grouped or deep-stem ResNets, class-agnostic boxes), naming keys and shapes.
    """
    tensors = _renamed(file.tensors)
    format = _format(file, tensors, cfg)
    facts = _facts(format, file, tensors, cfg)
    reader = Reader(str(file.path), format, tensors)
    model, parts = describe(reader, facts, cfg, origin or file.path.name)
    names = layer_names(format, model, parts)
    state, used = {}, set()
    for layer, name in names.items():
        for parameter in PARAMETERS:
            key = theirs(format, name, parameter)
            if key in tensors:
                state[f"{layer}.{parameter}"] = tensors[key]
                used.add(key)
    batch_norms = [part for part in parts if model.part_norms()[part].kind in BATCH_NORMS]
    for part in batch_norms:
        _complete_fused(state, [name for name in names if name.startswith(f"{part}.") and name.endswith(".norm")])
    fused = fused_parts(state, parts)
    _drop_conv_biases(state, names, str(file.path))
    notes = []
    if facts.bgr:
        state["backbone.stem.conv.weight"] = state["backbone.stem.conv.weight"].flip(1)
    num_classes = _order_classes(state, format, facts, cfg)
    classes, note = _classes(num_classes, file, cfg)
    notes += [_assumptions(facts, model, parts, fused), *note]
    _check_whole(state, model, parts, num_classes, reader)
    unused = [key for key in tensors if key not in used]
    _refuse_strangers(reader, unused)
    ids = CATEGORY_IDS if classes == NAMES else None
    return Source(
        str(file.path), format, state, model, parts, classes, num_classes, fused, notes, unused, category_ids=ids
    )


# --- which format


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give layers of older torchvision detectors their present names, which torchvision's own loading does too.

    BN of detectron2's MSRA backbones, which have Caffe2's names but for their norms, is renamed as Caffe2 does.
    """
    if "res_conv1_bn_gamma" in tensors:
        suffixes = {"_gamma": "_s", "_beta": "_b", "_running_mean": "_rm", "_running_var": "_riv"}
        pattern = rf"(?<=_bn)({'|'.join(suffixes)})$"
        return {re.sub(pattern, lambda match: suffixes[match[1]], key): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("backbone.body.") for key in tensors) or "backbone.body.stem.conv1.weight" in tensors:
        return tensors
    rules = (
        (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    )
    result = {}
    for key, tensor in tensors.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if match := re.match(r"^roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)$", key):
            key = f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
        result[key] = tensor
    return result


def _format(file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> str:
    """The format by the names of the tensors.  Raises CheckpointError where none fits, or another than was said."""
    found = next((format for mark, format in MARKS if any(key.startswith(mark) for key in tensors)), None)
    refuse = _unsupported(tensors)
    if refuse:
        raise CheckpointError(f"{file.path}: {refuse}")
    if found is None or cfg.format not in ("auto", found.removesuffix("_backbone")):
        expected = f"train.source.format: {cfg.format}" if cfg.format != "auto" else "a known format"
        keys = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:MAX_NAMED])
        raise CheckpointError(
            f"{file.path}: expected {expected}, its tensors are named as {found or 'in no format that gndet knows'}: "
            f"{keys}; read are gndet, torchvision, timm (ResNet), detectron2, Detectron, mmdetection, "
            "maskrcnn-benchmark"
        )
    return found


def _unsupported(tensors: dict[str, Tensor]) -> str:
    """Say why a model that is recognised cannot be built, or nothing."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    c4 = ("roi_heads.res5.", "conv_rpn_w", "roi_heads.box.feature_extractor.head.", "roi_head.shared_head.")
    if any(map(has, c4)) or (has("backbone.res2.") and has("proposal_generator.")):
        return "a C4 or DC5 model (no pyramid), which gndet does not have yet; its heads work on res4 or res5"
    if has("bbox_head.fc_cls") or (has("bbox_head.") and has("backbone.layer1.")):
        return (
            "a model of mmdetection 1 or a one-stage detector (bbox_head at the top); gndet reads the two-stage "
            "detectors of mmdetection 2 and later (roi_head.bbox_head)"
        )
    if has("conv1.0.weight") or has("backbone.stem.0."):
        return "a ResNet with a deep stem (three 3x3 convolutions, like resnet50d); gndet has the 7x7 stem only"
    if has("roi_heads.box_predictor.0.") or has("roi_head.bbox_head.0."):
        return "a cascade, which gndet does not have"
    return ""


def _facts(format: str, file: WeightFile, tensors: dict[str, Tensor], cfg: SourceConfig) -> Facts:
    """The customs of the format, then what this file says of itself, then what the user says."""
    facts = FACTS[format]
    if file.extras.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's ResNets
        facts = facts._replace(bgr=False, std=RGB_STD, msra=False)
    if "res_conv1_bn_riv" in tensors:  # Detectron's BN has no statistics; these are detectron2's MSRA backbones
        facts = facts._replace(mean=RGB_MEAN, compat="detectron2", frozen_eps=1e-5)
    if format == "detectron2" and all(key in tensors and tensors[key].numel() == 3 for key in PIXEL):
        mean, std = ([float(f"{x:.6g}") for x in tensors[key].flatten()] for key in PIXEL)  # as written, before float32
        bgr = mean[0] <= mean[2]  # blue is the darkest of ImageNet's means; BGR is the default
        order = slice(None, None, -1 if bgr else 1)
        facts = facts._replace(bgr=bgr, mean=tuple(mean[order]), std=tuple(std[order]))
    if format == "mmdetection":
        facts = _of_mmdetection(facts, file, any(".gn" in key for key in tensors))
    said = {
        "bgr": cfg.bgr, "mean": cfg.pixel_mean, "std": cfg.pixel_std, "msra": cfg.stride_in_1x1,
        "gn_msra": cfg.stride_in_1x1, "groups": cfg.groups, "channels_per_group": cfg.channels_per_group,
        "standardized": cfg.weight_standardization, "compat": cfg.compat,
    }  # fmt: skip
    return facts._replace(**{key: value for key, value in said.items() if value is not None})


def _of_mmdetection(facts: Facts, file: WeightFile, gn: bool) -> Facts:
    """What mmdetection's meta says; without it, GN models are taken for Detectron's backbones (BGR, std 1)."""
    meta = file.extras.get("meta")
    text = str(meta.get("config") or meta.get("cfg") or "") if isinstance(meta, dict) else ""
    if not text:
        return facts._replace(bgr=True, std=NO_STD) if gn else facts
    flip = re.search(r"(?:bgr_to_rgb|to_rgb)['\"]?\s*[=:]\s*(True|False)", text)
    numbers = {key: re.search(rf"\b{key}['\"]?\s*[=:]\s*\[([-\d.,\s]+)\]", text) for key in ("mean", "std")}
    if flip:
        facts = facts._replace(bgr=flip[1] == "False")
    for key, match in numbers.items():
        values = [float(word) for word in match[1].split(",") if word.strip()] if match else []
        if len(values) == 3:  # mmdetection states them in the order its model takes
            facts = facts._replace(**{key: tuple(values[::-1] if facts.bgr else values)})
    caffe = bool(re.search(r"style['\"]?\s*[=:]\s*['\"]caffe", text))
    groups = re.search(r"num_groups['\"]?\s*[=:]\s*(\d+)", text)
    per_group = re.search(r"channels_per_group['\"]?\s*[=:]\s*(\d+)", text)  # gndet's own exports
    return facts._replace(
        msra=caffe, gn_msra=caffe, groups=int(groups[1]) if groups else 32, standardized="ConvWS" in text,
        channels_per_group=int(per_group[1]) if per_group else None,
    )  # fmt: skip


# --- adapting, exactly


def _complete_fused(state: dict[str, Tensor], layers: list[str]) -> None:
    """Give affine layers of a part the identity's statistics where the file has none at all."""
    if any(f"{layer}.{key}" in state for layer in layers for key in STATISTICS):
        return
    for layer in [layer for layer in layers if f"{layer}.weight" in state]:
        state[f"{layer}.running_mean"] = torch.zeros_like(state[f"{layer}.weight"])
        state[f"{layer}.running_var"] = torch.ones_like(state[f"{layer}.weight"])


def fused_parts(state: dict[str, Tensor], parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts all of whose BN layers have mean 0 and variance 1: the real statistics went into gamma and beta."""

    def identity(layer: str) -> bool:
        mean, var = state[f"{layer}.running_mean"], state[f"{layer}.running_var"]
        return not mean.any() and bool((var == var[0]).all()) and abs(float(var[0]) - 1) < 1e-3

    layers = [key.removesuffix(".running_var") for key in state if key.endswith(".norm.running_var")]
    layers = [layer for layer in layers if f"{layer}.running_mean" in state]
    return tuple(
        part for part in parts
        if (own := [layer for layer in layers if layer.startswith(f"{part}.")]) and all(map(identity, own))
    )  # fmt: skip


def _refuse_strangers(reader: Reader, unused: list[str]) -> None:
    """Raise CheckpointError for unknown tensors inside a part that gndet reads: it would compute something else."""
    strange = [key for key in unused if key.startswith(PREFIXES[reader.format]) and not HARMLESS.search(key)]
    if strange:
        named = ", ".join(f"{key} {list(reader.tensors[key].shape)}" for key in strange[:MAX_NAMED])
        raise CheckpointError(
            f"{reader.path}: {len(strange)} tensors of parts that gndet reads have no place in its model: {named}; "
            "expected a plain ResNet-FPN Faster or Mask R-CNN; likely cause: a variant (deformable convolutions, "
            "squeeze-and-excitation, another pyramid or head)"
        )


def _drop_conv_biases(state: dict[str, Tensor], names: dict[str, str], path: str) -> None:
    """Put biases of convolutions before a norm, which Detectron's MSRA backbones have as zeros, into BN's mean.

    Raises CheckpointError where the norm is GN and the bias is not zero.
    """
    for norm in [layer for layer in names if layer.endswith(".norm")]:
        bias = state.pop(f"{norm.removesuffix('norm')}conv.bias", None)
        if bias is None or not bias.any():
            continue
        if f"{norm}.running_mean" not in state:
            conv = names[f"{norm.removesuffix('norm')}conv"]
            raise CheckpointError(f"{path}: {conv} has a bias before {names[norm]}, a GN; gndet has none there")
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias


def _order_classes(state: dict[str, Tensor], format: str, facts: Facts, cfg: SourceConfig) -> int:
    """Put the background last and take COCO's 80 classes out of torchvision's 91 rows.  Returns K."""
    rows = {"box_head.cls_score": 1, "box_head.bbox_pred": 4, "mask_head.logits": 1}
    counts = {layer: len(state[f"{layer}.weight"]) // n for layer, n in rows.items() if f"{layer}.weight" in state}
    if not counts:
        return 0
    total = counts.get("box_head.cls_score", counts.get("mask_head.logits", 0) + (not facts.background_first))
    sparse = format == "torchvision" and total == COCO_ROWS and len(cfg.classes or ()) != COCO_ROWS - 1
    gather = torch.tensor(CATEGORY_IDS) if sparse else None
    for layer, n in rows.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in state:
                continue
            tensor = state[key].unflatten(0, (-1, n))  # (classes, n, ...)
            if facts.background_first:
                foreground = tensor[1:] if gather is None else tensor[gather]
                tensor = torch.cat([foreground, tensor[:1]]) if layer == "box_head.cls_score" else foreground
            state[key] = tensor.flatten(0, 1)
    return len(CATEGORY_IDS) if gather is not None else total - 1


def _classes(num: int, file: WeightFile, cfg: SourceConfig) -> tuple[tuple[str, ...] | None, list[str]]:
    """The names of the classes, from the user, the file's meta, or COCO where there are 80."""
    meta = file.extras.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    inner = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    named = cfg.classes or meta.get("CLASSES") or inner.get("CLASSES") or inner.get("classes")
    if not num:
        return None, []
    if named and all(isinstance(name, str) for name in named):
        if len(named) != num:
            where = "train.source.classes" if cfg.classes else "its meta"
            raise ConfigError(f"{file.path}: {where} names {len(named)} classes, its heads have {num}")
        return tuple(named), [f"classes: {', '.join(named[:MAX_NAMED])}{', ...' if num > MAX_NAMED else ''}"]
    if num == len(NAMES):
        return NAMES, ["classes: 80, taken for COCO's in COCO's order (train.source.classes states others)"]
    return None, [f"classes: {num} without names; train.source.classes=[...] names them, so that rows carry over"]


def _check_whole(
    state: dict[str, Tensor], model: ModelConfig, parts: tuple[str, ...], num_classes: int, reader: Reader
) -> None:
    """Raise CheckpointError unless the parts that are there are there whole, with the shapes of their config."""
    with torch.device("meta"):
        expected = build_model(model, max(num_classes, 1)).state_dict()
    names = layer_names(reader.format, model, parts)
    wrong = []

    def there(key: str) -> str:
        layer, _, parameter = key.rpartition(".")
        return f"{theirs(reader.format, names[layer], parameter)} ({key} here)"

    for key, tensor in expected.items():
        if key.partition(".")[0] not in parts or key.endswith(".num_batches_tracked"):
            continue
        if key not in state:
            wrong.append(f"{there(key)}: absent from the file, expected {list(tensor.shape)}")
        elif state[key].shape != tensor.shape:
            wrong.append(f"{there(key)}: {list(state[key].shape)} in the file, expected {list(tensor.shape)}")
    wrong += [  # statistics without those of the first layer, by which the norm is told
        f"{there(key)}: {list(tensor.shape)} in the file, none expected"
        for key, tensor in state.items()
        if key not in expected and not key.endswith(".num_batches_tracked")
    ]
    if wrong:
        more = [f"and {len(wrong) - MAX_NAMED} more"] if len(wrong) > MAX_NAMED else []
        cause = "likely cause: a part of the file is missing, or it is a variant of the model that gndet does not have"
        lines = "\n  ".join([*wrong[:MAX_NAMED], *more, cause])
        raise CheckpointError(
            f"{reader.path}: {len(wrong)} tensors of a {FACTS[reader.format].title} model:\n  {lines}"
        )


def _assumptions(facts: Facts, model: ModelConfig, parts: tuple[str, ...], fused: tuple[str, ...]) -> str:
    """One line of what the file is taken for."""
    norms = sorted({norm.kind for norm in model.part_norms().values()})
    stride = "1x1" if model.backbone.stride_in_1x1 else "3x3"
    order = "BGR, turned to RGB in the stem" if facts.bgr else "RGB"
    words = [
        f"taken for {facts.title}: ResNet-{model.backbone.depth}, norms {', '.join(norms)}", f"{order}",
        f"mean {facts.mean}, std {facts.std} (RGB)", f"conventions {model.compat}",
    ]  # fmt: skip
    norm = model.part_norms()["backbone"]
    if norm.kind == "gn":
        words.append(
            f"{norm.channels_per_group} channels a group" if norm.channels_per_group else f"{norm.groups} groups"
        )
    words.append(f"eps {norm.eps:g}")
    if model.backbone.depth >= 50:
        words.append(f"stride in the {stride}")
    if "rpn" in parts:
        ratios = ", ".join(f"{ratio:g}" for ratio in model.rpn.aspect_ratios)
        words.append(
            f"anchor ratios {ratios}, RoIAlign {model.box_head.roi_align}, box deltas by class, fc over (C, H, W)"
        )
    if facts.background_first:
        words.append("background row moved from first to last")
    if fused:
        words.append(f"the BN layers of {', '.join(fused)} are affine maps without statistics")
    return ", ".join(words)
