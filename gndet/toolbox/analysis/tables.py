"""The analysis as tables, which the terminal, the CSV files, the JSON file and the report share."""

import math
import re
from typing import Any, NamedTuple

from gndet.data.records import Dataset
from gndet.files import Kind
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.errors import KINDS

ALL = "all classes"
COLUMNS = {
    "classes": ("class", "images", "objects", "AP", "AP low", "AP high", "AP50", "AR"),
    "errors": ("kind", "what", "count", "AP50 gained"),
    "thresholds": ("class", "threshold", "precision", "recall", "F1"),
    "images": ("image", "id", "found", "false", "missed", "F1"),
    "suspects": ("image", "image id", "kind", "annotation", "annotated", "found", "score"),
}  # of the tables with fixed columns
HEADS = {name: rb"\A" + re.escape(",".join(columns).encode()) + rb"\n" for name, columns in COLUMNS.items()}
FILES = {
    f"{name}.csv": Kind(f"the table {name} of gndet analyze", head)
    for name, head in (HEADS | {"confusion": rb"\Aannotated,.*\nnothing,"}).items()
}  # the CSV files; a mark of their own would disturb what reads them


class Table(NamedTuple):
    """Rows of text, integers, and fractions such as AP in [0, 1]; None if undefined."""

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
    return _table("classes", f"{found.kind} AP per class, with 95 % intervals over images", rows)


def threshold_table(found: Analysis) -> Table:
    """Return the score threshold with the highest F1 for each class."""
    rows = [(name, *map(known, best)) for name, best in zip((*found.matches.classes, ALL), found.best, strict=True)]
    return _table("thresholds", "score threshold with the highest F1, at IoU 0.5", rows)


def error_table(found: Analysis) -> Table:
    """Return how much AP50 fixing each kind of mistake would gain, the most costly kind first."""
    delta, counts = found.errors.delta_ap, found.errors.counts
    rows = [(kind, words, counts[kind], known(delta[kind])) for kind, words in KINDS.items()]
    rows.sort(key=lambda row: -(row[3] or 0.0))
    return _table("errors", "kinds of mistakes at IoU 0.5, and the AP50 that fixing all of one kind would gain", rows)


def confusion_table(found: Analysis) -> Table:
    """Return the confusion matrix: objects by annotated class and by detected class."""
    names = (*found.matches.classes, "nothing")
    rows = [(name, *map(int, row)) for name, row in zip(names, found.confusion, strict=True)]
    title = f"confusion matrix: annotated class (rows), detected class (columns), scores >= {found.threshold:.2f}"
    return Table("confusion", title, ("annotated", *names), rows)


def image_table(found: Analysis, dataset: Dataset, count: int) -> Table:
    """Return the worst images with their counts."""
    rows = [
        (dataset.records[index].file_name, dataset.records[index].image_id, *map(int, found.counts[index]),
         known(found.f1[index]))
        for index in found.worst(count)
    ]  # fmt: skip
    return _table("images", f"worst images, scores >= {found.threshold:.2f}", rows)


def suspect_table(found: Analysis, dataset: Dataset, count: int | None = None) -> Table:
    """Return the annotations that may be wrong, the most suspicious first; count: how many at most."""
    rows = [
        (dataset.records[suspect.image].file_name, dataset.records[suspect.image].image_id,
         suspect.kind.replace("_", " "), suspect.annotation_id or None, suspect.annotated or "-", suspect.found,
         suspect.score)
        for suspect in found.suspects[:count]
    ]  # fmt: skip
    return _table("suspects", "annotations that may be wrong: a confident detection contradicts them", rows)


def _table(name: str, title: str, rows: list[tuple[Any, ...]]) -> Table:
    return Table(name, title, COLUMNS[name], rows)


def all_tables(found: Analysis, dataset: Dataset, images: int) -> list[Table]:
    """Return all tables in reading order."""
    return [
        class_table(found), error_table(found), threshold_table(found), confusion_table(found),
        image_table(found, dataset, images), suspect_table(found, dataset),
    ]  # fmt: skip


def known(value: float) -> float | None:
    """Return the value, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)
