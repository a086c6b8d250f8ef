"""The record of a run: metrics.jsonl, TensorBoard, and what is shown while it runs.

An update is one step of the optimiser; numbers logged at update u describe the run after u updates.
"""

import json
import math
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from gndet.data.batches.stream import Loaded
from gndet.errors import DataError, OutputError
from gndet.files import RecordFile, write_whole
from gndet.training.run_folder import BOARD, METRICS


class RunLog:
    """Log of one run, kept by rank 0; usable as a context manager."""

    def __init__(
        self,
        out: Path,
        *,
        total_updates: int,
        first_update: int = 0,
        evaluation_due: bool = False,
        console: Console | None = None,
    ) -> None:
        """Open the log of a run folder, and forget what a killed run logged past the point it resumes from.

        out: run folder, made where missing.  total_updates: of the whole run.  first_update: updates done
        before; 0 starts afresh.  evaluation_due: the one after first_update is made anew.  console: where to show the
        run, live on a terminal, else in lines.
        """
        out.mkdir(parents=True, exist_ok=True)
        last_kept = first_update or -1
        truncate(out / METRICS, last_kept, evaluation_due)
        self._out = out
        self._failed: dict[str, str] = {}  # what could not be written yet, and why
        self._again: dict[str, Callable[[], None]] = {}  # how it is written when there is room again
        self._board = EventFile(out / BOARD, last_kept + 1)
        self._files = {METRICS: RecordFile(out / METRICS), BOARD: self._board.file}
        self._total = total_updates
        self._console = console
        self._numbers = self._scores = ""
        self._live = None
        if console is not None and console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("updates  {task.percentage:.0f} %"))
            self._progress = Progress(*columns, expand=True)
            self._task = self._progress.add_task("train", total=total_updates, completed=first_update)
            # no refresh thread: loader processes are forked beside it, and would inherit its locks
            self._live = Live(self._progress, console=console, auto_refresh=False)
            self._live.start(refresh=True)

    def train(self, update: int, values: dict[str, float]) -> None:
        """Log training numbers.

        values: loss, its parts loss_*, lr, images_per_s, data_wait (share of time in 0-1), memory_mib, eta_s:
        any of them may be missing, and others are written but not shown.
        """
        self._write("train", update, values)
        with self._may_fail(BOARD):
            self._board.scalars(update, {f"train/{name}": value for name, value in values.items()})
        self._numbers = _train_line(values)
        if self._live is not None:
            self._progress.update(self._task, completed=update)
            self._show_numbers()
        else:
            self.message(f"update {update}/{self._total}  {_train_line(values)}")

    def _show_numbers(self) -> None:
        """On a terminal, put the last numbers below the bar."""
        if self._live is not None:
            text = Text("  ".join(filter(None, [self._numbers, self._scores])))
            with self._console_may_fail():
                self._live.update(Group(self._progress, text), refresh=True)

    def evaluating(self, done: int, total: int) -> None:
        """Show on a terminal how many of the images have been evaluated."""
        if self._live is not None and (done == total or done % max(total // 100, 1) == 0):
            with self._console_may_fail():
                self._live.update(Group(self._progress, Text(f"evaluating: {done} of {total} images")), refresh=True)

    def evaluation(self, update: int, values: dict[str, float], table: str) -> None:
        """Log an evaluation: values like {"box/AP": 0.41}, and the table to show."""
        self._write("evaluation", update, values)
        with self._may_fail(BOARD):
            self._board.scalars(update, {f"val/{name}": value for name, value in values.items()})
        averages = {name: value for name, value in values.items() if name.split("/")[-1] == "AP"}
        self._scores = "  ".join(f"{name} {100 * value:.1f}" for name, value in averages.items())
        self._show_numbers()
        self.message(f"evaluation after update {update}/{self._total}\n{table}")

    def picture(self, update: int, tag: str, picture: np.ndarray) -> None:
        """Log a picture (H, W, 3) uint8 to TensorBoard."""
        with self._may_fail(BOARD):
            self._board.picture(update, tag, picture)

    def precision_recall(self, update: int, tag: str, precision: Sequence[float], recall: Sequence[float]) -> None:
        """Log a precision-recall curve to TensorBoard, by rising recall."""
        with self._may_fail(BOARD):
            self._board.precision_recall(update, tag, precision, recall)

    def histogram(self, update: int, tag: str, values: np.ndarray) -> None:
        """Log how values are spread to TensorBoard; those that are not finite are left out."""
        finite = values[np.isfinite(values)]
        if finite.size:
            with self._may_fail(BOARD):
                self._board.histogram(update, tag, finite)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to a JSON-lines file of the run folder."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with self._may_fail(name):
            if name not in self._files:
                self._files[name] = RecordFile(self._out / name)
            self._files[name].append(text.encode())

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write something into the run folder; a failure is said, does not end the run, and is tried again later."""
        self._again[what] = write
        with self._may_fail(what):
            write()
            del self._again[what]

    def lost(self) -> str:
        """What could not be written even now, and why; nothing where all is written."""
        for what, file in self._files.items():
            with self._may_fail(what):
                file.catch_up()
        for what, write in list(self._again.items()):
            self.attempt(what, write)
        return "; ".join(f"{what}: {reason}" for what, reason in self._failed.items())

    def message(self, text: str) -> None:
        """Show text, above the live display where there is one; it is not written to a file."""
        if self._console is not None:
            with self._console_may_fail():
                # not folded: a path or a command is copied whole, and a log file has no width
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Write out what is buffered and leave the console as it was."""
        if self._live is not None:
            with self._console_may_fail():
                self._live.stop()
        for what, file in self._files.items():
            with self._may_fail(what):
                file.catch_up()
            file.close()

    @contextmanager
    def _console_may_fail(self) -> Iterator[None]:
        """Let a run outlive its terminal: a file on a full disk, a pipe that nobody reads any more."""
        try:
            yield
        except OSError as error:
            self._failed.setdefault("what it says", str(error.strerror or error))

    @contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        """Let a run outlive a full disk: what cannot be written is said, kept, and said once more when it is."""
        try:
            yield
        except (OSError, OutputError) as error:
            cause = error.__cause__ or error  # an OutputError's is the OSError
            reason = str(getattr(cause, "strerror", None) or cause)
            if what not in self._failed:
                self.message(f"cannot write {what}: {reason}; it is tried again, training goes on")
            self._failed[what] = reason
            return
        if what not in self._failed:
            return
        if (file := self._files.get(what)) and file.dropped:
            self._failed[what] = "too much had to wait for room on the disk, the oldest of it is not there"
            return
        del self._failed[what]
        self.message(f"{what}: written again, nothing of it is missing")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, kind: str, update: int, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; JSON has no NaN or infinity, they become null."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.append(METRICS, {"update": update, "kind": kind, **line})


class Silence:
    """The log of a process that is not the first."""

    def lost(self) -> str:
        """What could not be written: nothing, by a process that writes nothing."""
        return ""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def open_log(
    out: Path, first: bool, *, total_updates: int, first_update: int, evaluation_due: bool, console: Console | None
) -> "RunLog | Silence":
    """The log of a run in its first process, one that says nothing in the others.  Raises OutputError."""
    if not first:
        return Silence()
    try:
        return RunLog(
            out, total_updates=total_updates, first_update=first_update, evaluation_due=evaluation_due, console=console
        )
    except OSError as error:
        raise OutputError(f"{error.filename or out}: cannot write the log: {error.strerror}") from None


def _train_line(values: dict[str, float]) -> str:
    """Write training numbers in one line: `loss 1.234 (cls 0.5 mask 0.6)  lr 0.01  5.3 images/s  ...`."""
    losses = " ".join(
        f"{name.removeprefix('loss_')} {value:.3g}" for name, value in values.items() if name.startswith("loss_")
    )
    shown = {
        "loss": lambda value: f"loss {value:.4g}" + (f" ({losses})" if losses else ""),
        "lr": lambda value: f"lr {value:.3g}",
        "images_per_s": lambda value: f"{value:.3g} images/s",
        "data_wait": lambda value: f"data wait {100 * value:.0f} %",
        "memory_mib": lambda value: f"{value:.0f} MiB",
        "eta_s": lambda value: f"eta {timedelta(seconds=round(value)) if math.isfinite(value) else '?'}",
    }
    return "  ".join(write(values[name]) for name, write in shown.items() if name in values)


class Meter:
    """Measures time, data wait and memory between two log lines."""

    def __init__(self, device: torch.device, global_batch: int) -> None:
        self.device, self.global_batch = device, global_batch
        self.seconds_per_update = 0.0
        self._reset()

    def _reset(self) -> None:
        self.updates, self.waited, self.paused, self.started = 0, 0.0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterator[Loaded]) -> Loaded:
        """The next batch; how long it took is counted."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of an evaluation or a save out of the figures."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The figures of the updates since the last call, and start anew."""
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        self.seconds_per_update = seconds / max(self.updates, 1)
        values = {
            "images_per_s": self.global_batch * self.updates / seconds,
            "data_wait": min(self.waited / seconds, 1.0),
            "memory_mib": memory_mib(self.device),
        }
        self._reset()
        return values


def memory_mib(device: torch.device) -> float:
    """Peak memory so far: the GPU's, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: a dict a line with update, kind and the values, None where one was not finite.

    A last line that a killed run left half-written is skipped.  Raises DataError for any other broken line.
    """
    return [entry for _, entry in _entries(path)]


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each whole line with what it says."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise DataError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}: {error}") from None
        yield line, entry


