"""Heartbeats between ranks: name the rank that hung or died, and propagate stop requests.

A thread of each rank writes (update, activity, counter) to the store of the process group.  A rank whose counter stops
was stopped or killed; a rank whose counter advances hangs in the activity it names.
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
from gndet.errors import OutputError, Preempted
from gndet.files import written_whole

BEAT = 0.25  # seconds between two heartbeats of a rank
GRACE = 5.0  # seconds beyond the timeout for the collective itself to fail, before the process is ended
LOST = "stopped or killed, or the network is down"
GONE = f"rank 0, or the torchrun that started it, does not answer: {LOST}"
STOPPED, FAILED = "watch/stop", "watch/failed"  # keys: a rank was asked to stop; a rank left with an error
LEAST_QUIET = 60.0  # minimum seconds without progress before the stacks of a rank are written

Beats = list[dict[str, Any] | None]


class Watch:
    """The watch of one rank; usable as a context manager."""

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float) -> None:
        """store: of the process group, None for a single rank.  timeout_s: maximum waiting time of collectives."""
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.report: Path | None = None  # where stacks are written; None: nowhere
        self.on_stop: Callable[[], None] = lambda: None  # called once another rank has been asked to stop
        self.stopping: Callable[[], bool] = lambda: False  # whether this rank has been asked to stop
        self._store = store
        self._update, self._doing, self._since = 0, "starting", time.monotonic()
        self._waiting = False
        self._quiet_said = False
        self._before: Beats = []  # of all ranks, shortly before the timeout
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def at(self, update: int, doing: str) -> None:
        """Note what the main thread does now, after `update` updates; doing: a participle such as "saving"."""
        self._update, self._doing, self._since, self._quiet_said = update, doing, time.monotonic(), False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the main thread waits for the other ranks."""
        before, self._since, self._waiting, self._before = self._doing, time.monotonic(), True, []
        self._doing = f"waiting for the others after {before}"
        try:
            yield
        finally:
            self._doing, self._since, self._waiting = before, time.monotonic(), False

    def where(self) -> str:
        """Return what this rank is doing, in words."""
        return _where({"update": self._update, "doing": self._doing})

    def others(self) -> str:
        """Return what the other ranks are doing, in words; silent ranks first.  Takes up to GRACE seconds."""
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
                silent.append(f"rank {rank} never answered")
            elif beat["count"] == before["count"]:
                silent.append(f"rank {rank} does not answer: {LOST}; it was last seen {_where(beat)}")
            else:
                rest.append(f"rank {rank} is alive, {_where(beat)}")
        return "; ".join(silent + rest)

    def another_failed(self) -> bool:
        """Return whether a rank has left the run with an error; torchrun then ends the others by a signal."""
        return bool(self._store is not None and self._ask(lambda: self._store.check([FAILED])))

    def dump(self, text: str) -> None:
        """Write a text and the stacks of all threads to the report, if possible."""
        if self.report is None:
            return
        path = self.report.with_name(f"{self.report.name}-process{self.rank}.txt")
        with suppress(OutputError), written_whole(path) as file:  # the disk may be full
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def __enter__(self) -> "Watch":
        for work in (self._send_beats, self._find_hangs):  # two threads, because the store may hang too
            thread = threading.Thread(target=work, daemon=True, name="watch")
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._done.set()
        if self._store is not None and kind is not None:
            key = STOPPED if issubclass(kind, Stop | Preempted) else FAILED
            self._ask(lambda: self._store.set(key, str(self.rank)))
        for thread in self._threads:  # one that asked the store while the interpreter ends would abort the process
            thread.join(GRACE)

    def _send_beats(self) -> None:
        """Write this rank's heartbeats and listen for a stop request, until the run ends."""
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
            except RuntimeError:  # the store died with its process: collectives will report it
                self._store = None

    def _find_hangs(self) -> None:
        """Look for hangs until the run ends."""
        while not self._done.wait(BEAT):
            quiet = time.monotonic() - self._since
            if self._waiting and not self._before and quiet > self.timeout_s - 8 * BEAT:
                self._before = self._ask(self._all_beats) or []
            if self._waiting and quiet > self.timeout_s + GRACE:  # NCCL may wait forever
                self._report(f"rank {self.rank} {self.where()}: no answer for {quiet:.0f} s: {self.others()}")
                os._exit(1)
            if not self._waiting and not self._quiet_said and quiet > max(self.timeout_s, LEAST_QUIET):
                self._quiet_said = True
                self._report(f"rank {self.rank} {self.where()}: no progress for {quiet:.0f} s; the run is not stopped")

    def _report(self, text: str) -> None:
        with suppress(OSError):
            print(f"gndet: {text}", file=sys.stderr, flush=True)
        self._ask(lambda: self.dump(text))  # a disk that hangs must not keep this process from ending

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the store or a disk in a separate thread.  Returns None if it does not answer within GRACE seconds."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError, AttributeError):  # the store is gone, or _send_beats has set it to None
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(GRACE)
        return answers[0] if answers else None

    def _compare(self) -> tuple[Beats, Beats]:
        """Return the beats of all ranks from a moment ago and from now."""
        before = self._before
        if not before:
            before = self._all_beats()
            time.sleep(4 * BEAT)
        return before, self._all_beats()

    def _all_beats(self) -> Beats:
        keys = [f"watch/{rank}" for rank in range(self.world)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]


def _where(beat: dict[str, Any]) -> str:
    return f"after update {beat['update']}, {beat['doing']}"
