"""Taking up a run from its checkpoint: the state put back, and what is different now refused or said.

The rule.  Refused: other data to learn from, other classes, another config but for the keys of `run_folder.NEUTRAL`,
and, where images depend on their batch, another split.  Said in a line: what may change rounding, such as another
number of processes, threads or version, and other validation data.  All else goes on bit for bit.
"""

from gndet.checkpoint import Checkpoint, point
from gndet.errors import TrainingError
from gndet.optim import load_optimizer_tensors
from gndet.progress import Progress
from gndet.run import Run
from gndet.saving import versions

ROUNDING = ("images_per_gpu", "memory", "compile")  # of `train`: how a step is computed, not what


def restore(run: Run, saved: Checkpoint) -> tuple[Progress, list[str]]:
    """Put a checkpoint's state into the run.  Returns how far it had come, and a line for what is different now.

    Raises TrainingError for what must not be.
    """
    refuse_drift(run, saved)
    if run.proc.first:  # a kill may have come before the links were set
        point(run.out, "last", saved.path)
        best = saved.path.with_name(f"update-{saved.meta['best_update'] or 0:07d}")
        if saved.meta["best_update"] and best.is_dir():
            point(run.out, "best", best)
    progress = Progress.from_meta(saved.meta)
    run.model.load_state_dict(saved.groups["model"])
    load_optimizer_tensors(run.optimizer, run.model, saved.groups["optimizer"])
    if run.average is not None:
        run.average.module.load_state_dict(saved.groups["ema"])
        run.average.n_averaged.fill_(progress.update - progress.nonfinite)
    return progress, drift(run, saved)


def refuse_drift(run: Run, saved: Checkpoint) -> None:
    """Raise TrainingError where a run cannot be the same run any more."""
    if tuple(saved.meta["classes"]) != run.train_set.classes:
        raise TrainingError(
            f"{saved.path}: trained for the classes {', '.join(saved.meta['classes'])}, the data now has "
            f"{', '.join(run.train_set.classes)}; choose another out=FOLDER"
        )
    if saved.meta["data"] != run.data["data"] or saved.meta.get("masks") not in (None, run.data["masks"]):
        raise TrainingError(
            f"{saved.path}: trained on other images or objects than {run.train_set.name} now holds; put the data back, "
            "or choose another out=FOLDER with train.weights set to this run"
        )
    before, coupling = saved.meta.get("processes", run.proc.world), run.cfg.model.batch_coupling()
    if coupling and before != run.proc.world:
        raise TrainingError(
            f"{saved.path}: trained by {before} process(es), there are {run.proc.world} now, which would change what "
            f"is learned: {coupling}; go on with {before}, or choose another out=FOLDER"
        )


def drift(run: Run, saved: Checkpoint) -> list[str]:
    """Say in one line what is different now and changes rounding only; no line where the run goes on bit for bit."""
    asked = saved.meta.get("asked", saved.meta["config"])
    there = {"processes": saved.meta.get("processes"), "device": saved.meta.get("device")} | saved.meta["versions"]
    here = {"processes": run.proc.world, "device": run.proc.device.type} | versions()
    for key in ROUNDING:
        there[f"train.{key}"] = asked["train"].get(key)  # None: an old run's
        here[f"train.{key}"] = getattr(run.asked.train, key)
    changed = [f"{name} {there[name]} -> {here[name]}" for name in here if there.get(name) not in (None, here[name])]
    lines = []
    if changed:
        lines.append(
            f"not bit-exact from here on, the same images in the same order and the same recipe: {', '.join(changed)}"
        )
    if saved.meta.get("val_data") not in (None, run.data["val_data"]):
        lines.append(f"{run.val_set.name}: not what this run was evaluated on before; best compares across both")
    return lines
