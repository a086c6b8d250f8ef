"""Match candidates to ground truth, sample them, and suppress those that overlap better ones (NMS).

B images, M ground-truth slots, N candidates.  NMS is a custom operator, so that a compiled graph can contain it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gndet.ops import matching_kernels, nms_kernels
from gndet.ops.boxes import pairwise_iou
from gndet.ops.noise import Stream
from gndet.ops.torchvision_ops import operators

MAX_PAIRS = 4_500_000  # of objects and candidates, held at once: 16 slots by the 268,569 anchors of 800 x 1344 pixels
RANKS = 2.0**59  # `ranks` are below it
_FIRST = 1 << 60  # above every rank: lifts the chosen positives over the negatives
_MASK32 = 0xFFFFFFFF


def match(
    objects: Tensor, gt_valid: Tensor, candidates: Tensor, candidate_valid: Tensor, low: float, high: float, *,
    keep_best: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Match each candidate to the ground truth it overlaps most (Ren et al. 2015, 3.1.2).

    objects (B, M, 4); gt_valid (B, M); candidates (B or 1, N, 4); candidate_valid (B, N).  A candidate with IoU >= high
    is positive, with IoU < low negative.  keep_best: the candidates that overlap an object most are positive too.
    Returns matched (B, N) int64 in [0, M), the first slot among equals, and label (B, N) int64: 1 positive, 0 negative,
    -1 neither.  The slots are compared a few at a time, which bounds the memory and does not affect the result.
    """
    if matching_kernels.usable(torch.float32, objects, candidates):
        given = objects, gt_valid, candidates, candidate_valid
        return matching_kernels.match(*given, low, high, keep_best=keep_best)
    slots = objects.shape[1]
    num = -(-slots // max(-(-slots * candidate_valid.numel() // MAX_PAIRS), 1))  # slots at a time
    best, matched, is_best = _overlaps(objects[:, :num], gt_valid[:, :num], candidates, candidate_valid, keep_best)
    for start in range(num, slots, num):
        part = slice(start, start + num)
        here = _overlaps(objects[:, part], gt_valid[:, part], candidates, candidate_valid, keep_best)
        better = (here[0] > best) | (here[0].isnan() & ~best.isnan())  # as Tensor.max: the first NaN wins
        best, matched = torch.where(better, here[0], best), torch.where(better, here[1] + start, matched)
        is_best = is_best | here[2]
    label = torch.where(best >= high, 1, torch.where(best < low, 0, -1))
    if keep_best:
        label = torch.where(is_best, 1, label)
    return matched, torch.where(candidate_valid, label, -1)


def _overlaps(
    objects: Tensor, gt_valid: Tensor, candidates: Tensor, candidate_valid: Tensor, keep_best: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each candidate's highest IoU with an object, its slot, and whether no candidate overlaps an object more.

    Arguments as in `match`.  Returns (B, N) float32, int64 and bool; without keep_best the last is all False.
    """
    iou = pairwise_iou(objects, candidates)  # (B, M, N)
    iou = torch.where(gt_valid[:, :, None] & candidate_valid[:, None, :], iou, -1.0)
    best, matched = iou.max(dim=1)
    if not keep_best:
        return best, matched, torch.zeros_like(candidate_valid)
    best_of_object = iou.amax(dim=2, keepdim=True)  # (B, M, 1)
    return best, matched, ((iou == best_of_object) & (best_of_object > 0)).any(dim=1)


def best(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the num highest scores of each image, or all of them, in descending order; ties keep their order.

    topk would break ties by the number of candidates, and so by the padding.  scores (B, N).
    Returns values and index (B, min(num, N)).
    """
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :num], index[:, :num]


def ranks(keys: Tensor, stream: Stream, ids: Tensor) -> Tensor:
    """Draw an integer in [0, 2**59) for each candidate: a uniformly random order without ties within an image.

    keys (B,) int64; ids (N,) or (B, N) int64 in [0, 2**31) identify each candidate independently of the canvas.
    Returns (B, N) int64: a function of the image's key, the stream and the candidate's id alone.
    """
    if matching_kernels.usable(torch.int64, keys, ids):
        return matching_kernels.ranks(keys, stream, ids)
    low, high = (keys & _MASK32)[:, None], ((keys >> 32) & _MASK32)[:, None]  # (B, 1)
    value = _mix((ids * 0x9E3779B1 + int(stream)) & _MASK32)  # (N,) or (B, N)
    value = _mix(_mix(value ^ low) ^ high)  # (B, N)
    return (value >> 4 << 31) | ids


def kept_by_key(keys: Tensor, stream: Stream, ids: Tensor, share: float) -> Tensor:
    """Draw what is kept when a share of the candidates is dropped, by the images' keys alone.

    Arguments as for `ranks`; share in [0, 1).  Returns (B, N) bool.
    """
    return ranks(keys, stream, ids) >= share * RANKS


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64 (MurmurHash3; overflow keeps the low bits right)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def sample_balanced(label: Tensor, ranks: Tensor, num: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample num candidates per image, at most num * positive_fraction of them positive.

    label (B, N) in {1, 0, -1}; ranks (B, N) int64 of `ranks`: the random order of the candidates.
    Returns index (B, R) int64, positive (B, R), valid (B, R) with R = min(num, N); positives come first.
    """
    max_positive = min(max(int(num * positive_fraction), 1), label.shape[1])
    order = torch.where(label == 1, ranks, -1)
    cut = order.topk(max_positive, dim=1).values[:, -1:]  # (B, 1)
    chosen = (label == 1) & (order >= cut)
    order = torch.where(chosen, ranks + _FIRST, torch.where(label == 0, ranks, -1))
    order, index = order.topk(min(num, label.shape[1]), dim=1)
    return index, order >= _FIRST, order >= 0


def _nms_keep(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Keep the boxes that no better box of their group overlaps by more than threshold.

    boxes (B, N, 4) xyxy pixels, in descending order of score; scores (B, N); groups (B, N) int64, e.g. classes;
    valid (B, N).  Returns keep (B, N) bool.  An image's result does not depend on the other images.  A GPU on which the
    kernels do not work waits for torchvision's operator, group by group.
    """
    if nms_kernels.usable(boxes):
        return nms_kernels.keep_boxes(boxes, groups, valid, threshold)
    keep = torch.zeros_like(valid)
    for image in range(boxes.shape[0]):
        for group in groups[image][valid[image]].unique():
            rows = ((groups[image] == group) & valid[image]).nonzero()[:, 0]
            kept = operators().nms(boxes[image, rows], scores[image, rows], threshold)
            keep[image, rows[kept]] = True
    return keep


# not by custom_op: its first call imports torch._dynamo, which takes longer than importing torch
torch.library.define("gndet::nms_keep", torch.library.infer_schema(_nms_keep, mutates_args=()))
torch.library.impl("gndet::nms_keep", ("cpu", "cuda"), _nms_keep)
nms_keep: Callable[..., Tensor] = torch.ops.gndet.nms_keep


@torch.library.register_fake("gndet::nms_keep")
def _(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(valid)
