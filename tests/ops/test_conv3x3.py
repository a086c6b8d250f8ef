"""Convolutions by minimal filtering give what direct convolutions give."""

import pytest
import torch
import torch.nn.functional as F
from models import make_batch, small_model
from torch import Tensor

from gndet.config.schema import BoxHeadConfig, FPNConfig, NormConfig
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.recompute import set_memory
from gndet.ops import conv3x3
from gndet.ops.conv3x3 import MinimalConvolution

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
    """Return the largest difference as a fraction of the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_a_convolution_in_float64(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape[0], 64, *shape[1:], generator=generator).requires_grad_()
    weight = torch.randn(96, 64, 3, 3, generator=generator).div(24).requires_grad_()
    grad = torch.randn(shape[0], 96, *shape[1:], generator=generator)
    y = MinimalConvolution.apply(x.contiguous(memory_format=torch.channels_last), weight)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    for got, expected in zip(found, (exact, *torch.autograd.grad(exact, (x, weight), grad.double())), strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < 3e-5


def test_a_sample_s_result_does_not_depend_on_the_other_samples() -> None:
    x, weight = torch.randn(70, 7, 7, 64), conv3x3.transform_weight(torch.randn(64, 64, 3, 3))
    together = conv3x3.convolve(x, weight)
    for sample in (0, 33, 69):
        torch.testing.assert_close(conv3x3.convolve(x[sample : sample + 1], weight)[0], together[sample])


def test_the_map_is_padded_with_zeros() -> None:
    x = torch.zeros(1, 6, 6, 64)
    x[0, 2, 3] = 1.0
    y = conv3x3.convolve(x, conv3x3.transform_weight(torch.ones(64, 64, 3, 3)))
    expected = torch.zeros(6, 6)
    expected[1:4, 2:5] = 64.0
    torch.testing.assert_close(y[0, :, :, 0], expected, atol=1e-3, rtol=0)


def conv_norm(kernel: int = 3, stride: int = 1, channels: int = 64, kind: str = "gn") -> ConvNorm:
    layer = ConvNorm(channels, channels, kernel, NormConfig(kind=kind), stride=stride)
    layer.winograd = True
    return layer


def test_winograd_is_used_only_for_plain_3x3_convolutions_in_float32() -> None:
    assert conv_norm().by_winograd()
    assert not conv_norm(kernel=1).by_winograd()
    assert not conv_norm(stride=2).by_winograd()
    assert not conv_norm(channels=32).by_winograd()
    assert not conv_norm().double().by_winograd()  # float64 is used if rounding must be small
    assert not conv_norm().to("meta").by_winograd()


@pytest.mark.parametrize("kind", ["gn", "none"])
def test_a_conv_norm_gives_what_its_convolution_gives(kind: str) -> None:
    layer = conv_norm(kind=kind)
    x = torch.randn(2, 64, 9, 10)
    if layer.conv.bias is not None:
        torch.nn.init.normal_(layer.conv.bias)
    expected = F.relu(layer.norm(layer.conv(x)))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_autocast_keeps_its_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_norm()(torch.randn(1, 64, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_a_step_has_the_same_losses_and_gradients_with_and_without_winograd(memory: str) -> None:
    model = small_model(fpn=FPNConfig(channels=64), box_head=BoxHeadConfig(conv_channels=64, regions_per_image=32))
    set_memory(model, memory)
    results = []
    for edge in (0, 800):
        model.choose_convolutions(edge)
        model.zero_grad()
        losses = model(make_batch([(96, 128), (128, 80)]))
        sum(loss.sum() for loss in losses.values()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((torch.stack(list(losses.values())), grads))
    (plain, plain_grads), (filtered, filtered_grads) = results
    torch.testing.assert_close(filtered, plain, rtol=1e-4, atol=1e-5)
    assert (filtered_grads - plain_grads).norm() < 1e-3 * plain_grads.norm()
    assert not torch.equal(filtered_grads, plain_grads)


def chosen(edge: int) -> set[str]:
    model = small_model()
    model.choose_convolutions(edge)
    return {".".join(name.split(".")[:2]) for name, m in model.named_modules() if getattr(m, "winograd", False)}


def test_winograd_is_chosen_by_picture_size_for_each_stage() -> None:
    assert chosen(100) == set()
    assert chosen(160) == {"backbone.res2", "fpn.output2"}
    everywhere = {"backbone.res2", "backbone.res3", "backbone.res4", "fpn.output2", "fpn.output3", "fpn.output4"}
    assert chosen(800) == everywhere | {"rpn.convs", "box_head.convs", "mask_head.convs"}
