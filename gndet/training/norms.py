"""The norm layers of a run: audited when it starts (and by `gndet norms`), measured at every evaluation.

Rank 0 writes RUN/norms.jsonl and TensorBoard's histograms.  A line describes the norm layers after `update` updates on
the first validation images: {"update": 500, "layers": [{"name": ...}, ...], "padding": 0.12}; padding: its fraction of
the training batches since the previous line.  RUN/norms-start.safetensors holds gamma and beta from the run's start.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from gndet.config.schema import Config
from gndet.data.batches.batch import collate
from gndet.data.batches.stream import Loaded
from gndet.data.batches.transforms import Sample, UnreadablePicture, test_sample
from gndet.errors import out_of_memory
from gndet.evaluation.norm_statistics import Start, affine, measure, norm_layers, rounded
from gndet.files import write_whole
from gndet.modeling.image_model import ImageModel
from gndet.structures import Batch
from gndet.text import text_table
from gndet.training.log import Log
from gndet.training.logged import Entry, Tell, is_norms, read_metrics, truncate
from gndet.training.memory import release
from gndet.training.optim import peak_learning_rate
from gndet.training.run import Progress, Run
from gndet.training.run_folder import NORMS, NORMS_START

MOST_IMAGES = 16  # if batches for BN need more than train.norm_images


class NormWatch:
    """Measures the norm layers of a run on rank 0; does nothing on other ranks."""

    def __init__(self, run: Run, log: Log, progress: Progress) -> None:
        """Drop what a killed run wrote after the point it resumes from; measure a new run at once.

        Raises OutputError if norms.jsonl cannot be written.
        """
        self._run, self._log = run, log
        self._cells = self._padded = 0  # pixels of the training batches' canvases
        self._on = run.proc.first and run.cfg.train.norm_images > 0 and bool(norm_layers(run.model))
        if run.proc.first:
            truncate(run.out / NORMS, progress.update or -1, progress.evaluation_due, log.message, is_norms)
        if progress.update == 0:
            self.measure(0)

    def observe(self, taken: Iterable[Loaded]) -> None:
        """Count how much of an update's canvases is padding."""
        for loaded in taken if self._on else ():
            images, sizes = loaded.batch.images, loaded.batch.sizes
            cells = len(images) * images.shape[2] * images.shape[3]
            self._cells += cells
            self._padded += cells - int(sizes.prod(1).sum())

    def measure(self, update: int) -> None:
        """Measure the norm layers and write the result.  A lack of memory or of disk space does not end the run."""
        if not self._on:
            return
        run, log = self._run, self._log
        if run.proc.watch:
            run.proc.watch.at(update, "measuring its norm layers")
        if update == 0:
            start = safetensors.torch.save(affine(run.model))
            log.attempt(NORMS_START, partial(write_whole, run.out / NORMS_START, start))
        try:
            layers = measure(run.model, self._images, run.autocast, read_start(run.out.path))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            log.message(f"norm report: out of memory at update {update}, no line is written: {error}")
            release(run.proc.device)
            return
        padding = rounded(self._padded / self._cells) if self._cells else None
        self._cells = self._padded = 0
        log.append(NORMS, {"update": update, "layers": [layer.numbers for layer in layers], "padding": padding})
        for layer in layers:
            log.histogram(update, f"norm/{layer.numbers['name']}/group_std", layer.group_std)
            log.histogram(update, f"norm/{layer.numbers['name']}/gamma", layer.gamma)

    @cached_property
    def _images(self) -> list[Batch]:
        """The first readable validation images: one by one, or for BN in batches of train.images_per_gpu."""
        cfg, num, size = self._run.cfg, self._run.cfg.train.norm_images, 1
        per_gpu = cfg.train.images_per_gpu  # a number, if norms mix images
        if isinstance(per_gpu, int) and any(norm.mixes_images for norm in cfg.model.part_norms().values()):
            size = min(per_gpu, MOST_IMAGES)
            num = min(max(num, 2 * size), MOST_IMAGES)
        samples: list[Sample] = []
        for record in self._run.val_set.records:
            if len(samples) == num:
                break
            try:
                samples.append(test_sample(record, cfg.data))
            except UnreadablePicture:  # the evaluation reports it
                continue
        parts = [samples[first : first + size] for first in range(0, len(samples), size)]
        full = [part for part in parts if len(part) == size] or parts  # BN never trains on a smaller batch
        return [collate(part, cfg.data.canvas_multiple, cfg.data.exact_canvas) for part in full]


