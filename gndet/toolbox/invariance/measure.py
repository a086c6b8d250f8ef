"""Measure a training step on images batched in some arrangement, and compare two such results.  N images, L levels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gndet.config.schema import Config
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import Sample
from gndet.modeling.image_model import Choices, ImageModel
from gndet.structures import Batch
from gndet.toolbox.invariance.leaks import kept_statistics, relative
from gndet.training.update import to_device

COSINE = 1e-9  # limit of 1 - cosine; float64 rounding alone stays below it
RELATIVE = 1e-6  # the same for the relative difference
STRIDES = (2, 4, 8, 16, 32, 64, 128)  # of the network's maps; a map is ceil(canvas / stride) high


@dataclass(frozen=True)
class Difference:
    """How two tensors differ: relative difference (L2), and 1 - cosine."""

    relative: float
    cosine: float

    @property
    def small(self) -> bool:
        """Whether the difference is mere rounding; False for NaN."""
        return self.relative < RELATIVE and self.cosine < COSINE


class Signs(NamedTuple):
    """Where each ReLU is open, in packed bits."""

    maps: list[np.ndarray]  # of backbone and RPN or dense head, inside the picture
    regions: list[np.ndarray]  # of the box head, for the sampled regions


class Result(NamedTuple):
    """The results of N images in one arrangement."""

    features: dict[str, list[Tensor]]  # {level: N vectors, without the padding}
    losses: dict[str, list[Tensor]]  # {loss: N scalars}
    pyramid: dict[str, list[Tensor]]  # {loss: N vectors, its gradient with respect to the pyramid}
    gradients: dict[str, Tensor]  # {group of parameters: one vector, the gradient of the mean loss}
    choices: list[Choices]  # N
    signs: list[Signs]  # N


Flips = dict[str, tuple[int, int]]  # {kind of decision: how many differ, of how many}


def batch_of(samples: list[Sample], model: ImageModel, cfg: Config) -> Batch:
    """Return a batch of samples on the model's device."""
    return to_device(collate(samples, cfg.data.canvas_multiple, cfg.data.exact_canvas), model.device)


def measure(
    model: ImageModel,
    samples: list[Sample],
    batches: list[list[int]],
    cfg: Config,
    autocast: Callable[[], AbstractContextManager],
) -> Result:
    """Run batches through a training step that leaves the model as it was; return their results.

    batches: lists of indices into samples; the last sample is the wider image, whose losses do not count.
    """
    num = len(samples) - 1
    nothing: list[Any] = [None] * num
    result = Result({}, {}, {}, {}, [{}] * num, [Signs([], [])] * num)
    model.zero_grad()
    for members in batches:
        batch = batch_of([samples[i] for i in members], model, cfg)
        rows = [row for row, i in enumerate(members) if i < num]
        maps: list[Tensor] = []
        regions: list[Tensor] = []
        with kept_statistics(model):
            with autocast(), _open_relus(model, maps, regions):
                levels, areas = model.features(batch.images, batch.sizes, batch.padded, batch.keys)
                leaves = [level.detach().requires_grad_() for level in levels]
                step = model.step(leaves, areas, batch)
            means = {name: loss[rows].sum() / num for name, loss in step.losses.items()}
            at_pyramid = _backward(model, leaves, means)
            torch.autograd.backward(levels, [sum(parts) for parts in zip(*at_pyramid.values(), strict=True)])
        for row in rows:
            i = members[row]
            for stride, feature in zip(model.strides, _pictures(levels, batch, row), strict=True):
                result.features.setdefault(f"features P{stride.bit_length() - 1}", nothing.copy())[i] = feature.detach()
            for name, loss in step.losses.items():
                result.losses.setdefault(name, nothing.copy())[i] = loss.detach()[row]
                gradient = torch.cat(_pictures(at_pyramid[name], batch, row))
                result.pyramid.setdefault(f"d {name} / d pyramid", nothing.copy())[i] = gradient
            result.choices[i] = model.choices(step, row)
            sampled = [x.unflatten(0, step.regions.valid.shape)[row][step.regions.valid[row]] for x in regions]
            result.signs[i] = Signs(_packed(_pictures(maps, batch, row)), _packed(sampled))
    result.gradients.update(parameter_groups(model))
    model.zero_grad()
    return result


