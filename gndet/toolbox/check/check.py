"""`gndet check`: list everything that is wrong with a data set, before training waits for a GPU.

The data readers do the checking (`datasets/faults.py` holds the outcomes).  This file reads both sets of a config, or
one JSON file, decodes the pictures on request, and reports.  It writes only the requested files, and never among the
user's data.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.console import Console

from gndet.config.loading import config_files, find_config, load_config, with_overrides
from gndet.config.schema import Config, DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import REFUSED
from gndet.data.datasets.image_folder import PICTURE, read_head, what_is
from gndet.data.datasets.reading import as_configured, between, inspect_both, without_masks
from gndet.data.records import Dataset
from gndet.errors import ConfigError, OutputError
from gndet.evaluation.drawing import save_picture
from gndet.files import make_room_for, write_whole
from gndet.toolbox.check.pictures import contact_sheet, decode_pictures
from gndet.toolbox.check.report import Checked, finding_lines, json_report, report_lines

NAMES_TRIED = 100  # file names of a JSON file to try when looking for its image folder
ALONE = (  # options that matter for a JSON file checked by itself
    "data.cache", "data.classes", "data.exif", "data.max_pixels", "data.max_unreadable", "data.pixel_range",
    "data.skip_unreadable", "model.masks",
)  # fmt: skip
REMEDIES = {  # for a JSON file checked by itself, without a config
    "json-unreadable": "expected the JSON file or a config (.yaml)",
    "folder-missing": "--image-folder names the folder of the pictures",
    "file-missing": "does --image-folder name their folder? upper and lower case matter",
}

Show = Callable[[str], None]


class Plan(NamedTuple):
    """What to check; nothing has been read yet."""

    data: DataConfig
    masks: bool | None  # model.masks; None if not given
    path: Path | None  # a JSON file checked by itself
    folders: dict[str, Path]  # of the pictures, by train, val, or "" for a JSON file by itself
    kept: list[Path]  # the user's files, never overwritten


def check(
    source: str, overrides: Sequence[str], show: Show, *, image_folder: Path | None = None, images: bool = False,
    sheet: Path | None = None, out: Path | None = None, console: Console | None = None,
) -> bool:  # fmt: skip
    """Check the data of a config or a COCO JSON file, and show the findings line by line.

    image_folder: the pictures of a JSON file; by default, a folder near it is used.  images: decode every picture.
    sheet: file for a picture of the data.  out: file for the report as JSON.  console: a terminal for a progress bar.
    Returns whether nothing is refused.  Raises ConfigError and OutputError, but never for a fault of the data.
    """
    plan = _plan(source, overrides, image_folder, show)
    _refuse_outputs(plan, sheet, out)
    sets = [_read_alone(plan, show)] if plan.path else _read_both(plan, show)
    option = "--images" if images else "--sheet" if sheet else ""
    if option and plan.path and not plan.folders and sets[0].dataset.classes:
        raise OutputError(f"{plan.path}: {option} needs the pictures; --image-folder names them")
    if images:
        sets = [decode_pictures(checked, plan.data, show, console) for checked in sets]
    both = between(sets[0].dataset, sets[1].dataset) if len(sets) == 2 else ()
    for checked in sets:
        for line in report_lines(checked):
            show(line)
    if both:
        show("\ntrain and val together")
        for line in finding_lines(both):
            show(line)
    findings = [*(finding for checked in sets for finding in checked.dataset.findings), *both]
    refused = list(dict.fromkeys(finding.code for finding in findings if finding.severity == REFUSED))
    if out:
        write_whole(out, json.dumps(json_report(sets, both, refused=bool(refused)), indent=1))
        show(f"\nreport -> {out}")
    if sheet:
        _write_sheet(sets, sheet, show)
    show(f"\nrefused: {', '.join(refused)}" if refused else "\nnothing is refused")
    return not refused


def _plan(source: str, overrides: Sequence[str], image_folder: Path | None, show: Show) -> Plan:
    """Decide what to check.  Raises ConfigError and OutputError."""
    path = find_config(source)
    if path.suffix.lower() in (".yaml", ".yml"):
        cfg = load_config(source, overrides)
        if image_folder is not None:
            raise OutputError(f"--image-folder {image_folder}: is only for a JSON file; {source} names its own folders")
        parts = {"train": cfg.data.train, "val": cfg.data.val}
        parts = {which: part for which, part in parts.items() if part.kind == "coco"}
        root = Path(cfg.data.root)
        folders = {which: root / part.images for which, part in parts.items()}
        kept = [*config_files(path), *(root / part.annotations for part in parts.values())]
        return Plan(cfg.data, cfg.model.masks, None, folders, kept)
    for text in overrides:
        if text.partition("=")[0].strip() not in ALONE:
            raise ConfigError(f"override {text!r}: has no effect on a JSON file by itself; {', '.join(ALONE)} do")
    cfg = with_overrides(Config(), overrides, "the defaults")
    masks = cfg.model.masks if any(text.startswith("model.masks") for text in overrides) else None
    folder = image_folder or guess_folder(path)
    if folder is not None and image_folder is None:
        show(f"{path}: looking for its pictures in {folder} (--image-folder names another)")
    return Plan(cfg.data, masks, path, {"": folder.absolute()} if folder else {}, [path])


def _read_both(plan: Plan, show: Show) -> list[Checked]:
    train, val = inspect_both(plan.data, masks=bool(plan.masks), tell=show)
    return [Checked("train", train, plan.folders.get("train")), Checked("val", val, plan.folders.get("val"))]


def _read_alone(plan: Plan, show: Show) -> Checked:
    folder = plan.folders.get("")
    assert plan.path is not None
    dataset: Dataset = inspect_file(plan.path, folder, plan.data, show)
    if folder is None and dataset.classes:
        show(f"{plan.path}: no folder near it has its pictures; only annotations are checked (--image-folder names it)")
    dataset = as_configured(dataset, None, plan.data, masks=bool(plan.masks))
    if plan.masks is False:
        dataset = without_masks(dataset)
    findings = (finding._replace(remedy=REMEDIES.get(finding.code, finding.remedy)) for finding in dataset.findings)
    return Checked("", dataset._replace(findings=tuple(findings)), folder)


def guess_folder(path: Path) -> Path | None:
    """Find a folder, beside a JSON file or its folder, that has one of its pictures or is named after it.

    For annotations/instances_train2017.json, try train2017, images/train2017 and images first, then all others.
    """
    stem = path.stem.split("_", 1)[-1]
    with suppress(OSError):  # the reader reports what it cannot read
        names, named = _first_names(path), []
        for base in path.absolute().parents[:2] if names else ():
            alike = [base / stem, base / "images" / stem]
            named += alike
            for folder in [*alike, base / "images", base / path.stem, base, *sorted(base.iterdir())]:
                if any(os.path.isfile(folder / name) for name in names):
                    return folder
        return next(filter(Path.is_dir, named), None)
    return None


def _first_names(path: Path) -> list[str]:
    """List the first pictures that a JSON file names, except names that cannot be in a folder beside it."""
    text, names = path.read_bytes() if path.is_file() else b"", []
    for found in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text):
        try:
            name = json.loads(found[1])
        except ValueError:
            continue
        if name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts:
            names.append(name.encode("utf-8", "replace").decode())
        if len(names) == NAMES_TRIED:
            break
    return names


def _refuse_outputs(plan: Plan, sheet: Path | None, out: Path | None) -> None:
    """Raise OutputError for a result that cannot be written, or that would overwrite one of the user's files."""
    if sheet and out and _is_same(sheet, out):
        raise OutputError(f"{out}: is given to --sheet and to --json, expected two different files")
    for file in filter(None, (sheet, out)):
        for kept in plan.kept:
            if _is_same(file, kept):
                raise OutputError(f"{file}: is among your data ({kept}); gndet writes nothing there, choose another")
        for folder in plan.folders.values():
            if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
                raise OutputError(f"{file}: is among your data ({folder}); gndet writes nothing there, choose another")
    if sheet is not None:
        known = Image.registered_extensions()
        if known.get(sheet.suffix.lower()) not in Image.SAVE:
            raise OutputError(f"{sheet}: cannot write a picture of this kind, expected a name like sheet.png")
        if sheet.is_file() and (head := read_head(sheet)) and what_is(head) != PICTURE:
            raise OutputError(f"{sheet}: exists and is not a picture; choose another file")
    if out is not None and out.is_file() and (head := read_head(out)) and b'"refused"' not in head[:20]:
        raise OutputError(f"{out}: exists and is not a report of gndet check; choose another file")
    if sheet is not None:
        make_room_for(sheet, "--sheet")
    if out is not None:
        make_room_for(out, "--json")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


def _write_sheet(sets: list[Checked], sheet: Path, show: Show) -> None:
    """Draw and write the contact sheet.  Raises OutputError."""
    shown = [checked for checked in sets if checked.has_pictures]
    picture = contact_sheet([(checked.name, checked.dataset) for checked in shown])
    if picture is None:
        reason = "no image is left to draw" if shown else "there is no image folder to draw from"
        show(f"\n{reason}: {sheet} is not written")
        return
    try:
        save_picture(sheet, picture)
    except (OSError, ValueError) as error:
        raise OutputError(f"{sheet}: cannot write the picture: {error}") from None
    show(f"\npictures -> {sheet}")
