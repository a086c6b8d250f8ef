"""Read an export of a labelling tool: open it, parse its files in processes, check them by the rules of COCO's format.

A reader of a format hands over an Export, whose units become Pictures with their objects, unchecked.

Letters: N pictures, n objects.  Each part numbers its pictures, objects and classes from 1; joining renumbers them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.config.data import DataConfig
from gndet.data.datasets.cache import cached
from gndet.data.datasets.coco import assemble, gc_paused
from gndet.data.datasets.columns import Columns, Known, end_to_end, read_columns
from gndet.data.datasets.entries import read_images
from gndet.data.datasets.faults import Fault, Findings, in_order
from gndet.data.datasets.image_folder import ImageFolder
from gndet.data.datasets.images import Reading, picture_size
from gndet.data.datasets.json_items import CATEGORY, PLACE
from gndet.data.datasets.packed import Image
from gndet.data.records import Dataset, Finding, Tell
from gndet.data.workers import read_in_processes
from gndet.text import brief

Found = list[tuple[str, str]]  # what is wrong: codes of FAULTS, and words that begin with the place
SizeOf = Callable[[str], tuple[int, int]]  # file_name -> height, width of the picture, upright; raises Fault
PART = 1000  # units parsed at once
USUAL = ("area-missing",)  # findings that say nothing about an export: no format but COCO's has areas


class Picture(NamedTuple):
    """A picture with its objects; the engine checks all of it by the rules of COCO's format.

    An object is a dict with COCO's keys (bbox [x, y, width, height] in pixels, segmentation, iscrowd, area), "category"
    (the name of its class) and "place" (where it is, like "labels/a.txt, line 3").
    """

    file_name: str  # relative to the image folder
    size: tuple[Any, Any] | None  # height, width as the export states them; None: read from the picture's header
    objects: list[dict[str, Any]]
    findings: Sequence[tuple[str, str]] = ()  # as in Found


class Export(NamedTuple):
    """An export that was opened: its units, parsed in parallel, and the classes that it declares."""

    units: Sequence[Any]  # picklable, in a fixed order: a unit per annotation file, or per picture
    parse: Callable[[Any, SizeOf], list[Picture]]  # picklable; runs in worker processes.  Raises Fault
    classes: tuple[str, ...] | None  # in label order; None: the names that occur, sorted
    images: Path  # the folder that file_name is relative to
    files: Sequence[Path]  # every annotation file, for the key of the cache
    findings: Sequence[tuple[str, str]] = ()  # as in Found
    notes: tuple[str, ...] = ()  # lines to show


Opener = Callable[[Path, Path | None, str], Export]  # (annotations, image folder or None, set)


class Part(NamedTuple):
    """A part of an export that was parsed and checked."""

    num: int  # pictures, also those with a fault
    images: list[Image]
    names: list[str]  # of the classes that occur, if the export declares none; a category id is an index from 1
    columns: Columns
    findings: tuple[Finding, ...]
    subfolders: list[str]  # of the image folder, in which its pictures were looked for


def inspect_export(
    open_export: Opener, annotations: Path, images: Path | None, split: str, data: DataConfig, tell: Tell | None = None
) -> Dataset:
    """Read and check an export; use data.cache if it has it.

    open_export: the reader of its format.  annotations: a file or folder; images: the image folder, None to look near
    them; split: the set.  Returns the pictures in the order of the export.  The findings list the faults.
    """
    found = Findings()
    try:
        export = open_export(annotations, images, split)
        files = ImageFolder(export.images, data.follow_links)
        reading = Reading.of(data)
        read = partial(_inspect, export, annotations, files, reading, found)
        way = (open_export.__name__, split)
        units = hashlib.sha256(repr(export.units).encode("utf-8", "surrogateescape")).hexdigest()
        with gc_paused():
            dataset = cached(data.cache, annotations, files, reading, read, tell, export.files, way, units)
        return dataset._replace(notes=(*export.notes, *dataset.notes))
    except Fault as fault:
        found.add(fault.code, str(fault))
    except OSError as error:
        found.add("json-unreadable", f"{annotations}: cannot read the annotations: {error.strerror}")
    return Dataset(str(annotations), (), (), [], found.listed())


def _inspect(export: Export, annotations: Path, files: ImageFolder, reading: Reading, found: Findings) -> Dataset:
    for code, words in export.findings:
        found.add(code, words)
    parts = list(_parts(export, files, reading))
    names = export.classes or tuple(sorted({name for part in parts for name in part.names}))
    images: list[Image] = []
    columns: list[Columns] = []
    num_pictures = num_objects = 0
    for part in parts:
        place = np.array([0, *(names.index(name) + 1 for name in part.names)], dtype=np.int64)
        images += [image._replace(image_id=image.image_id + num_pictures) for image in part.images]
        columns.append(part.columns._replace(
            image_ids=part.columns.image_ids + num_pictures,
            category_ids=part.columns.category_ids if export.classes else place[part.columns.category_ids],
            annotation_ids=part.columns.annotation_ids + num_objects,
        ))  # fmt: skip
        found.take(_shifted(part.findings, num_pictures))
        files.look_into(part.subfolders)
        num_pictures += part.num
        num_objects += int(part.columns.all_ids.max(initial=0))
    _note_twins(images, found)
    named = dict(enumerate(names, start=1))
    dataset = assemble(str(annotations), images, named, end_to_end(columns), files.home, reading, found)
    findings = tuple(finding for finding in dataset.findings if finding.code not in USUAL)
    return dataset._replace(findings=in_order(findings), declared=export.classes is not None)


def _shifted(findings: tuple[Finding, ...], by: int) -> Iterator[Finding]:
    """Renumber the images of findings; drop `file-twice`, which `_note_twins` finds for all parts."""
    for finding in (finding for finding in findings if finding.code != "file-twice"):
        yield finding._replace(image_ids=tuple(number + by for number in finding.image_ids))


def _note_twins(images: list[Image], found: Findings) -> None:
    """Note pictures that occur twice, in one part or in two."""
    owners: dict[str, str] = {}
    for image in images:
        if image.path in owners:
            found.add("file-twice", f"{brief(image.file_name)} is also {brief(owners[image.path])}", image.image_id)
        owners.setdefault(image.path, image.file_name)


def _parts(export: Export, files: ImageFolder, reading: Reading) -> Iterator[Part]:
    """Parse and check the units of an export, in processes if there are many.  Raises MachineError if one is killed."""
    starts = range(0, len(export.units), PART)
    read = partial(_read_part, export, files, reading)
    return iter([read(0)]) if len(starts) < 2 else read_in_processes(read, starts, export.images)


def _read_part(export: Export, files: ImageFolder, reading: Reading, start: int) -> Part:
    """Parse and check PART units."""
    found = Findings()

    def size_of(file_name: str) -> tuple[int, int]:
        path = files.find(file_name, suggest=found.wants_example("file-missing")).path
        return picture_size(files.home / path, reading)

    pictures: list[Picture] = []
    for unit in export.units[start : start + PART]:
        try:
            pictures += export.parse(unit, size_of)
        except Fault as fault:
            found.add(fault.code, str(fault))
    names = {name: number for number, name in enumerate(export.classes or (), start=1)}
    items: list[dict[str, Any]] = []
    entries = []
    for number, picture in enumerate(pictures, start=1):
        for code, words in picture.findings:
            found.add(code, words, number)
        try:
            height, width = picture.size or size_of(picture.file_name)
        except Fault as fault:
            found.add(fault.code, f"{brief(picture.file_name)} {fault}")
            continue
        entries.append({
            "id": number, PLACE: brief(picture.file_name), "file_name": picture.file_name, "height": height,
            "width": width,
        })  # fmt: skip
        for item in picture.objects:
            if export.classes is None:
                names.setdefault(item["category"], len(names) + 1)
            values = {key: value for key, value in item.items() if key not in ("category", "place")}
            items.append(values | {
                "id": len(items) + 1, "image_id": number, "category_id": names.get(item["category"], 0),
                CATEGORY: item["category"], PLACE: item.get("place"),
            })  # fmt: skip
    images, sizes = read_images(entries, files, reading, found)
    columns = read_columns(items, Known.of(sizes, names.values()), found)
    return Part(
        len(pictures), images, [] if export.classes else list(names), columns, found.listed(), files.subfolders()
    )
