"""Data sets by kind, and the choice of their classes."""

from collections.abc import Callable

import numpy as np

from gndet.config import DataConfig, DatasetConfig
from gndet.data.coco import read_coco
from gndet.data.shapes import read_shapes
from gndet.errors import DataError
from gndet.structures import Dataset, Record

Reader = Callable[[DatasetConfig, DataConfig], Dataset]
DATASETS: dict[str, Reader] = {"coco": read_coco, "shapes": read_shapes}


def read_dataset(cfg: DatasetConfig, data: DataConfig) -> Dataset:
    """Read and check a data set of cfg.kind, with the classes of data.classes only, if given, in their order.

    Images whose objects all are of other classes stay, without objects; cfg.limit keeps the first images only.
    Raises DataError.
    """
    dataset = DATASETS[cfg.kind](cfg, data)
    dataset = dataset._replace(records=dataset.records[: cfg.limit])
    return dataset if data.classes is None else _with_classes(dataset, data.classes)


def _with_classes(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Keep the objects of the named classes; a label becomes an index into names."""
    unknown = [name for name in names if name not in dataset.classes]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(
            f"{dataset.name}: data.classes: {', '.join(unknown) or list(names)}, expected different ones of "
            f"{', '.join(dataset.classes)}"
        )
    old = [dataset.classes.index(name) for name in names]
    label = np.full(len(dataset.classes), -1)
    label[old] = np.arange(len(names))
    return dataset._replace(
        classes=names,
        category_ids=tuple(dataset.category_ids[index] for index in old),
        records=[_relabelled(record, label[record.labels]) for record in dataset.records],
    )


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
