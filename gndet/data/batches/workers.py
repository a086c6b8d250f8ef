"""Processes that prepare items ahead, in order, and are replaced when they are killed.

Not torch's DataLoader: its processes share locks, which one that is killed may take with it, it looks for a death every
5 seconds only, and its SIGCHLD handler raises anywhere in the main thread, in the middle of an optimiser step too.
Here a process has a pipe of its own and shares nothing else; a death is noticed where its item is waited for, at once.
"""

import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor

from gndet.errors import DataError, GndetError

PREFETCH = 4  # items a process prepares ahead
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # sent to the whole process group; the main process decides
POLL = 1.0  # seconds between two looks whether the main process is still there
GRACE = 3.0  # seconds a process has to finish its item when the loader is closed, and to be seen dead
CAUSES = {signal.SIGKILL: "out of memory?", signal.SIGBUS: "shared memory full?"}

Notify = Callable[[str], None]


def prepared(
    load: Callable[[Any], Any],
    items: Iterator[Any],
    *,
    workers: int,
    pin_memory: bool,
    describe: Callable[[Any], str],
    notify: Notify | None = None,
) -> Generator[Any, None, None]:
    """Yield load(item) for each item, in order, prepared in `workers` processes of one thread, or here if that is 0.

    The processes end with the generator: exhausted, closed or no longer held.
    load: its result depends on the item alone; a GndetError that it raises is raised here.  describe: names an item in
    messages.  notify: called with a line where a process was killed; its items are prepared again by a new one.
    Raises DataError where one that prepares nothing but the item waited for is killed as well.
    """
    if workers == 0:
        for item in items:
            result = load(item)
            yield _pinned(result) if pin_memory else result
        return
    pool = _Pool(load, items, workers, describe, notify)
    try:
        for result in pool.results():
            yield _pinned(result) if pin_memory else result
    finally:
        pool.close()


def _pinned(value: Any) -> Any:
    """Put the tensors of nested NamedTuples into page-locked memory, from where a GPU fetches them by itself."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return type(value)(*map(_pinned, value)) if hasattr(value, "_fields") else value


# --- in the processes


class _Failure(NamedTuple):
    """What a process sends where a bug of ours, or a lack of memory, kept it from preparing an item."""

    text: str


def _serve(load: Callable[[Any], Any], connection: Connection, main: int) -> None:
    """The life of a loader process: prepare what comes through the pipe until the main process ends that, or dies."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the main process's pipe: what is written there would pass for a signal to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    torch.set_num_threads(1)
    try:
        while _waiting(connection, main):
            item = connection.recv()
            try:
                result = load(item)
            except GndetError as error:
                result = error
            except Exception:  # whatever it is, the main process raises it
                result = _Failure(traceback.format_exc())
            _send(connection, result)
    except (EOFError, ConnectionError):
        return  # the main process is done, or gone


def _waiting(connection: Connection, main: int) -> bool:
    """Wait for an item.  Returns False once the main process is gone: its end of the pipe may live on in others."""
    while not connection.poll(POLL):
        if os.getppid() != main:
            return False
    return True


def _send(connection: Connection, result: Any) -> None:
    """Send a result, its tensors in shared memory."""
    try:
        connection.send(result)
    except (OSError, RuntimeError):  # no shared memory or file descriptor left
        connection.send(_Failure(traceback.format_exc()))


# --- in the main process


@dataclass
class _Task:
    """An item that has been taken and not yet yielded."""

    item: Any
    worker: int  # its place in _Pool.workers
    sent: bool = False


@dataclass
class _Worker:
    """A loader process."""

    process: mp.Process
    connection: Connection
    trial: int = 0  # items left of those that its predecessor died with: sent one at a time, to find the deadly one


class _Death(Exception):
    """A loader process has died; the text says how."""


