"""`gndet norm-study`: train every cell of a grid norm x images per GPU x seed, each in its own process.

This gives the batch-size curve of Wu & He 2018 (figure 1) on your own data or, with group counts, their group ablation
(table 3).  The same command continues a stopped study: it skips finished cells and resumes unfinished runs.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch

from gndet.checkpoint import sweep_run
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.config.section import NOT_UNICODE
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.errors import ConfigError, OutputError, Preempted, TrainingError, in_one_line
from gndet.files import make_folder
from gndet.text import valid_text
from gndet.toolbox.analysis.study_results import (
    CURVE,
    METRICS,
    STUDY,
    CellResult,
    Speed,
    Study,
    is_study,
    metrics_of,
    read_study,
    study_cells,
    study_table,
    study_verdict,
    write_study,
)
from gndet.toolbox.norm_study.cells import drop_optimizer, finished
from gndet.toolbox.norm_study.curve import draw_curve
from gndet.toolbox.norm_study.jobs import Job, run_jobs, slots
from gndet.toolbox.norm_study.plan import (
    begin,
    cell_overrides,
    estimate,
    fit_budget,
    refuse_own,
    resume_study,
    variants,
)
from gndet.training.log import read_metrics
from gndet.training.run_folder import METRICS as METRICS_FILE
from gndet.training.run_folder import is_empty
from gndet.training.work_folder import WorkFolder, locked

CELLS, LOGS, CALIBRATION = "cells", "logs", "calibration"
MOST_CELLS = 10_000
MEASURED_IMAGES = 32  # least images of a calibration run; its second half is timed
MEASURED_UPDATES = {"cpu": 8, "cuda": 80}  # least updates; a GPU spends its first seconds choosing kernels


def study(
    config: str, overrides: Sequence[str], show: Callable[[str], None], *, norms: Sequence[str],
    groups: Sequence[str] | None, images_per_gpu: Sequence[int], seeds: int, budget: float | None, batch: str,
    jobs: int | None, out: Path | None,
) -> bool:  # fmt: skip
    """Run or continue a study and show its results.  Returns whether no cell failed.

    config, overrides: as for `train`.  norms: kinds of norm.  groups: group counts and "channels", instead of norms.
    seeds: runs per cell.  budget: seconds that the schedule is shortened to.  batch: "scaled" or "fixed" (`RULES`).
    jobs: runs at once.  Raises ConfigError, OutputError, TrainingError if no cell can be measured, and Preempted after
    a signal.
    """
    refuse_own(overrides, batch, groups is not None)
    cfg = load_config(config, overrides)
    folder = out or Path("runs") / f"norm-study-{Path(config).stem}"
    if wrong := [path for path in (str(config), str(folder)) if valid_text(path) != path]:
        raise ConfigError(f"got {wrong[0]}, {NOT_UNICODE}")  # study.json and the options of the cells name it
    kinds, sizes = variants(norms, groups), sorted(set(images_per_gpu))
    if (count := len(kinds) * len(sizes) * seeds) > MOST_CELLS:
        raise ConfigError(f"--seeds: {count} cells, expected at most {MOST_CELLS}")
    cells = study_cells(kinds, sizes, range(cfg.seed, cfg.seed + seeds))
    places = slots(cfg.device, jobs and min(jobs, count))
    if is_study(folder):
        read_study(folder)  # another program's study.json is refused before anything is written beside it
    elif os.path.lexists(folder) and not is_empty(folder):
        raise OutputError(f"{folder}: holds files but no study (no {STUDY}); choose another --out FOLDER")
    new = begin(cfg, config, overrides, cells, batch, len(places))
    with StopSignals() as stop, locked(folder, Process(0, 1, torch.device("cpu")), _may_write) as locked_folder:
        work = Work(locked_folder, resume_study(folder, new, show), cfg, places, stop, show)
        try:
            work.prepare(budget)
            work.run()
        except Stop:
            work.note_stopped()
            raise Preempted(f"{folder}: stopped by a signal; run the same command to continue", stop.status) from None
        work.conclude()
    return not any(result.state == "failed" for result in work.study.results)


def _may_write(folder: Path) -> bool:
    return is_study(folder) or is_empty(folder)


class Work:
    """A study in progress: its folder, its cells, and the places (GPUs or cores) that run them."""

    def __init__(
        self, locked_folder: WorkFolder, study: Study, cfg: Config, places: list[dict[str, str]], stop: StopSignals,
        show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.study, self.cfg, self.places, self.stop, self.show = study, cfg, places, stop, show
        self.folder, self._locked = locked_folder.named, locked_folder

    def save(self) -> None:
        """Write study.json and study.csv.  Raises OutputError, also if the folder is no longer where it was."""
        self.require_folder()
        write_study(self.folder, self.study)

    def note(self) -> None:
        """Save, unless there is no room now: the next save holds everything."""
        try:
            if not self._locked.is_moved:
                write_study(self.folder, self.study)
        except OutputError as error:
            self.show(f"{error}; the study goes on and tries again")

    def look(self) -> None:
        """Raise Stop after a signal, and OutputError as `require_folder` does."""
        self.stop.poll()
        self.require_folder()

    def require_folder(self) -> None:
        """Raise OutputError if the folder was renamed, removed or replaced while the study ran."""
        if self._locked.is_moved:
            where = "removed" if self._locked.is_removed else f"moved to {self._locked.path}"
            raise OutputError(
                f"{self.folder}: this folder was {where} while the study ran; put it back, and run the same command to "
                "continue"
            )

    def prepare(self, budget: float | None) -> None:
        """Make the folders, find finished cells, measure the speed, and fit the schedule to the budget.

        study.json comes first: a study that fails or is killed from then on goes on with the same command.
        """
        began = time.monotonic()
        self.save()
        for name in (CELLS, LOGS):
            make_folder(self.folder / name, "--out")
        shutil.rmtree(self.folder / CALIBRATION, ignore_errors=True)  # of a study that was killed
        study, show = self.study, self.show
        counts = f"{len(study.variants)} norms x {len(study.sizes)} sizes x seeds: {len(study.results)} cells"
        show(f"{counts} -> {self.folder}\n{study.rule}")
        for line in (*study.notes, *(f"refused: {r.name}: {r.reason}" for r in study.results if r.state == "refused")):
            show(line)
        for result in study.results:
            if result.state not in ("refused", "copied"):
                self.refresh(result)
        resumed = study.speed is not None
        if study.speed is None and self.waiting():
            study.speed = self.measure()
        self._plan_time(budget, resumed, time.monotonic() - began)
        self.save()

    def _plan_time(self, budget: float | None, resumed: bool, spent: float) -> None:
        """Show how long the rest takes; shorten the schedule of a new study that would exceed the budget."""
        study, waiting, speed = self.study, self.waiting(), self.study.speed
        if not waiting or speed is None:
            return
        images = study.updates * study.reference_batch
        sizes = [cell.images for cell in waiting]
        if budget is not None and not resumed:
            asked, whole = study.updates, estimate(speed, sizes, images, study.jobs)
            study.budget = budget
            study.factor, study.updates = fit_budget(
                speed, sizes, asked, study.reference_batch, study.jobs, budget - spent
            )
            images = study.updates * study.reference_batch
            if study.factor < 1:
                self.show(
                    f"--budget {_clock(budget)}: the schedule of every cell is shortened by a factor of "
                    f"{study.factor:.3f}, to {study.updates} updates of {study.reference_batch} images; the config's "
                    f"{asked} would take about {_clock(whole)}"
                )
        elif budget is not None:
            self.show(f"the study keeps the schedule that it began with, shortened by a factor of {study.factor:.3f}")
        took = estimate(speed, sizes, images, study.jobs)
        self.show(
            f"{len(waiting)} cells to run, {study.jobs} at once: about {_clock(took)}, "
            f"{_clock(took * study.jobs / len(waiting))} per cell"
        )

    def waiting(self) -> list[CellResult]:
        """Return the cells that have yet to be trained."""
        return [result for result in self.study.results if result.state in ("pending", "running", "failed")]

    def measure(self) -> Speed:
        """Time a few updates and an evaluation at the smallest and the largest size.  Raises TrainingError."""
        reason = ""
        for variant in dict.fromkeys(cell.variant for cell in self.waiting()):
            sizes = [cell.images for cell in self.waiting() if cell.variant == variant]
            ends = sorted({min(sizes), max(sizes)})
            self.show(f"measuring {variant} at {' and '.join(map(str, ends))} images per GPU ...")
            try:
                return self._speed(variant, ends)
            except TrainingError as error:
                reason = str(error)
            finally:
                shutil.rmtree(self.folder / CALIBRATION, ignore_errors=True)
        raise TrainingError(f"{self.folder}: no cell could be measured; the last one: {reason}")

    def _speed(self, variant: str, sizes: Sequence[int]) -> Speed:
        """Measure a variant at these sizes, with as many runs at once as in the study.  Raises TrainingError."""
        took: dict[str, tuple[float, str]] = {}
        runs = [(size, *self._calibration(variant, size, number))
                for number, size in zip(range(max(len(sizes), len(self.places))), cycle(sizes))]  # fmt: skip
        run_jobs([job for _, job, _ in runs], self.places, self.look, lambda _: None,
                 lambda job, seconds, said: took.update({job.name: (seconds, said)}))  # fmt: skip
        per_image, overhead = dict.fromkeys(sizes, 0.0), 0.0
        for size, job, images in runs:
            seconds, said = took[job.name]
            if finished(job.out) is None:
                raise TrainingError(f"{job.name}: {said}")
            logged = [line["images_per_s"] for line in read_metrics(job.out / METRICS_FILE) if line["kind"] == "train"]
            per_image[size] = max(per_image[size], 1 / logged[-1])
            overhead = max(overhead, seconds - images / logged[-1])
        return Speed(per_image=per_image, overhead=overhead)

    def _calibration(self, variant: str, size: int, number: int) -> tuple[Job, int]:
        """Return the calibration run of a size, and the number of images that it trains on."""
        cell = CellResult(variant=variant, images=size, seed=self.cfg.seed)
        batch = size if self.study.batch == "scaled" else self.cfg.train.global_batch
        device = "cuda" if self.cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
        updates = max(MEASURED_UPDATES[device], -(-MEASURED_IMAGES // batch))
        short = [f"train.schedule.updates={updates}", f"train.schedule.reference_batch={batch}",
                 f"train.log_every={max(updates // 2, 1)}", "train.checkpoint_every=0"]  # fmt: skip
        return self._job(cell, CALIBRATION, f"{CALIBRATION}-{number}", short), updates * batch

    def _job(self, cell: CellResult, folder: str, name: str, overrides: Sequence[str] = ()) -> Job:
        options = [*self.study.overrides, *cell_overrides(cell, self.study), *overrides]
        return Job(name, self.study.config, options, self.folder / folder / name, self.folder / LOGS / f"{name}.txt")

    def refresh(self, result: CellResult) -> None:
        """Update a cell's state from its run folder; its metrics stay known when cells/ is removed later."""
        run = self.folder / CELLS / result.name
        sweep_run(run)  # no run does it any more once the cell is finished
        if result.state == "done":
            return
        if metrics := finished(run):
            drop_optimizer(run)  # here, so that it also happens if the study was killed just after the run ended
            result.state, result.metrics, result.reason = "done", metrics, ""
        elif result.state != "failed":
            result.state = "pending"

    def run(self) -> None:
        """Train all cells that are not finished; the study survives failed cells."""
        cells = {cell.name: cell for cell in self.waiting()}
        jobs = [self._job(cell, CELLS, name) for name, cell in cells.items()]
        began, done = time.monotonic(), 0

        def started(job: Job) -> None:
            cells[job.name].state = "running"
            self.note()

        def ended(job: Job, seconds: float, said: str) -> None:
            nonlocal done
            done += 1
            cell = cells[job.name]
            cell.seconds += seconds
            self.refresh(cell)
            if cell.state == "done":
                reached = {title: cell.metrics.get(metric) for metric, title in METRICS.items()}
                words = ", ".join(f"{title} {100 * ap:.1f}" for title, ap in reached.items() if ap is not None)
            else:
                cell.state, cell.reason = "failed", said
                words = f"failed: {cell.reason}"
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            self.show(f"[{done}/{len(jobs)}] {cell.name}: {words} ({_clock(seconds)}); about {_clock(left)} left")
            self.note()

        run_jobs(jobs, self.places, self.look, started, ended)

    def note_stopped(self) -> None:
        """Reset running cells to pending and write study.json."""
        for cell in self.study.results:
            cell.state = "pending" if cell.state == "running" else cell.state
        self.save()

    def conclude(self) -> None:
        """Fill in copied cells, show the results, draw the curve."""
        study = self.study
        by_name = {result.name: result for result in study.results}
        for result in study.results:
            if result.state == "copied":
                source = by_name[f"bn-{result.images}-seed{result.seed}"]
                result.metrics = source.metrics if source.state == "done" else {}
        self.save()
        try:
            with self.stop.at_once():
                self._show_results()
        except Stop:
            self.show("stopped by a signal; every cell has run, and the same command shows the results and draws them")

    def _show_results(self) -> None:
        study = self.study
        for metric in metrics_of(study):
            self.show("\n" + study_table(study, metric))
        self.show("\n" + "\n".join(study_verdict(study)))
        if metrics_of(study):
            try:
                draw_curve(study, self.folder / CURVE)
                self.show(f"\ncurve -> {self.folder / CURVE}")
            except Exception as error:  # the numbers stand
                self.show(f"\n{CURVE} could not be drawn: {in_one_line(error)}")
            self.show(f"cells -> {self.folder / STUDY}\nnext: gndet report {self.folder}")


def _clock(seconds: float) -> str:
    """Return a duration as 45 s, 12 min or 1 h 30 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
