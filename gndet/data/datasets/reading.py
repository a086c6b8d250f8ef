"""Read a data set of any kind; to read the code of this folder, start here.

`layout` finds out what the files are.  Each kind has a reader that checks them and keeps what is valid; faults go to
`Dataset.findings`, and `faults` decides their outcomes.  This file applies the options that all kinds share (share,
limit, classes, masks); `comparing` compares train with val.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import below, named_paths
from gndet.data.datasets.classes import taken_back, with_classes, with_known
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.exports.class_folders import open_class_folders
from gndet.data.datasets.exports.cvat import open_cvat
from gndet.data.datasets.exports.engine import Opener, inspect_export
from gndet.data.datasets.exports.labelme import open_labelme
from gndet.data.datasets.exports.via import open_via
from gndet.data.datasets.exports.voc import open_voc
from gndet.data.datasets.exports.yolo import open_outlines, open_yolo
from gndet.data.datasets.faults import SKIPPABLE, Fault, Findings, in_order, refuse, skipping_unreadable
from gndet.data.datasets.first_pictures import look_at_first
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.layout import Source, choose_set, find_sets, sets_at, source_of
from gndet.data.datasets.packed import PackedRecords, count_objects
from gndet.data.datasets.shapes import read_shapes
from gndet.data.datasets.splitting import choose_share
from gndet.data.records import Dataset, Record, Tell
from gndet.text import printable

OPENERS: dict[str, Opener] = {
    "cvat": open_cvat, "folders": open_class_folders, "labelme": open_labelme, "via": open_via, "voc": open_voc,
    "yolo": open_yolo,
}  # fmt: skip


def read_dataset(
    cfg: DatasetConfig, data: DataConfig, *, masks: bool = False, known: Sequence[str] = ()
) -> Dataset:  # fmt: skip
    """Read and check a data set of cfg.kind.  If data.classes is given, keep only these classes, in this order.

    Images without an object of these classes stay; cfg.limit keeps only the first images.
    masks: refuse objects without a mask.  known: as in `inspect_dataset`.
    Raises a DataError that lists everything that is refused.
    """
    return refuse(inspect_dataset(cfg, data, masks=masks, known=known))


def inspect_dataset(
    cfg: DatasetConfig, data: DataConfig, *, masks: bool = False, known: Sequence[str] = (), tell: Tell | None = None
) -> Dataset:
    """Read like `read_dataset`, but list what is refused in the findings; the records hold the rest.

    known: classes that the set may lack; by default, those of data.train, if the set declares none.
    tell: called with a line before a long wait.
    """
    dataset = _read(cfg, data, tell)
    if not (known or dataset.declared or _is_train(cfg, data) or cfg.share is not None):
        known = _read(data.train, data, tell).classes
    dataset = with_known(dataset, known)
    return as_configured(_shared(dataset, cfg, data), cfg.limit, data, masks=masks)


def _read(cfg: DatasetConfig, data: DataConfig, tell: Tell | None) -> Dataset:
    if cfg.kind == "shapes" and cfg.share is None:
        return read_shapes(cfg)
    try:
        named = data.train.kind if cfg.share is not None else cfg.kind
        return inspect_source(source_in(cfg, data), data, tell, named)
    except Fault as fault:
        found = Findings()
        found.add(fault.code, str(fault))
        return Dataset(str(below(data.root, cfg.annotations)), (), (), [], found.listed())


def source_in(cfg: DatasetConfig, data: DataConfig) -> Source:
    """Find where a data set lies, and in which format.  Raises Fault if it is not there."""
    if cfg.share is not None:
        cfg = data.train
    root, split = below(data.root, ""), cfg.split or "train"
    images = below(data.root, cfg.images) if cfg.images else None
    if cfg.kind == "folders":
        return Source(cfg.kind, below(data.root, cfg.annotations), images, split)
    if cfg.annotations:
        return source_of(below(data.root, cfg.annotations), images, cfg.kind, split)
    source = choose_set(root, sets_at(root) if root.is_file() else find_sets(root, cfg.kind), split)
    return source if images is None else source._replace(images=images)


def user_paths(data: DataConfig) -> list[Path]:
    """Return the annotation files and folders of a config, named or found: gndet writes nothing among them."""
    paths = named_paths(data)
    for part in (data.train, data.val):
        if part.kind != "shapes":
            with suppress(Fault):  # the reader reports it
                kind, annotations, images, _ = source_in(part, data)
                home = annotations if annotations.is_dir() else annotations.parent
                images = images or (guess_folder(annotations) if kind == "coco" else home)
                paths += [annotations, *([images] if images else [])]
    return paths


def inspect_source(source: Source, data: DataConfig, tell: Tell | None = None, named: str = "auto") -> Dataset:
    """Read and check the annotations of a source, and the listing of its image folder.

    named: the kind that the user named; `yolo` says that rows which may be oriented boxes are outlines.
    """
    kind, annotations, images, split = source
    if named == "yolo":
        return inspect_export(open_outlines, annotations, images, split, data, tell)
    if kind == "coco":
        return inspect_file(annotations, images or guess_folder(annotations) or annotations.parent, data, tell)
    return inspect_export(OPENERS[kind], annotations, images, split, data, tell)


def _is_train(cfg: DatasetConfig, data: DataConfig) -> bool:
    return (cfg.kind, cfg.annotations, cfg.split) == (data.train.kind, data.train.annotations, data.train.split)


def _shared(dataset: Dataset, cfg: DatasetConfig, data: DataConfig) -> Dataset:
    """Keep the share of the images that data.val takes, or what it leaves for data.train."""
    share = data.val.share
    if share is None or not (_is_train(cfg, data) or cfg.share) or not isinstance(dataset.records, PackedRecords):
        return dataset
    taken = choose_share(dataset.records, len(dataset.classes), share, data.val.seed)
    places = np.flatnonzero(taken if cfg.share else ~taken)
    part = "data.val takes them" if cfg.share else "data.val takes the others"
    note = f"{len(places)} of {len(taken)} images: {part} (share {share:g}, seed {data.val.seed})"
    records = replace(dataset.records, places=[dataset.records.places[place] for place in places.tolist()])
    return dataset._replace(records=records, notes=(*dataset.notes, note))


def inspect_both(data: DataConfig, *, masks: bool, tell: Tell | None = None) -> tuple[Dataset, Dataset]:
    """Inspect data.train as training needs it (masks: with masks), and data.val.  `between` compares the two."""
    train = inspect_dataset(data.train, data, masks=masks, tell=tell)
    train = train if data.keep_empty else find_objects(train)
    val = inspect_dataset(data.val, data, known=train.classes, tell=tell)
    train = taken_back(train, val.classes)
    return (train, val) if masks else (without_masks(train), without_masks(val))


def as_configured(dataset: Dataset, limit: int | None, data: DataConfig, *, masks: bool) -> Dataset:
    """Apply the limit (first images), data.skip_unreadable and data.classes to a data set from a reader."""
    num = len(dataset.records)
    if limit is not None and limit < num:
        note = f"only the first {limit} of {num} images are used; the findings are of the whole file"
        dataset = dataset._replace(records=dataset.records[:limit], notes=(*dataset.notes, note))
    if data.skip_unreadable:
        unreadable = sum(finding.count for finding in dataset.findings if finding.code in SKIPPABLE)
        findings = skipping_unreadable(dataset.findings, unreadable, num, data.max_unreadable)
        dataset = dataset._replace(findings=findings)
    if isinstance(dataset.records, PackedRecords) and dataset.records.digests is None:  # not decoded by gndet check
        refused, notes = look_at_first(dataset.records)
        findings = in_order(dataset.findings + refused)
        dataset = dataset._replace(findings=findings, notes=(*dataset.notes, *notes))
    found = Findings()
    if data.classes is not None and dataset.classes:
        dataset = with_classes(taken_back(dataset, data.classes), data.classes, found)
    if masks and any(finding.code == "mask-missing" for finding in dataset.findings):
        dataset = without_masks(dataset)
        _find_missing_masks(dataset.records, found)
    return _with_findings(dataset, found)


def without_masks(dataset: Dataset) -> Dataset:
    """Drop the finding that objects have no mask, because no masks are trained."""
    return dataset._replace(findings=tuple(finding for finding in dataset.findings if finding.code != "mask-missing"))


def _find_missing_masks(records: Sequence[Record], found: Findings) -> None:
    for record in records:
        for number, crowd, mask in zip(record.annotation_ids, record.crowd, record.segmentations, strict=True):
            if mask is None and not crowd:
                text = f"annotation {number} of {printable(record.file_name)} has no usable segmentation"
                found.add("mask-needed", text, record.image_id)


def _with_findings(dataset: Dataset, found: Findings) -> Dataset:
    return dataset._replace(findings=in_order(dataset.findings + found.listed()))


def find_objects(dataset: Dataset) -> Dataset:
    """Refuse a data set in which no image has an object other than a crowd region: there is nothing to train on."""
    if dataset.refused or count_objects(dataset.records).trainable.any():
        return dataset
    found = Findings()
    found.add("objects-none", f"{len(dataset.records)} images, none with an object other than a crowd region")
    return _with_findings(dataset, found)
