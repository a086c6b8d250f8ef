"""Signals that come when a run or a study has already ended, and ranks that were given different options."""

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from faults.host import host
from faults.launch import MAIN, Started, cleared, free_port, next_log, start
from faults.tiny import newest_update, write_config
from gndet.distributed.signals import SAME

pytestmark = [pytest.mark.faults, pytest.mark.slow]
OPTIONS = ("train.schedule.updates=2", "train.report=true")
MINUTES = 600.0  # for what a signal must break off


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with cleared(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_has_ended_stays_finished_when_a_signal_breaks_off_its_report(
    folder: Path, number: int, world: int
) -> None:
    run = start(folder, "run", *OPTIONS, faults={"slow_report": [MINUTES]}, world=world)
    run.wait_for("fault: slow report")
    run.signal(number, rank=0)
    run.wait()
    assert run.statuses() == [0] * world
    assert f"no report was written, because a signal came; `gndet report {run.out}` writes it" in run.text
    assert "finished. best checkpoint" in run.text and "Traceback" not in run.text
    assert newest_update(run.out) == 2 and not {"PREEMPTED", "FAILED"} & {path.name for path in run.out.iterdir()}
    again = start(folder, "run", *OPTIONS)
    assert "this run is finished (2 updates)" in again.expect(2)


def test_a_run_that_failed_keeps_its_error_when_a_signal_breaks_off_its_report(folder: Path) -> None:
    faults = {"slow_report": [MINUTES], "not_finite": ["loss", [1], 0]}
    run = start(folder, "run", *OPTIONS, faults=faults)
    run.wait_for("fault: slow report")
    run.signal(signal.SIGTERM)
    text = run.expect(2)
    assert "at update 1" in text and "Traceback" not in text
    assert "no report was written, because a signal came" in text and (run.out / "FAILED").exists()


def test_a_second_signal_says_what_it_did(folder: Path) -> None:
    run = start(folder, "run", *OPTIONS, faults={"slow_report": [MINUTES, True]})
    run.wait_for("fault: slow report")
    run.signal(signal.SIGTERM)
    run.wait_for("fault: deaf report")
    while run.statuses() == [None]:  # a busy machine may notice the first late: signals within a second are one
        time.sleep(SAME)
        run.signal(signal.SIGTERM)
    assert run.statuses() == [128 + signal.SIGTERM]
    assert "a second signal ended this process at once; what was saved before stays" in run.text


@pytest.mark.parametrize("option", ["model.norm.kind=bn", "data.train.seed=5", "train.schedule.updates=3"])
def test_ranks_with_different_options_are_refused_at_once(folder: Path, option: str) -> None:
    home = folder / "processes"
    home.mkdir()
    log = next_log(home)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    words = ["{}", "train", str(write_config(folder)), f"out={folder / 'run'}"]
    pids = [
        host().fork(home, log, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, MAIN,
                    words + ["train.global_batch=6"] + ([option] if rank == 1 else []))
        for rank in range(3)
    ]  # fmt: skip
    run = Started(home, folder / "run", log, pids, [partial(host().status, pid) for pid in pids])
    run.wait()
    assert run.statuses() == [2, 2, 2] and "Traceback" not in run.text
    assert f"{run.out}: rank 1 differs from rank 0 in its config" in run.text
    assert not run.out.exists()
