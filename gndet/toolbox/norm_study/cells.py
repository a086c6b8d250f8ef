"""The run folders of a study's cells: whether a run is finished, and what is kept of it."""

from pathlib import Path

from gndet.checkpoint import load_checkpoint, run_checkpoints, save_checkpoint
from gndet.errors import CheckpointError


def finished(run: Path) -> dict[str, float | None] | None:
    """Return the metrics of a run folder if its run is finished and evaluated, else None."""
    try:
        newest = [load_checkpoint(folder, ()).meta for folder in run_checkpoints(run)[:1]]
    except CheckpointError:
        return None  # the run, when resumed, skips this checkpoint too, or says why there are none
    for meta in newest:
        if meta["update"] >= meta["total_updates"] and not meta.get("evaluation_due") and meta["metrics"]:
            return dict(meta["metrics"])
    return None


def drop_optimizer(run: Path) -> None:
    """Drop the optimizer's state from a finished run's last checkpoint, which saves up to two thirds of its size."""
    for folder in run_checkpoints(run)[:1]:
        saved = load_checkpoint(folder)
        groups = {name: tensors for name, tensors in saved.groups.items() if name != "optimizer"}
        save_checkpoint(folder, groups, saved.meta)
