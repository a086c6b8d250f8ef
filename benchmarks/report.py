"""Show the subjects' costs as a table: medians, and the ratio of each subject to one of them."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.turns import Turn
from gndet.errors import ConfigError

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def table(
    turns: Mapping[str, Sequence[Turn]], *, against: str, unit: str = "s", per: float = 1.0, facts: Sequence[str] = ()
) -> str:
    """Return a line per subject: median and least time, median CPU time, peak memory, facts, and ratios.

    against: the subject of reference for the ratios of median wall and CPU time; 0.5 means half its time.  per: number
    of items (e.g. images) that the work processes; times are per item.  facts: names of numbers that the work returned,
    shown as medians.  Raises ConfigError for an unknown subject or unit.
    """
    if against not in turns:
        raise ConfigError(f"no subject {against!r} to compare with, there are {', '.join(turns)}")
    if unit not in UNITS:
        raise ConfigError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
    scale = UNITS[unit] / per
    head = ["", f"median {unit}", f"least {unit}", f"CPU {unit}", "peak MiB", *facts, "x wall", "x CPU"]
    reference = turns[against]
    rows = [head]
    for name, own in turns.items():
        wall, cpu = (median(values) for values in _times(own))
        other_wall, other_cpu = (median(values) for values in _times(reference))
        rows.append([
            name, _number(wall * scale), _number(min(turn.wall_s for turn in own) * scale), _number(cpu * scale),
            f"{max(turn.peak_mib for turn in own):,.0f}", *(_fact(own, fact) for fact in facts),
            f"{wall / other_wall:.2f}", f"{cpu / other_cpu:.2f}" if other_cpu else "-",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*lines, f"x: ratio to {against}; medians of {len(reference)} turns"])


def machine(threads: int | None = None) -> str:
    """Return one line: the GPU if there is one, the processor, cores, threads per subject, versions."""
    cores = f"{torch.multiprocessing.cpu_count()} cores" + ("" if threads is None else f", {threads} thread(s) each")
    gpu = f"{torch.cuda.get_device_name(0)}, " if torch.cuda.is_available() else ""
    return f"{gpu}{_processor()}, {cores}, torch {torch.__version__}, Python {platform.python_version()}"


def _times(turns: Sequence[Turn]) -> tuple[list[float], list[float]]:
    return [turn.wall_s for turn in turns], [turn.cpu_s for turn in turns]


def _fact(turns: Sequence[Turn], name: str) -> str:
    """Return the median of a fact; a dash for a subject that does not report it."""
    values = [turn.facts[name] for turn in turns if name in turn.facts]
    return _number(median(values)) if values else "-"


def _number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _processor() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
