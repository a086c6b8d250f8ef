"""Measure the norm layers of a model on a few images: statistics from a forward pass that changes nothing.

Letters: n samples (images or regions), C channels, G groups, (H, W) maps, k observations.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gndet.modeling.image_model import ImageModel
from gndet.modeling.norms.activating import EvoNormS0, FilterResponseNorm
from gndet.modeling.norms.layers import (
    NORM_LAYERS,
    BatchRenorm,
    FrozenBatchNorm,
    GroupNorm,
    NormModule,
    SyncBatchNorm,
)
from gndet.modeling.norms.valid_area import ValidArea
from gndet.modeling.recompute import keeping_all
from gndet.structures import Batch

DEAD = 1e-3  # limit of |gamma|, also relative to the layer's median: the channel carries no signal
EXPLODING = 10.0  # limit of |gamma| relative to the layer's median at the start, or to 1 if that is larger
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
OBSERVATIONS, LEAST = 512, 16  # number of positions at which channels are compared; below LEAST there is no result
GROUPS, PER_GROUP = 16, 4  # number of compared groups, and of channels per group
DIGITS = 5  # of a number in a line of norms.jsonl

Start = Mapping[str, Tensor]  # "<layer>.weight" and "<layer>.bias" (C,) at the start of the run


class Measured(NamedTuple):
    """The measurements of a norm layer on some images."""

    numbers: dict[str, Any]  # its entry in norms.jsonl
    group_std: np.ndarray  # standard deviations of all groups and samples; for BN: of channels and batches
    gamma: np.ndarray  # (C,)


class Moments(NamedTuple):
    """The input's mean and variance per channel (n, C) over `count` (n, 1) positions, in one call of a layer."""

    mean: Any  # Tensor, or an array
    var: Any
    count: Any


Call = tuple[Moments, Tensor]  # moments and similarity of the input in one call of a layer


def norm_layers(model: nn.Module) -> dict[str, NormModule]:
    """Return the norm layers of a model by name, in construction order: by depth, except for shortcuts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NORM_LAYERS)}


def affine(model: nn.Module) -> dict[str, Tensor]:
    """Copy gamma and beta of all norm layers to the CPU.  Returns a Start."""
    return {
        f"{name}.{which}": getattr(layer, which).detach().to("cpu", copy=True).contiguous()
        for name, layer in norm_layers(model).items()
        for which in ("weight", "bias")
    }


def measure(
    model: ImageModel, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager], start: Start | None
) -> list[Measured]:
    """Pass images through a detector and its heads, and measure the inputs of its norm layers.

    batches: for BN, batch statistics are compared with the running ones; other layers treat images one by one.
    start: gamma and beta at the start of the run; None: unknown.  The model does not change (modes, memory, buffers),
    and no random number is drawn.  Statistics are taken in the model's type, at least float32, and summed in float64.
    """
    layers = norm_layers(model)
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    with keeping_all(model), torch.inference_mode(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(_look, calls[name])))
        model.eval()
        for batch in batches:
            with autocast():
                model.probe(batch.images.to(model.device), batch.sizes.to(model.device), batch.padded)
        return [_measured(name, layer, calls[name], start) for name, layer in layers.items()]


def _look(calls: list[Call], layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Note the moments and the similarity of a layer's input, without the padding if the layer is masked."""
    x, area = inputs[0], inputs[1] if len(inputs) > 1 and getattr(layer, "masked", False) else None
    with torch.autocast(x.device.type, enabled=False):
        groups = _groups(layer) or x.shape[1]
        calls.append((moments(x.to(layer.weight.dtype), area), similarity(x, groups, area)))


def moments(x: Tensor, area: ValidArea | None) -> Moments:
    """Return mean and variance of each channel of x (n, C, H, W) over its map, or only over `area`."""
    if area is None:
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return Moments(mean, var, torch.full((len(x), 1), x.shape[2] * x.shape[3], dtype=torch.float64))
    count = area.num_cells
    mean = torch.where(area.mask, x, 0.0).sum((2, 3)) / count.to(x.dtype)
    centered = torch.where(area.mask, x - mean[:, :, None, None], 0.0)
    return Moments(mean, centered.square_().sum((2, 3)) / count.to(x.dtype), count)


