"""Without gradients, a convolution includes a norm of stored statistics, the residual and ReLU, in one pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gndet.config.norm import NormConfig
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.norms.valid_area import ValidArea
from gndet.ops.conv3x3 import Convolution, Product, Winograd
from gndet.ops.fused_conv import usable

KINDS = ("frozen_bn", "bn", "sync_bn", "brn", "none")


def layer_of(kind: str, kernel: int = 3, stride: int = 1, channels: int = 64, *, relu: bool = True) -> ConvNorm:
    """Build a layer in evaluation mode, with random gamma, beta, bias and statistics."""
    torch.manual_seed(0)
    layer = ConvNorm(channels, channels, kernel, NormConfig(kind=kind), stride=stride, relu=relu).eval()
    for name, tensor in layer.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 2.0) if "var" in name else tensor.normal_().add_(float(name.endswith("norm.weight")))
    return layer


def maps(num: int = 2, channels: int = 64, height: int = 13, width: int = 18, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, channels, height, width, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


class Operators(TorchDispatchMode):
    """Count the operators that return a map of a given size."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.names = shape, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("way", [Convolution, Winograd, Product])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_convolution_norm_residual_and_relu_in_float64(
    kind: str, kernel: int, stride: int, residual: bool, padded: bool, way: type[Convolution]
) -> None:
    layer = layer_of(kind, kernel, stride, relu=not residual)
    if kernel == 3 and (stride == 1 or way is not Winograd):
        layer.way = way
    x, added = maps(), maps(height=-(-13 // stride), width=-(-18 // stride), seed=2) if residual else None
    area = ValidArea.of(torch.tensor([[5, 9], [3, 4]]), -(-13 // stride), -(-18 // stride)) if padded else None
    with torch.inference_mode():
        assert usable(x)
        y = layer(x, area, added)
        wide = layer.double()
        expected = wide.norm(nn.functional.conv2d(x.double(), wide.conv.weight, wide.conv.bias, stride, kernel // 2))
        if area is not None and getattr(layer.norm, "masked", False):
            expected = torch.where(area.mask, expected, 0.0)
            if added is not None:
                added = torch.where(area.mask, added, 0.0)  # as the result of an earlier masked layer is
        expected = (expected if added is None else expected + added).relu()
    if area is not None and getattr(layer.norm, "masked", False):
        assert not torch.where(area.mask, 0.0, y).any()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("residual", [False, True])
def test_nan_stays_nan(residual: bool) -> None:
    layer, x = layer_of("frozen_bn", 1), maps(1)
    x[0, 3, 4, 5] = torch.nan
    with torch.inference_mode():
        y = layer(x, None, maps(1, seed=2) if residual else None)
    assert y[0, :, 4, 5].isnan().all() and int(y.isnan().sum()) == y.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_does_not_depend_on_the_others_of_its_batch(kind: str) -> None:
    layer, x, other = layer_of(kind), maps(), maps(seed=3)
    with torch.inference_mode():
        mixed = torch.cat([x[:1], 1e3 * other[1:]]).contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer(x)[0], layer(mixed)[0])


@pytest.mark.parametrize(("residual", "passes"), [(False, 1), (True, 2)])
def test_the_map_is_passed_over_once_and_once_more_for_a_relu_after_a_residual(residual: bool, passes: int) -> None:
    layer, x, added = layer_of("bn"), maps(), maps(seed=2) if residual else None
    with torch.inference_mode(), Operators(x.shape) as operators:
        layer(x, None, added)
    assert len(operators.names) == passes, operators.names
    with torch.enable_grad(), Operators(x.shape) as separate:
        layer(x, None, added)
    assert len(separate.names) > passes + 1


def test_a_hook_of_the_norm_sees_its_maps_and_training_statistics_stay_those_of_the_batch() -> None:
    layer, x, seen = layer_of("bn"), maps(), list[Tensor]()
    hook = layer.norm.register_forward_pre_hook(lambda norm, arguments: seen.append(arguments[0].clone()))
    with torch.inference_mode():
        layer(x)
        hook.remove()
        layer(x)
        torch.testing.assert_close(seen, [layer.conv(x)])
        trained = layer.train()(x)
    assert not torch.allclose(trained, layer.eval()(x))


def test_under_autocast_it_computes_in_bf16_if_the_cpu_does() -> None:
    layer, x = layer_of("frozen_bn"), maps()
    with torch.inference_mode():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, None, maps(seed=2).bfloat16() * 0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())
