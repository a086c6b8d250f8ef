"""Draw box_head_norm.png and gn_and_bn.png from the tables of docs/results.md: python docs/make_norm_figure.py"""

import re
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
BOX_HEAD, SETS = "norm of the two convolutions of the box head", "data, images per update, norm"  # first cells


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of each row of the table whose header starts with a cell."""
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def main() -> None:
    """Write the figures."""
    text = (FOLDER / "results.md").read_text(encoding="utf-8")
    draw_box_head(text)
    draw_sets(text)


def draw_box_head(text: str) -> None:
    """Draw the APs of each norm of the box head, one per seed."""
    table = {}
    for name, *cells in rows(text, BOX_HEAD):
        found = [float(match[1]) for cell in cells[:3] if (match := re.match(r"([\d.]+) / [\d.]+$", cell))]
        table[re.sub(r": .*| \(\d\)$", "", name)] = found
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(table)[::-1]
    for y, name in enumerate(names):
        axes.plot(table[name], [y] * len(table[name]), "o", color="tab:blue", alpha=0.7)
        axes.plot(sum(table[name]) / len(table[name]), y, "|", color="black", markersize=14)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("box AP on drawn shapes, 32 regions per image; a dot per seed, a line at their mean")
    figure.savefig(FOLDER / "box_head_norm.png", dpi=120)


def draw_sets(text: str) -> None:
    """Draw the mean AP of GN and BN on three sets, with its interval."""
    table = [(*name.split(", "), cells[4].split(" / ")[0]) for name, *cells in rows(text, SETS)]
    sets = list(dict.fromkeys(row[0] for row in table))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(sets)), sets, strict=True):
        for norm, color, shift in (("GN", "tab:blue", -0.08), ("BN", "tab:orange", 0.08)):
            found = [(int(images), *map(float, mean.split(" ± "))) for name, images, n, mean in table
                     if (name, n) == (title, norm)]  # fmt: skip
            places, means, halves = zip(*found, strict=True)
            axes.errorbar([x + shift for x in places], means, halves, fmt="o", color=color, capsize=4, label=norm)
        axes.set_xticks([1, 2], ["1 image", "2 images"])
        axes.set_xlim(0.5, 2.5)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("box AP")
    figure.savefig(FOLDER / "gn_and_bn.png", dpi=120)


if __name__ == "__main__":
    main()
