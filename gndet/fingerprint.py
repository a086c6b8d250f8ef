"""Hashes of a data set: whether a run goes on with the data that it began with."""

import hashlib

import numpy as np

from gndet.data.records import Dataset


def fingerprints(train_set: Dataset, val_set: Dataset, masks: bool) -> dict[str, str]:
    """The hashes that a checkpoint holds: data, masks ("" where they are not trained on), val_data."""
    return {
        "data": fingerprint(train_set),
        "masks": mask_fingerprint(train_set) if masks else "",
        "val_data": fingerprint(val_set),
    }


def fingerprint(dataset: Dataset) -> str:
    """A hash of what is learned from: the images' ids and sizes, the objects' boxes and classes."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(np.array([record.image_id, *record.size, len(record.labels)]).tobytes())
        digest.update(record.boxes.tobytes() + record.labels.tobytes() + record.crowd.tobytes())
    return digest.hexdigest()


def mask_fingerprint(dataset: Dataset) -> str:
    """A hash of the objects' polygons and run lengths as the annotation file has them."""
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
