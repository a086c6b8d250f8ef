"""Count the file operations of this process, and be killed before one of them, or let it fail.

An operation opens a file for writing, writes (half of) some bytes, cuts or syncs a file, or makes, renames, links or
removes something.  Audit hooks see most of them, in every thread; writing and syncing raise no event and are replaced.
"""

import builtins
import ctypes
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from gndet.cli.main import main as gndet
from gndet.modeling import resnet
from gndet.toolbox.norm_study import jobs, study

WIDTH = 4  # channels of the stem, for resnet.WIDTH: a checkpoint takes 0.6 MB
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {  # audit events, and the place of the path and of its folder's descriptor in their arguments
    "os.rename": (1, 3), "os.remove": (0, 1), "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.symlink": (1, 2),
    "os.link": (1, 3), "os.truncate": (0, None), "os.chmod": (0, 2), "os.utime": (0, 3),
}  # fmt: skip
GROWING = ("open", "write", "sync", "os.mkdir", "os.symlink", "os.link")  # these fail on a full disk
KILL, FAIL, FULL, COUNT = "kill", "fail", "full", "count"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_open = io.open


def main(how: str, number: int, root: str, arguments: Sequence[str]) -> int:
    """Run `gndet` in this process and print how many operations there were.  Returns its exit status.

    how: KILL: the process is killed before operation `number`, counted from 1; FAIL: that operation fails; FULL: from
    it on, every operation fails that needs room on the disk.  root: only operations below this folder count.
    """
    torch.set_num_threads(1)
    resnet.WIDTH = WIDTH
    operations = Operations(how, number, root)
    jobs.subprocess.Popen = partial(Cell, operations)
    study.MEASURED_IMAGES, study.MEASURED_UPDATES = 2, {"cpu": 2}
    operations.install()
    try:
        return gndet(arguments)
    finally:
        sys.stdout.flush()
        if how == COUNT:
            os.write(1, "".join(f"operation: {what}\n" for what in operations.made).encode())


class Operations:
    """The operations so far, and what happens at one of them."""

    def __init__(self, how: str, number: int, root: str) -> None:
        self.made: list[str] = []
        self.how, self._number, self._root = how, number, os.path.realpath(root)

    def install(self) -> None:
        """Watch this process from now on; an audit hook cannot be removed."""
        sys.addaudithook(self._heard)
        Written.step = self.step
        builtins.open = io.open = written

        def fsync(file: Any) -> None:
            self.step("sync", file if isinstance(file, int) else file.fileno())  # a kill loses nothing unsynced

        os.fsync = fsync

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & WRITING:
            self.step("open", arguments[0])
        elif event in CHANGES:
            path, folder = CHANGES[event]
            self.step(event, arguments[path], -1 if folder is None else arguments[folder])

    def step(self, what: str, where: Any, folder: int = -1) -> None:
        """Note an operation on a path or a descriptor; end the process or raise OSError if it is its turn.

        folder: the descriptor of the folder that a relative path starts at, -1: of the current one.
        """
        place = _place(where, folder)
        if not place.startswith(self._root + "/"):
            return
        self.made.append(f"{what} {re.sub('[0-9a-f]{32}', '*', os.path.relpath(place, self._root))}")
        number = len(self.made)
        if self.how == KILL and number == self._number:
            os.write(1, f"killed before operation {number}: {self.made[-1]}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.how == FAIL and number == self._number) or (
            self.how == FULL and number >= self._number and what in GROWING
        ):
            os.write(1, f"failed operation {number}: {self.made[-1]}\n".encode())
            number = errno.ENOSPC if what in GROWING else errno.EACCES
            raise OSError(number, os.strerror(number), place)


def _place(where: Any, folder: int) -> str:
    """Return the absolute path of an operation, with links in its folder resolved; "" for a descriptor without one."""
    if isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")
    path = os.fsdecode(where)
    if folder not in (-1, None):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    home, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(home), name)


class Cell:
    """A training of a norm study, forked from the study instead of started by an interpreter; it dies with the study.

    Its operations are not those of the study.
    """

    def __init__(self, operations: Operations, command: Sequence[str], *, stdout: Any, **_: Any) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            operations.how = ""
            os.dup2(stdout.fileno(), 1), os.dup2(stdout.fileno(), 2)
            status = gndet(command[command.index("train") :])
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end."""
        return self._wait(0)

    def terminate(self) -> None:
        """Ask it to end."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode


class Written(io.FileIO):
    """A file whose writes are operations: one before the bytes, one when half of them are written."""

    step: Callable[..., None]

    def write(self, data: Any) -> int:
        """Write in two halves."""
        if not len(data):
            return 0
        Written.step("write", self.fileno())
        view = memoryview(data).cast("B")
        half = super().write(view[: len(view) // 2])
        try:
            Written.step("write", self.fileno())
        except OSError:
            if half:
                return half  # as on a disk with room for so many bytes
            raise
        return half + super().write(view[half:])

    def truncate(self, size: int | None = None) -> int:
        """Cut the file."""
        Written.step("cut", self.fileno())
        return super().truncate(size)


def written(
    file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
    newline: str | None = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    """Open a file as `open` does, for writing as a `Written`."""
    if not set(mode) & set("wax+"):
        return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = Written(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    if "b" in mode:
        return buffer
    text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode
    return text
