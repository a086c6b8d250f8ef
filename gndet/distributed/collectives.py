"""Collectives between the ranks of a run.  Each raises ProcessLost, which names the rank that did not take part."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gndet.distributed.process import Process
from gndet.distributed.signals import Stop
from gndet.errors import ProcessLost, TrainingError


@contextmanager
def exchange(proc: Process) -> Iterator[None]:
    """Turn the failure of a collective into ProcessLost, which names the ranks that did not take part."""
    try:
        with proc.watch.waiting() if proc.watch else nullcontext():
            yield
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):  # this rank's own GPU
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        reason = re.sub(r"^\[\S+\] ", "", reason)  # without the place in gloo's source
        if proc.watch is None:
            raise ProcessLost(f"rank {proc.rank}: the others did not respond: {reason}") from error
        text = (
            f"rank {proc.rank} {proc.watch.where()}: the others did not respond: {proc.watch.others()} ({reason}); "
            "the same command continues from the last checkpoint"
        )
        proc.watch.dump(text)
        raise ProcessLost(text) from error


def broadcast(tensors: Iterable[Tensor], proc: Process) -> None:
    """Copy the tensors of rank 0 to every rank: initial weights, BN's running statistics."""
    if proc.world > 1:
        for tensor in tensors:
            dense = tensor.contiguous()
            with exchange(proc):
                dist.broadcast(dense, 0)
            tensor.copy_(dense)


def all_gather(items: list[Any], proc: Process) -> list[list[Any]]:
    """Gather each rank's list on every rank, in rank order."""
    if proc.world == 1:
        return [items]
    gathered: list[Any] = [None] * proc.world
    with exchange(proc):
        dist.all_gather_object(gathered, items)
    return gathered


def gather_to_first(items: list[Any], proc: Process) -> list[list[Any]]:
    """Gather each rank's list on rank 0; other ranks get []."""
    if proc.world == 1:
        return [items]
    collected: list[Any] | None = [None] * proc.world if proc.first else None
    with exchange(proc):
        dist.gather_object(items, collected)
    return collected or []


def all_reduce_sum(values: Tensor, proc: Process) -> Tensor:
    """Sum a tensor over the ranks, in place.  Returns it."""
    if proc.world > 1:
        with exchange(proc):
            dist.all_reduce(values)
    return values


def all_reduce_min(values: Sequence[int], proc: Process) -> list[int]:
    """Return the minimum of each value over the ranks."""
    if proc.world == 1:
        return list(values)
    smallest = torch.tensor(values)
    with exchange(proc):
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest.tolist()


def raise_on_all(failure: BaseException | None, proc: Process) -> None:
    """Raise on every rank what stopped any of them: a rank's own error first, then other ranks' errors, then Stop.

    failure: what stopped this rank, or None.  Every rank must call it, whether its work succeeded or not.
    """
    mine = "" if failure is None else repr(Stop) if isinstance(failure, Stop) else str(failure)
    texts = [text for part in all_gather([mine], proc) for text in part]
    errors = [text for text in texts if text not in ("", repr(Stop))]
    if failure is not None and (not errors or not isinstance(failure, Stop)):
        raise failure
    if errors:
        raise TrainingError("\n".join(dict.fromkeys(errors)))
    if repr(Stop) in texts:
        raise Stop
