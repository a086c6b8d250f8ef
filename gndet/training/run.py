"""The state of a run: its parts as one value, its progress, and its speed."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from gndet.config.schema import Config
from gndet.data.batches.stream import Loaded
from gndet.data.records import Dataset
from gndet.distributed.process import Process
from gndet.modeling.image_model import ImageModel
from gndet.training.averaging import WeightAverage
from gndet.training.gradient_buckets import Buckets
from gndet.training.work_folder import WorkFolder


class Run(NamedTuple):
    """The parts of a run on one of its ranks."""

    cfg: Config
    asked: Config  # the user's config; norm_policy: hybrid changes the norms in cfg
    out: WorkFolder
    proc: Process
    train_set: Dataset
    val_set: Dataset
    model: ImageModel
    average: WeightAverage | None  # the averaged weights, if any
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager]
    data: dict[str, str]  # hashes of the training and validation data
    norms: dict[str, str]  # origin of each norm layer that train.weights provides
    forward: nn.Module  # the training forward: the model, compiled if train.compile says so
    buckets: Buckets | None  # buffers for gradients that are summed; None: autograd allocates gradients
    threads: int = 1  # images to compute side by side, in one thread each

    @property
    def detector(self) -> ImageModel:
        """The model to evaluate: the averaged weights if there are any."""
        return self.model if self.average is None else cast(ImageModel, self.average.module)


class Best(NamedTuple):
    """The evaluation of the checkpoint that `best` points to."""

    score: float
    update: int


@dataclass
class Progress:
    """The progress of a run after `update` updates, equal on all ranks."""

    update: int = 0
    evaluation_due: bool = False  # the evaluation after this update has not been finished
    values: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: Best | None = None
    sums: dict[str, float] = field(default_factory=dict)  # of the losses since the last line of the log
    summed: int = 0  # updates in `sums`
    images_at_once: int = 0  # of the last update; 0: no update yet
    nonfinite: int = 0  # updates skipped because a loss or the gradient was not finite
    unreadable: dict[int, str] = field(default_factory=dict)  # reason by id of each training image left out

    KEPT: ClassVar = ("update", "evaluation_due", "nonfinite", "summed", "images_at_once")  # unchanged in meta.json

    def to_meta(self) -> dict[str, Any]:
        """Return the part of meta.json that it fills, as a copy, because training continues while it is written."""
        return {
            **{name: getattr(self, name) for name in self.KEPT}, "sums": dict(self.sums),
            "best": self.best and self.best.score, "best_update": self.best and self.best.update,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.values.items()},
            "unreadable": {str(image): reason for image, reason in self.unreadable.items()},
        }  # fmt: skip

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Progress":
        """Read what `to_meta` wrote."""
        return cls(
            **{name: meta[name] for name in cls.KEPT},
            values={name: math.nan if value is None else value for name, value in meta["metrics"].items()},
            best=None if meta["best"] is None else Best(meta["best"], meta["best_update"]),
            sums=dict(meta["sums"]),
            unreadable={int(image): reason for image, reason in meta["unreadable"].items()},
        )

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of an update to the sums."""
        self.summed += 1
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss

    def take_means(self) -> dict[str, float]:
        """Return the mean losses since the last call, {} if no update was made, and reset the sums."""
        means = {name: value / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return {"loss": sum(means.values())} | means if means else {}

    @property
    def is_best(self) -> bool:
        """Whether the current state is the best that has been evaluated."""
        return self.best is not None and self.best.update == self.update and not self.evaluation_due

    def evaluated(self, values: dict[str, float]) -> None:
        """Store the metrics of an evaluation after this update, and whether it is the best so far."""
        self.evaluation_due, self.values = False, values
        if self.best is None or score(values) > self.best.score:
            self.best = Best(score(values), self.update)


def score(values: Mapping[str, float]) -> float:
    """Return the score that defines `best`: mask AP, or box AP without masks, or top-1; undefined counts as 0."""
    value = next(values[name] for name in ("mask/AP", "box/AP", "top1") if name in values)
    return 0.0 if math.isnan(value) else value


class Meter:
    """Measures time, data wait and memory between two log lines."""

    def __init__(self, device: torch.device, global_batch: int) -> None:
        self.device, self.global_batch = device, global_batch
        self.seconds_per_update = 0.0
        self._reset()

    def _reset(self) -> None:
        self.updates, self.waited, self.paused, self.started = 0, 0.0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterator[Loaded]) -> Loaded:
        """Return the next batch, and add the time it took to the waiting time."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of an evaluation or a save from the figures."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Return the figures of the updates since the last call, and reset them."""
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        self.seconds_per_update = seconds / max(self.updates, 1)
        values = {
            "images_per_s": self.global_batch * self.updates / seconds,
            "data_wait": min(self.waited / seconds, 1.0),
            "memory_mib": memory_mib(self.device),
        }
        self._reset()
        return values


def memory_mib(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
