"""Non-maximum suppression on NVIDIA GPUs: two Triton kernels, exact and without a host sync.

The first kernel writes, as bits, which box would suppress which worse one.  The second walks the boxes of one image in
their order, 32 at a time, and keeps what no kept box suppresses.  Bits are integers and nothing is added by atomics, so
every run gives the same result, and an image's result does not depend on the other images.
The result is that of torchvision's operator on a CPU on every input: the same formula in the same order, with IEEE
division and without fused multiply-add.
B images, N boxes in descending order of score, W words of 32 boxes, rounded up to a power of two.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gndet.ops.self_test import failure
from gndet.ops.torchvision_ops import operators

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without GPU support
    triton = None

ROWS, COLUMNS = 128, 16  # of pairs of boxes that a program compares at once
EXACT = {"enable_fp_fusion": False}  # a launch option: a fused multiply-add rounds once instead of twice
WARP_WORDS = 128  # words that one warp walks; more words need more warps
MOST_BOXES = 1 << 16  # of an image: their bits take 512 MiB

if triton is not None:

    @triton.jit
    def _sides(box, known):
        """Load x0, y0, x1, y1 of boxes."""
        x0, y0 = tl.load(box, mask=known, other=0.0), tl.load(box + 1, mask=known, other=0.0)
        return x0, y0, tl.load(box + 2, mask=known, other=0.0), tl.load(box + 3, mask=known, other=0.0)

    @triton.jit(do_not_specialize=["num", "blocks"])
    def _overlap_kernel(
        boxes, groups, bits, num, blocks, threshold, words: tl.constexpr, rows: tl.constexpr,
        columns: tl.constexpr,
    ):  # fmt: skip
        """Set bit k of bits (B, N, W) at (i, w) if box i would suppress the worse box j = 32 w + k of its group.

        Words that contain no box worse than i stay unwritten.
        """
        image, first, word = (
            (tl.program_id(0) // blocks).to(tl.int64),
            tl.program_id(0) % blocks * rows,
            tl.program_id(1),
        )
        if 32 * word + 31 > first:
            row = first + tl.arange(0, rows)
            i, inside = row[None, :], row[None, :] < num
            boxes += image * num * 4
            groups += image * num
            ix0, iy0, ix1, iy1 = _sides(boxes + 4 * i, inside)
            group = tl.load(groups + i, mask=inside, other=0)
            found = tl.zeros([rows], tl.int32)
            for start in range(0, 32, columns):  # a few boxes j at a time, so that their coordinates fit the registers
                place = start + tl.arange(0, columns)[:, None]
                j = 32 * word + place
                known = j < num
                jx0, jy0, jx1, jy1 = _sides(boxes + 4 * j, known)
                width = tl.maximum(tl.minimum(ix1, jx1) - tl.maximum(ix0, jx0), 0.0)  # (columns, rows)
                height = tl.maximum(tl.minimum(iy1, jy1) - tl.maximum(iy0, jy0), 0.0)
                intersection = width * height
                union = (ix1 - ix0) * (iy1 - iy0) + (jx1 - jx0) * (jy1 - jy0) - intersection
                # NaN in a box makes its area and this quotient NaN, which is above no threshold
                over = (tl.div_rn(intersection, union) > threshold) & (j > i) & known
                over = over & (tl.load(groups + j, mask=known, other=0) == group)
                found += tl.sum(tl.where(over, 1, 0) << place, 0)
            tl.store(bits + (image * num + row) * words + word, found, mask=row < num)

    @triton.jit(do_not_specialize=["num"])
    def _walk_kernel(bits, valid, keep, num, words: tl.constexpr):
        """Keep each valid box of an image that no kept box suppresses; one program per image.

        A bit of alive and removed is a box: alive of the 32 boxes in turn, removed of all boxes.
        """
        image = tl.program_id(0).to(tl.int64)
        bits += image * num * words
        valid += image * num
        keep += image * num
        place, word, blocks = tl.arange(0, 32), tl.arange(0, words), tl.cdiv(num, 32)
        removed = tl.zeros([words], tl.int32)
        for block in range(blocks):
            box = 32 * block + place
            usable = tl.load(valid + box, mask=box < num, other=0).to(tl.int32)
            alive = tl.sum(usable << place, 0) & ~tl.sum(tl.where(word == block, removed, 0), 0)
            later = (word > block) & (word < blocks)
            for k in tl.static_range(32):
                row = bits + (32 * block + k) * words
                inside = 32 * block + k < num
                kept = -((alive >> k) & 1)  # all bits, or none
                alive &= ~(tl.load(row + block, mask=inside, other=0) & kept)  # only bits above k
                removed |= tl.load(row + word, mask=later & inside, other=0) & kept
            tl.store(keep + box, (alive >> place) & 1, mask=box < num)


def usable(boxes: Tensor) -> bool:
    """Return whether the kernels can take these boxes (B, N, 4) and work on their GPU."""
    is_fit = boxes.is_cuda and boxes.dtype == torch.float32 and boxes.shape[1] <= MOST_BOXES
    return is_fit and not trouble(boxes.device)


def keep_boxes(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return which boxes to keep, (B, N) bool; arguments as in `matching.nms_keep`, boxes float32."""
    num_images, num = valid.shape
    keep = torch.empty_like(valid, memory_format=torch.contiguous_format)
    if keep.numel() == 0:
        return keep
    words, blocks = triton.next_power_of_2(triton.cdiv(num, 32)), triton.cdiv(num, ROWS)
    bits = torch.empty(num_images, num, words, dtype=torch.int32, device=boxes.device)
    with torch.cuda.device_of(boxes):
        _overlap_kernel[num_images * blocks, triton.cdiv(num, 32)](
            boxes.contiguous(), groups.contiguous(), bits, num, blocks, _float_below(threshold), words=words, rows=ROWS,
            columns=COLUMNS, **EXACT,
        )  # fmt: skip
        _walk_kernel[num_images,](
            bits, valid.contiguous().view(torch.uint8), keep.view(torch.uint8), num, words=words,
            num_warps=walk_warps(words),
        )  # fmt: skip
    return keep


def walk_warps(words: int) -> int:
    """Return the number of warps that walk the words of an image."""
    return max(words // WARP_WORDS, 1)


@cache
def _float_below(threshold: float) -> float:
    """Return the largest float32 that is not above the threshold: a float32 is above both or above neither."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-math.inf)))


@cache
def trouble(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, in words, or "".  Tests them once per process."""
    return failure(lambda: _compare(device))


def _compare(device: torch.device) -> list[str]:
    """Return a line if the kernels and torchvision on a CPU keep different boxes, among them a chain in 3 blocks."""
    num, generator = 150, torch.Generator().manual_seed(0)
    corner, side = torch.rand(2, 1, num, 2, generator=generator).mul(40).unbind()
    step = torch.arange(float(num))[None, :, None] * torch.tensor([3.0, 0.0])  # each box suppresses the next
    boxes = torch.cat([torch.cat([corner, corner + side], -1), torch.cat([step, step + 10], -1)])  # (2, num, 4)
    groups, valid, expected = torch.zeros(2, num).long(), torch.ones(2, num).bool(), torch.zeros(2, num).bool()
    found = keep_boxes(boxes.to(device), groups.to(device), valid.to(device), 0.5).cpu()
    for image, keep in zip(boxes, expected, strict=True):
        keep[operators().nms(image, torch.linspace(1, 0, num), 0.5)] = True
    wrong = int((found != expected).sum())
    return [f"{wrong} of {2 * num} boxes are wrong"] if wrong else []
