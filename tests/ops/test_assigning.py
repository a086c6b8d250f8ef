"""Assignment of anchors equals the papers' algorithms, written image by image, and does not see the padding."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gndet.modeling.anchors import level_anchors
from gndet.ops.assigning import assign_atss, assign_centers, centerness

STRIDES = (8, 16, 32)
CANVAS = (96, 128)


def levels(canvas: tuple[int, int], kinds: int = 1) -> list[Tensor]:
    """Return square anchors of 8 strides, centered in their cells, of several sizes per cell."""
    result = []
    for stride in STRIDES:
        half = torch.tensor([stride * 4.0 * 1.3**kind for kind in range(kinds)])[:, None]
        cell = torch.cat([-half, -half, half, half], dim=1) + stride / 2
        height, width = (-(-side // stride) for side in canvas)
        result.append(level_anchors(cell, (stride, stride), height, width))
    return result


def inside(sizes: Tensor, canvas: tuple[int, int], kinds: int = 1) -> list[Tensor]:
    result = []
    for stride in STRIDES:
        height, width = (-(-side // stride) for side in canvas)
        rows = torch.arange(height)[:, None] * stride < sizes[:, 0, None, None]
        columns = torch.arange(width) * stride < sizes[:, 1, None, None]
        result.append((rows & columns).flatten(1).repeat_interleave(kinds, 1))
    return result


def objects(count: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    corner = torch.rand(count, 2, generator=generator) * limit * 0.8
    far = torch.minimum(corner + 4 + torch.rand(count, 2, generator=generator) * 70, limit)
    return torch.cat([corner, far], dim=1)


def by_algorithm_1(boxes: Tensor, anchors: list[Tensor], valid: list[Tensor], num: int) -> list[int]:
    """Zhang et al. 2020, algorithm 1, for one image, object by object.  Returns the object of each anchor, or -1."""
    everywhere, usable = torch.cat(anchors), torch.cat(valid)
    middle = (everywhere[:, :2] + everywhere[:, 2:]) / 2
    owner, highest = [-1] * len(everywhere), [-1.0] * len(everywhere)
    for number, box in enumerate(boxes):
        candidates, first = [], 0
        for level in anchors:
            places = [i for i in range(first, first + len(level)) if usable[i]]
            distance = {i: float((middle[i] - (box[:2] + box[2:]) / 2).square().sum()) for i in places}
            candidates += sorted(places, key=lambda i: (distance[i], i))[:num]
            first += len(level)
        ious = box_iou(box[None], everywhere[candidates])[0].double()
        threshold = ious.mean() + (ious.std() if len(ious) > 1 else 0)
        for i, iou in zip(candidates, ious.tolist(), strict=True):
            x, y = middle[i]
            deep = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= threshold and deep and iou > highest[i]:
                owner[i], highest[i] = number, iou
    return owner


@pytest.mark.parametrize("kinds", [1, 3])
def test_atss_is_the_paper_s_algorithm(kinds: int) -> None:
    sizes = torch.tensor([[96, 128], [60, 128], [33, 20], [96, 101]])
    counts, anchors, valid = (6, 3, 1, 0), levels(CANVAS, kinds), inside(sizes, CANVAS, kinds)
    boxes, exists = torch.full((4, 6, 4), torch.nan), torch.zeros(4, 6, dtype=torch.bool)
    for i, count in enumerate(counts):
        boxes[i, :count], exists[i, :count] = objects(count, tuple(sizes[i].tolist()), seed=i), True
    matched, positive = assign_atss(boxes, exists, anchors, valid, 9 * kinds)
    found = torch.where(positive, matched, -1)
    for i, count in enumerate(counts):
        expected = by_algorithm_1(boxes[i, :count], anchors, [cells[i] for cells in valid], 9 * kinds)
        assert found[i].tolist() == expected
        assert len({owner for owner in expected if owner >= 0}) >= count // 2


def on_canvas(canvas: tuple[int, int], assign: str) -> set[tuple[int, ...]]:
    """Return the positives of a picture of 40 x 72 on a canvas, as (level, row, column, object)."""
    anchors, valid = levels(canvas), inside(torch.tensor([[40, 72]]), canvas)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [16, 0, 72, 40], [0, 0, 9, 9], [24, 8, 56, 40]]])  # symmetric: many ties
    given = boxes, torch.ones(1, 4, dtype=torch.bool), anchors, valid
    matched, positive = assign_atss(*given, 9) if assign == "atss" else assign_centers(*given, STRIDES, 1.5)
    result, first = set(), 0
    for number, (level, stride) in enumerate(zip(anchors, STRIDES, strict=True)):
        width = -(-canvas[1] // stride)
        part = slice(first, first + len(level))
        for place in positive[0, part].nonzero()[:, 0].tolist():
            result.add((number, place // width, place % width, int(matched[0, part][place])))
        first += len(level)
    return result


@pytest.mark.parametrize("assign", ["atss", "center"])
def test_an_image_s_positives_do_not_depend_on_its_canvas(assign: str) -> None:
    alone = on_canvas((40, 72), assign)
    assert len({owner for *_, owner in alone}) >= 3
    assert alone == on_canvas((96, 128), assign) == on_canvas((40, 300), assign) == on_canvas((500, 72), assign)


def test_center_sampling_by_hand() -> None:
    anchors, valid = levels(CANVAS), inside(torch.tensor([CANVAS]), CANVAS)
    boxes = torch.tensor([[[20.0, 20, 60, 60], [36, 36, 48, 48], [0, 0, 128, 96]]])
    matched, positive = assign_centers(boxes, torch.ones(1, 3, dtype=torch.bool), anchors, valid, STRIDES, 1.5)
    fine = torch.where(positive, matched, -1)[0, : 12 * 16].view(12, 16)
    # points at 4, 12, ...: less than 12 px from 40 lie 36 and 44; the smaller object takes 44, where both meet, and has
    # 36 on its side, not inside
    expected = torch.full((12, 16), -1)
    expected[4:6, 4:6] = 0
    expected[5, 5] = 1
    assert torch.equal(fine, expected)
    coarse = torch.where(positive, matched, -1)[0, 12 * 16 + 6 * 8 :].view(3, 4)  # largest side distance above 128
    assert (coarse == -1).all()  # of the largest object, at stride 32: 64 + 16 = 80 < 128
    middle = torch.where(positive, matched, -1)[0, 12 * 16 : 12 * 16 + 6 * 8]
    assert set(middle.tolist()) == {-1, 2}  # distances between 64 and 128


def test_centerness_by_hand() -> None:
    box = torch.tensor([0.0, 0, 40, 20])
    points = torch.tensor([[20.0, 10, 20, 10], [10, 10, 10, 10], [10, 5, 10, 5], [0, 10, 0, 10], [50, 10, 50, 10]])
    expected = torch.tensor([1, (1 / 3) ** 0.5, 1 / 3, 0, 0])
    torch.testing.assert_close(centerness(box, points), expected)
