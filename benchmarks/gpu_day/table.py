"""The day as text: each figure beside its goal, then the details; and as the rows of docs/performance.md."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Parts = Mapping[str, Any]  # by part, what it found
Figure = tuple[str, bool | None]  # in words, and whether the goal is reached; None without a goal
NOT_RUN = "not run yet"
SEED = 0  # of all configs and of the pictures of the steps


class Row(NamedTuple):
    """A figure that docs/performance.md states."""

    name: str
    goal: str
    figure: Callable[[Parts], Figure]


def speed(batch: int, precision: str, goal: float) -> Callable[[Parts], Figure]:
    """Return the figure of gndet's fastest step beside torchvision's faster one."""

    def figure(parts: Parts) -> Figure:
        rows, work = parts["steps"]["steps"], f"batch {batch}, {precision}"
        own = max(row["images/s"] for name, row in rows.items() if name.startswith("gndet") and name.endswith(work))
        peer = max(row["images/s"] for name, row in rows.items() if name.startswith("torchv") and name.endswith(work))
        return f"{own:.1f}, torchvision {peer:.1f} ({own / peer:.2f}x)", own / peer >= goal if goal else None

    return figure


def memory(batch: int) -> Callable[[Parts], Figure]:
    """Return the figure of the peak memory beside torchvision's."""

    def figure(parts: Parts) -> Figure:
        rows, work = parts["steps"]["steps"], f"batch {batch}, bf16"
        names = [name for name in ("fast", "balanced", "lean") if f"gndet {name}, {work}" in rows]
        peaks = [rows[f"gndet {name}, {work}"]["peak MiB"] for name in names]
        peer, balanced = rows[f"torchvision, {work}"]["peak MiB"], rows[f"gndet balanced, {work}"]["peak MiB"]
        words = " / ".join(f"{peak:,.0f}" for peak in peaks)
        return f"{words} MiB, torchvision {peer:,.0f} ({balanced / peer:.2f}x)", balanced <= 0.5 * peer

    return figure


def small_card(parts: Parts) -> Figure:
    """Return the largest peak of the leanest step, that of the first step included."""
    row = parts["steps"]["steps"]["gndet lean, batch 1, bf16"]
    peak = max(row["peak MiB"], row["first step's peak MiB"])
    return f"{peak / 1024:.2f} GiB", 0 < peak <= 2.5 * 1024


def rate(name: str) -> Callable[[Parts], Figure]:
    """Return the figure of a pass of group norm beside a copy."""

    def figure(parts: Parts) -> Figure:
        found = parts["kernels"]
        moved, once = found["share of a copy's rate, moved"][name], found["share of a copy's rate"][name]
        torch, ms = found["share of a copy's rate"][f"torch {name}"], found["ms per picture"][name]
        return f"{moved:.0%} ({once:.0%} if nothing is read twice; torch {torch:.0%}); {ms:.2f} ms", moved >= 0.8

    return figure


def launches(parts: Parts) -> Figure:
    """Return the launches of a step, and the share of its time in which the GPU works."""
    found, peer = (parts["profile"][f"kernels of {name}"] for name in ("gndet balanced", "torchvision"))
    words = f"{found['launches']:,}, GPU busy {found['busy share']:.0%}; torchvision {peer['launches']:,}"
    return words, found["launches"] <= 1500


def waits(parts: Parts) -> Figure:
    """Return the host syncs per update of a run that logs every 10 updates."""
    count = parts["waits"]["per update"]
    return f"{count:g}", count <= 0.1


def nms(parts: Parts) -> Figure:
    """Return whether NMS keeps what torchvision's keeps, and the time where it needs most rounds."""
    found = {name: row for name, row in parts["operators"].items() if name.startswith("NMS") and isinstance(row, dict)}
    wrong = sum(row["differ"] for row in found.values())
    row = found["NMS, blank picture, batch 1"]
    same = "the same boxes" if not wrong else f"{wrong} boxes differ"
    return f"{same}; blank picture {row['ms']:.2f} ms, torchvision {row['torchvision ms']:.2f} ms", not wrong


