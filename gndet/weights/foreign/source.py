"""What a file of another toolkit holds, in gndet's names, with everything that its numbers silently assume.

A `Source` has tensors by gndet's names, the ModelConfig under which they compute what they computed there, the classes,
and the assumptions in words. K classes; row 0 is the background's in torchvision, Detectron and maskrcnn-benchmark,
the last row in detectron2, mmdetection and gndet.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from gndet.config.schema import Config, ModelConfig, SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.weights.foreign.describe import FACTS, Facts, Reader, infer_config
from gndet.weights.foreign.files import MAX_NAMED, WeightFile, first_few
from gndet.weights.foreign.formats import facts_of, format_of, renamed
from gndet.weights.foreign.names import BACKGROUND, CLASS_ROWS, STEM, layer_names, theirs

PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
COCO_ROWS = 91  # torchvision's COCO models: the background and the ids 1..90
# facts of COCO's instances_train2017.json, for files that know numbers only
COCO_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
COCO_NAMES = tuple(name.strip() for name in COCO_CLASSES.split(","))
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 1..90, the ids that no class has
CATEGORY_IDS = tuple(id for id in range(1, 91) if id not in UNUSED_IDS)
STATISTICS = ("running_mean", "running_var")


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

    cfg: what the user states about it.  origin: the weight name it was fetched by, if any.
    Raises CheckpointError where the format is unknown, a layer or half a part is missing, or the model is none of
    gndet's (C4, grouped or deep-stem ResNets, class-agnostic boxes), naming keys and shapes.
    """
    tensors = renamed(file.tensors)
    format = format_of(file, tensors, cfg)
    facts = facts_of(format, file, tensors, cfg)
    reader = Reader(str(file.path), format, tensors)
    model, parts = infer_config(reader, facts, cfg, origin or file.path.name)
    names = layer_names(format, model, parts)
    keys = {f"{layer}.{key}": theirs(format, name, key) for layer, name in names.items() for key in PARAMETERS}
    state = {own: tensors[key] for own, key in keys.items() if key in tensors}
    known = set(keys.values())
    unused = [key for key in tensors if key not in known]
    for part in [part for part in parts if model.part_norms()[part].has_running_statistics]:
        _complete_fused(state, [name for name in names if name.startswith(f"{part}.") and name.endswith(".norm")])
    fused = fused_parts(state, parts)
    _drop_conv_biases(state, names, str(file.path))
    if facts.bgr:
        state[STEM] = state[STEM].flip(1)
    num_classes = _order_classes(state, format, facts, cfg)
    classes, notes = _classes(num_classes, file, cfg)
    notes = [_assumptions(facts, model, parts, fused), *notes]
    _check_whole(state, model, parts, num_classes, reader)
    _refuse_strangers(reader, unused)
    ids = CATEGORY_IDS if classes == COCO_NAMES else None
    return Source(
        str(file.path), format, state, model, parts, classes, num_classes, fused, notes, unused, category_ids=ids
    )


# --- adapting, exactly


def _complete_fused(state: dict[str, Tensor], layers: list[str]) -> None:
    """Give affine layers of a part the identity's statistics where the file has none at all."""
    if any(f"{layer}.{key}" in state for layer in layers for key in STATISTICS):
        return
    for layer in [layer for layer in layers if f"{layer}.weight" in state]:
        state[f"{layer}.running_mean"] = torch.zeros_like(state[f"{layer}.weight"])
        state[f"{layer}.running_var"] = torch.ones_like(state[f"{layer}.weight"])


def fused_parts(state: dict[str, Tensor], parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parts whose BN layers all have mean 0 and variance 1: gamma and beta hold the real statistics."""

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
    """Fold biases of convolutions before a norm, which are zero in Detectron's MSRA backbones, into BN's mean.

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
    counts = {
        layer: len(state[f"{layer}.weight"]) // n for layer, n in CLASS_ROWS.items() if f"{layer}.weight" in state
    }
    if not counts:
        return 0
    total = counts.get(BACKGROUND, counts.get("mask_head.logits", 0) + (not facts.background_first))
    sparse = format == "torchvision" and total == COCO_ROWS and len(cfg.classes or ()) != COCO_ROWS - 1
    gather = torch.tensor(CATEGORY_IDS) if sparse else None
    for layer, n in CLASS_ROWS.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key not in state:
                continue
            tensor = state[key].unflatten(0, (-1, n))  # (classes, n, ...)
            if facts.background_first:
                foreground = tensor[1:] if gather is None else tensor[gather]
                tensor = torch.cat([foreground, tensor[:1]]) if layer == BACKGROUND else foreground
            state[key] = tensor.flatten(0, 1)
    return len(CATEGORY_IDS) if gather is not None else total - 1


def _classes(num: int, file: WeightFile, cfg: SourceConfig) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the names of the classes by the user, the file's meta, or COCO where there are 80, and notes on them."""
    meta = file.extras.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    inner = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    named = cfg.classes or meta.get("CLASSES") or inner.get("CLASSES") or inner.get("classes")
    if not num:
        return None, []
    if isinstance(named, list | tuple) and named and all(isinstance(name, str) for name in named):
        if len(named) != num:
            where = "train.source.classes" if cfg.classes else "its meta"
            raise ConfigError(f"{file.path}: {where} names {len(named)} classes, its heads have {num}")
        return tuple(named), [f"classes: {', '.join(named[:MAX_NAMED])}{', ...' if num > MAX_NAMED else ''}"]
    if num == len(COCO_NAMES):
        return COCO_NAMES, ["classes: 80, taken for COCO's in COCO's order (train.source.classes states others)"]
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
        cause = "likely cause: a part of the file is missing, or it is a variant of the model that gndet does not have"
        lines = "\n  ".join([*first_few(wrong), cause])
        raise CheckpointError(
            f"{reader.path}: {len(wrong)} tensors of a {FACTS[reader.format].title} model:\n  {lines}"
        )


def _assumptions(facts: Facts, model: ModelConfig, parts: tuple[str, ...], fused: tuple[str, ...]) -> str:
    """Say in one line what the file is taken for."""
    norms = sorted({norm.kind for norm in model.part_norms().values()})
    stride = "1x1" if model.backbone.stride_in_1x1 else "3x3"
    order = "BGR, turned to RGB in the stem" if facts.bgr else "RGB"
    words = [
        f"taken for {facts.title}: ResNet-{model.backbone.depth}, norms {', '.join(norms)}", f"{order}",
        f"mean {facts.mean}, std {facts.std} (RGB)", f"conventions {model.compat}",
    ]  # fmt: skip
    norm = model.part_norms()["backbone"]
    if norm.kind == "gn":
        words.append(norm.grouping)
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