def _backward(model: ImageModel, levels: list[Tensor], means: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Add the gradients of all losses to those of RPN and heads.  Returns {loss: its gradient at each level}."""
    heads = [p for part in model.after_features() for p in part.parameters() if p.requires_grad]
    at_pyramid = {}
    for name, mean in means.items():
        gradients = torch.autograd.grad(mean, [*levels, *heads], retain_graph=True, materialize_grads=True)
        at_pyramid[name] = gradients[: len(levels)]
        for parameter, gradient in zip(heads, gradients[len(levels) :], strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return at_pyramid


def _pictures(maps: Sequence[Tensor], batch: Batch, row: int) -> list[Tensor]:
    """Return the part of each map (B, C, H/s, W/s) that covers one image's picture, as vectors."""
    height, width = batch.sizes[row].tolist()
    strides = [next(s for s in STRIDES if -(-batch.images.shape[2] // s) == x.shape[2]) for x in maps]
    return [x[row, :, : -(-height // s), : -(-width // s)].flatten() for x, s in zip(maps, strides, strict=True)]


def parameter_groups(model: ImageModel) -> dict[str, Tensor]:
    """Return one gradient vector per stage of the backbone and per other part of the model."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            words = name.split(".")
            group = ".".join(words[: 2 if words[0] == "backbone" else 1])
            groups.setdefault(group, []).append(parameter.grad.flatten())
    return {f"d all / d {name}": torch.cat(parts) for name, parts in groups.items()}


@contextmanager
def _open_relus(model: ImageModel, maps: list[Tensor], regions: list[Tensor]) -> Iterator[None]:
    """Record where each ReLU is open, in running order: maps (B, C, H/s, W/s) bool, regions (B * R, ...) bool."""
    rectified = model.rectified()
    with ExitStack() as hooks:
        for modules, opened in ((rectified.maps, maps), (rectified.regions, regions)):
            for module in modules:
                hook = module.register_forward_hook(lambda m, args, out, opened=opened: opened.append(out > 0))
                hooks.enter_context(hook)
        yield


def _packed(masks: list[Tensor]) -> list[np.ndarray]:
    return [np.packbits(mask.cpu().numpy()) for mask in masks]


def compare(got: Result, alone: Result) -> dict[str, Difference]:
    """Return the difference of each quantity; for features, the largest over the images."""
    found = {}
    for name, features in alone.features.items():
        found[name] = largest_difference(got.features[name], features)
    for name, losses in alone.losses.items():
        found[name] = difference(torch.stack(got.losses[name]), torch.stack(losses))
    for name, parts in alone.pyramid.items():
        found[name] = difference(torch.cat(got.pyramid[name]), torch.cat(parts))
    return found | {name: difference(got.gradients[name], gradient) for name, gradient in alone.gradients.items()}


def largest_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Return the largest of several differences; NaN counts as larger than any number."""
    each = [astuple(difference(a, b)) for a, b in zip(got, expected, strict=True)]
    return Difference(*np.max(each, axis=0).tolist())


def flips(got: Result, alone: Result) -> Flips:
    """Count the yes-or-no decisions that differ: what was sampled, and which ReLUs are open.

    The box head's ReLUs count only for images whose sampled regions agree; the mask head's ReLUs do not count.
    """
    sets: list[tuple[set[Any], set[Any]]] = []
    bits: list[tuple[np.ndarray, np.ndarray]] = []
    for a, b, open_a, open_b in zip(got.choices, alone.choices, got.signs, alone.signs, strict=True):
        sets += [(a[kind], b[kind]) for kind in a]
        bits += zip(open_a.maps, open_b.maps, strict=True)
        if a.get("sampled regions") == b.get("sampled regions"):
            bits += zip(open_a.regions, open_b.regions, strict=True)
    return {
        "choices": (sum(len(a ^ b) for a, b in sets), sum(len(a) for a, _ in sets)),
        "ReLUs": (sum(int(np.unpackbits(a ^ b).sum()) for a, b in bits), sum(8 * a.size for a, _ in bits)),
    }


def difference(got: Tensor, expected: Tensor) -> Difference:
    """Compare two vectors in float64; 1 - cosine is half the squared distance of the unit vectors, exact near 0."""
    a, b = got.double(), expected.double()
    if not a.any() and not b.any():
        return Difference(0.0, 0.0)
    cosine = ((a / a.norm() - b / b.norm()).square().sum() / 2).item() if a.any() and b.any() else 1.0
    return Difference(relative(a, b), cosine)
