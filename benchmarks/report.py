"""What subjects took, as a table: medians, and the ratio of each to one of them."""

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
    """A line a subject: median and least of the time, median of CPU time, peak of memory, facts, and ratios.

    against: the subject that ratios of the medians of wall and CPU time are to: 0.5 is half of its time.  per: what the
    work has so many of, like images; times are of one.  facts: names of what the work returned, their medians.
    Raises ConfigError for a subject or a unit that is not there.
    """
    if against not in turns:
        raise ConfigError(f"no subject {against!r} to compare with, there are {', '.join(turns)}")
    if unit not in UNITS:
        raise ConfigError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
    scale = UNITS[unit] / per
    head = ["", f"median {unit}", f"least {unit}", f"CPU {unit}", "peak MiB", *facts, "x wall", "x CPU"]
    reference = turns[against]
    rows = [head]
    for name, mine in turns.items():
        wall, cpu = (median(values) for values in _times(mine))
        other_wall, other_cpu = (median(values) for values in _times(reference))
        rows.append([
            name, _number(wall * scale), _number(min(turn.wall_s for turn in mine) * scale), _number(cpu * scale),
            f"{max(turn.peak_mib for turn in mine):,.0f}", *(_fact(mine, fact) for fact in facts),
            f"{wall / other_wall:.2f}", f"{cpu / other_cpu:.2f}" if other_cpu else "-",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*lines, f"x: of {against}; medians of {len(reference)} turns"])


def machine(threads: int | None = None) -> str:
    """One line: the processor, the GPU if there is one, cores, threads a subject uses, versions."""
    cores = f"{torch.multiprocessing.cpu_count()} cores" + ("" if threads is None else f", {threads} thread(s) each")
    gpu = f"{torch.cuda.get_device_name(0)}, " if torch.cuda.is_available() else ""
    return f"{gpu}{_processor()}, {cores}, torch {torch.__version__}, Python {platform.python_version()}"


def _times(turns: Sequence[Turn]) -> tuple[list[float], list[float]]:
    return [turn.wall_s for turn in turns], [turn.cpu_s for turn in turns]


def _fact(turns: Sequence[Turn], name: str) -> str:
    """The median of a fact; a dash for a subject that does not tell it."""
    values = [turn.facts[name] for turn in turns if name in turn.facts]
    return _number(median(values)) if values else "-"


def _number(value: float) -> str:
    """Three significant digits, or all in front of the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
