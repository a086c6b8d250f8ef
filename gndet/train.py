"""Training: `train(cfg)` reads top to bottom. An update is one optimiser step over global_batch images."""

import hashlib
import itertools
import math
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from rich.console import Console
from torch import nn

import gndet
from gndet.checkpoint import CHECKPOINTS, Checkpoint, point, prune, save_checkpoint
from gndet.config import Config
from gndet.config_file import config_from_dict
from gndet.data import read_dataset
from gndet.data.batching import Replay, micro_batches, train_batches
from gndet.distributed import Process, any_process, gather, give_first_s, place, process, sum_gradients
from gndet.errors import ConfigError, GndetError, TrainingError
from gndet.evaluation import Evaluation, evaluate, save_results, scalars, table
from gndet.metrics import Meter, RunLog
from gndet.micro_batch import gradients, images_at_once
from gndet.optim import (
    average_weights,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    total_updates,
)
from gndet.run import Run
from gndet.run_folder import find_run, make_run
from gndet.structures import Dataset
from gndet.visualize import draw_detections, draw_ground_truth, grid, save_picture, side_by_side
from gndet.weights.audit import audit, summary
from gndet.weights.load import initial_model

PICTURE_THRESHOLD = 0.5  # score from which a detection is drawn


class Best(NamedTuple):
    """The evaluation that `best` points to."""

    score: float
    update: int


def train(cfg: Config, *, fresh: bool = False, console: Console | None = None) -> dict[str, float]:
    """Train a detector into the folder cfg.out; go on where an unfinished run of the same config stopped.

    fresh: move a run that is there aside and start anew.  Returns the metrics of the last evaluation, {"box/AP": ...}.
    Raises ConfigError, DataError, CheckpointError or TrainingError; what was saved before stays.
    """
    out = Path(cfg.out)
    with process(cfg.device, cfg.deterministic) as proc, stop_signals() as stopped:
        # --- the run folder, the data, the model
        saved, damaged = find_run(cfg, out, fresh, proc)
        run, notes = build_run(cfg, out, proc, saved)
        start, total = restore(run, saved), total_updates(cfg.train.schedule, cfg.train.global_batch)
        notes += [*damaged, f"continuing after update {start} of {total}"] if saved else []
        values, best = resumed_metrics(saved)
        size, meter = images_at_once(run), Meter(proc.device, cfg.train.global_batch)
        notes += summary(audit(run.model, run.cfg, run.norms, proc.world, images=size))
        notes.append(
            f"{cfg.train.global_batch} images an update over {proc.world} process(es) on {proc.device.type}, "
            f"{size} at once"
        )
        stream = zip(range(start, total), updates(run, start, total, size, meter), strict=True)
        make_run(cfg, out, fresh, proc)
        with open_log(run, total, start, console) as log:
            for note in notes:
                log.message(note)
            # --- the loop
            for update, batches in stream:
                lr = learning_rate(update, cfg.train.optimizer, cfg.train.schedule, cfg.train.global_batch)
                set_learning_rate(run.optimizer, lr)
                with kept(run, update, total, best, values):
                    losses, fitting = gradients(run, batches, size)
                if fitting < size:
                    log.message(
                        f"update {update + 1}: out of memory with {size} images at once, computed with {fitting} from "
                        "here on; what is learned does not change"
                    )
                    size = fitting
                sum_gradients(run.model, proc)
                meter.add(losses)
                norm = nn.utils.clip_grad_norm_(run.model.parameters(), cfg.train.optimizer.clip_grad_norm or math.inf)
                meter.check_finite(update, norm, out, proc)
                run.optimizer.step()
                if run.average is not None:
                    run.average.update_parameters(run.model)
                done = update + 1
                # --- what is due: log, evaluate, save
                stop = any_process(bool(stopped), proc)
                if due(done, cfg.train.log_every, total):
                    numbers = meter.read(proc) | {"lr": lr, "eta_s": meter.seconds_per_update * (total - done)}
                    numbers["images_at_once"] = size
                    log.train(done, numbers)
                evaluating = due(done, cfg.train.eval_every, total)
                if evaluating:
                    with kept(run, done, total, best, values), meter.pause():
                        values = scalars(evaluate_run(run, done, log))
                if evaluating or stop or due(done, cfg.train.checkpoint_every, total):
                    with meter.pause():
                        better = evaluating and (best is None or score(values) > best.score)
                        best = Best(score(values), done) if better else best
                        save(run, done, total, best, values, better)
                if stop and done < total:
                    log.message(f"stopped after update {done}; the same command goes on from {out}/last")
                    raise TrainingError(f"{out}: stopped by a signal after update {done} of {total}")
            if proc.first:
                log.message(closing_words(out, cfg))
    return values


