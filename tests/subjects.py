"""Small workloads for tests of `benchmarks.turns` and `gpu_day`; their processes import little besides this file."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_day.notes import Notes
from benchmarks.turns import WALL, Work


def noting(log: Path, name: str) -> Work:
    """Log the build and each turn, with the process id and the number of threads."""
    with log.open("a") as file:
        file.write(f"{name} build {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")

    def work() -> dict[str, float]:
        with log.open("a") as file:
            file.write(f"{name} turn {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        return {"notes": 3.0}

    return work


def holding(mib: int, in_child: bool) -> Work:
    """Fill `mib` MiB of memory, in this process or in a child."""

    def work() -> dict[str, float]:
        print("what a library prints")
        if in_child:
            code = f"import time; held = b'x' * ({mib} << 20); time.sleep(1)"  # until it was measured
            subprocess.run([sys.executable, "-c", code], check=True)
        else:
            held = b"x" * (mib << 20)
            time.sleep(0.2)
            del held
        return {}

    return work


def computing(seconds: float) -> Work:
    """Compute for some CPU seconds in a child process."""
    code = f"import time\nwhile time.process_time() < {seconds}: pass"

    def work() -> dict[str, float]:
        subprocess.run([sys.executable, "-c", code], check=True)
        return {}

    return work


def failing(how: str) -> Work:
    """Kill its process or raise, when it is built or when it works."""

    def work() -> dict[str, float]:
        if how == "dies":
            os.kill(os.getpid(), 9)
        raise ValueError("no such thing")

    if how == "cannot be built":
        raise ValueError("no such thing")
    return work


def hanging() -> Work:
    """Never end."""

    def work() -> dict[str, float]:
        while True:
            time.sleep(60)

    return work


def timing_itself(seconds: float) -> Work:
    """State how long it took."""
    return lambda: {WALL: seconds, "notes": 1.0}


# --- parts of benchmarks.gpu_day


def complete_part(note: Notes) -> None:
    """Find something."""
    note("found", 1)


def part_without_a_figure(note: Notes) -> None:
    """Fail in a figure and go on."""
    with note.attempt("broken"):
        raise ValueError("no such thing")
    note("found", 2)


def dying_part(note: Notes) -> None:
    """Die after the first figure."""
    note("found", 3)
    os.kill(os.getpid(), 9)


def hanging_part(note: Notes) -> None:
    """Hang after the first figure, as does a child, which writes its id."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note("child", child.pid)
    child.wait()
