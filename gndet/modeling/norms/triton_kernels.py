"""Group normalization on NVIDIA GPUs: launch the kernels of `triton_programs`, and test them before their first use.

Memory bandwidth limits their speed.  The forward pass reads x once for the sums and once more, from the cache if it
fits, to write y; the backward pass reads x and grad twice and writes the gradient.  Three launches each.
How a map is divided depends on its channels, height, width and type alone, never on the number of images, so an image's
numbers round the same alone and in a batch; statistics and padding are each picture's own.
To keep about 3.35 TB/s busy at 700 ns, 18 KB per multiprocessor must be under way: up to PROGRAMS programs per image, 4
per multiprocessor of an H100, of 16 KB each.
Letters: B images, P positions, C channels, G groups, S stripes, U units (see `triton_programs`).
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.modeling.norms import triton_programs as programs
from gndet.ops.self_test import failure

PROGRAMS = 512  # per image, at most, in a pass that sums
STRIPE = 32  # positions per stripe, at least: the sums of a stripe then take at most 6 % of the bytes of its maps
TILE = 2048  # numbers of a map that a program sums side by side: 16 per thread
CHUNK = 8192  # bytes that a program has under way, twice
BLOCK = 8192  # bytes of each map per program of a pass that writes a map
CHANNELS = 512  # per block, at most
MERGED = 2048  # numbers that a program merges side by side
FEW, MANY = 8, PROGRAMS  # stripes per image: two kinds of programs merge them

Maps = tuple[Tensor, Tensor, Tensor]


class Plan(NamedTuple):
    """How a map (B, C, H, W), channels last, is divided among programs: numbers per image, and kernels' constants."""

    positions: int
    width: int
    stripes: int
    blocks: int  # per image, of a pass that writes a map
    blocks_c: int
    blocks_g: int  # of groups, per image
    blocks_k: int  # of the channels whose parameters' gradients a program sums
    sums_length: int  # numbers per stripe
    gradient_length: int
    sums: tuple[int, ...]
    statistics: tuple[int, ...]
    blocked: tuple[int, ...]
    gradient_sums: tuple[int, ...]
    gradient_means: tuple[int, ...]


