"""Hashes of data sets, by which a run that resumes knows that its data is the same."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from gndet.data.datasets.packed import PackedRecords
from gndet.data.records import Dataset, Record

SAMPLED = 16  # picture files whose content is hashed; all would take minutes


def fingerprints(train_set: Dataset, val_set: Dataset, masks: bool) -> dict[str, str]:
    """Return hashes of what a run trains on, data, masks, names and pictures, and of what it is evaluated on, val_*.

    masks: whether the run uses the objects' masks.
    """
    names, pictures = _of_files(train_set.records)
    return {
        "data": _of_objects(train_set), "masks": _of_masks(train_set) if masks else "", "names": names,
        "pictures": pictures, "val_data": _of_objects(val_set), "val_rest": _of_evaluation(val_set, masks),
    }  # fmt: skip


def _of_objects(dataset: Dataset) -> str:
    """Return a hash of a data set: ids and sizes of images, boxes and classes of objects."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(np.array([record.image_id, *record.size, len(record.labels)]).tobytes())
        digest.update(record.boxes.tobytes() + record.labels.tobytes() + record.crowd.tobytes())
    return digest.hexdigest()


def _of_masks(dataset: Dataset) -> str:
    """Return a hash of the objects' polygons and run lengths as written in the annotation file."""
    digest = hashlib.sha256()
    for record in dataset.records:
        for segmentation in record.segmentations:
            if isinstance(segmentation, list):
                for polygon in segmentation:
                    digest.update(np.array([len(polygon), *polygon], dtype=np.float64).tobytes())
            else:
                digest.update(repr(segmentation).encode())
            digest.update(b"|")
    return digest.hexdigest()


def _of_evaluation(dataset: Dataset, masks: bool) -> str:
    """Return a hash of what else an evaluation depends on: picture files, category ids, areas and, if masks, masks."""
    digest = hashlib.sha256(repr((dataset.category_ids, _of_files(dataset.records))).encode())
    for record in dataset.records:
        digest.update(record.area.tobytes() + b"|")
    digest.update(_of_masks(dataset).encode() if masks else b"")
    return digest.hexdigest()


def _of_files(records: Sequence[Record]) -> tuple[str, str]:
    """Return a hash of the names of the picture files, and one of their lengths and of the content of SAMPLED files.

    No records are made.  Drawn pictures have no files: both are "".
    """
    if not isinstance(records, PackedRecords):
        return "", ""
    packed, names = records.packed, hashlib.sha256()
    for place in records.places:
        names.update(packed.names[packed.names_first[place] : packed.names_first[place + 1]].tobytes() + b"\0")
    content = hashlib.sha256(packed.lengths[np.array(records.places, dtype=np.int64)].astype("<i8").tobytes())
    for index in np.linspace(0, len(records) - 1, min(SAMPLED, len(records)), dtype=int).tolist():
        with suppress(OSError), records.path(index).open("rb") as file:  # training says what cannot be read
            content.update(file.read(1 << 20))
    return names.hexdigest(), content.hexdigest()