class _Pool:
    """The processes of one stream of items."""

    def __init__(
        self,
        load: Callable[[Any], Any],
        items: Iterator[Any],
        count: int,
        describe: Callable[[Any], str],
        notify: Notify | None,
    ) -> None:
        self.load, self.items, self.count, self.describe, self.notify = load, items, count, describe, notify
        self.workers: list[_Worker] = []
        self.tasks: deque[_Task] = deque()  # in order; the first is the next to be yielded
        self.taken = 0
        self.close = Finalize(None, self._end, exitpriority=0)  # also at exit, where multiprocessing waits for them

    def results(self) -> Iterator[Any]:
        """Yield the results, in order."""
        self._take()
        deaths = 0  # since the last result
        while self.tasks:
            task = self.tasks[0]
            try:
                result = self._result(task)
            except _Death as death:
                deaths += 1
                self._replace(task, str(death), deaths)
                continue
            if isinstance(result, GndetError):
                raise result
            if isinstance(result, _Failure):
                raise RuntimeError(f"in a loader process, preparing {self.describe(task.item)}:\n{result.text}")
            deaths = 0
            self.tasks.popleft()
            worker = self.workers[task.worker]
            worker.trial = max(worker.trial - 1, 0)
            self._take()
            self._send_to(task.worker)
            yield result

    def _take(self) -> None:
        """Take items until each process has PREFETCH of them, and send them."""
        while len(self.tasks) < self.count * PREFETCH:
            try:
                item = next(self.items)
            except StopIteration:
                return
            place = self.taken % self.count
            self.taken += 1
            self.tasks.append(_Task(item, place))
            if place == len(self.workers):
                self.workers.append(self._start())
            self._send_to(place)

    def _send_to(self, place: int) -> None:
        """Send a process what it has not been sent; one on trial has a single item at a time."""
        worker = self.workers[place]
        for task in (task for task in self.tasks if task.worker == place):
            if not task.sent:
                try:
                    worker.connection.send(task.item)
                except ConnectionError:
                    return  # it is dead; noticed when its result is waited for
                task.sent = True
            if worker.trial:
                return

    def _result(self, task: _Task) -> Any:
        """Wait for a task's result.  Raises _Death where the process died."""
        worker = self.workers[task.worker]
        try:
            if worker.connection in wait([worker.connection, worker.process.sentinel]):
                return worker.connection.recv()
        except (EOFError, OSError):  # its end of the pipe, or the shared memory of a finished item, went with it
            worker.process.join(GRACE)
            if worker.process.exitcode is None:
                raise
        worker.process.join()
        raise _Death(f"loader process {worker.process.pid} {_how(worker.process.exitcode)}")

    def _replace(self, task: _Task, death: str, deaths: int) -> None:
        """Start another process for the one that died while task was waited for, and send it the items anew.

        Raises DataError for the second death over one task.
        """
        if deaths > 1:
            raise DataError(
                f"{death} while preparing {self.describe(task.item)}, and so did the one before it; data.workers=0 "
                "shows the cause; if memory is short, set data.workers lower; if shared memory is (signal 7), give "
                "the container more (docker run --shm-size=8g)"
            )
        lost = [one for one in self.tasks if one.worker == task.worker]
        self.workers[task.worker].connection.close()
        self.workers[task.worker] = self._start()
        self.workers[task.worker].trial = len(lost)
        for one in lost:
            one.sent = False
        self._send_to(task.worker)
        if self.notify:
            self.notify(f"{death} while preparing {self.describe(task.item)}; started anew")

    def _start(self) -> _Worker:
        """Start a process.  Signals wait meanwhile: it inherits the handlers of this one until it ignores them."""
        ours, theirs = mp.Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            # forked whatever a program has chosen: the life of a process hangs on who its parent is
            process = mp.get_context("fork").Process(target=_serve, args=(self.load, theirs, os.getpid()), daemon=True)
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # else the end of the process would not end the pipe
        return _Worker(process, ours)

    def _end(self) -> None:
        """End the processes: the end of its pipe tells each; one that is not done soon is killed."""
        for worker in self.workers:
            with socket.socket(fileno=os.dup(worker.connection.fileno())) as pipe, suppress(OSError):
                pipe.shutdown(socket.SHUT_RDWR)  # closing it would not do: processes forked later hold it, too
            worker.connection.close()
        deadline = time.monotonic() + GRACE
        for worker in self.workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            worker.process.kill()
            worker.process.join()


def _how(status: int | None) -> str:
    """Say how a process ended, of multiprocessing's exitcode."""
    if status is None or status >= 0:
        return f"ended by itself with status {status}"
    cause = CAUSES.get(-status)
    return f"was killed by signal {-status}" + (f" ({cause})" if cause else "")
