"""Several runs side by side: curves, AP with intervals of the differences, and options that differ."""

import math
from collections.abc import Sequence

import numpy as np

from gndet.toolbox.analysis.bootstrap import Interval, paired_interval
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.charts import Series
from gndet.toolbox.report.overview import interval
from gndet.toolbox.report.record import RunRecord
from gndet.training.run_folder import UNSET, flat


def sections(runs: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the sections of a page that compares two or more runs, each with the first."""
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


def comparable(first: RunRecord, second: RunRecord) -> str:
    """Say why the detections of two runs cannot be compared image by image; return "" where they can."""
    if first.analysis is None or second.analysis is None:
        return "one of them has no detections that could be read"
    a, b = first.analysis, second.analysis
    if a.matches.classes != b.matches.classes or not np.array_equal(a.matches.image_ids, b.matches.image_ids):
        return "they were evaluated on other images or classes"
    if a.kind != b.kind:
        return f"one is compared by {a.kind}, the other by {b.kind}"
    return ""


def comparison_verdict(runs: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, str]]:
    """Say which run is better, as far as the images can tell."""
    lines = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        if reason := comparable(runs[0], run):
            lines.append(("warn", f"{name} and {names[0]} cannot be compared image by image: {reason}."))
            continue
        gain, ends = _gain(runs[0], run)
        change = f"{100 * gain:+.1f} points of {run.analysis.kind} AP ({interval(ends)})"
        if ends.low > 0 or ends.high < 0:
            better, worse = (name, names[0]) if gain > 0 else (names[0], name)
            lines.append(("good", f"{better} is better than {worse}: {name} {change}, interval without 0."))
        else:
            doubt = "do not differ by more than these images can tell"
            lines.append(("plain", f"{name} and {names[0]} {doubt}: {change}."))
    caveat = "Intervals are over images; another seed may move AP too, which single runs cannot show."
    return [*lines, ("plain", caveat)]


def _gain(first: RunRecord, second: RunRecord) -> tuple[float, Interval]:
    """Return AP(second) - AP(first) and its interval."""
    assert first.analysis is not None and second.analysis is not None  # comparable
    ends = paired_interval(first.analysis.matches, second.analysis.matches)
    return second.analysis.metrics.summary["AP"] - first.analysis.metrics.summary["AP"], ends


def _scores(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    columns = ("run", "state", "updates", "box AP", "mask AP", "AP, 95 %", "difference", "difference, 95 %",
               "images/s", "GiB")  # fmt: skip
    rows: list[list[blocks.Cell]] = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        gain, ends = math.nan, Interval(math.nan, math.nan)
        if place and not comparable(runs[0], run):
            gain, ends = _gain(runs[0], run)
        rows.append([
            name, run.ended, blocks.count(run.done), blocks.percent(run.last("box/AP")),
            blocks.percent(run.last("mask/AP")),
            interval(run.analysis.intervals.ap) if run.analysis else "-",
            (gain, "-" if math.isnan(gain) else f"{100 * gain:+.1f}"), interval(ends),
            blocks.number(run.speed), blocks.number(run.memory, 2),
        ])  # fmt: skip
    return blocks.sortable_table("runs", columns, rows, "AP in percent")


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    wanted = (
        ("loss", "train", "loss", 1.0, "total loss"),
        ("box-ap", "evaluations", "box/AP", 100.0, "box AP, percent"),
        ("mask-ap", "evaluations", "mask/AP", 100.0, "mask AP, percent"),
        ("speed", "train", "images_per_s", 1.0, "images per second"),
    )
    figures = []
    for id, log, key, factor, caption in wanted:
        series = []
        for run, name in zip(runs, names, strict=True):
            entries = [entry for entry in getattr(run, log) if entry.get(key) is not None]
            # images, not updates: runs with other batch sizes have seen as many after other numbers of updates
            seen = [entry["update"] * run.cfg.train.global_batch for entry in entries]
            series.append(Series(name, seen, [factor * entry[key] for entry in entries]))
        figures.append(
            charts.lines(f"chart-{id}", series, caption, x_label="images seen", y_label=caption, x_range=(0, None))
        )
    return figures


def _classes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    known = [(run.analysis, name) for run, name in zip(runs, names, strict=True) if run.analysis is not None]
    if not known:
        return blocks.section("classes", "Classes", blocks.notice("plain", "No run has detections that could be read."))
    columns = ["class", *(f"{name}: {value}" for _, name in known for value in ("AP", "95 %"))]
    blank: list[blocks.Cell] = [blocks.percent(None), "-"] * len(known)
    rows: dict[str, list[blocks.Cell]] = {}
    for place, (found, _) in enumerate(known):
        for row, ends in zip(found.metrics.per_class, found.intervals.class_ap, strict=True):
            cells = rows.setdefault(row["name"], [row["name"], *blank])
            cells[1 + 2 * place : 3 + 2 * place] = [blocks.percent(row["AP"]), interval(ends)]
    table = blocks.sortable_table("table-classes", columns, list(rows.values()), "AP of each class, percent")
    return blocks.section("classes", "Classes", table)


def _configs(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    configs = [flat(run.cfg) for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key != "out"):
        values = [str(config.get(key, UNSET)) for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    equal = blocks.paragraph("Their configs are equal.")
    block = blocks.sortable_table("differences", ("option", *names), rows) if rows else equal
    return blocks.section("setup", "Configs", block, lead="Options in which the runs differ.")
