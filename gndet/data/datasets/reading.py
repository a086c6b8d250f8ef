"""Data sets by kind, the choice of their classes, and what is wrong between two of them."""

import difflib
import os
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from gndet.config.schema import DataConfig, DatasetConfig
from gndet.data.datasets.cache import Tell
from gndet.data.datasets.coco import inspect_coco
from gndet.data.datasets.faults import SKIPPABLE, Findings, in_order, refuse, skipping_unreadable
from gndet.data.datasets.packed import PackedRecords
from gndet.data.datasets.segmentation import brief, printable
from gndet.data.datasets.shapes import read_shapes
from gndet.data.records import Dataset, Finding, Record

Reader = Callable[[DatasetConfig, DataConfig, Tell | None], Dataset]  # raises nothing for a fault that is in FAULTS
DATASETS: dict[str, Reader] = {"coco": inspect_coco, "shapes": lambda cfg, data, tell: read_shapes(cfg, data)}
LISTED, KNOWN = 5, 10  # names spelt out of those that differ, and of those there are


def read_dataset(cfg: DatasetConfig, data: DataConfig, *, masks: bool = False) -> Dataset:
    """Read and check a data set of cfg.kind, with the classes of data.classes only, if given, in their order.

    Images whose objects all are of other classes stay, without objects; cfg.limit keeps the first images only.
    masks: it is to train masks, and an object without one is refused.  Raises DataError.
    """
    return refuse(inspect_dataset(cfg, data, masks=masks))


def inspect_dataset(cfg: DatasetConfig, data: DataConfig, *, masks: bool = False, tell: Tell | None = None) -> Dataset:
    """As `read_dataset`, but what is refused stands in the findings; the records are of the rest.

    tell: called with a line before a long wait.
    """
    return as_configured(DATASETS[cfg.kind](cfg, data, tell), cfg.limit, data, masks=masks)


def inspect_both(data: DataConfig, *, masks: bool, tell: Tell | None = None) -> tuple[Dataset, Dataset]:
    """Inspect data.train, for training (masks: with masks), and data.val.  `between` compares them."""
    train = inspect_dataset(data.train, data, masks=masks, tell=tell)
    train = train if data.keep_empty else find_objects(train)
    val = inspect_dataset(data.val, data, tell=tell)
    return (train, val) if masks else (without_masks(train), without_masks(val))


def as_configured(dataset: Dataset, limit: int | None, data: DataConfig, *, masks: bool) -> Dataset:
    """A data set as it was read, with the first `limit` images, data's classes and data.skip_unreadable."""
    num = len(dataset.records)
    if limit is not None and limit < num:
        note = f"the first {limit} of {num} images are taken; what is found is of the whole file"
        dataset = dataset._replace(records=dataset.records[:limit], notes=(*dataset.notes, note))
    if data.skip_unreadable:
        unreadable = sum(one.count for one in dataset.findings if one.code in SKIPPABLE)
        findings = skipping_unreadable(dataset.findings, unreadable, num, data.max_unreadable)
        dataset = dataset._replace(findings=findings)
    if data.classes is not None and dataset.classes:
        dataset = _with_classes(dataset, data.classes)
    return _with_masks(dataset) if masks else dataset


def without_masks(dataset: Dataset) -> Dataset:
    """Leave out that objects have no mask, where none is asked for."""
    return dataset._replace(findings=tuple(one for one in dataset.findings if one.code != "mask-missing"))


def _with_masks(dataset: Dataset) -> Dataset:
    """Find the objects that have no mask to be trained with."""
    if not any(one.code == "mask-missing" for one in dataset.findings):
        return dataset
    found = Findings()
    for record in dataset.records:
        for place in np.flatnonzero(~record.crowd):
            if record.segmentations[int(place)] is None:
                name = printable(record.file_name)
                text = f"annotation {record.annotation_ids[place]} of {name} has no usable segmentation"
                found.add("mask-needed", text, record.image_id)
    others = tuple(one for one in dataset.findings if one.code != "mask-missing")
    return dataset._replace(findings=in_order(others + found.listed()))


