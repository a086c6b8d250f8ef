"""What all parts of the day share: where and at which size they run, and notes that survive them.

Only this file reads the environment.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # the checkout
CPU = os.environ.get("GPU_DAY_CPU") == "1"  # without a GPU, to try every line
DEVICE = "cpu" if CPU else "cuda"
SIZE = (96, 128) if CPU else (800, 1344)  # of pictures: height, width
DATA = Path(os.environ.get("GPU_DAY_DATA", ROOT / ".gpu"))
WORK = Path(os.environ.get("GPU_DAY_WORK", ROOT / "runs" / "gpu_day_work"))  # `run` sets it and removes the folder
OUT = Path(os.environ.get("OUT", ROOT / "runs" / "gpu_day"))
SECONDS = float(os.environ.get("DAY_S", "480"))
RESERVE = 4.0  # seconds of a part's limit to write its findings and to end


class Notes:
    """The findings of a part, on the disk as soon as they are known."""

    def __init__(self, file: Path, end: float) -> None:
        """Write to a file; end: by time.monotonic(), when the part will be killed."""
        self.file, self.end = file, end - RESERVE
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def __call__(self, name: str, value: object) -> None:
        """Add a finding."""
        self.found[name] = value
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1, default=str))
        new.replace(self.file)  # `run` may read it at any time
        print(f"{name}: {json.dumps(value, default=str)[:400]}", flush=True)

    @property
    def left(self) -> float:
        """Seconds that the part has left, at least 1."""
        return max(self.end - time.monotonic(), 1.0)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note that a figure failed, if it does, and let the part go on with the next."""
        try:
            yield
        except Exception as error:  # whatever the figure needs may be broken on that machine
            traceback.print_exc()
            self.failed.append(name)
            self(f"{name} FAILED", f"{type(error).__name__}: {str(error)[:600]}")


def run_part(function: str, file: Path, end: float) -> int:
    """Run MODULE:FUNCTION(notes).  Returns 0 if it is complete, 1 if figures are missing."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    note = Notes(file, end)
    module, _, name = function.partition(":")
    with note.attempt(name):
        getattr(importlib.import_module(module), name)(note)
    return 1 if note.failed else 0


def run(command: list[str], limit: float, **variables: str) -> tuple[int, str, float]:
    """Run a command in the checkout.  Returns its status, 124 if it ran out of time; what it printed; its seconds."""
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | variables
    ) as process:
        try:
            text, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired as expired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a child of it may hold the pipe
                process.communicate(timeout=2)
            status, text = 124, (expired.stdout or b"").decode(errors="replace")
            if process.stdout:
                process.stdout.close()
    print(text[-20_000:], flush=True)  # into the part's log
    return status, text, time.monotonic() - began


def gndet(*words: str) -> list[str]:
    """Return the command line of a verb."""
    return [sys.executable, "-P", "-m", "gndet.cli", *words]
