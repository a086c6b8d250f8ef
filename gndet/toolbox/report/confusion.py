"""The report's section on a classifier: errors of each class, what is taken for what, and the worst pictures."""

import json
from collections.abc import Sequence

import numpy as np

from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.drawing import shrunk
from gndet.files import CLASSIFIED
from gndet.toolbox.report import blocks
from gndet.toolbox.report.blocks import GalleryPicture, Section
from gndet.toolbox.report.record import RunRecord

SQUARE = 20  # classes up to which the whole table of confusions is shown
PAIRS, PICTURES, SIDE = 50, 24, 240  # confusions and wrong pictures that are shown; pixels of a picture's side

Row = tuple[int, int, int, float]  # image id, class, predicted class (-1: not read), score


def section(run: RunRecord) -> Section:
    """Return the section with the confusions of the last evaluation."""
    path = run.folder / CLASSIFIED
    if not path.is_file():
        return blocks.section("confusion", "Classes", blocks.notice("plain", "The run was not evaluated yet."))
    content = json.loads(path.read_text(encoding="utf-8"))
    names, rows = [*content["classes"], "(not read)"], [tuple(row) for row in content["images"]]
    counts = np.zeros((len(names) - 1, len(names)), dtype=np.int64)  # (K, K + 1)
    np.add.at(counts, tuple(np.array([row[1:3] for row in rows], dtype=np.int64).T), 1)
    pictures = _pictures(run.val_set, rows, names) if run.val_set else []
    return blocks.section(
        "confusion", "Classes", _classes(counts, names), _confusions(counts, names),
        blocks.heading("Wrong, the most certain first") if pictures else "",
        blocks.gallery("wrong-pictures", pictures, side=SIDE) if pictures else "",
        lead=f"The last evaluation, {len(rows):,} pictures of data.val.",
    )  # fmt: skip


def _classes(counts: np.ndarray, names: Sequence[str]) -> str:
    rows: list[list[blocks.Cell]] = []
    for label, name in enumerate(names[:-1]):
        total, right = int(counts[label].sum()), int(counts[label, label])
        found = int(counts[:, label].sum())
        error = blocks.percent(1 - right / total if total else None)
        rows.append([name, blocks.number(total, ",d"), error, blocks.percent(right / found if found else None)])
    head = ("class", "pictures", "error, %", "of those taken for it, right, %")
    return blocks.sortable_table("class-errors", head, rows, "error of each class")


def _confusions(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return a table of all confusions, or of the most frequent ones if there are many classes."""
    if len(counts) <= SQUARE:
        shown = [label for label in range(len(names)) if label < len(counts) or counts[:, label].any()]
        rows: list[list[blocks.Cell]] = [
            [names[label], *(blocks.number(int(counts[label, other]), "d") for other in shown)]
            for label in range(len(counts))
        ]
        head = ("class \\ taken for", *(names[label] for label in shown))
        return blocks.sortable_table("confusions", head, rows, "pictures of each class (rows) by predicted class")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    most = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(place), len(names)) for place in most if wrong.flat[place]]
    rows = [[names[a], names[b], blocks.number(int(wrong[a, b]), "d")] for a, b in pairs]
    return blocks.sortable_table("confusions", ("class", "taken for", "pictures"), rows, "most frequent confusions")


def _pictures(dataset: Dataset, rows: Sequence[Row], names: Sequence[str]) -> list[GalleryPicture]:
    """Return the wrong pictures of which the classifier is most certain."""
    wrong = sorted((row for row in rows if row[1] != row[2] and row[2] >= 0), key=lambda row: -row[3])[:PICTURES]
    wanted = {row[0] for row in wrong}
    records = {record.image_id: record for record in dataset.records if record.image_id in wanted}
    pictures = []
    for image_id, label, guess, score in wrong:
        try:
            image = shrunk(records[image_id].load(), SIDE)
        except (DataError, KeyError):  # changed since the evaluation
            continue
        caption = f"{records[image_id].file_name}: {names[label]}, taken for {names[guess]} ({100 * score:.0f} %)"
        pictures.append(GalleryPicture(image, caption))
    return pictures
