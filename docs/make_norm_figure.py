"""Draw box_head_norm.png and gn_and_bn.png from the tables of docs/results.md: python docs/make_norm_figure.py"""

import re
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
TABLES = {  # first cell of a table's header: the figure's title
    "norm of the two convolutions of the box head": "32 regions per image",
    "quickstart, box / mask AP": "64 regions per image",
}


def rows(text: str, header: str) -> dict[str, list[float]]:
    """Return the box APs of each row of the table whose header starts with a cell, one per seed that was run."""
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    result = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = [float(match[1]) for cell in cells[:3] if (match := re.match(r"([\d.]+) / [\d.]+$", cell))]
        result[re.sub(r"`|: `.*| \(\d\)$", "", name)] = found
    return result


def main() -> None:
    """Write the figures."""
    text = (FOLDER / "results.md").read_text(encoding="utf-8")
    draw_box_head(text)
    draw_sets(text)


def draw_box_head(text: str) -> None:
    """Draw the APs of each norm of the box head."""
    tables = {title: rows(text, header) for header, title in TABLES.items()}
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    heights = [len(table) for table in tables.values()]
    for axes, (title, table) in zip(
        figure.subplots(len(tables), 1, sharex=True, height_ratios=heights), tables.items(), strict=True
    ):
        names = list(table)[::-1]
        for y, name in enumerate(names):
            axes.plot(table[name], [y] * len(table[name]), "o", color="tab:blue", alpha=0.7)
            axes.plot(sum(table[name]) / len(table[name]), y, "|", color="black", markersize=14)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[-1].set_xlabel("box AP on drawn shapes; a dot per seed, a line at their mean")
    figure.savefig(FOLDER / "box_head_norm.png", dpi=120)


def draw_sets(text: str) -> None:
    """Draw the AP of GN and BN on three sets, with its interval where three seeds were run."""
    lines = text[text.index("| data | images per update | GN |") :].split("\n\n")[0].splitlines()[2:]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = list(dict.fromkeys(row[0] for row in table))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for column, norm, color in ((2, "GN", "tab:blue"), (3, "BN", "tab:orange")):
            for x, row in enumerate(row for row in table if row[0] == name):
                mean, _, spread = row[column].partition(" ± ")
                label = norm if x == 0 else None
                place, half = x + (0.08 if norm == "BN" else -0.08), float(spread) if spread else None
                axes.errorbar(place, float(mean), half, fmt="o", color=color, capsize=4, label=label)
        axes.set_xticks([0, 1], ["1 image", "2 images"])
        axes.set_xlim(-0.5, 1.5)
        axes.set_title(name, fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("box AP")
    figure.savefig(FOLDER / "gn_and_bn.png", dpi=120)


if __name__ == "__main__":
    main()
