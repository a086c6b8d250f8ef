"""The run folder: its file names, its creation, whether a run may resume in it, and its lock (one run at a time)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gndet.checkpoint import Checkpoint, newest_checkpoint, run_checkpoints, sweep_run
from gndet.config.loading import config_from_dict, config_to_yaml
from gndet.config.schema import Config
from gndet.data.datasets.reading import user_paths
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process
from gndet.errors import GndetError, OutputError, TrainingError
from gndet.files import lock_file, sweep, write_whole

# Options that may differ when a run resumes, because none of them changes what is learned.
NEUTRAL = (
    "device", "data.root", "data.workers", "data.cache", "data.max_pixels", "data.max_unreadable",
    "data.skip_unreadable", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_last",
    "train.vis_images", "train.report", "train.norm_images", "train.memory", "train.compile", "train.on_nonfinite",
    "train.timeout_s", "evaluation",
)  # fmt: skip
SPLIT = ("train.images_per_gpu", "data.canvases")  # neutral if images do not depend on each other

# The content of a run folder, besides checkpoints/, last and best (checkpoint.py).
CONFIG = "config.yaml"
HEAD = "# written by gndet train: the config of this run, with all its defaults\n"  # of config.yaml
METRICS = "metrics.jsonl"
NORMS = "norms.jsonl"
NORMS_START = "norms-start.safetensors"  # gamma and beta at the start of the run
BOARD = "tensorboard"
DETECTIONS = "detections.json"  # COCO results of the last evaluation
PREDICTIONS = "predictions.png"  # ground truth beside detections
REPORT = "report.html"
NONFINITE = "nonfinite"  # reports of losses and gradients that were not finite
STALLED = "stalled"  # stalled-process0.txt: the stacks of a rank that hung or lost the others
LOCK = ".lock"
PREEMPTED = "PREEMPTED"  # a signal ended the run; the same command resumes it
FAILED = "FAILED"  # an error ended the run, with its message; the same command may resume it

LOCK_WAIT = 10.0  # seconds that a killed run's process may take to end
UNSET = "not set"  # a key that only the other config has


def find_run(cfg: Config, out: Path, fresh: bool, proc: Process) -> tuple[Checkpoint | None, list[str]]:
    """Find an unfinished run to resume.  Only stale temporary files are touched.

    Returns the newest whole checkpoint, or None, and one line per damaged checkpoint that was passed over.  Raises
    TrainingError on every rank if the folder holds a finished run, a different run, or something else, or if it holds
    the data and would be moved aside.
    """
    if fresh:
        for path in user_paths(cfg.data):
            if out.resolve() in (path.resolve(), *path.resolve().parents):
                raise TrainingError(
                    f"--fresh would move {out} aside, with your data in it ({path}); choose another out"
                )
        return None, []
    saved, damaged, refusal = None, list[str](), list[str]()
    if proc.first:
        try:
            if is_run(out):
                sweep_run(out)
            saved, damaged = newest_checkpoint(out)
            refuse_other_run(cfg, out, saved)
        except GndetError as error:
            refusal = [str(error)]
    for text in all_gather(refusal, proc)[0]:
        raise TrainingError(text)
    if not proc.first:  # after the sweep of rank 0
        saved, damaged = newest_checkpoint(out)
    if damaged and saved is None:
        raise TrainingError("\n".join([f"{out}: no checkpoint is whole; --fresh starts over", *damaged]))
    return saved, damaged


def move_aside(out: Path, proc: Process) -> None:
    """Rename a folder that is not empty to OUT-old-1, or the next free number.  Raises OutputError."""
    if proc.first and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        try:
            number = next(i for i in range(1, 10_000) if not Path(f"{out}-old-{i}").exists())
            out.rename(f"{out}-old-{number}")
        except OSError as error:
            raise OutputError(f"out: {out}: cannot move it aside: {error.strerror}") from None


def make_run(cfg: Config, out: Path, proc: Process) -> None:
    """Create the folder, write config.yaml, and remove the markers of an earlier end.  Raises OutputError."""
    if proc.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / CONFIG, HEAD + config_to_yaml(cfg))
            for marker in (PREEMPTED, FAILED):
                (out / marker).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"out: {out}: cannot write the run folder: {error.strerror}") from None
    all_gather([], proc)  # other ranks wait for the folder


def refuse_other_run(cfg: Config, out: Path, saved: Checkpoint | None) -> None:
    """Raise TrainingError if the folder holds another run, a finished run, or something else.

    saved: the newest whole checkpoint in the folder.
    """
    ways = "choose another out=FOLDER, or move the old one aside with --fresh (in Python: fresh=True)"
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"out: {out} is a file, expected a folder for the run")
    if not is_run(out):
        if not is_empty(out):
            other = "no config.yaml" if not (out / CONFIG).exists() else "gndet did not write its config.yaml"
            raise TrainingError(f"{out}: holds files but no run ({other}); {ways}")
        return
    if saved is None:
        return  # stopped before its first checkpoint: nothing can be lost
    neutral = (*NEUTRAL, "out") if cfg.model.batch_coupling() else (*NEUTRAL, *SPLIT, "out")
    old, new = flat(config_from_dict(saved.meta["asked"], str(saved.path))), flat(cfg)
    keys = [key for key in old | new if not key.startswith(neutral)]
    if changed := [key for key in keys if old.get(key, UNSET) != new.get(key, UNSET)]:
        lines = [f"  {key}: {old.get(key, UNSET)!r} there, {new.get(key, UNSET)!r} now" for key in changed[:8]]
        raise TrainingError("\n".join([f"{out}: holds a run of another config; {ways}", *lines]))
    if saved.meta["update"] >= saved.meta["total_updates"] and not saved.meta["evaluation_due"]:
        raise TrainingError(f"{out}: this run is finished ({saved.meta['update']} updates); {ways}")


def is_run(out: Path) -> bool:
    """Return whether gndet wrote the config.yaml of a folder, or there are checkpoints of a run."""
    with suppress(OSError):
        if (out / CONFIG).is_file():  # opening a pipe would wait
            return (out / CONFIG).read_bytes().startswith(HEAD.encode()) or bool(run_checkpoints(out))
    return False


def is_empty(out: Path) -> bool:
    """Return whether a folder holds nothing but what a run that was stopped early leaves."""
    return all(path.name in (LOCK, PREEMPTED) for path in out.iterdir())


def flat(cfg: Config) -> dict[str, Any]:
    """Return a config as {"train.optimizer.lr": 0.02, ...}."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return dict(walk(cfg.model_dump(mode="json"), ""))


@contextmanager
def locked(out: Path, proc: Process, is_own: Callable[[Path], bool] = is_run) -> Iterator[None]:
    """Prevent two runs from training into the same folder while the context lasts; create a missing folder.

    A folder of the user's, with files but not is_own, is not locked: nothing is written into it.
    Raises TrainingError on every rank if another run holds the lock.  A lock ends with its process, and loader
    processes do not inherit it.  A folder that is not writable, or on a file system without locks, is not locked.
    A folder that was created here and is still empty at the end is removed.
    """
    refusal, file, made = [], None, not out.exists()
    if proc.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if is_own(out) or is_empty(out):
                file = lock_file(out / LOCK, LOCK_WAIT)
                sweep(out)
        except BlockingIOError as error:
            owner = error.strerror
            refusal = [f"{out}: another process trains into this folder: {owner}; choose another out=FOLDER"]
        except OSError:
            pass
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


def mark(out: Path, marker: str, why: str) -> None:
    """Write a marker, PREEMPTED or FAILED, with the reason; `make_run` removes it.  Raises OutputError."""
    try:
        write_whole(out / marker, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
    except OutputError as error:
        raise OutputError(f"{error} ({why})") from None
