"""RoIAlign on NVIDIA GPUs: Triton kernels over all pyramid levels at once, in channels-last memory.

Maps stay in their own type and layout; sums are float32, or float64 for float64 maps.  Samples lie where torchvision's
lie, to the last bit or the one before it, because a compiler may fuse a multiplication with an addition.

The backward pass gathers instead of scattering.  A program owns a tile of cells of one image and level, finds the bins
that touch it, and adds weight * gradient over them: the gradient of a tile is a product of two matrices,
    (cells, bins) weights  times  (bins, channels) gradients of the pooled regions,
and so runs on tensor cores and reads each gradient little more than once.  A weight is a product too, of one of the row
and one of the column.  Each cell is stored once, nothing is added by atomics, and the sum takes the image's own regions
in their order: every run gives the same bits, and an image's result does not depend on the other images' regions.
A gradient that is not finite spreads over its tiles, never to another image.
B images, L levels, R regions of all images, P bins a side, C channels, (H, W) maps, T cells a side of a tile.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gndet.ops import torchvision_ops
from gndet.ops.self_test import failure

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without GPU support
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SIZE = 255  # bins a side, at most: numbers of bins are packed into 8 bits
TILE = 8  # cells a side: 64 rows, the fewest that Hopper's tensor cores take
ENTRIES = 32  # 16-bit gradients of a channel that a program adds to a tile at once: half as many of 32 or 64 bits
REGIONS = 64  # that a program looks through at once
LISTED = 1024  # regions that a program lists at once
POOLED_BYTES = 4096  # that a program pools at once
TILE_BYTES = 256  # of channels, that a program of the backward pass computes

if triton is not None:

    @triton.jit
    def _divide(a, b):
        """Return a / b, correctly rounded."""
        return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b

    @triton.jit
    def _chosen(values, index):
        """Return the element of a tuple at an index that is not a constant."""
        value = values[0]
        for i in tl.static_range(1, len(values)):
            value = tl.where(index == i, values[i], value)
        return value

    @triton.jit
    def _whole(values, index):
        """Return the element of a tuple of whole numbers.

        They come as floats: of integers in tuples Triton compiles a kernel anew for each pattern of multiples of 16.
        """
        return _chosen(values, index).to(tl.int32)

    @triton.jit
    def _limits(limits, index, height, width, limited: tl.constexpr):
        """Return the height and width, in cells, beyond which the edge is repeated: of the picture, or of the map.

        index: of the image and level in limits (B, L, 2).
        """
        if limited:
            height = tl.load(limits + 2 * index).to(tl.int32)
            width = tl.load(limits + 2 * index + 1).to(tl.int32)
        return height, width

    @triton.jit
    def _bins_of(boxes, region, keep, stride, size: tl.constexpr, ratio: tl.constexpr, aligned: tl.constexpr):
        """Return `_bins` of regions along y, then along x; boxes (R, 4), stride in the type of the results."""
        boxes += 4 * region
        left, top = tl.load(boxes, mask=keep).to(stride.dtype), tl.load(boxes + 1, mask=keep).to(stride.dtype)
        right, bottom = tl.load(boxes + 2, mask=keep).to(stride.dtype), tl.load(boxes + 3, mask=keep).to(stride.dtype)
        start_y, side_y, samples_y = _bins(top, bottom, stride, size, ratio, aligned)
        start_x, side_x, samples_x = _bins(left, right, stride, size, ratio, aligned)
        return start_y, side_y, samples_y, start_x, side_x, samples_x

    @triton.jit
    def _bins(low, high, stride, size: tl.constexpr, ratio: tl.constexpr, aligned: tl.constexpr):
        """Return, for a side of a region, the start of its first bin, the side of a bin, and a bin's samples.

        low, high: in pixels.  The results are in cells; the number of samples is a float.
        """
        low = tl.minimum(tl.maximum(low, -1e7), 1e7)  # no sample of a region that far outside matters; sums stay finite
        high = tl.minimum(tl.maximum(high, -1e7), 1e7)
        start, stop = _divide(low, stride), _divide(high, stride)
        if aligned:
            start, stop = start - 0.5, stop - 0.5
        side = stop - start
        if not aligned:
            side = tl.maximum(side, 1.0)
        side = _divide(side, side * 0.0 + size)
        return start, side, _samples(side, ratio)

    @triton.jit
    def _samples_between(start, spacing, samples, low, high):
        """Return the first sample of an adaptive bin that may lie in [low, high], a float, and how many may."""
        margin = 0.01 + 1e-6 * tl.abs(start)
        spacing = tl.maximum(spacing, 1e-12)
        first = tl.floor((low - margin - start) / spacing - 0.5)
        last = tl.ceil((high + margin - start) / spacing - 0.5)
        first = tl.minimum(tl.maximum(first, 0.0), samples)
        last = tl.minimum(tl.maximum(last + 1.0, first), samples)
        return first, (last - first).to(tl.int32)

    @triton.jit
    def _bins_between(start, side, low, high, size: tl.constexpr, ratio: tl.constexpr):
        """Return the first bin that may have a sample in [low, high], and how many bins may."""
        samples = _samples(side, ratio)
        margin = 0.01 + 1e-6 * (tl.abs(start) + size * tl.abs(side))
        side = tl.where(tl.abs(side) < 1e-12, 1e-12, side)
        half = 0.5 / tl.maximum(samples, 1.0)  # from an end of a bin to its nearest sample
        a, b = (low - margin - start) / side, (high + margin - start) / side
        first = tl.ceil(tl.minimum(a, b) - 1.0 + half)
        last = tl.floor(tl.maximum(a, b) - half)
        first = tl.minimum(tl.maximum(first, 0.0), size).to(tl.int32)
        last = tl.minimum(tl.maximum(last, -1.0), size - 1).to(tl.int32)
        return first, tl.where(samples > 0, tl.maximum(last - first + 1, 0), 0)

    @triton.jit
    def _cells(position, limit):
        """Return the two cells on either side of a position, the weight of the second, and whether it is inside."""
        inside = (position >= -1.0) & (position <= tl.where(limit > 0, limit, -2))
        position = tl.minimum(tl.maximum(position, 0.0), tl.maximum(limit - 1, 0).to(position.dtype))
        low = tl.floor(position)
        cell = low.to(tl.int32)
        return cell, tl.minimum(cell + 1, tl.maximum(limit - 1, 0)), position - low, inside

    @triton.jit
    def _sample(x, y, column, limit_y, limit_x, width, channels, channel, in_range):
        """Return the features (bins, channels) at a row y and columns (bins,), interpolated; 0 outside the limits."""
        top, bottom, weight_y, inside_y = _cells(y, limit_y)
        left, right, weight_x, inside_x = _cells(column, limit_x)
        keep = (in_range & inside_x)[:, None] & (channel < tl.where(inside_y, channels, 0))[None, :]
        upper, lower = x + top.to(tl.int64) * width * channels, x + bottom.to(tl.int64) * width * channels
        left, right = left[:, None] * channels + channel[None, :], right[:, None] * channels + channel[None, :]
        upper_left = tl.load(upper + left, mask=keep, other=0.0).to(y.dtype)
        upper_right = tl.load(upper + right, mask=keep, other=0.0).to(y.dtype)
        lower_left = tl.load(lower + left, mask=keep, other=0.0).to(y.dtype)
        lower_right = tl.load(lower + right, mask=keep, other=0.0).to(y.dtype)
        first = ((1 - weight_y) * (1 - weight_x))[:, None] * upper_left
        second = ((1 - weight_y) * weight_x)[:, None] * upper_right
        third = (weight_y * (1 - weight_x))[:, None] * lower_left
        return first + second + third + (weight_y * weight_x)[:, None] * lower_right

    @triton.jit
    def _pool_kernel(
        maps, boxes, level, image, limits, pooled, heights, widths, strides, channels, limited: tl.constexpr,
        exact: tl.constexpr, size: tl.constexpr, ratio: tl.constexpr, aligned: tl.constexpr, block_q: tl.constexpr,
        block_c: tl.constexpr,
    ):  # fmt: skip
        """Pool a row of a region's bins, or a part of it."""
        blocks_c, blocks_q = tl.cdiv(channels, block_c), tl.cdiv(size, block_q)
        channel = tl.program_id(0) % blocks_c * block_c + tl.arange(0, block_c)
        row = tl.program_id(0) // blocks_c // blocks_q
        q = tl.program_id(0) // blocks_c % blocks_q * block_q + tl.arange(0, block_q)
        p, region = row % size, (row // size).to(tl.int64)
        place = tl.load(level + region).to(tl.int32)
        x, height, width = _chosen(maps, place), _whole(heights, place), _whole(widths, place)
        stride = _chosen(strides, place).to(exact)
        own = tl.load(image + region)
        limit_y, limit_x = _limits(limits, own * len(maps) + place, height, width, limited)
        x += own * height * width * channels
        start_y, side_y, samples_y, start_x, side_x, samples_x = _bins_of(
            boxes, region, region >= 0, stride, size, ratio, aligned
        )
        start_y, start_x = start_y + p * side_y, start_x + q * side_x  # of a bin
        step_y, step_x = _divide(side_y, tl.maximum(samples_y, 1.0)), _divide(side_x, tl.maximum(samples_x, 1.0))
        in_range = q < size
        total = tl.zeros([block_q, block_c], exact)
        if ratio > 0:
            for i in range(ratio):
                for j in tl.static_range(ratio):
                    y, column = start_y + (i + 0.5) * step_y, start_x + (j + 0.5) * step_x
                    total += _sample(x, y, column, limit_y, limit_x, width, channels, channel, in_range)
        else:
            first_y, count_y = _samples_between(start_y, step_y, samples_y, -1.0, limit_y)
            first_x, count_x = _samples_between(start_x, step_x, samples_x, -1.0, limit_x)
            for i in range(count_y):
                for j in range(tl.max(count_x, 0)):
                    y, column = start_y + (first_y + i + 0.5) * step_y, start_x + (first_x + j + 0.5) * step_x
                    keep = in_range & (j < count_x)
                    total += _sample(x, y, column, limit_y, limit_x, width, channels, channel, keep)
        total = total * (1 / tl.maximum(samples_y * samples_x, 1.0))
        offset = (region * size + p) * size * channels + q[:, None] * channels + channel[None, :]
        keep = in_range[:, None] & (channel < channels)[None, :]
        tl.store(pooled + offset, total.to(pooled.dtype.element_ty), mask=keep)

    @triton.jit(do_not_specialize=["num"])
    def _list_kernel(
        boxes, level, image, regions, bins, starts, strides, num, levels: tl.constexpr, exact: tl.constexpr,
        size: tl.constexpr, ratio: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """List the regions of one image and level in ascending order, after those of earlier images and levels.

        regions (R,); bins (R, 4) of the listed regions: start and side along y, start and side along x, in cells;
        starts (B * L + 1,), where each list starts.
        """
        key, place = tl.program_id(0), tl.arange(0, block)
        stride = _chosen(strides, key % levels).to(exact)
        start, count = 0, 0
        for first in range(0, num, block):
            keep = first + place < num
            found = tl.load(image + first + place, mask=keep) * levels + tl.load(level + first + place, mask=keep)
            start += tl.sum((keep & (found < key)).to(tl.int32), 0)
            count += tl.sum((keep & (found == key)).to(tl.int32), 0)
        tl.store(starts + key, start)
        tl.store(starts + key + 1, start + count, mask=key == tl.num_programs(0) - 1)
        for first in range(0, num, block):
            region = first + place
            found = tl.load(image + region, mask=region < num) * levels + tl.load(level + region, mask=region < num)
            own = (region < num) & (found == key)
            target = start + tl.cumsum(own.to(tl.int32), 0) - 1
            start_y, side_y, _, start_x, side_x, _ = _bins_of(boxes, region, own, stride, size, ratio, aligned)
            tl.store(regions + target, region, mask=own)
            tl.store(bins + 4 * target, start_y, mask=own)
            tl.store(bins + 4 * target + 1, side_y, mask=own)
            tl.store(bins + 4 * target + 2, start_x, mask=own)
            tl.store(bins + 4 * target + 3, side_x, mask=own)
            start += tl.sum(own.to(tl.int32), 0)

    @triton.jit
    def _samples(side, ratio: tl.constexpr):
        """Return the number of samples along the side of a bin, a float."""
        samples = side * 0.0 + ratio
        if ratio == 0:
            samples = tl.maximum(tl.ceil(side), 0.0)
        return samples

    @triton.jit
    def _touching(bins, place, keep, top, left, tile, size: tl.constexpr, ratio: tl.constexpr):
        """Return how many bins of each listed region touch the tile whose first cell is (top, left), and which.

        Which: the first row of bins, the first column, the number of columns, 8 bits each.
        """
        bins += 4 * place
        start_y, side_y = tl.load(bins, mask=keep, other=0.0), tl.load(bins + 1, mask=keep, other=0.0)
        start_x, side_x = tl.load(bins + 2, mask=keep, other=0.0), tl.load(bins + 3, mask=keep, other=0.0)
        first_y, count_y = _bins_between(start_y, side_y, top - 1, top + tile, size, ratio)
        first_x, count_x = _bins_between(start_x, side_x, left - 1, left + tile, size, ratio)
        return tl.where(keep, count_y * count_x, 0), first_y | first_x << 8 | count_x << 16

    @triton.jit
    def _weights(bins, index, keep, cell, limit, ratio: tl.constexpr):
        """Return the weights (T, n) that n bins give to consecutive cells (T,), floats; zero where not keep.

        bins: start and side of the first bin of each bin's region; index: of the bin in the region.
        """
        start, side = tl.load(bins, mask=keep, other=-1e9), tl.load(bins + 1, mask=keep, other=0.0)
        start += index * side
        samples = tl.maximum(_samples(side, ratio), 1.0)
        step = side / samples
        total = cell[:, None] * 0.0 + start[None, :] * 0.0
        if ratio > 0:
            for i in tl.static_range(ratio):
                total += _weight(start + (i + 0.5) * step, cell, limit)
        else:
            first, count = _samples_between(start, step, samples, tl.min(cell, 0) - 1.0, tl.max(cell, 0) + 1.0)
            for i in range(tl.max(count, 0)):
                weight = _weight(start + (first + i + 0.5) * step, cell, limit)
                total += tl.where((i < count)[None, :], weight, 0.0)
        return total * (1 / samples)[None, :]

    @triton.jit
    def _weight(position, cell, limit):
        """Return the bilinear weights (T, n) of cells (T,) for samples at positions (n,)."""
        inside = (position >= -1.0) & (position <= limit)
        position = tl.minimum(tl.maximum(position, 0.0), (limit - 1).to(position.dtype))
        return tl.where(inside[None, :], tl.maximum(1 - tl.abs(cell[:, None] - position[None, :]), 0.0), 0.0)

    @triton.jit
    def _multiply(weight, grad, total, operand: tl.constexpr):
        """Add the product of weights (cells, bins) and gradients (bins, channels) to the total.

        Two 16-bit numbers make up a weight, so that it is as good as a gradient and better.
        """
        if operand.primitive_bitwidth == 16:
            high = weight.to(operand)
            low = (weight - high.to(weight.dtype)).to(operand)
            total = tl.dot(low, grad, tl.dot(high, grad, total))
        else:
            total = tl.dot(weight, grad, total, input_precision="tf32x3", out_dtype=total.dtype)
        return total

    @triton.jit(do_not_specialize=["images"])
    def _gradient_kernel(
        grad, regions, bins, starts, limits, grads, heights, widths, images, channels, limited: tl.constexpr,
        exact: tl.constexpr, operand: tl.constexpr, size: tl.constexpr, ratio: tl.constexpr, tile: tl.constexpr,
        block_k: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute the gradient of one tile of cells.  Coarse levels, whose tiles meet most regions, come first."""
        blocks_c = tl.cdiv(channels, block_c)
        number, channel = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c * block_c + tl.arange(0, block_c)
        levels: tl.constexpr = len(grads)
        level, first, tiles = 0, 0, 0  # level of the tile; tiles before that level, and before the level in turn
        for i in tl.static_range(levels - 1, -1, -1):
            level, first = tl.where(number >= tiles, i, level), tl.where(number >= tiles, tiles, first)
            tiles += images * tl.cdiv(_whole(heights, i), tile) * tl.cdiv(_whole(widths, i), tile)
        target, height, width = _chosen(grads, level), _whole(heights, level), _whole(widths, level)
        tiles_y, tiles_x = tl.cdiv(height, tile), tl.cdiv(width, tile)
        image = (number - first) // (tiles_y * tiles_x)
        limit_y, limit_x = _limits(limits, image * levels + level, height, width, limited)
        top, left = (number - first) // tiles_x % tiles_y * tile, (number - first) % tiles_x * tile
        cell = tl.arange(0, tile * tile)
        y, x = (top + cell // tile).to(exact), (left + cell % tile).to(exact)
        total = tl.zeros([tile * tile, block_c], exact)
        stop = tl.load(starts + image * levels + level + 1)
        for begin in range(tl.load(starts + image * levels + level), stop, block_r):
            place = begin + tl.arange(0, block_r)
            count, corner = _touching(bins, place, place < stop, top, left, tile, size, ratio)
            ends, num = tl.cumsum(count, 0), tl.sum(count, 0)  # of the entries: bins that touch the tile
            for entry in range(0, num, block_k):
                index = entry + tl.arange(0, block_k)
                owner = tl.sum((ends[:, None] <= index[None, :]).to(tl.int32), 0)  # each entry's region
                owner = tl.minimum(owner, block_r - 1)
                within, which = index - tl.gather(ends - count, owner, 0), tl.gather(corner, owner, 0)
                columns = tl.maximum(which >> 16, 1)
                p, q = (which & 255) + within // columns, (which >> 8 & 255) + within % columns
                keep = index < num
                weight_y = _weights(bins + 4 * (begin + owner), p, keep, y, limit_y, ratio)
                weight_x = _weights(bins + 4 * (begin + owner) + 2, q, keep, x, limit_x, ratio)
                source = (tl.load(regions + begin + owner, mask=keep, other=0).to(tl.int64) * size + p) * size + q
                keep = keep[:, None] & (channel < channels)[None, :]
                value = tl.load(grad + source[:, None] * channels + channel[None, :], mask=keep, other=0.0)
                total = _multiply(weight_y * weight_x, value.to(operand), total, operand)
        row, column = top + cell // tile, left + cell % tile
        offset = ((image.to(tl.int64) * height + row) * width + column)[:, None] * channels + channel[None, :]
        keep = ((row < height) & (column < width))[:, None] & (channel < channels)[None, :]
        tl.store(target + offset, total.to(target.dtype.element_ty), mask=keep)


def roi_align(
    maps: Sequence[Tensor], boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, strides: Sequence[int],
    size: int, ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Pool regions from the maps L x (B, C, H, W) of a pyramid.

    boxes (R, 4) xyxy canvas pixels, finite; level (R,) int64 in [0, L); image (R,) int64 in [0, B); limits (B, L, 2)
    int64 height, width in cells of the pictures whose edges are repeated beyond them, or None; size P, at most
    MAX_SIZE; ratio and aligned as in torchvision; ratio 0: as many samples as a bin has cells.
    Returns (R, C, P, P), channels last, in the maps' type.  Keeps nothing of the size of a map for the backward pass.
    """
    assert size <= MAX_SIZE
    return _RoIAlign.apply(boxes, level, image, limits, tuple(strides), size, ratio, aligned, *maps)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, strides: tuple[int, ...],
        size: int, ratio: int, aligned: bool, *maps: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(boxes, level, image, limits)
        ctx.sides = maps[0].shape[0], [x.shape[2] for x in maps], [x.shape[3] for x in maps]
        ctx.options = strides, ratio, aligned
        call = torch.ops.gndet.roi_align if torch.compiler.is_compiling() else pool
        return call(maps, boxes, level, image, limits, strides, size, ratio, aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call = torch.ops.gndet.roi_align_backward if torch.compiler.is_compiling() else gradients
        return None, None, None, None, None, None, None, None, *call(grad, *ctx.saved_tensors, *ctx.sides, *ctx.options)


def pool(
    maps: Sequence[Tensor], boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, strides: Sequence[int],
    size: int, ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Compute `roi_align`."""
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    pooled = _empty_regions(maps, boxes, level, image, limits, strides, size, ratio, aligned)
    if pooled.numel() == 0:
        return pooled
    channels, exact = pooled.shape[1], _type(torch.promote_types(pooled.dtype, torch.float32))
    options = pool_options(size, channels, pooled.element_size())
    rows = len(boxes) * size * triton.cdiv(size, options["block_q"])
    with torch.cuda.device_of(pooled):  # Triton launches on the current GPU
        _pool_kernel[rows * triton.cdiv(channels, options["block_c"]),](
            tuple(maps), boxes.contiguous(), level.contiguous(), image.contiguous(), limits, pooled,
            *_sides([x.shape for x in maps], strides), channels, limited=limits is not None, exact=exact, size=size,
            ratio=ratio, aligned=aligned, **options,
        )  # fmt: skip
    return pooled


def gradients(
    grad: Tensor, boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, images: int,
    heights: Sequence[int], widths: Sequence[int], strides: Sequence[int], ratio: int, aligned: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients L x (B, C, H, W) of the maps, channels last, from that of the regions, (R, C, P, P)."""
    grads = _empty_maps(grad, boxes, level, image, limits, images, heights, widths, strides, ratio, aligned)
    num_regions, channels, size, _ = grad.shape
    options = gradient_options(channels, grad.element_size())
    tiles = images * sum(triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in zip(heights, widths, strict=True))
    programs = tiles * triton.cdiv(channels, options["block_c"])
    if programs == 0:
        return grads
    exact = torch.promote_types(grad.dtype, torch.float32)
    regions = level.new_empty(num_regions, dtype=torch.int32)
    bins = boxes.new_empty((num_regions, 4), dtype=exact)
    starts = level.new_empty(images * len(grads) + 1, dtype=torch.int32)
    operand = _type(grad.dtype if grad.is_cuda else exact)  # the interpreter multiplies no bfloat16
    sides = _sides([x.shape for x in grads], strides)
    shared = {"exact": _type(exact), "size": size, "ratio": ratio}
    with torch.cuda.device_of(grad):
        _list_kernel[images * len(grads),](
            boxes.contiguous(), level.contiguous(), image.contiguous(), regions, bins, starts, sides[2], num_regions,
            levels=len(grads), aligned=aligned, block=LISTED, **shared,
        )  # fmt: skip
        _gradient_kernel[programs,](
            grad.contiguous(memory_format=torch.channels_last), regions, bins, starts, limits, tuple(grads),
            *sides[:2], images, channels, limited=limits is not None, operand=operand, **shared, **options,
        )  # fmt: skip
    return grads


# --- the operators that stand for the kernels in a compiled graph


torch.library.define(
    "gndet::roi_align",
    "(Tensor[] maps, Tensor boxes, Tensor level, Tensor image, Tensor? limits, int[] strides, int size, int ratio,"
    " bool aligned) -> Tensor",
    tags=torch.Tag.needs_fixed_stride_order,
)
torch.library.define(
    "gndet::roi_align_backward",
    "(Tensor grad, Tensor boxes, Tensor level, Tensor image, Tensor? limits, SymInt images, SymInt[] heights,"
    " SymInt[] widths, int[] strides, int ratio, bool aligned) -> Tensor[]",
    tags=torch.Tag.needs_fixed_stride_order,
)
torch.library.impl("gndet::roi_align", ("cpu", "cuda"), pool)
torch.library.impl("gndet::roi_align_backward", ("cpu", "cuda"), gradients)


@torch.library.register_fake("gndet::roi_align")
def _empty_regions(
    maps: Sequence[Tensor], boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, strides: Sequence[int],
    size: int, *_: Any,
) -> Tensor:  # fmt: skip
    x = maps[0]
    shape = (len(boxes), x.shape[1], size, size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("gndet::roi_align_backward")
def _empty_maps(
    grad: Tensor, boxes: Tensor, level: Tensor, image: Tensor, limits: Tensor | None, images: int,
    heights: Sequence[int], widths: Sequence[int], *_: Any,
) -> list[Tensor]:  # fmt: skip
    shapes = [(images, grad.shape[1], height, width) for height, width in zip(heights, widths, strict=True)]
    options: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": torch.channels_last}
    return [torch.empty(shape, **options) for shape in shapes]


def pool_options(size: int, channels: int, width: int) -> dict[str, int]:
    """Return the block sizes of the forward kernel; width: bytes of a number."""
    block_q = min(triton.next_power_of_2(size), 16)
    return {"block_q": block_q, "block_c": min(triton.next_power_of_2(channels), POOLED_BYTES // width // block_q)}


def gradient_options(channels: int, width: int) -> dict[str, int]:
    """Return the block sizes and launch options of the backward kernel; width: bytes of a number."""
    block_c = min(max(triton.next_power_of_2(channels), 16), TILE_BYTES // width)  # tensor cores take 16 columns
    block_k = ENTRIES if width == 2 else ENTRIES // 2  # no registers spill
    return {"tile": TILE, "block_k": block_k, "block_r": REGIONS, "block_c": block_c, "num_stages": 1}


def _type(dtype: torch.dtype) -> Any:
    """Return Triton's name of a type."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def _sides(shapes: Sequence[torch.Size], strides: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Return heights, widths and strides as floats."""
    heights, widths = (tuple(float(shape[axis]) for shape in shapes) for axis in (2, 3))
    return heights, widths, tuple(map(float, strides))


SELF_TEST = (  # type of the maps, P, ratio, allowed difference relative to the largest value
    (torch.float32, 7, 2, 1e-4), (torch.bfloat16, 7, 2, 1e-2), (torch.bfloat16, 2, 0, 1e-2),
    (torch.float16, 2, 2, 2e-3), (torch.float64, 2, 2, 1e-9),
)  # fmt: skip


def usable(maps: Sequence[Tensor]) -> bool:
    """Return whether the kernels can pool from these maps, and work on their GPU.

    Otherwise torchvision's operator pools level by level, and adds gradients by atomics, in any order.  Under
    torch.use_deterministic_algorithms it runs as Python code, which is slow and keeps several tensors of
    R * C * P^2 * ratio^2 numbers (0.1 GB each for a box head at batch 1), or of R * C * P^2 * H * W if the ratio is 0:
    more than any GPU holds.
    """
    x = maps[0]
    fitting = x.is_cuda and x.dtype in DTYPES and not torch.onnx.is_in_onnx_export()
    return fitting and _working(x.device)


def _working(device: torch.device) -> bool:
    return not trouble(device)


_working._dynamo_marked_constant = True  # type: ignore[attr-defined]  # or a compiler would trace the self-test


@cache
def trouble(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, in words, or "".  Tests them once per process."""
    return failure(lambda: [text for case in SELF_TEST for text in _compare(device, *case)])


def _compare(device: torch.device, dtype: torch.dtype, size: int, ratio: int, tolerance: float) -> list[str]:
    """Return a line for each result that differs from torchvision's in float64 on a CPU, or from run to run."""
    generator, strides = torch.Generator().manual_seed(0), (4, 8)
    maps = [torch.randn(2, 24, side, side + 3, generator=generator).to(dtype) for side in (11, 9)]
    grad = torch.randn(8, 24, size, size, generator=generator).to(dtype)
    corner = torch.rand(8, 2, generator=generator) * 50 - 10
    boxes = torch.cat([corner, corner + torch.rand(8, 2, generator=generator) * 50], dim=1)
    level, image = torch.arange(8) % 2, torch.arange(8) // 2 % 2
    places = boxes.to(device), level.to(device), image.to(device)
    pooled = pool([x.to(device) for x in maps], *places, None, strides, size, ratio, True)
    first, second = (
        gradients(grad.to(device), *places, None, 2, [11, 9], [14, 12], strides, ratio, True) for _ in range(2)
    )
    wrong = []
    if not all(map(torch.equal, first, second)):
        wrong.append(f"the gradient is not the same twice in {dtype}")
    for i, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        on_level = level == i
        rois = torch.cat([image[:, None], boxes], dim=1)[on_level].double()
        exact = torchvision_ops.roi_align(x.double(), rois, size, 1 / stride, ratio, aligned=True)
        slope = torch.ops.torchvision._roi_align_backward(
            grad[on_level].double(), rois, 1 / stride, size, size, *x.shape, ratio, True
        )
        for name, found, expected in (("result", pooled[on_level.to(device)], exact), ("gradient", first[i], slope)):
            if not (found.cpu() - expected).abs().max() < tolerance * expected.abs().max():
                wrong.append(f"the {name} of stride {stride} is wrong in {dtype}, sampling ratio {ratio}")
    return wrong
