"""Save and restore a run: its state is copied to memory, then written to disk while training continues.

Training waits for the copy.  It waits for the writing only if the previous checkpoint is not written yet.  A full disk
does not end the run: the next checkpoint is written when it is due.  If the last one fails, the run ends with an error.

A resume is refused if the training data or the classes changed, or if the number of ranks changed and images depend on
their batch.  What may affect rounding, such as new versions or a GPU's own algorithms, new validation data, and
changed picture files are reported in a line each: a picture that was unreadable may have been mended.
"""

import platform
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gndet
from gndet.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    UPDATE,
    Checkpoint,
    best_checkpoint,
    point,
    prune,
    save_checkpoint,
)
from gndet.errors import CheckpointError, TrainingError
from gndet.modeling.trained import nonfinite
from gndet.text import named_briefly
from gndet.training.batch_size import checkpoint_bytes
from gndet.training.optim import load_optimizer_tensors, optimizer_tensors
from gndet.training.run import Best, Progress, Run


class Saver:
    """Saves the checkpoints of a run, on rank 0; on other ranks it does nothing."""

    def __init__(self, run: Run, total: int, say: Callable[[str], None], best: Best | None = None) -> None:
        """total: updates of the whole run.  say: called with each message.  best: the best so far of a resumed run."""
        self._run, self._total, self._say = run, total, say
        self._written: tuple[Future[list[str]], Best | None] | None = None  # the write in progress, its best
        self._warned: set[str] = set()
        self._last: tuple[int, bool] | None = None  # update and evaluation_due of the newest checkpoint
        self._progress = Progress()  # of the newest checkpoint
        self._best: Best | None = best  # in the newest checkpoint on the disk
        self._lost: Best | None = None  # of the update whose checkpoint could not be written
        self.failed: CheckpointError | None = None  # why the newest checkpoint could not be written

    def save(self, progress: Progress, *, at_once: bool = False) -> None:
        """Copy the run's state and write it: first update-..., then the link `last` and, if it is the best, `best`.

        at_once: return only when it is on the disk.  A failure is reported and kept in `failed`.
        """
        if not self._run.proc.first:
            return
        self.wait()
        if self._run.out.is_removed:  # the error that ends the run says so
            self.failed = CheckpointError(f"{self._run.out.named}: the folder was removed")
            return
        if self._lost is not None and self._lost.update == progress.update:
            progress.best = self._lost  # the same state is saved again
        self._lost = None
        groups, meta = self._groups(), self._meta(progress)
        self._last = (progress.update, progress.evaluation_due)
        # one thread per save: a thread that stays alive with its own OpenMP team makes libgomp's barriers sleep instead
        # of spin, and the updates of a small model take a third to two thirds longer
        thread = ThreadPoolExecutor(1, "save")
        self._written = thread.submit(self._write, groups, meta, progress.is_best), progress.best
        thread.shutdown(wait=False)  # the thread ends after the write
        self._progress = progress
        if at_once:
            self.wait()

    def holds(self, progress: Progress) -> bool:
        """Return whether the newest checkpoint on the disk holds this state."""
        self.wait()
        return self._last == (progress.update, progress.evaluation_due) and self.failed is None

    def wait(self) -> None:
        """Wait until nothing is being written.

        Call this before loader processes are forked: they would inherit the locks of a running thread.
        """
        if self._written is None:
            return
        (written, best), self._written = self._written, None
        try:
            warnings = written.result()
        except Exception as error:  # e.g. MemoryError: in any case the checkpoint is missing
            reason = error if isinstance(error, CheckpointError) else f"{self._run.out}: cannot save: {error!r}"
            self.failed = CheckpointError(str(reason))
            self._say(f"{self.failed}; earlier checkpoints are intact, training continues without this one")
            if self._last and self._progress.best is not None and self._progress.best.update == self._last[0]:
                # the checkpoint of this best is not on the disk, so another best must be found
                self._lost, self._progress.best = self._progress.best, self._best
            return
        self.failed, self._best = None, best
        for warning in warnings:
            if warning not in self._warned:
                self._say(warning)
        self._warned.update(warnings)

    def _write(self, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any], is_best: bool) -> list[str]:
        """Write a checkpoint.  Returns why links could not be written or old checkpoints not be removed."""
        out, warnings = self._run.out.path, []
        folder = out / CHECKPOINTS / UPDATE.format(meta["update"])
        save_checkpoint(folder, groups, meta)
        best = best_checkpoint(folder, meta)
        steps = [partial(point, out, name, folder) for name in ((BEST, LAST) if is_best else (LAST,))]
        for step in (*steps, partial(prune, out, self._run.cfg.train.keep_last, best)):
            try:
                step()
            except CheckpointError as error:  # this checkpoint is whole
                warnings.append(str(error))
        return warnings

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        run = self._run
        groups = {"model": run.model.state_dict(), "optimizer": optimizer_tensors(run.optimizer, run.model)}
        if run.average is not None:
            groups["ema"] = run.average.module.state_dict()
        # from a GPU into pinned memory, which torch keeps for the next checkpoint, without waiting for each tensor
        copies = {
            name: {key: tensor.detach().to("cpu", non_blocking=True, copy=True) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }
        if run.proc.device.type == "cuda":
            torch.cuda.current_stream(run.proc.device).synchronize()
        return copies

    def _meta(self, progress: Progress) -> dict[str, Any]:
        run = self._run
        return progress.to_meta() | run.data | {
            "total_updates": self._total, "processes": run.proc.world, "device": run.proc.device.type,
            "config": run.cfg.model_dump(mode="json"), "asked": run.asked.model_dump(mode="json"), "norms": run.norms,
            "classes": list(run.train_set.classes), "category_ids": list(run.train_set.category_ids),
            "versions": versions(run),
        }  # fmt: skip


def versions(run: Run) -> dict[str, str]:
    """Return the versions of the software that runs the training, and its number of threads."""
    threads = run.threads if run.threads > 1 else torch.get_num_threads()
    return {
        "gndet": gndet.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": sys.modules["torchvision.version"].__version__, "threads": str(threads),
    }  # fmt: skip


def room_for_checkpoints(run: Run, free_bytes: float) -> str:
    """Return a warning if the disk lacks room for the kept checkpoints plus one being written, else ""."""
    cfg, each = run.cfg.train, checkpoint_bytes(run.model, run.cfg.train) / 1e6
    count = cfg.keep_last + 2  # plus best, and the one being written
    if free_bytes / 1e6 > count * each:
        return ""
    return (
        f"{run.out}: {free_bytes / 1e6:.0f} MB are free on the disk; the run may need {count} checkpoints of "
        f"{each:.0f} MB at once"
    )


ROUNDING = ("train.images_per_gpu", "train.memory", "train.compile", "data.canvases")  # affect rounding only


def restore(run: Run, saved: Checkpoint) -> tuple[Progress, list[str]]:
    """Load a checkpoint's state into the run.  Returns its progress and a line for each difference from before.

    Raises TrainingError for a difference that is not allowed.
    """
    refuse_drift(run, saved)
    for group in ("model", "ema"):
        if wrong := nonfinite(saved.groups.get(group, {})):
            raise TrainingError(
                f"{saved.path}: NaN or infinite values in {group}: {wrong}; the run cannot go on from these weights: "
                "remove this folder to go on from the checkpoint before it, or choose another out=FOLDER"
            )
    progress = Progress.from_meta(saved.meta)
    run.model.load_state_dict(saved.groups["model"])
    load_optimizer_tensors(run.optimizer, run.model, saved.groups["optimizer"])
    if run.average is not None:
        run.average.module.load_state_dict(saved.groups["ema"])
        run.average.begun = progress.update > progress.nonfinite
    return progress, drift(run, saved)


def refuse_drift(run: Run, saved: Checkpoint) -> None:
    """Raise TrainingError if a resumed run would not be the same run."""
    if tuple(saved.meta["classes"]) != run.train_set.classes:
        raise TrainingError(
            f"{saved.path}: trained for the classes {named_briefly(saved.meta['classes'])}, the data now has "
            f"{named_briefly(run.train_set.classes)}; choose another out=FOLDER"
        )
    if any(saved.meta[key] != run.data[key] for key in ("data", "masks")):
        raise TrainingError(
            f"{saved.path}: trained on other images or objects than {run.train_set.name} now holds; put the data back, "
            "or choose another out=FOLDER with train.weights set to this run"
        )
    if saved.meta.get("names", run.data["names"]) != run.data["names"]:  # checkpoints before this hash have none
        raise TrainingError(
            f"{saved.path}: trained on pictures of other file names than {run.train_set.name} now has; put the data "
            "back, or choose another out=FOLDER with train.weights set to this run"
        )
    before, coupling = saved.meta["processes"], run.cfg.model.batch_coupling()
    if coupling and before != run.proc.world:
        raise TrainingError(
            f"{saved.path}: trained by {before} rank(s), there are {run.proc.world} now, which would change what is "
            f"learned: {coupling}; resume with {before}, or choose another out=FOLDER"
        )


def drift(run: Run, saved: Checkpoint) -> list[str]:
    """Return a line about what changes rounding, unless the run resumes bit for bit, and one for each change of data.

    On a GPU it does not with `deterministic: false`: cuDNN may choose convolutions that add in any order.
    """
    before = {key: saved.meta[key] for key in ("processes", "device")} | saved.meta["versions"]
    now = {"processes": run.proc.world, "device": run.proc.device.type} | versions(run)
    asked = run.asked.model_dump(mode="json")
    for key in ROUNDING:
        section, name = key.split(".")
        now[key] = asked[section][name]
        before[key] = saved.meta["asked"][section].get(name, now[key])
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if run.proc.device.type == "cuda" and not run.cfg.deterministic:
        changed.append("deterministic: false on a GPU")
    lines = []
    if changed:
        lines.append(f"not bit-exact from here on, but with the same images, order and recipe: {', '.join(changed)}")
    if saved.meta.get("pictures", run.data["pictures"]) != run.data["pictures"]:
        lines.append(f"{run.train_set.name}: picture files differ from those before, perhaps because some were mended")
    if any(saved.meta.get(key, run.data[key]) != run.data[key] for key in ("val_data", "val_rest")):
        lines.append(f"{run.val_set.name}: differs from the data of earlier evaluations; `best` compares both")
    return lines