def resumed_metrics(saved: Checkpoint | None) -> tuple[dict[str, float], Best | None]:
    """The metrics of the last evaluation before a checkpoint, and the best one so far."""
    if saved is None:
        return {}, None
    values = {name: math.nan if value is None else value for name, value in saved.meta["metrics"].items()}
    return values, None if saved.meta["best"] is None else Best(saved.meta["best"], saved.meta["best_update"])


def due(done: int, every: int, total: int) -> bool:
    """Whether something that happens every so many updates happens now; all happens at the end."""
    return done == total or (every > 0 and done % every == 0)


# --- checkpoints


def save(run: Run, done: int, total: int, best: Best | None, values: dict[str, float], better: bool) -> None:
    """Write a checkpoint after `done` updates, point last (and best) to it, remove old ones."""
    if not run.proc.first:
        return
    groups = {"model": run.model.state_dict(), "optimizer": optimizer_tensors(run.optimizer, run.model)}
    if run.average is not None:
        groups["ema"] = run.average.module.state_dict()
    meta = {
        "update": done, "total_updates": total, "best": best and best.score,
        "best_update": best and best.update, "processes": run.proc.world,
        "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},
        "config": run.cfg.model_dump(mode="json"), "asked": run.asked.model_dump(mode="json"),
        "norms": run.norms, "classes": list(run.train_set.classes),
        "category_ids": list(run.train_set.category_ids), "data": fingerprint(run.train_set), "versions": versions(),
    }  # fmt: skip
    folder = run.out / CHECKPOINTS / f"update-{done:07d}"
    save_checkpoint(folder, groups, meta)
    if better:
        point(run.out, "best", folder)
    point(run.out, "last", folder)
    prune(run.out, run.cfg.train.keep_last)


@contextmanager
def kept(run: Run, done: int, total: int, best: Best | None, values: dict[str, float]) -> Iterator[None]:
    """Save what was learned in `done` updates where what follows fails: a picture cannot be read, memory runs out."""
    try:
        yield
    except GndetError:
        if done:
            save(run, done, total, best, values, better=False)
        raise


def fingerprint(dataset: Dataset) -> str:
    """A hash of what is learned from: the images' ids and sizes, the objects' boxes and classes."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(np.array([record.image_id, *record.size, len(record.labels)]).tobytes())
        digest.update(record.boxes.tobytes() + record.labels.tobytes() + record.crowd.tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "gndet": gndet.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "threads": str(torch.get_num_threads()),
    }  # fmt: skip


# --- data, model, optimiser


def build_run(cfg: Config, out: Path, proc: Process, saved: Checkpoint | None) -> tuple[Run, list[str]]:
    """Read the data, build the model, load what it is fine-tuned from; with lines that say what was done."""
    train_set, val_set = read_dataset(cfg.data.train, cfg.data), read_dataset(cfg.data.val, cfg.data)
    if train_set.classes != val_set.classes:
        raise ConfigError(
            f"data: the classes of {train_set.name} ({', '.join(train_set.classes)}) are not those of "
            f"{val_set.name} ({', '.join(val_set.classes)}); data.classes chooses common ones"
        )
    notes = [
        f"{which}: {len(data.records)} images, {sum(len(r.labels) for r in data.records)} objects, "
        f"{len(data.classes)} classes from {data.name}"
        + "".join(f"; {count} {what}" for what, count in data.fixes.items())
        for which, data in (("train", train_set), ("val", val_set))
    ]
    asked = cfg
    if saved is not None:  # norm_policy: hybrid changed the norms when the run began
        cfg = cfg.model_copy(update={"model": config_from_dict(saved.meta["config"], str(saved.path)).model})
    model, cfg, loaded, fates = initial_model(
        cfg, train_set.classes, load=saved is None, images=train_set, measure=proc.first
    )
    norms = {name: fate.what for name, fate in fates.items()} if saved is None else saved.meta.get("norms")
    notes += loaded
    model, autocast = place(model.train(), cfg.train.precision, proc)
    give_first_s(model.state_dict().values(), proc)  # they are equal as it is, unless machines differ
    average = average_weights(model, cfg.train.ema) if cfg.train.ema else None
    optimizer = make_optimizer(cfg.train.optimizer, model)
    notes.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, norm {cfg.model.norm.kind}")
    report = audit(model, cfg, norms, proc.world)
    if report.errors:
        raise ConfigError("\n".join(report.errors))
    run = Run(cfg, asked, out, proc, train_set, val_set, model, average, optimizer, autocast, norms)
    return run, notes


def restore(run: Run, saved: Checkpoint | None) -> int:
    """Put a checkpoint's state into the run.  Returns the number of updates done."""
    if saved is None:
        return 0
    if tuple(saved.meta["classes"]) != run.train_set.classes:
        raise TrainingError(
            f"{saved.path}: trained for the classes {', '.join(saved.meta['classes'])}, the data now has "
            f"{', '.join(run.train_set.classes)}; choose another out=FOLDER"
        )
    if saved.meta["data"] != fingerprint(run.train_set):
        raise TrainingError(
            f"{saved.path}: trained on other images or objects than {run.train_set.name} now holds; put the data back, "
            "or choose another out=FOLDER with train.weights set to this run"
        )
    before, coupling = saved.meta.get("processes", run.proc.world), run.cfg.model.batch_coupling()
    if coupling and before != run.proc.world:
        raise TrainingError(
            f"{saved.path}: trained by {before} process(es), there are {run.proc.world} now, which would change what "
            f"is learned: {coupling}; go on with {before}, or choose another out=FOLDER"
        )
    if run.proc.first:  # a kill may have come before the links were set
        point(run.out, "last", saved.path)
        best = saved.path.with_name(f"update-{saved.meta['best_update'] or 0:07d}")
        if best.is_dir():
            point(run.out, "best", best)
    run.model.load_state_dict(saved.groups["model"])
    load_optimizer_tensors(run.optimizer, run.model, saved.groups["optimizer"])
    if run.average is not None:
        run.average.module.load_state_dict(saved.groups["ema"])
        run.average.n_averaged.fill_(saved.meta["update"])
    return int(saved.meta["update"])