def roi_align(parts: Parts) -> Figure:
    """Return the time of RoIAlign in the box head, and whether it gives the same gradient twice."""
    row = parts["operators"]["RoIAlign, box head"]
    same = row["the same twice"] and row["the same gradient twice"]
    words = " and ".join(
        f"{row[f'{way} ms']:.2f} ({row[f'torchvision {way} ms']:.2f})" for way in ("forward", "backward")
    )
    return f"{words} ms; {'the same bits' if same else 'other bits'} twice", same


def modes(parts: Parts) -> Figure:
    """Return the images/s of each compile mode."""
    rows = parts["compiled"]["steps"]
    found = {name.partition("=")[2].partition(",")[0]: row["images/s"] for name, row in rows.items()}
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items()), None


def training(name: str, goal_s: float = 0.0) -> Callable[[Parts], Figure]:
    """Return the scores, time and memory of a training."""

    def figure(parts: Parts) -> Figure:
        found = parts[name]
        last = found["scores"][-1] if found["scores"] else {}
        words = [f"{key} {100 * value:.1f}" for key, value in last.items() if key.endswith("/AP")]
        words += [f"{found['seconds']:.0f} s", f"{found['images/s']:.0f} images/s", f"{found['peak MiB']:,} MiB"]
        return ", ".join(words), found["seconds"] < goal_s if goal_s else None

    return figure


def same_bits(parts: Parts) -> Figure:
    """Return how many tensors differ between runs that should be equal."""
    counts = {
        name: [found["differ"] for found in parts[name].values() if isinstance(found, dict)]
        for name in ("resume", "deterministic")
    }
    words = ", ".join(f"{name}: {' and '.join(map(str, found))} tensors differ" for name, found in counts.items())
    return words, not any(counts["deterministic"])


def invariance(parts: Parts) -> Figure:
    """Return the verdict on batch independence, and the largest difference in float64."""
    found = parts["invariance"]
    return f"{'passed' if found['passed'] else 'failed'}, largest {found['worst']['float64'][0]:.0e}", found["passed"]


def tests(parts: Parts) -> Figure:
    """Return the summary of the tests that need a GPU."""
    return parts["tests"]["summary"].strip("= "), parts["tests"]["status"] == 0


ROWS = (
    Row("images/s, batch 1, bf16", ">= 1.8x torchvision's", speed(1, "bf16", 1.8)),
    Row("images/s, batch 2, bf16", ">= 1.8x torchvision's", speed(2, "bf16", 1.8)),
    Row("images/s, batch 1, float32", "", speed(1, "float32", 0.0)),
    Row("peak, batch 1, bf16, `fast` / `balanced` / `lean`", "<= 0.5x torchvision's (`balanced`)", memory(1)),
    Row("peak, batch 2, bf16, `balanced`", "<= 0.5x torchvision's", memory(2)),
    Row("peak, batch 1, bf16, `lean`: a card of 4 GB", "<= 2.5 GiB", small_card),
    Row("group norm forward, share of a copy's rate", ">= 80 %", rate("forward")),
    Row("group norm backward, share of a copy's rate", ">= 80 %", rate("backward")),
    Row("launches per step, batch 1, bf16", "<= 1,500", launches),
    Row("host syncs per update, `train.log_every=10`", "<= 0.1", waits),
    Row("NMS", "torchvision's boxes", nms),
    Row("RoIAlign of the box head, forward and backward (torchvision)", "the same bits twice", roi_align),
    Row("images/s by `train.compile`, batch 1, bf16", "", modes),
    Row("`gndet train configs/quickstart.yaml`", "< 60 s", training("quickstart", 60.0)),
    Row("blood cells, beside other parts", "", training("bccd")),
    Row("cell nuclei, beside other parts", "", training("nuclei")),
    Row("cell nuclei, R50 at 800 x 1333, 150 updates", "", training("nuclei_full")),
    Row("the same run twice, and resumed", "the same bits if `deterministic`", same_bits),
    Row("`gndet invariance`", "passed", invariance),
    Row("tests that need a GPU", "none fails", tests),
)  # fmt: skip


