"""Time work on a device: by CUDA's events on a GPU, where launches only queue it; by the clock on a CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

WARM_UPS = {"cpu": 1, "cuda": 3}  # a first call compiles kernels and chooses algorithms, a second captures graphs
Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Do the work once.  Returns its result and its seconds.

    device: cpu or cuda.  The GPU is idle before and after; launches that the GPU waits for count.
    """
    if device == "cpu":
        began = time.perf_counter()
        return work(), time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    result = work()
    last.record()
    torch.cuda.synchronize()
    return result, first.elapsed_time(last) / 1e3  # milliseconds


def in_turn(works: Sequence[Callable[[], object]], device: str, rounds: int) -> list[list[float]]:
    """Do the works in turn, in rounds that count after rounds that warm up.  Returns the seconds of each."""
    times = [[timed(work, device)[1] for work in works] for _ in range(WARM_UPS[device] + rounds)]
    return [list(own) for own in zip(*times[WARM_UPS[device] :], strict=True)]


def median_s(work: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Return the median seconds of the work, after its warm-ups."""
    return statistics.median(in_turn([work], device, rounds)[0])


def as_graph(works: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """Return one function that does all works: on a GPU a CUDA graph of them, whose launches cost the host nothing.

    The works run as a warm-up before the graph is captured.  Each result has memory of its own, as far as the works
    return it, so that a work does not find the result of another in the GPU's cache.
    """
    if device == "cpu":
        return lambda: [work() for work in works]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS[device]):
            for work in works:
                work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [work() for work in works]
    del results
    return graph.replay


def graph_s(works: Sequence[Callable[[], object]], device: str) -> float:
    """Return the median seconds per work of works that are alike, without the host's part."""
    return median_s(as_graph(works, device), device) / len(works)


def host_s(work: Callable[[], object], device: str, repeats: int = 100) -> float:
    """Return the host's seconds to issue the work: the least mean of three runs; the GPU may finish later."""
    means = []
    for _ in range(WARM_UPS[device]):
        work()
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        means.append((time.perf_counter() - began) / repeats)
    return min(means)
