"""What a run consists of, as one value that the parts of training are handed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gndet.buckets import Buckets
from gndet.config.schema import Config
from gndet.data.records import Dataset
from gndet.distributed.process import Process
from gndet.modeling.mask_rcnn import MaskRCNN


class Run(NamedTuple):
    """A run as one of its processes sees it."""

    cfg: Config
    asked: Config  # what the user wrote; norm_policy: hybrid makes another of it
    out: Path
    proc: Process
    train_set: Dataset
    val_set: Dataset
    model: MaskRCNN
    average: nn.Module | None  # the averaged weights, if any
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager]
    data: dict[str, str]  # hashes of what is learned from and evaluated on
    norms: dict[str, str] | None  # what became of each norm layer that train.weights knew; None: an old run
    forward: nn.Module  # the training forward: the model, compiled where train.compile says so
    buckets: Buckets | None  # where gradients lie while they are summed; None: nowhere, autograd places them

    @property
    def detector(self) -> nn.Module:
        """The weights that are evaluated."""
        return self.model if self.average is None else self.average.module
