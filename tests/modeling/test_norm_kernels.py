"""Compare the Triton kernels with torch in float64; without a GPU, Triton's interpreter runs them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from without_interpreter import answer_of

from gndet.config.norm import NormConfig
from gndet.modeling import recompute
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.norms import group_norm
from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.norms.layers import GroupNorm
from gndet.modeling.norms.valid_area import ValidArea, clear_padding
from gndet.ops import self_test

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU conftest.py has chosen the interpreter


def version(module: ModuleType | None) -> tuple[int, ...]:
    return (0, 0) if module is None else tuple(map(int, module.__version__.split(".")[:2]))


pytestmark = [
    pytest.mark.skipif(self_test.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        DEVICE == "cpu" and version(self_test.triton) < (3, 7) and version(np) >= (2, 4),
        reason="the interpreter of Triton 3.6 and before needs NumPy < 2.4",
    ),
]
SHAPES = [  # B, C, H, W, G
    (2, 64, 9, 13, 32), (1, 48, 7, 7, 3), (3, 20, 5, 6, 20), (2, 33, 1, 1, 1), (1, 40, 23, 11, 5), (1, 520, 6, 5, 4),
]  # fmt: skip
ODD = [  # one channel, groups of one channel, of all, of odd and large numbers; many small maps, long rows
    (1, 1, 4, 4, 1), (2, 7, 3, 5, 7), (2, 7, 3, 5, 1), (1, 1537, 2, 3, 29), (1, 2048, 3, 5, 1), (1, 2048, 3, 5, 32),
    (2, 48, 1, 300, 3), (2, 64, 40, 33, 32), (3, 16, 24, 25, 16),
    pytest.param((300, 32, 1, 2, 32), marks=pytest.mark.slow),
]  # fmt: skip
CASES = [("as on a GPU", shape) for shape in SHAPES] + [("many and small", shape) for shape in SHAPES[1:4]]
CASES += [pytest.param("many and small", shape, marks=pytest.mark.slow) for shape in (*SHAPES[:1], *SHAPES[4:])]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def in_float64(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, sizes: Tensor | None, grad: Tensor, relu: bool = False
) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, gamma and beta, from torch's group_norm on each picture, then ReLU if relu."""
    x, gamma, beta = (tensor.double().requires_grad_() for tensor in (x, gamma, beta))
    y = torch.zeros_like(x)
    for image, (height, width) in enumerate([x.shape[2:]] * len(x) if sizes is None else sizes.tolist()):
        part = F.group_norm(x[image : image + 1, :, :height, :width], groups, gamma, beta, 1e-5)
        y = y.index_put((torch.tensor(image),), F.pad(part[0], (0, x.shape[3] - width, 0, x.shape[2] - height)))
    y = y.relu() if relu else y
    return y, *torch.autograd.grad(y, (x, gamma, beta), grad.double())


