"""Look at every picture of a data set: decode it, in processes of their own, for a decoder may crash on a bad file."""

import contextlib
import hashlib
import multiprocessing
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import read_image
from gndet.errors import DataError

AHEAD = 4  # pictures a process has before it, so that it does not wait for the next
PATIENCE = 120.0  # seconds for one picture; one of 100 million pixels takes some


class Picture(NamedTuple):
    """A picture to look at."""

    path: Path
    size: tuple[int, int] | None  # height, width as the annotation file says
    max_pixels: int


class Look(NamedTuple):
    """What a picture showed."""

    place: int  # of the picture among those looked at
    faults: list[tuple[str, str]]  # code of FAULTS, and words that name the file
    digest: str  # SHA-256 of the file, "" where it cannot be read


Looker = Callable[[Picture], tuple[list[tuple[str, str]], str]]


def look_at_picture(picture: Picture) -> tuple[list[tuple[str, str]], str]:
    """Decode a picture.  Returns its faults and its file's hash."""
    faults: list[tuple[str, str]] = []
    try:
        read_image(*picture, note=lambda code, words: faults.append((code, f"{picture.path}: {words}")))
    except Fault as fault:
        faults.append((fault.code, str(fault)))
    try:
        with picture.path.open("rb") as file:
            return faults, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return faults, ""


def look_at_all(
    pictures: Sequence[Picture], processes: int, look: Looker = look_at_picture, patience: float = PATIENCE
) -> Iterator[Look]:
    """Look at pictures in parallel; the order is that in which they are done.

    look: a module's own function.  patience: seconds for one picture.  A process that dies, or is killed for its
    slowness, is replaced, and its picture is a picture-crash.  Raises DataError where processes cannot be started.
    """
    todo = deque(enumerate(pictures))
    workers: list[_Worker] = []
    try:
        while todo or any(worker.pending for worker in workers):
            while todo and len(workers) < processes:
                workers.append(_Worker(look))
            for worker in workers:
                while todo and len(worker.pending) < AHEAD:
                    worker.give(todo.popleft())
            for connection in wait([worker.connection for worker in workers], timeout=1.0):
                worker = next(one for one in workers if one.connection is connection)
                answer = worker.answer()
                if isinstance(answer, Look):
                    yield answer
                elif answer is None:
                    worker.close()
                    workers.remove(worker)
                    place, picture = worker.pending.popleft()
                    todo.extendleft(reversed(worker.pending))
                    yield Look(place, [("picture-crash", f"{picture.path}: {worker.end()}")], "")
            for worker in workers:
                worker.kill_if_stuck(patience)
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A process that looks at pictures, and those it has before it."""

    def __init__(self, look: Looker) -> None:
        # a server forks them: it has no threads, and has imported what they need only once
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        try:
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, look), daemon=True)
            with _without_interrupts():
                self.process.start()
            theirs.close()
        except OSError as error:  # too many open files, a TMPDIR too long for a socket, a server that has died
            raise DataError(f"a process to decode pictures in cannot be started: {error}") from None
        self.pending: deque[tuple[int, Picture]] = deque()
        self.ready, self.stuck, self.began = False, "", time.monotonic()

    def give(self, item: tuple[int, Picture]) -> None:
        """Hand it a picture."""
        if not self.pending:
            self.began = time.monotonic()
        self.pending.append(item)
        with contextlib.suppress(OSError):  # it has died: `answer` will tell
            self.connection.send(item)

    def answer(self) -> Look | bool | None:
        """Its next word: a Look, True as it starts, None where it has died.  Raises DataError where it cannot start."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            if not self.ready:
                raise DataError(f"a process to decode pictures in cannot be started: it {self.end()}") from None
            return None
        self.began = time.monotonic()
        if self.ready:
            self.pending.popleft()
        self.ready = True
        return answer

    def kill_if_stuck(self, patience: float) -> None:
        """Kill it where one picture has taken too long."""
        if self.ready and self.pending and time.monotonic() - self.began > patience:
            self.stuck = f"took over {patience:.0f} s to decode"
            self.process.kill()

    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.exitcode
        if self.stuck:
            return self.stuck
        if code is not None and code < 0:
            return f"ended the process that decoded it by {signal.Signals(-code).name}"
        return f"ended the process that decoded it with exit status {code}"

    def close(self) -> None:
        """Let it end."""
        self.connection.close()
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: it goes to all, and would end the server while it imports.

    Blocked, so that the server inherits that; and noted, for any thread may take the signal, and Python then
    interrupts the main one, blocked or not.
    """
    resource_tracker.ensure_running()  # its start would let them through again
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _work(connection: Connection, look: Looker) -> None:
    """The life of a process: it ends when the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process decides
    warnings.simplefilter("ignore")  # what is unusual in a picture is told as a finding
    with contextlib.suppress(EOFError, OSError):
        connection.send(True)
        while True:
            place, picture = connection.recv()
            connection.send(Look(place, *look(picture)))
