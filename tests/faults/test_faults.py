"""Run every fault scenario: its module asserts the promise, and its figure is printed."""

import shutil
from pathlib import Path

import pytest
import torch

from faults import launch
from faults.launch import call, cleared, processes_in
from faults.scenarios import SCENARIOS, Scenario
from faults.tiny import PROGRESS, BrokenPromise, check_same
from gndet.checkpoint import point, save_checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the unbroken runs, which scenarios share."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(case, id=case.number, marks=[getattr(pytest.mark, case.mark)] if case.mark else [])
        for case in SCENARIOS
    ],
)
def test_the_promise_is_kept(scenario: Scenario, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / scenario.number
    folder.mkdir()
    with cleared(runs):
        figure = scenario.run(folder)
    with capsys.disabled():
        print(f"\n{scenario.number}: {scenario.title}: {figure}")
    shutil.rmtree(folder)  # kept if the scenario failed


def write_run(out: Path, value: float, loss: float, update: int = 1) -> Path:
    """Write a run folder with a checkpoint of one number and a line of metrics."""
    folder = out / "checkpoints" / "update-0000001"
    out.mkdir()
    meta = dict.fromkeys(PROGRESS) | {"update": update}
    save_checkpoint(folder, {"model": {"weight": torch.tensor([value])}}, meta)
    point(out, "last", folder)
    (out / "metrics.jsonl").write_text(f'{{"update": 1, "kind": "train", "loss": {loss}, "eta_s": {value}}}\n')
    return out


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"value": 1.0000001}, "model/weight"),
        ({"loss": 2.0000001}, "metrics.jsonl"),
        ({"update": 2}, "update: 2"),
    ],
)
def test_the_smallest_difference_between_two_runs_is_found(tmp_path: Path, other: dict, words: str) -> None:
    same = {"value": 1.0, "loss": 2.0}
    one, two = write_run(tmp_path / "one", **same), write_run(tmp_path / "two", **same)
    check_same(one, two, "same")
    with pytest.raises(BrokenPromise, match=words):
        check_same(write_run(tmp_path / "three", **same | other), two, "other")


def test_a_process_that_outlives_its_run_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GONE_WITHIN", 0.5)
    with cleared(tmp_path):
        started = call(tmp_path, "subprocess:Popen", ["sleep", "300"])  # ends by itself
        with pytest.raises(BrokenPromise, match="processes are left"):
            started.wait()
    assert processes_in(tmp_path) == []
