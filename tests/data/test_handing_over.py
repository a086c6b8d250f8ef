"""How loader processes hand over batches where open files, shared memory, file sizes and memory are limited.

Limits and processes are real.  The truth is the stream of a single process without limits.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gndet.data.batches.stream import prefetch
from gndet.data.workers import SMALL, map_ahead
from gndet.errors import MachineError

FULL = 3  # the limit of open files at which no other can be opened: stdin, stdout and stderr are open


def load(item: int) -> torch.Tensor:
    """Return (2, 3, 100, 120) float32, more than SMALL bytes, with colors side by side in memory."""
    values = torch.arange(72_000.0).reshape(2, 3, 100, 120) + item
    return values.contiguous(memory_format=torch.channels_last)


def small(item: int) -> torch.Tensor:
    return torch.full((3,), item)


def batches(count: int, workers: int = 2, load: Any = load) -> Any:
    return prefetch(load, iter(range(count)), workers=workers, pin_memory=False, describe=str)


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """Lower a limit of this process and of those that it starts."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def opened() -> list[int]:
    return list(map(int, os.listdir("/proc/self/fd")))


def equal(held: list[torch.Tensor], load: Any = load) -> bool:
    return all(torch.equal(batch, load(item)) for item, batch in enumerate(held))


def mapped(name: str = "memfd:gndet") -> int:
    return Path("/proc/self/maps").read_text().count(name)


@pytest.mark.parametrize("left", [24, 200])
def test_more_batches_are_held_than_files_may_be_open(left: int) -> None:
    with limited(resource.RLIMIT_NOFILE, max(opened()) + left):
        held = list(batches(300))
    assert len(held) == 300 and equal(held)
    assert held[0].is_contiguous(memory_format=torch.channels_last)
    held[7][0, 0, 0, 0] = 5  # a batch may be written to


def test_batches_need_neither_dev_shm_nor_the_process_that_made_them() -> None:
    before, shared = mapped(), mapped("/dev/shm")
    held = list(batches(20))  # all processes have ended
    assert mapped() == before + 20 and mapped("/dev/shm") == shared
    assert len(held) == 20 and equal(held)
    files = len(opened())
    del held
    assert (len(opened()), mapped()) == (files - 20, before)


@pytest.mark.parametrize("load", [load, small])
def test_without_files_in_memory_batches_come_through_the_pipe(load: Any) -> None:
    before = mapped()
    with limited(resource.RLIMIT_FSIZE, SMALL):
        held = list(batches(30, load=load))
    assert len(held) == 30 and equal(held, load) and mapped() == before


def arrays(item: int) -> tuple[np.ndarray, ...]:
    """Return arrays of many kinds: empty, transposed, read-only, of bools and of objects."""
    large = np.arange(100_000, dtype=np.int64) + item
    fixed = large[:5].copy()
    fixed.flags.writeable = False
    return np.zeros((0, 4)), large.reshape(100, -1).T, large[::3], fixed, large % 2 == 0, np.array(["a", None])


def test_arrays_of_every_kind_arrive_as_they_were() -> None:
    for item, result in map_ahead(arrays, range(5), workers=2, on_death=lambda *_: None):
        for got, expected in zip(result, arrays(item), strict=True):
            assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_a_process_without_open_files_left_says_so_in_a_line() -> None:
    results = batches(40)
    next(results)
    with limited(resource.RLIMIT_NOFILE, FULL), pytest.raises(MachineError) as error:
        list(results)
    assert str(error.value) == (
        "too many open files: raise the limit (ulimit -n 4096), or end other programs or, in training, lower "
        "data.workers (0: no processes)"
    )


def test_processes_that_cannot_be_started_name_the_remedy() -> None:
    with limited(resource.RLIMIT_NOFILE, FULL), pytest.raises(MachineError) as error:
        list(batches(40))
    assert str(error.value) == (
        "a loader process cannot be started: Too many open files: end other programs or, in training, lower "
        "data.workers (0: no processes)"
    )


def too_large(item: int) -> torch.Tensor:
    return torch.empty(2**55) if item == 3 else small(item)


def too_large_array(item: int) -> np.ndarray:
    return np.empty(2**55) if item == 3 else np.zeros(3)


@pytest.mark.parametrize("load", [too_large, too_large_array])
def test_a_process_that_runs_out_of_memory_names_the_remedy(load: Any) -> None:
    with pytest.raises(
        MachineError, match=r"^a loader process ran out of memory: end other programs or, .*lower data\.workers"
    ):
        list(batches(8, load=load))
