"""`gndet analyze`: show what a detector gets wrong, on the terminal and as JSON and CSV."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gndet.config.data import DataConfig
from gndet.config.loading import find_config, load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import refuse
from gndet.data.datasets.reading import inspect_dataset, read_dataset, user_paths
from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.results import Results
from gndet.files import CLASSIFIED, CONFIG, DETECTIONS, refuse_output, report_kind, write_whole
from gndet.text import csv_table, text_table
from gndet.toolbox.analysis.analysis import Analysis, chosen_kind, make_analysis, read_results
from gndet.toolbox.analysis.tables import FILES, Table, all_tables, known

SHOWN = 20  # rows per table on the terminal; the files hold all rows
DECIMAL = ("threshold", "score")  # columns that are not in percent, because options such as --threshold are not


def analyze(
    source: Path,
    overrides: Sequence[str],
    show: Callable[[str], None],
    *,
    data: str | None = None,
    kind: str | None = None,
    json_file: Path | None = None,
    csv_folder: Path | None = None,
    images: int = 50,
) -> Analysis:
    """Analyze the detections of a run, or a results file of any toolkit, and show their mistakes.

    source: a run folder, or a JSON file in COCO's results format; the latter needs `data`: COCO annotations, or a
    config with data.val.  kind: "box" or "mask"; by default masks if both detections and objects have them.
    json_file, csv_folder: where to write the whole analysis.  images: how many of the worst images to list.
    Raises ConfigError, DataError or OutputError before it writes anything.
    """
    _refuse_outputs(source, data, overrides, json_file, csv_folder)
    dataset, results, limit = read_subject(source, data, overrides)
    kind = chosen_kind(dataset, results, kind)
    found = make_analysis(dataset, results, kind=kind, max_detections=limit)
    tables = all_tables(found, dataset, images)
    counts = f"{len(dataset.records)} images, {len(results)} detections"
    show(f"{source} on {dataset.name}: {counts}, compared by {kind}\n(shares and AP in percent)")
    for table in tables:
        show(f"\n{table.title}\n{terminal_table(table)}")
    if json_file or csv_folder:
        show("")
    if json_file:
        write_whole(json_file, json.dumps(analysis_json(found, tables), indent=1, allow_nan=False))
        show(f"-> {json_file}")
    if csv_folder:
        for table in tables:
            write_whole(csv_folder / f"{table.name}.csv", csv_table([table.columns, *table.rows]))
        show(f"-> {csv_folder}: {', '.join(f'{table.name}.csv' for table in tables)}")
    return found


def read_subject(source: Path, data: str | None, overrides: Sequence[str]) -> tuple[Dataset, Results, int]:
    """Read a run folder or a results file.  Raises ConfigError and DataError.

    Returns the data set, its detections, and how many detections count per image and class.
    """
    path = source
    if source.is_dir():
        if data is not None:
            raise DataError(f"--data {data}: is only for a results file; the run {source} names its own data")
        path, data = source / DETECTIONS, str(source / CONFIG)
        if not Path(data).is_file():
            raise DataError(f"{source}: not a run folder, it has no {CONFIG}")
        if (source / CLASSIFIED).is_file():
            raise DataError(f"{source}: a classifier's run, which has no detections; its report shows its confusions")
        if not path.is_file():
            raise DataError(f"{source}: has no {DETECTIONS}: the run was not evaluated yet; run `gndet evaluate`")
    if not path.is_file():
        raise DataError(f"{source}: no such file or folder; expected a run folder, or detections as JSON")
    if data is None:
        raise DataError(f"{source}: --data is missing; name the COCO annotations of these detections, or a config")
    cfg = with_overrides(Config(), overrides, "the defaults")
    if find_config(data).suffix in (".yaml", ".yml"):
        cfg = load_config(data, overrides)
        dataset = read_dataset(cfg.data.val, cfg.data, known=inspect_dataset(cfg.data.train, cfg.data).classes)
    elif Path(data).is_file():
        dataset = refuse(inspect_file(Path(data).absolute(), None, DataConfig()))  # the pictures are not needed
    else:
        raise DataError(f"--data {data}: no such file; expected COCO annotations (.json), or a config (.yaml)")
    return dataset, read_results(path, dataset), cfg.evaluation.max_detections


def _refuse_outputs(
    source: Path, data: str | None, overrides: Sequence[str], json_file: Path | None, csv_folder: Path | None
) -> None:
    """Raise OutputError if an output cannot be written, or would replace what gndet did not write."""
    named = find_config(str(source / CONFIG) if source.is_dir() else data or "")
    if not (named.is_file() and source.exists()):
        return  # read_subject says what is missing
    is_config = named.suffix in (".yaml", ".yml")
    read = user_paths(load_config(named, overrides).data) if is_config else [named]
    read += [source] if source.is_file() else []
    if json_file:
        refuse_output(json_file, "--json", report_kind("analyze"), read)
    if csv_folder:
        for name, kind in FILES.items():
            refuse_output(csv_folder / name, "--csv", kind, read)


def terminal_table(table: Table) -> str:
    """Return a table for the terminal, with fractions in percent and at most SHOWN rows."""
    rows = [table.columns, *(list(map(_shown, table.columns, row)) for row in table.rows[:SHOWN])]
    left = [index for index in range(len(table.columns)) if all(isinstance(row[index], str) for row in table.rows)]
    more = f"\n... and {len(table.rows) - SHOWN} more" if len(table.rows) > SHOWN else ""
    return text_table(rows, left) + (more if table.rows else "\n(none)")


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in DECIMAL:
        return f"{value:.2f}"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def analysis_json(found: Analysis, tables: Sequence[Table]) -> dict[str, Any]:
    """Return the whole analysis: summary, intervals, and every table as a list of objects."""
    whole = {"AP": found.intervals.ap, "AP50": found.intervals.ap50}
    listed = {table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    return {
        "gndet": "analyze", "kind": found.kind,
        "summary": {name: known(value) for name, value in found.metrics.summary.items()},
        "intervals": {name: list(map(known, ends)) for name, ends in whole.items()},
        "draws": found.intervals.draws, "threshold": found.threshold,
        "error_totals": {name: found.errors.delta_ap[name] for name in ("FP", "FN")},
    } | listed  # fmt: skip
