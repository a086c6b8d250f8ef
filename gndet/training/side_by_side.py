"""Compute the images of a micro-batch side by side on a CPU, in one thread each, if the network is small.

Torch divides each operator over the cores, and all threads wait for the slowest after each one.  The operators of a
small network take microseconds: the waiting costs as much as the work, and if another process takes one of the cores,
an update takes four times as long.  Images do not depend on each other, so each thread can compute one whole.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.schema import Config
from gndet.distributed.process import Process
from gndet.modeling.conv_norm import standardized_once
from gndet.structures import Batch

ROOM = 64 << 20  # bytes that the gradients of all threads but the first may take
Means = dict[str, Tensor]  # 0-dim losses by name


def image_threads(cfg: Config, model: nn.Module, proc: Process) -> int:
    """Return how many images to compute side by side; 1: let torch divide the operators.

    Not if images depend on each other, if gradients are sent to other ranks while they are computed, if the model is
    compiled, or if tensors are counted for train.memory_limit_mib.
    """
    size = cfg.train.images_per_gpu
    alone = proc.device.type == "cpu" and proc.world == 1 and cfg.train.compile == "none"
    if not alone or size == "auto" or cfg.train.memory_limit_mib is not None or cfg.model.batch_coupling():
        return 1
    gradient = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return min(torch.get_num_threads(), size, 1 + ROOM // max(gradient, 1))


def add_gradients(losses_of: Callable[[Batch], Means], parts: Sequence[Batch], model: nn.Module) -> Means:
    """Add the gradients of parts of a micro-batch to the parameters', each part in its own thread.

    losses_of: computes the losses of a part, which are summed.  Gradients and losses are added in the order of the
    parts, however fast the threads are.  Returns the summed losses, float64.
    """
    with standardized_once(model, partial(_each, len(parts))) as shared:
        parameters = [shared.get(parameter, parameter) for parameter in model.parameters() if parameter.requires_grad]
        return _add_gradients(losses_of, parts, parameters)


def _add_gradients(losses_of: Callable[[Batch], Means], parts: Sequence[Batch], parameters: Sequence[Tensor]) -> Means:
    """Do the same for the gradients of these leaves of the graph."""

    def compute(part: Batch) -> tuple[Means, Sequence[Tensor | None]]:
        means = losses_of(part)
        gradients = torch.autograd.grad(total(means), parameters, allow_unused=True)
        return _detached(means), gradients

    others = [_pool(len(parts) - 1).submit(compute, part) for part in parts[1:]]
    try:
        first = losses_of(parts[0])
        total(first).backward()
        sums = _detached(first)
        results = [other.result() for other in others]
    finally:
        wait(others)  # even after an error or a signal: they use the weights
    for means, gradients in results:
        sums = {name: sums[name] + mean for name, mean in means.items()}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return sums


def _each(threads: int, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return the results of a function for each item, computed in threads."""

    def results(share: Sequence[Any]) -> list[Any]:
        return [function(item) for item in share]

    others = [_pool(threads - 1).submit(results, items[first::threads]) for first in range(1, threads)]
    try:
        shares = [results(items[::threads]), *(other.result() for other in others)]
    finally:
        wait(others)
    return [shares[i % threads][i // threads] for i in range(len(items))]


def total(means: Means) -> Tensor:
    """Return the sum of the losses."""
    return reduce(add, means.values())


def _detached(means: Means) -> Means:
    return {name: mean.detach().double() for name, mean in means.items()}


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay, because torch and the allocator prepare each new one."""
    return ThreadPoolExecutor(threads, thread_name_prefix="images")
