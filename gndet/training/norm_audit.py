"""What the norm layers of a model are, and what is wrong with them: `gndet norms`, and at every start of training."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from gndet.config.schema import Config
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import Sample
from gndet.evaluation.norm_statistics import measure, norm_layers
from gndet.evaluation.tables import text_table
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.norms.layers import GroupNorm
from gndet.training.optim import peak_learning_rate

SMALL_BATCH = 8  # images per GPU below which BN's statistics are noise: Wu & He 2018, figure 1
ANEW = ("new", "anew")  # origins of layers that the file gave nothing


class NormLayer(NamedTuple):
    """One norm layer."""

    name: str
    kind: str  # as NormConfig.kind
    channels: int
    groups: int | None  # None where there are none
    eps: float
    padding: str  # masked or plain
    trainable: bool
    weight_decay: float
    lr: float  # at the schedule's peak; 0 where it is not trained
    origin: str  # what train.weights gave it

    @property
    def per_group(self) -> int | None:
        """Channels per group."""
        return self.channels // self.groups if self.groups else None


class Audit(NamedTuple):
    """The norm layers of a model, with what may or must not be."""

    layers: list[NormLayer]
    warnings: list[str]
    errors: list[str]


def audit(
    model: DetectionModel, cfg: Config, norms: dict[str, str] | None, world: int, images: int | None = None
) -> Audit:
    """Look at a model's norm layers.

    model: built from cfg.model.  norms: what became of each layer that train.weights knew; None: not known.
    world: number of ranks.  images: computed at once, where train.images_per_gpu is auto.
    """
    lr = peak_learning_rate(cfg.train.optimizer, cfg.train.schedule, cfg.train.global_batch)
    parts, layers = cfg.model.part_norms(), []
    for name, module in norm_layers(model).items():
        trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        layers.append(NormLayer(
            name, parts[name.partition(".")[0]].kind, len(module.weight),
            groups=module.groups if isinstance(module, GroupNorm) else None, eps=module.eps,
            padding="masked" if getattr(module, "masked", False) else "plain", trainable=trainable,
            weight_decay=cfg.train.optimizer.norm_weight_decay if trainable else 0.0, lr=lr if trainable else 0.0,
            origin="unknown" if norms is None else norms.get(name, "new"),
        ))  # fmt: skip
    return Audit(layers, list(_warnings(model, layers, cfg, world, images)), list(_errors(model, layers, cfg)))


def _warnings(
    model: DetectionModel, layers: list[NormLayer], cfg: Config, world: int, images: int | None
) -> Iterable[str]:
    at_once = images or cfg.train.images_per_gpu
    for kind in ("bn", "sync_bn", "brn"):
        live = [layer for layer in layers if layer.kind == kind and layer.trainable]
        if live and kind == "sync_bn" and world == 1:
            yield f"{_some(live)}: sync_bn on one rank is plain BN"
        count = SMALL_BATCH if at_once == "auto" else at_once * (world if kind == "sync_bn" else 1)
        if live and count < SMALL_BATCH:
            yield (
                f"{_some(live)}: {kind} takes its statistics over {_count(count, 'image')}; below {SMALL_BATCH} they "
                "are noise (Wu & He 2018, figure 1); gn does not depend on that number"
            )
    anew = [layer for layer in layers if layer.kind == "frozen_bn" and layer.origin in ANEW]
    if fused := [layer for layer in anew if _untouched(model.get_submodule(layer.name))]:
        yield (
            f"{_some(fused)}: frozen_bn with untouched statistics (mean 0, variance 1) is the identity: "
            "nothing is normalised; train.weights brings statistics"
        )
    if decayed := [layer for layer in layers if layer.weight_decay]:
        yield (
            f"{_some(decayed)}: train.optimizer.norm_weight_decay: {decayed[0].weight_decay:g} pulls gamma and beta to "
            "0; recipes have 0 there (Detectron)"
        )
    if single := [layer for layer in layers if layer.kind == "gn" and layer.per_group == 1]:
        yield (
            f"{_some(single)}: groups of one channel are Instance Normalization; ImageNet error 28.4 %, with GN 24.1 % "
            "(Wu & He 2018, table 1)"
        )


def _errors(model: DetectionModel, layers: list[NormLayer], cfg: Config) -> Iterable[str]:
    frozen = {id(module) for part in model.backbone.frozen for module in part.modules()}
    anew = [layer for layer in layers if layer.origin in ANEW]
    if random := [layer for layer in anew if id(model.get_submodule(layer.name)) in frozen]:
        yield (
            f"{_some(random)}: frozen by model.backbone.freeze_at: {cfg.model.backbone.freeze_at} with random weights; "
            "set freeze_at=0, or train.norm_policy to one that brings the norms over"
        )
    shortest = min(*cfg.data.shortest_edge, cfg.data.shortest_edge_test)
    single = [layer for layer in layers if layer.per_group == 1]
    cells = _cells(model, shortest) if single else {}
    if alone := [layer for layer in single if cells[layer.name] == 1]:
        yield (
            f"{_some(alone)}: a group is one number on a picture of {shortest} x {shortest} pixels "
            "(data.shortest_edge, data.shortest_edge_test), so the result is beta whatever the picture; use fewer "
            "groups or larger pictures"
        )


def _cells(model: DetectionModel, side: int) -> dict[str, int | None]:
    """Return the least number of cells that each norm layer's statistics are taken over, on a square picture."""
    blank = Sample(
        torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 0, 0, dtype=torch.bool), key=0,
    )  # fmt: skip
    layers = measure(model, [collate([blank], 1)], nullcontext, None)
    return {layer.numbers["name"]: layer.numbers["elements"] for layer in layers}


