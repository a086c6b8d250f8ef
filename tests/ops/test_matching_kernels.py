"""The Triton kernels match and rank as torch's operators do, to the bit; without a GPU, the interpreter runs them."""

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from without_interpreter import answer_of

from gndet.ops import matching, matching_kernels
from gndet.ops.noise import Stream, hash_ints
from gndet.training import setup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU conftest.py has chosen the interpreter
TRITON = matching_kernels.triton


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


pytestmark = [
    pytest.mark.skipif(TRITON is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        DEVICE.type == "cpu" and TRITON is not None and version(TRITON) < (3, 7) and version(np) >= (2, 4),
        reason="the interpreter of Triton 3.6 and before needs NumPy < 2.4",
    ),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # inf - inf
]
BIG = 1024  # candidates of a program: fewer and larger programs are quicker to interpret

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def boxes(images: int, num: int, seed: int, step: float = 0.0, span: float = 60.0) -> Tensor:
    """Return boxes of sides up to 40 pixels; step: of a grid on which they lie, so that many overlap equally."""
    corner, side = torch.rand(2, images, num, 2, generator=torch.Generator().manual_seed(seed)).unbind()
    found = torch.cat([corner * span, corner * span + side * 40], -1)
    return found.div(step).round().mul(step) if step else found


def given(images: int, num: int, slots: int, *, shared: bool, step: float = 0.0, seed: int = 0) -> Given:
    """Return objects, gt_valid, candidates, candidate_valid; a fifth of each is not valid."""
    generator = torch.Generator().manual_seed(seed)
    gt_valid, valid = (torch.rand(images, count, generator=generator) < 0.8 for count in (slots, num))
    return boxes(images, slots, seed + 1, step), gt_valid, boxes(1 if shared else images, num, seed + 2, step), valid


def kernel_match(case: Given, low: float = 0.3, high: float = 0.7, *, keep_best: bool = True) -> tuple[Tensor, Tensor]:
    matched, label = matching_kernels.match(*(x.to(DEVICE) for x in case), low, high, keep_best=keep_best)
    return matched.cpu(), label.cpu()


