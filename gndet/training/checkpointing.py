"""What a run saves, and when it is written: copied to memory at once, written to the disk beside the training.

The training waits for the copy, and for the writing only where the checkpoint before is not written yet.  A full disk
does not end the run: the next checkpoint is tried when it is due, and an error ends the run if its last one failed.

On resume, other training data or classes are refused, and another number of ranks where images depend on their batch.
What may change rounding, such as other versions, is said in a line, as is other validation data.
"""

import hashlib
import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

import gndet
from gndet.checkpoint import BEST, CHECKPOINTS, LAST, Checkpoint, point, prune, save_checkpoint
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, TrainingError
from gndet.training.optim import checkpoint_bytes, load_optimizer_tensors, optimizer_tensors
from gndet.training.run import Best, Progress, Run


class Saver:
    """Saves the checkpoints of a run, on rank 0; on other ranks it does nothing."""

    def __init__(self, run: Run, total: int, say: Callable[[str], None], best: Best | None = None) -> None:
        """total: updates of the whole run.  say: told of what cannot be written.  best: known when the run goes on."""
        self._run, self._total, self._say = run, total, say
        self._written: tuple[Future[str], Best | None] | None = None  # what writes a checkpoint, the best it knows
        self._last: tuple[int, bool] | None = None  # update and evaluation_due of the last one handed over
        self._progress = Progress()  # of the last one handed over
        self._best: Best | None = best  # that the newest checkpoint knows
        self._lost: Best | None = None  # that of the update whose checkpoint could not be written
        self.failed: CheckpointError | None = None  # why the newest checkpoint could not be written

    def save(self, progress: Progress, *, at_once: bool = False) -> None:
        """Copy the run's state and write it: update-..., then the links last and, where it is the best, best.

        at_once: return when it is on the disk.  A failure is kept in `failed`, and said.
        """
        if not self._run.proc.first:
            return
        self.wait()
        if self._lost is not None and self._lost.update == progress.update:
            progress.best = self._lost  # the same state once more
        self._lost = None
        groups, meta = self._groups(), self._meta(progress)
        self._last = (progress.update, progress.evaluation_due)
        # a thread per save: one that lives on with a team of OpenMP's beside it makes libgomp's barriers sleep where
        # they would spin, and the updates of a small model a third to two thirds longer
        thread = ThreadPoolExecutor(1, "save")
        self._written = thread.submit(self._write, groups, meta, progress.is_best), progress.best
        thread.shutdown(wait=False)  # it ends when that is written
        self._progress = progress
        if at_once:
            self.wait()

    def holds(self, progress: Progress) -> bool:
        """Whether the newest checkpoint, on the disk, is of this state."""
        self.wait()
        return self._last == (progress.update, progress.evaluation_due) and self.failed is None

    def wait(self) -> None:
        """Wait until nothing is being written.

        Called before loader processes are forked, which would inherit the locks of a thread at work.
        """
        if self._written is None:
            return
        (written, best), self._written = self._written, None
        try:
            untidy = written.result()
        except Exception as error:  # a lack of memory, for one: whatever it is, the checkpoint is not there
            reason = error if isinstance(error, CheckpointError) else f"{self._run.out}: cannot save: {error!r}"
            self.failed = CheckpointError(str(reason))
            self._say(f"{self.failed}; the checkpoints before it are whole, training goes on without this one")
            if self._last and self._progress.best is not None and self._progress.best.update == self._last[0]:
                # that of this update is on no disk, and is to be found again
                self._lost, self._progress.best = self._progress.best, self._best
            return
        self.failed, self._best = None, best
        if untidy:
            self._say(untidy)

    def _write(self, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any], is_best: bool) -> str:
        """Write a checkpoint.  Returns why old ones could not be removed, or ""."""
        out = self._run.out
        folder = out / CHECKPOINTS / f"update-{meta['update']:07d}"
        save_checkpoint(folder, groups, meta)
        if is_best:
            point(out, BEST, folder)
        point(out, LAST, folder)
        try:
            prune(out, self._run.cfg.train.keep_last)
        except CheckpointError as error:
            return str(error)
        return ""

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        run = self._run
        groups = {"model": run.model.state_dict(), "optimizer": optimizer_tensors(run.optimizer, run.model)}
        if run.average is not None:
            groups["ema"] = run.average.module.state_dict()
        return {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }

    def _meta(self, progress: Progress) -> dict[str, Any]:
        run = self._run
        return progress.to_meta() | run.data | {
            "total_updates": self._total, "processes": run.proc.world, "device": run.proc.device.type,
            "config": run.cfg.model_dump(mode="json"), "asked": run.asked.model_dump(mode="json"), "norms": run.norms,
            "classes": list(run.train_set.classes), "category_ids": list(run.train_set.category_ids),
            "versions": versions(),
        }  # fmt: skip


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "gndet": gndet.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def room_for_checkpoints(run: Run, free_bytes: float) -> str:
    """A warning where the disk has no room for the checkpoints that are kept and one being written; else empty."""
    cfg, each = run.cfg.train, checkpoint_bytes(run.model, run.cfg.train) / 1e6
    count = cfg.keep_last + 2  # best, and the one that is written beside them
    if free_bytes / 1e6 > count * each:
        return ""
    return (
        f"{run.out}: {free_bytes / 1e6:.0f} MB are free on the disk; {count} checkpoints of {each:.0f} MB may "
        "lie there at once"
    )


