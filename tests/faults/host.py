"""A process that has imported everything and forks others: a run starts in 0.1 s instead of 5 s.

multiprocessing has only one fork server per program, and other tests use it with fewer imports.
"""

import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gndet
from faults.tiny import check

PRELOADED = ("faults.inject", "gndet.toolbox.report.report")  # the second is imported at the end of a run
LENGTH = 64  # bytes per answer
POLL = 0.02  # seconds between two checks for ended processes


def environment() -> dict[str, str]:
    """Return the environment of an interpreter that runs this gndet and these faults on one thread, from any folder."""
    folders = (Path(gndet.__file__).resolve().parent.parent, Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}


class Host:
    """A handle on the host process; its children are not in the terminal's process group."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
            start_new_session=True, text=True, bufsize=1,
        )  # fmt: skip
        self._ended: dict[int, int] = {}

    def fork(self, folder: Path, log: Path, variables: Mapping[str, str], call: str, *arguments: Any) -> int:
        """Start a process that calls "module:function" with the arguments and exits with the returned status.

        folder: its working directory.  log: file to which its output is appended.  variables: added to its environment.
        Returns its pid.
        """
        request = {"folder": str(folder), "log": str(log), "variables": dict(variables), "call": call}
        print(json.dumps(request | {"arguments": arguments}), file=self._process.stdin, flush=True)
        while "forked" not in (answer := self._answer()):
            self._ended[answer["ended"]] = answer["status"]
        return answer["forked"]

    def status(self, pid: int) -> int | None:
        """Return the exit status of a process, minus the signal if it was killed; None while it runs."""
        while select.select([self._process.stdout], [], [], 0)[0]:
            answer = self._answer()
            self._ended[answer["ended"]] = answer["status"]
        return self._ended.get(pid)

    def _answer(self) -> dict[str, int]:
        """Wait for the next answer and return it."""
        answer = os.read(self._process.stdout.fileno(), LENGTH)
        check(bool(answer), "the host process has ended by itself")
        return json.loads(answer)


@functools.cache
def host() -> Host:
    """Return the host of this process, starting it at the first call; it ends with this process."""
    return Host()


def serve() -> None:
    """Fork the processes that standard input asks for and report those that ended, until it is closed."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a garbage collection in a fork would copy the pages of every object
    running: set[int] = set()
    while True:
        if select.select([0], [], [], POLL)[0]:
            request = os.read(0, 1 << 16)  # a single request: the next one is sent after the answer
            if not request:
                break
            pid = os.fork()
            if not pid:
                _live(json.loads(request))
            running.add(pid)
            _tell(forked=pid)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.discard(ended[0])
            _tell(ended=ended[0], status=os.waitstatus_to_exitcode(ended[1]))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _tell(**answer: int) -> None:
    """Send an answer of fixed length, so that the other side can read answers one by one."""
    os.write(1, json.dumps(answer).ljust(LENGTH).encode())


def _live(request: dict[str, Any]) -> None:
    """Run a request in a forked process; it exits like an interpreter."""
    os.chdir(request["folder"])
    descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(request["variables"])
    module, _, name = request["call"].partition(":")
    sys.exit(getattr(importlib.import_module(module), name)(*request["arguments"]))


if __name__ == "__main__":
    serve()
