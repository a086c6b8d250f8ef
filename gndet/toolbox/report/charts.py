"""Charts of a report: SVG whose colours the page sets, so that they follow light, dark and print.

matplotlib draws in stand-in colours, which then become CSS variables: --ink, --grid, and --s0 to --s7 of the series.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, GRID, PAPER = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x18))
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(SERIES)
}
STYLES = ("-", "--", "-.", ":")  # a second round of the colours has another line: told apart in grey too
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FLAT = 56  # characters that fit beside each other
NAMES_A_ROW = 4  # of a legend
WIDTH = 6.4  # inches of 72 units; the page scales it
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Series(NamedTuple):
    """A line: x and y (n,), nan where there is nothing; low and high (n,) a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@contextmanager
def chart(
    name: str, height: float = 3.4, left: float = 0.78, bottom: float = 0.52, top: float = 0.12
) -> Iterator[tuple[Axes, list[str]]]:
    """The axes of a figure, and a list that holds the finished SVG after the context.

    name: unique on the page; the SVG's ids are made of it, so that the same data gives the same text.  height, and the
    margins left, bottom and top, are inches: given, since finding them takes matplotlib as long as drawing.
    """
    svg: list[str] = []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(left / WIDTH, bottom / height, 1 - 0.1 / WIDTH, 1 - top / height)
        yield figure.add_subplot(), svg
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg.append(_for_page(file.getvalue(), name))


def _for_page(text: str, name: str) -> str:
    """An <svg> for an HTML page: no XML head, no size of its own, the page's colours, ids of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)  # a style would be the whole page's
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'id="([\w.]+)"', lambda m: f'id="{name}-{m[1]}"', text)
    text = re.sub(r'(xlink:href="#|url\(#)([\w.]+)', lambda m: f"{m[1]}{name}-{m[2]}", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r" font-family: [^;\"]*sans-serif;", "", text)
    return text.replace("<svg", '<svg role="img"', 1)


def lines(
    name: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    x_range: tuple[float, float | None] | None = None,
    y_range: tuple[float, float | None] | None = None,
    marks: bool | None = None,
) -> str:
    """Draw lines with their bands.  marks: a sign at each point; by default where a line has 12 or fewer."""
    rows = -(-len(series) // NAMES_A_ROW) if len(series) > 1 else 0
    with chart(name, height=3.1 + 0.22 * rows, top=0.12 + 0.22 * rows) as (axes, svg):
        for number, one in enumerate(series):
            colour, style = SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)]
            few = len(one.x) <= 12 if marks is None else marks
            marker = MARKERS[number % len(MARKERS)] if few else None
            axes.plot(one.x, one.y, style, color=colour, label=one.name, linewidth=1.8, marker=marker, markersize=5)
            if one.low is not None and one.high is not None:
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.16, linewidth=0)
        _dress(axes, x_label, y_label)
        if log_x:
            axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        if x_range is not None:
            axes.set_xlim(*x_range)
        if y_range is not None:
            axes.set_ylim(*y_range)
        if rows:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.08, 1),
                ncols=NAMES_A_ROW,
                frameon=False,
                fontsize=10,
                borderpad=0.1,
            )
    return svg[0]


def bars(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    *,
    x_label: str,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> str:
    """Draw horizontal bars, the first on top; low and high: ends of their intervals."""
    with chart(name, height=0.7 + 0.3 * len(labels), left=_room(labels)) as (axes, svg):
        places = np.arange(len(labels))
        axes.barh(places, values, color=SERIES[0], height=0.7)
        if low is not None and high is not None:
            axes.hlines(places, low, high, color=INK, linewidth=1.4)
        axes.set_yticks(places, [_short(label) for label in labels])
        axes.invert_yaxis()
        _dress(axes, x_label, "")
        axes.grid(axis="y", visible=False)
    return svg[0]


def histogram(name: str, values: Sequence[float], *, x_label: str, y_label: str, log_x: bool = False) -> str:
    """Draw how often values occur, in 30 bins."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & ((numbers > 0) | (not log_x))]
    with chart(name, height=2.6) as (axes, svg):
        if len(numbers):
            axes.hist(numbers, bins=_edges(numbers, log_x), color=SERIES[0])
        _dress(axes, x_label, y_label)
        if log_x:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=5))
    return svg[0]


def _edges(numbers: np.ndarray, log_x: bool) -> np.ndarray:
    """Edges of the bins: one for each whole number where there are few, else 30, equal as they are drawn."""
    low, high = numbers.min(), numbers.max()
    if not log_x and high - low < 40 and (numbers == numbers.round()).all():
        return np.arange(low, high + 2) - 0.5
    high = high if low < high else low + 1
    return np.geomspace(low, high, 31) if log_x else np.linspace(low, high, 31)


def heat(
    name: str, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, x_label: str, y_label: str
) -> str:
    """Draw a matrix (r, c) of counts, each cell as deep as its share of its row; with numbers where there is room."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    small = len(columns) <= 12
    flat = small and len(columns) * max(map(len, columns)) <= FLAT
    below = 0.55 if flat else 0.3 + _room(columns)
    with chart(name, height=below + 0.2 + 0.34 * len(rows), left=0.25 + _room(rows), bottom=below) as (axes, svg):
        for r, c in zip(*np.nonzero(matrix), strict=True):
            depth = 0.08 + 0.72 * share[r, c]
            axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=SERIES[0], alpha=depth))
            if small:
                axes.text(c, r, f"{matrix[r, c]:g}", ha="center", va="center", fontsize=9)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(
            range(len(columns)), [_short(label) for label in columns], rotation=0 if flat else 60,
            ha="center" if flat else "right",
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_short(label) for label in rows])
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return svg[0]


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _plain_ticks(axis: Axis) -> None:
    """Numbers as they are written, 0.5 1 2, at an axis that grows by factors."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _room(labels: Sequence[str]) -> float:
    """Inches that the longest label takes, and a little."""
    return 0.25 + 0.085 * max((len(_short(label)) for label in labels), default=0)


def _short(label: str) -> str:
    return label if len(label) <= 22 else f"{label[:20]}…"