def largest(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


@pytest.fixture
def many_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide small maps as large ones are: blocks of channels, stripes, and chunks in each; sums in several turns."""
    small = {
        "PROGRAMS": 24,
        "STRIPE": 4,
        "TILE": 64,
        "CHUNK": 512,
        "BLOCK": 512,
        "CHANNELS": 16,
        "MERGED": 64,
        "FEW": 2,
    }
    for name, value in small.items():
        monkeypatch.setattr(norm_kernels, name, value)
    monkeypatch.setattr(norm_kernels, "MANY", 8)
    monkeypatch.setattr(norm_kernels, "plan_for", norm_kernels.plan_for.__wrapped__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("blocks", "shape"), CASES)
def test_kernels_are_group_norm_over_each_picture(
    blocks: str, shape: tuple[int, ...], padded: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if blocks == "many and small":
        request.getfixturevalue("many_small_blocks")
    check(shape, padded, dtype)


@pytest.mark.parametrize("shape", ODD)
def test_kernels_are_group_norm_for_odd_shapes(shape: tuple[int, ...]) -> None:
    check(shape, padded=shape[0] < 300 and shape[2] > 1, dtype=torch.float32)


def check(shape: tuple[int, ...], padded: bool, dtype: torch.dtype) -> None:
    """Compare the kernels' results with group norm in float64."""
    *size, groups = shape
    torch.manual_seed(sum(shape))
    x, grad = (torch.randn(size).to(dtype) for _ in range(2))
    gamma, beta = torch.randn(2, size[1]).unbind()
    sizes = torch.tensor([[max(1, size[2] - i), max(1, size[3] - 2 * i)] for i in range(size[0])]) if padded else None
    shown, shown_grad = x, grad
    if padded:  # the padding must not affect anything
        mask = ValidArea.of(sizes, *size[2:]).mask
        shown, shown_grad = (torch.where(mask, tensor, float("nan")).to(dtype) for tensor in (x, grad))
        grad = torch.where(mask, grad, 0.0)
    inputs = (last(shown), gamma, beta, last(shown_grad), sizes)
    on_x, on_gamma, on_beta, on_grad, on_sizes = (None if tensor is None else tensor.to(DEVICE) for tensor in inputs)
    y, mean, rstd = norm_kernels.forward(on_x, on_gamma, on_beta, groups, 1e-5, on_sizes, relu=False)
    slopes = norm_kernels.backward(on_grad, on_x, on_gamma, mean, rstd, on_sizes)
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # about the last bit of bfloat16
    for got, expected in zip((y, *slopes), in_float64(x, gamma, beta, groups, sizes, grad), strict=True):
        assert largest(got.cpu(), expected) < limit
    assert mean.dtype == rstd.dtype == torch.float32
    cut = norm_kernels.renormalize(on_x, on_gamma, on_beta, mean, rstd, on_sizes, relu=True)
    torch.testing.assert_close(cut, y.relu(), rtol=0, atol=0)
    slopes = norm_kernels.backward(on_grad, on_x, on_gamma, mean, rstd, on_sizes, on_beta)
    expected = in_float64(x, gamma, beta, groups, sizes, grad, relu=True)
    for got, exact in zip((cut, *slopes), expected, strict=True):
        assert largest(got.cpu(), exact) < limit
    residual = y.float() - 1  # zero nowhere, so that a residual that is added twice or left out shows
    added, *_ = norm_kernels.forward(
        on_x, on_gamma, on_beta, groups, 1e-5, on_sizes, relu=True, residual=last(residual).to(dtype)
    )
    inside = torch.ones_like(x) if sizes is None else mask
    sums = torch.where(inside > 0, in_float64(x, gamma, beta, groups, sizes, grad)[0] + residual.cpu(), 0.0)
    assert largest(added.cpu(), sums.relu()) < 2 * limit


def test_a_small_variance_beside_a_large_mean_is_not_lost() -> None:
    torch.manual_seed(0)
    x = last(torch.randn(2, 64, 12, 12) * 0.01 + 1000)
    gamma, beta = torch.ones(64), torch.zeros(64)
    y, *_ = norm_kernels.forward(x.to(DEVICE), gamma.to(DEVICE), beta.to(DEVICE), 32, 1e-5, None, relu=False)
    assert largest(y.cpu(), F.group_norm(x.double(), 32, eps=1e-5)) < 3e-3  # the last bit of the mean is 6e-5


@pytest.mark.parametrize("outlier", [(0, 0), (5, 7)])
def test_one_outlier_does_not_swallow_a_small_variance(outlier: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 12, 12)
    x[:, :, outlier[0], outlier[1]] += 3e4  # its square alone would leave no bits for the others
    ones = torch.ones(32, device=DEVICE)
    _, mean, rstd = norm_kernels.forward(last(x).to(DEVICE), ones, ones, 32, 1e-5, None, relu=False)
    assert largest(mean.cpu()[0], x.double().mean((0, 2, 3))) < 1e-6
    assert largest(rstd.cpu()[0], x.double().var((0, 2, 3), correction=0).rsqrt()) < 1e-6


@pytest.mark.parametrize("kind", ["outlier", "level", "mean"])
def test_statistics_stay_exact_where_a_program_adds_many_values(kind: str, many_small_blocks: None) -> None:
    """Each element shifts by its first value: it is far from the others here, or far from zero like all of them."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 40, 40)  # 24 stripes: 17 values for each element
    if kind == "outlier":
        x[:, :, 0, 0] += 3e4
    elif kind == "level":
        x[:, :, :3] += 300
    else:
        x = x * 0.1 + 1000
    ones = torch.ones(16, device=DEVICE)
    _, mean, rstd = norm_kernels.forward(last(x).to(DEVICE), ones, ones, 4, 1e-5, None, relu=False)
    exact = x.double().view(4, -1)
    assert largest(mean.cpu()[0], exact.mean(1)) < 1e-6
    assert largest(rstd.cpu()[0], (exact.var(1, correction=0) + 1e-5).rsqrt()) < 1e-5


def test_relu_keeps_nan() -> None:
    x, ones = last(torch.full((1, 32, 4, 4), float("nan"))).to(DEVICE), torch.ones(32, device=DEVICE)
    y, *_ = norm_kernels.forward(x, ones, ones, 32, 1e-5, None, relu=True)
    assert y.isnan().all()


def test_no_regions_give_no_regions() -> None:
    x, gamma = torch.zeros(0, 64, 7, 7, device=DEVICE), torch.ones(64, device=DEVICE)
    y, mean, rstd = norm_kernels.forward(x, gamma, gamma, 32, 1e-5, None, relu=True)
    assert y.shape == x.shape
    grad_x, grad_gamma, grad_beta = norm_kernels.backward(y, x, gamma, mean, rstd, None)
    assert grad_x.shape == x.shape
    assert not grad_gamma.any()
    assert not grad_beta.any()


def test_an_image_has_the_same_bits_alone_in_a_batch_and_on_a_larger_canvas(many_small_blocks: None) -> None:
    torch.manual_seed(0)
    x, grad = (last(torch.randn(2, 16, 9, 10)).to(DEVICE) for _ in range(2))
    gamma, beta = torch.randn(2, 16, device=DEVICE).unbind()
    sizes = torch.tensor([[9, 10], [8, 7]], device=DEVICE)

    def numbers(x: Tensor, grad: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        y, mean, rstd = norm_kernels.forward(x, gamma, beta, 4, 1e-5, sizes, relu=True)
        return mean, rstd, y, norm_kernels.backward(grad, x, gamma, mean, rstd, sizes)[0]

    together = numbers(x, grad, sizes)
    for i, (height, width) in enumerate(sizes.tolist()):
        crop = [last(tensor[i : i + 1, :, :height, :width]) for tensor in (x, grad)]
        canvas = [last(F.pad(tensor, (0, 5, 0, 2))) for tensor in crop]
        for maps in ([x[i : i + 1], grad[i : i + 1]], crop, canvas):
            alone = numbers(*maps, sizes[i : i + 1])
            for a, b in zip(alone[:2], together[:2], strict=True):
                assert torch.equal(a[0], b[i])
            for a, b in zip(alone[2:], together[2:], strict=True):
                assert torch.equal(a[0, :, :height, :width], b[i, :, :height, :width])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernels", [(1, 3, 1), (3,)], ids=["bottleneck", "output"])
def test_a_tower_is_the_same_if_the_kernels_add_the_residual_and_undo_the_relu(
    kernels: tuple[int, ...], residual: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    norm = NormConfig(groups=4)
    layers = nn.ModuleList(
        ConvNorm(16, 16, k, norm, relu=not (residual and i == len(kernels) - 1)) for i, k in enumerate(kernels)
    )
    layers.to(DEVICE, memory_format=torch.channels_last)
    recompute.set_memory(layers, "balanced")
    x, other, grad = (last(torch.randn(2, 16, 9, 11)).to(DEVICE) for _ in range(3))
    area = ValidArea.of(torch.tensor([[9, 11], [7, 6]], device=DEVICE), 9, 11) if padded else None
    results, threshold = [], torch.ops.aten.threshold_backward
    passes: list[int] = []
    monkeypatch.setattr(
        recompute._aten, "threshold_backward", lambda *a: passes.append(len(results)) or threshold(*a), raising=False
    )
    for by_kernels in (False, True):
        monkeypatch.setattr(norm_kernels, "usable", lambda x, by_kernels=by_kernels: by_kernels)
        monkeypatch.setattr(recompute, "usable", norm_kernels.usable)
        inputs = [clear_padding(tensor, area).requires_grad_() for tensor in ([x, other] if residual else [x])]
        y = recompute.tower(layers, inputs[0], [area] * len(layers), *inputs[1:])
        results.append([y, *torch.autograd.grad(y, [*inputs, *layers.parameters()], clear_padding(grad, area))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert passes.count(1) == int(residual)  # only the ReLU after a residual takes a pass of its own


# --- what is launched and compiled; these programs need no GPU


PROGRAM = "modeling/compile_norm_kernels.py"


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer_of(PROGRAM, tmp_path_factory.mktemp("triton"), "launches")


def test_no_grid_grows_with_the_map_where_cuda_allows_65535(launches: dict[str, Any]) -> None:
    """A grid's x may be 2^31 - 1, its y and z 65,535: a map of 2112 x 2112 x 64 has 69,696 blocks."""
    assert len(launches["grids"]) == 5
    for size, grids in launches["grids"].items():
        assert len(grids) == 7, size
        for x, *others in grids:
            assert x < 2**31 and all(side < 2**16 for side in others), size


def test_all_canvases_share_the_kernels_that_two_need(launches: dict[str, Any]) -> None:
    """Triton would compile a kernel again for a number that is 1 or divisible by 16."""
    two, many = launches["kinds"]
    assert many == two
    assert len(two) < 45  # 6 kernels for 6 kinds of layers of a ResNet-50, in 2 kinds what applies and what merges


@pytest.mark.slow
def test_they_move_maps_16_bytes_at_a_time_and_fit_four_to_a_multiprocessor(tmp_path: Path) -> None:
    kernels = answer_of(PROGRAM, tmp_path, "code")
    assert len(kernels) == (3 * 4 + 2) * 6
    for name, code in kernels.items():
        assert code["spilled"] == 0, name
        assert 4 * code["registers"] * 32 * code["warps"] <= 65_536, name
        assert 4 * code["shared"] <= 164 * 1024, name  # of an A100; an H100 has 228 KB
        accesses = code["accesses"]
        if "sums_kernel" in name:  # map after map in flight while the last is added up
            assert "cp.async.cg.shared.global" in accesses, name  # always 16 bytes
        elif "apply" in name or "gradient_kernel" in name:
            assert "ld.global.v4.b32" in accesses, name
            assert "st.global.v4.b32" in accesses, name


# --- whether they are used


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device, trouble = torch.device(DEVICE), norm_kernels.trouble.__wrapped__
    assert trouble(device) == ""
    true = norm_kernels.backward
    monkeypatch.setattr(norm_kernels, "SELF_TESTS", norm_kernels.SELF_TESTS[:1])
    monkeypatch.setattr(norm_kernels, "backward", lambda *a: tuple(1.05 * tensor for tensor in true(*a)))
    assert "the gradient of (1, 64, 25, 24, 32) bfloat16 is wrong" in trouble(device)
    monkeypatch.setattr(norm_kernels, "forward", lambda *a, **k: 1 / 0)
    assert trouble(device) == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(self_test, "triton", None)
    assert trouble(device) == "Triton is not installed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_the_self_test_covers_each_type_with_and_without_padding(
    padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that lets the padding leak, here by adding 0 x, or a kernel that is wrong for a type does not pass."""
    covering = [test for test in norm_kernels.SELF_TESTS if test[1:] == (dtype, padded)]
    true = norm_kernels.forward

    def forward(x: Tensor, *arguments: Any, relu: bool) -> tuple[Tensor, ...]:
        y, mean, rstd = true(x, *arguments, relu=relu)
        return (y + 0 * x if padded else 1.05 * y), mean, rstd

    monkeypatch.setattr(norm_kernels, "SELF_TESTS", covering[:1])
    monkeypatch.setattr(norm_kernels, "forward", forward)
    words = f"{str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    assert f"64, 25, 24, 32) {words} is wrong" in norm_kernels.trouble.__wrapped__(torch.device(DEVICE))


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to", "Triton Error [CUDA]: out of memory"])
def test_running_out_of_memory_is_raised_and_not_taken_for_a_broken_kernel(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> list[str]:
        raise RuntimeError(words)

    device = torch.device("cpu", len(words))  # not asked about elsewhere
    monkeypatch.setattr(norm_kernels, "_WORKING", set())
    with monkeypatch.context() as patch:
        patch.setattr(norm_kernels, "_compare", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            norm_kernels.trouble(device)
    monkeypatch.setattr(norm_kernels, "_compare", lambda *_: [])
    assert norm_kernels.trouble(device) == ""


def test_every_launch_is_on_the_gpu_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, which need not be the map's."""
    current: list[Tensor] = []
    launched: list[tuple[str, list[Tensor]]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_: launched.append((self.name, current[-1:]))

    kernels = [name for name in vars(norm_kernels.programs) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(norm_kernels.programs, name, Kernel(name))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, gamma = last(torch.zeros(1, 32, 4, 4)), torch.ones(32)
    _, mean, rstd = norm_kernels.forward(x, gamma, gamma, 8, 1e-5, None, relu=True)
    norm_kernels.renormalize(x, gamma, gamma, mean, rstd, None, relu=True)
    norm_kernels.backward(x, x, gamma, mean, rstd, None)
    assert len(launched) == 7 and {name for name, _ in launched} == set(kernels)
    assert all(guard and guard[0] is x for _, guard in launched)


@pytest.mark.parametrize("known", [False, True])
def test_a_compiled_graph_keeps_the_kernels_and_tracing_tests_nothing(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are fake: they claim to be on a GPU and have no values."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(norm_kernels, "_WORKING", {torch.device("cuda", 0)} if known else set())
    monkeypatch.setattr(norm_kernels, "_compare", lambda *_: pytest.fail("the self-test runs while a graph is traced"))
    torch._dynamo.reset()
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        x = last(torch.empty(2, 32, 12, 13, dtype=torch.bfloat16)).requires_grad_()
        area, layer = ValidArea.of(torch.empty(2, 2, dtype=torch.int64), 12, 13), GroupNorm(32, 8, 1e-5, True)
    with mode:
        torch.compile(layer, backend=backend, fullgraph=True)(x, area)
    (graph,) = graphs
    nodes = {str(node.target) for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes}
    assert ({"gndet.group_norm", "gndet.group_norm_backward"} <= nodes) == known


def test_a_compiled_graph_with_the_kernels_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("gndet.modeling.norms.layers.usable", lambda x: True)
    monkeypatch.setattr(norm_kernels, "usable", lambda x: True)
    layer = GroupNorm(32, 8, 1e-5, True).to(DEVICE)
    x, grad = last(torch.randn(2, 32, 6, 7, device=DEVICE)), last(torch.randn(2, 32, 6, 7, device=DEVICE))
    area = ValidArea.of(torch.tensor([[6, 7], [4, 5]], device=DEVICE), 6, 7)
    torch._dynamo.reset()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = call(leaf, area)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), grad)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_group_norm_uses_the_kernels_if_they_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, grad, (gamma, beta) = last(torch.randn(2, 64, 8, 9)), last(torch.randn(2, 64, 8, 9)), torch.randn(2, 64).unbind()
    area = ValidArea.of(torch.tensor([[8, 9], [5, 7]]), 8, 9)
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(norm_kernels, "usable", lambda x, kernels=kernels: kernels)
        y, mean, rstd = group_norm.normalize(x, gamma, beta, 8, 1e-5, area, relu=True)
        repeated = group_norm.renormalize(x, gamma, beta, mean, rstd, area, relu=True)
        results.append((y, repeated, *group_norm.gradients(grad, x, gamma, mean, rstd, area)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
