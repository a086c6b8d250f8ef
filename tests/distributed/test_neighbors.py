"""What other processes take of the cores is told, and what this process and its children take is not."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gndet.distributed import neighbors
from gndet.distributed.neighbors import CoreTime, core_time, taken_by_others
from gndet.toolbox.doctor.devices import cores

STAT = """cpu  900 0 90 5000 10 5 5 0 0 0
cpu0 100 20 30 1000 50 3 2 5 7 0
cpu1 400 0 0 1000 0 0 0 0 0 0
cpu12 300 0 0 1000 0 0 0 0 0 0
intr 12345
"""  # user nice system idle iowait irq softirq steal guest guest_nice, in 1/100 s


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "stat"
    path.write_text(STAT)
    monkeypatch.setattr(neighbors, "STAT", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 12})
    return path


def test_only_busy_time_of_usable_cores_counts(stat: Path) -> None:
    now = core_time()
    assert now is not None and now.busy == pytest.approx((100 + 20 + 30 + 3 + 2 + 5 + 300) / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize(
    "busy, own, expected",
    [
        (2.0, 2.0, ""),
        (1.2, 1.0, ""),
        (1.0, 0.0, "other processes take 1.0 of the 2 core(s) that this one may use"),
        (2.0, 1.5, "other processes take 0.5 of the 2 core(s) that this one may use"),
    ],
)
def test_the_share_of_others_is_what_this_process_does_not_explain(
    stat: Path, monkeypatch: pytest.MonkeyPatch, busy: float, own: float, expected: str
) -> None:
    since = CoreTime(10.0, 50.0, 5.0)
    monkeypatch.setattr(neighbors, "core_time", lambda: CoreTime(11.0, 50.0 + busy, 5.0 + own))
    assert taken_by_others(since) == expected


def test_too_short_a_time_or_a_system_without_the_file_says_nothing(stat: Path) -> None:
    since = core_time()
    assert since is not None and taken_by_others(since) == ""
    stat.unlink()
    assert core_time() is None and taken_by_others(since._replace(clock=0.0)) == "" and taken_by_others(None) == ""


def test_a_process_that_spins_on_a_core_is_seen_and_this_one_is_not() -> None:
    """Real processes.  Others may run beside this test, so the two are compared."""

    def others(seconds: float) -> float:
        before = core_time()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        now = core_time()
        assert before is not None and now is not None
        return now.busy - before.busy - (now.own - before.own)

    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as spinning:
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(spinning.pid, {core})
        try:
            assert others(1.0) > 0.2
        finally:
            spinning.kill()


def test_doctor_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gndet.toolbox.doctor.devices.OBSERVED", 0.0)
    assert "other processes" not in cores().text
    text = "other processes take 1.0 of the 2 core(s) that this one may use"
    monkeypatch.setattr("gndet.toolbox.doctor.devices.taken_by_others", lambda since: text)
    assert cores().mark == "warning" and text in cores().text
