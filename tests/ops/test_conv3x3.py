"""Winograd's way and the product give what torch's convolutions give."""

import pytest
import torch
import torch.nn.functional as F
from models import make_batch, small_model
from torch import Tensor

from gndet.config.norm import NormConfig
from gndet.config.parts import BoxHeadConfig, FPNConfig
from gndet.modeling.conv_norm import ConvNorm, choose_ways
from gndet.modeling.recompute import set_memory
from gndet.ops import conv3x3, winograd
from gndet.ops.conv3x3 import Convolution, Convolved, Product, Winograd, fastest

SHAPES = [
    (1, 1, 1),
    (2, 4, 4),
    (3, 7, 7),
    (40, 14, 14),
    (1, 37, 52),
    (1, 5, 230),
    (2, 130, 3),
]  # samples, height, width


@pytest.fixture(autouse=True)
def a_cpu_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3x3, "MULTIPLIES_FAST", False)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("way, stride", [(Winograd, 1), (Product, 1), (Product, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_a_convolution_in_float64(
    shape: tuple[int, int, int], way: type[Convolution], stride: int
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape[0], 64, *shape[1:], generator=generator).requires_grad_()
    weight = torch.randn(96, 64, 3, 3, generator=generator).div(24).requires_grad_()
    y = Convolved.apply(x.contiguous(memory_format=torch.channels_last), weight, stride, way)
    grad = torch.randn(y.shape, generator=generator)
    exact = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    for got, expected in zip(found, (exact, *torch.autograd.grad(exact, (x, weight), grad.double())), strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < 3e-5


@pytest.mark.parametrize("way", [Convolution, Winograd, Product])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_several_calls_add_up(way: type[Convolution], biased: bool) -> None:
    x, weight, bias = torch.randn(4, 64, 8, 8), torch.randn(64, 64, 3, 3) / 24, torch.randn(64)
    parts = (weight.requires_grad_(), bias.requires_grad_() if biased else None)
    whole, halves = way(*parts, 1, 1), way(*parts, 1, 1)
    with torch.no_grad():
        grad = torch.randn_like(whole.forward(x))
        grad_x = whole.backward(grad, x, True)
        half_grads = [halves.backward(grad[rows], x[rows], True) for rows in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(torch.cat(half_grads), grad_x, atol=1e-4, rtol=1e-4)
        for got, expected in zip(halves.gradients(), whole.gradients(), strict=True):
            if expected is None:
                assert got is None and not biased
            else:
                torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_the_product_copies_no_weight() -> None:
    """A convolution of torch copies the weight into its own layout, and its gradient back."""
    x, weight = torch.randn(1, 512, 4, 4), torch.randn(512, 512, 3, 3) / 70
    convolution = Product(weight.requires_grad_(), None, 1, 1)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        convolution.backward(convolution.forward(x), x, True)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert largest == weight.nbytes  # the gradient
    assert allocated < 1.5 * weight.nbytes


def test_a_prediction_before_does_not_hinder_training() -> None:
    for cached in (winograd._tensor, winograd._kron):
        cached.cache_clear()
    layer, x = conv_norm(), torch.randn(1, 64, 8, 8)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.conv.weight.grad.isfinite().all()


def test_a_sample_s_result_does_not_depend_on_the_other_samples() -> None:
    x, weight = torch.randn(70, 7, 7, 64), winograd.transform_weight(torch.randn(64, 64, 3, 3))
    together = winograd.convolve(x, weight)
    for sample in (0, 33, 69):
        torch.testing.assert_close(winograd.convolve(x[sample : sample + 1], weight)[0], together[sample])


def test_the_map_is_padded_with_zeros() -> None:
    x = torch.zeros(1, 6, 6, 64)
    x[0, 2, 3] = 1.0
    y = winograd.convolve(x, winograd.transform_weight(torch.ones(64, 64, 3, 3)))
    expected = torch.zeros(6, 6)
    expected[1:4, 2:5] = 64.0
    torch.testing.assert_close(y[0, :, :, 0], expected, atol=1e-3, rtol=0)


def conv_norm(kind: str = "gn", way: type[Convolution] = Winograd) -> ConvNorm:
    layer = ConvNorm(64, 64, 3, NormConfig(kind=kind))
    layer.way = way
    return layer


def test_the_fastest_way_depends_on_kernel_stride_channels_size_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest(torch.empty(64, 64, 3, 3), 1, side=32) is Winograd
    for shape, stride, side in (((64, 64, 1, 1), 1, 32), ((64, 64, 3, 3), 2, 32), ((32, 64, 3, 3), 1, 32)):
        assert fastest(torch.empty(shape), stride, side) is Convolution
    assert fastest(torch.empty(64, 64, 3, 3), 1, side=31) is Convolution
    for stride in (1, 2):
        assert fastest(torch.empty(512, 512, 3, 3), stride, side=13) is Product
        assert fastest(torch.empty(512, 512, 3, 3), stride, side=14) is Convolution
    assert fastest(torch.empty(128, 128, 3, 3), 1, side=2) is Convolution
    monkeypatch.setattr(conv3x3, "MULTIPLIES_FAST", True)
    assert fastest(torch.empty(64, 64, 3, 3), 1, side=32) is Convolution
    assert fastest(torch.empty(512, 512, 3, 3), 1, side=13) is Product


def test_another_way_is_used_only_in_float32_on_a_cpu() -> None:
    assert conv_norm().way_for(torch.float32) is Winograd
    assert conv_norm().way_for(torch.bfloat16) is Convolution
    assert conv_norm().double().way_for(torch.float64) is Convolution  # used if rounding must be small
    assert conv_norm().to("meta").way_for(torch.float32) is Convolution


@pytest.mark.parametrize("way", [Winograd, Product])
@pytest.mark.parametrize("kind", ["gn", "none"])
def test_a_conv_norm_gives_what_its_convolution_gives(kind: str, way: type[Convolution]) -> None:
    layer = conv_norm(kind, way)
    x = torch.randn(2, 64, 9, 10)
    if layer.conv.bias is not None:
        torch.nn.init.normal_(layer.conv.bias)
    expected = F.relu(layer.norm(layer.conv(x)))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_autocast_keeps_its_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_norm()(torch.randn(1, 64, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("way, edge", [(Winograd, 800), (Product, 16)])
def test_a_step_has_the_same_losses_and_gradients_in_every_way(memory: str, way: type[Convolution], edge: int) -> None:
    model = small_model(fpn=FPNConfig(channels=64), box_head=BoxHeadConfig(conv_channels=64, regions_per_image=32))
    set_memory(model, memory)
    results = []
    for expected in (set(), {way}):
        if expected:
            model.choose_convolutions(edge)
        else:
            choose_ways(model, 20)
        assert set(ways(model).values()) == expected
        model.zero_grad()
        losses = model(make_batch([(96, 128), (128, 80)]))
        sum(loss.sum() for loss in losses.values()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((torch.stack(list(losses.values())), grads))
    (plain, plain_grads), (other, other_grads) = results
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
    assert (other_grads - plain_grads).norm() < 1e-3 * plain_grads.norm()
    assert not torch.equal(other_grads, plain_grads)


def ways(model: torch.nn.Module) -> dict[str, type[Convolution]]:
    """Return the parts of a model that do not use torch's convolution, and what they use."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvNorm)}
    used = {".".join(name.split(".")[:2]): layer.way for name, layer in layers.items() if layer.conv.kernel_size[0] > 1}
    return {name: way for name, way in used.items() if way is not Convolution}


def test_the_way_is_chosen_by_picture_size_for_each_stage() -> None:
    model = small_model(fpn=FPNConfig(channels=64), box_head=BoxHeadConfig(conv_channels=64))
    small, large = {"backbone.res4", "backbone.res5"}, {"backbone.res2", "fpn.output2"}
    large_too = {"backbone.res3", "backbone.res4", "fpn.output3", "fpn.output4"}
    after = {"rpn.convs", "box_head.convs"}
    for edge, products, filtered in (
        (124, small, set()),
        (160, {"backbone.res5"}, large),
        (800, set(), large | large_too | after),
    ):
        model.choose_convolutions(edge)
        assert ways(model) == dict.fromkeys(products, Product) | dict.fromkeys(filtered, Winograd)
