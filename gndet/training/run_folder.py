"""The run folder: made, taken up where an unfinished run stopped, or refused. One process at a time writes to it."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gndet.checkpoint import Checkpoint, newest_checkpoint, sweep
from gndet.config.loading import config_from_dict, config_to_yaml
from gndet.config.schema import Config
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process
from gndet.errors import GndetError, OutputError, TrainingError
from gndet.files import write_whole

# What may differ when a run goes on: nothing here changes what is learned.
NEUTRAL = (
    "device", "data.root", "data.workers", "data.cache", "data.max_pixels", "data.max_unreadable",
    "data.skip_unreadable", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_last",
    "train.vis_images", "train.report", "train.norm_images", "train.memory", "train.compile", "train.on_nonfinite",
    "train.timeout_s", "evaluation",
)  # fmt: skip
SPLIT = ("train.images_per_gpu", "data.canvases")  # neutral where images do not depend on each other

CONFIG = "config.yaml"
LOCK = ".lock"
PREEMPTED = "PREEMPTED"  # the marker of a run that a signal ended and that the same command continues
FAILED = "FAILED"  # the marker of a run that an error ended, with its words; the same command may go on
LOCK_WAIT = 10.0  # seconds for a killed run's process to be gone
UNSET = "not set"  # a key of a section that the other config does not have


def find_run(cfg: Config, out: Path, fresh: bool, proc: Process) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of an unfinished run, if there is one, and a line for each damaged one.

    Only stale temporaries are touched.  Raises TrainingError, on all processes, where the folder holds a finished or a
    different run, or something else.
    """
    refusal = []
    if proc.first and not fresh:
        try:
            if (out / CONFIG).exists():
                sweep(out)
            refuse_other_run(cfg, out)
        except GndetError as error:
            refusal = [str(error)]
    for text in all_gather(refusal, proc)[0]:
        raise TrainingError(text)
    saved, damaged = (None, []) if fresh else newest_checkpoint(out)
    if damaged and saved is None:
        raise TrainingError("\n".join([f"{out}: no checkpoint is whole; --fresh starts anew", *damaged]))
    return saved, damaged


def move_aside(out: Path, proc: Process) -> None:
    """Rename a folder with files to ...-old-1 and on, whatever it holds.  Raises OutputError."""
    if proc.first and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        try:
            number = next(i for i in range(1, 10_000) if not Path(f"{out}-old-{i}").exists())
            out.rename(f"{out}-old-{number}")
        except OSError as error:
            raise OutputError(f"out: {out}: cannot move it aside: {error.strerror}") from None


def make_run(cfg: Config, out: Path, proc: Process) -> None:
    """Make the folder, write config.yaml, and remove the markers of a past ending.  Raises OutputError."""
    if proc.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / CONFIG, config_to_yaml(cfg))
            for marker in (PREEMPTED, FAILED):
                (out / marker).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"out: {out}: cannot write the run folder: {error.strerror}") from None
    all_gather([], proc)  # the others wait for the folder


def refuse_other_run(cfg: Config, out: Path) -> None:
    """Raise TrainingError where the folder holds another run, a finished one, or something else."""
    ways = "choose another out=FOLDER, or give --fresh to move the old one aside"
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"out: {out} is a file, expected a folder for the run")
    if not (out / CONFIG).exists():
        if any(path.name not in (LOCK, PREEMPTED) for path in out.iterdir()):
            raise TrainingError(f"{out}: holds files but no run (no config.yaml); {ways}")
        return
    saved, _ = newest_checkpoint(out)
    if saved is None:
        return  # stopped before its first checkpoint: nothing is lost
    neutral = (*NEUTRAL, "out") if cfg.model.batch_coupling() else (*NEUTRAL, *SPLIT, "out")
    old, new = flat(config_from_dict(saved.meta.get("asked", saved.meta["config"]), str(saved.path))), flat(cfg)
    keys = [key for key in {**old, **new} if not key.startswith(neutral)]
    changed = [key for key in keys if old.get(key, UNSET) != new.get(key, UNSET)]
    if changed:
        lines = [f"  {key}: {old.get(key, UNSET)!r} there, {new.get(key, UNSET)!r} now" for key in changed[:8]]
        raise TrainingError("\n".join([f"{out}: holds a run of another config; {ways}", *lines]))
    if saved.meta["update"] >= saved.meta["total_updates"] and not saved.meta.get("evaluation_due"):
        raise TrainingError(f"{out}: this run is finished ({saved.meta['update']} updates); {ways}")


def flat(cfg: Config) -> dict[str, Any]:
    """The config as {"train.optimizer.lr": 0.02, ...}."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return dict(walk(cfg.model_dump(mode="json"), ""))


@contextmanager
def locked(out: Path, proc: Process) -> Iterator[None]:
    """Keep a folder from being trained into by two runs at once, while the context lasts; made where it is missing.

    A folder that was made and has got no files goes again.  Raises TrainingError, on all processes, where another
    process has it.  A lock ends with its process, and loader processes do not inherit it.  Where the folder cannot be
    written to, or the file system knows no locks, there is none.
    """
    refusal, file, made = [], None, not out.exists()
    if proc.first:
        with suppress(OSError):
            out.mkdir(parents=True, exist_ok=True)
            file = (out / LOCK).open("a+", encoding="utf-8")
            refusal = _lock(file, out)
    try:
        for text in all_gather(refusal, proc)[0]:
            raise TrainingError(text)
        yield
    finally:
        if file is not None:
            if made and not refusal and [path.name for path in out.glob("*")] in ([], [LOCK]):
                with suppress(OSError):
                    (out / LOCK).unlink()
                    out.rmdir()
            file.close()


def _lock(file: Any, out: Path) -> list[str]:
    """Lock an open file within LOCK_WAIT.  Returns why it could not be, or nothing."""
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return []
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            file.seek(0)
            return [f"{out}: another process trains into this folder: {file.read().strip()}; choose another out=FOLDER"]
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return []


def mark_preempted(out: Path, when: str) -> None:
    """Leave the marker of a run that a signal ended; `make_run` removes it.  Raises OutputError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PREEMPTED).write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} stopped by a signal {when}\n")
    except OSError as error:
        raise OutputError(
            f"{out / PREEMPTED}: cannot write it (stopped by a signal {when}): {error.strerror}"
        ) from None


def mark_failed(out: Path, why: str) -> None:
    """Leave the marker of a run that an error ended; `make_run` removes it."""
    with suppress(OSError):  # the error itself is told
        (out / FAILED).write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n", encoding="utf-8", errors="replace")


def unmark_preempted(out: Path, proc: Process) -> None:
    """Remove the marker: the run cannot go on, and is not to be started again and again."""
    if proc.first:
        with suppress(OSError):
            (out / PREEMPTED).unlink(missing_ok=True)
