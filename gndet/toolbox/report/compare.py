"""Several runs beside each other: curves, AP with intervals of the differences, and what differs in their configs."""

import math
from collections.abc import Sequence

import numpy as np

from gndet.toolbox.analysis.bootstrap import Interval, paired_intervals
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.charts import Series
from gndet.toolbox.report.overview import interval
from gndet.toolbox.report.record import RunRecord
from gndet.training.run_folder import UNSET, flat


def sections(runs: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The sections of a page that compares two or more runs; the others are compared with the first."""
    missing = [f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.missing]
    notes = [blocks.notice("plain", f"Missing here: {line}") for line in missing]
    words = [blocks.notice(kind, line) for kind, line in comparison_verdict(runs, names)]
    summary = blocks.section(
        "summary", "Comparison", *words, _scores(runs, names), *notes,
        lead=f"Differences are to {names[0]}, with 95 % intervals over the same draws of the same images.",
    )  # fmt: skip
    curves = blocks.section("training", "Training", blocks.beside(*_curves(runs, names)))
    return [
        ("summary", "Comparison", summary), ("training", "Training", curves),
        ("classes", "Classes", _classes(runs, names)), ("setup", "Configs", _configs(runs, names)),
    ]  # fmt: skip


def comparable(first: RunRecord, other: RunRecord) -> str:
    """Why two runs' detections cannot be compared image by image; empty where they can."""
    if first.analysis is None or other.analysis is None:
        return "one of them has no detections that could be read"
    a, b = first.analysis, other.analysis
    if a.matches.classes != b.matches.classes or not np.array_equal(a.matches.image_ids, b.matches.image_ids):
        return "they were evaluated on other images or classes"
    if a.kind != b.kind:
        return f"one is compared by {a.kind}, the other by {b.kind}"
    return ""


def comparison_verdict(runs: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, str]]:
    """Which is better, as far as the images can tell."""
    lines = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        if reason := comparable(runs[0], run):
            lines.append(("warn", f"{name} and {names[0]} cannot be compared image by image: {reason}."))
            continue
        gain, ends = _gain(runs[0], run)
        said = f"{100 * gain:+.1f} points of {run.analysis.kind} AP ({interval(ends)})"
        if ends.low > 0 or ends.high < 0:
            better, worse = (name, names[0]) if gain > 0 else (names[0], name)
            lines.append(("good", f"{better} is better than {worse}: {name} {said}, interval without 0."))
        else:
            lines.append(("plain", f"{name} and {names[0]} do not differ by more than these images can tell: {said}."))
    if len({run.cfg.seed for run in runs}) == len(runs) or len(runs) > 1:
        lines.append(
            ("plain", "Intervals are over images; another seed may move AP too, which single runs cannot show.")
        )
    return lines


def _gain(first: RunRecord, other: RunRecord) -> tuple[float, Interval]:
    """AP of the other less that of the first, and its interval."""
    assert first.analysis is not None and other.analysis is not None  # comparable
    ends, _ = paired_intervals(first.analysis.matches, other.analysis.matches)
    return other.analysis.metrics.summary["AP"] - first.analysis.metrics.summary["AP"], ends


def _scores(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    columns = (
        "run",
        "state",
        "updates",
        "box AP",
        "mask AP",
        "AP, 95 %",
        "difference",
        "of it 95 %",
        "images/s",
        "GiB",
    )
    rows: list[list[blocks.Cell]] = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        gain, ends = math.nan, Interval(math.nan, math.nan)
        if place and not comparable(runs[0], run):
            gain, ends = _gain(runs[0], run)
        speeds = sorted(line["images_per_s"] for line in run.train if line.get("images_per_s"))
        memory = run.train[-1].get("memory_mib") if run.train else None
        rows.append([
            name, run.ended, blocks.count(run.done), blocks.percent(run.last("box/AP")),
            blocks.percent(run.last("mask/AP")),
            interval(run.analysis.intervals.ap) if run.analysis else "-",
            (gain, f"{100 * gain:+.1f}") if not math.isnan(gain) else (math.nan, "-"), interval(ends),
            blocks.number(speeds[len(speeds) // 2] if speeds else None), blocks.number(memory and memory / 1024, 2),
        ])  # fmt: skip
    return blocks.sortable_table("runs", columns, rows, "AP in percent")


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    wanted = (
        ("loss", "train", "loss", 1.0, "total loss"),
        ("box-ap", "evaluations", "box/AP", 100.0, "box AP, percent"),
        ("mask-ap", "evaluations", "mask/AP", 100.0, "mask AP, percent"),
        ("speed", "train", "images_per_s", 1.0, "images a second"),
    )
    figures = []
    for id, lines, key, factor, caption in wanted:
        series = []
        for run, name in zip(runs, names, strict=True):
            some = [line for line in getattr(run, lines) if line.get(key) is not None]
            # images, not updates: runs with other batches see as many after other numbers of updates
            seen = [line["update"] * run.cfg.train.global_batch for line in some]
            series.append(Series(name, seen, [factor * line[key] for line in some]))
        if any(len(one.x) for one in series):
            svg = charts.lines(id, series, x_label="images seen", y_label=caption, x_range=(0, None))
            figures.append(blocks.figure(svg, caption, f"chart-{id}"))
    return figures


def _classes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    known = [(run.analysis, name) for run, name in zip(runs, names, strict=True) if run.analysis is not None]
    if not known:
        return blocks.section("classes", "Classes", blocks.notice("plain", "No run has detections that could be read."))
    listed = list(dict.fromkeys(row["name"] for found, _ in known for row in found.metrics.per_class))
    columns, rows = ["class"], []
    for _, name in known:
        columns += [f"{name}: AP", f"{name}: 95 %"]
    for one in listed:
        row: list[blocks.Cell] = [one]
        for found, _ in known:
            place = next((k for k, of in enumerate(found.metrics.per_class) if of["name"] == one), None)
            ap = None if place is None else found.metrics.per_class[place]["AP"]
            row += [blocks.percent(ap), "-" if place is None else interval(found.intervals.class_ap[place])]
        rows.append(row)
    return blocks.section(
        "classes", "Classes", blocks.sortable_table("table-classes", columns, rows, "AP of each class, percent")
    )


def _configs(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    configs = [flat(run.cfg) for run in runs]
    keys = list(dict.fromkeys(key for one in configs for key in one if key != "out"))
    rows = [
        [key, *(str(one.get(key, UNSET)) for one in configs)]
        for key in keys if len({str(one.get(key, UNSET)) for one in configs}) > 1
    ]  # fmt: skip
    block = (
        blocks.sortable_table("differences", ("option", *names), rows)
        if rows
        else blocks.paragraph("Their configs are equal.")
    )
    return blocks.section("setup", "Configs", block, lead="Options in which the runs differ.")
