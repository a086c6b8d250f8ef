"""Matching and random ranks on NVIDIA GPUs: Triton kernels, equal to the last bit to the operators of `ops.matching`.

A program takes candidates of one image and walks the image's objects, so nothing of the size of all pairs is stored.
The IoU is computed as in `boxes.pairwise_iou`: the same formula in the same order, with IEEE division and without fused
multiply-add.  The highest IoU of each object is a maximum of integers, which no order of the programs changes.  An
image's result does not depend on the other images: each reads and writes its own rows.
B images, M ground-truth slots, N candidates.
"""

from functools import cache

import torch
from torch import Tensor

from gndet.ops.boxes import pairwise_iou
from gndet.ops.self_test import failure

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without GPU support
    triton = None

BLOCK = 128  # candidates of a program: one warp, so that no maximum over them needs a barrier
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # a fused multiply-add rounds once instead of twice
NUMBERS = 1024  # that a program draws

if triton is not None:

    @triton.jit
    def _side(low, high):
        """Return the length of a side, 0 if it is negative."""
        return tl.maximum(high - low, 0.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _candidates(candidates, candidate_valid, num, stride, block: tl.constexpr):
        """Return the program's image, its candidates' places, and which are valid; then their sides and areas."""
        image = (tl.program_id(0) // tl.cdiv(num, block)).to(tl.int64)
        place = tl.program_id(0) % tl.cdiv(num, block) * block + tl.arange(0, block)
        inside = place < num
        box = candidates + image * stride + 4 * place
        x0, y0 = tl.load(box, mask=inside, other=0.0), tl.load(box + 1, mask=inside, other=0.0)
        x1, y1 = tl.load(box + 2, mask=inside, other=0.0), tl.load(box + 3, mask=inside, other=0.0)
        valid = tl.load(candidate_valid + image * num + place, mask=inside, other=0) != 0
        return image, place, valid, x0, y0, x1, y1, _side(x0, x1) * _side(y0, y1)

    @triton.jit
    def _overlap(objects, gt_valid, slot, valid, x0, y0, x1, y1, area):
        """Return the IoU of candidates with the object in a slot, -1 if one of the two is not valid."""
        box = objects + 4 * slot
        left, top, right, bottom = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        nan: tl.constexpr = tl.PropagateNan.ALL
        width = _side(tl.maximum(left, x0, propagate_nan=nan), tl.minimum(right, x1, propagate_nan=nan))
        height = _side(tl.maximum(top, y0, propagate_nan=nan), tl.minimum(bottom, y1, propagate_nan=nan))
        intersection = width * height
        union = _side(left, right) * _side(top, bottom) + area - intersection
        iou = tl.div_rn(intersection, tl.maximum(union, 1e-6, propagate_nan=nan))
        return tl.where(valid & (tl.load(gt_valid + slot) != 0), iou, -1.0)

    @triton.jit(do_not_specialize=["num", "slots", "stride"])
    def _match_kernel(
        objects, gt_valid, candidates, candidate_valid, matched, label, highest, num, slots, stride, low, high,
        keep_best: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Write matched and label (B, N) int64; if keep_best, highest (B, M) too: each object's IoU as an integer.

        IoUs above 0 are ordered as their bits are, and NaN is above them all.
        """
        image, place, valid, x0, y0, x1, y1, area = _candidates(candidates, candidate_valid, num, stride, block)
        objects += image * slots * 4
        gt_valid += image * slots
        best = tl.full([block], -2.0, tl.float32)  # below every IoU
        found = tl.zeros([block], tl.int32)
        for slot in range(slots):
            iou = _overlap(objects, gt_valid, slot, valid, x0, y0, x1, y1, area)
            better = (iou > best) | ((iou != iou) & (best == best))  # as Tensor.max: the first NaN wins
            best, found = tl.where(better, iou, best), tl.where(better, slot, found)
            if keep_best:
                top = tl.max(tl.where(iou == iou, iou.to(tl.int32, bitcast=True), 0x7FC00000), 0)
                tl.atomic_max(highest + image * slots + slot, top, mask=top > 0, sem="relaxed")
        kind = tl.where(best >= high, 1, tl.where(best < low, 0, -1))
        tl.store(matched + image * num + place, found.to(tl.int64), mask=place < num)
        tl.store(label + image * num + place, tl.where(valid, kind, -1).to(tl.int64), mask=place < num)

    @triton.jit(do_not_specialize=["num", "slots", "stride"])
    def _keep_kernel(
        objects, gt_valid, candidates, candidate_valid, label, highest, num, slots, stride, block: tl.constexpr
    ):
        """Make the candidates positive that overlap an object most."""
        image, place, valid, x0, y0, x1, y1, area = _candidates(candidates, candidate_valid, num, stride, block)
        objects += image * slots * 4
        gt_valid += image * slots
        keep = place < 0
        for slot in range(slots):
            iou = _overlap(objects, gt_valid, slot, valid, x0, y0, x1, y1, area)
            top = tl.load(highest + image * slots + slot)
            keep = keep | ((iou.to(tl.int32, bitcast=True) == top) & (iou > 0))  # NaN is not above 0
        tl.store(label + image * num + place, tl.full([block], 1, tl.int64), mask=keep)

    @triton.jit
    def _mix(x):
        """Scramble uint32 (MurmurHash3)."""
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)

    @triton.jit(do_not_specialize=["stream", "num", "stride"])
    def _rank_kernel(keys, ids, drawn, stream, num, stride, block: tl.constexpr):
        """Write `matching.ranks`; products of uint32 keep the low 32 bits."""
        image = (tl.program_id(0) // tl.cdiv(num, block)).to(tl.int64)
        place = tl.program_id(0) % tl.cdiv(num, block) * block + tl.arange(0, block)
        key, name = tl.load(keys + image), tl.load(ids + image * stride + place, mask=place < num, other=0)
        value = _mix(name.to(tl.uint32) * 0x9E3779B1 + stream.to(tl.uint32))
        value = _mix(_mix(value ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
        tl.store(drawn + image * num + place, ((value >> 4).to(tl.int64) << 31) | name, mask=place < num)


def usable(dtype: torch.dtype, *given: Tensor) -> bool:
    """Return whether the kernels can take these tensors, which must be of this type, and work on their GPU.

    A compiler fuses torch's own operators.
    """
    if torch.compiler.is_compiling():
        return False
    return all(x.is_cuda and x.dtype == dtype for x in given) and not trouble(given[0].device)


def match(
    objects: Tensor, gt_valid: Tensor, candidates: Tensor, candidate_valid: Tensor, low: float, high: float, *,
    keep_best: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `matching.match` of float32 boxes."""
    (num_images, num), slots = candidate_valid.shape, objects.shape[1]
    matched, label = (torch.empty(num_images, num, dtype=torch.int64, device=objects.device) for _ in range(2))
    highest = torch.zeros(num_images, slots if keep_best else 0, dtype=torch.int32, device=objects.device)
    given = (
        objects.contiguous(), gt_valid.contiguous().view(torch.uint8), candidates.contiguous(),
        candidate_valid.contiguous().view(torch.uint8),
    )  # fmt: skip
    sizes = num, slots, 4 * num if len(candidates) > 1 else 0
    grid = (num_images * triton.cdiv(num, BLOCK),)
    with torch.cuda.device_of(objects):  # Triton launches on the current GPU
        _match_kernel[grid](
            *given, matched, label, highest, *sizes, float(low), float(high), keep_best=keep_best, block=BLOCK,
            **OPTIONS,
        )  # fmt: skip
        if keep_best:
            _keep_kernel[grid](*given, label, highest, *sizes, block=BLOCK, **OPTIONS)
    return matched, label


def ranks(keys: Tensor, stream: int, ids: Tensor) -> Tensor:
    """Compute `matching.ranks`."""
    num = ids.shape[-1]
    drawn = torch.empty(len(keys), num, dtype=torch.int64, device=keys.device)
    if drawn.numel():
        with torch.cuda.device_of(keys):
            _rank_kernel[len(keys) * triton.cdiv(num, NUMBERS),](
                keys.contiguous(), ids.contiguous(), drawn, int(stream), num, num if ids.numel() > num else 0,
                block=NUMBERS,
            )  # fmt: skip
    return drawn


@cache
def trouble(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, in words, or "".  Tests them once per process."""
    return failure(lambda: _compare(device))


def _compare(device: torch.device) -> list[str]:
    """Return a line for each kind of result that is wrong."""
    return [*_compare_matches(device), *_compare_ranks(device)]


def _compare_matches(device: torch.device) -> list[str]:
    """Return a line if matches differ from those of torch's operators on a CPU; many boxes overlap equally."""
    generator = torch.Generator().manual_seed(0)
    corner, side = torch.randint(0, 9, (2, 2, 300, 2), generator=generator).float().unbind()
    candidates = torch.cat([corner, corner + side], -1)
    objects, gt_valid = candidates[:, ::40], torch.tensor([[True] * 6 + [False] * 2, [False] * 8])
    valid = torch.rand(2, 300, generator=generator) < 0.9
    iou = torch.where(gt_valid[:, :, None] & valid[:, None], pairwise_iou(objects, candidates), -1.0)
    (best, matched), top = iou.max(1), iou.amax(2, keepdim=True)
    label = torch.where(best >= 0.7, 1, torch.where(best < 0.3, 0, -1))
    label = torch.where(((iou == top) & (top > 0)).any(1), 1, torch.where(valid, label, -1))
    truth, seen = (objects.to(device), gt_valid.to(device)), (candidates.to(device), valid.to(device))
    found = match(*truth, *seen, 0.3, 0.7, keep_best=True)
    wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(found, (matched, label), strict=True))
    return [f"{wrong} of {2 * iou.shape[2]} matches are wrong"] if wrong else []


def _compare_ranks(device: torch.device) -> list[str]:
    """Return a line if ranks differ from those of Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    keys, ids, expected = (0x123456789ABCDEF, 2**63 - 1), (0, 12345, 2**31 - 1), []
    for key in keys:
        values = (mix(mix(mix((name * 0x9E3779B1 + 5) % 2**32) ^ key % 2**32) ^ key >> 32) for name in ids)
        expected.append([value >> 4 << 31 | name for value, name in zip(values, ids, strict=True)])
    found = ranks(torch.tensor(keys, device=device), 5, torch.tensor(ids, device=device))
    return [] if found.tolist() == expected else ["random ranks are wrong"]
