"""T12 to T14, T25: processes of a run are killed or stopped; two runs use one folder."""

import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

from faults.launch import finish, start, torchrun, unbroken
from faults.tiny import check, check_same, newest_update

KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
TIMEOUT = 5  # train.timeout_s of the stopped run
OPTIONS = ("train.checkpoint_every=1", "train.schedule.updates=8")


def killed_under_torchrun(folder: Path) -> str:
    """T12, under torchrun."""
    run = torchrun(folder, "run", *OPTIONS, "data.workers=1", faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    pid, began = run.rank_pid(1), time.monotonic()
    os.kill(pid, KILL)
    run.open_gate(3)
    seconds = run.wait(began)
    check(run.statuses()[0] not in (0, None), f"torchrun ended with {run.statuses()}: {run.tail()}")
    finish(folder, "run", *OPTIONS, world=2)
    check_same(run.out, unbroken(folder, *OPTIONS, world=2), "after a rank was killed")
    return f"ended after {seconds:.1f} s, status {run.statuses()[0]}; the same command ended bit-identical"


def killed_rank(folder: Path, ranks: Collection[int] = (0, 1)) -> str:
    """T12."""
    figures = []
    for rank in ranks:
        name = f"rank-{rank}"
        run = start(folder, name, *OPTIONS, "data.workers=1", faults={"gate": [3]}, world=2)
        run.wait_for("fault: gate 3")
        began = run.signal(KILL, rank=rank)
        run.open_gate(3)
        seconds = run.wait(began)
        left = run.statuses()[1 - rank]
        check(left not in (0, None), f"{name}: the other rank ended with {left}: {run.tail()}")
        clear = "the others did not respond" in run.text and f"rank {rank}" in run.text
        check(clear, f"{name}: no clear end: {run.tail()}")
        figures.append(f"rank {rank} killed: after {seconds:.1f} s (status {left})")
        finish(folder, name, *OPTIONS, world=2)
        check_same(folder / name, unbroken(folder, *OPTIONS, world=2), name)
    return f"ended, no process left: {', '.join(figures)}; the same command ended bit-identical"


def restarted(folder: Path) -> str:
    """T13."""
    run = torchrun(folder, "run", *OPTIONS, faults={"gate": [3]}, restarts=1)
    run.wait_for("fault: gate 3")
    pid, began = run.rank_pid(1), time.monotonic()
    os.kill(pid, KILL)
    run.open_gate(3)
    text = run.expect(0)
    check("continuing after update" in text, f"does not report the resume: {text}")
    check_same(run.out, unbroken(folder, *OPTIONS, world=2), "restarted")
    return f"torchrun restarted both, ended {time.monotonic() - began:.1f} s after the kill, bit-identical"


def stopped_rank(folder: Path, launched: bool = False) -> str:
    """T14.  launched: under torchrun."""
    options = (*OPTIONS, f"train.timeout_s={TIMEOUT}")
    run = (torchrun if launched else start)(folder, "run", *options, faults={"gate": [3]}, world=2)
    run.wait_for("fault: gate 3")
    pid, began = run.rank_pid(1) if launched else run.pids[1], time.monotonic()
    os.kill(pid, STOP)
    run.open_gate(3)
    if launched:
        run.wait_for("closing signal")  # rank 0 has ended; torchrun would kill rank 1 in 30 s
    else:
        run.wait_for_rank(0)
    seconds = time.monotonic() - began
    os.kill(pid, KILL)
    run.wait()
    check(run.statuses()[0] not in (0, None), f"ended with {run.statuses()}: {run.tail()}")
    report = run.out / "stalled-process0.txt"
    check(report.exists(), f"no {report.name}: {run.tail()}")
    words = "rank 1 does not answer: stopped or killed"
    check(words in run.text, f"{words!r} expected: {run.tail()}")
    check(words in report.read_text() and "train.py" in report.read_text(), f"{report}: {report.read_text()[:800]}")
    said = run.text[run.text.index(words) :].split(",")[0]
    finish(folder, "run", *OPTIONS, world=2)
    check_same(run.out, unbroken(folder, *OPTIONS, world=2), "after a process was stopped")
    return f"rank 0 ended after {seconds:.1f} s (timeout_s: {TIMEOUT}): '{said}'; the same command ended bit-identical"


def killed_worker(folder: Path) -> str:
    """T25."""
    options = ("train.schedule.updates=16", "train.eval_every=8", "data.workers=2")
    run = start(folder, "once", *options, faults={"gate": [2]})
    run.wait_for("fault: gate 2")
    os.kill(run.children()[0], KILL)
    run.open_gate(2)
    text = run.expect(0)
    check("was killed by signal 9" in text and "restarted" in text, f"the restart is not reported: {text}")
    check_same(run.out, unbroken(folder, *options), "after a loader process was killed")
    again = start(folder, "again", *options, faults={"deadly_picture": [3, 1]})
    again.wait_for("at once")
    seconds = again.wait()
    check(again.statuses() == [2], f"status {again.statuses()}, expected 2: {again.tail()}")
    check("image(s)" in again.text and "data.workers=0" in again.text, f"no clear end: {again.tail()}")
    text = finish(folder, "again", *options)
    check_same(again.out, unbroken(folder, *options), "after a deadly picture")
    return f"killed once: replaced, bit-identical; by the same picture twice: status 2 after {seconds:.1f} s, named"


def two_runs(folder: Path) -> str:
    """Two runs in one folder: the second is refused, the first continues."""
    options = ("train.schedule.updates=8",)
    first = start(folder, "run", *options, faults={"gate": [3]})
    first.wait_for("fault: gate 3")
    began = time.monotonic()
    into = f"out={first.out}"
    soon = {"lock_wait": [1.0]}
    others = [
        start(folder, "again", *options, into, faults=soon),
        start(folder, "fresh", *options, "--fresh", into, faults=soon),
    ]
    for other in others:
        text = other.expect(2)
        check("another process trains into this folder: process" in text, f"not refused: {text}")
    seconds = time.monotonic() - began
    check(newest_update(first.out) == 2, "the second run changed the first")
    first.open_gate(3)
    first.expect(0)
    check_same(first.out, unbroken(folder, *options), "while another command was refused")
    return f"the second refused after {seconds:.0f} s, also with --fresh; the first bit-identical"