def truncate(path: Path, last_update: int, evaluation_due: bool) -> None:
    """Drop the lines of later updates, a half-written one, and that of an evaluation that is to be made anew.

    The file is replaced whole; a line without kind belongs to an evaluation.
    """
    if not path.exists():
        return

    def holds(entry: dict[str, Any]) -> bool:
        if entry["update"] == last_update and entry.get("kind", "evaluation") == "evaluation":
            return not evaluation_due
        return entry["update"] <= last_update

    kept = [line for line, entry in _entries(path) if holds(entry)]
    write_whole(path, "".join(f"{line}\n" for line in kept))


HISTOGRAM_BINS = 30  # TensorBoard shows as many; its own 1,500 take ten times as long


_NUMBERS = count()  # a process may open several files within a second


class EventFile:
    """The events of one run, from one process; every method raises OSError where the disk is full."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file in a folder; what older files there say of `first_step` and later is to be forgotten."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.file = RecordFile(folder / f"events.out.tfevents.{name}")
        self._records = RecordWriter(_Appender(self.file))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add numbers by their tags, as one record: all of them wait, or none."""
        self._add(step, Summary(value=[one for tag, x in values.items() for one in summary.scalar(tag, x).value]))

    def picture(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add a picture (H, W, 3) uint8."""
        self._add(step, summary.image(tag, picture, dataformats="HWC"))

    def precision_recall(self, step: int, tag: str, precision: Sequence[float], recall: Sequence[float]) -> None:
        """Add a precision-recall curve, by rising recall; counts, which COCO's has not, are zero."""
        zeros = np.zeros(len(recall))
        falling = (np.array(precision)[::-1], np.array(recall)[::-1])
        self._add(step, summary.pr_curve_raw(tag, zeros, zeros, zeros, zeros, *falling, num_thresholds=len(recall)))

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Add how finite values are spread."""
        self._add(step, summary.histogram(tag, values, HISTOGRAM_BINS))

    def _add(self, step: int, made: Summary) -> None:
        self._write(Event(step=step, summary=made))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class _Appender:
    """What RecordWriter writes to: it hands over each record, with its length and checksums, in one piece."""

    def __init__(self, file: RecordFile) -> None:
        self.write = file.append
