"""A pool of forked processes that compute items ahead, in order, and are replaced when they die.

Each worker has its own pipe and shares nothing else, so the pool notices a death as soon as it waits for that worker.
Why not concurrent.futures: one death breaks the whole executor, exit waits for every item that was started, and its
workers outlive a main process that is killed.  Why not torch's DataLoader: its workers share locks that a killed worker
may never release, it looks for deaths only every 5 seconds, and its SIGCHLD handler raises anywhere in the main thread.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gndet.distributed.children import end_with_parent
from gndet.errors import GndetError, MachineError

PREFETCH = 4  # items queued per worker
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the whole process group gets them; the main process decides
GRACE = 3.0  # seconds for a worker to finish its item when the pool closes, and to exit once its pipe is broken
CAUSES: dict[int, str] = {signal.SIGKILL: "out of memory?", signal.SIGBUS: "shared memory full?"}


class Death(Exception):
    """A worker died while computing an item, or was killed because the item took too long."""

    def __init__(self, pid: int | None, status: int | None) -> None:
        """status: multiprocessing's exitcode; None if the time limit was exceeded."""
        self.pid, self.status = pid, status

    def __str__(self) -> str:
        if self.status is None or self.status >= 0:
            return f"loader process {self.pid} ended by itself with status {self.status}"
        cause = CAUSES.get(-self.status)
        return f"loader process {self.pid} was killed by signal {-self.status}" + (f" ({cause})" if cause else "")


class Failure(NamedTuple):
    """The traceback of an exception in a worker: a bug, or not enough memory."""

    text: str


def usable_cores() -> int:
    """Return how many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int,
    on_death: Callable[[Any, Death, int], Any],
    time_limit: float | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, work(item)) for each item, in order, computed by `workers` processes, PREFETCH items ahead.

    work: if it raises a GndetError, that is raised here; any other exception gives a Failure as the result.
    on_death: called with the item that a worker died on, the Death, and how many workers in a row have died on it.
    It returns a result to use instead, or None to compute the item again.
    time_limit: seconds to wait for an item, from when its turn has come, before its worker is killed.
    Raises MachineError if no process can be started.
    """
    pool: list[_Worker] = []  # items are dealt to the workers in turn
    close = Finalize(None, _end, (pool,), exitpriority=0)  # also at exit, before multiprocessing waits for the workers
    left = iter(items)
    try:
        for number, item in enumerate(islice(left, PREFETCH * workers)):
            if number < workers:
                pool.append(_Worker(work))
            pool[number % workers].give(item)
        turn = deaths = 0  # deaths: since the last result
        while pool and pool[turn].items:
            item = pool[turn].items[0]
            try:
                result = pool[turn].receive(time_limit)
            except Death as death:
                deaths += 1
                result = on_death(item, death, deaths)
                dead, lost = pool[turn], islice(pool[turn].items, int(result is not None), None)
                pool[turn] = _Worker(work, lost)
                dead.connection.close()
                if result is None:
                    continue
            if isinstance(result, GndetError):
                raise result
            deaths = 0
            for following in islice(left, 1):
                pool[turn].give(following)
            turn = (turn + 1) % len(pool)
            yield item, result
    finally:
        close()


def read_in_processes(read: Callable[[Any], Any], items: Sequence[Any], path: Path) -> Generator[Any, None, None]:
    """Yield read(item) for each part of a path, in order, computed by several processes.

    Raises MachineError if one of them is killed or fails, and the GndetErrors of read.
    """
    killed = MachineError(f"{path}: a process that read it was killed: out of memory?")
    for _, result in map_ahead(read, items, workers=min(usable_cores(), len(items)), on_death=lambda *_: killed):
        if isinstance(result, Failure):
            raise MachineError(f"{path}: a process that read it failed:\n{result.text}")
        yield result


def _serve(work: Callable[[Any], Any], ours: Connection, theirs: Connection, main: int) -> None:
    """Compute the items that arrive through the pipe, until the main process closes it or dies."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the main process's pipe: a write to it would look like a signal to the main process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    ours.close()  # otherwise the pipe would stay open after the main process drops its end
    end_with_parent(main, grace=0)  # the pipe alone does not tell: other processes may hold its main end
    try:
        while True:
            item = theirs.recv()
            try:
                result = work(item)
            except GndetError as error:
                result = error
            except Exception:  # of any kind: the main process reports it
                result = Failure(traceback.format_exc())
            try:
                theirs.send(result)  # tensors travel in shared memory
            except (OSError, RuntimeError):  # no shared memory or file descriptor left
                theirs.send(Failure(traceback.format_exc()))
    except (EOFError, ConnectionError):
        return  # the main process has finished or died


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Defer signals while a process starts: mask them, and record those that another thread receives.

    Python would ignore what a handler raises within the functions that it calls around a fork.
    """
    received: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (*IGNORED, signal.SIGURG):  # StopSignals wakes the main thread by SIGURG
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, _: received.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # a child keeps our handlers until it ignores signals
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for held in received:
            handlers[held](held, None)


class _Worker:
    """A worker process and its unanswered items, oldest first."""

    def __init__(self, work: Callable[[Any], Any], items: Iterable[Any] = ()) -> None:
        """items: those left by a worker that died.  They are sent one at a time, to find the one that kills.

        They include items that the dead worker had answered: tensors in shared memory are lost with their process.
        """
        self.items = deque(items)
        self.sent, self.trial = 0, len(self.items)
        with _interrupts_held():
            try:
                self.connection, theirs = multiprocessing.Pipe()
                arguments = (work, self.connection, theirs, os.getpid())
                # always fork, whatever start method the program chose: a worker watches its parent process
                self.process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
                self.process.start()
            except OSError as error:
                raise MachineError(f"a loader process cannot be started: {error}") from None
            theirs.close()  # otherwise the pipe would stay open when the process ends
        self._send()

    def give(self, item: Any) -> None:
        """Add an item."""
        self.items.append(item)
        self._send()

    def _send(self) -> None:
        """Send the unsent items; during a trial, only the oldest."""
        while self.sent < (1 if self.trial else len(self.items)):
            try:
                self.connection.send(self.items[self.sent])
            except ConnectionError:
                return  # the worker has died; receive() will notice
            self.sent += 1

    def receive(self, time_limit: float | None) -> Any:
        """Wait for the result of the oldest item, and drop that item.  Raises Death after the process has ended."""
        try:
            ready = wait([self.connection, self.process.sentinel], time_limit)
            if self.connection in ready:
                result = self.connection.recv()
                self.items.popleft()
                self.sent, self.trial = self.sent - 1, max(self.trial - 1, 0)
                self._send()
                return result
            if not ready:
                self.process.kill()
        except (EOFError, OSError):  # the pipe, or the shared memory of a finished item, died with the process
            ready = [self.process.sentinel]
            self.process.join(GRACE)
            if self.process.exitcode is None:
                raise
        self.process.join()
        raise Death(self.process.pid, self.process.exitcode if ready else None)


def _end(pool: list[_Worker]) -> None:
    """End the workers by shutting down their pipes; kill those that do not finish within GRACE seconds."""
    for worker in pool:
        with socket.socket(fileno=os.dup(worker.connection.fileno())) as pipe, suppress(OSError):
            pipe.shutdown(socket.SHUT_RDWR)  # closing is not enough: processes forked later hold the pipe, too
        worker.connection.close()
    deadline = time.monotonic() + GRACE
    for worker in pool:
        worker.process.join(max(deadline - time.monotonic(), 0))
        worker.process.kill()
        worker.process.join()
