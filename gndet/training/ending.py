"""How a run ends: finished, stopped by a signal, or failed.  Its progress is saved first."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from gndet.checkpoint import BEST, LAST
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.distributed.watch import BEAT
from gndet.errors import GndetError, OutputError, Preempted, ProcessLost, TrainingError
from gndet.files import CLASSIFIED
from gndet.training.checkpointing import Saver
from gndet.training.log import Log
from gndet.training.run import Progress, Run
from gndet.training.run_folder import (
    BOARD,
    CONFIG,
    FAILED,
    METRICS,
    NONFINITE,
    PREDICTIONS,
    PREEMPTED,
    mark,
)
from gndet.training.update import UpdateState, read
from gndet.training.work_folder import WorkFolder


@contextmanager
def marked(
    out: WorkFolder, at_end: Callable[[Path], None] | None, stop: StopSignals, console: Console | None
) -> Iterator[None]:
    """Mark a run that an error ended, and call at_end(its folder), except after a signal, when there is no time.

    A signal that comes later breaks off at_end only: the run has ended.
    """

    def end() -> None:
        if at_end is None:
            return
        try:
            with stop.at_once():
                at_end(out.path)
        except Stop:
            text = f"no report was written, because a signal came; `gndet report {out}` writes it"
            with suppress(OSError):  # the terminal may be gone
                if console is not None:
                    console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        if not out.is_removed:
            with suppress(OutputError):  # the original error matters more
                mark(out.path, FAILED, f"{type(error).__name__}: {error}")
            end()
        raise
    end()


@contextmanager
def stopped_early(out: Path, proc: Process, stop: StopSignals) -> Iterator[None]:
    """Let a signal end a run that has not started, and mark the run; an error removes an earlier marker.

    Raises Preempted instead of Stop, on every rank if any of them was asked to stop.
    """
    when = "before its first update; earlier checkpoints are unchanged"
    try:
        with stop.at_once():
            yield
    except Stop:
        if proc.watch and proc.watch.another_failed():
            raise TrainingError(
                f"{out}: rank {proc.rank} was ended because another rank failed; see the error of that rank"
            ) from None
        raise preempted(out, when, stop, proc) from None
    except ProcessLost:
        time.sleep(2 * BEAT)  # if that rank left because it was asked to stop, its heartbeat says so
        if stop.asked and not (proc.watch and proc.watch.another_failed()):
            raise preempted(out, when, stop, proc) from None
        raise
    except GndetError:
        if proc.first:  # a scheduler must not keep restarting a run that cannot resume
            with suppress(OSError):
                (out / PREEMPTED).unlink(missing_ok=True)
        raise


@contextmanager
def rescued(
    run: Run, progress: Progress, state: UpdateState, total: int, saver: Saver, stop: StopSignals
) -> Iterator[None]:
    """Save the progress of a run that ends early for any reason; after a signal, also mark the run.

    Raises Preempted instead of Stop.
    """
    try:
        yield
    except Stop:
        keep(run, progress, state, saver)
        if run.out.is_moved and run.proc.first:
            raise run.out.error(f"after update {progress.update} of {total}", saver.failed) from None
        if saver.failed:
            raise TrainingError(
                f"stopped by a signal after update {progress.update}, not saved: {saver.failed}"
            ) from None
        when = f"after update {progress.update} of {total}, and saved"
        raise preempted(run.out.path, when, stop, run.proc) from None
    except BaseException:
        if progress.update or state.unread:
            keep(run, progress, state, saver)
        raise


def keep(run: Run, progress: Progress, state: UpdateState, saver: Saver) -> None:
    """Save a state that no checkpoint holds yet, unless an error interrupted an update."""
    if state.whole:
        read(run, state, progress)
    state.undo()
    if state.whole and not saver.holds(progress):
        saver.save(progress, at_once=True)


def preempted(out: Path, when: str, stop: StopSignals, proc: Process) -> Preempted:
    """Mark a run that a signal ended.  Returns the error to raise; its message is empty except on rank 0."""
    if not proc.first:
        return Preempted("", stop.status)
    mark(out, PREEMPTED, f"stopped by a signal {when}")
    return Preempted(f"{out}: stopped by a signal {when}; run the same command to continue", stop.status)


def finish(run: Run, progress: Progress, saver: Saver, log: Log) -> None:
    """Wait for the last checkpoint and say where the results are.  Raises if something could not be written."""
    saver.wait()
    if saver.failed:  # try again: the disk may have room now
        saver.save(progress, at_once=True)
    if run.out.is_moved and run.proc.first:
        raise run.out.error("the run is finished", saver.failed)
    if saver.failed:
        raise TrainingError(f"{run.out}: the run is finished, but its last checkpoint is missing: {saver.failed}")
    log.message(closing_words(run.out.path, progress, run.cfg.task))
    gone = [f"{name}: removed by another program" for name in (CONFIG, METRICS) if not os.path.lexists(run.out / name)]
    if lost := "; ".join(filter(None, [log.lost(), *(gone if run.proc.first else [])])):
        raise OutputError(f"{run.out}: the run is finished and saved, but these files are incomplete: {lost}")


def closing_words(out: Path, progress: Progress, task: str) -> str:
    """Return a text that says where the results are, what was left out, and what to do next."""
    best, pictures = out / BEST, (PREDICTIONS, "ground truth beside detections")
    if task == "classification":
        pictures = (CLASSIFIED, "the class of each validation picture")
    lines = [
        f"finished. best checkpoint  {best}   (last: {out / LAST})",
        f"          metrics          {out / METRICS}   (tensorboard --logdir {out / BOARD})",
    ]
    if os.path.lexists(out / pictures[0]):  # train.vis_images=0 draws none
        lines.append(f"          predictions      {out / pictures[0]}   ({pictures[1]})")
    if progress.unreadable:
        lines.append(
            f"left out: {len(progress.unreadable)} training image(s) that cannot be read: {progress.unreadable}"
        )
    if progress.nonfinite:
        lines.append(f"left out: {progress.nonfinite} update(s) that were not finite, see {out / NONFINITE}")
    lines.append(f"next:     gndet evaluate {best}")
    lines.append(f"          gndet predict {best} IMAGE_OR_FOLDER --out predictions")
    return "\n".join(lines)