@lru_cache(maxsize=4096)
def plan_for(channels: int, height: int, width: int, groups: int, size: int) -> Plan:
    """Return the plan of a map whose numbers take `size` bytes.

    A kernel's constants depend on the kind of layer, and on whether stripes are few or many: canvases share kernels.
    """
    positions, members = height * width, channels // groups
    block_c = min(_power_of_2(channels), CHANNELS)
    block_p = max(TILE // block_c, 1)
    blocks_c = -(-channels // block_c)
    tiles = max(CHUNK // (TILE * size), 1)
    stripe = max(STRIPE, tiles * block_p)
    stripes = max(min(PROGRAMS // blocks_c, -(-positions // stripe)), 1)
    written = max(BLOCK // (block_c * size), 1)
    unit = min(members & -members, block_c)  # the largest power of 2 that divides a group, as far as a block holds it
    units = members // unit
    block_u = _power_of_2(units)
    block_s = max(min(FEW if stripes <= FEW else MANY, MERGED // block_u), 1)
    block_g = max(min(_power_of_2(groups), MERGED // 2 // (block_s * block_u)), 1)
    columns, merging = 8, (block_s, block_g, block_u)  # 8 float32: the least that memory moves, 32 bytes
    return Plan(
        positions, width, stripes, -(-positions // written), blocks_c, -(-groups // block_g), -(-channels // columns),
        sums_length=3 * groups * units,
        gradient_length=2 * (channels + groups * units),
        sums=(channels, unit, stripe, tiles, block_p, block_c),
        statistics=(groups, units, *merging),
        blocked=(channels, members, written, block_c),
        gradient_sums=(channels, members, unit, stripe, max(tiles // 2, 1), block_p, block_c),
        gradient_means=(channels, members, units, *merging, MERGED // columns, columns),
    )  # fmt: skip


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is no smaller."""
    return 1 << (number - 1).bit_length()


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, sizes: Tensor | None, *, relu: bool,
    residual: Tensor | None = None,
) -> Maps:  # fmt: skip
    """Normalize x (B, C, H, W), channels last; add residual, like x, if there is one; relu: then apply ReLU.

    sizes (B, 2) int64 height, width of the pictures, or None if nothing is padded.  Returns y like x, and the mean and
    1 / std of each group, (B, G) float32.
    """
    if torch.compiler.is_compiling():
        assert residual is None
        return torch.ops.gndet.group_norm(x, gamma, beta, groups, eps, sizes, relu)
    images, channels, height, width = x.shape
    mean, rstd = (x.new_empty((images, groups), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return torch.empty_like(x), mean, rstd
    plan = plan_for(channels, height, width, groups, x.element_size())
    sums = x.new_empty((images, plan.stripes, plan.sums_length), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        programs.sums_kernel[images * plan.stripes, plan.blocks_c](
            x, sizes, sums, plan.positions, plan.width, plan.stripes, sizes is not None, *plan.sums
        )
        programs.statistics_kernel[images * plan.blocks_g,](sums, mean, rstd, plan.stripes, eps, *plan.statistics)
        return _apply(x, residual, gamma, beta, mean, rstd, sizes, relu, plan), mean, rstd


def renormalize(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, sizes: Tensor | None, *, relu: bool
) -> Tensor:
    """Compute y of `forward` from its statistics."""
    if x.numel() == 0:
        return torch.empty_like(x)
    plan = plan_for(*x.shape[1:], mean.shape[1], x.element_size())
    with torch.cuda.device_of(x):
        return _apply(x, None, gamma, beta, mean, rstd, sizes, relu, plan)


def _apply(
    x: Tensor, residual: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, sizes: Tensor | None,
    relu: bool, plan: Plan,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    programs.apply_kernel[x.shape[0] * plan.blocks, plan.blocks_c](
        x, residual, y, sizes, gamma, beta, mean, rstd, plan.positions, plan.width, plan.blocks, sizes is not None,
        relu, residual is not None, *plan.blocked,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, sizes: Tensor | None, beta: Tensor | None = None
) -> Maps:
    """Return the gradients of x, gamma and beta, from the gradient of y before its ReLU; channels last like x.

    beta: given if grad is the gradient after the ReLU.
    """
    if torch.compiler.is_compiling():
        assert beta is None
        return torch.ops.gndet.group_norm_backward(grad, x, gamma, mean, rstd, sizes)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(gamma), torch.zeros_like(gamma)
    images, channels, height, width = x.shape
    groups, masked, relu = mean.shape[1], sizes is not None, beta is not None
    plan = plan_for(channels, height, width, groups, x.element_size())
    sums = x.new_empty((images, plan.stripes, plan.gradient_length), dtype=torch.float32)
    means = x.new_empty((images, 2, groups), dtype=torch.float32)
    grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(gamma)
    with torch.cuda.device_of(x):
        programs.gradient_sums_kernel[images * plan.stripes, plan.blocks_c](
            grad, x, sizes, gamma, beta, mean, rstd, sums, plan.positions, plan.width, plan.stripes, masked, relu,
            *plan.gradient_sums,
        )  # fmt: skip
        programs.gradient_means_kernel[plan.blocks_k + images * plan.blocks_g,](
            sums, sizes, means, grad_gamma, grad_beta, plan.positions, images, plan.stripes, masked,
            *plan.gradient_means,
        )  # fmt: skip
        programs.gradient_kernel[images * plan.blocks, plan.blocks_c](
            grad, x, grad_x, sizes, gamma, beta, mean, rstd, means, plan.positions, plan.width, plan.blocks, masked,
            relu, *plan.blocked,
        )  # fmt: skip
    return grad_x, grad_gamma, grad_beta


# --- the operators that stand for the kernels in a compiled graph


torch.library.define(
    "gndet::group_norm",
    "(Tensor x, Tensor gamma, Tensor beta, int groups, float eps, Tensor? sizes, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.needs_fixed_stride_order,
)
torch.library.define(
    "gndet::group_norm_backward",
    "(Tensor grad, Tensor x, Tensor gamma, Tensor mean, Tensor rstd, Tensor? sizes) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.needs_fixed_stride_order,
)


@torch.library.impl("gndet::group_norm", ("cpu", "cuda"))
def _run_forward(x: Tensor, *others: Any) -> Maps:
    return forward(dense(x), *others[:-1], relu=others[-1])


@torch.library.impl("gndet::group_norm_backward", ("cpu", "cuda"))
def _run_backward(grad: Tensor, x: Tensor, *others: Any) -> Maps:
    return backward(dense(grad), dense(x), *others)


@torch.library.register_fake("gndet::group_norm")
def _fake_forward(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, *_: Any) -> Maps:
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.register_fake("gndet::group_norm_backward")
def _fake_backward(grad: Tensor, x: Tensor, gamma: Tensor, *_: Any) -> Maps:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)


def dense(x: Tensor) -> Tensor:
    """Return x with channels last and without gaps in memory."""
    return x.contiguous(memory_format=torch.channels_last)


# --- the self-test

SELF_TESTS = (  # (B, C, H, W, G), type, padded: training's type and the widest; many stripes and few; long loops
    ((1, 64, 25, 24, 32), torch.bfloat16, False), ((2, 64, 25, 24, 32), torch.bfloat16, True),
    ((1, 64, 25, 24, 32), torch.float32, False), ((2, 64, 25, 24, 32), torch.float32, True),
    ((3, 96, 5, 7, 3), torch.bfloat16, True),
    ((1, 1024, 17, 16, 32), torch.bfloat16, True), ((1, 1024, 17, 16, 32), torch.float32, True),
)  # fmt: skip
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest value
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(x: Tensor) -> bool:
    """Return whether the kernels can take this map and work on its GPU.

    A compiler that traces the model must not launch the self-test: it sees only what was decided before.
    """
    is_map = x.is_cuda and x.dtype in DTYPES and x.dim() == 4  # not a video's (B, C, T, H, W)
    if not (is_map and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    return _known_to_work(x.device) if torch.compiler.is_compiling() else not trouble(x.device)


@cache
def trouble(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, in words, or "".  Tests them once per process.

    Running out of memory is no verdict: the error is raised, so that the caller can make room, and nothing is kept.
    """
    with torch.no_grad():
        wrong = failure(lambda: [text for test in SELF_TESTS for text in _compare(*test, device)])
    if not wrong:
        _WORKING.add(device)
    return wrong


_WORKING: set[torch.device] = set()  # the devices for which `trouble` has returned ""


def _known_to_work(device: torch.device) -> bool:
    return device in _WORKING


_known_to_work._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports torch._dynamo


Shape = tuple[int, int, int, int, int]


def _compare(shape: Shape, dtype: torch.dtype, padded: bool, device: torch.device) -> list[str]:
    """Return a line for each result of the kernels that differs from torch's in float64, on a map of noise.

    The padding is NaN, so that a kernel that reads it shows.
    """
    images, channels, height, width, groups = shape
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, images, channels, height, width, generator=generator).add(1).to(dtype).unbind()
    gamma, beta = torch.randn(2, channels, generator=generator).unbind()
    shown, exact = [torch.full_like(x, torch.nan) for _ in range(2)], [torch.zeros_like(x.double()) for _ in range(2)]
    slopes = torch.zeros(2, channels, dtype=torch.float64)
    sizes = [
        (height - i * (height // 3), width - i * (width // 3)) if padded else (height, width) for i in range(images)
    ]
    for i, (h, w) in enumerate(sizes):
        crop, slope = (maps[i : i + 1, :, :h, :w].double().contiguous() for maps in (x, grad))
        size = (1, channels, h * w, groups)
        y, mean, rstd = torch.native_group_norm(crop, gamma.double(), beta.double(), *size, 1e-5)
        on_x, *on_parameters = torch.ops.aten.native_group_norm_backward(
            slope, crop, mean, rstd, gamma.double(), *size, [True, True, True]
        )
        slopes += torch.stack(on_parameters)
        for maps, part in zip((*shown, *exact), (crop, slope, F.relu(y), on_x), strict=True):
            maps[i, :, :h, :w] = part[0]
    x, grad = (maps.contiguous(memory_format=torch.channels_last).to(device) for maps in shown)
    gamma, beta, valid = gamma.to(device), beta.to(device), torch.tensor(sizes, device=device) if padded else None
    y, mean, rstd = forward(x, gamma, beta, groups, 1e-5, valid, relu=True)
    found = (y, *backward(grad, x, gamma, mean, rstd, valid))
    kind = f"{shape} {str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    names = ("result", "gradient", "gradient of gamma", "gradient of beta")
    return [
        f"the {name} of {kind} is wrong" for name, a, b in zip(names, found, (*exact, *slopes), strict=True)
        if not (a.cpu().double() - b).abs().max() < TOLERANCES[dtype] * b.abs().max()
    ]  # fmt: skip
