"""Small subjects for tests of `benchmarks.turns`; their processes import this file and little else."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.turns import Work


def noting(log: Path, name: str) -> Work:
    """Note in a file that it was built, and each turn, with its process and the threads it may use."""
    with log.open("a") as file:
        file.write(f"{name} build {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")

    def work() -> dict[str, float]:
        with log.open("a") as file:
            file.write(f"{name} turn {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        return {"notes": 3.0}

    return work


def holding(mib: int, in_child: bool) -> Work:
    """Fill so much memory, in a process that it starts if asked to."""

    def work() -> dict[str, float]:
        print("what a library prints")
        if in_child:
            code = f"import time; held = b'x' * ({mib} << 20); time.sleep(0.2)"
            subprocess.run([sys.executable, "-c", code], check=True)
        else:
            held = b"x" * (mib << 20)
            time.sleep(0.2)
            del held
        return {}

    return work


def computing(seconds: float) -> Work:
    """Compute for so long in a process that it starts."""
    code = f"import time\nwhile time.process_time() < {seconds}: pass"

    def work() -> dict[str, float]:
        subprocess.run([sys.executable, "-c", code], check=True)
        return {}

    return work


def failing(how: str) -> Work:
    """End its process, or raise, when it works."""

    def work() -> dict[str, float]:
        if how == "dies":
            os.kill(os.getpid(), 9)
        raise ValueError("no such thing")

    if how == "cannot be built":
        raise ValueError("no such thing")
    return work
