"""Compare the Triton kernels with torch in float64; without a GPU, Triton's interpreter runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import Tensor

from gndet.modeling.norms import group_norm
from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.norms.valid_area import ValidArea

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU conftest.py has chosen the interpreter


def version(module: ModuleType | None) -> tuple[int, ...]:
    return (0, 0) if module is None else tuple(map(int, module.__version__.split(".")[:2]))


pytestmark = [
    pytest.mark.skipif(norm_kernels.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        DEVICE == "cpu" and version(norm_kernels.triton) < (3, 7) and version(np) >= (2, 4),
        reason="the interpreter of Triton 3.6 and before needs NumPy < 2.4",
    ),
]
SHAPES = [  # B, C, H, W, G
    (2, 64, 9, 13, 32), (1, 48, 7, 7, 3), (3, 20, 5, 6, 20), (2, 33, 1, 1, 1), (1, 40, 23, 11, 5), (1, 520, 6, 5, 4),
]  # fmt: skip
CASES = [("as on a GPU", shape) for shape in SHAPES] + [("many and small", shape) for shape in SHAPES[1:4]]
CASES += [pytest.param("many and small", shape, marks=pytest.mark.slow) for shape in (*SHAPES[:1], *SHAPES[4:])]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def in_float64(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, sizes: Tensor | None, grad: Tensor
) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, gamma and beta, from torch's group_norm on each picture."""
    x, gamma, beta = (tensor.double().requires_grad_() for tensor in (x, gamma, beta))
    y = torch.zeros_like(x)
    for image, (height, width) in enumerate([x.shape[2:]] * len(x) if sizes is None else sizes.tolist()):
        part = F.group_norm(x[image : image + 1, :, :height, :width], groups, gamma, beta, 1e-5)
        y = y.index_put((torch.tensor(image),), F.pad(part[0], (0, x.shape[3] - width, 0, x.shape[2] - height)))
    return y, *torch.autograd.grad(y, (x, gamma, beta), grad.double())


def largest(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("blocks", "shape"), CASES)
def test_kernels_are_group_norm_over_each_picture(
    blocks: str, shape: tuple[int, ...], padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "many and small":  # several blocks of channels, several stripes, several blocks in each
        monkeypatch.setattr(norm_kernels, "CHANNELS", 16)
        monkeypatch.setattr(norm_kernels, "BLOCK", 256)
        monkeypatch.setattr(norm_kernels, "MIN_STRIPE", 20)
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


@pytest.mark.slow
def test_they_compile_for_gpus_and_move_maps_16_bytes_at_a_time(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = [sys.executable, str(REPOSITORY / "tests" / "compile_kernels.py")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    kernels = json.loads(ended.stdout)
    assert len(kernels) == 5 * 8
    for name, accesses in kernels.items():
        if "_statistics" not in name:  # it reads a few sums and no map
            assert "ld.global.v4.b32" in accesses, name
        if "_apply" in name or "_gradient_kernel" in name:
            assert "st.global.v4.b32" in accesses, name


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device, trouble = torch.device(DEVICE), norm_kernels.trouble.__wrapped__
    assert trouble(device) == ""
    true = norm_kernels.backward
    monkeypatch.setattr(norm_kernels, "backward", lambda *a: tuple(1.01 * tensor for tensor in true(*a)))
    assert "the gradient of (1, 64, 5, 7, 32) is wrong" in trouble(device)
    monkeypatch.setattr(norm_kernels, "forward", lambda *a, **k: 1 / 0)
    assert trouble(device) == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(norm_kernels, "triton", None)
    assert trouble(device) == "Triton is not installed"


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
