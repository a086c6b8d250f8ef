"""T26: a long run in which memory, open files and threads do not grow."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from faults.launch import start
from faults.tiny import check, read_trace

GROWTH = 0.05  # of the resident memory, from the second quarter of the run to the last


def soak(folder: Path) -> str:
    """T26."""
    return grow_nothing(folder, updates=2000, eval_every=50)


def short_soak(folder: Path) -> str:
    """T26 in a minute."""
    return grow_nothing(folder, updates=320, eval_every=20)


def grow_nothing(folder: Path, updates: int, eval_every: int) -> str:
    """Train with 2 loader processes, many evaluations and checkpoints; compare the quarters of the run."""
    trace = folder / "resources.jsonl"
    run = start(
        folder, "run", f"train.schedule.updates={updates}", f"train.eval_every={eval_every}", "data.workers=2",
        f"train.checkpoint_every={eval_every // 4}", "train.keep_last=2", "train.log_every=10",
        faults={"count_resources": [str(trace), 2]},
    )  # fmt: skip
    run.wait(within=600 + updates)
    run.expect(0)
    lines = read_trace(trace)
    quarter = len(lines) // 4

    def both(key: str, summary: Callable[[list[float]], float]) -> tuple[float, float]:
        values = [line[key] for line in lines]
        return summary(values[quarter : 2 * quarter]), summary(values[-quarter:])

    mib, files = both("mib", median), both("files", median)
    threads = both("threads", median)  # not the most: one that lives for a moment may be seen in either quarter
    check(mib[1] < mib[0] * (1 + GROWTH), f"memory grew from {mib[0]:.0f} to {mib[1]:.0f} MiB: {trace}")
    check(files[1] <= files[0], f"open files grew from {files[0]:.0f} to {files[1]:.0f}: {trace}")
    check(threads[1] <= threads[0], f"threads grew from {threads[0]:.0f} to {threads[1]:.0f}: {trace}")
    return (
        f"{updates} updates, {updates // eval_every} evaluations: memory {mib[0]:.0f} -> {mib[1]:.0f} MiB, "
        f"open files {files[0]:.0f} -> {files[1]:.0f}, threads {threads[0]:.0f} -> {threads[1]:.0f}"
    )
