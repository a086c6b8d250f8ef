"""Runs in separate processes that can be signalled, killed and waited for, and are found by their folder.

A process of a run and all its children have FOLDER/processes/NAME as their working directory: none may be left after
the run.  Without torchrun, ranks are forked from a process that has imported everything, which saves 4 seconds;
torchrun starts its own interpreters.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from faults.host import environment, host
from faults.tiny import BrokenPromise, check, write_config
from gndet.modeling import resnet

PATIENCE = 300.0  # seconds after which a test gives up on an event; generous, because the machine may be busy
SHUTDOWN = 120  # seconds in which ranks must end after a signal to torchrun before it kills them
GONE_WITHIN = 60.0  # seconds in which loader processes of a killed run must end
POLL = 0.02
MAIN = "faults.inject:main"
Faults = Mapping[str, list[Any]]  # of inject.FAULTS, with their arguments


class Started:
    """A started run: `pids` and `statuses()` by rank, or those of torchrun itself."""

    def __init__(self, home: Path, out: Path, log: Path, pids: list[int], poll: list[Callable[[], int | None]]) -> None:
        self.home, self.out, self.log, self.pids, self._poll = home, out, log, pids, poll

    @property
    def text(self) -> str:
        """The output of the run so far."""
        with suppress(FileNotFoundError):
            return self.log.read_text(encoding="utf-8", errors="replace")
        return ""

    def statuses(self) -> list[int | None]:
        """Return the exit status of each process, minus the signal if it was killed; None while it runs."""
        return [poll() for poll in self._poll]

    def wait_for(self, words: str) -> None:
        """Wait until the output of the run holds some words."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.text:
            ended = None not in self.statuses()
            if (ended and words not in self.text) or time.monotonic() > deadline:
                raise BrokenPromise(
                    f"{words!r} expected, but {'the run ended' if ended else 'nothing came'}: {self.tail()}"
                )
            time.sleep(POLL)

    def open_gate(self, update: int) -> None:
        """Let a run continue that waits after an update (inject.gate)."""
        (self.home / f"gate-{update}").touch()

    def signal(self, number: int, rank: int | None = None) -> float:
        """Send a signal to one process of the run, or to all.  Returns the time."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return time.monotonic()

    def wait(self, since: float | None = None, within: float = PATIENCE) -> float:
        """Wait until all processes have ended, and check that none is left.  Returns the seconds it took.

        since: the time from which `within` counts (default: now).
        """
        began = time.monotonic() if since is None else since
        while None in self.statuses():
            if time.monotonic() > began + within:
                raise BrokenPromise(f"not ended after {time.monotonic() - began:.0f} s: {self.tail()}")
            time.sleep(POLL)
        seconds = time.monotonic() - began
        deadline = time.monotonic() + GONE_WITHIN
        while (left := processes_in(self.home)) and time.monotonic() < deadline:
            time.sleep(POLL)
        check(not left, f"processes are left {GONE_WITHIN:.0f} s after the end of their run: {left}: {self.tail()}")
        return seconds

    def wait_for_rank(self, rank: int) -> None:
        """Wait for the end of one rank."""
        deadline = time.monotonic() + PATIENCE
        while self.statuses()[rank] is None:
            check(time.monotonic() < deadline, f"rank {rank} has not ended: {self.tail()}")
            time.sleep(POLL)

    def expect(self, *statuses: int) -> str:
        """Wait for the end and check the exit status of each process.  Returns the output of the run."""
        self.wait()
        check(self.statuses() == list(statuses), f"exit status {self.statuses()}, expected {statuses}: {self.tail()}")
        return self.text

    def rank_pid(self, rank: int) -> int:
        """Return the process id of a rank that torchrun started."""
        for pid in processes_in(self.home):
            with suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.pids[0] and f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                    return pid
        raise BrokenPromise(f"no process of rank {rank}: {self.tail()}")

    def children(self, rank: int = 0) -> list[int]:
        """Return the children of a forked rank: its loader processes."""
        found = []
        for pid in processes_in(self.home):
            with suppress(OSError):
                if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == self.pids[rank]:
                    found.append(pid)
        return found

    def tail(self) -> str:
        """Return the end of the run's output, for errors."""
        return f"{self.log}:\n{self.text[-1500:]}"


def start(folder: Path, name: str, *overrides: str, faults: Faults | None = None, world: int = 1) -> Started:
    """Start `gndet train` into folder/name, with `world` ranks, without torchrun."""
    home, log, words = prepare(folder, name, overrides, faults)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    pids = [
        host().fork(home, log, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, MAIN, words)
        for rank in range(world)
    ]
    return Started(home, folder / name, log, pids, [partial(host().status, pid) for pid in pids])


