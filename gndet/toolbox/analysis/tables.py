"""The analysis as tables: the same for the terminal, CSV files, JSON and the report."""

import math
from typing import Any, NamedTuple

from gndet.data.records import Dataset
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.errors import KINDS

ALL = "all classes"


class Table(NamedTuple):
    """Rows of text, integers, and fractions such as AP in [0, 1] (None: undefined)."""

    name: str  # of its CSV file and JSON key
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def class_table(found: Analysis) -> Table:
    """Return AP per class with its interval, and the number of objects behind it."""
    rows = [
        (row["name"], row["num_images"], row["num_objects"], known(row["AP"]), *map(known, interval),
         known(row["AP50"]), known(row["AR"]))
        for row, interval in zip(found.metrics.per_class, found.intervals.class_ap, strict=True)
    ]  # fmt: skip
    summary, whole = found.metrics.summary, found.intervals.ap
    images = int((found.counts[:, 0] + found.counts[:, 2] > 0).sum())
    objects = sum(row["num_objects"] for row in found.metrics.per_class)
    ends = (known(summary["AP"]), *map(known, whole), known(summary["AP50"]), known(summary["AR"]))
    rows.append((ALL, images, objects, *ends))
    columns = ("class", "images", "objects", "AP", "AP low", "AP high", "AP50", "AR")
    return Table("classes", f"{found.kind} AP by class, 95 % intervals over images", columns, rows)


def threshold_table(found: Analysis) -> Table:
    """Return the score threshold with the highest F1 of each class."""
    rows = [(name, *map(known, best)) for name, best in zip((*found.matches.classes, ALL), found.best, strict=True)]
    return Table("thresholds", "score threshold with the highest F1, at IoU 0.5",
                 ("class", "threshold", "precision", "recall", "F1"), rows)  # fmt: skip


def error_table(found: Analysis) -> Table:
    """Return what fixing each kind of mistake would give, the most costly first."""
    delta, counts = found.errors.delta_ap, found.errors.counts
    rows = [(kind, words, counts[kind], known(delta[kind])) for kind, words in KINDS.items()]
    rows.sort(key=lambda row: -(row[3] or 0.0))
    return Table("errors", "kinds of mistakes at IoU 0.5, and the AP50 that fixing all of a kind would give",
                 ("kind", "what", "count", "AP50 gained"), rows)  # fmt: skip


def confusion_table(found: Analysis) -> Table:
    """Return objects by their class and by the class found there."""
    names = (*found.matches.classes, "nothing")
    rows = [(name, *map(int, row)) for name, row in zip(names, found.confusion, strict=True)]
    title = f"objects (rows) by what was found there (columns), scores from {found.threshold:.2f} on"
    return Table("confusion", title, ("annotated", *names), rows)


def image_table(found: Analysis, dataset: Dataset, count: int) -> Table:
    """Return the worst images."""
    rows = [
        (dataset.records[place].file_name, dataset.records[place].image_id, *map(int, found.counts[place]),
         known(found.f1[place]))
        for place in found.worst(count)
    ]  # fmt: skip
    return Table("images", f"worst images, scores from {found.threshold:.2f} on",
                 ("image", "id", "found", "false", "missed", "F1"), rows)  # fmt: skip


def suspect_table(found: Analysis, dataset: Dataset, count: int) -> Table:
    """Return annotations that may be wrong."""
    rows = [
        (dataset.records[suspect.image].file_name, dataset.records[suspect.image].image_id,
         suspect.kind.replace("_", " "), suspect.annotation_id or None, suspect.annotated or "-", suspect.found,
         suspect.score)
        for suspect in found.suspects[:count]
    ]  # fmt: skip
    columns = ("image", "image id", "kind", "annotation", "annotated", "found", "score")
    return Table("suspects", "annotations that may be wrong: a confident detection contradicts them", columns, rows)


def all_tables(found: Analysis, dataset: Dataset, images: int) -> list[Table]:
    """Return all tables in reading order."""
    return [
        class_table(found), error_table(found), threshold_table(found), confusion_table(found),
        image_table(found, dataset, images), suspect_table(found, dataset, images),
    ]  # fmt: skip


def known(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)
