"""Draw the figures of a report as SVG whose colors follow the page: light mode, dark mode and print.

matplotlib draws in placeholder colors, which are replaced by CSS variables: --ink, --grid, and --s0 to --s7 for the
series.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gndet.toolbox.report.blocks import escape, visible

INK, GRID, PAPER = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x18))
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    color: f"var(--s{number})" for number, color in enumerate(SERIES)
}
STYLES = ("-", "--", "-.", ":")  # the next style is used when the colors repeat
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FLAT = 56  # characters of column labels that fit without rotation
NAMES_PER_ROW, LETTERS_PER_ROW = 4, 84  # of a legend
MOST_LETTERS = 60  # of a name in a legend
LARGEST = 1e38  # about that of float32; matplotlib cannot scale an axis to that of float64
WIDTH = 6.4  # inches of 72 units; the page scales it
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # a name with $ is no formula
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


Values = Sequence[float] | np.ndarray


class Series(NamedTuple):
    """A line: x and y (n,), nan for a gap; low and high (n,), the edges of a band around it."""

    name: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None


@contextmanager
def chart(
    name: str, caption: str, x_label: str, y_label: str, *, height: float, left: float = 0.78, bottom: float = 0.52,
    top: float = 0.12,
) -> Iterator[tuple[Axes, list[str]]]:  # fmt: skip
    """Yield the axes of a figure, and a list that holds the figure's HTML after the context.

    name: unique on the page; all ids are derived from it, so the same data gives the same HTML.  height, and the
    margins left, bottom and top: in inches, because matplotlib's tight layout would take as long as drawing.
    """
    html: list[str] = []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")  # the page's font draws the text, not this one
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(left / WIDTH, bottom / height, 1 - 0.1 / WIDTH, 1 - top / height)
        yield figure.add_subplot(xlabel=x_label, ylabel=y_label), html
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg, words = _for_page(file.getvalue(), name), escape(caption)
    html.append(f'<figure class="chart" id="{escape(name)}">{svg}<figcaption>{words}</figcaption></figure>')


def _for_page(text: str, name: str) -> str:
    """Adapt an <svg> to an HTML page: no XML head, no fixed size, the page's colors, unique ids."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)  # a style would apply to the whole page
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<[^>]*>", lambda tag: _tag_for_page(tag[0], name), text)  # what is between the tags are names
    return text.replace("<svg", '<svg role="img"', 1)


def _tag_for_page(tag: str, name: str) -> str:
    tag = re.sub(r'id="([\w.]+)"', lambda m: f'id="{name}-{m[1]}"', tag)
    tag = re.sub(r'(xlink:href="#|url\(#)([\w.]+)', lambda m: f"{m[1]}{name}-{m[2]}", tag)
    for color, variable in VARIABLES.items():
        tag = tag.replace(color, variable)
    return re.sub(r" font-family: [^;\"]*sans-serif;", "", tag)


def _drawable(values: Values) -> np.ndarray:
    """Return values as floats; those that are missing or too large for an axis are nan."""
    numbers = np.array(values, dtype=np.float64)
    return np.where(np.abs(numbers) <= LARGEST, numbers, np.nan)


def _cleaned(line: Series) -> Series:
    low, high = (None if edge is None else _drawable(edge) for edge in (line.low, line.high))
    return Series(_label(line.name), line.x, _drawable(line.y), low, high)


def lines(
    name: str, series: Sequence[Series], caption: str, *, x_label: str, y_label: str, log_y: bool = False,
    doubling: Sequence[float] | None = None, x_range: tuple[float | None, float | None] = (None, None),
    y_range: tuple[float | None, float | None] = (None, None),
) -> str:  # fmt: skip
    """Draw lines with their bands; return "" if no value is finite.  Lines of at most 12 points get markers.

    log_y: use a logarithmic axis if all values are positive.  doubling: ticks of an x axis to base 2.
    """
    drawn = [(number, line) for number, line in enumerate(map(_cleaned, series)) if np.isfinite(line.y).any()]
    if not drawn:
        return ""
    in_row = min(max(LETTERS_PER_ROW // (6 + max(len(line.name) for _, line in drawn)), 1), NAMES_PER_ROW)
    rows = -(-len(drawn) // in_row) if len(drawn) > 1 else 0
    room = 0.22 * rows  # for the legend above the axes
    with chart(name, caption, x_label, y_label, height=3.1 + room, top=0.12 + room) as (axes, html):
        for number, line in drawn:
            color, style = SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)]
            marker = MARKERS[number % len(MARKERS)] if len(line.x) <= 12 else None
            axes.plot(line.x, line.y, style, color=color, label=line.name, linewidth=1.8, marker=marker, markersize=5)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
        values = (part for _, line in drawn for part in (line.y, line.low, line.high) if part is not None)
        if log_y and not any((np.asarray(part) <= 0).any() for part in values):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if doubling is not None:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(doubling), [f"{tick:g}" for tick in doubling])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set(xlim=x_range, ylim=y_range)
        if rows:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.08, 1), ncols=in_row, frameon=False, fontsize=10,
                        borderpad=0.1)  # fmt: skip
    return html[0]


