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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEAT = 0.25  # seconds between two lines of a process
GRACE = 5.0  # seconds that the collective itself has to fail in, before the process ends without it
GONE = "process 0, or the torchrun that started it, was killed: it held the store by which processes find each other"
LEAST_QUIET = 60.0  # seconds without news after which a lone process's stacks are written, at the least


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
        self._before: list[dict[str, Any] | None] = []  # the others' beats when the waiting had become long
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
        """Say what the other processes are doing, those that do not answer first.  Takes up to a second."""
        if self._store is None:
            return "" if self.world == 1 else GONE
        before = self._before
        if not before:
            before = self._all_beats()
            time.sleep(4 * BEAT)
        if self._store is None:
            return GONE
        silent, rest = [], []
        for rank in range(self.world):
            beat = self._read(rank)
            if rank == self.rank:
                continue
            if beat is None or before[rank] is None:
                silent.append(f"process {rank} never answered")
            elif beat["count"] == before[rank]["count"]:
                silent.append(f"process {rank} does not answer: stopped or killed {_where(beat)}")
            else:
                rest.append(f"process {rank} is there, {_where(beat)}")
        return "; ".join(silent + rest)

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
        threading.Thread(target=self._beats, daemon=True, name="watch").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def _beats(self) -> None:
        """Tell what this process does, hear of a stop, and look for a hang, until the run ends."""
        count, shared = 0, False
        while not self._done.wait(BEAT):
            count += 1
            try:
                if self._store is not None:
                    beat = {"update": self._update, "doing": self._doing, "count": count}
                    self._store.set(f"watch/{self.rank}", json.dumps(beat))
                    if not shared and self.stopping():
                        self._store.set("watch/stop", str(self.rank))
                        shared = True
                    elif not shared and self._store.check(["watch/stop"]):
                        self.on_stop()
                        shared = True
            except RuntimeError:  # the store is gone with the process that kept it: collectives will say so
                self._store = None
            self._look_for_a_hang()

    def _look_for_a_hang(self) -> None:
        quiet = time.monotonic() - self._since
        if self._waiting and not self._before and quiet > self.timeout_s - 8 * BEAT:
            self._before = self._all_beats()
        if self._waiting and quiet > self.timeout_s + GRACE:  # NCCL may wait for ever
            text = f"process {self.rank} {self.where()}: no answer for {quiet:.0f} s: {self.others()}"
            self.dump(text)
            print(f"gndet: {text}", file=sys.stderr, flush=True)
            os._exit(1)
        if not self._waiting and not self._quiet_said and quiet > max(self.timeout_s, LEAST_QUIET):
            self._quiet_said = True
            text = f"process {self.rank} {self.where()}: no progress for {quiet:.0f} s"
            self.dump(text)
            print(f"gndet: {text}; it is not ended", file=sys.stderr, flush=True)

    def _all_beats(self) -> list[dict[str, Any] | None]:
        """The last beat of every process."""
        return [self._read(rank) for rank in range(self.world)]

    def _read(self, rank: int) -> dict[str, Any] | None:
        """The last beat of a process; None where there is none."""
        try:
            key = f"watch/{rank}"
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except (RuntimeError, AttributeError):
            return None


def _where(beat: dict[str, Any]) -> str:
    return f"after update {beat['update']}, {beat['doing']}"
