"""Compare several runs: curves, AP with intervals of the differences, and options that differ."""

from collections.abc import Iterator, Mapping

import numpy as np

from gndet.toolbox.analysis.bootstrap import Interval, paired_interval
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.charts import Series
from gndet.toolbox.report.overview import interval
from gndet.toolbox.report.record import RunRecord
from gndet.training.run_folder import UNSET, flat

Gain = tuple[float, Interval] | str  # AP gained over the first run and its interval, or why there is no comparison


def _summary(runs: Mapping[str, RunRecord]) -> Section:
    """Return the section that compares each of two or more named runs with the first."""
    first = next(iter(runs))
    gains = {name: ap_gain(runs[first], run) for name, run in runs.items() if name != first}
    words = [blocks.notice(kind, line) for kind, line in comparison_verdict(runs, gains)]
    notes = [
        blocks.notice("plain", f"Missing here: {name}: {line}") for name, run in runs.items() for line in run.missing
    ]
    return blocks.section(
        "summary", "Comparison", *words, _scores(runs, gains), *notes,
        lead=f"Differences are relative to {first}; their 95 % intervals use the same draws of the same images.",
    )  # fmt: skip


def ap_gain(first: RunRecord, second: RunRecord) -> Gain:
    """Return AP(second) - AP(first) with its interval, or why the runs cannot be compared image by image."""
    a, b = first.analysis, second.analysis
    if a is None or b is None:
        return "one of them has no readable detections"
    if a.matches.classes != b.matches.classes or not np.array_equal(a.matches.image_ids, b.matches.image_ids):
        return "they were evaluated on different images or classes"
    if a.kind != b.kind:
        return f"one is evaluated by {a.kind}, the other by {b.kind}"
    return b.metrics.summary["AP"] - a.metrics.summary["AP"], paired_interval(a.matches, b.matches)


def comparison_verdict(runs: Mapping[str, RunRecord], gains: Mapping[str, Gain]) -> Iterator[tuple[str, str]]:
    """Yield sentences, each with its sign, on which run is better as far as these images can tell."""
    first = next(iter(runs))
    if all(run.cfg.task == "classification" for run in runs.values()):
        yield "plain", "These are classifiers: the curves compare their errors."
        return
    for name, compared in gains.items():
        if isinstance(compared, str):
            yield "warn", f"{name} and {first} cannot be compared image by image: {compared}."
            continue
        gain, ends = compared
        analysis = runs[name].analysis
        assert analysis is not None
        change = f"{100 * gain:+.1f} points of {analysis.kind} AP ({interval(ends)})"
        if ends.low > 0 or ends.high < 0:
            better, worse = (name, first) if gain > 0 else (first, name)
            yield "good", f"{better} is better than {worse}: {name} {change}; the interval excludes 0."
        else:
            yield "plain", f"{name} and {first} do not differ by more than these images can tell: {change}."
    yield "plain", "Intervals are over images; another seed may also change AP, which single runs cannot show."


def _scores(runs: Mapping[str, RunRecord], gains: Mapping[str, Gain]) -> str:
    columns = ("run", "state", "updates", "box AP", "mask AP", "AP, 95 %", "difference", "difference, 95 %",
               "images/s", "GiB")  # fmt: skip
    rows: list[list[blocks.Cell]] = []
    for name, run in runs.items():
        gain = gains.get(name, "")  # "" for the first run
        points, ends = (None, "-") if isinstance(gain, str) else (100 * gain[0], interval(gain[1]))
        rows.append([
            name, run.ending[0], blocks.number(run.done, ","), blocks.percent(run.last("box/AP")),
            blocks.percent(run.last("mask/AP")), interval(run.analysis.intervals.ap) if run.analysis else "-",
            blocks.number(points, "+.1f"), ends, blocks.number(run.speed), blocks.number(run.memory, ".2g"),
        ])  # fmt: skip
    return blocks.sortable_table("runs", columns, rows, "AP in percent")


def _curves(runs: Mapping[str, RunRecord]) -> Section:
    wanted = (
        ("loss", "train", "loss", 1.0, "total loss"),
        ("box-ap", "evaluations", "box/AP", 100.0, "box AP, percent"),
        ("mask-ap", "evaluations", "mask/AP", 100.0, "mask AP, percent"),
        ("error", "evaluations", "error", 100.0, "top-1 error, percent"),
        ("speed", "train", "images_per_s", 1.0, "images per second"),
    )
    figures = []
    for id, log, key, factor, caption in wanted:
        if key == "error" and all(run.cfg.task == "detection" for run in runs.values()):
            continue
        series = []
        for name, run in runs.items():
            entries = [entry for entry in getattr(run, log) if entry.get(key) is not None]
            # by images instead of updates, because the runs may have different batch sizes
            seen = [entry["update"] * run.cfg.train.global_batch for entry in entries]
            series.append(Series(name, seen, [factor * entry[key] for entry in entries]))
        figures.append(
            charts.lines(f"chart-{id}", series, caption, x_label="images seen", y_label=caption, x_range=(0, None))
        )
    return blocks.section("training", "Training", blocks.beside(*figures))


def _classes(runs: Mapping[str, RunRecord]) -> Section:
    known = {name: run.analysis for name, run in runs.items() if run.analysis is not None}
    if not known:
        return blocks.section("classes", "Classes", blocks.notice("plain", "No run has readable detections."))
    columns = ["class", *(f"{name}: {value}" for name in known for value in ("AP", "95 %"))]
    blank: list[blocks.Cell] = [blocks.percent(None), "-"] * len(known)
    rows: dict[str, list[blocks.Cell]] = {}
    for index, found in enumerate(known.values()):
        for row, ends in zip(found.metrics.per_class, found.intervals.class_ap, strict=True):
            cells = rows.setdefault(row["name"], [row["name"], *blank])
            cells[1 + 2 * index : 3 + 2 * index] = [blocks.percent(row["AP"]), interval(ends)]
    table = blocks.sortable_table("table-classes", columns, list(rows.values()), "AP of each class, percent")
    return blocks.section("classes", "Classes", table)


def _configs(runs: Mapping[str, RunRecord]) -> Section:
    configs = [flat(run.cfg) for run in runs.values()]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key != "out"):
        values = [str(config.get(key, UNSET)) for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    table = blocks.sortable_table("differences", ("option", *runs), rows, "options in which the runs differ")
    return blocks.section("setup", "Configs", table if rows else blocks.paragraph("Their configs are equal."))


SECTIONS = {
    "summary": ("Comparison", _summary), "training": ("Training", _curves), "classes": ("Classes", _classes),
    "setup": ("Configs", _configs),
}  # fmt: skip
