"""The report's section on a norm study."""

import shlex

import numpy as np

from gndet.toolbox.analysis.study_results import (
    GROUPS,
    METRICS,
    Study,
    cell_words,
    images_per_gpu,
    metrics_of,
    percent_mean,
    study_verdict,
    variant_title,
)
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Section


def section(study: Study) -> Section:
    """Return the section with the verdict, the curves and the tables of a study."""
    parts = [blocks.notice("plain", line) for line in study_verdict(study)]
    parts += [blocks.paragraph(f"Rule: {study.rule}."), blocks.paragraph(_schedule(study))]
    parts += [blocks.notice("warn", note) for note in study.notes]
    parts.append(blocks.beside(*(_chart(study, metric) for metric in metrics_of(study))))
    parts += [_table(study, metric) for metric in metrics_of(study)]
    return blocks.section("study", "Norm study", *parts, lead=f"{study.config}, {study.date}")


def study_command(study: Study) -> str:
    """Return the command that repeats the study."""
    variants = [variant.removeprefix(GROUPS) for variant in study.variants]
    sizes, seeds = ",".join(map(str, study.sizes)), len({result.seed for result in study.results})
    words = ["gndet", "norm-study", study.config, "--groups" if study.by_groups else "--norms", ",".join(variants)]
    words += ["--images-per-gpu", sizes, "--seeds", str(seeds), "--batch", study.batch]
    words += ["--budget", f"{study.budget:.0f}s"] if study.budget else []
    return shlex.join([*words, *study.overrides])


def _schedule(study: Study) -> str:
    images = study.updates * study.reference_batch
    text = f"Each cell: {images:,} images, a schedule of {study.updates:,} updates of {study.reference_batch}"
    if study.factor < 1:
        text += f", shortened by a factor of {study.factor:.3f} to fit the budget"
    return f"{text}. Made with {', '.join(f'{name} {version}' for name, version in study.versions.items())}."


def _chart(study: Study, metric: str) -> str:
    """Draw AP against images per GPU with one line per norm; for a single size, draw bars."""
    caption = f"{METRICS[metric]} in percent, mean over seeds with its 95 % interval (Student's t)"
    name, label = f"study-{metric.replace('/', '-')}", f"{METRICS[metric]}, %"
    series = []
    for variant in study.variants:
        means = [percent_mean(study, variant, size, metric) for size in study.sizes]
        center, half = np.array([mean.mean for mean in means]), np.array([mean.half for mean in means])
        band = (center - half, center + half) if np.isfinite(half).any() else (center, center)
        series.append(charts.Series(variant_title(variant), study.sizes, center, *band))
    if len(study.sizes) > 1:
        return charts.lines(name, series, caption, x_label="images per GPU", y_label=label, doubling=study.sizes)
    values, low, high = ([float(getattr(line, key)[0]) for line in series] for key in ("y", "low", "high"))
    return charts.bars(name, [line.name for line in series], values, caption, x_label=label, low=low, high=high)


def _table(study: Study, metric: str) -> str:
    rows: list[list[blocks.Cell]] = []
    for variant in study.variants:
        means = [percent_mean(study, variant, size, metric).mean for size in study.sizes]
        words = [cell_words(study, variant, size, metric) for size in study.sizes]
        rows.append([variant_title(variant), *zip(means, words, strict=True)])
    head = ["groups" if study.by_groups else "norm", *map(images_per_gpu, study.sizes)]
    caption = f"{METRICS[metric]}: mean ± half of the 95 % interval (number of seeds)"
    return blocks.sortable_table(f"study-table-{metric.replace('/', '-')}", head, rows, caption)


def cells_section(study: Study) -> Section:
    """Return the section with all cells, their states, the reasons for failures, and the command."""
    shown = metrics_of(study)
    rows = []
    for r in study.results:
        scores = [blocks.percent(r.metrics.get(metric)) for metric in shown]
        images, seed, seconds = (blocks.number(value, ".0f") for value in (r.images, r.seed, r.seconds))
        rows.append([variant_title(r.variant), images, seed, r.state, *scores, seconds, r.reason])
    head = ["norm", "images", "seed", "state", *(METRICS[metric] for metric in shown), "seconds", "reason"]
    table = blocks.sortable_table("study-cells", head, rows, "All cells")
    return blocks.section("cells", "Cells", table, blocks.preformatted(study_command(study)))


SECTIONS = {"study": ("Norm study", section), "cells": ("Cells", cells_section)}
