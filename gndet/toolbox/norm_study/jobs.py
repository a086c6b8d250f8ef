"""Run the trainings of a norm study as processes, several at once if devices or cores allow."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from gndet.data.workers import usable_cores
from gndet.distributed.children import python_command
from gndet.files import open_to_append

POLL = 0.1
PATIENCE = 120.0  # seconds for a run to save its state when asked to stop
REASON = 600  # characters to quote from the output of a failed run


class Job(NamedTuple):
    """A training: config, overrides, run folder, and the file for its output."""

    name: str
    config: str
    overrides: Sequence[str]
    out: Path
    log: Path


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    began: float
    before: int  # bytes that earlier commands wrote to the log
    place: dict[str, str]


def slots(device: str, jobs: int | None) -> list[dict[str, str]]:
    """Return the environment of each slot for a run: its GPU, or its share of the cores.

    device: the config's.  jobs: how many runs at once; by default one per GPU, or one on a CPU.
    """
    if device != "cpu" and (count := torch.cuda.device_count()):
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = visible or [str(i) for i in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % len(names)]} for i in range(jobs or len(names))]
    if not jobs or jobs == 1:
        return [{}]
    threads = max(usable_cores() // jobs, 1)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]


def run_jobs(
    jobs: Sequence[Job], places: Sequence[dict[str, str]], look: Callable[[], None], started: Callable[[Job], None],
    ended: Callable[[Job, float, str], None],
) -> None:  # fmt: skip
    """Run jobs, one per place at a time.

    look: called again and again; what it raises asks the running jobs to stop so that they can be resumed, and is
    raised once they have.  started: called with a job.  ended: called with a job, its seconds and its last words.
    """
    waiting, free, running = deque(jobs), list(places), list[_Running]()
    try:
        while waiting or running:
            look()
            while waiting and free:
                running.append(_start(waiting.popleft(), free.pop(0)))
                started(running[-1].job)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                free.append(run.place)
                said = last_words(run.job.log, run.before, run.process.returncode)
                ended(run.job, time.monotonic() - run.began, said)
            time.sleep(POLL)
    finally:
        _end(running)


def _start(job: Job, place: dict[str, str]) -> _Running:
    """Start a job in its own session, so that Ctrl-C reaches it only through this process."""
    command = python_command("gndet.toolbox.norm_study.child", "train", job.config, *job.overrides, f"out={job.out}")
    with open_to_append(job.log) as log:
        before = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, **place},
        )  # fmt: skip
    return _Running(job, process, time.monotonic(), before, place)


def _end(running: Sequence[_Running]) -> None:
    """Ask runs to stop; kill those that do not, with all the processes that they started."""
    for run in running:
        run.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for run in running:
        try:
            run.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def last_words(log: Path, before: int, status: int) -> str:
    """Return what a run printed last: its error, or its last lines with the exit status.

    before: how many bytes of its log are older.
    """
    try:
        text = log.read_bytes()[before:].decode(errors="replace")
    except OSError as error:
        text = f"{log}: {error.strerror}"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("gndet train: ")]
    quoted = lines[errors[-1] :] if errors else lines[-3:]
    text = "\n".join(quoted).removeprefix("gndet train: ")[-REASON:]
    how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return text if errors else f"{how}: {text}" if text else how
