"""train.compile: the training forward and backward as compiled graphs, one for each canvas and number of images.

All graphs are made before the first update: later, none keeps other ranks waiting, and what cannot be compiled is told
before anything is written.
"""

import time

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from gndet.config.schema import TrainConfig
from gndet.data.batches.batch import largest_batch
from gndet.data.batches.stream import micro_batches
from gndet.errors import ConfigError
from gndet.training.memory import out_of_memory, release
from gndet.training.run import Run
from gndet.training.update import backward, clear_gradients, running_statistics


def compiled(model: nn.Module, cfg: TrainConfig, device: torch.device) -> nn.Module:
    """The training forward by train.compile; it has the model's parameters.  Nothing is compiled before it is called.

    Raises ConfigError for what cannot be on a CPU: reduce-overhead, and memory_limit_mib beside compile.
    """
    if cfg.compile == "none":
        return model
    if cfg.compile == "reduce-overhead" and device.type == "cpu":
        raise ConfigError("train.compile: reduce-overhead makes CUDA graphs, the device is cpu; use default or none")
    if cfg.memory_limit_mib is not None and device.type == "cpu":
        raise ConfigError(
            f"train.compile: {cfg.compile} leaves no operators whose tensors train.memory_limit_mib: "
            f"{cfg.memory_limit_mib:g} could count on a CPU; use one of the two"
        )
    return torch.compile(model, dynamic=False, mode=cfg.compile)


def compile_ahead(run: Run, size: int) -> list[str]:
    """Make the graphs for all canvases and numbers of images of the run's micro-batches.  Returns a line about it.

    size: images at once.  Raises ConfigError where torch cannot compile here: no C++ compiler, no Triton.
    """
    cfg, proc = run.cfg, run.proc
    if cfg.train.compile == "none":
        return []
    nums = sorted({len(places) for places in micro_batches(cfg.train.global_batch, size, proc.rank, proc.world)})
    undo, began = running_statistics(run), time.monotonic()
    try:
        for canvas in cfg.data.canvases:
            data = cfg.data.model_copy(update={"canvases": (canvas,)})
            for num in nums:
                clear_gradients(run)
                batch = largest_batch(run.train_set, data, num, masks=cfg.model.masks)
                backward(run.forward, run.autocast, [batch], num, cfg)
    except TorchDynamoException as error:
        reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
        raise ConfigError(
            f"train.compile: {cfg.train.compile}: torch cannot compile the model here: {reason}; it needs a C++ "
            "compiler, on a GPU Triton as well.  train.compile=none works without"
        ) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise  # otherwise: the first update will meet it, too, and go on with fewer images at once
        release(proc.device)
    finally:
        undo()
        run.model.zero_grad()
    graphs = f"{len(cfg.data.canvases)} canvas(es) of {' and '.join(map(str, nums))} image(s)"
    return [f"compiled for {graphs} in {time.monotonic() - began:.0f} s (train.compile: {cfg.train.compile})"]
