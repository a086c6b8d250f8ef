"""The log of a run: metrics.jsonl, TensorBoard and the console.

An update is one step of the optimizer; numbers logged at update u describe the run after u updates.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary

from gndet.errors import OutputError
from gndet.files import LineFile
from gndet.training.board import Board
from gndet.training.logged import read_metrics as read_metrics  # documented as a name of this module
from gndet.training.logged import truncate
from gndet.training.run_folder import BOARD, METRICS
from gndet.training.work_folder import WorkFolder

BOARD_GROUPS = {"train": "train", "evaluation": "val"}  # prefixes of numbers in TensorBoard
LONGEST_ETA = 1e9  # seconds, 30 years; timedelta holds no more than 8.6e13
LARGEST_SHOWN = 1e12  # beyond, float64 has no room for the bins around equal values
HISTOGRAM_BINS = 30  # TensorBoard shows this many; its default of 1,500 takes ten times as long


class Log:
    """The log of a run, written by rank 0; usable as a context manager.  If not enabled, its methods do nothing."""

    def __init__(
        self,
        out: Path | WorkFolder,
        *,
        total_updates: int,
        first_update: int = 0,
        evaluation_due: bool = False,
        console: Console | None = None,
        enabled: bool = True,
    ) -> None:
        """Open the log of a run folder, and drop what a killed run logged after the point it resumes from.

        total_updates: of the whole run.  first_update: updates done before; 0 starts a new log.  evaluation_due: the
        evaluation after first_update is repeated.  console: shows the run, live on a terminal, otherwise in lines.
        Raises OutputError.
        """
        self.enabled = enabled
        self._out, self._total = out, total_updates
        self._console = console if enabled else None
        self._failed: dict[str, str] = {}  # what could not be written yet, and why
        self._again: dict[str, Callable[[], None]] = {}  # how to write it when there is room again
        self._files: dict[str, LineFile] = {}
        self._board: Board | None = None
        self._numbers = self._scores = ""
        self._live = None
        last_kept = first_update or -1
        self._first_step = last_kept + 1  # TensorBoard hides older entries from this step on
        if not enabled:
            return
        try:
            truncate(out / METRICS, last_kept, evaluation_due, self.message)
            self._files[METRICS] = LineFile(out / METRICS)
        except OSError as error:
            raise OutputError(f"{error.filename or out}: cannot write the log: {error.strerror}") from None
        self._to_board(first_update)
        if self._console is not None and self._console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("updates  {task.percentage:.0f} %"))
            self._progress = Progress(*columns, expand=True)
            self._task = self._progress.add_task("train", total=total_updates, completed=first_update)
            # no refresh thread: forked loader processes would inherit its locks
            self._live = Live(self._progress, console=console, auto_refresh=False)
            self._live.start(refresh=True)

    def train(self, update: int, values: dict[str, float]) -> None:
        """Log training numbers.

        values: loss, its parts loss_*, lr, images_per_s, data_wait (fraction of time, 0 to 1), memory_mib, eta_s.
        Any of them may be missing; other values are written but not shown.
        """
        self._write("train", update, values)
        self._numbers = _train_line(values)
        if self._live is not None:
            self._progress.update(self._task, completed=update)
            self._show_below_bar(self._numbers, self._scores)
        else:
            self.message(f"update {update}/{self._total}  {self._numbers}")

    def evaluating(self, done: int, total: int) -> None:
        """Show on a terminal how many images have been evaluated."""
        if done == total or done % max(total // 100, 1) == 0:
            self._show_below_bar(f"evaluating: {done} of {total} images")

    def evaluation(self, update: int, values: dict[str, float], table: str) -> None:
        """Log an evaluation: values like {"box/AP": 0.41}, and the table to show."""
        self._write("evaluation", update, values)
        main = {name: value for name, value in values.items() if name.endswith("/AP") or name == "top1"}
        self._scores = "  ".join(f"{name} {100 * value:.1f}" for name, value in main.items())
        self._show_below_bar(self._numbers, self._scores)
        self.message(f"evaluation after update {update}/{self._total}\n{table}")

    def picture(self, update: int, tag: str, picture: np.ndarray) -> None:
        """Log a picture (H, W, 3) uint8 to TensorBoard."""
        self._to_board(update, lambda: summary.image(tag, picture, dataformats="HWC"))

    def precision_recall(self, update: int, tag: str, precision: Sequence[float], recall: np.ndarray) -> None:
        """Log a precision-recall curve (ascending recall) to TensorBoard; COCO has no counts, so they are zero."""
        zeros = np.zeros(len(recall))
        falling = np.array(precision)[::-1], np.array(recall)[::-1]
        self._to_board(
            update, lambda: summary.pr_curve_raw(tag, zeros, zeros, zeros, zeros, *falling, num_thresholds=len(recall))
        )

    def histogram(self, update: int, tag: str, values: np.ndarray) -> None:
        """Log the distribution of values to TensorBoard; values that are not finite, or huge, are left out."""
        finite = values[np.abs(values) < LARGEST_SHOWN]
        if finite.size:
            self._to_board(update, lambda: summary.histogram(tag, finite, HISTOGRAM_BINS))

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to a JSON-lines file of the run folder; if the disk is full, it is written later."""
        if not self.enabled:
            return
        text = json.dumps(line, allow_nan=False)
        with self._may_fail(name):
            if name not in self._files:
                self._files[name] = LineFile(self._out / name)
            self._files[name].append(text)

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write a file of the run folder; a failure is reported, retried later, and does not end the run."""
        if not self.enabled:
            return
        self._again[what] = write
        with self._may_fail(what):
            write()
            del self._again[what]

    def lost(self) -> str:
        """Retry all failed writes.  Returns what still cannot be written, and why, or ""."""
        for what, file in self._files.items():
            with self._may_fail(what):
                file.catch_up()
        for what, write in list(self._again.items()):
            self.attempt(what, write)
        if BOARD in self._failed:
            self._to_board(0, Summary)
        return "; ".join(f"{what}: {reason}" for what, reason in self._failed.items())

    def message(self, text: str) -> None:
        """Show text, above the live display if there is one; it is not written to a file."""
        if self._console is not None:
            with suppress(OSError):  # a run survives its console: a full disk, a closed terminal
                # unwrapped: paths and commands can be copied, and a log file has no width
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        """Retry all failed writes, and restore the console."""
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
        self.lost()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            with self._may_fail(BOARD):
                self._board.close()

    def _show_below_bar(self, *texts: str) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.update(Group(self._progress, Text("  ".join(filter(None, texts)))), refresh=True)

    def _to_board(self, update: int, *summaries: Callable[[], Summary]) -> None:
        """Write to TensorBoard; what cannot be written is lost."""
        if not self.enabled:
            return
        with self._may_fail(BOARD):
            if self._board is None or self._board.is_removed:
                self._board = Board(self._out / BOARD, self._first_step)
            for make in summaries:
                self._board.add(make(), update)

    @contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        """Let a run survive a full disk: report what cannot be written, and when it has been written."""
        try:
            yield
        except (OSError, OutputError) as error:
            cause = error.__cause__ or error  # the OSError behind an OutputError
            reason = str(getattr(cause, "strerror", None) or cause)
            if what not in self._failed:
                self.message(f"could not write {what} ({reason}); training continues and will retry")
            self._failed[what] = reason
        else:
            if self._failed.pop(what, None):
                missing = "what was logged in between is missing" if what == BOARD else "nothing is missing"
                self.message(f"{what}: written again, {missing}")

    def _write(self, kind: str, update: int, values: dict[str, float]) -> None:
        """Write numbers to TensorBoard and to metrics.jsonl, where NaN and infinity become null."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.append(METRICS, {"update": update, "kind": kind, **line})

        group = BOARD_GROUPS[kind]
        self._to_board(update, *(partial(summary.scalar, f"{group}/{name}", value) for name, value in numbers.items()))


def _train_line(values: dict[str, float]) -> str:
    """Format training numbers as one line: `loss 1.234 (cls 0.5 mask 0.6)  lr 0.01  5.3 images/s  ...`."""
    losses = " ".join(
        f"{name.removeprefix('loss_')} {value:.3g}" for name, value in values.items() if name.startswith("loss_")
    )
    shown = {
        "loss": lambda value: f"loss {value:.4g}" + (f" ({losses})" if losses else ""),
        "lr": lambda value: f"lr {value:.3g}",
        "images_per_s": lambda value: f"{value:.3g} images/s",
        "data_wait": lambda value: f"data wait {100 * value:.0f} %",
        "memory_mib": lambda value: f"{value:.0f} MiB",
        "eta_s": lambda value: f"eta {timedelta(seconds=round(value)) if value < LONGEST_ETA else '?'}",
    }
    return "  ".join(write(values[name]) for name, write in shown.items() if name in values)