def fingerprint(dataset: Dataset) -> str:
    """A hash of what is learned from: the images' ids and sizes, the objects' boxes and classes."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(np.array([record.image_id, *record.size, len(record.labels)]).tobytes())
        digest.update(record.boxes.tobytes() + record.labels.tobytes() + record.crowd.tobytes())
    return digest.hexdigest()


def mask_fingerprint(dataset: Dataset) -> str:
    """A hash of the objects' polygons and run lengths as the annotation file has them."""
    digest = hashlib.sha256()
    for record in dataset.records:
        for segmentation in record.segmentations:
            if isinstance(segmentation, list):
                for polygon in segmentation:
                    digest.update(np.array([len(polygon), *polygon], dtype=np.float64).tobytes())
            else:
                digest.update(repr(segmentation).encode())
            digest.update(b"|")
    return digest.hexdigest()


ROUNDING = ("images_per_gpu", "memory", "compile")  # of `train`: how a step is computed, not what


def restore(run: Run, saved: Checkpoint) -> tuple[Progress, list[str]]:
    """Put a checkpoint's state into the run.  Returns how far it had come, and a line for what is different now.

    Raises TrainingError for what must not be.
    """
    refuse_drift(run, saved)
    if run.proc.first:  # a kill may have come before the links were set
        point(run.out, LAST, saved.path)
        best = saved.path.with_name(f"update-{saved.meta['best_update'] or 0:07d}")
        if saved.meta["best_update"] and best.is_dir():
            point(run.out, BEST, best)
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
    if any(saved.meta[key] != run.data[key] for key in ("data", "masks")):
        raise TrainingError(
            f"{saved.path}: trained on other images or objects than {run.train_set.name} now holds; put the data back, "
            "or choose another out=FOLDER with train.weights set to this run"
        )
    before, coupling = saved.meta["processes"], run.cfg.model.batch_coupling()
    if coupling and before != run.proc.world:
        raise TrainingError(
            f"{saved.path}: trained by {before} rank(s), there are {run.proc.world} now, which would change what is "
            f"learned: {coupling}; go on with {before}, or choose another out=FOLDER"
        )


def drift(run: Run, saved: Checkpoint) -> list[str]:
    """Say in one line what is different now and changes rounding only; no line where the run goes on bit for bit."""
    there = {key: saved.meta[key] for key in ("processes", "device")} | saved.meta["versions"]
    here = {"processes": run.proc.world, "device": run.proc.device.type} | versions()
    for key in ROUNDING:
        there[f"train.{key}"] = saved.meta["asked"]["train"][key]
        here[f"train.{key}"] = getattr(run.asked.train, key)
    changed = [f"{name} {there[name]} -> {here[name]}" for name in here if there[name] != here[name]]
    lines = []
    if changed:
        lines.append(
            f"not bit-exact from here on, the same images in the same order and the same recipe: {', '.join(changed)}"
        )
    if saved.meta["val_data"] != run.data["val_data"]:
        lines.append(f"{run.val_set.name}: not what this run was evaluated on before; best compares across both")
    return lines