def same(case: Given, low: float = 0.3, high: float = 0.7) -> bool:
    """Return whether the kernels and torch's operators on a CPU give equal results."""
    for keep_best in (True, False):
        expected = matching.match(*case, low, high, keep_best=keep_best)
        found = kernel_match(case, low, high, keep_best=keep_best)
        for a, b in zip(found, expected, strict=True):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
    return True


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("slots", [1, 8, 33])
@pytest.mark.parametrize("num", [1, 127, 128, 129, 1000])
def test_they_match_as_torch_does(num: int, slots: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images share the candidates, or not; boxes lie on a grid, so that they overlap equally, or anywhere."""
    if num * slots > 4000:
        monkeypatch.setattr(matching_kernels, "BLOCK", BIG)
    shared = (num + slots) % 2 == 0
    assert same(given(images, num, slots, shared=shared, step=0.0 if shared == (images == 1) else 8.0))


@pytest.mark.parametrize("seed", range(20))
def test_an_overlap_equals_a_threshold_or_another_overlap_on_both(seed: int) -> None:
    """The IoUs of boxes on a grid are few fractions; each is a threshold in turn."""
    case = given(2, 128, 6, shared=seed % 2 == 0, step=(4.0, 10.0, 1 / 3)[seed % 3], seed=seed)
    thresholds = [(1 / 3, 0.5), (0.1, 0.2), (0.25, 0.6), (0.0, 1.0), (0.7, 0.7)]
    assert same(case, *thresholds[seed % 5])


@pytest.mark.parametrize("seed", range(8))
def test_the_last_bit_of_an_overlap_is_that_of_torch(seed: int) -> None:
    """Of objects that differ by a few units in the last place, rounding decides which one a candidate overlaps most."""
    objects, _, candidates, valid = given(1, 128, 8, shared=True, seed=seed)
    ulps = torch.randint(-3, 4, objects.shape, generator=torch.Generator().manual_seed(seed))
    objects = (objects[:, :1] + 30) * (1 + ulps * 2**-23)
    case = objects, torch.ones(1, 8).bool(), candidates + 20, valid
    assert len(kernel_match(case)[0].unique()) > 3 and same(case)


def test_each_object_equal_to_another_goes_to_the_first_slot() -> None:
    objects, _, candidates, valid = given(2, 200, 4, shared=True)
    case = objects[:, [0, 1, 0, 1, 2, 2, 0, 3]], torch.ones(2, 8).bool(), candidates, valid
    case[1][1, :2] = False
    assert same(case)
    matched = kernel_match(case)[0]
    assert not (matched[0, :, None] == torch.tensor([2, 3, 5, 6])).any()
    assert not (matched[1, :, None] == torch.tensor([1, 5, 6])).any()


@pytest.mark.parametrize("seed", range(8))
def test_nan_infinite_huge_empty_and_inverted_boxes_match_as_with_torch(seed: int) -> None:
    objects, gt_valid, candidates, valid = given(2, 140, 12, shared=seed % 2 == 0, step=4.0, seed=seed)
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, -0.0, 0.0])
    generator = torch.Generator().manual_seed(seed)
    for odd, every in ((objects, 3), (candidates, 4)):
        flat = odd.view(-1, 4)
        row = torch.arange(seed % every, len(flat), every)
        corner, value = (torch.randint(0, high, (len(row),), generator=generator) for high in (4, 8))
        flat[row, corner] = values[value]
        flat[row[::3], 2:] = flat[row[::3], :2]  # no area
        flat[row[1::5]] = flat[row[1::5]].flip(1)  # inverted
    assert same((objects, gt_valid, candidates, valid))


def test_the_first_nan_wins_and_an_object_that_meets_nan_keeps_no_best_candidate() -> None:
    """By hand: slots 1 and 2 are NaN for candidate 0; candidate 1 holds NaN, candidate 2 is object 0's best."""
    objects = torch.tensor([[[0.0, 0, 10, 10], [math.nan, 0, 9, 9], [0, math.nan, 9, 9]]])
    candidates = torch.tensor([[[0.0, 0, 10, 10], [0, 0, math.nan, 9], [0, 0, 10, 6]]])
    gt_valid, valid = torch.ones(2, 1, 3).bool().unbind()
    found = kernel_match((objects, gt_valid, candidates, valid))
    assert found[0].tolist() == [[1, 0, 1]] and found[1].tolist() == [[-1, -1, -1]]
    gt_valid[:, 1:], valid[:, :2] = False, False
    found = kernel_match((objects, gt_valid, candidates, valid))
    assert found[0].tolist() == [[0, 0, 0]] and found[1].tolist() == [[-1, -1, 1]]
    for mask in ([True, True, True], [True, False, False], [False, True, True]):
        assert same((objects, gt_valid, candidates, torch.tensor([mask])))
        assert same((objects, torch.tensor([mask]), candidates, torch.ones(1, 3).bool()))


def test_no_valid_object_and_no_valid_candidate() -> None:
    objects, gt_valid, candidates, valid = given(3, 150, 5, shared=True)
    gt_valid[1], valid[2] = False, False
    assert same((objects, gt_valid, candidates, valid))
    label = kernel_match((objects, gt_valid, candidates, valid))[1]
    assert torch.equal(label[1], torch.where(valid[1], 0, -1)) and (label[2] == -1).all()


def test_views_match_as_their_copies() -> None:
    """Arguments that are not contiguous: every second object and candidate, and one mask for all images."""
    objects, gt_valid, candidates, valid = given(2, 200, 10, shared=False)
    assert same((objects[:, ::2], gt_valid[:, ::2], candidates[:, ::2], valid[:1, ::2].expand(2, -1)))


def test_an_image_matches_alone_as_in_a_batch_with_more_slots_and_candidates() -> None:
    case = given(3, 300, 9, shared=False, step=4.0)
    case[0][1, 4:], case[2][2] = math.nan, math.nan
    case[1][0, 5:], case[3][0, 170:] = False, False  # the padding of image 0
    batch = kernel_match(case)
    alone = kernel_match((case[0][:1, :5], case[1][:1, :5], case[2][:1, :170], case[3][:1, :170]))
    assert all(torch.equal(a[0], b[0, :170]) for a, b in zip(alone, batch, strict=True))
    assert (alone[1] == 1).any()


def ranked(keys: Tensor, stream: Stream, ids: Tensor) -> Tensor:
    return matching_kernels.ranks(keys.to(DEVICE), stream, ids.to(DEVICE)).cpu()


@pytest.mark.parametrize("num", [1, 127, 1024, 1025, 3000])
@pytest.mark.parametrize("images", [1, 3])
def test_random_ranks_are_those_of_torch(images: int, num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    keys = torch.tensor([hash_ints(num, image) for image in range(images)])
    for stream in (Stream.ANCHORS, Stream.REGIONS):
        for shape in ((num,), (images, num)):
            ids = torch.randint(0, 2**31, shape, generator=generator)
            drawn = ranked(keys, stream, ids)
            assert drawn.dtype == torch.int64 and torch.equal(drawn, matching.ranks(keys, stream, ids))


def test_extreme_keys_and_ids_rank_as_with_torch() -> None:
    keys = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1])
    ids = torch.tensor([0, 1, 2, 2**16, 2**30, 2**31 - 2, 2**31 - 1])
    for given_ids in (ids, ids.expand(8, 7), ids.flip(0)[::2]):
        assert torch.equal(ranked(keys, Stream.ANCHORS, given_ids), matching.ranks(keys, Stream.ANCHORS, given_ids))
    assert ranked(keys, Stream.ANCHORS, ids[:0]).shape == (8, 0)


