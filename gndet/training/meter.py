"""Speed, data wait and memory of a run, for its log."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gndet.data.batches.stream import Loaded


class Meter:
    """Measure time, data wait and memory between two log lines."""

    def __init__(self, device: torch.device, global_batch: int) -> None:
        self.device, self.global_batch = device, global_batch
        self.seconds_per_update = 0.0
        self._reset()

    def _reset(self) -> None:
        self.updates, self.waited, self.paused, self.started = 0, 0.0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterator[Loaded]) -> Loaded:
        """Return the next batch, and count the time it took."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of an evaluation or a save out of the figures."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Return the figures of the updates since the last call, and start anew."""
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
    """Return the peak memory so far: the GPU's, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
