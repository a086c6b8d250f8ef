"""The norm report's record of a run: RUN/norms.jsonl and TensorBoard's histograms, written by rank 0.

A line says what the norm layers did after `update` updates on the first validation images:
{"update": 500, "layers": [{"name": ...}, ...], "padding": 0.12}; padding: the share of the training batches since the
line before.  RUN/norms-start.safetensors holds gamma and beta of when the run began.
"""

from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from gndet.data.batches.batch import collate
from gndet.data.batches.stream import Loaded
from gndet.data.batches.transforms import UnreadablePicture, test_sample
from gndet.evaluation.norm_statistics import Start, affine, measure, norm_layers, rounded
from gndet.files import write_whole
from gndet.structures import Batch
from gndet.training.log import Log, read_metrics, truncate
from gndet.training.memory import out_of_memory, release
from gndet.training.run import Progress, Run
from gndet.training.run_folder import NORMS, NORMS_START

MOST_IMAGES = 16  # where batches for BN ask for more than train.norm_images


class NormWatch:
    """Looks at the norm layers of a run, on rank 0; on other ranks it does nothing."""

    def __init__(self, run: Run, log: Log, progress: Progress) -> None:
        """Forget what a killed run wrote past the point it goes on from; a run that begins is measured at once.

        Raises OutputError where norms.jsonl cannot be written.
        """
        self._run, self._log = run, log
        self._cells = self._padded = 0  # of the training batches' canvases
        self._on = run.proc.first and run.cfg.train.norm_images > 0 and bool(norm_layers(run.model))
        if run.proc.first:
            truncate(run.out / NORMS, progress.update or -1, progress.evaluation_due)
        if progress.update == 0:
            self.measure(0)

    def saw(self, taken: Iterable[Loaded]) -> None:
        """Note how much of an update's canvases is padding."""
        for loaded in taken if self._on else ():
            images, sizes = loaded.batch.images, loaded.batch.sizes
            cells = len(images) * images.shape[2] * images.shape[3]
            self._cells += cells
            self._padded += cells - int(sizes.prod(1).sum())

    def measure(self, update: int) -> None:
        """Write what the norm layers do now.  A lack of memory or of room on the disk does not end the run."""
        if not self._on:
            return
        run, log = self._run, self._log
        if run.proc.watch:
            run.proc.watch.at(update, "looking at its norm layers")
        if update == 0:
            start = safetensors.torch.save(affine(run.model))
            log.attempt(NORMS_START, partial(write_whole, run.out / NORMS_START, start))
        try:
            layers = measure(run.model, self._images, run.autocast, read_start(run.out))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            log.message(f"norm report: out of memory at update {update}, which is left out: {error}")
            release(run.proc.device)
            return
        padding = rounded(self._padded / self._cells) if self._cells else None
        self._cells = self._padded = 0
        log.append(NORMS, {"update": update, "layers": [layer.numbers for layer in layers], "padding": padding})
        for layer in layers:
            log.histogram(update, f"norm/{layer.numbers['name']}/group_std", layer.group_std)
            log.histogram(update, f"norm/{layer.numbers['name']}/gamma", layer.gamma)

    @cached_property
    def _images(self) -> list[Batch]:
        """The first validation images that can be read: one by one; for BN two batches of train.images_per_gpu."""
        cfg, num, size = self._run.cfg, self._run.cfg.train.norm_images, 1
        if any(norm.mixes_images for norm in cfg.model.part_norms().values()):
            size = min(cfg.train.images_per_gpu, MOST_IMAGES)
            num = min(max(num, 2 * size), MOST_IMAGES)
        samples = []
        for record in self._run.val_set.records:
            if len(samples) == num:
                break
            try:
                samples.append(test_sample(record, cfg.data))
            except UnreadablePicture:  # the evaluation says so
                continue
        parts = [samples[first : first + size] for first in range(0, len(samples), size)]
        whole = [part for part in parts if len(part) == size] or parts  # a smaller batch is not what BN trains on
        return [collate(part, cfg.data.canvas_multiple, cfg.data.exact_canvas) for part in whole]


def read_norms(folder: Path) -> list[dict[str, Any]]:
    """Read a run's norms.jsonl, a dict a line; [] where there is none.  Raises DataError for a broken line."""
    return read_metrics(folder / NORMS) if (folder / NORMS).is_file() else []


def read_start(folder: Path) -> Start | None:
    """Gamma and beta of a run when it began; None where that is not known."""
    try:
        return safetensors.torch.load_file(folder / NORMS_START)
    except (OSError, SafetensorError):
        return None
