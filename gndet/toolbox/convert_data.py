"""`gndet convert-data`: write a checked copy of a data set, in COCO's JSON or as YOLO's text files.

The readers check the data; what they refuse ends the conversion before anything is written, and what they fix is fixed
in the copy.  Pictures are copied as they are, so that an EXIF orientation goes along.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gndet.config.loading import find_config, load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.classes import with_common_classes
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.exports.yolo_files import IMAGES
from gndet.data.datasets.exports.yolo_rows import row_of
from gndet.data.datasets.faults import Fault, refuse_all, several
from gndet.data.datasets.formats import is_config
from gndet.data.datasets.layout import sets_at
from gndet.data.datasets.packed import PackedRecords
from gndet.data.datasets.reading import as_configured, inspect_both, inspect_source, user_paths
from gndet.data.datasets.tracing import joined, outlines_of
from gndet.data.records import Dataset, Record
from gndet.errors import DataError, OutputError
from gndet.files import TEMPORARY, cut_name, folder_written_whole, make_folder, refuse_among, sweep, write_whole
from gndet.text import named_briefly

ALL = "all"  # what a set without a name is called in the copy
WHOLE = ".gndet-copy"  # folder in OUT that is written whole before its content moves up

Show = Callable[[str], None]


def convert_data(
    source: str, out: Path, to: str, overrides: list[str], show: Show, image_folder: Path | None = None
) -> None:
    """Write a copy of all sets of a folder, an annotation file or a config.

    out: a new or empty folder; to: coco (OUT/annotations/instances_SET.json, OUT/SET/) or yolo (OUT/data.yaml,
    OUT/images/SET/, OUT/labels/SET/).  Boxes are clipped to their picture.  image_folder: the pictures of an annotation
    file; by default, a folder near it is used.
    Raises DataError for data that is refused and for sets of different classes, ConfigError, and OutputError for a
    folder that holds something.
    """
    if (out / WHOLE).is_dir():  # a kill came while its content moved up
        _move_up(out)
    if out.exists() and (not out.is_dir() or any(not TEMPORARY.fullmatch(name) for name in os.listdir(out))):
        raise OutputError(f"{out}: is not an empty folder; gndet writes the copy into a new or empty one")
    refuse_among(out, "OUT", _read_from(source, overrides))
    sets = _read(source, overrides, show, image_folder)
    refuse_all({dataset.name: dataset.findings for dataset in sets.values()})
    for name, dataset in sets.items():
        if not isinstance(dataset.records, PackedRecords):
            raise DataError(f"{name or ALL}: {dataset.name}: has no picture files to copy")
        if dataset.classes != (first := next(iter(sets.values()))).classes:
            words = f"has the classes {named_briefly(dataset.classes)}, others {named_briefly(first.classes)}"
            raise DataError(f"{name}: {words}; data.classes selects common ones")
    make_folder(out, "OUT")
    sweep(out)
    try:
        with folder_written_whole(out / WHOLE) as folder:
            {"coco": _write_coco, "yolo": _write_yolo}[to](sets, folder, show)
    except OSError as error:
        raise OutputError(f"{error.filename or out}: cannot write the copy: {error.strerror}") from error
    _move_up(out)
    for name, dataset in sets.items():
        fixed = "".join(f"; {count} {what}" for what, count in dataset.fixes.items())
        show(f"{name or ALL}: {several(len(dataset.records), 'image')} of {dataset.name} -> {out}{fixed}")


def _move_up(out: Path) -> None:
    """Move the whole copy from its folder in OUT to OUT.  Raises OutputError."""
    try:
        for name in os.listdir(out / WHOLE):
            os.rename(out / WHOLE / name, out / name)
        (out / WHOLE).rmdir()
    except OSError as error:
        raise OutputError(f"{error.filename or out}: cannot move the copy up: {error.strerror}") from error


def _read_from(source: str, overrides: list[str]) -> list[Path]:
    path = find_config(source)
    return user_paths(load_config(source, overrides).data) if is_config(path) else [path]


def _read(source: str, overrides: list[str], show: Show, image_folder: Path | None) -> dict[str, Dataset]:
    path = find_config(source)
    if is_config(path):
        if image_folder is not None:
            raise OutputError(f"--image-folder {image_folder}: only for data without a config; {source} names its own")
        cfg = load_config(source, overrides)
        return dict(zip(("train", "val"), inspect_both(cfg.data, masks=False, tell=show), strict=True))
    data = with_overrides(Config(), overrides, "the defaults").data
    try:
        found = sets_at(path, image_folder and Path(os.path.expanduser(image_folder)))
    except Fault as fault:
        raise DataError(f"{fault}\nexpected a data folder, an annotation file or a config") from None
    datasets = {name: inspect_source(where, data, show) for name, where in found.items()}
    common = with_common_classes(datasets)
    return {name: as_configured(dataset, None, data, masks=False) for name, dataset in common.items()}


def _write_coco(sets: dict[str, Dataset], out: Path, show: Show) -> None:
    annotations = out / "annotations"
    annotations.mkdir()
    for name, dataset in sets.items():
        records: Any = dataset.records
        tree = to_coco(dataset._replace(records=[_clipped(record) for record in records]))
        names = {record.image_id: _copy(records, index, out / (name or ALL)) for index, record in enumerate(records)}
        tree["images"] = [image | {"file_name": names[image["id"]]} for image in tree["images"]]
        write_whole(annotations / f"instances_{name or ALL}.json", json.dumps(tree))  # last: it says that all is there


def _write_yolo(sets: dict[str, Dataset], out: Path, show: Show) -> None:
    """Write label files and data.yaml; crowd regions, which YOLO does not know, are left out."""
    crowd = boxes = outlines = 0
    for name, dataset in sets.items():
        records: Any = dataset.records
        stems: set[str] = set()
        for index, record in enumerate(records):
            picture = _copy(records, index, out / "images" / (name or ALL), stems)
            kept = _clipped(record)
            columns = zip(kept.labels.tolist(), kept.crowd, kept.boxes, kept.segmentations, strict=True)
            objects = [(label, box, mask) for label, is_crowd, box, mask in columns if not is_crowd]
            text = "".join(
                row_of(label, box, mask and joined(outlines_of(mask, kept.size)), kept.size) + "\n"
                for label, box, mask in objects
            )
            label_file = (out / "labels" / (name or ALL) / picture).with_suffix(".txt")
            label_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(label_file, text, sync=False)
            crowd += int(record.crowd.sum())
            boxes += sum(mask is None for *_, mask in objects)
            outlines += sum(mask is not None for *_, mask in objects)
    paths = {name or "train": f"images/{name or ALL}" for name in sets}
    names = dict(enumerate(next(iter(sets.values())).classes))
    tree = {"path": ".", **paths, "names": names}
    # PyYAML leaves the line break U+0085 unescaped, and reads it as a space
    content = yaml.safe_dump(tree, sort_keys=False, allow_unicode=not any("\x85" in name for name in names.values()))
    write_whole(out / "data.yaml", content)  # last: it says that all is there
    if crowd:
        show(f"{several(crowd, 'crowd region')} left out, which YOLO's format does not know")
    if boxes and outlines:
        show(f"{boxes} objects have a box only, {outlines} an outline: gndet reads both; Ultralytics' trainer does not")


def _clipped(record: Record) -> Record:
    """Clip the boxes to the picture; a box that changes loses area, too."""
    height, width = record.size
    boxes = record.boxes.clip(0, [width, height, width, height])
    inside = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    area = np.where((boxes != record.boxes).any(1), np.minimum(record.area, inside), record.area)
    return record._replace(boxes=boxes, area=area)


def _copy(records: PackedRecords, index: int, folder: Path, stems: set[str] | None = None) -> str:
    """Copy the picture of a record below a folder.  Returns its path there.

    stems: of the pictures copied before, for YOLO: a name whose stem is among them gets a number, so that labels do not
    collide, and a folder gets an underscore if YOLO would look for labels beside it.
    """
    source = records.path(index)
    name = Path(source).relative_to(records.folder)
    if stems is not None:
        parents = (f"{part}_" if part.lower() in (*IMAGES, "labels") else part for part in name.parent.parts)
        name = Path(*parents, name.name)
        stem, number = cut_name(name.stem), 1
        while (taken := str(name.with_suffix("")).casefold()) in stems:  # some disks do not know upper from lower case
            number += 1
            name = name.with_name(f"{stem}-{number}{name.suffix}")
        stems.add(taken)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, Path(source).read_bytes(), sync=False)
    return name.as_posix()
