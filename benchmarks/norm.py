"""`python -m benchmarks norm`: time group norm with ReLU, forward and backward, on the maps of a ResNet-50.

On a GPU the maps are of 800 x 1344 pictures in bfloat16, and torch's GroupNorm runs both eagerly and compiled; on a CPU
the maps are smaller and in float32.  The time to copy the same number of bytes shows how close each comes to the
memory's limit: a forward pass must read x and write y, a backward pass must read x and grad and write the gradient.
On a GPU a pass over all maps is one CUDA graph, so that launches do not count.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import machine, table
from benchmarks.timing import WARM_UPS, as_graph, timed
from benchmarks.turns import WALL, Subject, Turn, Work, take_turns
from gndet.distributed.process import keep_freed_memory
from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.norms.group_norm import gradients, normalize

GROUPS, EPS = 32, 1e-5
STAGES = (
    (64, 2, 1), (64, 4, 6), (256, 4, 4), (128, 4, 1), (128, 8, 7), (512, 8, 5), (256, 8, 1), (256, 16, 11),
    (1024, 16, 7), (512, 16, 1), (512, 32, 5), (2048, 32, 4),
)  # fmt: skip  # channels, stride, number of such maps in a ResNet-50
SIZES = {"cuda": (800, 1344), "cpu": (480, 640)}
PASSES = 5  # least number of times that a map is read or written, forward and backward together


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time a pass over all maps, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height, width = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    moved = PASSES * sum(x.nbytes * count for x, count in maps(options.batch, "meta"))
    say(f"group norm and ReLU of ResNet-50's maps, {options.batch} picture(s) of {height}x{width}, {dtype}, {device}")
    if device == "cuda":
        trouble = norm_kernels.trouble(torch.device(device))
        say(f"kernels: {trouble or 'in use, the self-test passes'}")
    works = ["gndet", "torch", "copy"] + (["torch, compiled"] if device == "cuda" else [])
    subjects = [Subject(name, subject, (name, options.batch, device)) for name in works]
    turns = take_turns(subjects, options.rounds, threads=options.threads, warmup=WARM_UPS[device], say=say)
    say(f"\n{machine(options.threads)}\n{table(turns, against='torch', unit='ms')}")
    say(f"{moved / 2**20:,.0f} MiB must move; {bandwidths(turns, moved)}")


def bandwidths(turns: dict[str, list[Turn]], moved: int) -> str:
    """Return the rate of each subject, and its share of a copy's rate."""
    rates = {name: moved / median(turn.wall_s for turn in own) / 1e9 for name, own in turns.items()}
    return ", ".join(f"{name} {rate:,.0f} GB/s ({rate / rates['copy']:.0%} of a copy)" for name, rate in rates.items())


def maps(batch: int, device: str) -> list[tuple[Tensor, int]]:
    """Return one map (B, C, H, W) of each kind, channels last, and how many of that kind there are."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    height, width = SIZES[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    made = []
    for channels, stride, count in STAGES:
        x = torch.empty(batch, channels, -(-height // stride), -(-width // stride), dtype=dtype, device=device)
        made.append((x.contiguous(memory_format=torch.channels_last).normal_(), count))
    return made


def subject(name: str, batch: int, device: str) -> Work:
    """Return the work of one subject: every map forward and backward."""
    keep_freed_memory()
    data = [(x, torch.randn_like(x), count) for x, count in maps(batch, device)]
    parameters = [torch.ones(2, x.shape[1], device=device).unbind() for x, _, _ in data]
    do: Callable[..., object] = {"gndet": _gndet, "copy": _copy}.get(name, _torch)
    if name == "torch, compiled":
        do = compiled()

    def all_maps() -> None:
        for number in range(max(count for _, _, count in data)):
            for (x, grad, count), (gamma, beta) in zip(data, parameters, strict=True):
                if number < count:
                    do(x, grad, gamma, beta)

    replay = as_graph([all_maps], device)
    return lambda: {WALL: timed(replay, device)[1]}


def compiled() -> Callable[..., None]:
    """Return torch's norm, forward and backward, as one compiled kernel per shape."""
    torch._dynamo.config.recompile_limit = 4 * len(STAGES)  # from 9 shapes on it would not compile any more
    return partial(_torch, function=torch.compile(_group_norm_relu, dynamic=False))


def _gndet(x: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor) -> None:
    y, mean, rstd = normalize(x, gamma, beta, GROUPS, EPS, None, relu=True)
    if x.is_cuda:  # its kernels know ReLU
        gradients(grad, x, gamma, mean, rstd, None, beta)
    else:
        gradients(torch.ops.aten.threshold_backward(grad, y, 0), x, gamma, mean, rstd, None)


def _torch(x: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor, function: Callable[..., Tensor] | None = None) -> None:
    x, gamma, beta = (tensor.detach().requires_grad_() for tensor in (x, gamma.to(x.dtype), beta.to(x.dtype)))
    y = (function or _group_norm_relu)(x, gamma, beta)
    torch.autograd.grad(y, (x, gamma, beta), grad)


def _group_norm_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, GROUPS, gamma, beta, EPS), inplace=True)


def _copy(x: Tensor, grad: Tensor, gamma: Tensor, beta: Tensor) -> None:
    """Move as many bytes as the norm must read and write: two and a half copies."""
    x.clone()
    grad.clone()
    x.permute(0, 2, 3, 1).reshape(-1)[: x.numel() // 2].clone()
