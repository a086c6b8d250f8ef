"""`gndet norms`: audit the norm layers of a config or of a checkpoint."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gndet.checkpoint import led_to
from gndet.config.loading import load_config, with_overrides
from gndet.data.datasets.reading import read_dataset
from gndet.errors import DataError
from gndet.modeling.trained import build_trained, read_trained
from gndet.training.norms import Audit, audit, audit_table, summary
from gndet.weights.load import initial_model, padding_warnings


def audit_path(where: str, overrides: Sequence[str], show: Callable[[str], None]) -> bool:
    """Show the norm layers of a checkpoint, or of the model that a YAML config would train, and their problems.

    Returns whether there is no error.  Raises ConfigError, CheckpointError and DataError.
    """
    path = led_to(Path(os.path.expanduser(where)))
    report, notes = _audit_checkpoint(path, overrides) if path.is_dir() else _audit_config(where, overrides)
    show(audit_table(report))
    for line in [*(note for note in notes if note.startswith("warning")), *summary(report)]:
        show(line)
    for error in report.errors:
        show(f"error: {error}")
    return not report.errors


def _audit_config(where: str, overrides: Sequence[str]) -> tuple[Audit, list[str]]:
    """Audit the model that training would start with; if its data set is missing, a model of one class."""
    cfg = load_config(where, overrides)
    try:
        classes: Sequence[str] = read_dataset(cfg.data.train, cfg.data).classes
    except DataError:  # the norms do not depend on the data
        classes = ("object",)
    start = initial_model(cfg, classes, measure=False)
    norms = {name: fate.what for name, fate in start.fates.items()}
    return audit(start.model, start.cfg, norms, world=1), start.notes


def _audit_checkpoint(path: Path, overrides: Sequence[str]) -> tuple[Audit, list[str]]:
    """Audit the model of a checkpoint; of its EMA weights if it has them."""
    trained = read_trained(path)
    cfg = with_overrides(trained.config, overrides, str(trained.path))
    model = build_trained(trained, cfg.model, whole=False)  # a checkpoint may hold a backbone alone
    notes = [f"warning: {trained.fault}"] if trained.nonfinite else []
    notes += padding_warnings(trained.config.model, cfg.model)
    norms, world = trained.meta.get("norms"), trained.meta.get("processes")
    norms = norms if isinstance(norms, dict) else None
    return audit(model, cfg, norms, world=world if isinstance(world, int) else 1), notes
