"""What a run begins or goes on with: data read and checked, model and optimiser built, a checkpoint's state put in."""

import shutil
from pathlib import Path

from gndet.checkpoint import Checkpoint
from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.distributed.collectives import all_gather, broadcast
from gndet.distributed.process import Process, place
from gndet.errors import ConfigError, DataError, TrainingError
from gndet.modeling.norms.triton_kernels import trouble
from gndet.modeling.recompute import set_memory
from gndet.training.batch_size import images_at_once
from gndet.training.checkpointing import fingerprint, mask_fingerprint, restore, room_for_checkpoints
from gndet.training.compiling import compile_ahead, compiled
from gndet.training.norm_audit import audit, summary
from gndet.training.optim import average_weights, make_optimizer
from gndet.training.run import Progress, Run
from gndet.training.run_folder import find_run
from gndet.training.task import TASKS
from gndet.training.update import buckets_for


def set_up(cfg: Config, out: Path, fresh: bool, proc: Process) -> tuple[Run, Progress, int, list[str]]:
    """Read, check and build everything, or take it up from the newest checkpoint; nothing is written.

    Returns the run, its progress, the number of images at once, and what there is to say.
    """
    saved, notes = find_run(cfg, out, fresh, proc)
    run, built = build_run(cfg, out, proc, saved)
    notes, progress = [*built, *notes], Progress()
    if saved is not None:
        progress, changed = restore(run, saved)
        progress.unreadable = all_gather([still_unreadable(run, progress)], proc)[0][0]
        total = saved.meta["total_updates"]
        notes += [f"continuing after update {progress.update} of {total} ({saved.path})", *changed]
    refuse_difference(run, progress, saved)
    size, saved_size = images_at_once(run), progress.images_at_once
    if saved is not None and saved.meta["asked"]["train"]["images_per_gpu"] == cfg.train.images_per_gpu:
        size = min(size, saved_size or size)  # memory ran out with more before
        if saved_size > size:
            notes.append(f"not bit-exact from here on: images at once {saved_size} -> {size}")
    notes += summary(audit(run.model, run.cfg, run.norms, proc.world, images=size))
    notes += compile_ahead(run, size)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    notes += filter(None, [room_for_checkpoints(run, shutil.disk_usage(existing).free)])
    notes.append(
        f"{cfg.train.global_batch} images per update over {proc.world} rank(s) on {proc.device.type}, {size} at once"
    )
    return run, progress, size, notes


def refuse_difference(run: Run, progress: Progress, saved: Checkpoint | None) -> None:
    """Raise TrainingError, on all ranks, where one of them has another checkpoint, other data or another config.

    Each rank reads them for itself: on machines that do not share a disk, gradients of two runs would be summed.
    """
    cfg = run.cfg.model_dump(mode="json", exclude={"device": True, "data": {"root", "cache", "workers"}})
    mine = {
        "checkpoint": None if saved is None else f"{saved.path.name}, update {progress.update}", "data": run.data,
        "config": cfg,
    }  # fmt: skip
    every = [part[0] for part in all_gather([mine], run.proc)]
    for rank, other in enumerate(every):
        if wrong := [name for name in mine if other[name] != every[0][name]]:
            raise TrainingError(
                f"{run.out}: rank {rank} has another {' and another '.join(wrong)} than rank 0; all need the same "
                "config and data, and one folder `out` on a disk that they share"
            )


def still_unreadable(run: Run, progress: Progress) -> dict[int, str]:
    """Of the pictures that were left out before the run stopped, those that have not been mended since."""
    left_out, found = [record for record in run.train_set.records if record.image_id in progress.unreadable], {}
    for record in left_out:
        try:
            record.load()
        except DataError as error:
            found[record.image_id] = str(error)
    return found


def build_run(cfg: Config, out: Path, proc: Process, saved: Checkpoint | None) -> tuple[Run, list[str]]:
    """Read the data, build the model, load what it is fine-tuned from; with lines that say what was done."""
    task = TASKS[cfg.task]
    train_set, val_set, notes = task.read(cfg)
    asked = cfg
    if saved is not None:  # norm_policy: hybrid changed the norms when the run began
        cfg = cfg.model_copy(update={"model": config_from_dict(saved.meta["config"], str(saved.path)).model})
    model, cfg, loaded, fates = task.build(
        cfg, train_set.classes, load=saved is None, images=train_set, measure=proc.first
    )
    norms = {name: fate.what for name, fate in fates.items()} if saved is None else saved.meta["norms"]
    notes += loaded
    model, autocast = place(model.train(), cfg.train.precision, proc)
    set_memory(model, cfg.train.memory)
    model.choose_convolutions(min(cfg.data.shortest_edge))
    if proc.device.type == "cuda" and (wrong := trouble(proc.device)):
        notes.append(f"group norm by torch's own operators: the kernels do not work on this GPU ({wrong})")
    broadcast(model.state_dict().values(), proc)  # they are equal as it is, unless machines differ
    average = average_weights(model, cfg.train.ema) if cfg.train.ema else None
    optimizer = make_optimizer(cfg.train.optimizer, model)
    notes.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, norm {cfg.model.norm.kind}")
    report = audit(model, cfg, norms, proc.world)
    if report.errors:
        raise ConfigError("\n".join(report.errors))
    data = {"data": fingerprint(train_set), "val_data": fingerprint(val_set)}
    data["masks"] = mask_fingerprint(train_set) if cfg.model.masks else ""
    run = Run(
        cfg, asked, out, proc, train_set, val_set, model, average, optimizer, autocast, data, norms,
        compiled(model, cfg.train, proc.device), buckets_for(cfg, model, proc),
    )  # fmt: skip
    return run, notes
