"""The device code of group normalization: Triton kernels, each one pass over the map or over sums of it.

A map is (B, P, C), channels last.  The programs that add up a map take a stripe of one image's positions and a block of
channels, chunk by chunk: `tiles` tiles of block_p positions x block_c channels.  Stripes are interleaved: of S stripes,
number i takes chunks i, i + S, i + 2S ... of the picture's positions, counted row by row; padding is never read.
Loads run two chunks ahead of the sums (`tl.range`, STAGES).  Sums are kept element by element; one reduction follows.

Statistics are float32.  Each element of a tile shifts its values by the first of them before it squares them, so that
the rounding error of its variance grows by at most the number of its values (P / S / block_p, seldom above 20): neither
a large mean nor one outlier swallows a small variance.  Then means and squares are merged in two passes, the mean first
(Chan et al. 1979).  Every sum has a fixed order and no atomics, so every run gives the same bits.
Letters: B images, P positions, C channels, G groups, S stripes, U units: 2^n consecutive channels of one group.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without GPU support
    triton = None

if triton is not None:
    STAGES = tl.constexpr(3)

    @triton.jit
    def _picture(sizes, image, positions, width, masked: tl.constexpr):
        """Return the number of positions in an image's picture, and the length of its rows."""
        count, row = positions, width
        if masked:
            row = tl.load(sizes + 2 * image + 1).to(tl.int32)
            count = tl.load(sizes + 2 * image).to(tl.int32) * row
        return count, row

    @triton.jit
    def _chunk(
        start, count, row, width, channels: tl.constexpr, masked: tl.constexpr, tiles: tl.constexpr,
        block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Return which positions from `start` on exist, (tiles, block_p), and the offsets of all their channels."""
        index = start + tl.arange(0, tiles)[:, None] * block_p + tl.arange(0, block_p)[None, :]
        position = (index // row) * width + index % row if masked else index
        channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
        return index < count, position.to(tl.int64)[:, :, None] * channels + channel[None, None, :]

    @triton.jit
    def _merge(total, count, mean, squares):
        """Merge means and sums of squared differences from the mean, (i, j, k), over i and k; returns two of (j,).

        total: the sum of the counts over i and k.
        """
        total = tl.maximum(total, 1.0)
        center = tl.sum(tl.sum(count * mean, 2), 0) / total
        difference = mean - center[None, :, None]
        rest = tl.sum(tl.sum(count * difference, 2), 0) / total  # what rounding left out of the center
        squares = tl.sum(tl.sum(squares + count * difference * difference, 2), 0) - total * rest * rest
        return center + rest, squares

    @triton.jit
    def _units(program, groups: tl.constexpr, units: tl.constexpr, block_g: tl.constexpr, block_u: tl.constexpr):
        """Return the image and the groups of a program, and the columns of their units, (1, block_g, block_u)."""
        blocks: tl.constexpr = (groups + block_g - 1) // block_g
        group, unit = program % blocks * block_g + tl.arange(0, block_g), tl.arange(0, block_u)
        column = group[None, :, None] * units + unit[None, None, :]
        in_range = (group < groups)[None, :, None] & (unit < units)[None, None, :]
        return (program // blocks).to(tl.int64), group, column, in_range

    @triton.jit(do_not_specialize=("positions", "width", "stripes"))
    def sums_kernel(
        x, sizes, sums, positions, width, stripes, masked: tl.constexpr, channels: tl.constexpr, unit: tl.constexpr,
        stripe: tl.constexpr, tiles: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute count, mean and sum of squared differences from the mean per stripe and unit; (B, S, 3, U).

        stripe: the least number of positions in a stripe; stripes beyond the picture stay empty.
        """
        image, part = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
        in_range = (tl.program_id(1) * block_c + tl.arange(0, block_c) < channels)[None, None, :]
        count, row = _picture(sizes, image, positions, width, masked)
        step = tl.minimum(stripes, tl.cdiv(count, stripe)) * (tiles * block_p)
        start = part * (tiles * block_p)
        start = tl.where(start < step, start, count)
        x += image * positions * channels
        exists, offset = _chunk(start, count, row, width, channels, masked, 1, block_p, block_c)
        shift = tl.load(x + offset, mask=exists[:, :, None] & in_range, other=0.0).to(tl.float32)
        total = tl.zeros([block_p, block_c], tl.float32)
        squares = tl.zeros([block_p, block_c], tl.float32)
        for first in tl.range(start, count, step, num_stages=STAGES):
            existing, offsets = _chunk(first, count, row, width, channels, masked, tiles, block_p, block_c)
            keep = existing[:, :, None] & in_range
            value = tl.where(keep, tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32) - shift, 0.0)
            total += tl.sum(value, 0)
            squares += tl.sum(value * value, 0)
        turns, rest = (count - start) // step, (count - start) % step  # whole chunks, then positions of the last
        number = tl.minimum(tl.maximum(rest + block_p - 1 - tl.arange(0, block_p), 0) // block_p, tiles)
        number = (number + turns * tiles).to(tl.float32)  # of values of each element, (block_p,)
        all_numbers = (turns * (tiles * block_p) + tl.minimum(rest, tiles * block_p)).to(tl.float32) * unit
        mean = total / tl.maximum(number, 1.0)[:, None]  # less the shift
        squares -= total * mean
        mean += tl.sum(shift, 0)
        shape: tl.constexpr = (block_p, block_c // unit, unit)
        mean, squares = _merge(
            all_numbers, number[:, None, None], tl.reshape(mean, shape), tl.reshape(squares, shape)
        )  # fmt: skip
        units: tl.constexpr = channels // unit
        index = tl.program_id(1) * (block_c // unit) + tl.arange(0, block_c // unit)
        sums += (image * stripes + part) * 3 * units + index
        tl.store(sums, tl.zeros([block_c // unit], tl.float32) + all_numbers, mask=index < units)
        tl.store(sums + units, mean, mask=index < units)
        tl.store(sums + 2 * units, squares, mask=index < units)

    @triton.jit(do_not_specialize=("stripes",))
    def statistics_kernel(
        sums, mean, rstd, stripes, eps, groups: tl.constexpr, units: tl.constexpr, block_s: tl.constexpr,
        block_g: tl.constexpr, block_u: tl.constexpr,
    ):  # fmt: skip
        """Compute the mean and 1 / std of each group, (B, G), from the sums of its `units` units."""
        image, group, column, in_range = _units(tl.program_id(0), groups, units, block_g, block_u)
        sums += image * stripes * 3 * groups * units
        count = tl.zeros([block_g], tl.float32)
        center = tl.zeros([block_g], tl.float32)
        squares = tl.zeros([block_g], tl.float32)
        for first in range(0, stripes, block_s):
            part = (first + tl.arange(0, block_s))[:, None, None]
            keep = (part < stripes) & in_range
            offset = part * (3 * groups * units) + column
            number = tl.load(sums + offset, mask=keep, other=0.0)
            means = tl.load(sums + offset + groups * units, mask=keep, other=0.0)
            parts = tl.load(sums + offset + 2 * groups * units, mask=keep, other=0.0)
            total = tl.sum(tl.sum(number, 2), 0)
            means, parts = _merge(total, number, means, parts)
            difference, share = means - center, total / tl.maximum(count + total, 1.0)
            squares += parts + difference * difference * (count * share)
            center += difference * share
            count += total
        offset = image * groups + group
        tl.store(mean + offset, center, mask=group < groups)
        tl.store(rstd + offset, 1.0 / tl.sqrt(squares / tl.maximum(count, 1.0) + eps), mask=group < groups)

    @triton.jit
    def _place(
        sizes, positions, width, blocks, masked: tl.constexpr, channels: tl.constexpr, block_p: tl.constexpr,
        block_c: tl.constexpr,
    ):  # fmt: skip
        """Return a program's image, channels, the offsets of its block, which exist and which lie in the picture.

        Programs run from the end of the map: what was read last is still in the L2 cache.
        """
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        image = (program // blocks).to(tl.int64)
        position = program % blocks * block_p + tl.arange(0, block_p)
        channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
        inside = position < positions
        exists = inside[:, None] & (channel < channels)[None, :]
        if masked:
            height_here, width_here = tl.load(sizes + 2 * image), tl.load(sizes + 2 * image + 1)
            inside = inside & (position // width < height_here) & (position % width < width_here)
        offset = (image * positions + position)[:, None] * channels + channel[None, :]
        return image, channel, offset, exists, inside[:, None] & exists

    @triton.jit(do_not_specialize=("positions", "width", "blocks"))
    def apply_kernel(
        x, residual, y, sizes, gamma, beta, mean, rstd, positions, width, blocks, masked: tl.constexpr,
        relu: tl.constexpr, added: tl.constexpr, channels: tl.constexpr, members: tl.constexpr, block_p: tl.constexpr,
        block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute y = gamma (x - mean) rstd + beta, plus residual if added, then ReLU if relu; zero in the padding."""
        image, channel, offset, exists, inside = _place(
            sizes, positions, width, blocks, masked, channels, block_p, block_c
        )  # fmt: skip
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        in_range, group = channel < channels, image * (channels // members) + channel // members
        scale = tl.load(rstd + group, mask=in_range, other=0.0)
        center = tl.load(mean + group, mask=in_range, other=0.0)
        scale *= tl.load(gamma + channel, mask=in_range, other=0.0).to(tl.float32)
        shift = tl.load(beta + channel, mask=in_range, other=0.0).to(tl.float32)
        value = (value - center[None, :]) * scale[None, :] + shift[None, :]
        if added:
            value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        if relu:
            value = tl.where(value < 0.0, 0.0, value)  # keeps NaN
        tl.store(y + offset, tl.where(inside, value, 0.0).to(y.dtype.element_ty), mask=exists)

    @triton.jit(do_not_specialize=("positions", "width", "stripes"))
    def gradient_sums_kernel(
        grad, x, sizes, gamma, beta, mean, rstd, sums, positions, width, stripes, masked: tl.constexpr,
        relu: tl.constexpr, channels: tl.constexpr, members: tl.constexpr, unit: tl.constexpr, stripe: tl.constexpr,
        tiles: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute the sums of grad and of grad times the normalized x per stripe; (B, S, 2 C + 2 U).

        Both per channel, then both times gamma per unit.  relu: grad is zero where y is not positive.
        """
        image, part = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
        channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
        in_range, group = channel < channels, image * (channels // members) + channel // members
        center, scale = tl.load(mean + group, mask=in_range, other=0.0), tl.load(rstd + group, mask=in_range, other=0.0)
        factor = tl.load(gamma + channel, mask=in_range, other=0.0).to(tl.float32)
        if relu:
            slant, shift = scale * factor, tl.load(beta + channel, mask=in_range, other=0.0).to(tl.float32)
        count, row = _picture(sizes, image, positions, width, masked)
        step = tl.minimum(stripes, tl.cdiv(count, stripe)) * (tiles * block_p)
        start = part * (tiles * block_p)
        start = tl.where(start < step, start, count)
        x += image * positions * channels
        grad += image * positions * channels
        grads = tl.zeros([block_p, block_c], tl.float32)
        normals = tl.zeros([block_p, block_c], tl.float32)  # grad times x less its mean
        for first in tl.range(start, count, step, num_stages=STAGES):
            exists, offset = _chunk(first, count, row, width, channels, masked, tiles, block_p, block_c)
            keep = exists[:, :, None] & in_range[None, None, :]
            value = tl.load(x + offset, mask=keep, other=0.0).to(tl.float32)
            slope = tl.load(grad + offset, mask=keep, other=0.0).to(tl.float32)
            value -= center[None, None, :]
            if relu:
                slope = tl.where(value * slant[None, None, :] + shift[None, None, :] <= 0.0, 0.0, slope)  # keeps NaN
            grads += tl.sum(slope, 0)
            normals += tl.sum(slope * value, 0)
        units: tl.constexpr = channels // unit
        sums += (image * stripes + part) * (2 * channels + 2 * units)
        grad_sum, normal_sum = tl.sum(grads, 0), tl.sum(normals, 0) * scale
        tl.store(sums + channel, grad_sum, mask=in_range)
        tl.store(sums + channels + channel, normal_sum, mask=in_range)
        index = tl.program_id(1) * (block_c // unit) + tl.arange(0, block_c // unit)
        shape: tl.constexpr = (block_c // unit, unit)
        sums += 2 * channels + index
        tl.store(sums, tl.sum(tl.reshape(grad_sum * factor, shape), 1), mask=index < units)
        tl.store(sums + units, tl.sum(tl.reshape(normal_sum * factor, shape), 1), mask=index < units)

    @triton.jit(do_not_specialize=("positions", "images", "stripes"))
    def gradient_means_kernel(
        sums, sizes, means, grad_gamma, grad_beta, positions, images, stripes, masked: tl.constexpr,
        channels: tl.constexpr, members: tl.constexpr, units: tl.constexpr, block_s: tl.constexpr,
        block_g: tl.constexpr, block_u: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        """Add up the sums of `gradient_sums_kernel`.

        The first programs compute the gradients of gamma and beta, (C,), of `columns` channels each, over all images;
        the others the means over each group of gamma grad and gamma grad normal, (B, 2, G).
        """
        groups: tl.constexpr = channels // members
        length: tl.constexpr = 2 * (channels + groups * units)
        others: tl.constexpr = (channels + columns - 1) // columns
        if tl.program_id(0) < others:
            channel = tl.program_id(0) * columns + tl.arange(0, columns)
            betas = tl.zeros([rows, columns], tl.float32)
            gammas = tl.zeros([rows, columns], tl.float32)
            for first in tl.range(0, images * stripes, rows, num_stages=STAGES):
                row = first + tl.arange(0, rows)
                keep = (row < images * stripes)[:, None] & (channel < channels)[None, :]
                offset = row.to(tl.int64)[:, None] * length + channel[None, :]
                betas += tl.load(sums + offset, mask=keep, other=0.0)
                gammas += tl.load(sums + channels + offset, mask=keep, other=0.0)
            tl.store(grad_beta + channel, tl.sum(betas, 0).to(grad_beta.dtype.element_ty), mask=channel < channels)
            tl.store(grad_gamma + channel, tl.sum(gammas, 0).to(grad_gamma.dtype.element_ty), mask=channel < channels)
        else:
            image, group, column, in_range = _units(tl.program_id(0) - others, groups, units, block_g, block_u)
            count, row = _picture(sizes, image, positions, positions, masked)
            unit_sums = sums + image * stripes * length + 2 * channels
            grads = tl.zeros([block_s, block_g, block_u], tl.float32)
            normals = tl.zeros([block_s, block_g, block_u], tl.float32)
            for first in range(0, stripes, block_s):
                part = (first + tl.arange(0, block_s))[:, None, None]
                keep = (part < stripes) & in_range
                grads += tl.load(unit_sums + part * length + column, mask=keep, other=0.0)
                normals += tl.load(unit_sums + groups * units + part * length + column, mask=keep, other=0.0)
            number = count.to(tl.float32) * members
            place = image * 2 * groups + group
            tl.store(means + place, tl.sum(tl.sum(grads, 2), 0) / number, mask=group < groups)
            tl.store(means + place + groups, tl.sum(tl.sum(normals, 2), 0) / number, mask=group < groups)

    @triton.jit(do_not_specialize=("positions", "width", "blocks"))
    def gradient_kernel(
        grad, x, grad_x, sizes, gamma, beta, mean, rstd, means, positions, width, blocks, masked: tl.constexpr,
        relu: tl.constexpr, channels: tl.constexpr, members: tl.constexpr, block_p: tl.constexpr,
        block_c: tl.constexpr,
    ):  # fmt: skip
        """Compute rstd (gamma grad - mean_grad - normal mean_normal) from the means of `gradient_means_kernel`.

        relu: grad is zero where y is not positive.
        """
        image, channel, offset, exists, inside = _place(
            sizes, positions, width, blocks, masked, channels, block_p, block_c
        )  # fmt: skip
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        groups: tl.constexpr = channels // members
        in_range, group = channel < channels, image * groups + channel // members
        scale, center = tl.load(rstd + group, mask=in_range, other=0.0), tl.load(mean + group, mask=in_range, other=0.0)
        means += image * groups + group  # (B, 2, G)
        mean_grad = tl.load(means, mask=in_range, other=0.0)
        mean_normal = tl.load(means + groups, mask=in_range, other=0.0)
        factor = tl.load(gamma + channel, mask=in_range, other=0.0).to(tl.float32)
        value -= center[None, :]
        if relu:
            shift = tl.load(beta + channel, mask=in_range, other=0.0).to(tl.float32)
            slope = tl.where(value * (scale * factor)[None, :] + shift[None, :] <= 0.0, 0.0, slope)  # keeps NaN
        normal = value * scale[None, :]
        result = scale[None, :] * (slope * factor[None, :] - mean_grad[None, :] - normal * mean_normal[None, :])
        tl.store(grad_x + offset, tl.where(inside, result, 0.0).to(grad_x.dtype.element_ty), mask=exists)
