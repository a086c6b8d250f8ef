"""The norm study: its grid, intervals, budget and verdict; killed studies that are resumed; cells that fail."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from faults.tiny import CONFIG

from gndet.checkpoint import load_checkpoint
from gndet.cli.main import parse
from gndet.config.loading import load_config
from gndet.distributed.signals import Stop, StopSignals
from gndet.errors import ConfigError, DataError, OutputError
from gndet.toolbox.analysis.study_results import (
    CellResult,
    Speed,
    Study,
    cell_values,
    fraction_point,
    is_study,
    mean_difference,
    mean_of,
    read_study,
    study_cells,
    study_table,
    study_verdict,
    write_study,
)
from gndet.toolbox.norm_study.cells import finished
from gndet.toolbox.norm_study.curve import draw_curve
from gndet.toolbox.norm_study.jobs import Job, last_words, run_jobs, slots
from gndet.toolbox.norm_study.plan import (
    begin,
    cell_overrides,
    estimate,
    fit_budget,
    per_image_at,
    resume_study,
    variants,
)
from gndet.toolbox.norm_study.study import Work, study
from gndet.toolbox.report.report import study_page, write_report
from gndet.toolbox.report.study import study_command
from gndet.training.work_folder import WorkFolder

OVERRIDES = ("train.schedule.updates=4", "train.ema=0", "model.masks=false")
GRID = {"norms": ("gn", "bn", "sync_bn"), "groups": None, "images_per_gpu": (1,), "seeds": 1, "batch": "scaled"}


def tiny(folder: Path) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return tiny(tmp_path)


def begun(config: str, kinds: tuple[str, ...] = ("gn", "bn"), batch: str = "scaled", *overrides: str) -> Study:
    return begin(load_config(config, overrides), config, overrides, study_cells(kinds, (1, 2), (0,)), batch, 1)


def made_up(scores: dict[tuple[str, int], list[float]]) -> Study:
    """Return a study whose cells reached these box APs, one value per seed."""
    results = [
        CellResult(variant=v, images=size, seed=seed, state="done", metrics={"box/AP": score})
        for (v, size), found in scores.items()
        for seed, score in enumerate(found)
    ]
    return Study(
        config="c.yaml", overrides=[], settings={}, batch="scaled", rule="", updates=100, reference_batch=2,
        results=results,
    )  # fmt: skip


# --- intervals, compared with tables of Student's t


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_students_t_is_that_of_the_tables(df: int, t: float) -> None:
    assert fraction_point(df) == pytest.approx(t, abs=6e-4)


def test_the_interval_of_three_seeds_worked_by_hand() -> None:
    mean = mean_of([0.3, 0.4, 0.5])  # standard deviation 0.1
    assert mean.mean == pytest.approx(0.4) and mean.n == 3
    assert mean.half == pytest.approx(4.303 * 0.1 / math.sqrt(3), abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert mean_of([0.3]).mean == 0.3 and math.isnan(mean_of([0.3]).half)
    assert not mean_difference([0.3], [0.1, 0.2]).clear


def test_differences_worked_by_hand() -> None:
    equal = mean_difference([0, 1, 2], [3, 4, 5])  # variances 1 and 1: 4 degrees of freedom
    assert equal.mean == -3 and equal.half == pytest.approx(2.776 * math.sqrt(2 / 3), abs=1e-3)
    welch = mean_difference([0, 1, 2], [4, 4, 4])  # all of the variance is in the first: its 2 degrees of freedom
    assert welch.mean == -3 and welch.half == pytest.approx(4.303 * math.sqrt(1 / 3), abs=1e-3)


# --- the verdict


def test_a_norm_that_falls_is_said_to_fall_and_one_that_does_not_is_not() -> None:
    scores = {
        ("gn", 1): [0.40, 0.41, 0.42], ("gn", 8): [0.41, 0.40, 0.43],
        ("bn", 1): [0.10, 0.11, 0.12], ("bn", 8): [0.40, 0.41, 0.42],
    }  # fmt: skip
    said = "\n".join(study_verdict(made_up(scores)))
    assert "At 1 image per GPU gn is best: box AP 41.0 ± 2.5 (n = 3)" in said
    assert "clearly above bn (+30.0" in said and "cannot be told" not in said
    assert "bn falls from 8 to 1 image per GPU: -30.0" in said
    assert "gn from 8 to 1 image per GPU: -0.3" in said and "the interval includes 0" in said


def test_an_interval_that_contains_0_is_not_a_win() -> None:
    said = "\n".join(study_verdict(made_up({("gn", 1): [0.40, 0.50], ("ln", 1): [0.39, 0.49]})))
    assert "cannot be distinguished from ln" in said and "clearly" not in said


def test_one_seed_cannot_rule_out_chance() -> None:
    assert "One seed per cell" in study_verdict(made_up({("gn", 1): [0.4], ("gn", 2): [0.4]}))[0]


def test_a_failed_cell_is_shown_in_its_place_and_not_averaged() -> None:
    grid = made_up({("gn", 1): [0.4, 0.6, 0.9], ("bn", 1): [0.5, 0.5, 0.5]})
    grid.results[2].state = "failed"
    assert cell_values(grid, "gn", 1, "box/AP") == [40, 60]
    for result in grid.results[3:]:
        result.state = "failed"
    shown = study_table(grid, "box/AP")
    assert "50.0 ± 127.1 (2), 1 failed" in shown and shown.splitlines()[-1].split() == ["bn", "failed"]
    assert "Failed: gn at 1 (seed 2), bn at 1 (seed 0)" in study_verdict(grid)[-1]


@pytest.mark.parametrize("kinds", [("gn", "bn"), ("groups-1", "groups-4", "groups-channels")])
@pytest.mark.parametrize("sizes", [(1,), (1, 8)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_kind_of_study_is_drawn(
    kinds: tuple[str, ...], sizes: tuple[int, ...], seeds: int, tmp_path: Path
) -> None:
    grid = made_up({(kind, size): [0.3, 0.4, 0.6][:seeds] for kind in kinds for size in sizes})
    grid.results[0].state, grid.results[0].metrics, grid.results[0].reason = "failed", {}, "<loss> is not finite"
    write_study(tmp_path, grid)
    draw_curve(grid, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    html = study_page(tmp_path, print).partition("<main>")[2].partition("</main>")[0]
    assert "<svg" in html and "&lt;loss&gt; is not finite" in html and "nan" not in html.lower()
    assert "could not be made" not in html


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        (("gn", "bn"), {"norms": ("gn", "bn"), "groups": None}),
        (("groups-1", "groups-channels"), {"groups": ("1", "channels")}),
    ],
)
def test_the_command_of_the_page_asks_for_the_same_study(kinds: tuple[str, ...], asked: dict[str, Any]) -> None:
    grid = made_up({(kind, size): [0.3, 0.4, 0.5] for kind in kinds for size in (1, 8)})
    grid.overrides, grid.budget, grid.batch = ["data.root=a folder", "data.shortest_edge=[64,72]"], 5400.0, "fixed"
    words = shlex.split(study_command(grid))
    options = vars(parse(words[1:]))
    asked |= {
        "config": "c.yaml", "images_per_gpu": (1, 8), "seeds": 3, "budget": 5400.0, "batch": "fixed",
        "overrides": grid.overrides,
    }  # fmt: skip
    assert words[:2] == ["gndet", "norm-study"] and {name: options[name] for name in asked} == asked


# --- the budget


def test_seconds_per_image_are_interpolated_between_measured_sizes() -> None:
    speed = Speed(per_image={1: 1.0, 4: 0.4}, overhead=0)  # an update costs 0.8 s plus 0.2 s per image
    assert per_image_at(speed, 2) == pytest.approx(0.6)
    assert per_image_at(speed, 4) == pytest.approx(0.4)
    assert per_image_at(Speed(per_image={2: 0.3}, overhead=0), 8) == 0.3


def test_the_estimate_counts_rounds_of_jobs() -> None:
    speed = Speed(per_image={1: 0.1}, overhead=10)
    assert estimate(speed, [1] * 4, 1000, 2) == pytest.approx(220)
    assert estimate(speed, [1] * 5, 1000, 2) == pytest.approx(330)


def test_a_schedule_is_shortened_to_the_budget_and_not_beyond() -> None:
    speed = Speed(per_image={1: 0.1}, overhead=10)
    assert fit_budget(speed, [1] * 4, 500, 2, 2, budget=300) == (1.0, 500)
    factor, updates = fit_budget(speed, [1] * 4, 500, 2, 2, budget=100 / 0.95)  # 100 s, 20 of them no training
    assert (factor, updates) == (pytest.approx(0.4, abs=0.002), pytest.approx(200, abs=1))


def test_a_budget_that_leaves_too_little_is_refused_with_one_that_would_do() -> None:
    speed = Speed(per_image={1: 0.1}, overhead=10)
    with pytest.raises(ConfigError, match=r"expected at least 50\..*Set --budget (\d+)m") as error:
        fit_budget(speed, [1] * 40, 500, 2, 2, budget=240)
    minutes = int(str(error.value).split("--budget ")[1].split("m ")[0])
    assert fit_budget(speed, [1] * 40, 500, 2, 2, budget=60 * minutes)[1] >= 50


# --- the grid


def test_cells_run_seed_by_seed() -> None:
    names = [cell.name for cell in study_cells(("gn", "bn"), (1, 2), (0, 1))]
    assert names[:4] == ["gn-1-seed0", "gn-2-seed0", "bn-1-seed0", "bn-2-seed0"] and names[4] == "gn-1-seed1"


@pytest.mark.parametrize(("count", "kind", "groups"), [("1", "ln", 32), ("8", "gn", 8), ("channels", "in", 32)])
def test_group_counts_go_from_ln_to_in(config: str, count: str, kind: str, groups: int) -> None:
    (variant,) = variants((), (count,))
    options = cell_overrides(CellResult(variant=variant, images=1, seed=0), begun(config))
    norm = load_config(config, options).model.norm
    assert norm.kind == kind and (kind != "gn" or (norm.groups, norm.channels_per_group) == (groups, None))


def test_scaled_batches_show_every_cell_the_same_number_of_images(config: str) -> None:
    grid = begun(config)
    for cell in grid.results:
        train = load_config(config, cell_overrides(cell, grid)).train
        assert train.global_batch == train.images_per_gpu == cell.images
        assert train.schedule.reference_batch == 2


def test_fixed_batches_keep_the_configs(config: str) -> None:
    grid = begun(config, ("gn", "bn"), "fixed", "train.global_batch=4")
    batches = [load_config(config, [*grid.overrides, *cell_overrides(c, grid)]).train for c in grid.results]
    assert [(train.global_batch, train.images_per_gpu) for train in batches] == [(4, 1), (4, 2)] * 2


def test_a_shortened_schedule_keeps_its_proportions(config: str) -> None:
    grid = begun(config, ("gn",), "scaled", "train.schedule.updates=1000", "train.schedule.steps=[600,800]",
                "train.schedule.warmup=100")  # fmt: skip
    grid.factor, grid.updates = 0.25, 250
    schedule = load_config(config, [*grid.overrides, *cell_overrides(grid.results[0], grid)]).train.schedule
    assert (schedule.updates, schedule.steps, schedule.warmup) == (250, (150, 200), 25)


def test_a_count_that_does_not_divide_the_channels_is_refused_with_the_reason(config: str) -> None:
    grid = begin(load_config(config), config, (), study_cells(("groups-3", "groups-8"), (1,), (0,)), "scaled", 1)
    refused, accepted = grid.results
    assert refused.state == "refused" and "groups: 3 does not divide 64 channels" in refused.reason
    assert accepted.state == "pending"


def test_an_impossible_split_is_refused_only_at_that_size(config: str) -> None:
    options = ("train.global_batch=3",)
    cells = study_cells(("gn", "bn"), (1, 2), (0,))
    states = {c.name: c.state for c in begin(load_config(config, options), config, options, cells, "fixed", 1).results}
    assert [name for name, state in states.items() if state == "refused"] == ["bn-2-seed0"]


def test_the_identity_and_the_copy_are_noted(config: str) -> None:
    grid = begun(config, ("bn", "sync_bn", "frozen_bn"))
    assert "frozen_bn without train.weights is the identity" in grid.notes[0] and "copied from bn" in grid.notes[1]
    assert [cell.state for cell in grid.results] == ["pending"] * 2 + ["copied"] * 2 + ["pending"] * 2


@pytest.mark.parametrize(
    ("norms", "groups", "words"),
    [(("gn", "bm"), None, "--norms: 'bm' is not one of gn, bn"), (("gn",), ("8", "all"), "--groups: 'all', expected")],
)
def test_an_unknown_norm_is_named(norms: tuple[str, ...], groups: tuple[str, ...] | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        variants(norms, groups)


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("out=runs/mine", "; use --out"), ("model.norm.kind=bn", "; use --norms"),
        ("train.images_per_gpu=4", "; use --images-per-gpu"), ("train.eval_every=9", "$"),
        ("train.global_batch=8", " to --images-per-gpu; --batch fixed keeps it"),
    ],
)  # fmt: skip
def test_an_override_that_each_cell_would_undo_is_refused(
    config: str, tmp_path: Path, override: str, option: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{override}.*in each cell{option}"):
        study(config, (override,), print, **GRID, budget=None, jobs=1, out=tmp_path / "study")
    assert not (tmp_path / "study").exists()


# --- the folder


def test_a_foreign_folder_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="holds files but no study"):
        study(config, (), print, **GRID, budget=None, jobs=1, out=tmp_path / "mine")


def test_a_study_of_other_settings_is_refused_and_more_seeds_are_not(config: str, tmp_path: Path) -> None:
    old = begun(config)
    old.results[0].state, old.results[0].metrics = "done", {"box/AP": 0.3}
    old.factor, old.updates = 0.5, 3
    write_study(tmp_path, old)
    with pytest.raises(OutputError, match=r"train\.optimizer\.lr: 0\.02 there, 0\.1 now"):
        resume_study(tmp_path, begun(config, ("gn", "bn"), "scaled", "train.optimizer.lr=0.1"), print)
    more = begin(load_config(config), config, (), study_cells(("gn", "bn"), (1, 2), (0, 1)), "scaled", 1)
    taken = resume_study(tmp_path, more, print)
    assert [cell.state for cell in taken.results] == ["done"] + ["pending"] * 7
    assert (taken.factor, taken.updates) == (0.5, 3)


def test_a_study_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"study\.json: not a norm study of this version: config"):
        read_study(tmp_path)


# --- trainings


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.2)


def states(folder: Path) -> dict[str, str]:
    return {r.name: r.state for r in read_study(folder).results} if is_study(folder) else {}


def trainings(folder: Path) -> list[int]:
    """Return the ids of the processes that train a study's cells."""
    target = f"out={folder}/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        found += [int(process.name)] if target in words and "study.child" in words else []
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start a study of 2 trainings and kill it after the first; tests that use it are slow."""
    folder = tmp_path_factory.mktemp("killed")
    options = ["--norms", "gn,bn,sync_bn", "--images-per-gpu", "1", "--seeds", "1", "--out", str(folder / "study")]
    command = [sys.executable, "-m", "gndet.cli", "norm-study", tiny(folder), *options, *OVERRIDES]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until(lambda: "done" in states(folder / "study").values() or process.poll() is not None)
        assert process.poll() is None, (folder / "said.txt").read_text()
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not trainings(folder / "study"))  # the trainings end with the study
    return folder


@pytest.fixture(scope="module")
def resumed(killed: Path) -> tuple[Path, str]:
    """Resume the study to its end; return its folder and what it printed."""
    first = killed / "study" / "cells" / "gn-1-seed0" / "metrics.jsonl"
    before, lines = first.stat().st_mtime_ns, list[str]()
    left = finished(killed / "study" / "cells" / "bn-1-seed0") is None  # a slow machine may finish it before the kill
    passed = study(
        str(killed / "tiny.yaml"), OVERRIDES, lines.append, **GRID, budget=None, jobs=1, out=killed / "study"
    )
    assert passed and first.stat().st_mtime_ns == before, "a finished cell was trained again"
    said = "\n".join(lines)
    assert ("1 cells to run" in said) == left and ("cells to run" in said) == left
    return killed / "study", said


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_study_goes_on_and_trains_only_what_is_not_finished(resumed: tuple[Path, str]) -> None:
    folder, said = resumed
    assert "measuring" not in said
    assert states(folder) == {"gn-1-seed0": "done", "bn-1-seed0": "done", "sync_bn-1-seed0": "copied"}


@pytest.mark.slow
def test_the_cells_are_trainings_of_their_norm_batch_and_schedule(resumed: tuple[Path, str]) -> None:
    folder, _ = resumed
    for result in read_study(folder).results[:2]:
        saved = load_checkpoint(folder / "cells" / result.name / "last")
        assert saved.meta["config"]["model"]["norm"]["kind"] == result.variant
        assert saved.meta["config"]["train"]["global_batch"] == 1
        assert saved.meta["update"] == 8  # as many images as 4 updates of 2
        assert saved.meta["metrics"] == result.metrics and "optimizer" not in saved.groups


@pytest.mark.slow
def test_sync_bn_has_bns_numbers_and_says_so(resumed: tuple[Path, str]) -> None:
    folder, said = resumed
    results = {r.name: r for r in read_study(folder).results}
    assert results["sync_bn-1-seed0"].metrics == results["bn-1-seed0"].metrics != {}
    assert "sync_bn on one rank is the same as bn" in said


@pytest.mark.slow
def test_the_folder_holds_table_curve_and_report(resumed: tuple[Path, str]) -> None:
    folder, said = resumed
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "study.csv").read_text().splitlines()) == 4
    assert "box AP in percent by images per GPU" in said and "One seed per cell" in said
    html = study_page(folder, print)
    assert html.count("<svg") == 1 and "study-table-box-AP" in html and "copied" in html
    assert write_report([folder], None, (), lambda _: None).name == "report.html"


@pytest.mark.faults
@pytest.mark.slow
def test_a_cell_that_fails_is_shown_and_the_others_run(resumed: tuple[Path, str], tmp_path: Path) -> None:
    weights = resumed[0] / "cells" / "bn-1-seed0"  # fits bn; gn refuses them without train.norm_policy
    lines: list[str] = []
    passed = study(
        tiny(tmp_path), (*OVERRIDES, f"train.weights={weights}"), lines.append, norms=("gn", "bn"), groups=None,
        images_per_gpu=(2,), seeds=1, budget=None, batch="scaled", jobs=1, out=tmp_path / "study",
    )  # fmt: skip
    gn, bn = read_study(tmp_path / "study").results
    assert not passed and (gn.state, bn.state) == ("failed", "done")
    assert "train.norm_policy" in gn.reason and "Failed: gn at 2 (seed 0)" in lines[-2] + lines[-3]
    assert "train.norm_policy" in study_page(tmp_path / "study", print)
    shutil.rmtree(tmp_path / "study" / "cells")


@pytest.mark.faults
def test_a_signal_ends_what_is_running(config: str, tmp_path: Path) -> None:
    jobs = [Job(name, config, (), tmp_path / "study" / name, tmp_path / f"{name}.txt") for name in "ab"]
    begun_jobs: list[str] = []

    def started(job: Job) -> None:
        begun_jobs.append(job.name)
        os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as stop, pytest.raises(Stop):
        run_jobs(jobs, [{}], stop.poll, started, lambda *_: None)
    assert begun_jobs == ["a"] and not trainings(tmp_path / "study")


def test_a_stopped_study_leaves_no_running_cell(config: str, tmp_path: Path) -> None:
    grid = begun(config)
    grid.results[0].state = "running"
    (tmp_path / "cells").mkdir()
    Work(WorkFolder(tmp_path), grid, load_config(config), [{}], StopSignals(), print).note_stopped()
    assert states(tmp_path)["gn-1-seed0"] == "pending"


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_not_taken_for_one(resumed: tuple[Path, str], tmp_path: Path) -> None:
    assert finished(tmp_path) is None and finished(resumed[0] / "cells" / "gn-1-seed0") is not None
    shutil.copytree(resumed[0] / "cells" / "gn-1-seed0", tmp_path / "run", symlinks=True)
    (meta,) = (tmp_path / "run" / "checkpoints").glob("*/meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"update": 3}))  # this does not match the manifest either
    assert finished(tmp_path / "run") is None


def test_last_words_quote_a_failed_run(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("loading\ngndet train: x.yaml: wrong\n  more of it\n")
    assert last_words(log, 0, 2) == "x.yaml: wrong\n  more of it"
    before = log.stat().st_size
    with log.open("a") as file:
        file.write("loading\nupdate 3\n")
    assert last_words(log, before, -9) == "ended by signal 9: loading\nupdate 3"  # not the error of an earlier command


def test_jobs_on_a_cpu_share_its_cores() -> None:
    assert slots("cpu", None) == [{}]
    cores = len(os.sched_getaffinity(0))
    assert slots("cpu", 2) == [{"OMP_NUM_THREADS": str(max(cores // 2, 1))}] * 2
