"""Run the parts of the day in waves, each part as a process with a limit; write gpu_day.json, gpu_day.txt and the logs.

It uses only Python's library: what gndet needs may be missing, and is installed from the wheels that `prepare` fetched.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_day.notes import CPU, ROOT
from benchmarks.gpu_day.table import markdown, text_of

LEAST = 15.0  # seconds under which no part is started
LOOK = 0.05  # seconds between two looks at the parts that run
SHOWN = 11_000  # characters of the table that are printed: a remote shell may return no more


class Part(NamedTuple):
    """A part of the day."""

    name: str
    function: str  # MODULE:FUNCTION, which takes Notes
    limit_s: float


def _part(module: str, name: str, limit_s: float) -> Part:
    return Part(name, f"benchmarks.gpu_day.{module}:{name}", 900.0 if CPU else limit_s)


# Parts of a wave run at the same time.  The second holds what no other part disturbs: nothing in it is timed.
WAVES = (
    (_part("checks", "facts", 40),),
    (
        _part("checks", "doctor", 100), _part("checks", "tests", 140), _part("checks", "resume", 140),
        _part("checks", "deterministic", 140), _part("checks", "invariance", 140), _part("steps", "waits", 100),
        _part("trainings", "bccd", 140), _part("trainings", "nuclei", 140), _part("steps", "compile_ahead", 140),
    ),
    (_part("kernels", "kernels", 70),),
    (_part("steps", "steps", 100),),
    (_part("operators", "operators", 40),),
    (_part("steps", "profile", 50),),
    (_part("trainings", "quickstart", 80),),
    (_part("steps", "compiled", 75),),
    (_part("trainings", "nuclei_full", 75),),
)  # fmt: skip  # by worth: what comes last is lost first
PARTS = [part.name for wave in WAVES for part in wave]


class Running(NamedTuple):
    """A part and its process, the leader of a group of processes."""

    part: Part
    process: subprocess.Popen[bytes]
    began: float  # by time.monotonic()
    end: float  # when it will be killed


class Day:
    """The processes of the parts, and what is known so far."""

    def __init__(self, out: Path, logs: Path, seconds: float, environment: dict[str, str]) -> None:
        self.out, self.logs, self.environment = out, logs, environment
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def start(self, part: Part) -> Running:
        """Start a part's process."""
        began = time.monotonic()
        limit = min(part.limit_s, self.end - began)
        words = ["part", part.function, str(self.logs / f"{part.name}.json"), f"{limit:.1f}"]
        with (self.logs / f"{part.name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.gpu_day", *words], stdout=log, stderr=log,
                start_new_session=True, cwd=ROOT, env=self.environment,
            )  # fmt: skip
        return Running(part, process, began, began + limit)

    def finish(self, running: Sequence[Running]) -> None:
        """Wait until each process has ended or is out of time."""
        waiting = list(running)
        try:
            while waiting:
                time.sleep(LOOK)
                ended = [own for own in waiting if own.process.poll() is not None or time.monotonic() > own.end]
                for own in ended:
                    waiting.remove(own)
                    self.note_end(own)
        finally:
            for own in waiting:
                end_group(own.process)

    def note_end(self, running: Running) -> None:
        """Note how a part ended; end the processes that it has started."""
        name, status = running.part.name, running.process.poll()
        end_group(running.process)
        self.seconds[name] = round(time.monotonic() - running.began, 1)
        words = {0: "done", 1: "figures are missing", None: "out of time"}.get(status, f"status {status}")
        if status != 0:
            self.failed[name] = f"{words}: {self.last_words(running.part)}"
        self.save()
        print(f"[{time.monotonic() - self.began:4.0f} s] {name}: {words}, {self.seconds[name]:.0f} s", flush=True)

    def last_words(self, part: Part) -> str:
        """Return the end of a part's log."""
        return "\n".join((self.logs / f"{part.name}.log").read_text(errors="replace").splitlines()[-12:])

    def save(self) -> dict[str, Any]:
        """Write gpu_day.json.  Returns its content."""
        parts = {file.stem: json.loads(file.read_text()) for file in sorted(self.logs.glob("*.json"))}
        day = {"cpu": CPU, "seconds": self.seconds, "failed": self.failed, "parts": parts}
        (self.out / "gpu_day.json").write_text(json.dumps(day, indent=1))
        return day

    def show(self) -> None:
        """Write gpu_day.txt and the rows for docs/performance.md; print the former's end."""
        day = self.save()
        (self.out / "gpu_day.md").write_text(markdown(day, datetime.date.today().isoformat()))
        text = text_of(day)
        (self.out / "gpu_day.txt").write_text(text)
        print(text[:SHOWN])


def run_day(
    names: Sequence[str], out: Path, data: Path, seconds: float, waves: Sequence[Sequence[Part]] = WAVES
) -> int:
    """Run the named parts, or all, within `seconds`.  Returns 1 if a part failed, 0 if none did.

    out: folder for the results.  data: what `prepare` has made.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_day_") as folder:
        work = Path(folder)
        logs = work / "logs"
        logs.mkdir()
        day = Day(out, logs, seconds, environment(work, data))
        for wave in waves:
            chosen = [part for part in wave if not names or part.name in names]
            if day.end - time.monotonic() < LEAST:
                day.failed |= {part.name: "not started: no time left" for part in chosen}
                continue
            day.finish([day.start(part) for part in chosen])
        day.save()
        with tarfile.open(out / "logs.tar.gz", "w:gz") as packed:
            packed.add(logs, "logs")
        day.show()  # last: a fault in the table loses nothing
        return 1 if day.failed else 0


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(work: Path, data: Path) -> dict[str, str]:
    """Return the variables of the parts' processes; install the packages that are missing into the work folder."""
    paths = [str(ROOT)]
    if missing := missing_wheels(data / "wheels"):
        print("installing", ", ".join(wheel.name.partition("-")[0] for wheel in missing), flush=True)
        site = work / "site"
        command = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--no-cache-dir", "--target", str(site), *map(str, missing)], check=True)
        paths.append(str(site))
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    own = {
        "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "GPU_DAY_WORK": str(work),
        "GPU_DAY_DATA": str(data), "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }  # fmt: skip
    return {"OMP_NUM_THREADS": "2"} | dict(os.environ) | own  # 2 threads: several parts run at the same time


def missing_wheels(folder: Path) -> list[Path]:
    """Return the wheels of packages that Python does not find here."""
    found = {re.sub(r"[-_.]+", "_", package.name).lower() for package in importlib.metadata.distributions()}
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    return [wheel for wheel in wheels if re.sub(r"[-_.]+", "_", wheel.name.partition("-")[0]).lower() not in found]
