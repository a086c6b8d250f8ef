"""Every fault scenario of `gndet selftest`: what it promises is asserted in gndet/selftest, its figure is printed."""

import shutil
from pathlib import Path

import pytest
import torch

from gndet.checkpoint import load_checkpoint, point, save_checkpoint
from gndet.cli import main
from gndet.selftest.launch import call, cleared, processes_in
from gndet.selftest.scenarios import SCENARIOS, Scenario, chosen, run_scenarios
from gndet.selftest.tiny import PROGRESS, SelfTestError, check_same

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which unbroken runs are shared."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(one, id=one.number, marks=[pytest.mark.soak] if one.soak else []) for one in SCENARIOS],
)
def test_the_promise_is_kept(scenario: Scenario, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / scenario.number
    folder.mkdir()
    with cleared(runs):
        figure = scenario.run(folder)
    with capsys.disabled():
        print(f"\n{scenario.number}: {scenario.title}: {figure}")
    shutil.rmtree(folder)  # kept where it failed


def write_run(out: Path, value: float, loss: float, update: int = 1) -> Path:
    """A run folder with one checkpoint of one number, and one line of metrics."""
    folder = out / "checkpoints" / "update-0000001"
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
    with pytest.raises(SelfTestError, match=words):
        check_same(write_run(tmp_path / "three", **same | other), two, "other")


def test_a_process_that_outlives_its_run_is_found_and_ended(tmp_path: Path) -> None:
    with cleared(tmp_path):
        started = call(tmp_path, "subprocess:Popen", ["sleep", "300"])  # and ends itself
        with pytest.raises(SelfTestError, match="processes are left"):
            started.wait()
    assert processes_in(tmp_path) == []


def fails(folder: Path) -> str:
    """A promise that is not kept."""
    raise SelfTestError("expected this, seen that")


def test_a_failure_is_told_with_where_to_look(tmp_path: Path) -> None:
    lines: list[str] = []
    scenarios = [Scenario("T98", "broken", fails, 1), Scenario("T99", "fine", lambda folder: "as it should be", 1)]
    assert not run_scenarios(scenarios, tmp_path / "here", lines.append)
    text = "\n".join(lines)
    assert "T98      FAIL" in text and "expected this, seen that" in text and str(tmp_path / "here" / "T98") in text
    assert "T99      pass" in text and lines[-1] == "failed: T98"


def test_the_verb_runs_what_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "X1", "--keep", str(tmp_path / "here")]) == 0
    out = capsys.readouterr().out
    assert "X1       pass" in out and "6, 7 and the best, 1" in out and "all promises kept" in out
    assert load_checkpoint(tmp_path / "here" / "X1" / "run" / "best").meta["update"] == 1
    assert main(["selftest", "T77"]) == 2
    assert "no scenario T77, expected some of T1, T2" in capsys.readouterr().err
    assert main(["selftest", "X1", "--keep", str(tmp_path / "here")]) == 2


def test_the_quick_selection_takes_under_three_minutes() -> None:
    """By the table, on 2 idle cores; the promise is the verb's, which is run without a test around it."""
    quick, everything = chosen([], False), chosen([], True)
    assert 60 < sum(one.seconds for one in quick) < 170 and set(quick) < set(everything) == set(SCENARIOS)
