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
from gndet.toolbox.analysis.analysis import Analysis, analyse, chosen_kind
from gndet.toolbox.analysis.read import read_results
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
    ended: str  # finished, failed, stopped, unfinished
    why: str  # in words
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

    def last(self, key: str) -> float | None:
        """Return the newest value of an evaluation, like "box/AP"; None where there is none."""
        return next((entry[key] for entry in reversed(self.evaluations) if entry.get(key) is not None), None)


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunRecord:
    """Read a run folder.  overrides: over its config, like data.root=PATH where the data has moved.

    Raises DataError where the folder holds no run, and ConfigError where its config cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}, expected a run folder")
    if not (folder / CONFIG).is_file():
        names = sorted(path.name for path in folder.iterdir())
        holds = f"it holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "it is empty"
        raise DataError(f"{folder}: not a run folder, it has no {CONFIG} ({holds})")
    cfg = load_config(folder / CONFIG, overrides)
    missing: list[str] = []
    meta = _meta(folder, missing)
    entries = _log(folder, missing)
    train, evaluations = ([entry for entry in entries if entry["kind"] == kind] for kind in ("train", "evaluation"))
    train_set, val_set = (_dataset(cfg, which, missing) for which in ("train", "val"))
    results = _results(folder, val_set, missing)
    analysis = None
    if results is not None and val_set is not None:
        kind = chosen_kind(val_set, results)
        analysis = analyse(val_set, results, kind=kind, max_detections=cfg.evaluation.max_detections)
    record = RunRecord(folder, cfg, meta, train, evaluations, "", "", train_set, val_set, results, analysis, missing)
    ended, why = _ending(record)
    return record._replace(ended=ended, why=why)


def _read(what: str, missing: list[str], read: Callable[..., T], *arguments: Any, advice: str = "") -> T | None:
    """Return what `read` returns; where it raises a GndetError, note it as missing and return None."""
    try:
        return read(*arguments)
    except GndetError as error:
        missing.append(f"{what}: {error}{advice}")
        return None


def _meta(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Read what the newest intact checkpoint says of the run."""
    for path in run_checkpoints(folder):
        if (checkpoint := _read("checkpoint", missing, load_checkpoint, path, ())) is not None:
            return checkpoint.meta
    missing.append("checkpoints: there is none yet, so environment and weight sources are not known")
    return {}


def _log(folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    path = folder / METRICS
    entries = _read("curves", missing, read_metrics, path) if path.is_file() else []
    if entries == []:
        missing.append(f"curves: nothing was logged yet in {METRICS}")
    return entries or []


def _dataset(cfg: Config, which: str, missing: list[str]) -> Dataset | None:
    advice = "\nwhere the data has moved, give data.root=PATH"
    return _read(f"data.{which}", missing, read_dataset, getattr(cfg.data, which), cfg.data, advice=advice)


def _results(folder: Path, dataset: Dataset | None, missing: list[str]) -> Results | None:
    path = folder / DETECTIONS
    if not path.is_file():
        missing.append("detections: the run was not evaluated yet, so there is no analysis of its mistakes")
    elif dataset is None:
        missing.append("detections: they cannot be analysed without the data set")
    else:
        return _read("detections", missing, read_results, path, dataset)
    return None


def _ending(run: RunRecord) -> tuple[str, str]:
    """Return how the run stands, in a word and in a sentence."""
    left = f"after {run.done:,} of {run.total:,} updates"
    failed, preempted = run.folder / FAILED, run.folder / PREEMPTED
    if failed.is_file():
        return "failed", f"failed {left}: {failed.read_text(encoding='utf-8', errors='replace').strip()}"
    if preempted.is_file():
        text = preempted.read_text(encoding="utf-8", errors="replace").strip()
        return "stopped", f"stopped {left} ({text}); the same command continues it"
    if run.meta and run.meta["update"] >= run.meta["total_updates"] and not run.meta.get("evaluation_due"):
        return "finished", f"finished: {run.done:,} updates"
    return "unfinished", f"unfinished, {left}: it is still running or was killed; the same command continues it"


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
