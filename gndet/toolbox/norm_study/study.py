"""`gndet norm-study`: train every cell of a grid norm x images per GPU x seed, each in a process of its own.

The batch-size curve of Wu & He 2018 (figure 1), and with group counts their group ablation (table 3), on one's own
data.  A study that was stopped goes on with the same command: finished cells are passed over, unfinished runs resumed.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gndet.checkpoint import load_checkpoint, run_checkpoints, save_checkpoint
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.errors import CheckpointError, OutputError, Preempted, TrainingError
from gndet.toolbox.analysis.study_results import (
    CURVE,
    METRICS,
    STUDY,
    CellResult,
    Speed,
    Study,
    is_study,
    metrics_of,
    study_cells,
    study_table,
    study_verdict,
    write_study,
)
from gndet.toolbox.norm_study.budget import estimate, fit_budget
from gndet.toolbox.norm_study.curve import draw_curve
from gndet.toolbox.norm_study.jobs import Job, last_words, run_jobs, slots
from gndet.toolbox.norm_study.plan import begin, cell_overrides, take_up, variants
from gndet.training.log import read_metrics
from gndet.training.run_folder import METRICS as METRICS_FILE
from gndet.training.run_folder import locked

CELLS, LOGS, CALIBRATION = "cells", "logs", "calibration"
MEASURED_IMAGES = 32  # of a calibration run, at the least; its second half is timed
MEASURED_UPDATES = {"cpu": 8, "cuda": 80}  # at the least; a GPU's first seconds choose kernels


def study(
    config: str, overrides: Sequence[str], show: Callable[[str], None], *, norms: Sequence[str],
    groups: Sequence[str] | None, images_per_gpu: Sequence[int], seeds: int, budget: float | None, batch: str,
    jobs: int | None, out: Path | None,
) -> bool:  # fmt: skip
    """Run a study, or go on with it, and say what came out.  Returns whether no cell failed.

    config, overrides: as of `train`; norms: kinds; groups: counts and "channels", in their place; seeds: runs of each
    cell; budget: seconds that the schedule is shortened to; batch: scaled or fixed (`RULES`); jobs: runs at once.
    Raises ConfigError, OutputError, TrainingError where no cell can be measured, and Preempted after a signal.
    """
    cfg = load_config(config, overrides)
    folder = out or Path("runs") / f"norm-study-{Path(config).stem}"
    kinds = variants(norms, groups)
    cells = study_cells(kinds, sorted(set(images_per_gpu)), range(cfg.seed, cfg.seed + seeds))
    places = slots(cfg.device, jobs)
    if folder.exists() and not is_study(folder) and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise OutputError(f"{folder}: holds files but no study (no {STUDY}); choose another --out FOLDER")
    new = begin(cfg, config, overrides, cells, batch, len(places))
    with StopSignals() as stop, locked(folder, Process(0, 1, torch.device("cpu"))):
        work = Work(folder, take_up(folder, new, show), config, cfg, places, stop, show)
        try:
            work.prepare(budget)
            work.run()
        except Stop:
            work.note_stopped()
            raise Preempted(f"{folder}: stopped by a signal; the same command goes on", stop.status) from None
    return work.conclude()


class Work:
    """A study being worked on: its folder, what is known of its cells, where they run."""

    def __init__(
        self, folder: Path, study: Study, config: str, cfg: Config, places: list[dict[str, str]], stop: StopSignals,
        show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.study, self.config, self.cfg = folder, study, config, cfg
        self.places, self.stop, self.show = places, stop, show

    def prepare(self, budget: float | None) -> None:
        """Make the folders, find finished cells, measure, and fit the schedule into the budget."""
        began = time.monotonic()
        try:
            for name in (CELLS, LOGS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot make the study's folders: {error.strerror}") from None
        study, show = self.study, self.show
        counts = f"{len(study.variants)} norms x {len(study.sizes)} sizes x seeds: {len(study.results)} cells"
        show(f"{counts} -> {self.folder}\n{study.rule}")
        for line in (*study.notes, *(f"refused: {r.name}: {r.reason}" for r in study.results if r.state == "refused")):
            show(line)
        for result in study.results:
            if result.state not in ("refused", "copied"):
                self.look(result)
        taken_up = study.speed is not None
        if study.speed is None and self.waiting():
            study.speed = self.measure()
        self._say_time(budget, taken_up, time.monotonic() - began)
        write_study(self.folder, study)

    def _say_time(self, budget: float | None, taken_up: bool, spent: float) -> None:
        """Say how long the rest takes, and shorten the schedule of a study that begins where that is too long."""
        study, waiting = self.study, self.waiting()
        if not waiting:
            return
        images = study.updates * study.reference_batch
        sizes = [cell.images for cell in waiting]
        if budget is not None and not taken_up:
            factor, updates = fit_budget(study.speed, sizes, study.updates, study.reference_batch, study.jobs,
                                         budget - spent)  # fmt: skip
            study.budget, study.factor, study.updates = budget, factor, updates
            if factor < 1:
                whole, asked = estimate(study.speed, sizes, images, study.jobs), study.settings["train"]["schedule"]
                self.show(
                    f"--budget {_clock(budget)}: the schedule of every cell is shortened by the factor {factor:.3f}, "
                    f"to {updates} updates of {study.reference_batch} images; the config's {asked['updates']} would "
                    f"take about {_clock(whole)}"
                )
                images = updates * study.reference_batch
        elif budget is not None:
            self.show(f"the study goes on with its schedule, shortened by {study.factor:.3f} when it began")
        took = estimate(study.speed, sizes, images, study.jobs)
        self.show(
            f"{len(waiting)} cells to run, {study.jobs} at once: about {_clock(took)}, "
            f"{_clock(took * study.jobs / len(waiting))} a cell"
        )

    def waiting(self) -> list[CellResult]:
        """The cells that are to be trained."""
        return [result for result in self.study.results if result.state in ("pending", "running", "failed")]

    def measure(self) -> Speed:
        """Time a few updates and an evaluation at the smallest and the largest size.  Raises TrainingError."""
        shutil.rmtree(self.folder / CALIBRATION, ignore_errors=True)
        said = ""
        for variant in dict.fromkeys(cell.variant for cell in self.waiting()):
            mine = [cell for cell in self.waiting() if cell.variant == variant]
            ends = list(dict.fromkeys([min(c.images for c in mine), max(c.images for c in mine)]))
            self.show(f"measuring {variant} at {' and '.join(map(str, ends))} images per GPU ...")
            sizes = [
                ends[i % len(ends)] for i in range(max(len(ends), len(self.places)))
            ]  # as many as will run at once
            measured = [self._measured(variant, size, number) for number, size in enumerate(sizes)]
            took: dict[str, float] = {}
            run_jobs([job for job, *_ in measured], self.places, self.stop, lambda _: None,
                     lambda job, seconds, _, took=took: took.update({job.name: seconds}))  # fmt: skip
            try:
                found = [_speed_of(job, took[job.name], images) for job, images in measured]
            except TrainingError as error:
                said = str(error)
                continue
            shutil.rmtree(self.folder / CALIBRATION, ignore_errors=True)
            per_image = {size: max(f[0] for f, s in zip(found, sizes, strict=True) if s == size) for size in ends}
            return Speed(per_image=per_image, overhead=max(f[1] for f in found))
        raise TrainingError(f"{self.folder}: no cell could be measured; the last one: {said}")

    def _measured(self, variant: str, size: int, number: int) -> tuple[Job, int]:
        """The calibration run of a size, and its images."""
        cell = CellResult(variant=variant, images=size, seed=self.cfg.seed)
        batch = size if self.study.batch == "scaled" else self.cfg.train.global_batch
        device = "cuda" if self.cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
        updates = max(MEASURED_UPDATES[device], -(-MEASURED_IMAGES // batch))
        short = [f"train.schedule.updates={updates}", f"train.schedule.reference_batch={batch}",
                 f"train.log_every={max(updates // 2, 1)}", "train.checkpoint_every=0"]  # fmt: skip
        folder = self.folder / CALIBRATION / str(number)
        options = [*self.study.overrides, *cell_overrides(cell, self.study), *short]
        job = Job(
            f"calibration-{number}", self.config, options, folder, self.folder / LOGS / f"calibration-{number}.txt"
        )
        return job, updates * batch

    def look(self, result: CellResult) -> None:
        """Note whether a cell's run is finished, and what it reached; what was noted stays when cells/ is removed."""
        if result.state == "done":
            return
        run = self.folder / CELLS / result.name
        saved = finished(run)
        if saved is None:
            result.state = "failed" if result.state == "failed" else "pending"
            return
        drop_optimizer(run)  # here, so that it is done too where a study was killed as a run ended
        result.state, result.metrics, result.reason = "done", saved, ""

    def run(self) -> None:
        """Train all cells that are not finished; a failed one does not stop the others."""
        cells = {cell.name: cell for cell in self.waiting()}
        jobs = [
            Job(name, self.config, [*self.study.overrides, *cell_overrides(cell, self.study)],
                self.folder / CELLS / name, self.folder / LOGS / f"{name}.txt")
            for name, cell in cells.items()
        ]  # fmt: skip
        began, done = time.monotonic(), 0

        def started(job: Job) -> None:
            cells[job.name].state = "running"
            write_study(self.folder, self.study)

        def ended(job: Job, seconds: float, status: int) -> None:
            nonlocal done
            done += 1
            cell = cells[job.name]
            cell.seconds += seconds
            self.look(cell)
            if cell.state == "done":
                said = ", ".join(f"{METRICS[m]} {_percent(cell.metrics.get(m))}" for m in METRICS if m in cell.metrics)
            else:
                cell.state, cell.reason = "failed", last_words(job.log, status)
                said = f"failed: {cell.reason}"
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            self.show(f"[{done}/{len(jobs)}] {cell.name}: {said} ({_clock(seconds)}); about {_clock(left)} left")
            write_study(self.folder, self.study)

        run_jobs(jobs, self.places, self.stop, started, ended)

    def note_stopped(self) -> None:
        """Leave a study.json without running cells."""
        for cell in self.study.results:
            cell.state = "pending" if cell.state == "running" else cell.state
        if (self.folder / CELLS).is_dir():
            write_study(self.folder, self.study)

    def conclude(self) -> bool:
        """Copy what is the same, draw the curve, say what came out.  Returns whether no cell failed."""
        study = self.study
        by_name = {result.name: result for result in study.results}
        for result in (result for result in study.results if result.state == "copied"):
            source = by_name[f"bn-{result.images}-seed{result.seed}"]
            result.metrics = source.metrics if source.state == "done" else {}
        write_study(self.folder, study)
        for metric in metrics_of(study):
            self.show("\n" + study_table(study, metric))
        self.show("\n" + "\n".join(study_verdict(study)))
        if metrics_of(study):
            draw_curve(study, self.folder / CURVE)
            self.show(
                f"\ncurve -> {self.folder / CURVE}\ncells -> {self.folder / STUDY}\nnext: gndet report {self.folder}"
            )
        return not any(result.state == "failed" for result in study.results)