def _with_classes(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Keep the objects of the named classes; a label becomes an index into names."""
    unknown = [name for name in names if name not in dataset.classes]
    if unknown or not names or len(set(names)) < len(names):
        found, twice = Findings(), sorted({name for name in names if names.count(name) > 1})
        text = "the list is empty, expected names of categories"
        if unknown:
            text = f"not in the file: {_with_nearest(unknown, dataset.classes)}"
        elif twice:
            text = f"named twice: {', '.join(map(brief, twice[:LISTED]))}"
        known = ", ".join(map(printable, dataset.classes[:KNOWN]))
        known += "" if len(dataset.classes) <= KNOWN else f" and {len(dataset.classes) - KNOWN} more"
        found.add("classes-choice", f"data.classes: {text}; the file has {known}")
        return dataset._replace(findings=in_order(dataset.findings + found.listed()))
    if len(names) < len(dataset.classes):
        note = f"{len(names)} of {len(dataset.classes)} classes are taken; what is found is of the whole file"
        dataset = dataset._replace(notes=(*dataset.notes, note))
    old = [dataset.classes.index(name) for name in names]
    label = np.full(len(dataset.classes), -1)
    label[old] = np.arange(len(names))
    return dataset._replace(
        classes=names,
        category_ids=tuple(dataset.category_ids[index] for index in old),
        records=_Relabelled(dataset.records, label),
    )


class _Relabelled(Sequence[Record]):
    """Records with labels (old ones' new ones, -1 leaves an object out) given when they are asked for."""

    def __init__(self, records: Sequence[Record], label: np.ndarray) -> None:
        self.records, self.label = records, label

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Relabelled(self.records[index], self.label)
        record = self.records[index]
        return _relabelled(record, self.label[record.labels])

    def path(self, index: int) -> Path:
        """The picture file of a record."""
        return self.records.path(index)


def whole(records: Sequence[Record]) -> Sequence[Record]:
    """The records as they were read, with all their objects."""
    return records.records if isinstance(records, _Relabelled) else records


def _relabelled(record: Record, labels: np.ndarray) -> Record:
    """Give the objects new labels (n,); those with -1 are left out."""
    keep = labels >= 0
    return record._replace(
        boxes=record.boxes[keep],
        labels=labels[keep],
        crowd=record.crowd[keep],
        area=record.area[keep],
        annotation_ids=record.annotation_ids[keep],
        segmentations=[record.segmentations[index] for index in np.flatnonzero(keep)],
    )


def find_objects(dataset: Dataset) -> Dataset:
    """Find that there is nothing to train on: no image has an object that is no crowd region."""
    if dataset.refused or any(not record.crowd.all() for record in dataset.records):
        return dataset
    found = Findings()
    found.add("objects-none", f"{len(dataset.records)} images, none with an object that is no crowd region")
    return dataset._replace(findings=in_order(dataset.findings + found.listed()))


def between(train: Dataset, val: Dataset) -> tuple[Finding, ...]:
    """Find what is wrong between two sets: other classes, images in both by name, by file, or by what they show.

    What they show is compared where `gndet check --images` has decoded both.
    """
    found = Findings()
    if train.classes and val.classes and train.classes != val.classes:
        found.add("classes-differ", _differences(train.classes, val.classes))
    one, other = whole(train.records), whole(val.records)
    if not isinstance(one, PackedRecords) or not isinstance(other, PackedRecords):
        return found.listed()
    home, val_home = os.path.realpath(one.folder), os.path.realpath(other.folder)
    names, places, seen = {}, {}, {}
    for image_id, name, path, digest in one.files():
        place = os.path.normpath(f"{home}/{path}")
        names[name] = places[place] = image_id, name, place
        if digest:
            seen[digest] = places[place]
    for image_id, name, path, digest in other.files():
        place = os.path.normpath(f"{val_home}/{path}")
        if twin := places.get(place) or names.get(name):
            _note_twin(found, "file-in-both", twin, (image_id, name, place))
        if digest in seen and seen[digest][2] != place:
            _note_twin(found, "picture-in-both", seen[digest], (image_id, name, place))
    return found.listed()


_File = tuple[int, str, str]  # image id, file_name, path


def _note_twin(found: Findings, code: str, one: _File, other: _File) -> None:
    """Note an image of train that is in val too; other is val's."""
    if not found.wants_example(code):  # comparing takes a while
        found.add(code, "", other[0])
        return
    ids = f"image {one[0]} of train, {other[0]} of val"
    if code == "picture-in-both":
        found.add(code, f"{ids}: {other[2]} is equal to {one[2]}", other[0])
        return
    name = brief(one[1]) if one[1] == other[1] else f"{brief(one[1])}, {brief(other[1])}"
    found.add(code, f"{name}: {ids}; {_same(Path(one[2]), Path(other[2]))}", other[0])


def _differences(train: Sequence[str], val: Sequence[str]) -> str:
    """In what the classes of two sets differ."""
    only, also = ([name for name in a if name not in b] for a, b in ((train, val), (val, train)))
    if not only and not also:
        pairs = enumerate(zip_longest(train, val, fillvalue="nothing"))  # a name may stand twice, refused elsewhere
        label, (one, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return f"the same names in another order: label {label} is {brief(one)} in train, {brief(other)} in val"
    parts = ((only, "train", val), (also, "val", train))
    return "; ".join(f"only {which} has {_with_nearest(names, others)}" for names, which, others in parts if names)


def _with_nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """Names with the known ones that may have been meant."""
    shown = []
    for name in names[:LISTED]:
        same = [one for one in known if one.strip().casefold() == name.strip().casefold()]
        close = same or difflib.get_close_matches(name, known, n=1)
        shown.append(brief(name) + (f" (nearest: {brief(close[0])})" if close else ""))
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _same(one: Path, other: Path) -> str:
    """Say whether two files of one name, or of one place, are the same."""
    try:
        if one.resolve() == other.resolve():
            return "one file"
        equal = one.stat().st_size == other.stat().st_size
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return "not compared"
    return "two files of the same size" if equal else "two files of that name"
