"""The run folder: its file names, its creation, and whether a run may begin or resume in it."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gndet.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    META,
    Checkpoint,
    adopt_copies,
    best_checkpoint,
    mend_links,
    newest_checkpoint,
    prune,
    run_checkpoints,
    sweep_run,
)
from gndet.config.loading import config_from_dict, config_to_yaml, load_config
from gndet.config.schema import Config
from gndet.data.datasets.reading import user_paths
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process
from gndet.errors import CheckpointError, ConfigError, DataError, GndetError, OutputError, RunFinished, TrainingError
from gndet.files import CONFIG as CONFIG
from gndet.files import DETECTIONS as DETECTIONS
from gndet.files import TEMPORARY, write_whole
from gndet.training.logged import read_metrics
from gndet.training.work_folder import LOCK, WorkFolder

# Options that may differ when a run resumes, because none of them changes what is learned.
NEUTRAL = (
    "device", "data.root", "data.workers", "data.cache", "data.max_pixels", "data.max_unreadable",
    "data.skip_unreadable", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_last",
    "train.vis_images", "train.report", "train.norm_images", "train.memory", "train.compile", "train.on_nonfinite",
    "train.timeout_s", "evaluation",
)  # fmt: skip
SPLIT = ("train.images_per_gpu", "data.canvases")  # neutral if images do not depend on each other

# The content of a run folder, besides checkpoints/, last and best (checkpoint.py).
HEAD = "# written by gndet train: the config of this run, with all its defaults\n"  # of config.yaml
METRICS = "metrics.jsonl"
NORMS = "norms.jsonl"
NORMS_START = "norms-start.safetensors"  # gamma and beta at the start of the run
BOARD = "tensorboard"
PREDICTIONS = "predictions.png"  # ground truth beside detections
REPORT = "report.html"
NONFINITE = "nonfinite"  # reports of losses and gradients that were not finite
STALLED = "stalled"  # stalled-process0.txt: the stacks of a rank that hung or lost the others
PREEMPTED = "PREEMPTED"  # a signal ended the run; the same command resumes it
FAILED = "FAILED"  # an error ended the run, with its message; the same command may resume it

AGAIN = "; put it back, or start over with --fresh, which moves this folder aside (in Python: fresh=True)"
UNSET = "not set"  # a key that only the other config has


def find_run(cfg: Config, out: Path, fresh: bool, proc: Process) -> tuple[Checkpoint | None, list[str]]:
    """Find an unfinished run to resume, and put its checkpoints and links in order; nothing else is touched.

    Returns the newest whole checkpoint, or None, and lines: damaged checkpoints that were passed over, links that could
    not be written.  Raises TrainingError on every rank if the folder holds a finished run, a different run, one whose
    checkpoints are gone, or something else; with fresh, if it may not be moved aside.
    """
    by_rank = [part[0] for part in all_gather([fresh], proc)]
    if len(set(by_rank)) > 1:
        given = ", ".join(str(rank) for rank, flag in enumerate(by_rank) if flag)
        raise TrainingError(f"{out}: --fresh was given to rank {given} only; give all ranks the same options")
    saved, damaged, notes, refusal = None, list[str](), list[str](), list[GndetError]()
    if proc.first:
        try:
            if fresh:
                refuse_to_move(cfg, out)
            else:
                saved, damaged, notes = look_for_run(out)
                refuse_other_run(cfg, out, saved, damaged)
        except GndetError as error:
            refusal = [error]
        except OSError as error:
            words = f"out: {error.filename or out}: cannot read the run folder: {error.strerror}"
            refusal = [TrainingError(words)]
    for text in all_gather(list(map(str, refusal)), proc)[0]:
        raise refusal[0] if refusal and isinstance(refusal[0], RunFinished) else TrainingError(text)
    if not proc.first and not fresh:  # after rank 0 has put the folder in order
        saved, damaged = newest_checkpoint(out)
    return saved, [*damaged, *notes]


def look_for_run(out: Path) -> tuple[Checkpoint | None, list[str], list[str]]:
    """Put a run folder in order, and read its newest whole checkpoint.

    Returns it, a line for each damaged one, and one for each link that cannot be written.  Raises CheckpointError.
    """
    if not is_run(out):
        return None, [], []
    sweep_run(out)
    adopt_copies(out)
    try:
        saved, damaged = newest_checkpoint(out)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{AGAIN}") from None
    if saved is None:
        return None, damaged, []
    if "asked" not in saved.meta:
        raise CheckpointError(f"{saved.path}: not a checkpoint of a run: its {META} has no `asked`; choose another out")
    return saved, damaged, mend_links(out, saved)


def refuse_to_move(cfg: Config, out: Path) -> None:
    """Raise TrainingError if --fresh would move aside a folder that is no run, or one in which other things lie."""
    if not os.path.isdir(out) or is_empty(out):
        return
    inside = [(path, f"your data in it ({path})") for path in user_paths(cfg.data)]
    inside += [(Path(), "the current folder in it"), (Path(os.path.expanduser("~")), "your home in it")]
    folders = filter(os.path.isdir, out.iterdir())
    inside += [(path, f"another run in it ({path})") for path in folders if is_run(path)]
    for path, what in inside:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise TrainingError(f"--fresh would move {out} aside, with {what}; choose another out")
    if not is_run(out):
        raise TrainingError(f"{out}: holds files but no run; --fresh moves only runs aside; choose another out=FOLDER")


def move_aside(out: Path, proc: Process) -> None:
    """Rename a run folder to OUT-old-1, or the next free number; a link to it stays.  Raises OutputError."""
    if proc.first and os.path.isdir(out) and any(path.name != LOCK for path in out.iterdir()):
        try:
            real = Path(os.path.realpath(out))
            number = next(i for i in range(1, 10_000) if not os.path.lexists(f"{real}-old-{i}"))
            real.rename(f"{real}-old-{number}")
            if out.is_symlink():
                real.mkdir()
        except OSError as error:
            raise OutputError(f"out: {out}: cannot move it aside: {error.strerror}") from None


def make_run(cfg: Config, folder: WorkFolder, proc: Process) -> None:
    """Make the folder a run: make checkpoints/, write config.yaml, and remove the markers of an earlier end.

    A record without checkpoints/ is therefore that of a run whose checkpoints are gone.  Raises OutputError, and
    TrainingError if the folder was moved.
    """
    if proc.first:
        out = folder.named
        if folder.is_moved:
            raise folder.error("before the first update")
        try:
            (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            write_whole(out / CONFIG, HEAD + config_to_yaml(cfg))
            for marker in (PREEMPTED, FAILED):
                (out / marker).unlink(missing_ok=True)
        except OSError as error:
            where = error.filename or out
            raise OutputError(f"out: {where}: cannot write the run folder: {error.strerror}") from None
    all_gather([], proc)  # other ranks wait for the folder


def refuse_other_run(cfg: Config, out: Path, saved: Checkpoint | None, damaged: list[str]) -> None:
    """Raise TrainingError if the folder holds another run, a finished run, one without its checkpoints, or no run.

    saved: the newest whole checkpoint in the folder.  damaged: a line for each damaged one.  Raises OutputError if it
    is no folder, and OSError if it cannot be read.
    """
    ways = "choose another out=FOLDER, or move the old one aside with --fresh (in Python: fresh=True)"
    try:
        os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not os.path.exists(out):
        raise OutputError(f"out: {out} is a link to {os.readlink(out)}, which is not there; choose another out=FOLDER")
    if not os.path.isdir(out):
        raise OutputError(f"out: {out} is a file, expected a folder for the run")
    os.listdir(out)  # it may not be readable
    if not is_run(out):
        if not is_empty(out):
            other = "no config.yaml" if not os.path.lexists(out / CONFIG) else "gndet did not write its config.yaml"
            raise TrainingError(f"{out}: holds files but no run ({other}); choose another out=FOLDER")
        return
    if saved is None:
        if damaged:
            raise TrainingError("\n".join([f"{out}: no checkpoint is whole; --fresh starts over", *damaged]))
        refuse_lost(out)
        return  # stopped before its first checkpoint: nothing can be lost
    neutral = (*NEUTRAL, "out") if cfg.model.batch_coupling() else (*NEUTRAL, *SPLIT, "out")
    old, new = flat(config_from_dict(saved.meta["asked"], str(saved.path))), flat(cfg)
    keys = [key for key in old | new if not key.startswith(neutral)]
    if changed := [key for key in keys if old.get(key, UNSET) != new.get(key, UNSET)]:
        lines = [f"  {key}: {old.get(key, UNSET)!r} there, {new.get(key, UNSET)!r} now" for key in changed[:8]]
        raise TrainingError("\n".join([f"{out}: holds a run of another config; {ways}", *lines]))
    if saved.meta["update"] >= saved.meta["total_updates"] and not saved.meta["evaluation_due"]:
        if not damaged:  # a kill may have come between the last checkpoint and the removal of older ones
            with suppress(CheckpointError):
                prune(out, old["train.keep_last"], best_checkpoint(saved.path, saved.meta))
        raise RunFinished(f"{out}: this run is finished ({saved.meta['update']} updates); {ways}")


def refuse_lost(out: Path) -> None:
    """Raise TrainingError if a run without checkpoints has had some by its record, which a new start would empty.

    A run makes the folder for them before anything else.
    """
    updates, links = logged_updates(out), [name for name in (LAST, BEST) if os.path.lexists(out / name)]
    empty = os.path.lexists(out / CHECKPOINTS)
    if links or not empty or updates > updates_without_checkpoint(out):
        said = f"`{links[0]}` led to a checkpoint" if links else f"{updates} updates are logged"
        there = "holds no checkpoint: removed, or not saved on a full disk" if empty else "is not there"
        raise TrainingError(f"{out}: of this run {said}, but {out / CHECKPOINTS} {there}{AGAIN}")


def logged_updates(out: Path) -> int:
    """Return the last update in the record of a run; 0 if there is none."""
    updates = [0]
    for name in (METRICS, NORMS):
        with suppress(DataError):
            updates += [entry["update"] for entry in read_metrics(out / name, is_ours=lambda _: True)]
    return max(updates)


def updates_without_checkpoint(out: Path) -> float:
    """Return how many updates a run may have logged without having saved: until its second checkpoint is due.

    The first is then on the disk.
    """
    try:
        cfg = load_config(out / CONFIG, []).train
    except ConfigError:
        return math.inf
    due = [every * k for every in (cfg.eval_every, cfg.checkpoint_every) if every > 0 for k in (1, 2)]
    return sorted({*due, math.inf})[1 if due else 0]


def is_run(out: Path) -> bool:
    """Return whether gndet wrote the config.yaml of a folder, or there are checkpoints of a run.  Raises OSError."""
    if os.path.isfile(out / CONFIG):  # opening a pipe would wait
        with (out / CONFIG).open("rb") as file:
            if file.read(len(HEAD)) == HEAD.encode():
                return True
    with suppress(CheckpointError):
        return bool(run_checkpoints(out))
    return False


def is_empty(out: Path) -> bool:
    """Return whether a folder holds nothing but what a run that ended before its first update may leave."""

    def is_left(path: Path) -> bool:
        if path.name == CHECKPOINTS:
            return path.is_dir() and not any(path.iterdir())
        return path.name in (LOCK, PREEMPTED) or TEMPORARY.fullmatch(path.name) is not None

    with suppress(OSError):
        return all(is_left(path) for path in out.iterdir())
    return False


def may_write(out: Path) -> bool:
    """Return whether a folder is a run or empty, so that gndet may write into it."""
    return is_run(out) or is_empty(out)


def flat(cfg: Config) -> dict[str, Any]:
    """Return a config as {"train.optimizer.lr": 0.02, ...}."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return dict(walk(cfg.model_dump(mode="json"), ""))


def mark(out: Path, marker: str, why: str) -> None:
    """Write a marker, PREEMPTED or FAILED, with the reason; `make_run` removes it.  Raises OutputError."""
    try:
        write_whole(out / marker, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
    except OutputError as error:
        raise OutputError(f"{error} ({why})") from None
