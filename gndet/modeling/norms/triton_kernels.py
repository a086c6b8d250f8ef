"""Group normalization on NVIDIA GPUs: Triton kernels, each one pass over the map.

Memory bandwidth limits their speed.  The forward pass reads x once for the sums and once more, from the cache if it
fits, to write y; the backward pass reads x and grad twice and writes the gradient.  A map is (B, P, C): channels last,
P = H * W positions.  Each program takes a stripe of positions of one image and all channels, one block at a time, so
that even a batch of one fills the GPU.  Its sums go to a small buffer and are added in a fixed order without atomics,
so every run gives the same bits.
Statistics are float32: blocks are centered before they are squared, and merged by counts (Chan et al. 1979), so that
neither a large mean nor a single outlier swallows a small variance.
Letters: B images, P positions, C channels, G groups, S stripes.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without GPU support
    triton = None

STRIPES = 128  # per map: about the number of multiprocessors of a GPU
MIN_STRIPE = 64  # positions per stripe, at least
BLOCK = 4096  # numbers that a program holds at once
CHANNELS = 512  # per block, at most

if triton is not None:

    @triton.jit
    def _inside(position, sizes, image, width, positions, masked: tl.constexpr):
        """Return which positions belong to the picture."""
        inside = position < positions
        if masked:
            height_here, width_here = tl.load(sizes + 2 * image), tl.load(sizes + 2 * image + 1)
            inside = inside & (position // width < height_here) & (position % width < width_here)
        return inside

    @triton.jit
    def _merge(count, mean, squares, count_here, mean_here, squares_here):
        """Merge two sets' counts, means and sums of squared differences from the mean (Chan et al. 1979)."""
        total = count + count_here
        share = count_here / tl.maximum(total, 1.0)
        difference = mean_here - mean
        return total, mean + difference * share, squares + squares_here + difference * difference * (count * share)

    @triton.jit
    def _sums_kernel(
        x, sizes, sums, positions, channels, width, stripe,
        masked: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute count, mean and sum of squared differences from the mean per stripe and channel; (B, S, 3, C)."""
        image, part, channel = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * block_c
        channel = channel + tl.arange(0, block_c)
        in_range = channel < channels
        x += image * positions * channels
        count = tl.zeros([block_c], tl.float32)
        mean = tl.zeros([block_c], tl.float32)
        squares = tl.zeros([block_c], tl.float32)
        for start in range(part * stripe, tl.minimum((part + 1) * stripe, positions), block_p):
            position = start + tl.arange(0, block_p)
            inside = _inside(position, sizes, image, width, positions, masked)
            keep = inside[:, None] & in_range[None, :]
            offset = position.to(tl.int64)[:, None] * channels + channel[None, :]
            value = tl.load(x + offset, mask=keep, other=0.0).to(tl.float32)
            count_here = tl.sum(keep.to(tl.float32), 0)
            mean_here = tl.sum(value, 0) / tl.maximum(count_here, 1.0)
            difference = tl.where(keep, value - mean_here[None, :], 0.0)
            count, mean, squares = _merge(
                count, mean, squares, count_here, mean_here, tl.sum(difference * difference, 0)
            )
        sums += (image * tl.num_programs(1) + part) * 3 * channels + channel
        tl.store(sums, count, mask=in_range)
        tl.store(sums + channels, mean, mask=in_range)
        tl.store(sums + 2 * channels, squares, mask=in_range)

    @triton.jit
    def _statistics_kernel(
        sums, mean, rstd, channels, stripes, eps, members: tl.constexpr, block: tl.constexpr
    ):  # fmt: skip
        """Compute the mean and 1 / std of a group of `members` channels from the sums of its stripes."""
        image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        member = tl.arange(0, block)
        in_range = member < members
        count = tl.zeros([block], tl.float32)
        center = tl.zeros([block], tl.float32)  # of each channel
        squares = tl.zeros([block], tl.float32)
        for part in range(stripes):
            offset = sums + (image * stripes + part) * 3 * channels + group * members + member
            count_here = tl.load(offset, mask=in_range, other=0.0)
            mean_here = tl.load(offset + channels, mask=in_range, other=0.0)
            squares_here = tl.load(offset + 2 * channels, mask=in_range, other=0.0)
            count, center, squares = _merge(count, center, squares, count_here, mean_here, squares_here)
        group_mean = tl.sum(center, 0) / members
        difference = tl.where(in_range, center - group_mean, 0.0)
        variance = tl.sum(squares + count * difference * difference, 0) / tl.sum(count, 0)
        tl.store(mean + image * tl.num_programs(1) + group, group_mean)
        tl.store(rstd + image * tl.num_programs(1) + group, 1.0 / tl.sqrt(variance + eps))

    @triton.jit
    def _apply_kernel(
        x, y, sizes, gamma, beta, mean, rstd, positions, channels, groups, width,
        masked: tl.constexpr, relu: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute y = gamma (x - mean) rstd + beta, then ReLU if relu; zero in the padding."""
        image, channel = tl.program_id(0).to(tl.int64), tl.program_id(2) * block_c + tl.arange(0, block_c)
        position = tl.program_id(1) * block_p + tl.arange(0, block_p)
        in_range = channel < channels
        inside = _inside(position, sizes, image, width, positions, masked)
        offset = image * positions * channels + position.to(tl.int64)[:, None] * channels + channel[None, :]
        group = image * groups + channel // (channels // groups)
        scale = tl.load(rstd + group, mask=in_range, other=0.0)
        center = tl.load(mean + group, mask=in_range, other=0.0)
        scaled = tl.load(gamma + channel, mask=in_range, other=0.0).to(tl.float32) * scale
        shift = tl.load(beta + channel, mask=in_range, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=inside[:, None] & in_range[None, :], other=0.0).to(tl.float32)
        value = (value - center[None, :]) * scaled[None, :] + shift[None, :]
        if relu:
            value = tl.where(value < 0.0, 0.0, value)  # keeps NaN
        value = tl.where(inside[:, None], value, 0.0)
        stored = (position < positions)[:, None] & in_range[None, :]
        tl.store(y + offset, value.to(y.dtype.element_ty), mask=stored)

    @triton.jit
    def _gradient_sums_kernel(
        grad, x, sizes, mean, rstd, sums, positions, channels, groups, width, stripe,
        masked: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute the sums of grad and of grad times the normalized x per stripe and channel; (B, S, 2, C)."""
        image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        channel = tl.program_id(2) * block_c + tl.arange(0, block_c)
        in_range = channel < channels
        group = image * groups + channel // (channels // groups)
        center, scale = tl.load(mean + group, mask=in_range, other=0.0), tl.load(rstd + group, mask=in_range, other=0.0)
        x += image * positions * channels
        grad += image * positions * channels
        grad_sum = tl.zeros([block_c], tl.float32)
        normal_sum = tl.zeros([block_c], tl.float32)  # of grad times the normalized x
        for start in range(part * stripe, tl.minimum((part + 1) * stripe, positions), block_p):
            position = start + tl.arange(0, block_p)
            inside = _inside(position, sizes, image, width, positions, masked)
            keep = inside[:, None] & in_range[None, :]
            offset = position.to(tl.int64)[:, None] * channels + channel[None, :]
            value = tl.load(x + offset, mask=keep, other=0.0).to(tl.float32)
            slope = tl.load(grad + offset, mask=keep, other=0.0).to(tl.float32)
            grad_sum += tl.sum(slope, 0)
            normal_sum += tl.sum(tl.where(keep, slope * (value - center[None, :]) * scale[None, :], 0.0), 0)
        sums += (image * tl.num_programs(1) + part) * 2 * channels
        tl.store(sums + channel, grad_sum, mask=in_range)
        tl.store(sums + channels + channel, normal_sum, mask=in_range)

    @triton.jit
    def _gradient_kernel(
        grad, x, grad_x, sizes, gamma, mean, rstd, grad_means, normal_means, positions, channels, groups, width,
        masked: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute rstd (gamma grad - mean_grad - normal mean_normal); both means are over the group, (B, G)."""
        image, channel = tl.program_id(0).to(tl.int64), tl.program_id(2) * block_c + tl.arange(0, block_c)
        position = tl.program_id(1) * block_p + tl.arange(0, block_p)
        in_range = channel < channels
        inside = _inside(position, sizes, image, width, positions, masked)
        offset = image * positions * channels + position.to(tl.int64)[:, None] * channels + channel[None, :]
        group = image * groups + channel // (channels // groups)
        scale, center = tl.load(rstd + group, mask=in_range, other=0.0), tl.load(mean + group, mask=in_range, other=0.0)
        mean_grad = tl.load(grad_means + group, mask=in_range, other=0.0)
        mean_normal = tl.load(normal_means + group, mask=in_range, other=0.0)
        factor = tl.load(gamma + channel, mask=in_range, other=0.0).to(tl.float32)
        keep = inside[:, None] & in_range[None, :]
        value = tl.load(x + offset, mask=keep, other=0.0).to(tl.float32)
        slope = tl.load(grad + offset, mask=keep, other=0.0).to(tl.float32)
        normal = (value - center[None, :]) * scale[None, :]
        result = scale[None, :] * (slope * factor[None, :] - mean_grad[None, :] - normal * mean_normal[None, :])
        stored = (position < positions)[:, None] & in_range[None, :]
        tl.store(grad_x + offset, tl.where(keep, result, 0.0).to(grad_x.dtype.element_ty), mask=stored)


SELF_TEST_SHAPES = ((1, 64, 5, 7, 32), (2, 96, 33, 18, 3), (3, 256, 7, 7, 32))  # B, C, H, W, G
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(x: Tensor) -> bool:
    """Return whether the kernels can take this map and work on its GPU."""
    fitting = x.is_cuda and x.dtype in DTYPES and x.is_contiguous(memory_format=torch.channels_last)
    return fitting and not torch.compiler.is_compiling() and not trouble(x.device)


@cache
def trouble(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, in words, or "".  Tests them once per process."""
    if triton is None:
        return "Triton is not installed"
    try:
        with torch.no_grad():
            wrong = [text for shape in SELF_TEST_SHAPES for text in _compare(shape, device)]
    except Exception as error:  # any failure of compiler or driver: torch's own operators take over
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "; ".join(wrong[:2])


def _compare(shape: tuple[int, int, int, int, int], device: torch.device) -> list[str]:
    """Return a line for each result of the kernels that differs from torch's in float64, on a map of noise."""
    images, channels, height, width, groups = shape
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, images, channels, height, width, generator=generator).add(1).to(device).unbind()
    gamma, beta = torch.randn(2, channels, generator=generator).to(device).unbind()
    size = (images, channels, height * width, groups)
    exact, center, scale = torch.native_group_norm(x.double(), gamma.double(), beta.double(), *size, 1e-5)
    slopes = torch.ops.aten.native_group_norm_backward(
        grad.double(), x.double(), center, scale, gamma.double(), *size, [True, True, True]
    )
    x, grad = (maps.contiguous(memory_format=torch.channels_last) for maps in (x, grad))
    y, mean, rstd = forward(x, gamma, beta, groups, 1e-5, None, relu=True)
    found = (y, *backward(grad, x, gamma, mean, rstd, None))
    names = ("result", "gradient", "gradient of gamma", "gradient of beta")
    pairs = zip(names, found, (F.relu(exact), *slopes), strict=True)
    return [f"the {name} of {shape} is wrong" for name, a, b in pairs if not (a - b).abs().max() < 1e-4 * b.abs().max()]


class _Plan:
    """How a map (B, C, H, W), channels last, is divided among programs."""

    def __init__(self, x: Tensor) -> None:
        self.images, self.channels, height, self.width = x.shape
        self.positions = height * self.width
        self.block_c = min(triton.next_power_of_2(self.channels), CHANNELS)
        self.block_p = max(BLOCK // self.block_c, 1)
        stripe = max(-(-self.positions // STRIPES), MIN_STRIPE, self.block_p)
        self.stripe = -(-stripe // self.block_p) * self.block_p  # whole blocks: no block crosses a stripe's end
        self.stripes = -(-self.positions // self.stripe)
        self.blocks_c = -(-self.channels // self.block_c)
        self.blocks_p = -(-self.positions // self.block_p)

    def sums(self, x: Tensor, kinds: int) -> Tensor:
        return x.new_empty(self.images, self.stripes, kinds, self.channels, dtype=torch.float32)

    @property
    def by_stripes(self) -> tuple[int, int, int]:
        return self.images, self.stripes, self.blocks_c

    @property
    def by_blocks(self) -> tuple[int, int, int]:
        return self.images, self.blocks_p, self.blocks_c

    @property
    def sides(self) -> dict[str, Any]:
        return {"block_p": self.block_p, "block_c": self.block_c}


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, sizes: Tensor | None, *, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x (B, C, H, W), channels last; relu: then apply ReLU.

    sizes (B, 2) int64 height, width of the pictures, or None if nothing is padded.  Returns y like x, and the mean and
    1 / std of each group, (B, G) float32.
    """
    plan = _Plan(x)
    mean, rstd = (x.new_empty(plan.images, groups, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return torch.empty_like(x), mean, rstd
    sums, members = plan.sums(x, 3), plan.channels // groups
    _sums_kernel[plan.by_stripes](
        x, sizes, sums, plan.positions, plan.channels, plan.width, plan.stripe, masked=sizes is not None,
        **plan.sides,
    )  # fmt: skip
    _statistics_kernel[(plan.images, groups)](
        sums, mean, rstd, plan.channels, plan.stripes, eps, members=members, block=triton.next_power_of_2(members)
    )
    return renormalize(x, gamma, beta, mean, rstd, sizes, relu=relu), mean, rstd


def renormalize(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, sizes: Tensor | None, *, relu: bool
) -> Tensor:
    """Compute y of `forward` from its statistics."""
    plan, y = _Plan(x), torch.empty_like(x)
    if x.numel():
        _apply_kernel[plan.by_blocks](
            x, y, sizes, gamma, beta, mean, rstd, plan.positions, plan.channels, mean.shape[1], plan.width,
            masked=sizes is not None, relu=relu, **plan.sides,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gamma and beta, from the gradient of y before its ReLU; channels last like x."""
    plan, groups, grad_x = _Plan(x), mean.shape[1], torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(gamma), torch.zeros_like(gamma)
    masked, sums = sizes is not None, plan.sums(x, 2)
    _gradient_sums_kernel[plan.by_stripes](
        grad, x, sizes, mean, rstd, sums, plan.positions, plan.channels, groups, plan.width, plan.stripe,
        masked=masked, **plan.sides,
    )  # fmt: skip
    sums = sums.sum(1)  # (B, 2, C), in a fixed order
    members = plan.positions * (plan.channels // groups)
    count = members if sizes is None else (sizes.prod(1) * (plan.channels // groups))[:, None]
    weighted = (sums * gamma).unbind(1)  # two of (B, C)
    grad_means, normal_means = (kind.unflatten(1, (groups, -1)).sum(2) / count for kind in weighted)  # (B, G)
    _gradient_kernel[plan.by_blocks](
        grad, x, grad_x, sizes, gamma, mean, rstd, grad_means, normal_means, plan.positions, plan.channels, groups,
        plan.width, masked=masked, **plan.sides,
    )  # fmt: skip
    return grad_x, sums[:, 1].sum(0).to(gamma.dtype), sums[:, 0].sum(0).to(gamma.dtype)
