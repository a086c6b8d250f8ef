"""The Triton NMS keeps the boxes that torchvision's operator keeps on a CPU; without a GPU, the interpreter runs it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from without_interpreter import answer_of

from gndet.modeling.anchors import cell_anchors, level_anchors
from gndet.ops import matching, nms_kernels
from gndet.ops.boxes import clip_boxes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU conftest.py has chosen the interpreter
TRITON = (0, 0) if nms_kernels.triton is None else tuple(map(int, nms_kernels.triton.__version__.split(".")[:2]))
pytestmark = [
    pytest.mark.skipif(nms_kernels.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        DEVICE.type == "cpu" and TRITON < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
        reason="the interpreter of Triton 3.6 and before needs NumPy < 2.4",
    ),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),  # 0 / 0
]


def noise(num: int, seed: int = 0, span: float = 60.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(2, num, 2, generator=generator).unbind()
    return torch.cat([corner * span, corner * span + side * 40], 1)


def row(num: int, step: float, side: float) -> Tensor:
    """Return squares in a row: each suppresses the next if step is small, and those after it if it is smaller."""
    x0 = torch.arange(float(num)) * step
    return torch.stack([x0, 0 * x0, x0 + side, 0 * x0 + side], 1)


def blank_picture() -> Tensor:
    """Return the 300 anchors of a blank picture of 8 x 200 pixels in their order: all scores are equal."""
    anchors = level_anchors(cell_anchors(32.0, (0.5, 1.0, 2.0), 4, "exact"), (4, 4), 2, 50)
    return clip_boxes(anchors[None], torch.tensor([[8, 200]]))[0]


def odd(num: int) -> Tensor:
    """Return boxes among which are empty, inverted, infinite and huge ones, and some with NaN."""
    boxes = noise(num)
    boxes[::7, 2:] = boxes[::7, :2]  # no area
    boxes[1::7, 2] = boxes[1::7, 0] - 5  # negative area
    boxes[2::7] = boxes[2::7].flip(1)  # inverted in both directions: a positive area
    boxes[3::7, 1::2] *= 1e22  # areas overflow
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e-30])
    boxes[torch.arange(4, num, 7), torch.arange(4, num, 7) % 4] = values[torch.arange(4, num, 7) // 4 % 4]
    return boxes


def kept_by_torchvision(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        for group in groups[image].unique():
            rows = ((groups[image] == group) & valid[image]).nonzero()[:, 0]
            kept = torchvision.ops.nms(boxes[image, rows], -torch.arange(float(len(rows))), threshold)
            keep[image, rows[kept]] = True
    return keep


def kept(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return nms_kernels.keep_boxes(boxes.to(DEVICE), groups.to(DEVICE), valid.to(DEVICE), threshold).cpu()


CASES = {f"{num} random": noise(num) for num in (1, 31, 32, 33, 64, 65, 500)} | {
    "a chain": row(140, 3, 10), "a dense chain": row(150, 1, 10), "identical": noise(1).expand(70, 4),
    "identical in turn": noise(3).repeat(40, 1), "a grid": noise(200).round(), "odd": odd(200),
    "a blank picture": blank_picture(),
}  # fmt: skip


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("boxes", CASES.values(), ids=CASES)
def test_the_kernels_keep_what_torchvision_keeps(
    boxes: Tensor, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one group, as three with invalid boxes among them, and without a valid box."""
    if len(boxes) == 500:  # fewer and larger programs are quicker to interpret
        monkeypatch.setattr(nms_kernels, "ROWS", 256)
        monkeypatch.setattr(nms_kernels, "COLUMNS", 32)
    num, generator = len(boxes), torch.Generator().manual_seed(0)
    boxes = boxes.expand(3, num, 4)
    groups = torch.stack([torch.zeros(num).long(), *torch.randint(-1, 2, (2, num), generator=generator)])
    valid = torch.stack([torch.ones(num).bool(), torch.rand(num, generator=generator) < 0.8, torch.zeros(num).bool()])
    found = kept(boxes, groups, valid, threshold)
    assert torch.equal(found, kept_by_torchvision(boxes, groups, valid, threshold))
    assert found[0, 0] and not found[2].any()


