"""Subjects that do the same work take turns: A B A B ..., each in a process of its own, the others idle meanwhile.

A change of the machine's speed then falls on all of them.  This module imports no torch: a subject's process sets its
number of threads before whatever the subject needs is imported.
"""

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from gndet.errors import ConfigError, GndetError, MachineError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")  # of libraries' own
LOOK = 0.02  # seconds between two looks at the memory of a subject and the processes that it started
PATIENCE = 10.0  # seconds that a process has to end in by itself

Work = Callable[[], dict[str, float]]


class Subject(NamedTuple):
    """One of those that are compared."""

    name: str
    build: Callable[..., Work]  # a module's own; called in the subject's process, returns the work, which returns facts
    args: tuple[Any, ...] = ()  # of build, pickled


class Turn(NamedTuple):
    """What a subject took for its work once."""

    wall_s: float
    cpu_s: float  # of all its threads, and of the processes that it started and that are still there or were waited for
    peak_mib: float  # resident, since its process began: the peaks of processes that live at one time added up
    facts: dict[str, float]  # what the work returned, like {"kept MiB": 12.0}


def take_turns(
    subjects: Sequence[Subject],
    rounds: int,
    *,
    threads: int,
    warmup: int = 1,
    fresh: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Turn]]:
    """Let every subject do its work `rounds` times, in turn, after `warmup` rounds that do not count.

    threads: that each may use.  fresh: a new process for each turn, where the work is what happens once, like opening
    a file.  Building, and with it all imports, is never timed.  say: told of each turn, a line.
    Returns {name: its turns}.  Raises ConfigError for two subjects of one name and where there is no /proc;
    MachineError, which names the subject, for one that fails or dies.
    """
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ConfigError(f"two subjects of one name: {', '.join(subject.name for subject in subjects)}")
    if not Path("/proc/self/status").exists():
        raise ConfigError("needs Linux, where /proc shows a process's peak of memory")
    turns: dict[str, list[Turn]] = {subject.name: [] for subject in subjects}
    with ExitStack() as stack:
        kept = {} if fresh else {one.name: stack.enter_context(_process(one, threads)) for one in subjects}
        for number in range(warmup + rounds):
            for subject in subjects:
                if fresh:
                    with _process(subject, threads) as runner:
                        turn = runner.ask("work")
                else:
                    turn = kept[subject.name].ask("work")
                counted = number >= warmup
                if counted:
                    turns[subject.name].append(turn)
                what = f"round {number - warmup + 1}/{rounds}" if counted else "warm-up  "
                say(f"{what}  {subject.name:24s} {turn.wall_s:9.3f} s  (CPU {turn.cpu_s:.3f} s)")
    return turns


class _Runner(NamedTuple):
    """A subject's process, seen from the one that has started it."""

    subject: Subject
    process: BaseProcess
    connection: Connection

    def ask(self, question: Subject | str) -> Turn:
        """Let it build what it is sent, or else work once.  Raises MachineError where it fails or dies."""
        peak = 0.0
        try:
            self.connection.send(question)
            waiting = True
            while waiting:
                waiting = not self.connection.poll(LOOK)
                peak = max(peak, sum(map(_peak_mib, [self.process.pid, *_descendants(self.process.pid)])))
            wall_s, cpu_s, facts, trouble = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(PATIENCE)
            raise MachineError(f"{self.subject.name}: its process died: exit status {self.process.exitcode}") from None
        if trouble:
            raise MachineError(f"{self.subject.name} failed:\n{trouble}")
        return Turn(wall_s, cpu_s, peak, facts)


@contextmanager
def _process(subject: Subject, threads: int) -> Iterator[_Runner]:
    """Start a subject's process and let it build; end it afterwards, whatever it does."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, threads), name=f"benchmark-{subject.name}")
    process.start()
    there.close()
    try:
        runner = _Runner(subject, process, here)
        runner.ask(subject)
        yield runner
    finally:
        here.close()  # which ends it
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, threads: int) -> None:
    """The life of a subject's process."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print there is no part of the report
    try:
        subject = connection.recv()  # here its module is imported
        work = subject.build(*subject.args)
        connection.send((0.0, 0.0, {}, ""))
        while connection.recv():
            cpu, wall = _cpu_seconds(), time.perf_counter()
            facts = work()
            wall_s = time.perf_counter() - wall
            connection.send((wall_s, _cpu_seconds() - cpu, facts, ""))
    except EOFError:
        return  # no more turns
    except GndetError as error:
        connection.send((0.0, 0.0, {}, str(error)))
    except Exception:  # whatever it trips over is told by the process that reports
        connection.send((0.0, 0.0, {}, traceback.format_exc()))


def _cpu_seconds() -> float:
    """Of this process, and of those it started: by the system's clock ticks for those that are still there."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick = os.sysconf("SC_CLK_TCK")
    alive = sum(sum(map(int, _stat(pid)[11:15])) for pid in _descendants(os.getpid()) if _stat(pid))
    return time.process_time() + waited_for.ru_utime + waited_for.ru_stime + alive / tick


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    try:
        children = [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    except (OSError, ValueError):  # it has just ended
        return []
    return [one for child in children for one in (child, *_descendants(child))]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name; [] for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _peak_mib(pid: int) -> float:
    """The most that a process has had resident, MiB; 0 for one that has ended.

    Not ru_maxrss: a process that was spawned begins with its parent's.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
