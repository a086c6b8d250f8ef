"""The report's section on detections: precision and recall, F1, AP per class with intervals, thresholds, confusion."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gndet.evaluation.coco_metrics import RECALLS
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.matches import SCORES
from gndet.toolbox.analysis.tables import ALL, Table, class_table, threshold_table
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Cell, Section
from gndet.toolbox.report.charts import Series
from gndet.toolbox.report.record import RunRecord

FORMS = {"id": "d", "image id": "d", "annotation": "d", "threshold": ".2f", "score": ".2f"}  # other columns by type
MOST_CURVES = 7  # classes whose curves are drawn: those with the most objects
MOST_CONFUSED = 40  # classes of the confusion matrix, which grows with their square


def section(run: RunRecord) -> Section:
    """Return the section with curves and tables of the last evaluation's detections."""
    found = run.analysis
    if found is None:
        reason = next((line for line in run.missing if line.startswith("detections")), "there are no detections")
        return blocks.section("quality", "Detections", blocks.notice("warn", reason))
    shown = most_common(found)
    lead = (
        f"{len(found.matches.index):,} detections on {len(found.f1):,} images of data.val, compared by {found.kind}. "
        "Detections are matched and scored as COCO does."
    )
    return blocks.section(
        "quality", "Detections",
        blocks.beside(_precision_recall(found, shown), _f1(found, shown)),
        shown_table(class_table(found), picks=[f"class:{label}" for label in range(len(found.matches.classes))],
                    note=f" ({found.intervals.draws} draws); click a class for its pictures"),
        shown_table(threshold_table(found)),
        _confusion(found),
        lead=lead,
    )  # fmt: skip


def most_common(found: Analysis) -> list[int]:
    """Return the indices of the classes to draw, in the data set's order."""
    objects = np.array([row["num_objects"] for row in found.metrics.per_class])
    order = np.argsort(-objects, kind="stable")[:MOST_CURVES]
    return sorted(int(label) for label in order if objects[label])


def _precision_recall(found: Analysis, shown: Sequence[int]) -> str:
    precision = found.metrics.precision[0]  # (101, K)
    defined = np.where(precision < 0, np.nan, precision)
    mean = defined[:, ~np.isnan(defined).all(0)].mean(1)
    return charts.lines(
        "chart-pr", _series(found, shown, RECALLS, [*defined.T, mean], "mean of classes"),
        "COCO precision and recall at IoU 0.5", x_label="recall", y_label="precision", y_range=(0, 1.03),
    )  # fmt: skip


def _f1(found: Analysis, shown: Sequence[int]) -> str:
    return charts.lines(
        "chart-f1", _series(found, shown, SCORES, found.curves.f1, ALL),
        "F1 at IoU 0.5 by score threshold", x_label="score threshold", y_label="F1", y_range=(0, 1.03),
    )  # fmt: skip


def _series(
    found: Analysis, shown: Sequence[int], x: np.ndarray, rows: Sequence[np.ndarray] | np.ndarray, last: str
) -> list[Series]:
    """Return the curves of the shown classes and, if there are several, the last row under the name `last`."""
    series = [Series(found.matches.classes[k], x, rows[k]) for k in shown]
    return [*series, Series(last, x, rows[-1])] if len(shown) > 1 else series


def _confusion(found: Analysis) -> str:
    names = [*found.matches.classes, "nothing"]
    counts = found.confusion.sum(0) + found.confusion.sum(1)
    used = np.sort(np.argsort(-counts, kind="stable")[: min(np.count_nonzero(counts), MOST_CONFUSED)])
    if not len(used):
        return ""
    matrix = found.confusion[np.ix_(used, used)]
    labels = [names[index] for index in used]
    caption = f"confusion matrix at IoU 0.5, scores >= {found.threshold:.2f}: annotated class by detected class"
    if len(used) < np.count_nonzero(counts):
        caption += f"; the {len(used)} classes that occur most, `gndet analyze --csv` writes all"
    return charts.heat("chart-confusion", matrix, labels, caption, x_label="found", y_label="annotated")


def shown_table(table: Table, *, picks: Sequence[str] = (), note: str = "") -> str:
    """Return a table of the analysis as HTML."""
    rows = [[cell(column, value) for column, value in zip(table.columns, row, strict=True)] for row in table.rows]
    caption = f"{table.title}{note} (shares and AP in percent)"
    return blocks.sortable_table(f"table-{table.name}", table.columns, rows, caption, picks=picks)


def cell(column: str, value: Any) -> Cell:
    """Return a value of the analysis as a cell of a table."""
    if isinstance(value, str):
        return value
    if column in FORMS:
        return blocks.number(value, FORMS[column])
    return blocks.number(value, ",") if isinstance(value, int) else blocks.percent(value)