def _untouched(norm: nn.Module) -> bool:
    return not norm.running_mean.any() and bool(torch.all(norm.running_var == 1))


def _some(layers: list[NormLayer]) -> str:
    return layers[0].name if len(layers) == 1 else f"{len(layers)} norm layers from {layers[0].name} on"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def audit_table(audit: Audit) -> str:
    """Return a line for each norm layer, in aligned columns."""
    rows = [["layer", "kind", "channels", "groups", "a group", "eps", "padding", "trained", "decay", "lr", "origin"]]
    for layer in audit.layers:
        sizes = [layer.channels, layer.groups or "-", layer.per_group or "-", f"{layer.eps:.3g}", layer.padding]
        training = ["yes" if layer.trainable else "no", f"{layer.weight_decay:g}", f"{layer.lr:g}", layer.origin]
        rows.append([layer.name, layer.kind, *map(str, sizes), *training])
    return text_table(rows, left=range(len(rows[0])))


def summary(audit: Audit) -> list[str]:
    """A line for each kind of norm layer in the model, then the warnings."""
    groups: dict[tuple[object, ...], list[NormLayer]] = {}
    for layer in audit.layers:
        part = layer.name.partition(".")[0]
        groups.setdefault((part, layer.kind, layer.padding, layer.trainable, layer.origin), []).append(layer)
    lines = []
    for (part, kind, padding, trainable, origin), members in groups.items():
        sizes, eps = {layer.per_group for layer in members} - {None}, {layer.eps for layer in members}
        words = [f"norm of {part}: {len(members)} {kind}", padding]
        if sizes:
            few = f"{min(sizes)} to " if len(sizes) > 1 else ""
            words.append(f"{few}{_count(max(sizes), 'channel')} a group")
        words.append(f"eps {min(eps):.2g}{f' to {max(eps):.2g}' if len(eps) > 1 else ''}")
        words.append(f"weight decay {members[0].weight_decay:g}, lr {members[0].lr:g}" if trainable else "not trained")
        lines.append(", ".join([*words, origin]))
    return lines + [f"warning: {text}" for text in audit.warnings]
