"""`gndet report`: write one HTML page that shows a run's data, its training, its mistakes and its norm layers."""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from gndet.config.loading import load_config
from gndet.data.datasets.reading import user_paths
from gndet.errors import ConfigError, DataError, in_one_line
from gndet.files import Kind, refuse_output, write_whole
from gndet.toolbox.analysis.study_results import is_study, read_study
from gndet.toolbox.report import (
    batches,
    blocks,
    compare,
    confusion,
    labels,
    mistakes,
    norms,
    overview,
    quality,
    setup,
    study,
    training,
)  # fmt: skip
from gndet.toolbox.report.blocks import Section, escape
from gndet.toolbox.report.record import WEIGHTS, RunRecord, read_run
from gndet.training.run_folder import CONFIG, REPORT

OF_DETECTION = ("quality", "errors", "pictures", "data")  # sections that a classifier has no use for
T = TypeVar("T")
PAGE = Kind("a page of gndet report", rb'<meta name="generator" content="gndet">')

Show = Callable[[str], None]
SECTIONS: dict[str, tuple[str, Callable[[RunRecord], Section | None]]] = {  # of a run: id, title, what makes it
    "summary": ("Summary", overview.section), "training": ("Training", training.section),
    "quality": ("Detections", quality.section), "errors": ("Mistakes", mistakes.section),
    "pictures": ("Validation pictures", mistakes.pictures_section), "confusion": ("Classes", confusion.section),
    "norms": (norms.TITLE, lambda run: norms.section(run.folder)), "data": ("Data", labels.section),
    "batches": ("Training batches", batches.section), "setup": ("How it was made", setup.section),
}  # fmt: skip


def write_report(folders: Sequence[Path], out: Path | None, overrides: Sequence[str], show: Show) -> Path:
    """Write the report of a run, of several runs compared, or of a norm study; return its path.

    folders: run folders, or the folder of one study.  out: file to write; by default report.html in the folder, or
    comparison.html in the first of several folders.  overrides: changes to the runs' configs, e.g. if data has moved.
    Raises DataError for a folder without a run, ConfigError, and OutputError if the file cannot be written.
    """
    path = out or folders[0] / (REPORT if len(folders) == 1 else "comparison.html")
    if out or path.parent.is_dir():
        refuse_output(path, "--out", PAGE, _data_of(folders, overrides) if out else ())
    if any(map(is_study, folders)):
        if len(folders) > 1:
            raise DataError("a report covers one norm study alone; to compare its runs, name folders of its cells/")
        if overrides:
            raise ConfigError(f"override {overrides[0]!r}: has no effect on the report of a norm study")
        html = study_page(folders[0], show)
    elif len(folders) == 1:
        html = run_page(folders[0], overrides, show)
    else:
        html = comparison_page(folders, overrides, show)
    write_whole(path, html)
    show(f"report -> {path} ({len(html.encode()) / 1e3:,.0f} kB; opens from disk in any browser)")
    return path


def _data_of(folders: Sequence[Path], overrides: Sequence[str]) -> list[Path]:
    """Return the files and folders of the runs' data."""
    configs = [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()]
    return [path for config in configs for path in user_paths(load_config(config, overrides).data)]


def made(kinds: Mapping[str, tuple[str, Callable[[T], Section | None]]], subject: T, show: Show) -> list[Section]:
    """Make the sections of a page; where one fails, for whatever reason, a notice stands, and `show` gets a line."""
    sections = []
    for id, (title, make) in kinds.items():
        try:
            sections += [section] if (section := make(subject)) else []
        except Exception as error:  # the other sections stand
            show(f"report: the section {title} could not be made: {in_one_line(error)}")
            sections.append(blocks.failed(id, title, error))
    return sections


def _read(folder: Path, overrides: Sequence[str], show: Show) -> RunRecord:
    """Read a run; `show` gets a line if its weights are not finite."""
    run = read_run(folder, overrides)
    for line in run.missing:
        if line.startswith(WEIGHTS):
            show(f"report: no {line}")
    return run


def run_page(folder: Path, overrides: Sequence[str], show: Show) -> str:
    """Return the page of one run."""
    run = _read(folder, overrides, show)
    val = f" on {run.val_set.name}" if run.val_set else ""
    left_out = OF_DETECTION if run.cfg.task == "classification" else ("confusion",)
    kinds = {id: kind for id, kind in SECTIONS.items() if id not in left_out}
    return page(f"gndet: {folder.absolute().name}", f"{folder}{val}", made(kinds, run, show))


def comparison_page(folders: Sequence[Path], overrides: Sequence[str], show: Show) -> str:
    """Return the page that compares runs.  Raises DataError if a folder is named twice."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.absolute()) for folder in folders]
    if len(set(names)) < len(names):
        raise DataError(f"{max(names, key=names.count)}: named twice, expected different run folders")
    runs = {name: _read(folder, overrides, show) for name, folder in zip(names, folders, strict=True)}
    return page(f"gndet: {' and '.join(names)}", "runs compared", made(compare.SECTIONS, runs, show))


def study_page(folder: Path, show: Show) -> str:
    """Return the page of a norm study."""
    return page(f"gndet: {folder.absolute().name}", str(folder), made(study.SECTIONS, read_study(folder), show))


def report_on_ending(folder: Path, show: Show) -> None:
    """Write the report of a run that has just ended; a failure here must not hide how the run ended."""
    try:
        write_report([folder], None, (), show)
    except Exception as error:  # the run itself is done and saved
        show(f"no report was written; `gndet report {folder}` tries again: {in_one_line(error)}")


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Assemble a page whose content security policy forbids every outside request."""
    folder = files("gndet.toolbox.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#{escape(id)}">{escape(title)}</a>' for id, title, _ in sections)
    body = "\n".join(section.html for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="gndet">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<nav aria-label="contents">{links}</nav>
<main>
{body}
</main>
<dialog id="large"><form method="dialog"><button aria-label="close">×</button></form><img alt=""><p></p></dialog>
<script>
{script}</script>
</body>
</html>
"""
