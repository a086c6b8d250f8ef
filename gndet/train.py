"""Train a model: `train(cfg)` reads from top to bottom.  An update is an optimizer step over global_batch images."""

import math
import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from torch import nn

import gndet
from gndet.config.schema import Config
from gndet.data.batches.stream import Loaded, Replay, micro_batches, train_batches
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import limit_waiting, process
from gndet.distributed.signals import StopSignals
from gndet.evaluation.batch_norm import population_statistics
from gndet.training.checkpointing import Saver
from gndet.training.ending import finish, marked, rescued, stopped_early
from gndet.training.log import Log
from gndet.training.nonfinite import pass_over
from gndet.training.norms import NormWatch
from gndet.training.optim import learning_rate, total_updates
from gndet.training.run import Meter, Progress, Run
from gndet.training.run_folder import STALLED, make_run, may_write, move_aside
from gndet.training.setup import set_up
from gndet.training.task import TASKS
from gndet.training.update import UpdateState, compute_gradients, make_update, read, reads_late
from gndet.training.validation import draw, drawing_may_fail, refuse_unreadable
from gndet.training.work_folder import locked


def train(
    cfg: Config,
    *,
    fresh: bool = False,
    console: Console | None = None,
    at_end: Callable[[Path], None] | None = None,
) -> dict[str, float]:
    """Train a model into the folder cfg.out, or resume an unfinished run of the same config.

    fresh: move an existing run aside and start over.  at_end: called on rank 0 with the folder when a run that has
    started ends, also after an error, but not after a signal.  Returns the metrics of the last evaluation,
    {"box/AP": ...} or {"top1": ...}.  Raises ConfigError, DataError, CheckpointError, TrainingError or OutputError, and
    Preempted after a signal; the progress is saved first.
    """
    out, total = Path(os.path.expanduser(cfg.out)), total_updates(cfg.train.schedule, cfg.train.global_batch)
    with ExitStack() as ending, ExitStack() as stack:
        stop = ending.enter_context(StopSignals())
        proc = stack.enter_context(process(cfg.device, cfg.deterministic, watched=True))
        watch = proc.watch
        assert watch is not None
        watch.stopping, watch.on_stop = (lambda: stop.asked), stop.ask
        # --- the run folder, the data, the model
        lock = ending.enter_context(ExitStack())  # until the report is written
        folder = lock.enter_context(locked(out, proc, may_write))
        with stopped_early(out, proc, stop):
            run, progress, size, notes = set_up(cfg, out, fresh, proc)
        if fresh:
            move_aside(out, proc)
            lock.close()
            folder = lock.enter_context(locked(out, proc, may_write))
        make_run(cfg, folder, proc)
        run = run._replace(out=folder)
        if proc.first:
            ending.enter_context(marked(folder, at_end, stop, console))
        watch.report = out / STALLED
        limit_waiting(proc, cfg.train.timeout_s)
        state, meter = UpdateState(), Meter(proc.device, cfg.train.global_batch)
        log = Log(
            folder, total_updates=total, first_update=progress.update, evaluation_due=progress.evaluation_due,
            console=console, enabled=proc.first,
        )  # fmt: skip
        stack.enter_context(log)
        for note in notes:
            log.message(note)
        saver = Saver(run, total, log.message, progress.best)
        stack.callback(saver.wait)
        stream = updates(run, progress.update, total, size, meter, log)
        stack.callback(lambda: stream.close())
        stack.enter_context(rescued(run, progress, state, total, saver, stop))
        with meter.pause():
            norms = NormWatch(run, log, progress)
        if progress.evaluation_due:
            with meter.pause():
                evaluate_and_save(run, progress, saver, log, stop, norms)
                saver.wait()  # before loader processes are forked
        # --- the loop
        update = progress.update
        while update < total:
            watch.at(update, "computing gradients")
            lr = learning_rate(update, cfg.train.optimizer, cfg.train.schedule, cfg.train.global_batch)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            batches = next(stream)
            share = compute_gradients(run, state, batches, size, stop)
            norms.observe(batches.taken)
            if update == 0 and proc.first:
                show_batches(run, batches.taken, log)
            if share.size < size:
                log.message(
                    f"update {update + 1}: out of memory with {size} images at once, continuing with {share.size}; "
                    "this does not change what is learned"
                )
            size = progress.images_at_once = share.size
            if share.skipped:
                note_unreadable(run, progress, batches.taken, log)
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), cfg.train.optimizer.clip_grad_norm or math.inf)
            update += 1
            make_update(run, state, share.losses, norm, due(update, cfg.train.eval_every, total))
            if reads_late(run) and not any(due(update, every, total) for every in intervals(cfg)):
                continue
            # --- learn which updates were finite; skip the first that was not, and go back to the one after it
            before = progress.update
            bad = read(run, state, progress)
            meter.updates += progress.update - before
            if bad is not None:
                is_last = progress.update + 1 == update
                saver.wait()  # before loader processes are forked
                taken = batches.taken if is_last else load_again(run, progress.update, size, meter, log)
                pass_over(run, progress, state, taken, bad, log)
                if not is_last:
                    stream.close()
                    stream = updates(run, progress.update, total, size, meter, log)
            # --- what is due: log, evaluate, save
            done = update = progress.update
            if folder.is_moved:
                stop.ask()  # all ranks save and stop before the next update
            if due(done, cfg.train.log_every, total):
                numbers = progress.take_means() | meter.read() | {"lr": lr, "images_at_once": size}
                log.train(done, numbers | {"eta_s": meter.seconds_per_update * (total - done)})
            if due(done, cfg.train.eval_every, total):
                with meter.pause():
                    evaluate_and_save(run, progress, saver, log, stop, norms)
            elif due(done, cfg.train.checkpoint_every, total):
                with meter.pause():
                    saver.save(progress)
        finish(run, progress, saver, log)
    return progress.values


