"""What each process of a run is doing, told to the others: a hang or a death has a name, and a stop is shared.

A thread of each process writes (update, what it is doing, a counter) to the store of the process group.  A process
whose counter stands still was stopped or killed; one whose counter runs hangs in what it says it is doing.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gndet.distributed.signals import Stop
from gndet.errors import Preempted

BEAT = 0.25  # seconds between two lines of a process
GRACE = 5.0  # seconds that the collective itself has to fail in, before the process ends without it
GONE = (
    "process 0, or the torchrun that started it, was killed or does not answer: it holds the store by which processes "
    "find each other"
)
STOPPED, FAILED = "watch/stop", "watch/failed"  # keys: a process was asked to stop; one left with an error
LEAST_QUIET = 60.0  # seconds without news after which a lone process's stacks are written, at the least

Beats = list[dict[str, Any] | None]


class Watch:
    """The watch of one process; usable as a context manager."""

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float) -> None:
        """store: of the process group, None for a lone process.  timeout_s: what the collectives wait at most."""
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.report: Path | None = None  # where stacks are written; None: nowhere
        self.on_stop: Callable[[], None] = lambda: None  # called once another process has been asked to stop
        self.stopping: Callable[[], bool] = lambda: False  # whether this process has been asked to stop
        self._store = store
        self._update, self._doing, self._since = 0, "starting", time.monotonic()
        self._waiting = False
        self._quiet_said = False
        self._before: Beats = []  # the others' beats when the waiting had become long
        self._done = threading.Event()

    def at(self, update: int, doing: str) -> None:
        """Note what the main thread does now: `update` updates are done, doing completes "was ..."."""
        self._update, self._doing, self._since, self._quiet_said = update, doing, time.monotonic(), False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the main thread waits for the other processes."""
        before, self._since, self._waiting, self._before = self._doing, time.monotonic(), True, []
        self._doing = f"waiting for the others after {before}"
        try:
            yield
        finally:
            self._doing, self._since, self._waiting = before, time.monotonic(), False

    def where(self) -> str:
        """Say what this process is doing."""
        return _where({"update": self._update, "doing": self._doing})

    def others(self) -> str:
        """Say what the other processes are doing, those that do not answer first.  Takes up to GRACE."""
        if self._store is None:
            return "" if self.world == 1 else GONE
        found = self._ask(self._compare)
        if found is None or self._store is None:
            return GONE
        silent, rest = [], []
        for rank, (before, beat) in enumerate(zip(*found, strict=True)):
            if rank == self.rank:
                continue
            if beat is None or before is None:
                silent.append(f"process {rank} never answered")
            elif beat["count"] == before["count"]:
                silent.append(f"process {rank} does not answer: stopped or killed {_where(beat)}")
            else:
                rest.append(f"process {rank} is there, {_where(beat)}")
        return "; ".join(silent + rest)

    def another_failed(self) -> bool:
        """Whether a process has left the run with an error: then a signal comes from what started it, and ends it."""
        return bool(self._store is not None and self._ask(lambda: self._store.check([FAILED])))

    def dump(self, text: str) -> None:
        """Write the text and the stacks of all threads to the report, where that is possible."""
        if self.report is None:
            return
        try:
            path = self.report.with_name(f"{self.report.name}-process{self.rank}.txt")
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            return  # the disk may be what hangs or is full; the text goes to the terminal as well

    def __enter__(self) -> "Watch":
        for work in (self._beats, self._hangs):  # two: the store may hang, too
            threading.Thread(target=work, daemon=True, name="watch").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._done.set()
        if self._store is not None and kind is not None:
            key = STOPPED if issubclass(kind, Stop | Preempted) else FAILED
            self._ask(lambda: self._store.set(key, str(self.rank)))

    def _beats(self) -> None:
        """Tell what this process does, and hear of a stop, until the run ends."""
        count, shared = 0, False
        while self._store is not None and not self._done.wait(BEAT):
            count += 1
            beat = {"update": self._update, "doing": self._doing, "count": count}
            try:
                self._store.set(f"watch/{self.rank}", json.dumps(beat))
                if not shared and self.stopping():
                    self._store.set(STOPPED, str(self.rank))
                    shared = True
                elif not shared and self._store.check([STOPPED]):
                    self.on_stop()
                    shared = True
            except RuntimeError:  # the store is gone with the process that kept it: collectives will say so
                self._store = None

    def _hangs(self) -> None:
        """Look for a hang until the run ends."""
        while not self._done.wait(BEAT):
            quiet = time.monotonic() - self._since
            if self._waiting and not self._before and quiet > self.timeout_s - 8 * BEAT:
                self._before = self._ask(self._all_beats) or []
            if self._waiting and quiet > self.timeout_s + GRACE:  # NCCL may wait for ever
                text = f"process {self.rank} {self.where()}: no answer for {quiet:.0f} s: {self.others()}"
                self._tell(text)
                os._exit(1)
            if not self._waiting and not self._quiet_said and quiet > max(self.timeout_s, LEAST_QUIET):
                self._quiet_said = True
                self._tell(f"process {self.rank} {self.where()}: no progress for {quiet:.0f} s; it is not ended")

    def _tell(self, text: str) -> None:
        """Write the report, and the text to the terminal, where that is possible."""
        self.dump(text)
        with suppress(OSError):
            print(f"gndet: {text}", file=sys.stderr, flush=True)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the store something in a thread of its own.  Returns None where it does not answer within GRACE."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError, AttributeError):  # the store is gone, or was noticed to be
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(GRACE)
        return answers[0] if answers else None

    def _compare(self) -> tuple[Beats, Beats]:
        """The beats of all processes, some time ago and now."""
        before = self._before
        if not before:
            before = self._all_beats()
            time.sleep(4 * BEAT)
        return before, self._all_beats()

    def _all_beats(self) -> Beats:
        """The last beat of every process; None where there is none."""
        keys = [f"watch/{rank}" for rank in range(self.world)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]


def _where(beat: dict[str, Any]) -> str:
    return f"after update {beat['update']}, {beat['doing']}"
