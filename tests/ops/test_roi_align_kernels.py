"""The Triton kernels of RoIAlign against torchvision in float64, run by Triton's interpreter if there is no GPU."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_interpreter import answer_of

from gndet.ops import roi_align_kernels as kernels
from gndet.ops.roi_align import Alignment, Pyramid, extend_edges, pyramid_level, roi_align_pyramid

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRIDES = (4, 8, 32)
SIDES = ((9, 11), (5, 6), (1, 1))  # of the maps
BOXES = torch.tensor([
    [3.2, 5.1, 30.7, 24.4], [-9.0, -4.0, 12.0, 39.5], [20.3, 10.9, 61.0, 53.0], [20.0, 20.0, 20.4, 22.5],
    [-60.0, -70.0, -20.0, -30.0], [30.0, 25.0, 12.0, 14.0], [9.0, 9.0, 9.0, 9.0], [float("nan"), 1.0, 20.0, 30.0],
    [-70.0, -51.0, 90.0, 101.0], [-200.0, -211.0, 230.0, 201.0],
])  # fmt: skip
IMAGE = torch.arange(len(BOXES)) % 2


@pytest.fixture(autouse=True)
def kernels_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda maps: True)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_boxes(num: int, seed: int = 0) -> Tensor:
    corner, side = torch.rand(2, num, 2, generator=torch.Generator().manual_seed(seed)).unbind()
    return torch.cat([corner * 40 - 4, corner * 40 + side * 30], dim=1)


def pyramid(channels: int, dtype: torch.dtype) -> list[Tensor]:
    maps = [noise(2, channels, *sides, dtype=dtype) for sides in SIDES]
    return [x.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]


def by_torchvision(
    maps: Sequence[Tensor], boxes: Tensor, image: Tensor, size: int, ratio: int, alignment: Alignment, grad: Tensor
) -> list[Tensor]:
    """Return the regions pooled level by level, and the gradients of the maps, in float64."""
    exact = [x.detach().double().cpu().contiguous().requires_grad_() for x in maps]
    boxes = boxes.nan_to_num(0.0)
    level = pyramid_level(boxes, len(maps))
    last = torch.tensor([0.0, 0, 1, 1]) if alignment == "detectron" else 0.0
    rois = torch.cat([image[:, None], boxes - last], dim=1).double()
    pooled = torch.zeros(len(boxes), maps[0].shape[1], size, size, dtype=torch.float64)
    for i, (x, stride) in enumerate(zip(exact, STRIDES[: len(exact)], strict=True)):
        part = torchvision.ops.roi_align(x, rois[level == i], size, 1 / stride, ratio, aligned=alignment == "aligned")
        pooled = pooled.index_put(((level == i).nonzero()[:, 0],), part)
    return [pooled.detach(), *torch.autograd.grad(pooled, exact, grad.double().cpu())]


def by_kernels(
    maps: Sequence[Tensor], boxes: Tensor, image: Tensor, size: int, ratio: int, alignment: Alignment, grad: Tensor
) -> list[Tensor]:
    places = boxes.to(DEVICE), image.to(DEVICE)
    pooled = roi_align_pyramid(Pyramid(maps, STRIDES[: len(maps)]), *places, size, ratio, alignment)
    assert pooled.dtype == maps[0].dtype and pooled.is_contiguous(memory_format=torch.channels_last)
    return [pooled.detach(), *torch.autograd.grad(pooled, maps, grad.to(pooled))]


def largest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest exact value."""
    return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("alignment", "ratio"),
    [
        ("aligned", 0),
        ("aligned", 1),
        ("aligned", 2),
        ("aligned", 4),
        ("unaligned", 0),
        ("unaligned", 2),
        ("detectron", 2),
    ],
)
def test_they_pool_and_propagate_like_torchvision(alignment: Alignment, ratio: int) -> None:
    """Among the boxes are small, empty, inverted and NaN ones, and some that lie outside in part or wholly."""
    boxes, image = BOXES, IMAGE
    if ratio:  # a huge box has too many samples for torchvision otherwise
        boxes, image = torch.cat([BOXES, torch.tensor([[-1e6, -9e5, 1e6, 2e6]])]), torch.cat([IMAGE, IMAGE[:1]])
    arguments = (pyramid(3, torch.float64), boxes, image, 2, ratio, alignment, noise(len(boxes), 3, 2, 2))
    assert largest(by_kernels(*arguments), by_torchvision(*arguments)) < 1e-12


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize(
    ("dtype", "channels", "size", "ratio"),
    [
        (torch.float32, 1, 7, 2),
        (torch.bfloat16, 3, 2, 0),
        (torch.bfloat16, 32, 1, 2),
        (torch.float16, 40, 3, 1),
        (torch.bfloat16, 256, 1, 1),
        (torch.bfloat16, 5, 14, 1),
    ],
)
def test_every_type_is_summed_in_float32(dtype: torch.dtype, channels: int, size: int, ratio: int) -> None:
    chosen = [0, 8, 9] if size > 3 else range(len(BOXES))
    boxes, image = BOXES[list(chosen)], IMAGE[list(chosen)]
    grad = noise(len(boxes), channels, size, size, dtype=dtype, seed=1)
    arguments = (pyramid(channels, dtype), boxes, image, size, ratio, "aligned", grad)
    assert largest(by_kernels(*arguments), by_torchvision(*arguments)) < TOLERANCES[dtype]


