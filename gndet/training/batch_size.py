"""How many images a rank computes at once: as the config says, or the most that fit."""

import torch
from torch import Tensor

from gndet.data.batches.batch import largest_batch
from gndet.distributed.collectives import all_reduce_min
from gndet.errors import ConfigError
from gndet.training.memory import MIB, free_memory, largest_fitting, limited, out_of_memory, release
from gndet.training.optim import STATE_SIZE
from gndet.training.run import Run
from gndet.training.update import backward, clear_gradients, resident_bytes

MARGIN = 0.1  # of the memory, kept free by `auto` for what its trial does not show: fragments, libraries' workspaces


def images_at_once(run: Run) -> int:
    """The size of the micro-batches: train.images_per_gpu, for `auto` the largest that fits on every rank.

    Of sizes that need equally many micro-batches the smallest is taken, so that they are even.  A size fits if a
    forward and backward pass over the largest canvas of the data leaves MARGIN of the memory free.  Raises
    ConfigError for a split that is not possible, and where not even one image fits.
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
            f"train.images_per_gpu: auto: not even one image fits in {100 * (1 - MARGIN):.0f} % of {room}, beside "
            "weights, gradients and the optimiser's state; lower data.max_edge or data.shortest_edge"
        )
    if proc.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(proc.device)  # the log shows the run's own peak
    return size


def fits(run: Run, num: int) -> bool:
    """Whether num of the largest images can be trained on at once, beside gradients and the optimiser's state."""
    device, stated = run.proc.device, run.cfg.train.memory_limit_mib
    limit = stated * MIB if stated else torch.cuda.memory_allocated(device) + free_memory(device)
    # on a CPU the mask head computes positive regions only: objects of that number make them all positive
    objects = 0 if device.type == "cuda" else run.cfg.model.max_positives
    batch = largest_batch(run.train_set, run.cfg.data, num, masks=run.cfg.model.masks, objects=objects)
    trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    to_come = 0 if run.optimizer.state else STATE_SIZE[run.cfg.train.optimizer.kind]
    state: list[Tensor] = []
    try:
        clear_gradients(run)
        for parameter in trainable:
            state += [torch.empty_like(parameter) for _ in range(to_come)]
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with limited(device, int(limit * (1 - MARGIN)), resident_bytes(run) + sum(t.nbytes for t in state)):
            backward(run.model, run.autocast, [batch], num, run.cfg)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        run.model.zero_grad()
        state.clear()
        release(device)
    return True
