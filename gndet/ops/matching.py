"""Matching candidates to ground truth and sampling them. B images, M ground-truth slots, N candidates."""

import torch
from torch import Tensor

_FIRST = 1 << 60  # above every rank of ops.noise.ranks: lifts the chosen positives over the negatives


def match(
    iou: Tensor, gt_valid: Tensor, candidate_valid: Tensor, low: float, high: float, *, keep_best: bool
) -> tuple[Tensor, Tensor]:
    """Match each candidate to the ground truth it overlaps most (Ren et al. 2015, 3.1.2).

    iou (B, M, N); gt_valid (B, M); candidate_valid (B, N).  A candidate with IoU >= high is positive, with IoU < low
    negative; keep_best also makes those positive that overlap some object more than all others do.
    Returns matched (B, N) int64 in [0, M) and label (B, N) int64: 1 positive, 0 negative, -1 neither.
    """
    iou = torch.where(gt_valid[:, :, None] & candidate_valid[:, None, :], iou, -1.0)
    best, matched = iou.max(dim=1)  # (B, N)
    label = torch.where(best >= high, 1, torch.where(best < low, 0, -1))
    if keep_best:
        best_of_object = iou.amax(dim=2, keepdim=True)  # (B, M, 1)
        label = torch.where(((iou == best_of_object) & (best_of_object > 0)).any(dim=1), 1, label)
    return matched, torch.where(candidate_valid, label, -1)


def best(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The num highest scores of each image, or all, by falling score; equal ones in the order they come in.

    Which of equal scores topk returns depends on how many there are, hence on the padding.  scores (B, N).
    Returns values and index (B, min(num, N)).
    """
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :num], index[:, :num]


def sample_balanced(label: Tensor, ranks: Tensor, num: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample num candidates an image, at most num * positive_fraction of them positive.

    label (B, N) in {1, 0, -1}; ranks (B, N) int64 of `ops.noise.ranks`: the random order of the candidates.
    Returns index (B, R) int64, positive (B, R), valid (B, R) with R = min(num, N); positives come first.
    """
    max_positive = min(max(int(num * positive_fraction), 1), label.shape[1])
    order = torch.where(label == 1, ranks, -1)
    cut = order.topk(max_positive, dim=1).values[:, -1:]  # (B, 1)
    chosen = (label == 1) & (order >= cut)
    order = torch.where(chosen, ranks + _FIRST, torch.where(label == 0, ranks, -1))
    order, index = order.topk(min(num, label.shape[1]), dim=1)
    return index, order >= _FIRST, order >= 0
