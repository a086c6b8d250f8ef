"""`gndet norms`: audit the norm layers of a config or of a checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config.loading import config_from_dict, load_config, with_overrides
from gndet.data.datasets.reading import read_dataset
from gndet.errors import CheckpointError, DataError
from gndet.modeling.build import build_model
from gndet.training.norms import Audit, audit, audit_table, summary
from gndet.weights.load import initial_model, padding_warnings


def audit_path(where: str, overrides: Sequence[str], show: Callable[[str], None]) -> bool:
    """Show the norm layers of a checkpoint, or of the model that a YAML config would train, and their problems.

    Returns whether there is no error.  Raises ConfigError, CheckpointError and DataError.
    """
    is_checkpoint = Path(where).is_dir()
    report, notes = _audit_checkpoint(Path(where), overrides) if is_checkpoint else _audit_config(where, overrides)
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
    saved = load_checkpoint(resolve(path))
    for key in ("config", "classes"):
        if key not in saved.meta:
            raise CheckpointError(f"{saved.path}: its meta.json has no {key}; was it saved by gndet?")
    trained = config_from_dict(saved.meta["config"], str(saved.path))
    cfg = with_overrides(trained, overrides, str(saved.path))
    model = build_model(cfg.model, max(len(saved.meta["classes"]), 1))
    state = saved.groups.get("ema", saved.groups.get("model", {}))
    held = {key.partition(".")[0] for key in state}  # a checkpoint may hold a backbone alone
    absent = {key: tensor for key, tensor in model.state_dict().items() if key.partition(".")[0] not in held}
    try:
        model.load_state_dict(absent | state)
    except RuntimeError as error:
        raise CheckpointError(f"{saved.path}: its weights do not fit the model of its config: {error}") from None
    notes = padding_warnings(trained.model, cfg.model)
    return audit(model, cfg, saved.meta.get("norms"), world=saved.meta.get("processes", 1)), notes