def updates(run: Run, start: int, stop: int, size: int, meter: Meter) -> Iterator[Replay]:
    """This process's batches, of `size` images, of each update from start to stop - 1; meter times the waiting."""
    cfg, proc = run.cfg, run.proc
    batches = train_batches(
        run.train_set, cfg.data, seed=cfg.seed, start=start, stop=stop, images_per_gpu=size,
        global_batch=cfg.train.global_batch, rank=proc.rank, world=proc.world, masks=cfg.model.masks,
        pin_memory=proc.device.type == "cuda",
    )  # fmt: skip
    count = len(micro_batches(cfg.train.global_batch, size, proc.rank, proc.world))
    return (Replay(lambda: meter.wait_for(batches), count) for _ in range(start, stop))


# --- what is shown


def open_log(run: Run, total: int, start: int, console: Console | None) -> Any:
    """The run's log on the first process, one that says nothing on the others."""
    return RunLog(run.out, total_updates=total, first_update=start, console=console) if run.proc.first else Silence()


class Silence:
    """The log of a process that is not the first."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def evaluate_run(run: Run, done: int, log: Any) -> Evaluation:
    """Evaluate on the validation set; log numbers, pictures, and the detections as COCO results."""
    proc = run.proc
    share = len(range(proc.rank, len(run.val_set.records), proc.world))
    count = itertools.count(1)
    give_first_s(run.detector.buffers(), proc)  # BN's running statistics differ from process to process
    evaluation = evaluate(
        run.detector, run.val_set, run.cfg, device=proc.device, autocast=run.autocast, rank=proc.rank,
        world=proc.world, gather=partial(gather, proc=proc), on_image=lambda _: log.evaluating(next(count), share),
    )  # fmt: skip
    if proc.first:
        log.evaluation(done, scalars(evaluation), table(evaluation))
        save_results(run.out / "detections.json", evaluation.results)
        pictures = draw_examples(run, evaluation)
        for i, picture in enumerate(pictures):
            log.picture(done, f"val/{i}", picture)
        if pictures:
            save_picture(run.out / "predictions.png", grid(pictures, columns=2))
    return evaluation


def draw_examples(run: Run, evaluation: Evaluation) -> list[np.ndarray]:
    """The first validation images, ground truth beside detections."""
    pictures = []
    for record in run.val_set.records[: run.cfg.train.vis_images]:
        found = [one for one in evaluation.results if one["image_id"] == record.image_id]
        image, data = record.load(), run.val_set
        left = draw_ground_truth(image, record, data.classes)
        right = draw_detections(image, found, data.classes, data.category_ids, PICTURE_THRESHOLD)
        pictures.append(side_by_side(left, right, ("ground truth", "detections")))
    return pictures


def score(values: dict[str, float]) -> float:
    """What `best` means: mask AP, or box AP without masks; undefined counts as 0."""
    value = values.get("mask/AP", values["box/AP"])
    return 0.0 if math.isnan(value) else value


def closing_words(out: Path, cfg: Config) -> str:
    """Where to find what the run made, and what to do next."""
    best = out / "best"
    return "\n".join([
        f"finished. best checkpoint  {best}   (last: {out / 'last'})",
        f"          metrics          {out / 'metrics.jsonl'}   (tensorboard --logdir {out / 'tensorboard'})",
        f"          predictions      {out / 'predictions.png'}   (ground truth beside detections)",
        f"next:     gndet evaluate {best}",
        f"          gndet predict {best} IMAGE_OR_FOLDER --out predictions",
    ])  # fmt: skip


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the current update is finished and saved.

    A second signal ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