def test_many_regions_are_listed_and_added_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LISTED", 16)
    monkeypatch.setattr(kernels, "REGIONS", 16)
    boxes, image = random_boxes(75), noise(75).gt(0).long()
    maps = pyramid(2, torch.float64)[:1]
    arguments = (maps, boxes, image, 1, 1, "aligned", noise(75, 2, 1, 1))
    assert largest(by_kernels(*arguments), by_torchvision(*arguments)) < 1e-12


def gradient(boxes: Tensor, image: Tensor, grad: Tensor) -> Tensor:
    places = boxes.to(DEVICE), pyramid_level(boxes, 1).to(DEVICE), image.to(DEVICE)
    (found,) = kernels.gradients(grad.to(DEVICE), *places, None, 2, [9], [11], [4], 2, True)
    return found


def test_the_gradient_of_an_image_is_the_same_to_the_bit_whatever_regions_the_others_have() -> None:
    own, other = random_boxes(40), random_boxes(70, seed=1)  # of images 0 and 1
    grad, other_grad = noise(40, 4, 3, 3), noise(70, 4, 3, 3, seed=2)
    alone = gradient(own, torch.zeros(40, dtype=torch.long), grad)
    assert alone[0].any() and not alone[1].any()
    assert torch.equal(gradient(own, torch.zeros(40, dtype=torch.long), grad), alone)
    for seed in (0, 1):
        image = torch.ones(110, dtype=torch.long)
        image[torch.randperm(110, generator=torch.Generator().manual_seed(seed))[:40]] = 0
        boxes, slopes = torch.empty(110, 4), torch.empty(110, 4, 3, 3)
        boxes[image == 0], boxes[image == 1] = own, other.roll(seed, 0)
        slopes[image == 0], slopes[image == 1] = grad, other_grad
        beside = gradient(boxes, image, slopes)
        assert beside[1].any()
        assert torch.equal(beside[0], alone[0])


def test_cells_that_no_region_touches_get_no_gradient() -> None:
    found = by_kernels(pyramid(3, torch.float32), BOXES[:1], IMAGE[:1], 2, 2, "aligned", noise(1, 3, 2, 2))[1:]
    assert found[0][0, :, :8, :9].any() and not found[0][0, :, 8:].any() and not found[0][0, :, :, 9:].any()
    assert not found[0][1].any() and not found[1].any() and not found[2].any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_no_regions_and_empty_maps_are_pooled(ratio: int) -> None:
    maps = pyramid(3, torch.float32)
    pooled, *found = by_kernels(maps, BOXES[:0], IMAGE[:0], 7, ratio, "aligned", noise(0, 3, 7, 7))
    assert pooled.shape == (0, 3, 7, 7)
    assert not any(x.any() for x in found)
    empty = torch.zeros(2, 3, 0, 5, device=DEVICE, requires_grad=True)
    pooled, found_empty = by_kernels([empty], BOXES[:3], IMAGE[:3], 2, ratio, "aligned", noise(3, 3, 2, 2))
    assert not pooled.any() and found_empty.shape == empty.shape
    assert (
        roi_align_pyramid(Pyramid([empty[:0]], (4,)), BOXES[:0].to(DEVICE), IMAGE[:0].to(DEVICE), 7, ratio).shape[0]
        == 0
    )


@pytest.mark.parametrize("boxes", [[[-3e38, -3e38, 3e38, 3e38]], [[-1e9, 0.0, 1e9, 30.0]], [[1e30, 1e30, 3e30, 3e30]]])
@pytest.mark.parametrize("ratio", [0, 2])
def test_a_box_of_any_size_ends_and_stays_finite(ratio: int, boxes: list[list[float]]) -> None:
    maps = pyramid(3, torch.float32)
    found = by_kernels(maps, torch.tensor(boxes), IMAGE[:1], 1, ratio, "aligned", torch.ones(1, 3, 1, 1))
    assert all(x.isfinite().all() for x in found)


def test_maps_in_another_layout_give_the_same() -> None:
    maps = pyramid(3, torch.float32)
    plain = [x.detach().contiguous().requires_grad_() for x in maps]
    assert not plain[0].is_contiguous(memory_format=torch.channels_last)
    rest = BOXES[:3], IMAGE[:3], 2, 1, "aligned", noise(3, 3, 2, 2)
    for a, b in zip(by_kernels(maps, *rest), by_kernels(plain, *rest), strict=True):
        assert torch.equal(a, b)


def pool(maps: Sequence[Tensor]) -> Tensor:
    return roi_align_pyramid(Pyramid(maps, STRIDES), BOXES[:3].to(DEVICE), IMAGE[:3].to(DEVICE), 2, 1)


