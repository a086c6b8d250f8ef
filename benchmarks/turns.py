"""Let subjects take turns at the same work (A B A B ...), each in its own process while the others idle.

A change in the machine's speed then affects all of them.  This module does not import torch, so that a subject's
process can set its number of threads before it imports what the subject needs.
"""

import math
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from gndet.distributed.children import safe_children
from gndet.errors import ConfigError, GndetError, MachineError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")  # libraries' own settings
LOOK = 0.02  # seconds between two looks at whether a subject has answered
COUNT = 10  # looks between two readings of the memory of a subject and the processes that it started
PATIENCE = 10.0  # seconds that a process has to end by itself
WALL = "wall s"  # work that times itself, by a GPU's events, returns its seconds under this name

Work = Callable[[], dict[str, float]]


class Subject(NamedTuple):
    """A library or setting that is compared with others."""

    name: str
    build: Callable[..., Work]  # a module-level function; returns the work; called in the subject's process
    args: tuple[Any, ...] = ()  # arguments of build, pickled


class Limits(NamedTuple):
    """How long subjects may take.  A subject that takes longer or fails is given up, and the others go on."""

    build_s: float  # seconds from the start until all subjects are built
    end: float  # of all turns, by time.monotonic()
    lost: dict[str, str]  # is filled with the reason by the name of each subject that was given up


class Turn(NamedTuple):
    """The cost of doing a subject's work once."""

    wall_s: float
    cpu_s: float  # of all its threads, and of the processes that it started and that still live or were waited for
    peak_mib: float  # resident, since its process began; with the processes that it started, shared pages once
    facts: dict[str, float]  # what the work returned, e.g. {"kept MiB": 12.0}


def take_turns(
    subjects: Sequence[Subject],
    rounds: int,
    *,
    threads: int,
    warmup: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = lambda text: None,
    limits: Limits | None = None,
) -> dict[str, list[Turn]]:
    """Let every subject do its work `rounds` times, in turn, after `warmup` rounds that do not count.

    threads: how many each subject may use.  fresh: start a new process per turn, for work that happens once, e.g.
    opening a file.  Building a subject, with all its imports, is never timed; without fresh all are built at the same
    time.  say: called with a line per turn.  limits: give up a subject that fails or takes too long.
    Returns {name: its turns}.  Raises ConfigError for two subjects of one name and if there is no /proc; MachineError,
    which names the subject, if one fails or dies and there are no limits.
    """
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ConfigError(f"two subjects of one name: {', '.join(subject.name for subject in subjects)}")
    if not Path("/proc/self/status").exists():
        raise ConfigError("benchmarks need Linux: peak memory is read from /proc, which is missing here")
    turns: dict[str, list[Turn]] = {subject.name: [] for subject in subjects}
    end, lost = (math.inf, None) if limits is None else (limits.end, limits.lost)
    with ExitStack() as stack:
        runners = [] if fresh else [stack.enter_context(_process(subject, threads)) for subject in subjects]
        built_by = end if limits is None else min(end, time.monotonic() + limits.build_s)
        for runner in runners:
            with _given_up(runner.subject.name, lost):
                runner.answer(built_by)
        kept = {runner.subject.name: runner for runner in runners}
        for number in range(warmup + rounds):
            for subject in subjects:
                if time.monotonic() > end or (lost and subject.name in lost):
                    continue
                with _given_up(subject.name, lost):
                    turn = _fresh_turn(subject, threads, end) if fresh else kept[subject.name].work(end)
                    counted = number >= warmup
                    if counted:
                        turns[subject.name].append(turn)
                    what = f"round {number - warmup + 1}/{rounds}" if counted else "warm-up  "
                    say(f"{what}  {subject.name:24s} {turn.wall_s:9.3f} s  (CPU {turn.cpu_s:.3f} s)")
    return turns