def figure_of(row: Row, parts: Parts) -> Figure:
    """Return a row's figure; NOT_RUN if a part that it needs is missing or incomplete."""
    try:
        return row.figure(parts)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return NOT_RUN, None


def markdown(day: Mapping[str, Any], date: str) -> str:
    """Return the rows for docs/performance.md."""
    facts = day["parts"].get("facts", {})
    origin = [str(value) for value in (facts.get("card", ""), facts.get("commit", ""), date, SEED)]
    lines = ["| figure | goal | measured | card | commit | date | seed |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        words, _ = figure_of(row, day["parts"])
        cells = [row.name, row.goal, words, *(origin if words != NOT_RUN else [""] * 4)]
        lines.append(f"| {' | '.join(cells)} |".replace("|  ", "| ").replace("|  ", "| "))
    return "\n".join(lines) + "\n"


def text_of(day: Mapping[str, Any]) -> str:
    """Return the day as text: the card, figures beside goals, details, and what failed."""
    parts = day["parts"]
    lines = ["gndet on a GPU" if not day["cpu"] else "a trial on a CPU, at small sizes: the figures mean nothing"]
    lines += [f"  {name}: {value}" for name, value in parts.get("facts", {}).items()]
    table = [("figure", "goal", "", "measured")]
    for row in ROWS:
        words, reached = figure_of(row, parts)
        table.append((row.name, row.goal, {None: "", True: "reached", False: "MISSED"}[reached], words))
    lines += ["", *columns(table), *details(parts), "", f"seconds: {json.dumps(day['seconds'])}"]
    for name, words in day["failed"].items():
        lines += [f"FAILED {name}: {words[:700]}"]
    return "\n".join(lines) + "\n"


def details(parts: Parts) -> list[str]:
    """Return the lines below the table: every subject, map and operator, and the longest kernels."""
    lines: list[str] = []
    for name in ("steps", "compiled"):
        rows = parts.get(name, {}).get("steps", {})
        ratios = parts.get(name, {}).get("ratios", {})
        heads = ("ms", "least ms", "images/s", "peak MiB", "first step's peak MiB", "loss")
        table = [(name, *heads, "x images/s", "x memory")]
        for subject, row in rows.items():
            own = ratios.get(subject, {})
            table.append((subject, *(str(row[head]) for head in heads), *map(str, own.values()), *("", "")[len(own) :]))
        lines += ["", *columns(table)] if rows else []
    maps = {
        name.removeprefix("us of "): row for name, row in parts.get("kernels", {}).items() if name.startswith("us of")
    }
    if maps:
        heads = tuple(next(iter(maps.values())))
        table = [("us", *heads)] + [(name, *(f"{value:.3g}" for value in row.values())) for name, row in maps.items()]
        lines += ["", *columns(table)]
    for part in ("kernels", "operators", "waits", "resume", "deterministic", "compile_ahead", "doctor"):
        for name, value in parts.get(part, {}).items():
            if not name.startswith("us of"):
                lines.append(f"{part} {name}: {json.dumps(value)[:300]}")
    for name, found in parts.get("profile", {}).items():
        if isinstance(found, dict):
            lines.append(f"{name}: {json.dumps({key: value for key, value in found.items() if '(' not in key})[:400]}")
            lines += [
                f"    {ms:8.3f} ms {count:6.0f} x {kernel}"
                for kernel, ms, count in found.get("kernels (ms, count)", [])[:12]
            ]
    return lines


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, their cells one below the other."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
