"""The report's section on norm layers: what is unusual, charts by layer and over training, and a table."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gndet.errors import DataError
from gndet.modeling.detection_model import PROBED_REGIONS
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.norm_words import BATCH_KINDS, Layer, norm_findings
from gndet.training.norms import read_norms
from gndet.training.run_folder import NORMS

TITLE = "Normalization"
UNKNOWN = None, None  # for a layer without such a pair of numbers


def section(folder: Path) -> Section:
    """Return the section of a run folder, or one that says that norms.jsonl is missing or broken."""
    left_out: list[str] = []
    try:
        entries = [entry for entry in read_norms(folder, left_out.append) if entry["layers"]]
    except DataError as error:
        return blocks.section("norms", TITLE, blocks.notice("bad", str(error)))
    told = [blocks.notice("warn", words) for words in left_out]
    if not entries:
        words = f"No measurement in {NORMS}: train.norm_images is 0, or the model has no norm layers."
        return blocks.section("norms", TITLE, *told, blocks.notice("plain", words))
    last = entries[-1]
    layers = last["layers"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(layer["kind"] for layer in layers).items())
    masked = sum(layer["masked"] for layer in layers)
    padding = last.get("padding")
    share = "" if padding is None else f" Padding made up {100 * padding:.3g} % of the last training batches."
    lead = (
        f"{len(layers)} norm layers ({kinds}), {masked} masked and {len(layers) - masked} plain, measured "
        f"{len(entries)} times on the first validation images.{share}"
    )
    return blocks.section(
        "norms", TITLE, *told, *(blocks.notice(kind, f"{_capital(words)}.") for kind, words in norm_findings(last)),
        blocks.heading(f"Layer by layer, after update {last['update']}"), blocks.beside(*_by_layer(layers)),
        *([blocks.heading("Over training"), _over_training(entries)] if len(entries) > 1 else []),
        _table(layers), lead=lead,
    )  # fmt: skip


def _capital(words: str) -> str:
    return words if "." in words.split(" ")[0] else words[:1].upper() + words[1:]


def part(name: str) -> str:
    """Return the part of the network that a layer belongs to: stem, res2 to res5, fpn, rpn, box_head, mask_head."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "backbone" else first


def _values(layers: Sequence[Layer], key: str, index: int | None = None) -> np.ndarray:
    """Return a number of each layer, or the number at `index` of a list of numbers; nan if unknown."""
    values = [layer.get(key) for layer in layers]
    return np.array([value if index is None or value is None else value[index] for value in values], np.float64)


def _by_layer(layers: Sequence[Layer]) -> list[str]:
    x = list(range(1, len(layers) + 1))
    groups = "groups" if any(layer["groups"] for layer in layers) else "channels"
    middle, low, high = (_values(layers, "std", index) for index in (2, 0, 4))
    std = charts.Series("median", x, middle, low, high)
    middle, low, high = (_values(layers, "gamma", index) for index in (1, 0, 2))
    gamma = charts.Series("gamma", x, middle, low, high)
    return [
        charts.lines(
            "norm-std", [std],
            f"Standard deviations of {groups} before normalization: median and the 5 to 95 % range over {groups} and "
            f"images. {_part_ranges(layers)}",
            x_label="layer", y_label=f"standard deviation of {groups}", log_y=True,
        ),
        charts.lines("norm-gamma", [gamma], "Gamma: median over channels; the band spans smallest to largest.",
                     x_label="layer", y_label="gamma"),
        _shares(layers, x, groups), _similar(layers, x), _gap(layers, x),
    ]  # fmt: skip


def _part_ranges(layers: Sequence[Layer]) -> str:
    """Say which layers belong to which part, e.g. "Layers: 1 stem, 2-11 res2."."""
    runs, first = [], 1
    for name, members in groupby(layers, key=lambda layer: part(layer["name"])):
        last = first + len(list(members)) - 1
        runs.append(f"{first}-{last} {name}" if last > first else f"{first} {name}")
        first = last + 1
    return f"Layers: {', '.join(runs)}."


def _shares(layers: Sequence[Layer], x: list[int], groups: str) -> str:
    """Draw the shares that should be zero; return a sentence if all of them are."""
    series = [
        charts.Series(name, x, 100 * _values(layers, key))
        for name, key in (
            (f"{groups} below eps", "eps_dominated"), ("dead gamma", "dead"), ("exploding gamma", "exploding"),
            ("one-cell maps", "one_cell"), ("not finite", "nonfinite"),
        )
    ]  # fmt: skip
    shown = [line for line in series if np.nansum(line.y) > 0]
    if not shown:
        return blocks.paragraph(
            f"No {groups} below eps, no dead or exploding gamma, no one-cell maps; everything is finite."
        )
    caption = "Shares that should be zero but are not."
    return charts.lines("norm-shares", shown, caption, x_label="layer", y_label="share, %", y_range=(-2, 102))


