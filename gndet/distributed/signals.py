"""Signals that ask a run to stop: SIGTERM and SIGUSR1 from a scheduler, SIGINT from a person.

The first signal is noted, and the run stops where it can be resumed exactly: there `StopSignals.poll` raises Stop, and
within `at_once()` the signal itself does.  A second signal ends the process at once; earlier checkpoints stay.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WAKE = signal.SIGURG  # sent by this process to its main thread; ignored by default if it arrives late
SAME = 1.0  # seconds; signals within it are one request: a scheduler signals every rank, and so does torchrun


class Stop(BaseException):
    """The run has been asked to stop.  A BaseException, so that no `except Exception` swallows it."""


class StopSignals:
    """Collect the signals of a run while the context lasts; outside the main thread, collect none.

    The C handler wakes a thread that acts on the second signal, because the main thread may be inside a collective.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal; 0: another rank received one
        self._interrupt = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.number is not None

    @property
    def status(self) -> int:
        """The exit status of a stopped and saved run: 130 after Ctrl-C, which ends a `&&` chain, else 0."""
        return 130 if self.number == signal.SIGINT else 0

    def ask(self) -> None:
        """Note that another rank has been asked to stop; within `at_once()`, raise Stop in the main thread."""
        if self.number is None:
            self.number = 0
        if self._before and (main := threading.main_thread().ident):
            signal.pthread_kill(main, WAKE)

    def poll(self, *_: object) -> None:
        """Raise Stop if the run has been asked to stop."""
        if self.asked:
            raise Stop

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise Stop wherever the main thread is; only for work that may be interrupted anywhere."""
        before, self._interrupt = self._interrupt, True
        try:
            self.poll()  # after _interrupt is set: a signal between the two would be lost
            yield
        finally:
            self._interrupt = before

    def no_longer_at_once(self) -> None:
        """Keep signals from raising Stop within `at_once()` from here on, because collectives follow."""
        self._interrupt = False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = {number: signal.signal(number, self._in_main_thread) for number in (*STOPPING, WAKE)}
            self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._before_fd)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
            os.close(self._write)  # ends the thread

    def _in_main_thread(self, number: int, frame: object) -> None:
        if number != WAKE:
            self._note(number)
        if self._interrupt:
            self._interrupt = False
            raise Stop

    def _watch(self) -> None:
        """Read the signal numbers that the C handler writes."""
        first_at = None
        with open(self._read, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in STOPPING:
                    self._note(number[0])
                    now = time.monotonic()
                    first_at = first_at or now
                    if now - first_at > SAME:
                        _say("gndet: a second signal ended this process at once; what was saved before stays\n")
                        os._exit(128 + number[0])

    def _note(self, number: int) -> None:
        if not self.number:
            self.number = number


def _say(text: str) -> None:
    """Write to stderr, unless that would wait."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