def read_norms(folder: Path, tell: Tell | None = None) -> list[Entry]:
    """Read a run's norms.jsonl as `read_metrics` reads metrics.jsonl: a dict per line with update, layers, padding."""
    return read_metrics(folder / NORMS, tell, is_ours=is_norms)


def read_start(folder: Path) -> Start | None:
    """Read gamma and beta from the start of a run; None if they are unknown, or if gndet did not write the file."""
    path = folder / NORMS_START
    try:
        return safetensors.torch.load_file(path) if path.is_file() else None  # opening a pipe would wait
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError):  # KeyError: a type that torch lacks
        return None


SMALL_BATCH = 8  # images per GPU below which BN's statistics are noise: Wu & He 2018, figure 1
ANEW = ("new", "anew")  # origins of layers that got nothing from the weights file


class NormLayer(NamedTuple):
    """One norm layer."""

    name: str
    kind: str  # as NormConfig.kind
    channels: int
    groups: int | None  # None for norms without groups
    eps: float
    padding: str  # masked or plain
    trainable: bool
    weight_decay: float
    lr: float  # at the schedule's peak; 0 if not trained
    origin: str  # what it got from train.weights

    @property
    def per_group(self) -> int | None:
        """Channels per group."""
        return self.channels // self.groups if self.groups else None


class Audit(NamedTuple):
    """The norm layers of a model, with warnings and errors about them."""

    layers: list[NormLayer]
    warnings: list[str]
    errors: list[str]


def audit(model: ImageModel, cfg: Config, norms: dict[str, str] | None, world: int, images: int | None = None) -> Audit:
    """Check a model's norm layers.

    model: built from cfg.model.  norms: the origin of each layer that train.weights provides; None: unknown.
    world: number of ranks.  images: number computed at once, if train.images_per_gpu is auto.
    """
    lr = peak_learning_rate(cfg.train.optimizer, cfg.train.schedule, cfg.train.global_batch)
    parts, layers = cfg.model.part_norms(), []
    for name, module in norm_layers(model).items():
        trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        layers.append(NormLayer(
            name, parts[name.partition(".")[0]].kind, len(module.weight),
            groups=getattr(module, "groups", None), eps=module.eps,
            padding="masked" if getattr(module, "masked", False) else "plain", trainable=trainable,
            weight_decay=cfg.train.optimizer.norm_weight_decay if trainable else 0.0, lr=lr if trainable else 0.0,
            origin="unknown" if norms is None else norms.get(name, "new"),
        ))  # fmt: skip
    return Audit(layers, list(_warnings(model, layers, cfg, world, images)), list(_errors(model, layers, cfg)))


def _warnings(model: ImageModel, layers: list[NormLayer], cfg: Config, world: int, images: int | None) -> Iterable[str]:
    at_once = images or cfg.train.images_per_gpu
    for kind in ("bn", "sync_bn", "brn"):
        live = [layer for layer in layers if layer.kind == kind and layer.trainable]
        if live and kind == "sync_bn" and world == 1:
            yield f"{_name(live)}: sync_bn on one rank is plain BN"
        count = SMALL_BATCH if at_once == "auto" else at_once * (world if kind == "sync_bn" else 1)
        if live and count < SMALL_BATCH:
            yield (
                f"{_name(live)}: {kind} takes its statistics over {_count(count, 'image')}; below {SMALL_BATCH} they "
                "are noise (Wu & He 2018, figure 1); gn does not depend on this number"
            )
    anew = [layer for layer in layers if layer.kind == "frozen_bn" and layer.origin in ANEW]
    if identity := [layer for layer in anew if _untouched(model.get_submodule(layer.name))]:
        yield (
            f"{_name(identity)}: frozen_bn with untouched statistics (mean 0, variance 1) is the identity: "
            "nothing is normalized; load statistics with train.weights"
        )
    # ImageNet recipes decay gamma and beta, too (Wu & He 2018, 4.1)
    if (decayed := [layer for layer in layers if layer.weight_decay]) and cfg.task == "detection":
        yield (
            f"{_name(decayed)}: train.optimizer.norm_weight_decay: {decayed[0].weight_decay:g} pulls gamma and beta to "
            "0; published recipes use 0 (Detectron)"
        )
    if single := [layer for layer in layers if layer.kind == "gn" and layer.per_group == 1]:
        yield (
            f"{_name(single)}: groups of one channel are Instance Normalization; ImageNet error 28.4 %, with GN 24.1 % "
            "(Wu & He 2018, table 1)"
        )


