"""Run `gndet` in a forked process under limits of the machine; the fork spares it the seconds that the imports take."""

import multiprocessing
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from gndet.cli.main import main

HELD: list[bytearray] = []  # memory that a child takes away from itself
PATIENCE = 120.0  # seconds, after which a process is taken to hang


class Ended(NamedTuple):
    """How a process ended."""

    status: int | None  # multiprocessing's exitcode
    text: str  # what it printed

    @property
    def last(self) -> str:
        """The last line."""
        return self.text.strip().rpartition("\n")[2]


def gndet(folder: Path, *arguments: object, before: Callable[[], object] = lambda: None) -> Ended:
    """Run a verb in a child of this process that calls `before` first.  folder: for its output.

    hotcoco's threads do not survive a fork: a verb that scores needs evaluation.engine=pycocotools.
    """
    file = folder / "printed.txt"

    def run() -> None:
        printed = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        status = 99
        try:
            before()
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
    process.join()
    return Ended(process.exitcode, file.read_text(errors="replace"))


def limit(kind: int, value: int) -> Callable[[], None]:
    """Return a function that lowers a limit for good."""
    return lambda: resource.setrlimit(kind, (value, value))


def little_memory(mib: float) -> Callable[[], None]:
    """Return a function that leaves the process this much more memory than it has."""

    def lower() -> None:
        size = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        try:
            while True:
                HELD.append(bytearray(1 << 18))  # what earlier tests have freed does not count
        except MemoryError:
            resource.setrlimit(resource.RLIMIT_AS, (size + int(mib * 2**20), hard))

    return lower
