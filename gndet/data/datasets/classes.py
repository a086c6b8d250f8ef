"""The classes of a data set: those that are chosen, those that another set has, and the nearest names in messages."""

import difflib
from collections.abc import Sequence
from itertools import count

import numpy as np

from gndet.data.datasets.faults import Findings
from gndet.data.datasets.packed import PackedRecords, relabel
from gndet.data.records import Dataset
from gndet.text import brief, named_briefly

LISTED = 5  # how many names to show


def with_known(dataset: Dataset, known: Sequence[str]) -> Dataset:
    """Add classes of another set that a set lacks, if its own classes are in the same order or it declares none."""
    dataset = taken_back(dataset, known)
    classes = tuple(sorted({*dataset.classes, *known}))
    if dataset.declared:
        lacking = tuple(name for name in known if name in dataset.classes) == dataset.classes
        classes = tuple(known) if lacking else dataset.classes
    if classes == dataset.classes or not isinstance(dataset.records, PackedRecords):
        return dataset
    labels = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    note = f"{len(classes) - len(labels)} of the {len(classes)} classes do not occur"
    records, ids = relabel(dataset.records, labels), tuple(range(1, len(classes) + 1))
    if dataset.declared:  # results keep the numbers of the file
        numbers = dict(zip(dataset.classes, dataset.category_ids, strict=True))
        unused = count(max(dataset.category_ids, default=0) + 1)
        ids = tuple(numbers[name] if name in numbers else next(unused) for name in classes)
    return dataset._replace(classes=classes, category_ids=ids, records=records, notes=(*dataset.notes, note))


def with_common_classes(datasets: dict[str, Dataset]) -> dict[str, Dataset]:
    """Give the sets of an export, by name, the classes of train, or of all sets: a set may lack a class."""
    known = sorted({name for dataset in datasets.values() for name in dataset.classes})
    wanted = datasets["train"].classes if "train" in datasets else known
    return {name: with_known(taken_back(dataset, known), wanted) for name, dataset in datasets.items()}


def taken_back(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """Take back the named classes that the reader of a data set left out: another set has objects of them."""
    missing = {number: name for number, name in dataset.left_out if name in classes and name not in dataset.classes}
    if not missing:
        return dataset
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True)) | missing
    category_ids, found = tuple(sorted(names)), Findings()
    for finding in dataset.findings:
        count = finding.count - len(missing) * (finding.code == "category-left-out")
        found.take([finding._replace(count=count)] if count else [])
    for number, name in missing.items():
        found.add("category-unused", f"category {number}: {brief(name)}")
    records = relabel(dataset.records, np.searchsorted(category_ids, dataset.category_ids))
    return dataset._replace(
        classes=tuple(names[number] for number in category_ids), category_ids=category_ids, records=records,
        findings=found.listed(), left_out=tuple(pair for pair in dataset.left_out if pair[0] not in missing),
    )  # fmt: skip


def with_classes(dataset: Dataset, names: tuple[str, ...], found: Findings) -> Dataset:
    """Keep the objects of the named classes; a label becomes an index into names."""
    if fault := _wrong_choice(names, dataset.classes):
        found.add("classes-choice", fault)
        return dataset
    if len(names) < len(dataset.classes):
        note = f"only {len(names)} of {len(dataset.classes)} classes are used; the findings are of the whole file"
        dataset = dataset._replace(notes=(*dataset.notes, note))
    old = [dataset.classes.index(name) for name in names]
    labels = np.full(len(dataset.classes), -1)
    labels[old] = np.arange(len(names))
    category_ids = tuple(dataset.category_ids[index] for index in old)
    return dataset._replace(classes=names, category_ids=category_ids, records=relabel(dataset.records, labels))


def _wrong_choice(names: tuple[str, ...], classes: tuple[str, ...]) -> str:
    """Return what is wrong with a list of class names, or "" if nothing is."""
    unknown = [name for name in names if name not in classes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if unknown:
        text = f"not in the file: {with_nearest(unknown, classes)}"
    elif twice:
        text = f"named twice: {', '.join(map(brief, twice[:LISTED]))}"
    elif not names:
        text = "the list is empty, expected names of categories"
    else:
        return ""
    return f"data.classes: {text}; the file has {named_briefly(classes)}"


def with_nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """List names, each with the nearest known one, if it is near."""
    shown = []
    for name in names[:LISTED]:
        same = [other for other in known if other.strip().casefold() == name.strip().casefold()]
        close = same or difflib.get_close_matches(name, known, n=1)
        shown.append(brief(name) + (f" (nearest: {brief(close[0])})" if close else ""))
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