@contextmanager
def _given_up(name: str, lost: dict[str, str] | None) -> Iterator[None]:
    """Note why a subject failed inside the context, if there is a place for notes."""
    try:
        yield
    except MachineError as error:
        if lost is None:
            raise
        lost[name] = str(error)


def _fresh_turn(subject: Subject, threads: int, end: float) -> Turn:
    """Let a subject do its work once in a new process."""
    with _process(subject, threads) as runner:
        runner.answer(end)
        return runner.work(end)


class _Runner(NamedTuple):
    """A subject's process, as seen by the process that started it."""

    subject: Subject
    process: BaseProcess
    connection: Connection

    def work(self, end: float) -> Turn:
        """Let the process do its work once.  Raises as `answer` does."""
        with suppress(ConnectionError):  # the answer tells
            self.connection.send("work")
        return self.answer(end)

    def answer(self, end: float) -> Turn:
        """Wait until the process has built its subject, or done its work once.

        end: until when, by time.monotonic().  Raises MachineError if it fails, dies or takes longer.
        """
        peak, looks = 0.0, 0
        try:
            while not self.connection.poll(LOOK):
                if time.monotonic() > end:
                    self.process.kill()
                    raise MachineError(f"{self.subject.name}: out of time")
                if looks % COUNT == 0 and (others := _descendants(self.process.pid)):
                    peak = max(peak, sum(map(shared_mib, [self.process.pid, *others])))
                looks += 1
            peak = max(peak, peak_mib(self.process.pid))
            wall_s, cpu_s, facts, trouble = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(PATIENCE)
            raise MachineError(f"{self.subject.name}: its process died: exit status {self.process.exitcode}") from None
        if trouble:
            raise MachineError(f"{self.subject.name} failed:\n{trouble}")
        return Turn(wall_s, cpu_s, peak, facts)


@contextmanager
def _process(subject: Subject, threads: int) -> Iterator[_Runner]:
    """Start a subject's process, which then builds the subject; end the process on exit in any case."""
    context = multiprocessing.get_context("spawn")
    own_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, threads), name=f"benchmark-{subject.name}")
    with safe_children():
        process.start()
    child_end.close()
    try:
        with suppress(ConnectionError):  # the process has died: its first answer tells
            own_end.send(subject)
        yield _Runner(subject, process, own_end)
    finally:
        own_end.close()  # this ends the process
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, threads: int) -> None:
    """Run in a subject's process: build the subject, then work each time it is asked to."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print to stdout is not part of the report
    try:
        subject = connection.recv()  # this imports the subject's module
        work = subject.build(*subject.args)
        connection.send((0.0, 0.0, {}, ""))
        while connection.recv():
            cpu, wall = _cpu_seconds(), time.perf_counter()
            facts = work()
            wall_s = facts.pop(WALL, time.perf_counter() - wall)
            connection.send((wall_s, _cpu_seconds() - cpu, facts, ""))
    except EOFError:
        return  # no more turns
    except GndetError as error:
        connection.send((0.0, 0.0, {}, str(error)))
    except Exception:  # any failure is reported by the parent process
        connection.send((0.0, 0.0, {}, traceback.format_exc()))


def _cpu_seconds() -> float:
    """Return CPU seconds of this process and of those it started; for living ones, to the system's clock tick."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick = os.sysconf("SC_CLK_TCK")
    alive = sum(sum(map(int, _stat(pid)[11:15])) for pid in _descendants(os.getpid()) if _stat(pid))
    return time.process_time() + waited_for.ru_utime + waited_for.ru_stime + alive / tick


def _descendants(pid: int) -> list[int]:
    """Return the ids of the processes that a process started, and of their descendants."""
    try:
        children = [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    except (OSError, ValueError):  # the process has just ended
        return []
    return [descendant for child in children for descendant in (child, *_descendants(child))]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; [] for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def shared_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB, its share of pages that others have, too; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process in MiB; 0 for a process that has ended.

    ru_maxrss would not do, because a spawned process starts with its parent's value.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