def test_a_blank_picture_needs_more_rounds_than_a_fixed_number() -> None:
    """Suppressing all boxes at once, round after round, settles after as many rounds as the longest chain has boxes."""
    boxes = blank_picture()
    suppresses = (torchvision.ops.box_iou(boxes, boxes) > 0.7).triu(diagonal=1)
    keep, rounds = torch.ones(len(boxes), dtype=torch.bool), 0
    while not torch.equal(after := ~(suppresses & keep[:, None]).any(0), keep):
        keep, rounds = after, rounds + 1
    expected = kept_by_torchvision(boxes[None], torch.zeros(1, 300).long(), torch.ones(1, 300).bool(), 0.7)
    assert rounds > 32 and torch.equal(keep[None], expected)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1 / 3, 1.0])
def test_an_overlap_that_equals_the_threshold_in_float32_is_compared_in_float64(threshold: float) -> None:
    """3 / 10 in float32 is above 0.3, 7 / 10 is below 0.7."""
    widths = torch.tensor([30.0, 27, 21, 18, 10, 9, 6, 3])
    boxes = torch.stack([0 * widths, 0 * widths, widths, 0 * widths + 1], 1)
    for first in range(len(boxes)):
        ordered = boxes.roll(-first, 0)[None]
        groups, valid = torch.zeros(1, 8).long(), torch.ones(1, 8).bool()
        expected = kept_by_torchvision(ordered, groups, valid, threshold)
        assert torch.equal(kept(ordered, groups, valid, threshold), expected)


@pytest.mark.parametrize("num", [1029, pytest.param(8192, marks=pytest.mark.slow)])
def test_many_boxes_are_walked(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nms_kernels, "ROWS", 1024)
    monkeypatch.setattr(nms_kernels, "COLUMNS", 32)
    boxes = torch.cat([noise(num - 1000, span=900.0), row(1000, 3, 10)])[None]
    groups, valid = torch.arange(num)[None] % 2, torch.ones(1, num).bool()
    found = kept(boxes, groups, valid, 0.5)
    assert torch.equal(found, kept_by_torchvision(boxes, groups, valid, 0.5))


def test_no_images_and_no_boxes() -> None:
    for shape in ((0, 5), (2, 0)):
        assert kept(torch.zeros(*shape, 4), torch.zeros(shape).long(), torch.zeros(shape).bool(), 0.5).shape == shape


def test_the_operator_uses_the_kernels_if_they_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, groups, valid = noise(80).expand(2, 80, 4), torch.arange(160).view(2, 80) % 3, torch.ones(2, 80).bool()
    given = (boxes, torch.linspace(1, 0, 80).expand(2, 80), groups, valid, 0.5)
    expected = matching.nms_keep(*given)
    called = []
    true = nms_kernels.keep_boxes
    monkeypatch.setattr(nms_kernels, "usable", lambda boxes: True)
    monkeypatch.setattr(nms_kernels, "keep_boxes", lambda *a: called.append(a) or true(*a))
    found = matching.nms_keep(*(x.to(DEVICE) for x in given[:4]), given[4]).cpu()
    assert torch.equal(found, expected) and len(called) == 1


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = nms_kernels.trouble.__wrapped__
    assert trouble(DEVICE) == ""
    true = nms_kernels.keep_boxes
    monkeypatch.setattr(nms_kernels, "keep_boxes", lambda *a: true(*a[:3], 0.6))
    assert trouble(DEVICE).endswith(" of 300 boxes are wrong")
    monkeypatch.setattr(nms_kernels, "keep_boxes", lambda *a: 1 / 0)
    assert trouble(DEVICE) == "ZeroDivisionError: division by zero"


def test_memory_that_runs_out_in_the_self_test_does_not_condemn_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    nms_kernels.trouble.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(nms_kernels, "keep_boxes", full)
        nms_kernels.trouble(DEVICE)
    assert nms_kernels.trouble(DEVICE) == ""


@pytest.mark.slow
def test_they_compile_for_gpus_with_ieee_arithmetic_and_without_spills(tmp_path: Path) -> None:
    kernels = answer_of("ops/compile_nms_kernels.py", tmp_path)
    assert len(kernels) == 3 * 4
    for name, counts in kernels.items():
        forbidden = ("fused", "inexact divisions", "flushed", "atomics", "spilled")
        assert not any(counts[kind] for kind in forbidden), (name, counts)
        assert (counts["divisions"] > 0) == ("_overlap" in name)
