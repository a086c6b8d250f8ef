"""The analysis as tables: the same for the terminal, CSV files, JSON and the report."""

import math
from typing import Any, NamedTuple

from gndet.data.records import Dataset
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.errors import KINDS

ALL = "all classes"


class Table(NamedTuple):
    """Rows of values: text, whole numbers, and shares and AP in [0, 1] (None: undefined)."""

    name: str  # of its CSV file and JSON key
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def class_table(found: Analysis) -> Table:
    """AP of each class with its interval, and how many objects it rests on."""
    rows = [
        (row["name"], row["num_images"], row["num_objects"], _known(row["AP"]), *map(_known, interval),
         _known(row["AP50"]), _known(row["AR"]))
        for row, interval in zip(found.metrics.per_class, found.intervals.class_ap, strict=True)
    ]  # fmt: skip
    summary, whole = found.metrics.summary, found.intervals.ap
    images = int((found.counts[:, 0] + found.counts[:, 2] > 0).sum())
    objects = sum(row["num_objects"] for row in found.metrics.per_class)
    ends = (_known(summary["AP"]), *map(_known, whole), _known(summary["AP50"]), _known(summary["AR"]))
    rows.append((ALL, images, objects, *ends))
    columns = ("class", "images", "objects", "AP", "AP low", "AP high", "AP50", "AR")
    return Table("classes", f"{found.kind} AP by class, 95 % intervals over images", columns, rows)


def threshold_table(found: Analysis) -> Table:
    """The score from which each class is best taken for real."""
    rows = [
        (name, *(map(_known, best) if best else (None,) * 4))
        for name, best in zip((*found.matches.classes, ALL), found.best, strict=True)
    ]
    return Table("thresholds", "score threshold with the highest F1, at IoU 0.5",
                 ("class", "threshold", "precision", "recall", "F1"), rows)  # fmt: skip


def error_table(found: Analysis) -> Table:
    """What mending each kind of mistake would give, the most first."""
    delta, counts = found.errors.delta_ap, found.errors.counts
    rows = [(kind, words, counts[kind], _known(delta[kind])) for kind, words in KINDS.items()]
    rows.sort(key=lambda row: -(row[3] or 0.0))
    return Table("errors", "kinds of mistakes at IoU 0.5, and the AP50 that mending all of a kind would give",
                 ("kind", "what", "count", "AP50 gained"), rows)  # fmt: skip


def confusion_table(found: Analysis) -> Table:
    """Objects by their class and what they were taken for."""
    names = (*found.matches.classes, "nothing")
    rows = [(name, *map(int, row)) for name, row in zip(names, found.confusion, strict=True)]
    title = f"objects (rows) by what was found there (columns), scores from {found.threshold:.2f} on"
    return Table("confusion", title, ("annotated", *names), rows)


def image_table(found: Analysis, dataset: Dataset, count: int) -> Table:
    """The images with most wrong with them."""
    rows = [
        (dataset.records[place].file_name, dataset.records[place].image_id, *map(int, found.counts[place]),
         _known(found.f1[place]))
        for place in found.worst(count)
    ]  # fmt: skip
    return Table("images", f"worst images, scores from {found.threshold:.2f} on",
                 ("image", "id", "found", "false", "missed", "F1"), rows)  # fmt: skip


def suspect_table(found: Analysis, dataset: Dataset, count: int) -> Table:
    """Annotations that may be wrong."""
    rows = [
        (dataset.records[one.image].file_name, dataset.records[one.image].image_id, one.kind.replace("_", " "),
         one.annotation_id or None, one.annotated or "-", one.found, one.score)
        for one in found.suspects[:count]
    ]  # fmt: skip
    columns = ("image", "image id", "kind", "annotation", "annotated", "found", "score")
    return Table("suspects", "annotations that may be wrong: a sure detection speaks against them", columns, rows)


def all_tables(found: Analysis, dataset: Dataset, images: int) -> list[Table]:
    """All of them, in the order in which they are read."""
    return [
        class_table(found), error_table(found), threshold_table(found), confusion_table(found),
        image_table(found, dataset, images), suspect_table(found, dataset, images),
    ]  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
