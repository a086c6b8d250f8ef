"""`gndet check`: what is wrong with a data set, all of it, before a GPU is waited for.

The reader is the checker (gndet/data/faults.py holds the outcomes); this reads both sets of a config, or one file,
looks at the pictures if asked to, and reports. Nothing is written but what is asked for, never among the user's data.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gndet.config import Config, DataConfig, DatasetConfig
from gndet.config_file import load_config, with_overrides
from gndet.contact_sheet import contact_sheet
from gndet.data import between, find_objects, inspect_dataset, whole
from gndet.data.cache import keep_pictures
from gndet.data.coco import inspect_file
from gndet.data.faults import REFUSED, SEVERITIES, Findings, describe, in_order, skipping_unreadable
from gndet.data.pictures import Picture, look_at_all, processors
from gndet.errors import OutputError
from gndet.structures import Dataset, Finding
from gndet.visualize import save_picture

LISTED_CLASSES = 100  # more are counted only
SMALL, LARGE = 32**2, 96**2  # pixels of area, as COCO's metric divides objects

Show = Callable[[str], None]


class Checked(NamedTuple):
    """A data set as it was found."""

    which: str  # train, val, or "" for a file of its own
    dataset: Dataset
    folder: Path | None  # of its pictures; None where they are not looked for


def check(
    source: str, overrides: Sequence[str], show: Show, *, image_folder: Path | None = None, images: bool = False,
    sheet: Path | None = None, out: Path | None = None, console: Console | None = None,
) -> bool:  # fmt: skip
    """Check the data of a config (.yaml, .yml) or a COCO JSON file; show what is found, line by line.

    image_folder: of a JSON file's pictures, looked for beside it by default.  images: decode every picture.
    sheet: file for a picture of the data.  out: file for the report as JSON.  console: a terminal for a progress bar.
    Returns whether nothing is refused.  Raises ConfigError and OutputError, never for what is wrong with the data.
    """
    sets, data, both = _read(source, overrides, image_folder, show)
    for file in filter(None, (sheet, out)):
        _refuse_among_data(file, source, sets)
    if images:
        sets, more = look_at_pictures(sets, data, show, console)
        both = in_order([*both, *more])
    for one in sets:
        for line in report(one):
            show(line)
    if both:
        show("\ntrain and val together")
        for line in finding_lines(both):
            show(line)
    findings = [finding for one in sets for finding in one.dataset.findings] + list(both)
    refused = [one for one in findings if one.severity == REFUSED]
    _write(sets, both, sheet, out, show)
    kinds = ", ".join(dict.fromkeys(one.code for one in refused))
    show(f"\nrefused: {kinds}" if refused else "\nnothing is refused")
    return not refused


def _read(
    source: str, overrides: Sequence[str], image_folder: Path | None, show: Show
) -> tuple[list[Checked], DataConfig, tuple[Finding, ...]]:
    """Read what is to be checked: both sets of a config with what is wrong between them, or one file."""
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        cfg = load_config(source, overrides)
        parts = {"train": cfg.data.train, "val": cfg.data.val}
        if image_folder is not None:
            raise OutputError(f"--image-folder {image_folder}: is for a JSON file; {source} names its own folders")
        sets = []
        for which, part in parts.items():
            dataset = inspect_dataset(part, cfg.data, masks=cfg.model.masks and which == "train")
            if which == "train" and not cfg.data.keep_empty:
                dataset = find_objects(dataset)
            sets.append(Checked(which, dataset, Path(cfg.data.root) / part.images if part.kind == "coco" else None))
        train, val = sets
        return sets, cfg.data, between(train.dataset, val.dataset, train.folder, val.folder)
    data = with_overrides(Config(), overrides, "the defaults").data
    path = Path(source)
    folder = image_folder or guess_folder(path)
    if folder is None:
        show(f"{path}: no folder beside it holds its pictures; the annotations alone are checked (--image-folder)")
        return [Checked("", inspect_file(path, None, data), None)], data, ()
    if image_folder is None:
        show(f"{path}: the pictures are looked for in {folder} (--image-folder gives another)")
    cfg = DatasetConfig(annotations=str(path.absolute()), images=str(folder.absolute()))
    return [Checked("", inspect_dataset(cfg, data), folder)], data, ()


def guess_folder(path: Path) -> Path | None:
    """The folder, beside a JSON file or its folder, that has the first picture it names; None where there is none.

    For annotations/instances_train2017.json these are train2017, images/train2017 and images, then all others.
    """
    try:
        text = path.read_bytes() if path.is_file() else b""
        found = re.search(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text)
        name = json.loads(found[1]) if found else ""
        stem = path.stem.split("_", 1)[-1]
        for base in (path.absolute().parent, path.absolute().parent.parent):
            usual = [base / stem, base / "images" / stem, base / "images", base / path.stem, base]
            others = sorted(folder for folder in base.iterdir() if folder.is_dir())
            for folder in [*usual, *others]:
                if name and not Path(name).is_absolute() and ".." not in Path(name).parts and (folder / name).is_file():
                    return folder
    except (OSError, ValueError):  # what cannot be read is told by the reader
        pass
    return None


# --- pictures


def look_at_pictures(
    sets: list[Checked], data: DataConfig, show: Show, console: Console | None
) -> tuple[list[Checked], tuple[Finding, ...]]:
    """Decode every picture of the sets.  Returns them with what was found, and what was found in both."""
    looked: list[Checked] = []
    both, first_with = Findings(), {}
    for which, dataset, folder in sets:
        if folder is None or not len(dataset.records):
            looked.append(Checked(which, dataset, folder))
            continue
        found = Findings()
        pictures = [Picture(dataset.records.path(i), r.size, data.max_pixels) for i, r in enumerate(dataset.records)]
        ids = [record.image_id for record in dataset.records]
        looks, title = look_at_all(pictures, processors()), f"{which} pictures".strip()
        looks = _with_progress(looks, len(pictures), title, show, console)
        for look in sorted(looks, key=lambda look: look.place):  # they end in any order
            for code, words in look.faults:
                if code != "file-empty":  # the listing of the folder has told
                    found.add(code, f"image {ids[look.place]}: {words}", ids[look.place])
            path = pictures[look.place].path
            other = first_with.setdefault(look.digest, (which, path)) if look.digest else (which, path)
            if other[1] != path:
                into, code = (found, "picture-twice") if other[0] == which else (both, "picture-in-both")
                into.add(code, f"image {ids[look.place]}: {path} is equal to {other[1]}", ids[look.place])
        keep_pictures(whole(dataset.records), found.listed())
        earlier = [one for one in dataset.findings if not one.code.startswith("picture-")]
        new = skipping_unreadable(found.listed()) if data.skip_unreadable else found.listed()
        dataset = dataset._replace(findings=in_order([*earlier, *new]), notes=(f"{len(pictures)} pictures decoded",))
        looked.append(Checked(which, dataset, folder))
    return looked, both.listed()


def _with_progress(items: Iterator[Any], total: int, title: str, show: Show, console: Console | None) -> Iterator[Any]:
    """Pass items on; on a terminal a bar shows how many, else a line at each tenth."""
    if console is None or not console.is_terminal:
        for count, item in enumerate(items, start=1):
            yield item
            if count * 10 // total > (count - 1) * 10 // total:
                show(f"{title}: {count} of {total} decoded")
        return
    columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task)


# --- what is shown and written


def report(checked: Checked) -> list[str]:
    """A data set in lines: what is wrong, then what is in it."""
    dataset = checked.dataset
    lines = [f"\n{checked.which}: {dataset.name}" if checked.which else f"\n{dataset.name}"]
    lines += [f"  {note}" for note in dataset.notes]
    return [*lines, *finding_lines(dataset.findings), *summary_lines(summarize(dataset))]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings in lines, under their severity."""
    lines = []
    for severity, title in SEVERITIES.items():
        some = [one for one in findings if one.severity == severity]
        lines += [f"  {title}"] if some else []
        for first, *others in map(describe, some):
            lines += [f"    {severity} {first}", *(f"      {line}" for line in others)]
    return lines


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Count what is in a data set: images, sizes (width, height), objects, classes."""
    sizes: set[tuple[int, int]] = set()
    of_image, areas, crowd = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for record in dataset.records:
        sizes.add(record.size[::-1])
        of_image.append(record.labels)
        areas.append(record.area)
        crowd += int(np.count_nonzero(record.crowd))
    labels, counts = np.concatenate(of_image), list(map(len, of_image[1:]))
    pairs = np.unique(np.repeat(np.arange(len(counts)), counts) * max(len(dataset.classes), 1) + labels)
    objects = np.bincount(labels, minlength=len(dataset.classes)).tolist()
    images = np.bincount(pairs % max(len(dataset.classes), 1), minlength=len(dataset.classes)).tolist()
    classes = zip(dataset.category_ids, dataset.classes, objects, images, strict=True)
    return {
        "images": len(counts), "sizes": len(sizes), "smallest": min(sizes, default=None, key=np.prod),
        "largest": max(sizes, default=None, key=np.prod), "objects": len(labels), "crowd_regions": crowd,
        "most_objects": max(counts, default=0),
        "small_medium_large": np.histogram(np.concatenate(areas), [0, SMALL, LARGE, np.inf])[0].tolist(),
        "classes": [{"id": id, "name": name, "objects": n, "images": m} for id, name, n, m in classes],
    }  # fmt: skip


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """A summary in lines."""
    if not summary["images"]:
        return ["  no image is left"]
    (w, h), (wide, high), total = summary["smallest"], summary["largest"], max(summary["objects"], 1)
    sizes = f"{w} x {h}" if summary["sizes"] == 1 else f"{w} x {h} to {wide} x {high} (in {summary['sizes']} sizes)"
    small, medium, large = (f"{100 * count / total:.0f} %" for count in summary["small_medium_large"])
    lines = [
        f"  {summary['images']} images of {sizes} pixels, {summary['objects']} objects, "
        f"{summary['objects'] / summary['images']:.1f} an image, {summary['most_objects']} at the most",
        f"  {small} of the objects small (area under 32 x 32 pixels), {medium} medium, {large} large (from 96 x 96 on)",
    ]
    rows = [["label", "id", "objects", "images", "class"]]
    for label, one in enumerate(summary["classes"][:LISTED_CLASSES]):
        rows.append([str(label), str(one["id"]), str(one["objects"]), str(one["images"]), one["name"]])
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines += ["  " + "  ".join([*map(str.rjust, row, widths), row[-1]]) for row in rows]
    left = len(summary["classes"]) - LISTED_CLASSES
    return lines + ([f"  and {left} classes more"] if left > 0 else [])


def _refuse_among_data(file: Path, source: str, sets: list[Checked]) -> None:
    """Make a result file's folder.  Raises OutputError where that cannot be, or it would lie among the user's data."""
    for folder in [one.folder for one in sets if one.folder is not None]:
        if file.resolve().is_relative_to(folder.resolve()) or file.resolve() == Path(source).resolve():
            raise OutputError(f"{file}: lies among your data ({folder}), where nothing is written; choose another")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{file}: cannot make its folder: {error.strerror}") from None
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{file}: cannot be written, expected the name of a file in a folder that can")


def _write(sets: list[Checked], both: Sequence[Finding], sheet: Path | None, out: Path | None, show: Show) -> None:
    """Write the contact sheet and the report as JSON.  Raises OutputError."""
    try:
        if sheet is not None:
            shown = [(one.which, one.dataset) for one in sets if one.folder is not None or one.which]
            picture = contact_sheet(shown)
            if picture is None:
                show(f"\nno picture is left to be drawn: {sheet} is not written")
            else:
                save_picture(sheet, picture)
                show(f"\npictures -> {sheet}")
        if out is not None:
            out.write_text(json.dumps(to_json(sets, both), indent=1, ensure_ascii=False), encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise OutputError(f"{sheet or out}: cannot write: {error}") from None


def to_json(sets: list[Checked], both: Sequence[Finding]) -> dict[str, Any]:
    """The report: {"refused": bool, "sets": [{"name", "set", "findings", "summary", ...}], "both": findings}."""
    findings = [finding for one in sets for finding in one.dataset.findings] + list(both)
    return {
        "refused": any(one.severity == REFUSED for one in findings),
        "sets": [
            {
                "set": one.which, "annotations": one.dataset.name, "images": str(one.folder) if one.folder else None,
                "findings": [_plain(finding) for finding in one.dataset.findings], "notes": list(one.dataset.notes),
                "summary": summarize(one.dataset),
            }
            for one in sets
        ],
        "both": [_plain(finding) for finding in both],
    }  # fmt: skip


def _plain(finding: Finding) -> dict[str, Any]:
    return finding._asdict() | {"outcome": SEVERITIES[finding.severity]}
