"""Part of the day: the rate of group norm with ReLU, map by map, beside torch's, torch.compile's and a copy's.

Kernels are timed as CUDA graphs over so many maps that the GPU's cache does not hold them.  A copy reads and writes a
map once; the rates count the maps that a pass must move if it reads each once: 2 forward, 3 backward.  Statistics must
be known before anything is written, so a map that is larger than the cache is read twice; "moved" counts that, too: 3
maps forward, 5 backward.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_day.notes import CPU, DEVICE, SIZE, Notes
from benchmarks.norm import EPS, GROUPS, STAGES
from benchmarks.timing import graph_s, host_s, median_s
from gndet.modeling.norms.group_norm import gradients, normalize, renormalize
from gndet.modeling.norms.valid_area import ValidArea

DTYPE = torch.float32 if CPU else torch.bfloat16
LIVE = 2e6 if CPU else 160e6  # bytes of the maps that take turns: three times the L2 cache of an H100
COMPILED = ((64, 2), (256, 4), (512, 8), (1024, 16))  # channels, stride of the maps that torch.compile gets
MOVED = {
    "forward": 2,
    "again": 2,
    "masked forward": 2,
    "backward": 3,
    "torch forward": 2,
    "torch backward": 3,
    "copy": 2,
}
READ_TWICE = {"forward": 3, "backward": 5}


class Map(NamedTuple):
    """A kind of feature map of Mask R-CNN with ResNet-50 and FPN."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    number: int  # of such maps per picture