def call(folder: Path, function: str, *arguments: Any) -> Started:
    """Start a process that calls a function, "module:name", which returns the exit status."""
    home = folder.resolve() / "processes" / function.rpartition(":")[2]
    home.mkdir(parents=True, exist_ok=True)
    log = next_log(home)
    pid = host().fork(home, log, {}, function, *arguments)
    return Started(home, folder, log, [pid], [partial(host().status, pid)])


def spawn(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call function(rank, *args) on each rank and wait, like torch.multiprocessing.spawn, but fork it.

    function is defined at module level, and args are pickled.  resnet.WIDTH is that of this process.
    """
    with tempfile.TemporaryDirectory() as home, cleared(Path(home)):
        work, log = Path(home) / "work", next_log(Path(home))
        work.write_bytes(pickle.dumps((function, args)))
        here = {"path": sys.path, "width": resnet.WIDTH}
        pids = [
            host().fork(Path(home), log, {}, f"{__name__}:_spawned", rank, str(work), here) for rank in range(nprocs)
        ]
        run = Started(Path(home), Path(home), log, pids, [partial(host().status, pid) for pid in pids])
        while any(status is None for status in run.statuses()):
            check(not any(run.statuses()), f"a rank failed: {run.statuses()}: {run.tail()}")
            time.sleep(POLL)
        run.expect(*[0] * nprocs)


def _spawned(rank: int, work: str, there: dict[str, Any]) -> None:
    """Run one rank of `spawn`."""
    sys.path[:], resnet.WIDTH = there["path"], there["width"]
    function, args = pickle.loads(Path(work).read_bytes())
    function(rank, *args)


def torchrun(
    folder: Path, name: str, *overrides: str, faults: Faults | None = None, world: int = 2, restarts: int = 0
) -> Started:
    """Start `gndet train` into folder/name under torchrun, which restarts the ranks up to `restarts` times."""
    home, log, words = prepare(folder, name, overrides, faults)
    options = ["--standalone", f"--nproc_per_node={world}", f"--max_restarts={restarts}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "faults.inject", *words]
    with log.open("ab") as file:
        variables = environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN)}
        process = subprocess.Popen(command, cwd=home, env=variables, stdout=file, stderr=file)
    return Started(home, folder / name, log, [process.pid], [process.poll])


def finish(folder: Path, name: str, *overrides: str, faults: Faults | None = None, world: int = 1) -> str:
    """Run the command to its end.  Returns its output."""
    return start(folder, name, *overrides, faults=faults, world=world).expect(*[0] * world)


def unbroken(folder: Path, *overrides: str, faults: Faults | None = None, world: int = 1) -> Path:
    """Return the undisturbed run with these overrides, made once for all scenarios in the same parent folder."""
    text = json.dumps([overrides, faults, world])
    name = f"{world}-{'-'.join(word.rpartition('.')[2] for word in overrides) or 'plain'}"
    home = folder.parent / "unbroken" / "".join(c if c.isalnum() or c in "-=" else "_" for c in name)
    key = home / "key"
    if not key.exists():
        home.mkdir(parents=True)
        finish(home, "run", *overrides, faults=faults, world=world)
        key.write_text(text)
    check(key.read_text() == text, f"{home}: of other overrides: {key.read_text()}, expected {text}")
    return home / "run"


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """Kill all processes of a scenario that are still alive at its end."""
    try:
        yield
    finally:
        for _ in range(3):  # a killed process may just have started another one
            for pid in processes_in(folder):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL)


def processes_in(folder: Path) -> list[int]:
    """Return the processes whose working directory is in this folder."""
    found, own = [], os.getpid()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != own:
            with suppress(OSError):  # it has ended, or belongs to another user
                if Path(os.readlink(f"/proc/{entry}/cwd")).is_relative_to(folder):
                    found.append(int(entry))
    return found


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def next_log(home: Path) -> Path:
    """Create an empty log file for the next process with this working directory."""
    log = home / f"log-{sum(1 for _ in home.glob('log-*')) + 1}.txt"
    log.touch()
    return log


def prepare(folder: Path, name: str, overrides: tuple[str, ...], faults: Faults | None) -> tuple[Path, Path, list[str]]:
    """Return the working directory of a run, its next log, and the arguments of `inject.main`."""
    home = (folder / "processes" / name).resolve()
    home.mkdir(parents=True, exist_ok=True)
    log = next_log(home)
    words = ["train", str(write_config(folder)), f"out={folder / name}", *overrides]
    return home, log, [json.dumps(dict(faults or {})), *words]