def _similar(layers: Sequence[Layer], x: list[int]) -> str:
    series = [
        charts.Series(name, x, _values(layers, "similar", index))
        for index, name in enumerate(("in one group", "in two groups"))
    ]
    caption = "Similarity of channels: mean |correlation| of two channels over positions; 1 means they are copies."
    if all(np.isfinite(line.y).any() for line in series):
        caption += " Groups make sense if channels of one group are more alike than channels of two."
    return charts.lines("norm-similar", series, caption, x_label="layer", y_label="mean |correlation|", y_range=(0, 1))


def _gap(layers: Sequence[Layer], x: list[int]) -> str:
    """Draw how far running or stored statistics differ from those of batches; return "" if there are none."""
    series = [
        charts.Series("mean", x, _values(layers, "gap_mean", 0)),
        charts.Series("std", x, _values(layers, "gap_std", 0)),
        charts.Series("mean, moving", x, _values(layers, "spread_mean")),
        charts.Series("std, moving", x, _values(layers, "spread_std")),
    ]
    live = any(layer["kind"] in BATCH_KINDS for layer in layers)
    caption = (
        f"Batch statistics compared with the {'running' if live else 'stored'} ones that evaluation uses: means in "
        "stored standard deviations, standard deviations as |log ratio|, median over channels. Moving: the change from "
        f"one batch to the next. BN assumes 0. Here layers on regions get the {PROBED_REGIONS} best proposals per "
        "image; in training they also get others."
    )
    return charts.lines("norm-gap", series, caption, x_label="layer", y_label="distance")


def _over_training(entries: Sequence[dict[str, Any]]) -> str:
    padding = np.array([entry.get("padding") for entry in entries], np.float64)
    padded = charts.Series("padding", [entry["update"] for entry in entries], 100 * padding)
    return blocks.beside(
        charts.lines(
            "norm-drift", _by_part(entries, "drift", 0),
            "How far gamma has moved since the start, relative to its initial length; median over a part's layers.",
            x_label="update", y_label="drift of gamma",
        ),
        charts.lines(
            "norm-std-time", _by_part(entries, "std", 2),
            "Median standard deviation before normalization; median over a part's layers.",
            x_label="update", y_label="standard deviation", log_y=True,
        ),
        charts.lines(
            "norm-gap-time", _by_part(entries, "gap_mean", 0),
            "Batch means compared with the running or stored means, in stored standard deviations.",
            x_label="update", y_label="distance of means",
        ),
        charts.lines(
            "norm-padding", [padded] if np.nansum(padding) > 0 else [],
            "Share of padding in the training batches.",
            x_label="update", y_label="padding, %", x_range=(0, None), y_range=(0, None),
        ),
    )  # fmt: skip


def _by_part(entries: Sequence[dict[str, Any]], key: str, index: int) -> list[charts.Series]:
    """Return a line for each part of the network: the median of a number over the part's layers."""
    lines: dict[str, list[float]] = {}
    for entry in entries:
        values = _values(entry["layers"], key, index)
        parts = np.array([part(layer["name"]) for layer in entry["layers"]])
        for name in dict.fromkeys(parts.tolist()):
            known = values[(parts == name) & ~np.isnan(values)]
            lines.setdefault(name, []).append(float(np.median(known)) if known.size else math.nan)
    updates = [entry["update"] for entry in entries]
    return [charts.Series(name, updates, line) for name, line in lines.items()]


def _table(layers: Sequence[Layer]) -> str:
    gaps = any(layer.get("gap_mean") for layer in layers)
    columns = [
        "#", "layer", "kind", "padding", "channels", "groups", "numbers per group", "std", "below eps %", "gamma min",
        "median", "max", "dead %", "exploding %", "drift gamma", "drift beta", "similar in a group", "in two",
        *(["gap of means", "of std", "from batch to batch"] if gaps else []),
    ]  # fmt: skip
    rows: list[list[blocks.Cell]] = []
    for number, layer in enumerate(layers, start=1):
        row = [
            blocks.number(number), layer["name"], layer["kind"], "masked" if layer["masked"] else "plain",
            blocks.number(layer["channels"], ","), blocks.number(layer["groups"], ".5g"),
            blocks.number(layer["elements"], ".8g"), blocks.number(layer["std"] and layer["std"][2]),
            blocks.percent(layer["eps_dominated"]), *map(blocks.number, layer["gamma"]), blocks.percent(layer["dead"]),
            blocks.percent(layer["exploding"]), *map(blocks.number, layer["drift"] or UNKNOWN),
            *(blocks.number(value, ".2g") for value in layer["similar"]),
        ]  # fmt: skip
        if gaps:
            mean, std = (layer.get(key) or UNKNOWN for key in ("gap_mean", "gap_std"))
            row += map(blocks.number, (mean[0], std[0], layer.get("spread_mean")))
        rows.append(row)
    caption = "Norm layers by depth. std: median over groups and images; numbers per group: the fewest."
    return blocks.sortable_table("norm-layers", columns, rows, caption)