def bars(
    name: str, labels: Sequence[str], values: Sequence[float], caption: str, *, x_label: str,
    low: Sequence[float] | None = None, high: Sequence[float] | None = None,
) -> str:  # fmt: skip
    """Draw horizontal bars, the first on top; low and high are the ends of their intervals.

    Returns "" if no value is finite.
    """
    lengths, names = _drawable(values), [_short(label) for label in labels]
    if not np.isfinite(lengths).any():
        return ""
    with chart(name, caption, x_label, "", height=0.7 + 0.3 * len(names), left=_room(names)) as (axes, html):
        places = np.arange(len(names))
        axes.barh(places, lengths, color=SERIES[0], height=0.7)
        if low is not None and high is not None:
            axes.hlines(places, _drawable(low), _drawable(high), color=INK, linewidth=1.4)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return html[0]


def histogram(name: str, values: Values, caption: str, *, x_label: str, y_label: str, log_x: bool = False) -> str:
    """Draw a histogram of the finite values (with log_x, the positive ones); return "" if there are none."""
    numbers = _drawable(values)
    numbers = numbers[np.isfinite(numbers) & ((numbers > 0) | (not log_x))]
    if not len(numbers):
        return ""
    with chart(name, caption, x_label, y_label, height=2.6) as (axes, html):
        axes.hist(numbers, bins=_edges(numbers, log_x).tolist(), color=SERIES[0])
        if log_x:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=5))
    return html[0]


def _edges(numbers: np.ndarray, log_x: bool) -> np.ndarray:
    """Return the edges of the bins: one bin per integer if the range is small, else 30 bins of equal drawn width."""
    low, high = numbers.min(), numbers.max()
    if not log_x and high - low < 40 and (numbers == numbers.round()).all():
        return np.arange(low, high + 2) - 0.5
    high = high if low < high else low + max(1.0, abs(low))
    return np.geomspace(low, high, 31) if log_x else np.linspace(low, high, 31)


def heat(name: str, matrix: np.ndarray, labels: Sequence[str], caption: str, *, x_label: str, y_label: str) -> str:
    """Draw a matrix (n, n) of counts, shaded by their share of the row, with numbers if they fit."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    n, names = len(labels), [_short(label) for label in labels]
    room, small = _room(names), n <= 12
    flat = small and n * max(map(len, names)) <= FLAT
    below = 0.55 if flat else 0.3 + room
    height = below + 0.2 + 0.34 * n
    with chart(name, caption, x_label, y_label, height=height, left=0.25 + room, bottom=below) as (axes, html):
        for r, c in zip(*np.nonzero(matrix), strict=True):
            axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=SERIES[0], alpha=0.08 + 0.72 * share[r, c]))
            if small:
                axes.text(c, r, f"{matrix[r, c]:g}", ha="center", va="center", fontsize=9)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
        axes.set_xticks(range(n), names, rotation=0 if flat else 60, ha="center" if flat else "right")
        axes.set_yticks(range(n), names)
        axes.grid(visible=False)
    return html[0]


def _plain_ticks(axis: Axis) -> None:
    """Write numbers as 0.5 1 2 on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _room(names: Sequence[str]) -> float:
    return 0.25 + 0.085 * max(map(len, names), default=0)


def _label(name: str, letters: int = MOST_LETTERS) -> str:
    """Return a name of any text on one line; matplotlib hides what is empty or begins with _ from legends."""
    words = " ".join(visible(name[: 2 * letters]).split()) or "(no name)"
    words = words if len(words) <= letters else f"{words[: letters - 2]}…"
    return f" {words}" if words.startswith("_") else words


def _short(name: str) -> str:
    return _label(name, 22)
