"""Sum gradients over the ranks while the last backward pass of an update is still running.

Gradients lie in flat buffers, the buckets, filled in the order in which a backward pass reaches the parameters: last
layers first.  A bucket is sent once it is full and all buckets before it have been sent, so at the end a rank waits
only for the bucket of the first layers.  All ranks send all buckets in the same order, once per round, even a rank
whose backward pass failed: it sends what it has.  Afterwards the ranks agree whether the round counts.
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
    """Some parameters, and the buffer that holds their gradients."""

    parameters: list[nn.Parameter]
    gradients: list[Tensor]  # views of `flat` with the strides of their parameters
    flat: Tensor


class Buckets:
    """The gradients of a model's trainable parameters, in buffers that are summed over the ranks."""

    def __init__(self, model: nn.Module, proc: Process) -> None:
        self.proc = proc
        self.buckets = [_bucket(portion) for portion in _portions(model)]
        self.begun = False  # whether this round has sent anything
        self._open: list[int] = []  # gradients still missing, by bucket; [] outside sending()
        self._next = 0  # the next bucket to send
        self._sent: list[Any] = []  # handles of the running sums
        self._error: RuntimeError | None = None
        if proc.world > 1:
            for number, bucket in enumerate(self.buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._count, number))

    def clear(self) -> None:
        """Start a round: point the parameters' gradients to the buckets, and set them to zero."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            for parameter, gradient in zip(bucket.parameters, bucket.gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send buckets as they fill while the context lasts; run the last backward pass in it.

        A stop must not interrupt it: from here on the ranks wait for each other.
        """
        self._open = [len(bucket.parameters) for bucket in self.buckets]
        try:
            yield
        finally:
            self._open = []

    def send_rest(self) -> None:
        """Send the remaining buckets without waiting.

        If the ranks then agree on the host that all have come this far, a lost rank shows before a GPU waits for it.
        """
        for bucket in self.buckets[self._next :] if self.proc.world > 1 else ():
            self._send(bucket)
        self._next = len(self.buckets)

    def finish(self) -> None:
        """Send what remains, and let what follows wait for the sums: on a CPU this rank, on a GPU its stream.

        Afterwards the gradients are the sums over the ranks; they count if every rank's were complete.  Raises
        ProcessLost.
        """
        self.send_rest()
        with exchange(self.proc):
            if self._error is not None:
                raise self._error
            for work in self._sent:
                work.wait()
        self.begun, self._next, self._sent = False, 0, []

    def _count(self, number: int, _: Tensor) -> None:
        """Count a new gradient of a bucket; send every bucket that is full and next in order."""
        if not self._open:
            return
        self._open[number] -= 1
        while self._next < len(self.buckets) and not self._open[self._next]:
            self._send(self.buckets[self._next])
            self._next += 1

    def _send(self, bucket: Bucket) -> None:
        """Start to sum a bucket over the ranks; keep the first error, which finish() raises."""
        self.begun = True
        if self._error is None:
            try:
                self._sent.append(dist.all_reduce(bucket.flat, async_op=True))
            except RuntimeError as error:  # a rank is lost; do not raise inside the backward pass
                self._error = error


def _portions(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the trainable parameters, last first, in portions of one type with about BUCKET elements or more."""
    portion: list[nn.Parameter] = []
    for parameter in reversed([parameter for parameter in model.parameters() if parameter.requires_grad]):
        if portion and (parameter.dtype != portion[0].dtype or sum(p.numel() for p in portion) >= BUCKET):
            yield portion
            portion = []
        portion.append(parameter)
    if portion:
        yield portion


def _bucket(parameters: list[nn.Parameter]) -> Bucket:
    """Make a buffer of zeros for the gradients of dense parameters, in any memory format."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    parts = flat.split([parameter.numel() for parameter in parameters])
    views = [part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, parts, strict=True)]
    return Bucket(parameters, views, flat)


BUCKET = 1 << 23  # 32 MiB of float32: large enough for the full bandwidth, small compared with the weights


def sum_gradients(model: nn.Module, proc: Process) -> None:
    """Sum each gradient over the ranks once, after every rank has computed its share.

    Used with SyncBN, whose messages in the backward pass rule out those of `Buckets`.
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
