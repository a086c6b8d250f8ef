"""A pool of forked processes that compute items ahead, in order, and are replaced when they die.

Each worker has a pipe of its own and shares nothing else; its death is noticed at once where its item is waited for.
Not concurrent.futures: one death breaks the whole executor, at exit it waits for every item begun, and its workers
outlive a main process that is killed.  Not torch's DataLoader: its workers share locks, which a killed worker may take
with it, it looks for deaths every 5 seconds only, and its SIGCHLD handler raises anywhere in the main thread.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from gndet.errors import GndetError, MachineError

PREFETCH = 4  # items that a worker has before it
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # sent to the whole process group; the main process decides
POLL = 1.0  # seconds between two looks whether the main process is still there
GRACE = 3.0  # seconds a worker has to finish its item when the pool is closed, and to be seen dead
CAUSES: dict[int, str] = {signal.SIGKILL: "out of memory?", signal.SIGBUS: "shared memory full?"}


class Death(Exception):
    """A worker died over an item, or was killed because the item took too long."""

    def __init__(self, pid: int | None, status: int | None) -> None:
        """status: multiprocessing's exitcode; None where the time limit was exceeded."""
        self.pid, self.status = pid, status

    def __str__(self) -> str:
        if self.status is None or self.status >= 0:
            return f"loader process {self.pid} ended by itself with status {self.status}"
        cause = CAUSES.get(-self.status)
        return f"loader process {self.pid} was killed by signal {-self.status}" + (f" ({cause})" if cause else "")


class Failure(NamedTuple):
    """The traceback of an exception in a worker: a bug, or a lack of memory."""

    text: str


def usable_cores() -> int:
    """How many processes can run at once."""
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

    work: in place of its result comes a Failure where it raises; a GndetError is raised here.
    on_death: called with the item over which a worker died, the Death, and how many workers in a row died over it.
    Returns the result that takes its place, or None to compute the item again.
    time_limit: seconds, from when the item's turn has come, after which its worker is killed.
    Raises MachineError where no process can be started.
    """
    pool: list[_Worker] = []  # to which the items are dealt in turn
    close = Finalize(None, _end, (pool,), exitpriority=0)  # also at exit, where multiprocessing waits for them
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


def _serve(work: Callable[[Any], Any], ours: Connection, theirs: Connection, main: int) -> None:
    """Compute the items that come through the pipe, until the main process ends that or dies."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the main process's pipe: what is written there would pass for a signal to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    ours.close()  # else this end of the pipe would outlive a main process that drops it
    try:
        while True:
            while not theirs.poll(POLL):
                if os.getppid() != main:  # other processes may hold its end of the pipe
                    return
            item = theirs.recv()
            try:
                result = work(item)
            except GndetError as error:
                result = error
            except Exception:  # whatever it is, the main process tells of it
                result = Failure(traceback.format_exc())
            try:
                theirs.send(result)  # its tensors in shared memory
            except (OSError, RuntimeError):  # no shared memory or file descriptor left
                theirs.send(Failure(traceback.format_exc()))
    except (EOFError, ConnectionError):
        return  # the main process is done, or gone


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold interrupts back while a process starts: masked, and noted, since any thread may take a Ctrl-C."""
    taken: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: taken.append(number)) if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # a child has our handlers until it ignores them
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if taken:
            signal.raise_signal(signal.SIGINT)


class _Worker:
    """A worker process, and the items that it has yet to answer, oldest first."""

    def __init__(self, work: Callable[[Any], Any], items: Iterable[Any] = ()) -> None:
        """items: left by a worker that died; they are sent one at a time, to find the deadly one.

        Results that the dead worker had sent are among them: tensors in shared memory are lost with their process.
        """
        self.items = deque(items)
        self.sent, self.trial = 0, len(self.items)
        with _interrupts_held():
            try:
                self.connection, theirs = multiprocessing.Pipe()
                arguments = (work, self.connection, theirs, os.getpid())
                # forked whatever a program has chosen: the life of a worker hangs on who its parent is
                self.process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
                self.process.start()
            except OSError as error:
                raise MachineError(f"a loader process cannot be started: {error}") from None
            theirs.close()  # else the end of the process would not end the pipe
        self._send()

    def give(self, item: Any) -> None:
        """Add an item."""
        self.items.append(item)
        self._send()

    def _send(self) -> None:
        """Send the items that have not been sent; on trial, only the oldest."""
        while self.sent < (1 if self.trial else len(self.items)):
            try:
                self.connection.send(self.items[self.sent])
            except ConnectionError:
                return  # it is dead; noticed when its result is waited for
            self.sent += 1

    def receive(self, time_limit: float | None) -> Any:
        """Wait for the result of the oldest item, and drop that item.  Raises Death, once the process has ended."""
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
        except (EOFError, OSError):  # its end of the pipe, or the shared memory of a finished item, went with it
            ready = [self.process.sentinel]
            self.process.join(GRACE)
            if self.process.exitcode is None:
                raise
        self.process.join()
        raise Death(self.process.pid, self.process.exitcode if ready else None)


def _end(pool: list[_Worker]) -> None:
    """End the workers: the end of its pipe tells each; one that is not done soon is killed."""
    for worker in pool:
        with socket.socket(fileno=os.dup(worker.connection.fileno())) as pipe, suppress(OSError):
            pipe.shutdown(socket.SHUT_RDWR)  # closing it would not do: processes forked later hold it, too
        worker.connection.close()
    deadline = time.monotonic() + GRACE
    for worker in pool:
        worker.process.join(max(deadline - time.monotonic(), 0))
        worker.process.kill()
        worker.process.join()
