"""The work of `python -m benchmarks commands`: run one command in a new process.  Without torch: only the command's own
memory counts.
"""

import functools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks.turns import Work
from gndet.distributed.children import python_command
from gndet.errors import MachineError

LOOK = 0.01  # seconds between looks at the log of the run
LOG = "metrics.jsonl"


def command_of(checkout: Path, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `gndet WORDS` of a checkout, and its environment."""
    return python_command("gndet.cli", *words), os.environ | {"PYTHONPATH": str(checkout)}


def subject(checkout: Path, words: list[str], folder: str) -> Work:
    """Return the work of running a command of a checkout."""
    return functools.partial(_run, checkout, words, Path(folder))


def _run(checkout: Path, words: list[str], folder: Path) -> dict[str, float]:
    """Run a command; end a training once it has logged its first update.  Raises MachineError if the command fails."""
    if words[0] == "train":
        shutil.rmtree(folder / "run", ignore_errors=True)
    command, env = command_of(checkout, words)
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (words[0] == "train" and _first_update(folder / "run" / LOG)):
                time.sleep(LOOK)
        finally:
            process.kill()
            process.wait()
        if process.returncode > 0:
            said.seek(0)
            raise MachineError(f"gndet {' '.join(words)}: exit status {process.returncode}\n{said.read()}")
    return {}


def _first_update(log: Path) -> bool:
    """Return whether a run has logged an update."""
    try:
        return any(json.loads(line)["kind"] == "train" for line in log.read_text().splitlines(keepends=True))
    except (OSError, ValueError):  # no file yet, or half a line
        return False
