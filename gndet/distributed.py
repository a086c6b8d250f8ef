"""The process a run lives in: its rank, device, memory allocator. The environment is read here and nowhere else."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gndet.errors import ConfigError

BUCKET = 1 << 23  # 32 MiB of float32: large enough for the full bandwidth, small beside the weights
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc


class Process(NamedTuple):
    """One of `world` processes of a run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


@contextmanager
def process(device: str, deterministic: bool = False) -> Iterator[Process]:
    """Join the run that torchrun started, or be its only process; leave it at the end.

    device: auto, cpu or cuda.  Raises ConfigError where cuda is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda: torch finds no GPU here; use device=cpu or device=auto")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    else:
        _keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Process(int(os.environ.get("RANK", "0")), world, chosen)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory: page faults of mapping it anew cost 38 % of a CPU training step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def place(model: nn.Module, precision: str, proc: Process) -> tuple[nn.Module, Callable[[], AbstractContextManager]]:
    """Move a model to the device in its precision (train.precision); with the context it is to run in."""
    model = model.to(proc.device, torch.float64 if precision == "float64" else None, memory_format=torch.channels_last)
    bf16 = precision == "bf16" or (precision == "auto" and proc.device.type == "cuda")
    return model, partial(torch.autocast, proc.device.type, torch.bfloat16) if bf16 else nullcontext


def sum_gradients(model: nn.Module, proc: Process) -> None:
    """Sum the gradients over the processes, each once, in messages of at least BUCKET elements but the last.

    Called once an update, when every process has computed its share.  DistributedDataParallel would send them during
    the last backward pass, in which no process could then start its share again after running out of memory, and
    would keep a second copy of all gradients.
    """
    if proc.world == 1:
        return
    bucket: list[nn.Parameter] = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter)
        if parameter is trainable[-1] or sum(p.numel() for p in bucket) >= BUCKET:
            flat = torch.cat([p.grad.flatten() for p in bucket])
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad.copy_(part.view_as(p.grad))
            bucket = []


def give_first_s(tensors: Iterable[Tensor], proc: Process) -> None:
    """Give every process the first one's values: initial weights, BN's running statistics."""
    if proc.world > 1:
        for tensor in tensors:
            dense = tensor.contiguous()
            dist.broadcast(dense, 0)
            tensor.copy_(dense)


def gather(items: list[Any], proc: Process) -> list[list[Any]]:
    """Every process's list, by rank, on every process."""
    if proc.world == 1:
        return [items]
    gathered: list[Any] = [None] * proc.world
    dist.all_gather_object(gathered, items)
    return gathered


def total(values: Tensor, proc: Process) -> Tensor:
    """The sum of a tensor over the processes."""
    if proc.world > 1:
        dist.all_reduce(values)
    return values


def any_process(flag: bool, proc: Process) -> bool:
    """Whether the flag is set in any process; all get the same answer."""
    if proc.world == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
