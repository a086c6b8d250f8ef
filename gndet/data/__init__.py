"""Data sets by kind, and the choice of their classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gndet.config import DataConfig, DatasetConfig
from gndet.data.coco import inspect_coco
from gndet.data.faults import Findings, in_order, refuse, skipping_unreadable
from gndet.data.segmentation import brief
from gndet.data.shapes import read_shapes
from gndet.structures import Dataset, Finding, Record

Reader = Callable[[DatasetConfig, DataConfig], Dataset]  # raises nothing for a fault that is in FAULTS
DATASETS: dict[str, Reader] = {"coco": inspect_coco, "shapes": read_shapes}


def read_dataset(cfg: DatasetConfig, data: DataConfig, *, masks: bool = False) -> Dataset:
    """Read and check a data set of cfg.kind, with the classes of data.classes only, if given, in their order.

    Images whose objects all are of other classes stay, without objects; cfg.limit keeps the first images only.
    masks: it is to train masks, and an object without one is refused.  Raises DataError.
    """
    return refuse(inspect_dataset(cfg, data, masks=masks))


def inspect_dataset(cfg: DatasetConfig, data: DataConfig, *, masks: bool = False) -> Dataset:
    """As `read_dataset`, but what is refused stands in the findings; the records are of the rest."""
    dataset = DATASETS[cfg.kind](cfg, data)
    dataset = dataset._replace(records=dataset.records[: cfg.limit])
    if data.skip_unreadable:
        dataset = dataset._replace(findings=skipping_unreadable(dataset.findings))
    if data.classes is not None and dataset.classes:
        dataset = _with_classes(dataset, data.classes)
    return _with_masks(dataset) if masks else dataset


def _with_masks(dataset: Dataset) -> Dataset:
    """Find the objects that have no mask to be trained with."""
    if not any(one.code == "mask-missing" for one in dataset.findings):
        return dataset
    found = Findings()
    for record in dataset.records:
        for place in np.flatnonzero(~record.crowd):
            if record.segmentations[int(place)] is None:
                text = f"annotation {record.annotation_ids[place]} of {record.file_name} has no usable segmentation"
                found.add("mask-needed", text, record.image_id)
    others = tuple(one for one in dataset.findings if one.code != "mask-missing")
    return dataset._replace(findings=in_order(others + found.listed()))


def _with_classes(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Keep the objects of the named classes; a label becomes an index into names."""
    unknown = [name for name in names if name not in dataset.classes]
    if unknown or not names or len(set(names)) < len(names):
        wrong, found = ", ".join(unknown) or list(names), Findings()
        found.add("classes-choice", f"data.classes: {wrong}, expected different ones of {', '.join(dataset.classes)}")
        return dataset._replace(findings=in_order(dataset.findings + found.listed()))
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


def between(
    train: Dataset, val: Dataset, train_folder: Path | None = None, val_folder: Path | None = None
) -> tuple[Finding, ...]:
    """Find what is wrong between two sets: other classes, images in both; the folders tell whether they are one."""
    found = Findings()
    if train.classes and val.classes and train.classes != val.classes:
        text = f"train has {', '.join(train.classes)}; val has {', '.join(val.classes)}"
        found.add("classes-differ", text)
    ids = {record.file_name: record.image_id for record in train.records}
    for record in val.records:
        if record.file_name in ids and train_folder is not None and val_folder is not None:
            same = _same(train_folder / record.file_name, val_folder / record.file_name)
            images = f"image {ids[record.file_name]} of train, {record.image_id} of val"
            text = f"{brief(record.file_name)}: {images}; {same}"
            found.add("file-in-both", text, record.image_id)
    return found.listed()


def _same(one: Path, other: Path) -> str:
    """Say whether two files of one name are the same."""
    try:
        if one.resolve() == other.resolve():
            return "one file"
        equal = one.stat().st_size == other.stat().st_size
    except OSError:
        return "not compared"
    return "two files of the same size" if equal else "two files of that name"
