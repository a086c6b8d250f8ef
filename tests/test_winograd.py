"""Convolutions by minimal filtering are convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.config import NormConfig
from gndet.modeling.conv_norm import ConvNorm
from gndet.ops import winograd
from gndet.ops.winograd import Winograd

SHAPES = [
    (1, 1, 1),
    (2, 4, 4),
    (3, 7, 7),
    (40, 14, 14),
    (1, 37, 52),
    (1, 5, 230),
    (2, 130, 3),
]  # samples, height, width


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_a_convolution_in_float64(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape[0], 64, *shape[1:], generator=generator).requires_grad_()
    weight = torch.randn(96, 64, 3, 3, generator=generator).div(24).requires_grad_()
    grad = torch.randn(shape[0], 96, *shape[1:], generator=generator)
    y = Winograd.apply(x.contiguous(memory_format=torch.channels_last), weight)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    for got, expected in zip(found, (exact, *torch.autograd.grad(exact, (x, weight), grad.double())), strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < 3e-5


def test_a_sample_s_result_does_not_depend_on_those_beside_it() -> None:
    x, weight = torch.randn(70, 7, 7, 64), winograd.transform_weight(torch.randn(64, 64, 3, 3))
    together = winograd.convolve(x, weight)
    for sample in (0, 33, 69):
        torch.testing.assert_close(winograd.convolve(x[sample : sample + 1], weight)[0], together[sample])


def test_what_stands_beyond_the_map_is_zero() -> None:
    x = torch.zeros(1, 6, 6, 64)
    x[0, 2, 3] = 1.0
    y = winograd.convolve(x, winograd.transform_weight(torch.ones(64, 64, 3, 3)))
    expected = torch.zeros(6, 6)
    expected[1:4, 2:5] = 64.0
    torch.testing.assert_close(y[0, :, :, 0], expected, atol=1e-3, rtol=0)


def brick(kernel: int = 3, stride: int = 1, channels: int = 64, winograd: bool = True) -> ConvNorm:
    return ConvNorm(channels, channels, kernel, NormConfig(), stride=stride, winograd=winograd)


def test_it_is_chosen_by_the_layer_alone() -> None:
    assert brick().by_winograd()
    assert not brick(winograd=False).by_winograd()
    assert not brick(kernel=1).by_winograd()
    assert not brick(stride=2).by_winograd()
    assert not brick(channels=32).by_winograd()
    assert not brick().double().by_winograd()  # float64 is asked for where rounding must be small
    assert not brick().to("meta").by_winograd()


@pytest.mark.parametrize("kind", ["gn", "none"])
def test_a_brick_gives_what_its_convolution_gives(kind: str) -> None:
    layer = ConvNorm(64, 64, 3, NormConfig(kind=kind), winograd=True)
    x = torch.randn(2, 64, 9, 10)
    if layer.conv.bias is not None:
        torch.nn.init.normal_(layer.conv.bias)
    expected = F.relu(layer.norm(layer.conv(x)))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_autocast_keeps_its_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert brick()(torch.randn(1, 64, 8, 8)).dtype == torch.bfloat16
