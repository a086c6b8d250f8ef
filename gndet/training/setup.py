"""Set up a new or resumed run: data, model, optimizer, checkpoint state, images at once, compiled graphs.

train.compile makes one graph per canvas and number of images, all before the first update.  So no rank waits for a
compilation later, and a failure is reported before anything is written.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gndet.checkpoint import Checkpoint
from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.config.training import TrainConfig
from gndet.data.batches.batch import largest_batch
from gndet.data.batches.stream import micro_batches
from gndet.data.datasets.fingerprints import fingerprints
from gndet.distributed.collectives import all_gather, broadcast
from gndet.distributed.neighbors import core_time, taken_by_others
from gndet.distributed.process import Process, has_bf16, place
from gndet.errors import ConfigError, DataError, TrainingError, out_of_memory
from gndet.modeling.norms.triton_kernels import trouble as norm_trouble
from gndet.modeling.recompute import set_memory
from gndet.ops.matching_kernels import trouble as match_trouble
from gndet.ops.nms_kernels import trouble as nms_trouble
from gndet.ops.roi_align_kernels import trouble as roi_align_trouble
from gndet.training.averaging import WeightAverage
from gndet.training.batch_size import enough_memory, images_at_once
from gndet.training.checkpointing import restore, room_for_checkpoints
from gndet.training.memory import release
from gndet.training.norms import audit, summary
from gndet.training.optim import make_optimizer
from gndet.training.run import Progress, Run
from gndet.training.run_folder import find_run
from gndet.training.side_by_side import image_threads
from gndet.training.task import TASKS
from gndet.training.update import backward, buckets_for, clear_gradients, running_statistics
from gndet.training.work_folder import WorkFolder


def set_up(cfg: Config, out: Path, fresh: bool, proc: Process) -> tuple[Run, Progress, int, list[str]]:
    """Read, check and build everything, and load the newest checkpoint if there is one.

    Returns the run, its progress, the number of images at once, and lines to log.
    """
    options = cfg.model_dump(mode="json", exclude={"device": True, "data": {"root", "cache", "workers"}})
    since = core_time()
    refuse_difference({"config": options}, out, proc)  # before ranks could do different things
    saved, notes = find_run(cfg, out, fresh, proc)
    run, built = build_run(cfg, out, proc, saved)
    notes, progress = [*built, *notes], Progress()
    if saved is not None:
        progress, changed = restore(run, saved)
        progress.unreadable = all_gather([still_unreadable(run, progress)], proc)[0][0]
        total = saved.meta["total_updates"]
        notes += [f"continuing after update {progress.update} of {total} ({saved.path})", *changed]
    checkpoint = None if saved is None else f"{saved.path.name}, update {progress.update}"
    refuse_difference({"checkpoint": checkpoint, "data": run.data}, out, proc)
    size, saved_size = images_at_once(run), progress.images_at_once
    if saved is not None and saved.meta["asked"]["train"]["images_per_gpu"] == cfg.train.images_per_gpu:
        size = min(size, saved_size or size)  # memory ran out with more images before
        if saved_size > size:
            notes.append(f"not bit-exact from here on: images at once {saved_size} -> {size}")
    notes += summary(audit(run.model, run.cfg, run.norms, proc.world, images=size))
    notes += compile_ahead(run, size)
    existing = next(folder for folder in (out, *out.absolute().parents) if os.path.isdir(folder))
    notes += filter(None, [room_for_checkpoints(run, shutil.disk_usage(existing).free)])
    notes.append(
        f"{cfg.train.global_batch} images per update over {proc.world} rank(s) on {proc.device.type}, {size} at once"
    )
    notes += float32_notes(cfg.train.precision, proc.device)
    if proc.world == 1 and (taken := taken_by_others(since)):
        notes.append(f"{taken}; updates take longer")
    return run, progress, size, notes


def refuse_difference(mine: dict[str, Any], out: Path, proc: Process) -> None:
    """Raise TrainingError, on all ranks, if one of them has another value than rank 0; mine: values by name.

    Each rank reads its own files, so on machines without a shared disk the gradients of two runs could be summed.
    """
    by_rank = [part[0] for part in all_gather([mine], proc)]
    for rank, other in enumerate(by_rank):
        if wrong := [name for name in mine if other[name] != by_rank[0][name]]:
            raise TrainingError(
                f"{out}: rank {rank} differs from rank 0 in its {' and '.join(wrong)}; all ranks need the "
                "same config and data, and one folder `out` on a shared disk"
            )


def still_unreadable(run: Run, progress: Progress) -> dict[int, str]:
    """Return the pictures left out before the run stopped that still cannot be read, with the reason."""
    left_out, found = [record for record in run.train_set.records if record.image_id in progress.unreadable], {}
    for record in left_out:
        try:
            record.load()
        except DataError as error:
            found[record.image_id] = str(error)
    return found


def build_run(cfg: Config, out: Path, proc: Process, saved: Checkpoint | None) -> tuple[Run, list[str]]:
    """Read the data, build the model, load the weights to fine-tune.  Returns the run and lines to log."""
    task = TASKS[cfg.task]
    train_set, val_set, notes = task.read(cfg)
    asked = cfg
    if saved is not None:  # norm_policy: hybrid changed the norms when the run started
        cfg = cfg.model_copy(update={"model": config_from_dict(saved.meta["config"], str(saved.path)).model})
    model, cfg, loaded, fates = task.build(
        cfg, train_set.classes, load=saved is None, images=train_set, measure=proc.first
    )
    model.backbone.check()
    norms = {name: fate.what for name, fate in fates.items()} if saved is None else saved.meta["norms"]
    notes += loaded
    with enough_memory(model, cfg, proc):
        model, autocast = place(model.train(), cfg.train.precision, proc)
        set_memory(model, cfg.train.memory)
        model.choose_convolutions(cfg.data.smallest_edge)
        notes += slower_operators(proc.device)
        broadcast(model.state_dict().values(), proc)  # they are equal already, unless the machines differ
        average = WeightAverage(model, cfg.train.ema) if cfg.train.ema else None
        optimizer, buckets = make_optimizer(cfg.train.optimizer, model), buckets_for(cfg, model, proc)
    notes.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, norm {cfg.model.norm.kind}")
    report = audit(model, cfg, norms, proc.world)
    if report.errors:
        raise ConfigError("\n".join(report.errors))
    data = fingerprints(train_set, val_set, cfg.model.masks)
    run = Run(
        cfg, asked, WorkFolder(out), proc, train_set, val_set, model, average, optimizer, autocast, data, norms,
        compiled(model, cfg.train, proc.device), buckets, image_threads(cfg, model, proc),
    )  # fmt: skip
    if run.threads > 1:
        torch.set_num_threads(1)  # operators leave the other cores to the other images; `process` undoes this
        notes.append(f"{run.threads} images side by side, each in a thread")
    return run, notes


def compiled(model: nn.Module, cfg: TrainConfig, device: torch.device) -> nn.Module:
    """Return the model, compiled if train.compile says so; compilation happens at the first call.

    Raises ConfigError for what a CPU does not support: reduce-overhead, and memory_limit_mib together with compile.
    """
    if cfg.compile == "none":
        return model
    if cfg.compile == "reduce-overhead" and device.type == "cpu":
        raise ConfigError("train.compile: reduce-overhead needs a GPU, but the device is cpu; use default or none")
    if cfg.memory_limit_mib is not None and device.type == "cpu":
        raise ConfigError(
            f"train.compile: {cfg.compile} fuses the operators whose tensors train.memory_limit_mib: "
            f"{cfg.memory_limit_mib:g} would count on a CPU; use only one of the two options"
        )
    return cast(nn.Module, torch.compile(model, dynamic=False, mode=cfg.compile))


def compile_ahead(run: Run, size: int) -> list[str]:
    """Compile graphs for all canvases and numbers of images of the run's micro-batches.  Returns a line to log.

    size: images at once.  Raises ConfigError if torch cannot compile here: no C++ compiler, no Triton.
    """
    cfg, proc = run.cfg, run.proc
    if cfg.train.compile == "none":
        return []
    nums = sorted({len(places) for places in micro_batches(cfg.train.global_batch, size, proc.rank, proc.world)})
    undo, began = running_statistics(run), time.monotonic()
    try:
        for canvas in cfg.data.canvases:
            data = cfg.data.model_copy(update={"canvases": (canvas,)})
            for num in nums:
                clear_gradients(run)
                batch = largest_batch(run.train_set, data, num, masks=cfg.model.masks)
                backward(run.forward, run.autocast, [batch], num, cfg)
    except RuntimeError as error:
        if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # importing it takes a second
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
            raise ConfigError(
                f"train.compile: {cfg.train.compile}: torch cannot compile the model here: {reason}; it needs a C++ "
                "compiler, and on a GPU also Triton; train.compile=none needs neither"
            ) from error
        if not out_of_memory(error):
            raise  # out of memory is not an error here: the first update meets it, too, and continues with fewer images
        release(proc.device)
        return ["out of memory while compiling ahead: the other graphs are compiled when they are needed"]
    finally:
        undo()
        run.model.zero_grad()
    graphs = f"{len(cfg.data.canvases)} canvas(es) of {' and '.join(map(str, nums))} image(s)"
    return [f"compiled for {graphs} in {time.monotonic() - began:.0f} s (train.compile: {cfg.train.compile})"]


def slower_operators(device: torch.device) -> list[str]:
    """Return a line to log for each kind of kernel that does not work on a GPU, so that torch's operators run."""
    if device.type == "cpu":
        return []
    kernels = {
        "group norm": norm_trouble,
        "NMS, which makes the GPU wait": nms_trouble,
        "RoIAlign, whose gradient differs from run to run": roi_align_trouble,
        "matching": match_trouble,
    }
    wrong = {what: trouble(device) for what, trouble in kernels.items()}
    words = "by torch's own operators: the kernels do not work on this GPU"
    return [f"{what} {words} ({reason})" for what, reason in wrong.items() if reason]


def float32_notes(precision: str, device: torch.device) -> list[str]:
    """Return a line to log if torch rounds the inputs of float32's convolutions to TF32, or bf16 is not the default."""
    if precision == "auto" and device.type == "cuda" and not has_bf16(device):
        return ["float32, because this GPU only emulates bf16; train.precision=bf16 uses it all the same"]
    if precision != "float32" or device.type == "cpu" or not torch.backends.cudnn.allow_tf32:
        return []
    return ["float32: convolutions use TF32 if the GPU has it, torch's default, unless NVIDIA_TF32_OVERRIDE=0 is set"]
