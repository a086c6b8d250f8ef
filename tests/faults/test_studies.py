"""No process of a study outlives it, or its training, by more than seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_files import wait_for

from faults.host import environment
from faults.launch import cleared, processes_in
from faults.tiny import write_config
from gndet.distributed.children import ORPHAN_GRACE

pytestmark = [pytest.mark.faults, pytest.mark.slow]
SECONDS = ORPHAN_GRACE + 60.0  # generous, because the machine may be busy
WORDS = (
    "--norms", "gn", "--images-per-gpu", "1", "--seeds", "1", "--batch", "fixed", "--out", "study",
    "train.schedule.updates=100000", "data.workers=2",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_config(tmp_path)
    with cleared(tmp_path):
        yield tmp_path


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a study, whose processes all have the folder as their working directory."""
    command = [sys.executable, "-m", "gndet.cli", "norm-study", "tiny.yaml", *WORDS]
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=said, stderr=said)


def others(folder: Path, study: subprocess.Popen[bytes]) -> list[int]:
    return [pid for pid in processes_in(folder) if pid != study.pid]


def wait_for_training(folder: Path, study: subprocess.Popen[bytes]) -> None:
    """Wait until the study trains its cell, with two loader processes."""

    def trains() -> bool:
        assert study.poll() is None, (folder / "said.txt").read_text()
        return (folder / "study/cells/gn-1-seed0/config.yaml").exists() and len(others(folder, study)) == 3

    wait_for(trains)


@pytest.mark.parametrize("age", [0.0, 0.3, 1.0, 3.0, "training"])
def test_a_killed_study_leaves_no_process(folder: Path, age: float | str) -> None:
    study = start(folder)
    wait_for(lambda: bool(others(folder, study)))
    if isinstance(age, float):
        time.sleep(age)
    else:
        wait_for_training(folder, study)
    study.kill()
    study.wait()
    began = time.monotonic()
    wait_for(lambda: not processes_in(folder))
    assert time.monotonic() - began < SECONDS


def test_a_killed_training_leaves_no_loader_process(folder: Path) -> None:
    study = start(folder)
    wait_for_training(folder, study)
    training, *loaders = sorted(others(folder, study))
    os.kill(training, signal.SIGKILL)
    wait_for(lambda: not set(loaders) & set(processes_in(folder)))
    assert study.wait() == 1 and "ended by signal 9" in (folder / "said.txt").read_text()
