"""A limit on the memory of tensors: the GPU allocator's own, and on a CPU one that counts."""

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
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # torch's on a CPU
    "unable to find an engine",  # cuDNN, when no algorithm's workspace fits
    "_STATUS_ALLOC_FAILED",  # cuDNN, cuBLAS
    "CUDA error: out of memory",  # the driver
)


@contextmanager
def limited(device: torch.device, limit: int, resident: int = 0) -> Iterator[None]:
    """Raise torch.OutOfMemoryError inside where tensors would take more than limit bytes.

    resident: bytes of the tensors that are there before, which a GPU's allocator knows by itself.  On a CPU tensors are
    counted as operators return them: what an operator needs while it runs is not.
    """
    if device.type == "cuda":
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
    """Counts the bytes of the CPU tensors that operators return, forward and backward, for as long as they live."""

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
            if given is None:  # a view, or a result written in place, is not new
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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out; libraries below torch say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> int:
    """The bytes that this process may still allocate on a GPU, its own cache included."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def release(device: torch.device) -> None:
    """Give cached memory back after a failed allocation, so that smaller pieces find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_fitting(candidates: list[int], fits: Callable[[int], bool]) -> int:
    """The largest of rising candidates that fits, by bisection, or 0; what is smaller than one that fits does too."""
    count = bisect.bisect_left(candidates, True, key=lambda candidate: not fits(candidate))
    return candidates[count - 1] if count else 0
