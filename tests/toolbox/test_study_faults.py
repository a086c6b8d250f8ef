"""A norm study that is killed, stopped, moved or given a broken study.json; its trainings are stand-ins of a second."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.tiny import CONFIG

from gndet.cli.main import main
from gndet.config.loading import load_config
from gndet.errors import OutputError, TrainingError
from gndet.toolbox.analysis.study_results import CellResult, Speed, Study, read_study, study_cells, write_study
from gndet.toolbox.norm_study import jobs
from gndet.toolbox.norm_study import study as studies
from gndet.toolbox.norm_study.plan import begin
from gndet.toolbox.norm_study.study import study

FAILS = "print('gndet train: no data here'); raise SystemExit(2)"
WAITS = "import time; time.sleep(600)"
GRID: dict[str, Any] = {
    "norms": ("gn",), "groups": None, "images_per_gpu": (1,), "seeds": 1, "batch": "fixed", "jobs": None,
    "budget": None,
}  # fmt: skip
WORDS = ["--norms", "gn", "--images-per-gpu", "1", "--seeds", "1", "--batch", "fixed"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that lets another program, given as code, take the place of each training."""

    def take_place(code: str) -> None:
        monkeypatch.setattr(jobs, "python_command", lambda *_: [sys.executable, "-S", "-c", code])

    return take_place


def begun(config: str, *overrides: str) -> Study:
    return begin(load_config(config, overrides), config, overrides, study_cells(("gn",), (1,), (0,)), "fixed", 1)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", f".tmp-{'a' * 32}")])
def test_a_study_that_failed_or_died_while_it_measured_begins_again(
    config: str, folder: Path, stand_in: Callable[[str], None], left: tuple[str, ...]
) -> None:
    for name in left:
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    stand_in(FAILS)
    for overrides in ((), (), ("data.train.seed=5",)):  # the mistake may have been one of the options
        with pytest.raises(TrainingError, match=r"no cell could be measured; the last one: calibration-0: no data"):
            study(config, overrides, lambda _: None, **GRID, out=folder)
        assert [cell.state for cell in read_study(folder).results] == ["pending"]
        assert not (folder / "calibration").exists() and not list(folder.glob(".tmp-*"))
    (folder / "calibration" / "calibration-0").mkdir(parents=True)  # of a study that was killed now
    with pytest.raises(TrainingError, match="no data here"):
        study(config, ("data.train.seed=5",), lambda _: None, **GRID, out=folder)
    assert not (folder / "calibration").exists()


def test_a_study_that_has_trained_keeps_its_settings(config: str, folder: Path) -> None:
    folder.mkdir()
    old = begun(config)
    old.speed = Speed(per_image={1: 0.1}, overhead=1)
    write_study(folder, old)
    with pytest.raises(OutputError, match="a study with other settings"):
        study(config, ("data.train.seed=5",), lambda _: None, **GRID, out=folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000, b'{"results": []}' + b" " * 99],
)
def test_a_broken_study_is_refused_in_a_line_and_stays_as_it_is(
    config: str, folder: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    (folder / "study.json").write_bytes(content)
    assert main(["norm-study", config, "--out", str(folder), *WORDS]) == 2
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("study.json: not a norm study of this version" in line for line in said)
    assert (folder / "study.json").read_bytes() == content
    assert [path.name for path in folder.iterdir()] == ["study.json"]


MOVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "renamed": (lambda path: path.rename(path.with_name("elsewhere")), "was moved to .*elsewhere"),
    "removed": (shutil.rmtree, "was removed"),
}


@pytest.mark.parametrize("what", MOVES)
def test_a_study_whose_folder_is_moved_says_so_and_ends_its_trainings(
    config: str, folder: Path, stand_in: Callable[[str], None], what: str
) -> None:
    stand_in(f"print('started', flush=True); {WAITS}")
    move, words = MOVES[what]

    def move_soon() -> None:
        log = folder / "logs" / "calibration-0.txt"
        while not log.exists() or not log.read_text():
            time.sleep(0.01)
        move(folder)

    threading.Thread(target=move_soon, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(OutputError, match=f"this folder {words}.* while the study ran; put it back"):
        study(config, (), lambda _: None, **GRID, out=folder)
    assert not folder.exists() and time.monotonic() - began < 300


def test_a_finished_study_stays_finished_when_a_signal_breaks_off_its_curve(
    config: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    done = begun(config)
    done.results = [CellResult(variant="gn", images=1, seed=0, state="done", metrics={"box/AP": 0.3})]
    write_study(folder, done)
    drawn, lines = studies.draw_curve, list[str]()

    def slow_curve(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr(studies, "draw_curve", slow_curve)
    assert study(config, (), lines.append, **GRID, out=folder)
    assert "stopped by a signal; every cell has run, and the same command shows the results" in lines[-1]
    monkeypatch.setattr(studies, "draw_curve", drawn)
    assert study(config, (), lines.append, **GRID, out=folder)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not any("measuring" in line for line in lines)


def test_a_grid_without_end_is_refused(config: str, folder: Path) -> None:
    for words in (
        ["--seeds", "999999999"],
        ["--seeds", "9" * 30],
        ["--jobs", "9" * 5000],
        ["--budget", "9" * 400 + "h"],
    ):
        try:
            status = main(["norm-study", config, "--out", str(folder), *words])
        except SystemExit as error:  # of argparse
            status = error.code
        assert status == 2 and not folder.exists()
