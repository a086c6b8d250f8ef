"""The sum of the gradients over the ranks, on its way while the last backward pass of an update still runs.

The gradients lie in flat buffers, the buckets, filled in the order in which a backward pass comes to the parameters:
the last ones first.  Each is sent once it is full and those before it have been sent, so that at the end only the first
layers' bucket is waited for.  All ranks send all buckets in one order, once per round, whatever becomes of their own
backward pass: one that has failed sends what it has.  Then they agree whether the round counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gndet.distributed.collectives import exchange
from gndet.distributed.process import Process


class Bucket(NamedTuple):
    """Some parameters, and the buffer that their gradients lie in."""

    parameters: list[nn.Parameter]
    gradients: list[Tensor]  # views of `flat`, which lie as their parameters do
    flat: Tensor


class Buckets:
    """The gradients of a model's trainable parameters, in buffers that are sent."""

    def __init__(self, model: nn.Module, proc: Process) -> None:
        self.proc = proc
        self.buckets = [_bucket(portion) for portion in _portions(model)]
        self.begun = False  # whether this round has sent something
        self._open: list[int] = []  # gradients that are still to come, by bucket; [] while nothing is to be sent
        self._next = 0  # the bucket to be sent next
        self._sent: list[Any] = []  # what can be waited for
        self._trouble: RuntimeError | None = None
        if proc.world > 1:
            for number, bucket in enumerate(self.buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._came, number))

    def clear(self) -> None:
        """Set the gradients to zero, for a round to begin; whatever they were, they lie in the buckets from here on."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            for parameter, gradient in zip(bucket.parameters, bucket.gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send buckets while the context lasts, in which a backward pass adds the last gradients.

        Only where a stop does not break it off: from here on the ranks count on each other.
        """
        self._open = [len(bucket.parameters) for bucket in self.buckets]
        try:
            yield
        finally:
            self._open = []

    def finish(self) -> None:
        """Send what is left, and wait for all of it.

        Afterwards the gradients are the sums over the ranks, of use if all had theirs whole.  Raises ProcessLost.
        """
        if self.proc.world == 1:
            return
        for bucket in self.buckets[self._next :]:
            self._send(bucket)
        with exchange(self.proc):
            if self._trouble is not None:
                raise self._trouble
            for work in self._sent:
                work.wait()
            if self.proc.device.type == "cuda":  # NCCL's calls return at once: here a lost rank is noticed
                torch.cuda.synchronize(self.proc.device)
        self.begun, self._next, self._sent = False, 0, []

    def _came(self, number: int, _: Tensor) -> None:
        """A gradient of this bucket is there: send it if it was the last, and those behind it that waited for it."""
        if not self._open:
            return
        self._open[number] -= 1
        while self._next < len(self.buckets) and not self._open[self._next]:
            self._send(self.buckets[self._next])
            self._next += 1

    def _send(self, bucket: Bucket) -> None:
        """Begin to sum a bucket over the ranks; the first trouble is kept, to be raised where all is waited for."""
        self.begun = True
        if self._trouble is None:
            try:
                self._sent.append(dist.all_reduce(bucket.flat, async_op=True))
            except RuntimeError as error:  # a rank is lost; not raised within the backward pass
                self._trouble = error


def _portions(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The trainable parameters, last first, of BUCKET elements or more but the last, and of one type."""
    portion: list[nn.Parameter] = []
    for parameter in reversed([parameter for parameter in model.parameters() if parameter.requires_grad]):
        if portion and (parameter.dtype != portion[0].dtype or sum(p.numel() for p in portion) >= BUCKET):
            yield portion
            portion = []
        portion.append(parameter)
    if portion:
        yield portion


def _bucket(parameters: list[nn.Parameter]) -> Bucket:
    """A buffer of zeros for the gradients of parameters, each of which is dense, whatever its order in memory."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    parts = flat.split([parameter.numel() for parameter in parameters])
    views = [part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, parts, strict=True)]
    return Bucket(parameters, views, flat)


BUCKET = 1 << 23  # 32 MiB of float32: large enough for the full bandwidth, small beside the weights


def sum_gradients(model: nn.Module, proc: Process) -> None:
    """Sum the gradients over the ranks, each once, when every rank has computed its share.

    Called once per update where SyncBN's messages leave no room for those of `Buckets` in the backward pass.
    """
    if proc.world == 1:
        return
    for parameters in _portions(model):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with exchange(proc):
            dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient))
    if proc.device.type == "cuda":  # NCCL's calls return at once: here a lost rank is noticed
        with exchange(proc):
            torch.cuda.synchronize(proc.device)