def test_nothing_of_the_size_of_a_map_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    maps = pyramid(8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pool(maps)
    assert [x.numel() for x in kept] == [12, 3, 3]  # the boxes, their levels and images


def test_they_run_in_checkpoints_compiled_graphs_and_autocast() -> None:
    maps = pyramid(3, torch.bfloat16)
    grad = noise(3, 3, 2, 2, dtype=torch.bfloat16).to(DEVICE)
    expected = torch.autograd.grad(pool(maps), maps, grad)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        variants = [
            checkpoint(pool, maps, use_reentrant=False),
            torch.compile(pool, backend="aot_eager", fullgraph=True)(maps),
        ]
    for pooled in variants:
        assert pooled.dtype == torch.bfloat16
        for a, b in zip(torch.autograd.grad(pooled, maps, grad), expected, strict=True):
            assert torch.equal(a, b)


def test_the_operators_follow_the_rules_of_torch() -> None:
    places = BOXES[:2].to(DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE), IMAGE[:2].to(DEVICE)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    maps, grad = [pyramid(2, torch.float32)[0].detach()], noise(2, 2, 1, 1).to(DEVICE)
    torch.library.opcheck(torch.ops.gndet.roi_align.default, (maps, *places, None, [4], 1, 1, True), test_utils=checks)
    arguments = (grad, *places, None, 2, [9], [11], [4], 1, True)
    torch.library.opcheck(torch.ops.gndet.roi_align_backward.default, arguments, test_utils=checks)


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device, trouble = torch.device(DEVICE), kernels.trouble.__wrapped__
    monkeypatch.setattr(kernels, "SELF_TEST", ((torch.bfloat16, 2, 1, 1e-2),))
    assert trouble(device) == ""
    true, factors = kernels.gradients, iter([1.02, 1.02, 1.0, 1.01])
    monkeypatch.setattr(kernels, "gradients", lambda *a: scaled(true(*a), next(factors)))
    assert "the gradient of stride 4 is wrong in torch.bfloat16, sampling ratio 1" in trouble(device)
    assert trouble(device) == "the gradient is not the same twice in torch.bfloat16"
    monkeypatch.setattr(kernels, "pool", lambda *a: 1 / 0)
    assert trouble(device) == "ZeroDivisionError: division by zero"


def scaled(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [factor * tensor for tensor in tensors]


def test_a_compiled_graph_knows_the_result_of_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SELF_TEST", ((torch.float32, 1, 1, 1e-4),))
    monkeypatch.setattr(kernels, "trouble", kernels.trouble.__wrapped__)

    def choose(x: Tensor) -> Tensor:
        return x + 1 if kernels._working(x.device) else x

    assert torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(1, device=DEVICE)) == 1


@pytest.mark.slow
def test_they_compile_for_gpus_without_spills_or_atomics(tmp_path: Path) -> None:
    found = answer_of("ops/compile_roi_kernels.py", tmp_path)
    assert len(found) == 3 * 4 * 3 * 3
    for name, counts in found.items():
        assert counts["atomics"] == 0, name  # ptxas spills a little to fit one more program on a multiprocessor
        assert counts["spilled"] <= (0 if "16" in name.split()[1] else 64), name
        if "_list" not in name:
            assert counts["16-byte loads"] and counts["16-byte stores"], name
        assert ("_gradient" in name) == (counts["tensor core"] > 0), name


@pytest.mark.parametrize("ratio", [0, 2])
def test_the_edge_of_a_picture_is_repeated_while_pooling_as_if_it_had_been_before(ratio: int) -> None:
    sizes = [torch.tensor([[9, 11], [6, 5]]), torch.tensor([[5, 6], [3, 3]]), torch.tensor([[1, 1], [1, 1]])]
    limit = torch.stack([sizes[0][image].flip(0) * 4 for image in IMAGE])  # right and lower edge of each picture
    boxes = torch.cat([BOXES.nan_to_num(0.0)[:, :2], BOXES.nan_to_num(0.0)[:, 2:]], 1)
    boxes = torch.minimum(boxes.clamp(min=0).view(-1, 2, 2), limit[:, None]).flatten(1)
    grad, results = noise(len(boxes), 3, 2, 2), []
    for repeated_before in (True, False):
        maps = pyramid(3, torch.float64)
        levels = [
            extend_edges(x, size.to(DEVICE)) if repeated_before else x for x, size in zip(maps, sizes, strict=True)
        ]
        valid = None if repeated_before else [size.to(DEVICE) for size in sizes]
        places = boxes.to(DEVICE), IMAGE.to(DEVICE)
        pooled = roi_align_pyramid(Pyramid(levels, STRIDES, valid), *places, 2, ratio)
        results.append([pooled.detach(), *torch.autograd.grad(pooled, maps, grad.to(pooled))])
    assert largest(results[1], [tensor.cpu() for tensor in results[0]]) < 1e-12
