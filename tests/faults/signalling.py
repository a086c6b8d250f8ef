"""T8 to T11: a signal ends a run where it can resume exactly; a second signal ends it at once."""

import signal
import time
from collections.abc import Collection
from pathlib import Path

from faults.launch import Faults, Started, finish, start, torchrun, unbroken
from faults.tiny import BrokenPromise, check, check_same, newest_update, read_trace
from gndet.distributed.signals import SAME
from gndet.training.run_folder import PREEMPTED

TERM, INT, USR1 = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGUSR1)
MINUTES = 600.0  # for what a run must not wait for
WITHIN = 150.0  # seconds after a signal: much less than MINUTES, and much more than it takes on a busy machine
LONG = ("train.schedule.updates=12", "train.checkpoint_every=0", "train.eval_every=6")


def check_stopped(run: Started, seconds: float, trace: Path, at: int | None = None) -> str:
    """Check that all ranks stopped at the same update, and saved it.  Returns that in words."""
    made: dict[int, int] = {}
    for line in read_trace(trace):
        made[line["rank"]] = max(line["update"], made.get(line["rank"], 0))
    check(len(set(made.values())) <= 1, f"{run.out}: the processes stopped after updates {made}: {run.tail()}")
    saved = newest_update(run.out)
    check(saved == next(iter(made.values()), 0), f"{run.out}: saved is update {saved}, made were {made}")
    check(at is None or saved == at, f"{run.out}: stopped at update {saved}, expected {at}")
    check((run.out / PREEMPTED).exists(), f"{run.out}: no {PREEMPTED}: {run.tail()}")
    return f"{seconds:.1f} s (update {saved})"


def go_on(folder: Path, name: str, options: tuple[str, ...], world: int) -> None:
    """Repeat the command without a fault, and compare with the unbroken run."""
    text = finish(folder, name, *options, world=world)
    check("continuing after update" in text, f"{name}: does not report the resume: {text}")
    check(not (folder / name / PREEMPTED).exists(), f"{name}: {PREEMPTED} is left")
    check_same(folder / name, unbroken(folder, *options, world=world), name)


def launcher(folder: Path) -> str:
    """T8."""
    trace = folder / "trace.jsonl"
    run = torchrun(folder, "run", *LONG, faults={"trace": [str(trace)], "gate": [2]})
    run.wait_for("fault: gate 2")
    began = run.signal(TERM)
    run.wait_for("closing signal")  # torchrun has passed it on
    run.open_gate(2)
    seconds = run.wait(began, WITHIN)
    check(run.statuses() == [1], f"torchrun ended with {run.statuses()}, expected 1: {run.tail()}")
    saved = check_stopped(run, seconds, trace)
    go_on(folder, "run", LONG, world=2)
    return f"both saved and gone after {saved}, status 1; the same command ended bit-identical"


SIGNALS = {"SIGTERM": (TERM, [0, 0]), "SIGINT": (INT, [0, 130]), "SIGUSR1": (USR1, [0, 0])}  # with exit statuses


def one_rank(folder: Path, names: Collection[str] = tuple(SIGNALS)) -> str:
    """T9."""
    figures = []
    for name in names:
        number, statuses = SIGNALS[name]
        trace = folder / f"{name}.jsonl"
        faults: Faults = {"trace": [str(trace)], "gate": [2]}
        run = start(folder, name, *LONG, faults=faults, world=2)
        run.wait_for("fault: gate 2")
        began = run.signal(number, rank=1)
        run.open_gate(2)
        seconds = run.wait(began, WITHIN)
        check(run.statuses() == statuses, f"{name}: status {run.statuses()}, expected {statuses}: {run.tail()}")
        figures.append(f"{name} {check_stopped(run, seconds, trace)}")
        go_on(folder, name, LONG, world=2)
    return f"to rank 1 only, both saved and gone after: {', '.join(figures)}; bit-identical"


MOMENTS: dict[str, tuple[int, str, Faults, int | None]] = {
    # name: ranks, the fault to wait for, faults, the update that is saved
    "first-batch": (2, "slow picture", {"slow_pictures": [MINUTES, 1]}, 0),
    "first-batch-of-workers": (1, "slow picture", {"slow_pictures": [MINUTES, 1]}, 0),
    "evaluation": (2, "slow evaluation", {"slow_evaluation": [MINUTES]}, 6),
    "evaluation-of-one": (1, "slow evaluation", {"slow_evaluation": [1.5]}, 6),
    "save": (2, "slow save", {"slow_save": [0.7, 6], "gate": [8]}, None),
}


def at_bad_moments(folder: Path, names: Collection[str] = tuple(MOMENTS)) -> str:
    """T10."""
    figures = []
    for name in names:
        world, words, faults, at = MOMENTS[name]
        workers = f"data.workers={2 if 'workers' in name else 0}"
        trace = folder / f"{name}.jsonl"
        run = start(folder, name, *LONG, workers, faults={"trace": [str(trace)], **faults}, world=world)
        run.wait_for(f"fault: {words}")
        began = run.signal(TERM, rank=0)
        run.open_gate(8)
        seconds = run.wait(began, WITHIN)
        check(run.statuses() == [0] * world, f"{name}: status {run.statuses()}: {run.tail()}")
        figures.append(f"{name} {check_stopped(run, seconds, trace, at)}")
        if name == "evaluation-of-one":  # also killed after the evaluation, before it is saved
            run = start(folder, name, *LONG, faults={"slow_save": [MINUTES, 6]})
            run.wait_for("evaluation after update 6")
            run.signal(signal.SIGKILL)
            run.expect(-signal.SIGKILL)
        go_on(folder, name, LONG, world)
    return f"saved and gone after: {', '.join(figures)}; bit-identical"


TWICE = {"one": (1, 128 + TERM), "two": (2, 128 + TERM), "torchrun": (2, 1)}  # name: ranks, exit status


def twice(folder: Path, names: Collection[str] = tuple(TWICE)) -> str:
    """T11."""
    options = ("train.checkpoint_every=1", "train.schedule.updates=6")
    faults: Faults = {"slow_save": [MINUTES, 3]}
    figures = []
    for name in names:
        world, status = TWICE[name]
        launched = name == "torchrun"
        run = (torchrun if launched else start)(folder, name, *options, faults=faults, world=world)
        run.wait_for("fault: slow save")
        run.signal(TERM)
        time.sleep(SAME + 0.5)
        check(None in run.statuses(), f"{name}: ended after the first signal, in a save of minutes: {run.tail()}")
        began = run.signal(TERM)
        try:
            seconds = run.wait(began, WITHIN / 5)
        except BrokenPromise:  # a busy machine noticed the first signal late: both were one request
            run.signal(TERM)
            seconds = run.wait(began, WITHIN)
        check(run.statuses()[0] == status, f"{name}: status {run.statuses()}, expected {status}: {run.tail()}")
        check(newest_update(run.out) == 2, f"{name}: saved is update {newest_update(run.out)}, expected 2")
        figures.append(f"{seconds:.1f} s ({name})")
        go_on(folder, name, options, world)
    return f"while a save hangs, gone after {', '.join(figures)}; the previous checkpoint loads; bit-identical"
