"""What the processes of a run tell each other: every exchange names the one that did not come."""

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
def together(proc: Process) -> Iterator[None]:
    """Wait for the other processes.  Raises ProcessLost, which says what is known of them, where they do not come."""
    try:
        with proc.watch.waiting() if proc.watch else nullcontext():
            yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        if proc.watch is None:
            raise ProcessLost(f"process {proc.rank}: the others did not come: {reason}") from error
        text = f"process {proc.rank} {proc.watch.where()}: the others did not come: {proc.watch.others()} ({reason})"
        proc.watch.dump(text)
        raise ProcessLost(text) from error


def give_first_s(tensors: Iterable[Tensor], proc: Process) -> None:
    """Give every process the first one's values: initial weights, BN's running statistics."""
    if proc.world > 1:
        for tensor in tensors:
            dense = tensor.contiguous()
            with together(proc):
                dist.broadcast(dense, 0)
            tensor.copy_(dense)


def gather(items: list[Any], proc: Process) -> list[list[Any]]:
    """Every process's list, by rank, on every process."""
    if proc.world == 1:
        return [items]
    gathered: list[Any] = [None] * proc.world
    with together(proc):
        dist.all_gather_object(gathered, items)
    return gathered


def collect(items: list[Any], proc: Process) -> list[list[Any]]:
    """Every process's list, by rank, on the first process; none on the others, who need not carry them."""
    if proc.world == 1:
        return [items]
    collected: list[Any] | None = [None] * proc.world if proc.first else None
    with together(proc):
        dist.gather_object(items, collected)
    return collected or []


def total(values: Tensor, proc: Process) -> Tensor:
    """The sum of a tensor over the processes."""
    if proc.world > 1:
        with together(proc):
            dist.all_reduce(values)
    return values


def least(values: Sequence[int], proc: Process) -> list[int]:
    """The smallest of each value in any process; all get the same answer."""
    if proc.world == 1:
        return list(values)
    smallest = torch.tensor(values)
    with together(proc):
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest.tolist()


def meet(trouble: BaseException | None, proc: Process) -> None:
    """Raise, in all processes, what stopped any of them: an error before a Stop, its own before that of others.

    trouble: this process's, or None.  All processes call it once, where their work may have ended otherwise.
    """
    mine = "" if trouble is None else repr(Stop) if isinstance(trouble, Stop) else str(trouble)
    texts = [text for part in gather([mine], proc) for text in part]
    errors = [text for text in texts if text not in ("", repr(Stop))]
    if trouble is not None and (not errors or not isinstance(trouble, Stop)):
        raise trouble
    if errors:
        raise TrainingError("\n".join(dict.fromkeys(errors)))
    if repr(Stop) in texts:
        raise Stop
