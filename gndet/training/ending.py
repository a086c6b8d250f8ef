"""How a run ends: finished, stopped by a signal, or by an error; what was learned is saved first."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.distributed.watch import BEAT
from gndet.errors import GndetError, OutputError, Preempted, ProcessLost, TrainingError
from gndet.training.checkpointing import Saver
from gndet.training.run import Progress, Run
from gndet.training.run_folder import mark_failed, mark_preempted, unmark_preempted
from gndet.training.update import UpdateState


@dataclass
class Ending:
    """Whether the run has begun in the process that writes its folder."""

    begun: bool = False


@contextmanager
def marked(out: Path, at_end: Callable[[Path], None] | None) -> Iterator[Ending]:
    """Leave the marker with the error that ended a run that had begun, and call at_end(out).

    at_end is called after success and after an error, not after a signal, which leaves no time.
    """
    ending = Ending()
    try:
        yield ending
    except Preempted:
        raise
    except Exception as error:
        if ending.begun:
            mark_failed(out, f"{type(error).__name__}: {error}")
            if at_end is not None:
                at_end(out)
        raise
    if ending.begun and at_end is not None:
        at_end(out)


@contextmanager
def stopped_early(out: Path, proc: Process, stop: StopSignals) -> Iterator[None]:
    """Let a signal end a run that has not begun, and leave the marker; an error takes the marker of a past one away.

    Raises Preempted in place of Stop, in all processes where one was asked to stop.
    """
    when = "before its first update; what was saved before is as it was"
    try:
        with stop.at_once():
            yield
    except Stop:
        if proc.watch.another_failed():
            raise TrainingError(
                f"{out}: rank {proc.rank} was ended because another rank failed; see the error of that rank"
            ) from None
        raise preempted(out, when, stop, proc) from None
    except ProcessLost:
        time.sleep(2 * BEAT)  # perhaps it was asked to stop, and has left: that is told within a beat
        if stop.asked and not proc.watch.another_failed():
            raise preempted(out, when, stop, proc) from None
        raise
    except GndetError:
        unmark_preempted(out, proc)
        raise


@contextmanager
def rescued(
    run: Run, progress: Progress, state: UpdateState, total: int, saver: Saver, stop: StopSignals
) -> Iterator[None]:
    """Save what was learned when a run ends early, for whatever reason; after a signal, leave the marker.

    Raises Preempted in place of Stop.
    """
    try:
        yield
    except Stop:
        keep(progress, state, saver)
        if saver.failed:
            raise TrainingError(
                f"stopped by a signal after update {progress.update}, not saved: {saver.failed}"
            ) from None
        raise preempted(run.out, f"after update {progress.update} of {total}, and saved", stop, run.proc) from None
    except BaseException:
        if progress.update:
            keep(progress, state, saver)
        raise


def keep(progress: Progress, state: UpdateState, saver: Saver) -> None:
    """Save a state that no checkpoint holds yet; not one that an error left within an update."""
    state.undo()
    if state.whole and not saver.holds(progress):
        saver.save(progress, at_once=True)


def preempted(out: Path, when: str, stop: StopSignals, proc: Process) -> Preempted:
    """Leave the marker of a run that a signal ended.  Returns the error to raise, which the first process tells."""
    if not proc.first:
        return Preempted("", stop.status)
    mark_preempted(out, when)
    return Preempted(f"{out}: stopped by a signal {when}; the same command goes on", stop.status)


def finish(run: Run, progress: Progress, saver: Saver, log: Any) -> None:
    """Wait for the last checkpoint and say where everything is.  Raises where something could not be written."""
    saver.wait()
    if saver.failed:  # once more: the disk may have room again
        saver.save(progress, at_once=True)
    if saver.failed:
        raise TrainingError(f"{run.out}: the run is done, but its last checkpoint is not written: {saver.failed}")
    if run.proc.first:
        log.message(closing_words(run.out, progress))
    if lost := log.lost():
        raise OutputError(f"{run.out}: the run is done and saved, but not all was written: {lost}")


def closing_words(out: Path, progress: Progress) -> str:
    """Where to find what the run made, what was left out on the way, and what to do next."""
    best = out / "best"
    lines = [
        f"finished. best checkpoint  {best}   (last: {out / 'last'})",
        f"          metrics          {out / 'metrics.jsonl'}   (tensorboard --logdir {out / 'tensorboard'})",
        f"          predictions      {out / 'predictions.png'}   (ground truth beside detections)",
    ]
    if progress.unreadable:
        lines.append(
            f"left out: {len(progress.unreadable)} training image(s) that cannot be read: {progress.unreadable}"
        )
    if progress.nonfinite:
        lines.append(f"left out: {progress.nonfinite} update(s) that were not finite, see {out / 'nonfinite'}")
    return "\n".join([
        *lines,
        f"next:     gndet evaluate {best}",
        f"          gndet predict {best} IMAGE_OR_FOLDER --out predictions",
    ])  # fmt: skip