def similarity(x: Tensor, groups: int, area: ValidArea | None) -> Tensor:
    """Return the mean |correlation| of channel pairs of x (n, C, H, W): within a group, and across groups.

    It compares PER_GROUP channels of each of GROUPS groups at OBSERVATIONS evenly spread positions.  Returns (2,)
    float64; nan if there is no such pair whose channels vary.
    """
    num, channels, height, width = x.shape
    index = torch.arange(num * height * width, device=x.device)
    index = index if area is None else index[area.mask.flatten()]
    if len(index) < LEAST:
        return torch.full((2,), math.nan, dtype=torch.float64, device=x.device)
    index = index[_spread(len(index), OBSERVATIONS, x.device)]
    per_group = channels // groups
    group = _spread(groups, GROUPS, x.device)
    chosen = (group[:, None] * per_group + _spread(per_group, PER_GROUP, x.device)).flatten()
    values = x[index // (height * width), :, index // width % height, index % width][:, chosen].double()  # (k, c)
    varies = values.var(0, correction=0) > 1e-24 * values.square().mean(0)  # a constant varies by rounding
    correlation = torch.corrcoef(values.T).abs()  # (c, c)
    pairs = (varies[:, None] & varies).triu(1)
    same = (chosen // per_group)[:, None] == chosen // per_group
    return torch.stack(
        [torch.where(pairs & kind, correlation, 0.0).sum() / (pairs & kind).sum() for kind in (same, ~same)]
    )


def _spread(num: int, most: int, device: torch.device) -> Tensor:
    """Return at most `most` of the indices below num, spread evenly."""
    count = min(num, most)
    return torch.arange(count, device=device) * num // count


@np.errstate(invalid="ignore", over="ignore")  # of activations that overflow; `nonfinite` counts them
def _measured(name: str, layer: NormModule, calls: Sequence[Call], start: Start | None) -> Measured:
    gamma, beta = _array(layer.weight), _array(layer.bias)
    inputs = [Moments._make(map(_array, call)) for call, _ in calls]
    var, elements, running = _by_group(layer, inputs) if _groups(layer) else _by_batch(layer, inputs)
    std = np.sqrt(var)
    cells = np.concatenate([np.empty((0, 1)), *(call.count for call in inputs)])
    similar = np.array([_array(pair) for _, pair in calls]).reshape(-1, 2)
    numbers = {
        "name": name, "kind": _kind(layer), "channels": len(gamma), "groups": _groups(layer),
        "masked": bool(getattr(layer, "masked", False)), "eps": layer.eps,
        "trained": any(parameter.requires_grad for parameter in layer.parameters()),
        "elements": int(elements.min()) if elements.size else None,  # smallest number of elements per statistic
        "one_cell": _share(cells == 1), "one_element": _share(elements == 1), "nonfinite": _share(~np.isfinite(std)),
        "std": _quantiles(std, QUANTILES), "eps_dominated": _share(var <= layer.eps),
        "similar": [float(known.mean()) if known.size else None for known in map(_finite, similar.T)],
    }  # fmt: skip
    whole = numbers | _gamma_numbers(name, gamma, beta, start) | running
    return Measured({key: rounded(value) for key, value in whole.items()}, std.ravel(), gamma)


def _by_group(layer: Any, calls: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the variances of groups and samples, and the number of elements of each."""
    parts, elements = [np.empty((0, layer.groups))], [np.empty((0, 1))]
    for mean, var, count in calls:
        mean, var = (moment.reshape(len(moment), layer.groups, -1) for moment in (mean, var))  # (n, G, C/G)
        parts.append(var.mean(2) + mean.var(2))
        elements.append(count * mean.shape[2])
    return np.concatenate(parts), np.concatenate(elements), {}


def _by_batch(layer: Any, calls: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the variances of channels and batches, the number of elements of each, and the gaps to stored statistics.

    gap_mean: |batch - stored| in stored standard deviations; gap_std: |log(batch / stored)| of standard deviations;
    both as median and 95 % quantile over channels and batches.  spread_*: median standard deviation over batches.
    """
    channels = len(layer.weight)
    means, parts, elements = [np.empty((0, channels))], [np.empty((0, channels))], [np.empty((0, 1))]
    for mean, var, count in calls:
        weight = count / count.sum()
        batch_mean = (weight * mean).sum(0, keepdims=True)
        parts.append((weight * (var + (mean - batch_mean) ** 2)).sum(0, keepdims=True))
        means.append(batch_mean)
        elements.append(count.sum(0, keepdims=True))
    mean, var = np.concatenate(means), np.concatenate(parts)  # (batches, C)
    stored = np.sqrt(_array(layer.running_var) + layer.eps)
    offset = (mean - _array(layer.running_mean)) / stored
    ratio = np.log(np.sqrt(var + layer.eps) / stored)
    return var, np.concatenate(elements), {
        "gap_mean": _quantiles(np.abs(offset), (0.5, 0.95)), "gap_std": _quantiles(np.abs(ratio), (0.5, 0.95)),
        "spread_mean": _batch_spread(offset), "spread_std": _batch_spread(ratio),
    }  # fmt: skip


def _gamma_numbers(name: str, gamma: np.ndarray, beta: np.ndarray, start: Start | None) -> dict[str, Any]:
    """Return smallest, median and largest gamma, the fractions of dead and exploding ones, and the drift.

    drift: L2 norm of the change of gamma, and of beta, relative to gamma at the start, or to ones if that was zero.
    """
    size, keys = np.abs(gamma), (f"{name}.weight", f"{name}.bias")
    known = [_array(start[key]) for key in keys if start is not None and key in start]
    usual, drift = 1.0, None
    if [values.shape for values in known] == [gamma.shape, beta.shape]:  # else the file is of another model
        usual = max(1.0, float(np.median(np.abs(known[0]))))
        scale = np.linalg.norm(known[0]) or math.sqrt(len(gamma))
        drift = [np.linalg.norm(now - before) / scale for now, before in zip((gamma, beta), known, strict=True)]
    return {
        "gamma": [gamma.min(), np.median(gamma), gamma.max()], "dead": _share(size <= DEAD * max(1.0, np.median(size))),
        "exploding": _share(~(size <= EXPLODING * usual)), "drift": drift,
    }  # fmt: skip


def _kind(layer: nn.Module) -> str:
    """Return the kind of a layer as in NormConfig.kind; GN with one group is "ln", with C groups "in"."""
    if isinstance(layer, GroupNorm):
        return {1: "ln", len(layer.weight): "in"}.get(layer.groups, "gn")
    kinds = {
        SyncBatchNorm: "sync_bn", BatchRenorm: "brn", FrozenBatchNorm: "frozen_bn", FilterResponseNorm: "frn",
        EvoNormS0: "evonorm_s0",
    }  # fmt: skip
    return kinds.get(type(layer), "bn" if isinstance(layer, nn.BatchNorm2d) else type(layer).__name__)


def _groups(layer: nn.Module) -> int | None:
    return getattr(layer, "groups", None)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _share(true: np.ndarray) -> float | None:
    return float(true.mean()) if true.size else None


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _quantiles(values: np.ndarray, at: Sequence[float]) -> list[float] | None:
    finite = _finite(values)
    return list(np.quantile(finite, at)) if finite.size else None


def _batch_spread(values: np.ndarray) -> float | None:
    """Return the median over channels of the standard deviation over batches (batches, C)."""
    return float(np.median(values.std(0, ddof=1))) if len(values) > 1 else None


def rounded(value: Any) -> Any:
    """Return a value for JSON: numbers rounded to DIGITS digits, None for non-finite ones."""
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
