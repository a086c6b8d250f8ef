"""Draw the curve of a norm study as a PNG: AP or error against images per GPU, or against the number of groups."""

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gndet.files import written_whole
from gndet.toolbox.analysis.study_results import METRICS, Mean, Study, metrics_of, percent_mean, variant_title

STYLES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X")  # for readers who do not see colors


def draw_curve(study: Study, path: Path) -> None:
    """Draw AP or error against images per GPU, or against the number of groups, with 95 % intervals; write a PNG."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with $ is no formula
        figure = _figure(study)
        with written_whole(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Source": "gndet"})


def _figure(study: Study) -> Figure:
    metrics = metrics_of(study)
    figure = Figure(figsize=(6 * len(metrics), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        (_draw_groups if study.by_groups else _draw_sizes)(axes, study, metric)
        axes.set_ylabel(f"{METRICS[metric]}, %")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2), min(high, 102))  # the interval of few seeds may reach beyond 0 or 100 %
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _draw_sizes(axes: Axes, study: Study, metric: str) -> None:
    for i, variant in enumerate(study.variants):
        means = [percent_mean(study, variant, size, metric) for size in study.sizes]
        shift = 2 ** (0.05 * (i - (len(study.variants) - 1) / 2))  # so that intervals do not overlap
        _line(axes, i, [size * shift for size in study.sizes], means, variant_title(variant))
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.sizes, [str(size) for size in study.sizes])
    axes.set_xlabel("images per GPU")


def _draw_groups(axes: Axes, study: Study, metric: str) -> None:
    for i, size in enumerate(study.sizes):
        means = [percent_mean(study, variant, size, metric) for variant in study.variants]
        _line(axes, i, list(range(len(means))), means, f"{size} image{'s' if size > 1 else ''} per GPU")
    axes.set_xticks(range(len(study.variants)), [v.removeprefix("groups-") for v in study.variants])
    axes.set_xlabel("groups (1: ln, channels: in)")


def _line(axes: Axes, i: int, x: list[float], means: list[Mean], label: str) -> None:
    halves = [0.0 if math.isnan(mean.half) else mean.half for mean in means]
    axes.errorbar(x, [mean.mean for mean in means], yerr=halves, label=f" {label}", capsize=3, linewidth=1.5,
                  linestyle=STYLES[i % len(STYLES)], marker=MARKERS[i % len(MARKERS)])  # fmt: skip
