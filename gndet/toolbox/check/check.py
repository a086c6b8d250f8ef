"""`gndet check`: list everything that is wrong with a data set, before training waits for a GPU.

The data readers do the checking (`datasets/faults.py` holds the outcomes).  This file reads both sets of a config, or
all sets of a folder or file, decodes the pictures on request, and reports.  It writes only the requested files, and
never among the user's data.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from gndet.config.data import DataConfig
from gndet.config.loading import config_files, find_config, load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.classes import with_common_classes
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.comparing import between
from gndet.data.datasets.faults import REFUSED, Fault, Findings, in_order
from gndet.data.datasets.formats import is_config
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.layout import Source, sets_at
from gndet.data.datasets.packed import PackedRecords
from gndet.data.datasets.plausible import limit_notes
from gndet.data.datasets.reading import as_configured, inspect_both, inspect_source, user_paths, without_masks
from gndet.data.records import Dataset
from gndet.errors import ConfigError, OutputError, in_one_line
from gndet.evaluation.drawing import refuse_drawing, save_marked
from gndet.files import is_same, refuse_output, report_kind, write_whole
from gndet.text import text_table
from gndet.toolbox.check.pictures import contact_sheet, decode_pictures
from gndet.toolbox.check.report import Checked, finding_lines, json_report, report_lines

ALONE = (  # options that matter for data checked without a config
    "data.cache", "data.classes", "data.exif", "data.follow_links", "data.max_pixels", "data.max_unreadable",
    "data.pixel_range",
    "data.skip_unreadable", "model.masks",
)  # fmt: skip
REMEDIES = {  # for data checked without a config
    "json-unreadable": "expected an annotation file, a data folder, or a config (.yaml)",
    "data-unknown": "expected a data folder, an annotation file, or a config (.yaml)",
    "set-twice": "check each of them by itself",
    "folder-missing": "--image-folder names the folder of the pictures",
    "file-foreign": "--image-folder names the folder of the pictures; they are found by the last part of the name",
    "file-missing": "does --image-folder name their folder? upper and lower case matter",
}

Show = Callable[[str], None]


class Plan(NamedTuple):
    """What to check; nothing has been read yet."""

    data: DataConfig
    masks: bool | None  # model.masks; None if not given
    sources: dict[str, Source] | None  # of a folder or file, by set ("" if it has no name); None for a config
    kept: list[Path]  # the user's files and folders; nothing is written onto one or into one
    fault: Fault | None = None  # why a folder or file has no sets
    cfg: Config | None = None  # whose limits the data may exceed


def check(
    source: str, overrides: Sequence[str], show: Show, *, image_folder: Path | None = None, images: bool = False,
    sheet: Path | None = None, out: Path | None = None, console: Console | None = None,
) -> bool:  # fmt: skip
    """Check the data of a config, a folder or an annotation file, and show the findings line by line.

    image_folder: the pictures of a file; by default, a folder near it is used.  images: decode every picture.
    sheet: file for a picture of the data.  out: file for the report as JSON.  console: a terminal for a progress bar.
    Returns whether nothing is refused.  Raises ConfigError and OutputError, but never for a fault of the data.
    """
    plan = _plan(source, overrides, image_folder, show)
    _refuse_outputs(plan, sheet, out)
    sets = _read_both(plan, show) if plan.sources is None else _read_alone(plan, plan.sources, show)
    option = "--images" if images else "--sheet" if sheet else ""
    for checked in sets if option and plan.sources else ():
        if checked.folder is None and checked.dataset.classes:
            raise OutputError(f"{checked.dataset.name}: {option} needs the pictures; --image-folder names them")
    if images:
        sets = [decode_pictures(checked, plan.data, show, console) for checked in sets]
    named = {checked.name: checked.dataset for checked in sets}
    both = between(named["train"], named["val"]) if {"train", "val"} <= named.keys() else ()
    for checked in sets:
        for line in report_lines(checked):
            show(line)
    notes = limit_notes(named["train"], named["val"], plan.cfg) if plan.cfg else []
    if both or notes:
        show("\ntrain and val together")
        for line in (*finding_lines(both), *(f"  note: {note}" for note in notes)):
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
    if is_config(path):
        return _plan_config(source, overrides, image_folder)
    for text in overrides:
        if text.partition("=")[0].strip() not in ALONE:
            raise ConfigError(f"override {text!r}: has no effect on data without a config; {', '.join(ALONE)} do")
    cfg = with_overrides(Config(), overrides, "the defaults")
    masks = cfg.model.masks if any(text.startswith("model.masks") for text in overrides) else None
    folder = Path(os.path.expanduser(image_folder)).absolute() if image_folder else None
    try:
        sources = sets_at(path, folder)
    except Fault as fault:
        return Plan(cfg.data, masks, {"": Source("", path)}, [] if path.is_dir() else [path], fault)
    if folder is not None and path.is_dir():
        sources = {name: found._replace(images=folder) for name, found in sources.items()}
    for name, found in sources.items():
        if found.kind == "coco" and found.images is None and (near := guess_folder(found.annotations)):
            if not path.is_dir():  # otherwise a table shows it
                show(f"{path}: looking for its pictures in {near} (--image-folder names another)")
            sources[name] = found._replace(images=near.absolute())
    folders = [path] if path.is_dir() else [found.images for found in sources.values() if found.images]
    kept = [path, *(found.annotations for found in sources.values()), *folders]
    return Plan(cfg.data, masks, sources, kept)


def _plan_config(source: str, overrides: Sequence[str], image_folder: Path | None) -> Plan:
    cfg = load_config(source, overrides)
    if image_folder is not None:
        raise OutputError(f"--image-folder {image_folder}: is only for data without a config; {source} names its own")
    kept = [*config_files(find_config(source)), *user_paths(cfg.data)]
    return Plan(cfg.data, cfg.model.masks, None, kept, cfg=cfg)


def _read_both(plan: Plan, show: Show) -> list[Checked]:
    sets = zip(("train", "val"), inspect_both(plan.data, masks=bool(plan.masks), tell=show), strict=True)
    return [Checked(name, dataset, _pictures_of(dataset)) for name, dataset in sets]


def _read_alone(plan: Plan, sources: dict[str, Source], show: Show) -> list[Checked]:
    """Read the sets of a folder or file; show which file was taken for what."""
    if plan.fault is not None:
        found = Findings()
        found.add(plan.fault.code, str(plan.fault))
        return [_remedied(Checked("", Dataset(str(sources[""].annotations), (), (), [], found.listed()), None))]
    datasets = {name: _read_source(source, plan, show) for name, source in sources.items()}
    rows, sets = [("set", "format", "annotations", "pictures", "images")], []
    for name, dataset in with_common_classes(datasets).items():
        dataset = as_configured(dataset, None, plan.data, masks=bool(plan.masks))
        if plan.masks is False:
            dataset = without_masks(dataset)
        folder = sources[name].images if sources[name].kind == "coco" else _pictures_of(dataset)
        sets.append(_remedied(Checked(name, dataset, folder)))
        kind, annotations, *_ = sources[name]
        pictures = str(folder) if folder else "not found"
        rows.append((name or "all", kind, str(annotations), pictures, str(len(dataset.records))))
    for line in text_table(rows, left=range(4)).splitlines():
        show(line)
    return sets


def _remedied(checked: Checked) -> Checked:
    """Give findings the remedies of data without a config; refuse names that no folder of pictures can have."""
    changed = []
    for finding in checked.dataset.findings:
        severity = REFUSED if finding.code == "file-foreign" else finding.severity
        changed.append(finding._replace(remedy=REMEDIES.get(finding.code, finding.remedy), severity=severity))
    return checked._replace(dataset=checked.dataset._replace(findings=in_order(changed)))


def _read_source(source: Source, plan: Plan, show: Show) -> Dataset:
    if source.kind != "coco" or source.images is not None:
        return inspect_source(source, plan.data, show)
    dataset = inspect_file(source.annotations, None, plan.data, show)
    if dataset.classes:
        unseen = "only annotations are checked (--image-folder names it)"
        show(f"{source.annotations}: no folder near it has its pictures; {unseen}")
    return dataset


def _pictures_of(dataset: Dataset) -> Path | None:
    """Return the folder of the pictures; None if they are drawn, or none is left."""
    return dataset.records.folder if isinstance(dataset.records, PackedRecords) else None


def _refuse_outputs(plan: Plan, sheet: Path | None, out: Path | None) -> None:
    """Raise OutputError for a result that cannot be written, or that would overwrite one of the user's files."""
    if sheet and out and is_same(sheet, out):
        raise OutputError(f"{out}: is given to --sheet and to --json, expected two different files")
    if sheet:
        refuse_drawing(sheet, "--sheet", plan.kept)
    if out:
        refuse_output(out, "--json", report_kind("check"), plan.kept)


def _write_sheet(sets: list[Checked], sheet: Path, show: Show) -> None:
    """Draw and write the contact sheet; say so if that fails.  Raises OutputError."""
    shown, picture = [checked for checked in sets if checked.has_pictures], None
    reason = "no image is left to draw" if shown else "there is no image folder to draw from"
    try:
        picture = contact_sheet([(checked.name, checked.dataset) for checked in shown])
    except Exception as error:  # what was found stands
        reason = f"the pictures could not be drawn: {in_one_line(error)}"
    if picture is None:
        show(f"\n{reason}: {sheet} is not written")
        return
    save_marked(sheet, picture)
    show(f"\npictures -> {sheet}")
