"""Optimizer and learning-rate schedule.  A schedule is a pure function of the update number."""

import importlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.training import OptimizerConfig, ScheduleConfig
from gndet.errors import ConfigError
from gndet.modeling.norms.layers import PER_CHANNEL


def make_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make SGD with momentum, AdamW or LAMB for the trainable parameters; gamma and beta have their own weight decay.

    It has its state from the start, all zeros, which gives the first step that torch's own state gives.  So memory
    cannot run out in the first step, and a first step that found_inf turns off leaves no state without values.
    Raises ConfigError for LAMB without timm.
    """
    for method in vars(torch.optim.Optimizer).values():  # torch imports torch._dynamo, a long time, only to mark them
        if getattr(method, "__globals__", {}).get("__name__") == "torch._compile":
            method.__wrapped__.__dynamo_disable = method.__wrapped__
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": cfg.weight_decay},
        {"params": [], "weight_decay": cfg.norm_weight_decay},
    ]
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                apart = isinstance(module, PER_CHANNEL) or (cfg.kind == "lamb" and parameter.ndim == 1)
                groups[apart]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    # fused: one pass over memory; its CPU kernel expects gradients in the memory layout of their parameters
    optimizer: torch.optim.Optimizer
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    if cfg.kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    elif cfg.kind == "lamb":
        optimizer = _lamb()(groups, lr=cfg.lr, betas=cfg.betas, max_grad_norm=None)  # train.py limits the gradient
    else:
        optimizer = torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=True)
        names = ("momentum_buffer",) if cfg.momentum else ()
    for group in optimizer.param_groups:
        if cfg.kind == "lamb":
            group["step"] = torch.zeros(())  # timm counts by group; the state holds it, too, for checkpoints
        for parameter in group["params"]:
            if cfg.kind != "sgd":
                optimizer.state[parameter]["step"] = group.get("step", torch.zeros((), device=parameter.device))
            for name in names:
                optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return optimizer


def _lamb() -> Any:
    try:
        return importlib.import_module("timm.optim").Lamb
    except ImportError:
        raise ConfigError("train.optimizer.kind: lamb needs timm: pip install timm") from None


def make_step(optimizer: Any, skip: Tensor) -> None:
    """Change the weights by their gradients, unless skip (0-dim) is 1, which the device decides; for LAMB, the host."""
    optimizer.found_inf = skip  # the fused optimizers change nothing if it is 1
    if not optimizer.defaults.get("fused") and skip:
        return
    with torch.no_grad():  # optimizer.step() would import torch._dynamo, a longer import than torch
        inspect.unwrap(type(optimizer).step)(optimizer)


def total_updates(cfg: ScheduleConfig, global_batch: int) -> int:
    """Return the number of updates in which the run sees as many images as with the reference batch."""
    return max(round(cfg.updates * cfg.reference_batch / global_batch), 1)


def peak_learning_rate(cfg: OptimizerConfig, schedule: ScheduleConfig, global_batch: int) -> float:
    """Return the learning rate after warm-up: cfg.lr rescaled from the reference batch to global_batch."""
    ratio = global_batch / schedule.reference_batch
    return cfg.lr * (ratio if cfg.kind == "sgd" else math.sqrt(ratio))


def learning_rate(update: int, cfg: OptimizerConfig, schedule: ScheduleConfig, global_batch: int) -> float:
    """Return the learning rate of an update (0, 1, ...), with the schedule rescaled to global_batch.

    It grows linearly with the batch for sgd (Goyal et al. 2017), with its square root for adamw (Malladi et al. 2022)
    and lamb (You et al. 2020).
    """
    ratio = global_batch / schedule.reference_batch
    peak = peak_learning_rate(cfg, schedule, global_batch)
    reference_update = update * ratio  # the same number of images seen
    if schedule.kind == "cosine":
        share = (1 + math.cos(math.pi * min(reference_update / schedule.updates, 1))) / 2
        factor = schedule.final_factor + (1 - schedule.final_factor) * share
    else:
        factor = schedule.gamma ** sum(reference_update >= step for step in schedule.steps)
    if reference_update < schedule.warmup:
        done = reference_update / schedule.warmup
        factor *= schedule.warmup_factor * (1 - done) + done
    return peak * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: {"momentum_buffer/fpn.output2.conv.weight": ...}."""
    return {
        f"{key}/{name}": value
        for name, parameter in _trainable(model)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore the state from `optimizer_tensors`."""
    parameters = dict(_trainable(model))
    for full_name, value in tensors.items():
        key, name = full_name.split("/", 1)
        optimizer.state[parameters[name]][key].copy_(value)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
