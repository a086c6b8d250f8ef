"""Compare boxes, matching, sampling, NMS, RoIAlign and noise with torchvision and with cases worked by hand."""

import pytest
import torch
import torchvision

from gndet.ops import matching, torchvision_ops
from gndet.ops.boxes import clip_boxes, decode, encode, paired_iou, pairwise_iou
from gndet.ops.losses import focal_loss, giou_loss, mask_targets, mean_per_image, smooth_l1
from gndet.ops.matching import best, match, nms_keep, ranks, sample_balanced
from gndet.ops.noise import Stream, hash_ints, uniform
from gndet.ops.roi_align import Pyramid, extend_edges, pyramid_level, roi_align_pyramid
from gndet.training.memory import TensorBytes

STRIDES = (4, 8, 16, 32)


def random_boxes(*shape: int, side: float = 100.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * side
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * side / 2 + 1], dim=-1)


def test_iou_equals_torchvision() -> None:
    a, b = random_boxes(2, 7), random_boxes(2, 30, seed=1)
    expected = torch.stack([torchvision.ops.box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_the_iou_of_pairs_is_that_of_all_pairs() -> None:
    a, b = random_boxes(2, 7), random_boxes(2, 30, seed=1)
    torch.testing.assert_close(paired_iou(a[:, :, None], b[:, None]), pairwise_iou(a, b))
    assert paired_iou(torch.zeros(4), torch.zeros(4)) == 0


def test_focal_loss_and_giou_loss_with_their_gradients_equal_torchvision_s() -> None:
    logits = (4 * torch.randn(3, 50, dtype=torch.float64)).requires_grad_()
    targets = torch.rand(3, 50) < 0.3
    boxes = random_boxes(2, 60).double().requires_grad_()  # some pairs do not overlap
    objects = random_boxes(2, 60, seed=1).double()
    for ours, theirs, x in (
        (focal_loss(logits, targets, 0.25, 2.0), torchvision.ops.sigmoid_focal_loss(logits, targets.double()), logits),
        (giou_loss(boxes, objects), torchvision.ops.generalized_box_iou_loss(boxes, objects), boxes),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def test_focal_loss_stays_finite_for_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([True, True, False, False]), 0.25, 2.0)
    torch.testing.assert_close(loss, torch.tensor([2500.0, 0, 0, 7500]))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_empty_and_inverted_boxes_overlap_nothing() -> None:
    odd = torch.tensor([[[5.0, 5, 5, 5], [50, 50, 10, 10]]])
    assert pairwise_iou(odd, random_boxes(1, 20)).abs().max() == 0


def test_clip_limits_each_image_to_its_own_size() -> None:
    boxes = torch.tensor([[[-5.0, 2, 300, 300]]]).repeat(2, 1, 1)
    clipped = clip_boxes(boxes, torch.tensor([[100, 200], [50, 60]]))
    assert clipped[:, 0].tolist() == [[0, 2, 200, 100], [0, 2, 60, 50]]


def test_decode_inverts_encode() -> None:
    boxes, anchors = random_boxes(3, 9), random_boxes(3, 9, seed=1)
    weights = (10.0, 5.0)
    torch.testing.assert_close(decode(encode(boxes, anchors, weights), anchors, weights), boxes, rtol=0, atol=1e-3)


def test_match_by_hand() -> None:
    # two objects and a padded one; candidates: exact hit, half overlap, nothing, best of the second object
    objects = torch.tensor([[[0.0, 0, 10, 10], [50, 0, 60, 10], [0, 0, 10, 5]]])
    candidates = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [90, 0, 99, 9], [50, 0, 60, 2]]])
    gt_valid, everywhere = torch.tensor([[True, True, False]]), torch.ones(1, 4, dtype=torch.bool)
    matched, label = match(objects, gt_valid, candidates, everywhere, 0.3, 0.7, keep_best=True)
    assert label.tolist() == [[1, -1, 0, 1]]
    assert matched[0, [0, 1, 3]].tolist() == [0, 0, 1]
    assert match(objects, gt_valid, candidates, everywhere, 0.3, 0.7, keep_best=False)[1].tolist() == [[1, -1, 0, 0]]


def test_candidates_in_the_padding_are_neither_positive_nor_negative() -> None:
    objects, candidates = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[[0.0, 0, 10, 9], [0, 0, 10, 1]]])
    inside = torch.tensor([[False, True]])
    _, label = match(objects, torch.ones(1, 1, dtype=torch.bool), candidates, inside, 0.3, 0.7, keep_best=True)
    assert label.tolist() == [[-1, 1]]


