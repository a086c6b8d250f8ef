"""A pool of forked processes that compute items ahead, in order, and are replaced when they die.

Each worker has its own pipe and shares nothing else, so the pool notices a death as soon as it waits for that worker.
The arrays of a result come in a file in memory, which needs neither /dev/shm nor, once it is mapped, an open file.
Why not concurrent.futures: one death breaks the whole executor, exit waits for every item that was started, and its
workers outlive a main process that is killed.  Why not torch's DataLoader: its workers share locks that a killed worker
may never release, it looks for deaths only every 5 seconds, and its SIGCHLD handler raises anywhere in the main thread.
"""

import mmap
import multiprocessing
import os
import pickle
import resource
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
from gndet.errors import GndetError, MachineError, out_of_memory

PREFETCH = 4  # items queued per worker
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the whole process group gets them; the main process decides
GRACE = 3.0  # seconds for a worker to finish its item when the pool closes, and to exit once its pipe is broken
CAUSES: dict[int, str] = {signal.SIGKILL: "out of memory?"}
SMALL = 1 << 16  # bytes: a smaller result goes through the pipe
ALIGNED = 64  # bytes: arrays start at multiples of it in memory, as PyTorch's do
REMEDY = "end other programs or, in training, lower data.workers (0: no processes)"


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
    """The traceback of an exception in a worker: a bug, or a lack of memory."""

    text: str
    out_of_memory: bool


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
    Raises MachineError if a process cannot be started, or if memory or open files run out.
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
                parts = _packed(work(item))
            except GndetError as error:
                parts = _packed(error)
            except Exception as error:  # of any kind: the main process reports it
                parts = _packed(Failure(traceback.format_exc(), out_of_memory(error)))
            _send(theirs, parts)
    except (EOFError, ConnectionError):
        return  # the main process has finished or died


def _packed(result: Any) -> list[bytes | memoryview]:
    """Pickle a result.  Returns the pickle, and the memory of each array."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
    return [pickled, *(array.raw() for array in arrays)]


def _send(connection: Connection, parts: Sequence[bytes | memoryview]) -> None:
    """Send the parts of a result in a file in memory, or where there can be none, through the pipe, which is slower.

    Such a file needs neither /dev/shm nor the life of this process.
    """
    connection.send([len(part) for part in parts])
    with _socket(connection) as pipe:
        try:
            with _memory_file(parts) as file:
                socket.send_fds(pipe, [b"F"], [file])
                return
        except ConnectionError:
            raise
        except OSError:  # the system has no such files, or a limit: of memory, of the size of files, of open files
            pipe.sendall(b"P")
    for part in parts:
        connection.send_bytes(part)


def _receive(connection: Connection) -> Any:
    """Return a result that was sent.  Raises MachineError if this process has no open file or no memory left for it."""
    lengths = connection.recv()
    with _socket(connection) as pipe:
        kind, files, *_ = socket.recv_fds(pipe, 1, 1)
    if not kind:
        raise EOFError
    if kind == b"P":
        pickled, *arrays = [bytearray(connection.recv_bytes()) for _ in lengths]
        return pickle.loads(pickled, buffers=arrays)
    if not files:
        raise MachineError(f"too many open files: raise the limit (ulimit -n 4096), or {REMEDY}")
    content, parts, start = _content(*files), list[memoryview](), 0
    for length in lengths:
        parts.append(content[start : start + length])
        start += length + -length % ALIGNED
    return pickle.loads(parts[0], buffers=parts[1:])


@contextmanager
def _socket(connection: Connection) -> Iterator[socket.socket]:
    """Use a pipe as the socket that it is, without another open file."""
    pipe = socket.socket(fileno=connection.fileno())
    pipe.settimeout(None)  # whatever socket.setdefaulttimeout says
    try:
        yield pipe
    finally:
        pipe.detach()


@contextmanager
def _memory_file(parts: Sequence[bytes | memoryview]) -> Iterator[int]:
    """Open a file in memory that holds the parts.  Raises OSError if they are small, or if there can be none."""
    if not hasattr(os, "memfd_create") or sum(map(len, parts)) < SMALL:
        raise OSError
    file = os.memfd_create("gndet")
    try:
        for part in parts:
            for piece in (memoryview(part), memoryview(bytes(-len(part) % ALIGNED))):
                while piece:
                    piece = piece[os.write(file, piece) :]
        yield file
    finally:
        os.close(file)


def _content(file: int) -> memoryview:
    """Map an open file into memory, and close it.  Raises MachineError.

    Python's mapping holds a file open, so the content is copied instead if half of the allowed files are open.
    """
    try:
        with suppress(OSError):
            os.close(lowest := os.dup(file))  # all numbers below it are taken
            if lowest < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
                return memoryview(mmap.mmap(file, 0))
        content, done = memoryview(bytearray(os.fstat(file).st_size)), 0
        while done < len(content):
            done += os.preadv(file, [content[done:]], done)
        return content
    except MemoryError:
        raise MachineError(f"no memory for the result of a loader process: {REMEDY}") from None
    finally:
        os.close(file)


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
        """items: those that a worker left which died."""
        self.items, self.sent = deque(items), 0
        with _interrupts_held():
            try:
                self.connection, theirs = multiprocessing.Pipe()
                arguments = (work, self.connection, theirs, os.getpid())
                # always fork, whatever start method the program chose: a worker watches its parent process
                self.process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
                self.process.start()
            except OSError as error:
                raise MachineError(f"a loader process cannot be started: {error.strerror or error}: {REMEDY}") from None
            theirs.close()  # otherwise the pipe would stay open when the process ends
        self._send()

    def give(self, item: Any) -> None:
        """Add an item."""
        self.items.append(item)
        self._send()

    def _send(self) -> None:
        """Send the unsent items."""
        while self.sent < len(self.items):
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
                result = _receive(self.connection)
                self.items.popleft()
                self.sent -= 1
                return result
            if not ready:
                self.process.kill()
        except (EOFError, OSError):  # the pipe died with the process
            ready = [self.process.sentinel]
            self.process.join(GRACE)
            if self.process.exitcode is None:
                raise
        self.process.join()
        raise Death(self.process.pid, self.process.exitcode if ready else None)


def _end(pool: list[_Worker]) -> None:
    """End the workers by shutting down their pipes; kill those that do not finish within GRACE seconds."""
    for worker in pool:
        with _socket(worker.connection) as pipe, suppress(OSError):
            pipe.shutdown(socket.SHUT_RDWR)  # closing is not enough: processes forked later hold the pipe, too
        worker.connection.close()
    deadline = time.monotonic() + GRACE
    for worker in pool:
        worker.process.join(max(deadline - time.monotonic(), 0))
        worker.process.kill()
        worker.process.join()
