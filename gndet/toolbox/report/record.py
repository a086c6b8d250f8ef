"""What a run folder holds, read for its report; what is missing is noted, not an error.

Nothing here touches the run: a run that is under way can be reported on.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gndet.checkpoint import load_checkpoint, resolve, run_checkpoints
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, DataError, GndetError
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.analysis import Analysis, analyse, draws_masks
from gndet.toolbox.analysis.read import read_results
from gndet.training.log import read_metrics
from gndet.training.optim import total_updates
from gndet.training.run_folder import CONFIG, DETECTIONS, FAILED, METRICS, PREEMPTED


class RunRecord(NamedTuple):
    """A run as its folder tells it."""

    folder: Path
    cfg: Config
    meta: dict[str, Any]  # of the newest whole checkpoint; {}: there is none
    train: list[dict[str, Any]]  # lines of metrics.jsonl
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
        """Updates that are known to be done."""
        return max([line["update"] for line in (*self.train, *self.evaluations)] + [int(self.meta.get("update", 0))])

    def last(self, key: str) -> float | None:
        """The newest value of an evaluation, like "box/AP"; None where there is none."""
        return next((line[key] for line in reversed(self.evaluations) if line.get(key) is not None), None)


def read_run(folder: Path, overrides: Sequence[str] = ()) -> RunRecord:
    """Read a run folder.  overrides: over its config, like data.root=PATH where the data has moved since.

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
    train, evaluations = _lines(folder, missing)
    train_set, val_set = (_dataset(cfg, which, missing) for which in ("train", "val"))
    results = _results(folder, val_set, missing)
    analysis = None
    if results is not None and val_set is not None:
        masks = cfg.model.masks and results.codes is not None and draws_masks(val_set)
        kind = "mask" if masks else "box"
        analysis = analyse(val_set, results, kind=kind, max_detections=cfg.evaluation.max_detections)
    record = RunRecord(
        folder, cfg, meta, train, evaluations, "", "", train_set, val_set, results, analysis, missing
    )  # fmt: skip
    ended, why = _ending(record)
    return record._replace(ended=ended, why=why)


def _meta(folder: Path, missing: list[str]) -> dict[str, Any]:
    """What the newest whole checkpoint says of the run."""
    for checkpoint in run_checkpoints(folder):
        try:
            return load_checkpoint(checkpoint, groups=()).meta
        except CheckpointError as error:
            missing.append(f"checkpoint: {error}")
    missing.append("checkpoints: there is none yet, so environment and weight sources are not known")
    return {}


def _lines(folder: Path, missing: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl, by kind."""
    path = folder / METRICS
    try:
        lines = read_metrics(path)
    except (OSError, DataError) as error:
        missing.append(f"curves: {path.name}: {getattr(error, 'strerror', None) or error}")
        return [], []
    if not lines:
        missing.append(f"curves: {path.name} is empty: nothing was logged yet")
    return [one for one in lines if one["kind"] == "train"], [one for one in lines if one["kind"] == "evaluation"]


def _dataset(cfg: Config, which: str, missing: list[str]) -> Dataset | None:
    try:
        return read_dataset(getattr(cfg.data, which), cfg.data)
    except GndetError as error:
        first = str(error).splitlines()[0]
        missing.append(f"data.{which}: {first}; where the data has moved, give data.root=PATH")
        return None


def _results(folder: Path, dataset: Dataset | None, missing: list[str]) -> Results | None:
    path = folder / DETECTIONS
    if not path.is_file():
        missing.append("detections: the run was not evaluated yet, so there is no analysis of what it gets wrong")
        return None
    if dataset is None:
        missing.append("detections: without the data set they belong to they cannot be analysed")
        return None
    try:
        return read_results(path, dataset)
    except DataError as error:
        missing.append(f"detections: {error}")
        return None


def _ending(run: RunRecord) -> tuple[str, str]:
    """How the run stands, in a word and in a sentence."""
    left = f"after {run.done:,} of {run.total:,} updates"
    if (run.folder / FAILED).is_file():
        return "failed", f"failed {left}: {(run.folder / FAILED).read_text(encoding='utf-8', errors='replace').strip()}"
    if (run.folder / PREEMPTED).is_file():
        text = (run.folder / PREEMPTED).read_text(encoding="utf-8", errors="replace").strip()
        return "stopped", f"stopped {left} ({text}); the same command goes on"
    if run.meta and run.meta["update"] >= run.meta["total_updates"] and not run.meta.get("evaluation_due"):
        return "finished", f"finished: {run.done:,} updates"
    return "unfinished", f"unfinished, {left}: it still runs, or was killed; the same command goes on"


def training_time(run: RunRecord) -> str:
    """About how long the updates took, by the images a second that were logged; empty where nothing was."""
    seconds, before = 0.0, 0
    for line in run.train:
        if line.get("images_per_s"):
            seconds += (line["update"] - before) * run.cfg.train.global_batch / line["images_per_s"]
        before = line["update"]
    if not seconds:
        return ""
    return (
        time.strftime("%-H:%M h", time.gmtime(seconds))
        if seconds >= 3600
        else time.strftime("%-M:%S min", time.gmtime(seconds))
    )


def best_checkpoint(run: RunRecord) -> str:
    """The folder that predict and export take, as words; empty where there is none."""
    try:
        return resolve(run.folder).name
    except CheckpointError:
        return ""
