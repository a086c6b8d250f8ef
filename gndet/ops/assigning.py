"""Assign objects to the anchors of a dense detector, without a look at what it predicts.

B images, M ground-truth slots, N anchors of all levels, L levels, C candidates of an object.

Batch independence: an anchor in the padding (`inside` is false) is never a candidate, and equal distances, overlaps and
areas are decided by the anchor's and the object's place, so an image's positives do not depend on its batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gndet.ops.boxes import centers, paired_iou
from gndet.ops.matching import best

MIN_DEPTH = 0.01  # pixels by which the center of a positive lies inside its object (ATSS's authors' code)


def assign_atss(
    objects: Tensor, gt_valid: Tensor, anchors: Sequence[Tensor], inside: Sequence[Tensor], num: int
) -> tuple[Tensor, Tensor]:
    """Assign by adaptive training sample selection (Zhang et al. 2020, algorithm 1).

    objects (B, M, 4); gt_valid (B, M); anchors L x (N_l, 4); inside L x (B, N_l) bool.  On each level, the num anchors
    whose centers are nearest to an object's are its candidates; a level with fewer gives fewer.  Candidates are
    positive if their IoU is at least mean + std of the candidates' and their center lies in the object.  An anchor with
    several objects takes the one that it overlaps most.
    Returns matched (B, N) int64 in [0, M) and positive (B, N) bool.
    """
    index, valid, first = [], [], 0
    middle = centers(objects)[:, :, None]  # (B, M, 1, 2)
    for level, cells in zip(anchors, inside, strict=True):
        distance = (middle - centers(level)).square().sum(-1)  # (B, M, N_l)
        usable = cells[:, None] & gt_valid[:, :, None]
        nearness, place = best(torch.where(usable, -distance, -torch.inf).flatten(0, 1), num)
        index.append(first + place.unflatten(0, objects.shape[:2]))
        valid.append(nearness.unflatten(0, objects.shape[:2]) > -torch.inf)
        first += len(level)
    candidate, real = torch.cat(index, 2), torch.cat(valid, 2)  # (B, M, C)
    boxes = torch.cat(list(anchors))[candidate]  # (B, M, C, 4)
    # in float64, in which the sums do not depend on how many candidates the canvas has beyond the picture
    iou = torch.where(real, paired_iou(objects[:, :, None], boxes), 0.0).double()
    count = real.sum(2, keepdim=True)
    mean = iou.sum(2, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(real, iou - mean, 0.0).square().sum(2, keepdim=True)
    threshold = mean + (deviation / (count - 1).clamp(min=1)).sqrt()  # the unbiased std, as in the authors' code
    positive = real & (iou >= threshold) & (_depth(centers(boxes), objects[:, :, None]) > MIN_DEPTH)
    overlap = objects.new_full((*gt_valid.shape, first), -1.0)
    overlap = overlap.scatter(2, candidate, torch.where(positive, iou, -1.0).to(overlap.dtype))  # (B, M, N)
    highest, matched = overlap.max(dim=1)
    return matched, highest >= 0


def assign_centers(
    objects: Tensor, gt_valid: Tensor, anchors: Sequence[Tensor], inside: Sequence[Tensor], strides: Sequence[int],
    radius: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Assign the points near an object's center on the level of its size (Tian et al. 2019, 3.2; center sampling 2020).

    Arguments and result as in `assign_atss`; strides: of the levels.  A point is positive if it lies in the object, at
    most radius strides from its center along each axis, and its largest distance to the object's sides is between 4 and
    8 strides (any smaller one on the finest level, any larger one on the coarsest).  A point with several objects takes
    the smallest.
    """
    middle, area = centers(objects)[:, :, None], (objects[..., 2:] - objects[..., :2]).prod(-1)  # (B, M, 1, 2), (B, M)
    parts = []
    for number, (level, cells, stride) in enumerate(zip(anchors, inside, strides, strict=True)):
        point = centers(level)[None, None]  # (1, 1, N_l, 2)
        sides = _sides(point, objects[:, :, None])
        near = ((point - middle).abs().amax(-1) < radius * stride) & (sides.amin(-1) > 0)
        reach = sides.amax(-1)  # (B, M, N_l)
        least = 0 if number == 0 else 4 * stride
        most = torch.inf if number == len(strides) - 1 else 8 * stride
        taken = near & (reach > least) & (reach < most) & gt_valid[:, :, None] & cells[:, None]
        parts.append(torch.where(taken, area[:, :, None], torch.inf))
    smallest, matched = torch.cat(parts, 2).min(dim=1)  # (B, N)
    return matched, smallest < torch.inf


def centerness(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return how central the anchors' centers lie in boxes (Tian et al. 2019, eq. 3): 1 in the middle, 0 at a side.

    boxes, anchors (..., 4), broadcastable; 0 for a center outside its box.
    """
    sides = _sides(centers(anchors), boxes).clamp(min=0)  # left, top, right, bottom
    low, high = torch.minimum(sides[..., :2], sides[..., 2:]), torch.maximum(sides[..., :2], sides[..., 2:])
    return (low / high.clamp(min=1e-6)).prod(-1).sqrt()


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the distances (..., 4) from points (..., 2) to the left, top, right and bottom of boxes (..., 4)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def _depth(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the distance (...) from points to the nearest side of boxes; negative outside."""
    return _sides(points, boxes).amin(-1)
