"""Read a run folder for its report; missing parts are noted and are not errors.

Reading changes nothing in the folder, so a run in progress can be reported on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple, TypeVar

from gndet.checkpoint import load_checkpoint, run_checkpoints
from gndet.config.loading import load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import DataError, in_one_line
from gndet.evaluation.results import Results
from gndet.modeling.trained import nonfinite, without_cache
from gndet.toolbox.analysis.analysis import Analysis, chosen_kind, make_analysis, read_results
from gndet.training.logged import read_metrics
from gndet.training.optim import total_updates
from gndet.training.run_folder import CONFIG, DETECTIONS, FAILED, METRICS, PREEMPTED

T = TypeVar("T")
WEIGHTS = "finite weights"  # first words of the line on weights that are not finite


class RunRecord(NamedTuple):
    """The content of a run folder."""

    folder: Path
    cfg: Config
    meta: dict[str, Any]  # of the newest intact checkpoint; {} if there is none
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
        """Images per second, the median of the log; None if it was not logged."""
        speeds = [entry["images_per_s"] for entry in self.train if entry.get("images_per_s")]
        return median_high(speeds) if speeds else None

    @property
    def memory(self) -> float | None:
        """Peak memory in GiB; None if it was not logged."""
        mib = self.train[-1].get("memory_mib") if self.train else None
        return mib / 1024 if mib else None

    @property
    def images_at_once(self) -> int | None:
        """Images that a rank computed at once; None if unknown."""
        images = self.meta.get("images_at_once") or self.cfg.train.images_per_gpu
        return images if isinstance(images, int) else None

    @property
    def ending(self) -> tuple[str, str]:
        """State of the run (finished, failed, stopped or unfinished), and a sentence about it."""
        left = f"after {self.done:,} of {self.total:,} updates"
        failed, preempted = self.folder / FAILED, self.folder / PREEMPTED
        if failed.is_file():
            return "failed", f"failed {left}: {failed.read_text(encoding='utf-8', errors='replace').strip()}"
        if preempted.is_file():
            text = preempted.read_text(encoding="utf-8", errors="replace").strip()
            return "stopped", f"stopped {left} ({text}); run the same command to continue"
        if self.meta and self.meta["update"] >= self.meta["total_updates"] and not self.meta.get("evaluation_due"):
            return "finished", f"finished: {self.done:,} updates"
        state = "it is still running or was killed; if it was killed, run the same command to continue"
        return "unfinished", f"unfinished, {left}: {state}"

    def last(self, key: str) -> float | None:
        """Return the newest value of a metric such as "box/AP"; None if there is none."""
        return next((entry[key] for entry in reversed(self.evaluations) if entry.get(key) is not None), None)


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunRecord:
    """Read a run folder.  overrides: changes to its config, e.g. data.root=PATH if the data has moved.

    Raises DataError if the folder holds no run, and ConfigError if its config cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected a run folder")
    if not (folder / CONFIG).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        holds = f"it holds {names}" if names else "it is empty"
        raise DataError(f"{folder}: not a run folder, it has no {CONFIG} ({holds})")
    cfg = load_config(folder / CONFIG, overrides)
    data = with_overrides(without_cache(load_config(folder / CONFIG)), overrides, str(folder / CONFIG)).data
    missing: list[str] = []
    paths = _read("checkpoints", missing, run_checkpoints, folder) or []
    checkpoints = (_read("checkpoint", missing, load_checkpoint, path) for path in paths)
    newest = next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
    for group in ("model", "ema"):
        if newest and (wrong := nonfinite(newest.groups.get(group, {}))):
            missing.append(f"{WEIGHTS}: NaN or infinite values in {group} of {newest.path}: {wrong}")
    if newest is None:
        missing.append("checkpoints: there is none yet, so environment and weight sources are unknown")
    log, detections = folder / METRICS, folder / DETECTIONS
    last = total_updates(cfg.train.schedule, cfg.train.global_batch)
    entries = _read("curves", missing, read_metrics, log, lambda words: missing.append(f"curves: {words}"), last)
    if entries == []:
        missing.append(f"curves: nothing was logged in {METRICS} yet")
    train, evaluations = (
        [entry for entry in entries or () if entry["kind"] == kind] for kind in ("train", "evaluation")
    )
    train_set = _read("data.train", missing, read_dataset, data.train, data)
    read_val = partial(read_dataset, known=train_set.classes if train_set else ())
    val_set = _read("data.val", missing, read_val, data.val, data)
    if train_set is None or val_set is None:
        missing.append("data: if the data has moved, set data.root=PATH")
    results = analysis = None
    if cfg.task == "classification":
        pass  # it has no detections; the section on classes reads its own file
    elif not detections.exists():
        missing.append("detections: the run was not evaluated yet, so there is no analysis of its mistakes")
    elif val_set is None:
        missing.append("detections: these cannot be analyzed without the data set")
    elif (results := _read("detections", missing, read_results, detections, val_set)) is not None:
        analyze = partial(make_analysis, max_detections=cfg.evaluation.max_detections)
        analysis = _read("detections", missing, lambda: analyze(val_set, results, kind=chosen_kind(val_set, results)))
    meta = newest.meta if newest else {}
    if newest and not all(type(meta.get(key)) is int for key in ("update", "total_updates")):
        missing.append(f"checkpoint: {newest.path}: its meta.json does not say how far the run had come")
        meta = {}
    return RunRecord(folder, cfg, meta, train, evaluations, train_set, val_set, results, analysis, missing)


def _read(what: str, missing: list[str], read: Callable[..., T], *arguments: Any) -> T | None:
    """Return what `read` returns; if that fails, for whatever reason, note it as missing and return None."""
    try:
        return read(*arguments)
    except Exception as error:  # what else the folder holds is reported
        missing.append(f"{what}: {in_one_line(error)}")
        return None


def training_time(run: RunRecord) -> str:
    """Return about how long the updates took, by the logged speed; "" if nothing was logged."""
    seconds, before = 0.0, 0
    for entry in run.train:
        if (speed := entry.get("images_per_s") or 0) > 0:
            seconds += (entry["update"] - before) * run.cfg.train.global_batch / speed
        before = entry["update"]
    if not seconds:
        return ""
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours:.0f}:{minutes % 60:02.0f} h" if hours else f"{minutes:.0f}:{seconds // 1 % 60:02.0f} min"
