"""Limit the memory of tensors: by the GPU's allocator, or on a CPU by counting bytes."""

import bisect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


@contextmanager
def limited(device: torch.device, limit: int, resident: int = 0) -> Iterator[None]:
    """Raise torch.OutOfMemoryError in the context if tensors would take more than `limit` bytes.

    resident: bytes of existing tensors, which a GPU's allocator already knows.  On a CPU, tensors are counted when an
    operator returns them; memory that an operator needs while it runs is not counted.
    """
    if device.type == "cuda":
        # The allocator compares with the limit only what it requests from the driver.  An evaluation leaves cached
        # blocks, from which tensors could pass the limit.
        if torch.cuda.memory_reserved(device) > limit:
            release(device)
        total, before = torch.cuda.mem_get_info(device)[1], torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(min(limit / total, before), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, device)
    else:
        with TensorBytes(limit, resident):
            yield


class TensorBytes(TorchDispatchMode):
    """Count the bytes of CPU tensors that operators return, forward and backward, while the tensors live."""

    def __init__(self, limit: int, resident: int = 0) -> None:
        super().__init__()
        self.limit, self.live, self.peak = limit, resident, resident
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given: set[int] | None = None
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            if given is None:  # views and results written in place are not new
                given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if storage.data_ptr() not in given:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known.add(storage)
        weakref.finalize(storage, self._free, size).atexit = False
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live / MIB:.0f} MiB of tensors, the limit is {self.limit / MIB:.0f}")

    def _free(self, size: int) -> None:
        self.live -= size


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU, including its own cache."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def release(device: torch.device) -> None:
    """Free cached memory after a failed allocation, so that smaller tensors fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_fitting(candidates: list[int], fits: Callable[[int], bool]) -> int:
    """Return the largest of ascending candidates that fits, or 0, by bisection; below one that fits, all must fit."""
    count = bisect.bisect_left(candidates, True, key=lambda candidate: not fits(candidate))
    return candidates[count - 1] if count else 0
