"""The content of a run folder, read for its report; what is missing is noted, not an error.

Reading changes nothing in the folder: a run in progress can be reported on.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple, TypeVar

from gndet.checkpoint import load_checkpoint, run_checkpoints
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import DataError, GndetError
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.analysis import Analysis, analyse, chosen_kind, read_results
from gndet.training.log import read_metrics
from gndet.training.optim import total_updates
from gndet.training.run_folder import CONFIG, DETECTIONS, FAILED, METRICS, PREEMPTED

T = TypeVar("T")


class RunRecord(NamedTuple):
    """A run as its folder tells it."""

    folder: Path
    cfg: Config
    meta: dict[str, Any]  # of the newest intact checkpoint; {}: there is none
    train: list[dict[str, Any]]  # entries of metrics.jsonl
    evaluations: list[dict[str, Any]]
    train_set: Dataset | None
    val_set: Dataset | None
    results: Results | None  # of the last evaluation
    analysis: Analysis | None
    missing: list[str]  # what could not be read, and why

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return total_updates(self.cfg.train.schedule, self.cfg.train.global_batch)

    @property
    def done(self) -> int:
        """Updates known to be done."""
        return max([entry["update"] for entry in (*self.train, *self.evaluations)] + [int(self.meta.get("update", 0))])

    @property
    def speed(self) -> float | None:
        """Images per second, the median of the log; None: not logged."""
        speeds = [entry["images_per_s"] for entry in self.train if entry.get("images_per_s")]
        return median_high(speeds) if speeds else None

    @property
    def memory(self) -> float | None:
        """Peak memory in GiB; None: not logged."""
        mib = self.train[-1].get("memory_mib") if self.train else None
        return mib / 1024 if mib else None

    @property
    def images_at_once(self) -> int | None:
        """Images that were computed at once; None: not known."""
        images = self.meta.get("images_at_once") or self.cfg.train.images_per_gpu
        return images if isinstance(images, int) else None

    @property
    def ending(self) -> tuple[str, str]:
        """How the run stands: finished, failed, stopped or unfinished, and a sentence."""
        left = f"after {self.done:,} of {self.total:,} updates"
        failed, preempted = self.folder / FAILED, self.folder / PREEMPTED
        if failed.is_file():
            return "failed", f"failed {left}: {failed.read_text(encoding='utf-8', errors='replace').strip()}"
        if preempted.is_file():
            text = preempted.read_text(encoding="utf-8", errors="replace").strip()
            return "stopped", f"stopped {left} ({text}); the same command continues it"
        if self.meta and self.meta["update"] >= self.meta["total_updates"] and not self.meta.get("evaluation_due"):
            return "finished", f"finished: {self.done:,} updates"
        return "unfinished", f"unfinished, {left}: it is still running or was killed; the same command continues it"

    def last(self, key: str) -> float | None:
        """Return the newest value of an evaluation, like "box/AP"; None where there is none."""
        return next((entry[key] for entry in reversed(self.evaluations) if entry.get(key) is not None), None)


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunRecord:
    """Read a run folder.  overrides: over its config, like data.root=PATH where the data has moved.

    Raises DataError where the folder holds no run, and ConfigError where its config cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected a run folder")
    if not (folder / CONFIG).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        holds = f"it holds {names}" if names else "it is empty"
        raise DataError(f"{folder}: not a run folder, it has no {CONFIG} ({holds})")
    cfg = load_config(folder / CONFIG, overrides)
    missing: list[str] = []
    checkpoints = (_read("checkpoint", missing, load_checkpoint, path, ()) for path in run_checkpoints(folder))
    newest = next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
    if newest is None:
        missing.append("checkpoints: there is none yet, so environment and weight sources are not known")
    log, detections = folder / METRICS, folder / DETECTIONS
    entries = _read("curves", missing, read_metrics, log) if log.is_file() else []
    if entries == []:
        missing.append(f"curves: nothing was logged yet in {METRICS}")
    train, evaluations = (
        [entry for entry in entries or () if entry["kind"] == kind] for kind in ("train", "evaluation")
    )
    train_set = _read("data.train", missing, read_dataset, cfg.data.train, cfg.data)
    val_set = _read("data.val", missing, read_dataset, cfg.data.val, cfg.data)
    if train_set is None or val_set is None:
        missing.append("data: where the data has moved, give data.root=PATH")
    results = analysis = None
    if not detections.is_file():
        missing.append("detections: the run was not evaluated yet, so there is no analysis of its mistakes")
    elif val_set is None:
        missing.append("detections: they cannot be analysed without the data set")
    elif (results := _read("detections", missing, read_results, detections, val_set)) is not None:
        kind = chosen_kind(val_set, results)
        analysis = analyse(val_set, results, kind=kind, max_detections=cfg.evaluation.max_detections)
    meta = newest.meta if newest else {}
    return RunRecord(folder, cfg, meta, train, evaluations, train_set, val_set, results, analysis, missing)


def _read(what: str, missing: list[str], read: Callable[..., T], *arguments: Any) -> T | None:
    """Return what `read` returns; where a file is wrong or cannot be read, note it as missing and return None."""
    try:
        return read(*arguments)
    except (GndetError, OSError) as error:
        missing.append(f"{what}: {error}")
        return None


def training_time(run: RunRecord) -> str:
    """Return about how long the updates took, from the logged speed; "" where nothing was logged."""
    seconds, before = 0.0, 0
    for entry in run.train:
        if entry.get("images_per_s"):
            seconds += (entry["update"] - before) * run.cfg.train.global_batch / entry["images_per_s"]
        before = entry["update"]
    if not seconds:
        return ""
    return time.strftime("%-H:%M h" if seconds >= 3600 else "%-M:%S min", time.gmtime(seconds))