def due(done: int, every: int, total: int) -> bool:
    """Return whether an action taken every `every` updates is due; at the end of the run every action is."""
    return done == total or (every > 0 and done % every == 0)


def intervals(cfg: Config) -> tuple[int, int, int]:
    """Return the intervals of log lines, evaluations and checkpoints, in updates."""
    return cfg.train.log_every, cfg.train.eval_every, cfg.train.checkpoint_every


def note_unreadable(run: Run, progress: Progress, taken: list[Loaded], log: Log) -> None:
    """Record the pictures that could not be read and were left out.

    Raises TrainingError on all ranks if there are more than data.max_unreadable.
    """
    mine = {skipped.image_id: skipped.reason for loaded in taken for skipped in loaded.skipped}
    known, num = progress.unreadable, len(run.train_set.records)
    for image_id, reason in (item for part in all_gather([mine], run.proc) for item in part[0].items()):
        if image_id not in known:
            known[image_id] = reason
            log.message(f"image {image_id} cannot be read, another takes its place ({len(known)} of {num}): {reason}")
    refuse_unreadable(run, "training", run.train_set, known)


def evaluate_and_save(
    run: Run, progress: Progress, saver: Saver, log: Log, stop: StopSignals, norms: NormWatch
) -> None:
    """Evaluate the current weights, measure the norm layers, and save a checkpoint of what was evaluated."""
    saver.wait()  # before loader processes are forked
    with population_statistics(
        run.detector, lambda: run.train_set, run.cfg, run.proc, run.autocast, stop.at_once, log.message
    ):
        values = TASKS[run.cfg.task].evaluate(run, progress.update, log, stop)
        norms.measure(progress.update)
        progress.evaluated(values)
        saver.save(progress)


def updates(run: Run, start: int, stop: int, size: int, meter: Meter, log: Log) -> Generator[Replay, None, None]:
    """Yield this rank's batches of `size` images for each update from start to stop - 1; meter times the waiting."""
    cfg, proc = run.cfg, run.proc
    batches = train_batches(
        run.train_set, cfg.data, seed=cfg.seed, start=start, stop=stop, images_per_gpu=size,
        global_batch=cfg.train.global_batch, rank=proc.rank, world=proc.world, masks=cfg.model.masks,
        pin_memory=proc.device.type == "cuda", notify=log.message,
    )  # fmt: skip
    count = len(micro_batches(cfg.train.global_batch, size, proc.rank, proc.world))
    with closing(batches):
        for _ in range(start, stop):
            yield Replay(lambda: meter.wait_for(batches), count)


def load_again(run: Run, update: int, size: int, meter: Meter, log: Log) -> list[Loaded]:
    """Load this rank's batches of an earlier update (0, 1, ...) again."""
    with closing(updates(run, update, update + 1, size, meter, log)) as stream:
        batches = next(stream)
        list(batches)  # loads them
        return batches.taken


def show_batches(run: Run, taken: list[Loaded], log: Log) -> None:
    """Log the first training pictures to TensorBoard, as the network receives them."""
    places = [(loaded, place) for loaded in taken for place in range(len(loaded.image_ids))]
    for i, (loaded, place) in enumerate(places[: run.cfg.train.vis_images]):
        with drawing_may_fail(f"train/{i}", log):
            log.picture(0, f"train/{i}", draw(loaded, place, run.train_set.classes))


class _CallableModule(ModuleType):
    """Make `gndet.train(...)` a call: once this module is imported, the package's attribute `train` is the module."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Train as the command line does: `train_run` in gndet/cli/train.py."""
        return gndet.train_run(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
