"""What fits in memory: all that training holds without any image, and the largest micro-batch beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gndet.config.schema import Config
from gndet.config.training import TrainConfig
from gndet.data.batches.batch import largest_batch
from gndet.distributed.collectives import all_reduce_min
from gndet.distributed.process import Process
from gndet.errors import ConfigError, out_of_memory
from gndet.training.memory import MIB, free_memory, largest_fitting, limited, release
from gndet.training.run import Run
from gndet.training.update import backward, clear_gradients, resident_bytes

MARGIN = 0.1  # fraction of memory that `auto` keeps free for fragmentation and libraries' workspaces


def fixed_bytes(model: nn.Module, cfg: TrainConfig) -> dict[str, int]:
    """Return the bytes that training holds without any image, by what they are for."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    states = 2 if cfg.optimizer.kind != "sgd" else int(cfg.optimizer.momentum > 0)  # numbers per weight
    return {
        "weights": weights, "averaged weights": weights if cfg.ema else 0, "gradients": trainable,
        "optimizer state": trainable * states,
    }  # fmt: skip


def checkpoint_bytes(model: nn.Module, cfg: TrainConfig) -> int:
    """Return the size of a checkpoint: weights, averaged weights, and the optimizer's state."""
    sizes = fixed_bytes(model, cfg)
    return sum(sizes.values()) - sizes["gradients"]


@contextmanager
def enough_memory(model: nn.Module, cfg: Config, proc: Process) -> Iterator[None]:
    """Within this context allocate all memory that training holds without any image.

    Raises ConfigError that says what it is for, if it is more than train.memory_limit_mib or if memory runs out.
    """
    limit, room = cfg.train.memory_limit_mib, ""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        room = f"memory ran out ({error})"
    sizes = {name: size / MIB for name, size in fixed_bytes(model, cfg.train).items() if size}
    if limit is not None and sum(sizes.values()) > limit:
        room = f"train.memory_limit_mib is {limit:g}"
    if room:
        ways = ["a smaller model"]
        ways += ["train.optimizer.kind=sgd"] if cfg.train.optimizer.kind != "sgd" else []
        ways += ["train.ema=0"] if cfg.train.ema else []
        raise ConfigError(
            f"rank {proc.rank}: without any image, training takes {sum(sizes.values()):.0f} MiB on {proc.device} ("
            f"{', '.join(f'{name} {size:.0f}' for name, size in sizes.items())}), but {room}; choose "
            f"{', '.join(ways)} or a device with more free memory"
        )


def images_at_once(run: Run) -> int:
    """Return the size of micro-batches: train.images_per_gpu, or for `auto` the largest that fits on every rank.

    Among sizes that need the same number of micro-batches it takes the smallest, so that they are even.  A size fits
    if a forward and backward pass over the largest canvas of the data leaves MARGIN of the memory free.  Raises
    ConfigError if the split is not possible, or if not even one image fits.
    """
    cfg, proc = run.cfg, run.proc
    if mistake := cfg.split_mistake(proc.world):
        raise ConfigError(mistake)
    if cfg.train.images_per_gpu != "auto":
        return cfg.train.images_per_gpu
    limit = cfg.train.memory_limit_mib
    if limit is None and proc.device.type == "cpu":
        raise ConfigError(
            "train.images_per_gpu: auto on a CPU needs train.memory_limit_mib, the MiB of tensors a rank may hold"
        )
    most = -(-cfg.train.global_batch // proc.world)
    sizes = sorted({-(-most // count) for count in range(1, most + 1)})
    (size,) = all_reduce_min([largest_fitting(sizes, lambda num: fits(run, num))], proc)
    if size == 0:
        room = "the free GPU memory" if limit is None else f"train.memory_limit_mib: {limit:g}"
        raise ConfigError(
            f"train.images_per_gpu: auto: not even one image fits in {100 * (1 - MARGIN):.0f} % of {room}, with "
            "weights, gradients and the optimizer's state; lower data.max_edge or data.shortest_edge"
        )
    if proc.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(proc.device)  # the log must show the peak of the run itself
    return size


def fits(run: Run, num: int) -> bool:
    """Return whether memory fits num of the largest images at once beside weights, gradients and optimizer state."""
    device, stated = run.proc.device, run.cfg.train.memory_limit_mib
    limit = stated * MIB if stated else torch.cuda.memory_allocated(device) + free_memory(device)
    # on a CPU the mask head computes positive regions only; this many objects make all regions positive
    objects = 0 if device.type == "cuda" else run.cfg.model.max_positives
    batch = largest_batch(run.train_set, run.cfg.data, num, masks=run.cfg.model.masks, objects=objects)
    try:
        clear_gradients(run)
        for parameter in run.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with limited(device, int(limit * (1 - MARGIN)), resident_bytes(run)):
            backward(run.model, run.autocast, [batch], num, run.cfg)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        run.model.zero_grad()
        release(device)
    return True