def test_the_operators_use_the_kernels_if_they_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    case, keys, ids = given(2, 90, 3, shared=True), torch.tensor([5, 6]), torch.arange(90)
    expected = (*matching.match(*case, 0.3, 0.7, keep_best=True), matching.ranks(keys, Stream.ANCHORS, ids))
    called, match, ranks = [], matching_kernels.match, matching_kernels.ranks
    monkeypatch.setattr(matching_kernels, "usable", lambda dtype, *given: all(x.dtype == dtype for x in given))
    monkeypatch.setattr(matching_kernels, "match", lambda *a, **k: called.append("match") or match(*a, **k))
    monkeypatch.setattr(matching_kernels, "ranks", lambda *a: called.append("ranks") or ranks(*a))
    with torch.inference_mode():
        found = (
            *matching.match(*(x.to(DEVICE) for x in case), 0.3, 0.7, keep_best=True),
            matching.ranks(keys.to(DEVICE), Stream.ANCHORS, ids.to(DEVICE)),
        )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    assert called == ["match", "ranks"]


def test_they_are_used_for_their_types_on_a_gpu_where_they_work_and_not_in_a_compiled_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGPU(NamedTuple):
        dtype: torch.dtype
        is_cuda: bool = True
        device: torch.device = torch.device("cuda", 0)

    wrong = ""
    monkeypatch.setattr(matching_kernels, "trouble", lambda device: wrong)
    single, double = OnGPU(torch.float32), OnGPU(torch.float64)
    assert matching_kernels.usable(torch.float32, single, single)
    assert not matching_kernels.usable(torch.float32, single, double)
    assert not matching_kernels.usable(torch.float32, single, single._replace(is_cuda=False))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not matching_kernels.usable(torch.float32, single, single)
    wrong = "broken"
    assert not matching_kernels.usable(torch.float32, single, single)


def test_a_compiled_graph_is_whole() -> None:
    case = given(1, 50, 2, shared=True)

    def step(*case: Tensor) -> tuple[Tensor, ...]:
        matched, label = matching.match(*case, 0.3, 0.7, keep_best=True)
        return matched, label, matching.ranks(matched[:, 0], Stream.ANCHORS, matched)

    found = torch.compile(step, backend="eager", fullgraph=True)(*case)
    assert all(map(torch.equal, found, step(*case)))


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = matching_kernels.trouble.__wrapped__
    assert trouble(DEVICE) == ""
    match, ranks = matching_kernels.match, matching_kernels.ranks
    monkeypatch.setattr(matching_kernels, "match", lambda *a, keep_best: match(*a, keep_best=False))
    assert trouble(DEVICE).endswith(" of 600 matches are wrong")
    monkeypatch.setattr(matching_kernels, "ranks", lambda *a: ranks(*a) + 1)
    assert trouble(DEVICE).endswith(" of 600 matches are wrong; random ranks are wrong")
    monkeypatch.setattr(matching_kernels, "match", lambda *a, **k: 1 / 0)
    assert trouble(DEVICE) == "ZeroDivisionError: division by zero"


def test_a_run_says_that_torch_matches_if_the_kernels_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("norm", "nms", "roi_align"):
        monkeypatch.setattr(setup, f"{kind}_trouble", lambda device: "")
    monkeypatch.setattr(setup, "match_trouble", lambda device: "random ranks are wrong")
    (line,) = setup.slower_operators(torch.device("cuda", 0))
    assert line.startswith("matching by torch's own operators") and line.endswith("(random ranks are wrong)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer_of("ops/compile_matching_kernels.py", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_they_compile_for_gpus_with_ieee_arithmetic_and_without_spills(compiled: dict[str, Any]) -> None:
    assert len(compiled["code"]) == 3 * 4
    for name, counts in compiled["code"].items():
        forbidden = ("fused", "inexact divisions", "flushed", "minima without NaN", "barriers", "spilled")
        assert not any(counts[kind] for kind in forbidden), (name, counts)
        assert (counts["divisions"] > 0) == ("_rank" not in name), name
        assert (counts["atomics"] > 0) == (name.startswith("_match_kernel True")), name


@pytest.mark.slow
def test_a_training_step_takes_5_launches_and_4_compiled_kernels_for_all_sizes(compiled: dict[str, Any]) -> None:
    """Batches of 1 to 16 images, 1 to 268,569 candidates and 1 to 33 slots."""
    assert compiled["launches"] == 5 and len(compiled["kinds"]) == 4
