"""`gndet report`: write one HTML page that shows a run's data, its training, its mistakes and its norm layers."""

import traceback
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from gndet.config.loading import load_config
from gndet.data.datasets.reading import user_paths
from gndet.errors import DataError, GndetError
from gndet.files import Kind, refuse_output, write_whole
from gndet.toolbox.analysis.study_results import is_study
from gndet.toolbox.report import batches, compare, labels, mistakes, norms, overview, quality, setup, study, training
from gndet.toolbox.report.blocks import Section, escape
from gndet.toolbox.report.record import read_run
from gndet.training.run_folder import CONFIG, REPORT

PAGE = Kind("a page of gndet report", rb'<meta name="generator" content="gndet">')

Show = Callable[[str], None]


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
        html = page(f"gndet: {folders[0].absolute().name}", str(folders[0]), [study.section(folders[0])])
    else:
        html = run_page(folders[0], overrides) if len(folders) == 1 else comparison_page(folders, overrides)
    write_whole(path, html)
    show(f"report -> {path} ({len(html.encode()) / 1e3:,.0f} kB; opens from disk in any browser)")
    return path


def _data_of(folders: Sequence[Path], overrides: Sequence[str]) -> list[Path]:
    """Return the files and folders of the runs' data."""
    configs = [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()]
    return [path for config in configs for path in user_paths(load_config(config, overrides).data)]


def run_page(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the page of one run."""
    run = read_run(folder, overrides)
    sections = [
        overview.section(run), training.section(run), quality.section(run), *mistakes.sections(run),
        norms.section(folder), labels.section(run), batches.section(run), setup.section(run),
    ]  # fmt: skip
    val = f" on {run.val_set.name}" if run.val_set else ""
    return page(f"gndet: {folder.absolute().name}", f"{folder}{val}", sections)


def comparison_page(folders: Sequence[Path], overrides: Sequence[str] = ()) -> str:
    """Return the page that compares runs."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = {name: read_run(folder, overrides) for name, folder in zip(names, folders, strict=True)}
    return page(f"gndet: {' and '.join(names)}", "runs compared", compare.sections(runs))


def report_on_ending(folder: Path, show: Show) -> None:
    """Write the report of a run that has just ended; a failure here must not hide how the run ended."""
    try:
        write_report([folder], None, (), show)
    except GndetError as error:
        show(f"no report was written: {error}")
    except Exception:  # a bug of ours; the run itself is done and saved
        show(f"no report was written; `gndet report {folder}` tries again:\n{traceback.format_exc(limit=-3)}")


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