def _errors(model: ImageModel, layers: list[NormLayer], cfg: Config) -> Iterable[str]:
    frozen = {id(module) for part in model.backbone.frozen for module in part.modules()}
    anew = [layer for layer in layers if layer.origin in ANEW]
    if random := [layer for layer in anew if id(model.get_submodule(layer.name)) in frozen]:
        yield (
            f"{_name(random)}: frozen by model.backbone.freeze_at: {cfg.model.backbone.freeze_at} with random weights; "
            "set freeze_at=0, or a train.norm_policy that keeps the norms of the weights"
        )
    tested = cfg.data.crop.tested if cfg.data.crop else cfg.data.shortest_edge_test
    shortest = min(cfg.data.smallest_edge, tested)
    single = [layer for layer in layers if layer.per_group == 1 and layer.kind != "frn"]  # FRN keeps a number's sign
    # the last maps of a detector with regions have more cells
    one = not cfg.model.region_heads and cfg.train.images_per_gpu == 1
    mixing = [layer for layer in layers if layer.trainable and layer.kind in ("bn", "sync_bn", "brn")] if one else []
    cells = _cells(model, shortest) if single or mixing else {}
    edge = "data.crop.size" if cfg.data.crop else "data.shortest_edge"
    if single_cell := [layer for layer in mixing if cells[layer.name] == 1]:
        yield (
            f"{_name(single_cell)}: {single_cell[0].kind} would take its statistics over one number on a picture of "
            f"{shortest} x {shortest} pixels ({edge}) and train.images_per_gpu: 1; use larger pictures or more images"
        )
    if alone := [layer for layer in single if cells[layer.name] == 1]:
        yield (
            f"{_name(alone)}: a group is one number on a picture of {shortest} x {shortest} pixels "
            f"({edge}, {edge}_test), so the result is beta for every picture; use fewer groups or larger pictures"
        )


def _cells(model: ImageModel, side: int) -> dict[str, int | None]:
    """Return the smallest number of cells per statistic of each norm layer, for a square picture."""
    blank = Sample(
        torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 0, 0, dtype=torch.bool), key=0,
    )  # fmt: skip
    layers = measure(model, [collate([blank], 1)], nullcontext, None)
    return {layer.numbers["name"]: layer.numbers["elements"] for layer in layers}


def _untouched(norm: Any) -> bool:
    return not norm.running_mean.any() and bool(torch.all(norm.running_var == 1))


def _name(layers: list[NormLayer]) -> str:
    return layers[0].name if len(layers) == 1 else f"{len(layers)} norm layers from {layers[0].name} on"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def audit_table(audit: Audit) -> str:
    """Return a table with a line per norm layer, in aligned columns."""
    rows = [["layer", "kind", "channels", "groups", "per group", "eps", "padding", "trained", "decay", "lr", "origin"]]
    for layer in audit.layers:
        sizes = [layer.channels, layer.groups or "-", layer.per_group or "-", f"{layer.eps:.3g}", layer.padding]
        training = ["yes" if layer.trainable else "no", f"{layer.weight_decay:g}", f"{layer.lr:g}", layer.origin]
        rows.append([layer.name, layer.kind, *map(str, sizes), *training])
    return text_table(rows, left=range(len(rows[0])))


def summary(audit: Audit) -> list[str]:
    """Return a line per kind of norm layer in each part of the model, then the warnings."""
    groups: dict[tuple[str, str, str, bool, str], list[NormLayer]] = {}
    for layer in audit.layers:
        part = layer.name.partition(".")[0]
        groups.setdefault((part, layer.kind, layer.padding, layer.trainable, layer.origin), []).append(layer)
    lines = []
    for (part, kind, padding, trainable, origin), members in groups.items():
        sizes = {layer.per_group for layer in members if layer.per_group is not None}
        eps = {layer.eps for layer in members}
        words = [f"norm of {part}: {len(members)} {kind}", padding]
        if sizes:
            least = f"{min(sizes)} to " if len(sizes) > 1 else ""
            words.append(f"{least}{_count(max(sizes), 'channel')} per group")
        words.append(f"eps {min(eps):.2g}{f' to {max(eps):.2g}' if len(eps) > 1 else ''}")
        words.append(f"weight decay {members[0].weight_decay:g}, lr {members[0].lr:g}" if trainable else "not trained")
        lines.append(", ".join([*words, origin]))
    return lines + [f"warning: {text}" for text in audit.warnings]