def finished(run: Path) -> dict[str, float | None] | None:
    """The metrics of a run folder whose run is finished and evaluated, else None."""
    for folder in run_checkpoints(run)[:1]:
        try:
            meta = load_checkpoint(folder, ()).meta
        except CheckpointError:
            return None  # the run itself passes it over
        if meta["update"] >= meta["total_updates"] and not meta.get("evaluation_due") and meta["metrics"]:
            return dict(meta["metrics"])
    return None


def drop_optimizer(run: Path) -> None:
    """Write a finished run's last checkpoint again without the optimiser's state: up to two thirds of the disk."""
    for folder in run_checkpoints(run)[:1]:
        saved = load_checkpoint(folder)
        groups = {name: tensors for name, tensors in saved.groups.items() if name != "optimizer"}
        save_checkpoint(folder, groups, saved.meta)


def _speed_of(job: Job, seconds: float, images: int) -> tuple[float, float]:
    """Seconds an image, and seconds beside the training, of a calibration run.  Raises TrainingError."""
    if finished(job.out) is None:
        raise TrainingError(f"{job.name}: {last_words(job.log, 1)}")
    speed = [line["images_per_s"] for line in read_metrics(job.out / METRICS_FILE) if line["kind"] == "train"]
    return 1 / speed[-1], max(seconds - images / speed[-1], 0.0)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _clock(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 1 h 30 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