def maps() -> list[Map]:
    """Return the maps of a training step with one picture."""
    height, width = SIZE
    on_picture = [(f"C{channels} /{s}", channels, s, count) for channels, s, count in STAGES]
    on_picture += [(f"FPN /{s}", 256, s, 2) for s in (4, 8, 16, 32)]
    regions = (4, 2) if CPU else (512, 128)
    return [
        *(Map(name, (1, channels, -(-height // s), -(-width // s)), count) for name, channels, s, count in on_picture),
        Map("box head", (regions[0], 256, 7, 7), 4), Map("mask head", (regions[1], 256, 14, 14), 4),
    ]  # fmt: skip


def kernels(note: Notes) -> None:
    """Time the kernels on each map, then their launches; check the largest map that a picture may have."""
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for kind in maps():
        with note.attempt(kind.name):
            rows[kind.name] = measure(note, kind)
            note(f"us of {kind.name}", rows[kind.name])
    whole = [name for name in MOVED if all(name in rows.get(kind.name, ()) for kind in maps())]
    totals = {name: sum(rows[kind.name][name] * kind.number for kind in maps()) / 1e3 for name in whole}
    note("ms per picture", {name: round(ms, 3) for name, ms in totals.items()})
    note("share of a copy's rate", shares(totals, MOVED))
    note("share of a copy's rate, moved", shares(totals, READ_TWICE))
    with note.attempt("host"):
        note("host us", host_costs())
    with note.attempt("compiled"):
        note("us compiled", {f"C{c} /{s}": round(compiled_us(c, s), 1) for c, s in COMPILED if note.left > 8})
    with note.attempt("large"):
        note("4224 x 4224 pictures: errors", large_map())


def shares(ms: dict[str, float], moved: dict[str, int]) -> dict[str, float]:
    """Return the rate of each work over a copy's; moved: how many maps it moves, where a copy moves 2."""
    return {name: round(count / 2 * ms["copy"] / ms[name], 3) for name, count in moved.items() if name in ms}


def noise(shape: tuple[int, ...]) -> Tensor:
    """Return a map of noise, channels last."""
    return (torch.randn(shape, device=DEVICE) + 0.5).to(DTYPE).contiguous(memory_format=torch.channels_last)


def measure(note: Notes, kind: Map) -> dict[str, float]:
    """Return the microseconds of each work on one kind of map, and the errors of gndet's against float64."""
    batch, channels, height, width = kind.shape
    size = math.prod(kind.shape) * DTYPE.itemsize
    num = max(2, min(24, math.ceil(LIVE / size)))
    xs, grads = ([noise(kind.shape) for _ in range(num)] for _ in range(2))
    gamma, beta = torch.randn(2, channels, device=DEVICE).unbind()
    inside = torch.tensor([[max(height - 1, 1), max(width - 1, 1)]] * batch, device=DEVICE)
    area = ValidArea.of(inside, height, width)
    y, mean, rstd = normalize(xs[0], gamma, beta, GROUPS, EPS, None, relu=True)
    group = (batch, channels, height * width, GROUPS)
    their_gamma, their_beta, their_mean, their_rstd = (tensor.to(DTYPE) for tensor in (gamma, beta, mean, rstd))
    outs = [torch.empty_like(x) for x in xs]
    works: dict[str, Sequence[Callable[[], object]]] = {
        "forward": [partial(normalize, x, gamma, beta, GROUPS, EPS, None, relu=True) for x in xs],
        "again": [partial(renormalize, x, gamma, beta, mean, rstd, None, relu=True) for x in xs],
        "masked forward": [partial(normalize, x, gamma, beta, GROUPS, EPS, area, relu=True) for x in xs],
        "backward": [partial(gradients, g, x, gamma, mean, rstd, None, beta) for x, g in zip(xs, grads, strict=True)],
        "torch forward": [partial(torch_forward, x, their_gamma, their_beta) for x in xs],
        "torch backward": [
            partial(torch_backward, g, x, y, their_mean, their_rstd, their_gamma, group)
            for x, g in zip(xs, grads, strict=True)
        ],
        "copy": [partial(out.copy_, x) for out, x in zip(outs, xs, strict=True)],
    }
    found: dict[str, float] = {}
    for name, work in works.items():
        with note.attempt(f"{kind.name}, {name}"):
            found[name] = round(graph_s(work, DEVICE) * 1e6, 2)
    exact, center, scale = torch.native_group_norm(
        xs[0].double().contiguous(), gamma.double(), beta.double(), *group, EPS
    )
    slopes = torch_backward(grads[0].double(), xs[0].double(), exact, center, scale, gamma.double(), group)
    own = gradients(grads[0], xs[0], gamma, mean, rstd, None, beta)
    return found | {
        "MiB": round(size / 2**20, 2), "forward error": error(y, exact.relu()),
        "backward error": max(error(a, b) for a, b in zip(own, slopes, strict=True)),
    }  # fmt: skip


def torch_forward(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Compute torch's group norm and ReLU."""
    return F.relu(F.group_norm(x, GROUPS, gamma, beta, EPS), inplace=True)


def torch_backward(
    grad: Tensor, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, group: tuple[int, int, int, int]
) -> tuple[Tensor, ...]:
    """Compute torch's gradients through ReLU, as its autograd does: on a GPU its kernels know no channels last."""
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    maps = (grad, x) if CPU else (grad.contiguous(), x.contiguous())
    return torch.ops.aten.native_group_norm_backward(*maps, mean, rstd, gamma, *group, [True] * 3)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact result."""
    return float((found.double() - exact).norm() / exact.norm())


def compiled_us(channels: int, stride: int) -> float:
    """Return the microseconds of torch.compile's kernels for a map, forward and backward."""
    shape = (1, channels, -(-SIZE[0] // stride), -(-SIZE[1] // stride))
    function = torch.compile(torch_forward, dynamic=False)
    num = max(2, min(8, math.ceil(LIVE / math.prod(shape) / DTYPE.itemsize)))
    xs, parameters = [noise(shape).requires_grad_() for _ in range(num)], torch.ones(2, channels, device=DEVICE)
    gamma, beta = (parameter.to(DTYPE).requires_grad_() for parameter in parameters)
    grad = noise(shape)

    def both(x: Tensor) -> None:
        torch.autograd.grad(function(x, gamma, beta), (x, gamma, beta), grad)

    return graph_s([partial(both, x) for x in xs], DEVICE) * 1e6


def host_costs() -> dict[str, float]:
    """Return the host's microseconds to launch each work on a small map; this bounds a step that is not compiled."""
    x = noise((1, 64, 50, 84))
    gamma = torch.ones(64, device=DEVICE)
    _, mean, rstd = normalize(x, gamma, gamma, GROUPS, EPS, None, relu=True)
    layer, leaf = torch.nn.GroupNorm(GROUPS, 64, device=DEVICE, dtype=DTYPE), x.clone().requires_grad_()
    y = layer(leaf)
    works: dict[str, Callable[[], object]] = {
        "forward": partial(normalize, x, gamma, gamma, GROUPS, EPS, None, relu=True),
        "again": partial(renormalize, x, gamma, gamma, mean, rstd, None, relu=True),
        "backward": partial(gradients, x, x, gamma, mean, rstd, None, gamma),
        "torch forward": partial(layer, x),
        "torch backward": partial(torch.autograd.grad, y, leaf, x, retain_graph=True),
    }
    return {name: round(host_s(work, DEVICE, 5 if CPU else 100) * 1e6, 1) for name, work in works.items()}


def large_map() -> dict[str, float]:
    """Return the errors on a map with more rows of blocks than a GPU's grid has on its second and third axis."""
    shape = (1, 64, 33, 35) if CPU else (1, 64, 2112, 2112)
    x, grad, gamma = noise(shape), noise(shape), torch.ones(64, device=DEVICE)
    y, mean, rstd = normalize(x, gamma, gamma, GROUPS, EPS, None, relu=True)
    own = gradients(grad, x, gamma, mean, rstd, None, gamma)
    wide = x.float().contiguous()
    group = (1, 64, shape[2] * shape[3], GROUPS)
    exact, center, scale = torch.native_group_norm(wide, gamma, gamma, *group, EPS)
    slopes = torch_backward(grad.float().contiguous(), wide, exact, center, scale, gamma, group)
    seconds = median_s(partial(normalize, x, gamma, gamma, GROUPS, EPS, None, relu=True), DEVICE, 3)
    return {
        "forward": error(y, exact.relu().double()), "backward": error(own[0], slopes[0].double()),
        "forward ms": round(seconds * 1e3, 3),
    }  # fmt: skip