def match_densely(
    objects: torch.Tensor, gt_valid: torch.Tensor, candidates: torch.Tensor, candidate_valid: torch.Tensor,
    low: float, high: float, *, keep_best: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Match with all overlaps (B, M, N) at once."""
    corner = torch.maximum(objects[:, :, None, :2], candidates[:, None, :, :2])
    overlap = (torch.minimum(objects[:, :, None, 2:], candidates[:, None, :, 2:]) - corner).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (objects, candidates)]
    iou = overlap / (areas[0][:, :, None] + areas[1][:, None] - overlap).clamp(min=1e-6)
    iou = torch.where(gt_valid[:, :, None] & candidate_valid[:, None], iou, -1.0)
    best_iou, matched = iou.max(1)
    label = torch.where(best_iou >= high, 1, torch.where(best_iou < low, 0, -1))
    if keep_best:
        most = iou.amax(2, keepdim=True)
        label = torch.where(((iou == most) & (most > 0)).any(1), 1, label)
    return matched, torch.where(candidate_valid, label, -1)


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("slots_at_a_time", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("seed", range(4))
def test_matching_slots_by_parts_equals_matching_all_at_once(
    seed: int, slots_at_a_time: int, keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if overlaps are equal, if objects are equal or missing, and if boxes are empty or hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    objects, candidates = (
        random_boxes(3, 11, side=20, seed=seed),
        random_boxes(1 + 2 * (seed % 2), 200, side=20, seed=9),
    )
    objects, candidates = (boxes.div(4).round().mul(4) for boxes in (objects, candidates))  # many overlap equally
    objects[:, 6:9], objects[:, 9, 2:] = objects[:, :3], 0.0
    gt_valid, inside = (torch.rand(3, num, generator=generator) < 0.8 for num in (11, 200))
    gt_valid[1] = False
    if seed == 3:
        objects[0, [2, 7]] = candidates[0, 5] = float("nan")
    monkeypatch.setattr(matching, "MAX_PAIRS", 3 * 200 * slots_at_a_time)
    found = match(objects, gt_valid, candidates, inside, 0.3, 0.7, keep_best=keep_best)
    expected = match_densely(objects, gt_valid, candidates, inside, 0.3, 0.7, keep_best=keep_best)
    assert all(map(torch.equal, found, expected))


def test_the_memory_of_matching_does_not_grow_with_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_PAIRS", 8 * 5000)
    peaks = []
    for slots in (8, 512):
        given = (random_boxes(1, slots), torch.ones(1, slots).bool(), random_boxes(1, 5000), torch.ones(1, 5000).bool())
        with TensorBytes(10**9) as counted:
            match(*given, 0.3, 0.7, keep_best=True)
        peaks.append(counted.peak)
    assert peaks[1] < 1.5 * peaks[0] and peaks[0] < 3.5 * 8 * 5000 * 4  # bytes of an IoU of every pair: three at once


@pytest.mark.parametrize(("num_positive", "kept"), [(10, 10), (400, 128), (0, 0)])
def test_sampling_takes_positives_first_and_at_most_their_share(num_positive: int, kept: int) -> None:
    label = torch.zeros(1, 1000, dtype=torch.long)
    label[0, 50 : 50 + num_positive] = 1
    order = ranks(torch.tensor([123]), Stream.REGIONS, torch.arange(1000))
    index, positive, valid = sample_balanced(label, order, 512, 0.25)
    assert positive.sum() == kept and valid.all()
    assert positive[0, :kept].all()
    assert (label[0, index[0]] == positive[0].long()).all()
    assert len(index[0].unique()) == 512


def test_sampling_fewer_candidates_than_wanted_marks_the_rest_invalid() -> None:
    label = torch.tensor([[1, -1, 0, -1]])
    order = ranks(torch.tensor([5]), Stream.REGIONS, torch.arange(4))
    index, positive, valid = sample_balanced(label, order, 512, 0.25)
    assert index.shape == (1, 4)
    assert positive.tolist() == [[True, False, False, False]]
    assert valid.tolist() == [[True, True, False, False]]


def test_noise_is_uniform_keyed_and_independent_of_the_other_candidates() -> None:
    keys = torch.tensor([hash_ints(0, 1, 2), hash_ints(0, 1, 3)])
    ids = torch.arange(100_000)
    drawn = ranks(keys, Stream.ANCHORS, ids)
    assert (drawn >= 0).all() and len(drawn[0].unique()) == len(ids)
    share = drawn.double() / 2**59
    assert abs(share.mean() - 0.5) < 0.005 and abs(share.std() - 12**-0.5) < 0.005
    assert abs(torch.corrcoef(share)[0, 1]) < 0.02  # two images
    assert abs(torch.corrcoef(torch.stack([share[0, :-1], share[0, 1:]]))[0, 1]) < 0.02  # neighbors
    other = ranks(keys[:1], Stream.REGIONS, ids)
    assert abs(torch.corrcoef(torch.stack([share[0], other[0].double()]))[0, 1]) < 0.02  # two uses of one key
    subset = torch.tensor([7, 99_999, 3])
    assert torch.equal(ranks(keys[1:], Stream.ANCHORS, subset)[0], drawn[1, subset])


def test_noise_is_integer_arithmetic_with_equal_results_on_every_device() -> None:
    """Compare with Python's unbounded integers: no overflow affects a result, so a GPU draws the same numbers."""

    def mix(x: int) -> int:  # MurmurHash3's finalizer for 32 bits
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    keys, ids = [0, 1, hash_ints(3, 1, 4), 2**63 - 1], [0, 1, 12_345, 2**31 - 1]
    drawn = ranks(torch.tensor(keys), Stream.REGIONS, torch.tensor(ids))
    by_image = ranks(torch.tensor(keys), Stream.REGIONS, torch.tensor([ids] * len(keys)))  # separate ids per image
    assert torch.equal(drawn, by_image)
    for row, key in zip(drawn.tolist(), keys, strict=True):
        for got, name in zip(row, ids, strict=True):
            value = mix((name * 0x9E3779B1 + Stream.REGIONS) % 2**32)
            value = mix(mix(value ^ key % 2**32) ^ key >> 32)
            assert got == (value >> 4 << 31 | name) < 2**59


def test_best_keeps_equal_scores_in_order_and_padding_out() -> None:
    scores = torch.tensor([[1.0, 3, 2, 3, 2, 3, -torch.inf]])
    values, index = best(scores, 4)
    assert values.tolist() == [[3, 3, 3, 2]] and index.tolist() == [[1, 3, 5, 2]]
    many = torch.cat([torch.zeros(1, 5000), torch.full((1, 9000), -torch.inf)], dim=1)
    for padded in (many[:, :5000], many):
        assert best(padded, 100)[1].tolist() == [list(range(100))]
    assert best(scores, 99)[0].shape == (1, 7)


def test_hash_is_sensitive_to_every_integer_and_their_order() -> None:
    values = {hash_ints(*v) for v in [(1, 2, 3), (3, 2, 1), (1, 2), (1, 2, 4), (0, 2, 3), (-1, 2, 3), (1, 2, 3, 0)]}
    assert len(values) == 7 and all(0 <= v < 2**63 for v in values)
    assert abs(sum(uniform(7, i) for i in range(10_000)) / 10_000 - 0.5) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_nms_equals_torchvision_group_by_group(seed: int) -> None:
    boxes = random_boxes(2, 400, seed=seed)
    scores = torch.linspace(1, 0, 400).repeat(2, 1)
    groups = torch.arange(400).repeat(2, 1) % 3
    valid = torch.ones(2, 400, dtype=torch.bool)
    valid[:, ::7] = False
    boxes[:, ::7] = float("nan")
    keep = nms_keep(boxes, scores, groups, valid, 0.5)
    for i in range(2):
        rows = valid[i].nonzero()[:, 0]
        kept = torchvision.ops.batched_nms(boxes[i, rows], scores[i, rows], groups[i, rows], 0.5)
        assert sorted(rows[kept].tolist()) == keep[i].nonzero()[:, 0].tolist()


def test_pyramid_levels_of_the_paper() -> None:
    sides = torch.tensor([16.0, 112, 224, 448, 2000])
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), sides, sides], dim=-1)
    assert pyramid_level(boxes, 4).tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_roi_align_equals_torchvision_forward_and_backward(ratio: int) -> None:
    """A fixed ratio is pooled as bags on a CPU; an adaptive ratio is pooled per level, as on a GPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, -(-250 // s), -(-190 // s)) for s in STRIDES]
    features = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    boxes, image = random_boxes(60, side=250), torch.arange(60) % 2
    boxes[:20] *= torch.linspace(0.01, 4, 20)[:, None]  # tiny ones, and some that reach far outside
    boxes[20] = 7.0  # empty
    boxes[21] = torch.tensor([-30.0, -9, 12, 14])
    pooled = roi_align_pyramid(Pyramid(features, STRIDES), boxes, image, 7, ratio)
    level = pyramid_level(boxes, 4)
    expected = torch.zeros_like(pooled)
    for i, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        rois = torch.cat([image[:, None].double(), boxes.double()], dim=1)[level == i]
        part = torchvision.ops.roi_align(feature, rois, 7, 1 / stride, ratio, aligned=True)
        expected = expected.index_put(((level == i).nonzero()[:, 0],), part)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((p * weights).sum(), features) for p in (pooled, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_no_regions(ratio: int) -> None:
    feature = torch.randn(1, 3, 8, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    pooled = roi_align_pyramid(Pyramid([feature], (4,)), torch.zeros(0, 4), none, 7, ratio)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()


def test_regions_keep_their_place_in_bf16() -> None:
    ramp = (torch.arange(300.0) - 250).expand(1, 1, 300, 300)  # the value is the column
    box = torch.tensor([[1001.0, 40.0, 1005.0, 48.0]])  # bf16 can represent 1000 and 1004, nothing between
    args = (box, torch.zeros(1, dtype=torch.long), 1, 2)
    exact, low = (roi_align_pyramid(Pyramid([x], (4,)), *args) for x in (ramp, ramp.bfloat16()))
    assert low.dtype == torch.bfloat16
    assert exact.item() == pytest.approx(1003 / 4 - 0.5 - 250)
    assert low.item() == pytest.approx(exact.item(), abs=0.01)


def test_roi_align_at_the_edge_sees_the_picture_not_the_padding() -> None:
    alone = torch.randn(1, 3, 9, 10)
    padded = torch.full((1, 3, 16, 16), 1e6)
    padded[:, :, :9, :10] = alone
    box = torch.tensor([[10.0, 12.0, 40.0, 36.0]])  # reaches the right and lower edge at stride 4
    args = (box, torch.zeros(1, dtype=torch.long), 7, 2)
    expected = roi_align_pyramid(Pyramid([alone], (4,)), *args)
    found = roi_align_pyramid(Pyramid([padded], (4,), [torch.tensor([[9, 10]])]), *args)
    torch.testing.assert_close(found, expected)


def test_repeated_edges_keep_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    roll = torch.Tensor.roll  # on a GPU it returns plain layout
    monkeypatch.setattr(torch.Tensor, "roll", lambda *args, **kwargs: roll(*args, **kwargs).contiguous())
    feature = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    extended = extend_edges(feature, torch.tensor([[8, 9], [5, 6]]))
    assert extended.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(extended[1, :, 5, :6], feature[1, :, 4, :6]) and torch.equal(extended[0], feature[0])


def test_regions_of_other_levels_lie_outside_where_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's operator adds the gradient of an empty box to the first cell, one atomic addition after another."""
    pooled_from: list[torch.Tensor] = []
    true = torchvision.ops.roi_align

    def spy(feature: torch.Tensor, rois: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        pooled_from.append(rois)
        return true(feature, rois, *args, **kwargs)

    monkeypatch.setattr(torchvision_ops, "roi_align", spy)
    features = [torch.randn(2, 3, 64 // s, 64 // s) for s in STRIDES]
    boxes, image = random_boxes(12, side=1600), torch.arange(12) % 2
    roi_align_pyramid(Pyramid(features, STRIDES), boxes, image, 7, 0)
    level = pyramid_level(boxes, 4)
    assert level.unique().numel() > 2
    for i, (rois, feature, stride) in enumerate(zip(pooled_from, features, STRIDES, strict=True)):
        assert torch.equal(rois[level == i], torch.cat([image[:, None], boxes], dim=1)[level == i])
        assert torch.equal(rois[:, 0], image.float())
        for aligned in (True, False):
            for ratio in (0, 2):
                leaf = feature.clone().requires_grad_()
                part = true(leaf, rois[level != i], 7, 1 / stride, ratio, aligned=aligned)
                (gradient,) = torch.autograd.grad(part.sum(), leaf)
                assert not part.any() and not gradient.any()


def test_nan_boxes_pool_to_something_finite() -> None:
    features = [torch.randn(1, 2, 8, 8)]
    out = roi_align_pyramid(
        Pyramid(features, (4,)), torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.long), 7, 2
    )
    assert out.isfinite().all()


def test_mask_target_of_the_box_itself_is_the_mask() -> None:
    mask = torch.zeros(1, 112, 112, dtype=torch.bool)
    mask[0, :56] = True  # the upper half
    box = torch.tensor([[10.0, 20.0, 66.0, 76.0]])
    target = mask_targets(mask, box, box, 28)
    assert target[0, :14].min() == 1 and target[0, 14:].max() == 0
    lower = mask_targets(mask, box, torch.tensor([[10.0, 48.0, 66.0, 76.0]]), 28)
    assert lower.max() == 0  # the object's lower half is empty, and so is the area beyond the box


def test_reductions_ignore_what_is_masked() -> None:
    values = torch.tensor([[1.0, float("nan")], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert mean_per_image(values, mask).tolist() == [1.0, 4.0]
    assert mean_per_image(values, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_smooth_l1_equals_torch() -> None:
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(
        smooth_l1(x, 0.5), torch.nn.functional.smooth_l1_loss(x, 0 * x, reduction="none", beta=0.5)
    )
    torch.testing.assert_close(smooth_l1(x, 0.0), x.abs())
