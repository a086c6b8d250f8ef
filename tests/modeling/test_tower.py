"""What a tower keeps for the backward pass changes the memory and nothing else."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import make_batch, small_config, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gndet.config.norm import NormConfig
from gndet.modeling import recompute
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.valid_area import ValidArea
from gndet.modeling.recompute import keeping_all, set_memory, tower
from gndet.training.memory import TensorBytes

NORMS = {
    "gn": NormConfig(groups=4), "ln": NormConfig(kind="ln"), "in": NormConfig(kind="in"),
    "ws": NormConfig(groups=4, weight_standardization=True), "frozen_bn": NormConfig(kind="frozen_bn"),
    "none": NormConfig(kind="none"),
}  # fmt: skip
KERNELS = {"a bottleneck": (1, 3, 1), "a basic block": (3, 3), "a lateral": (1,)}
MODES = ("fast", "balanced", "lean")


def conv_norms(norm: NormConfig, kernels: Sequence[int], *, residual: bool, regions: bool = False) -> nn.ModuleList:
    """Build layers of 16 channels in float64, with random gamma, beta and running statistics."""
    torch.manual_seed(0)
    last = len(kernels) - 1
    layers = nn.ModuleList(
        ConvNorm(16, 16, k, norm, relu=not (residual and i == last), regions=regions) for i, k in enumerate(kernels)
    )
    for name, tensor in layers.state_dict().items():
        if tensor.dim() == 1 and "var" not in name:
            tensor.normal_(std=0.3).add_(float(name.endswith("norm.weight")))
    return layers.double()


def results(
    layers: nn.ModuleList, x: Tensor, area: ValidArea | None, residual: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Return the result, and the gradients of x, the residual and all parameters."""
    inputs = [x.clone().requires_grad_()] + ([] if residual is None else [residual.clone().requires_grad_()])
    y = tower(layers, inputs[0], [area] * len(layers), *inputs[1:])
    return [y, *torch.autograd.grad(y, [*inputs, *layers.parameters()], grad)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_tower_gives_what_its_layers_give(
    norm: NormConfig, kernels: tuple[int, ...], padded: bool, residual: bool
) -> None:
    layers = conv_norms(norm, kernels, residual=residual)
    x, residual_map, grad = torch.randn(3, 3, 16, 9, 11, dtype=torch.float64).unbind()
    area = ValidArea.of(torch.tensor([[9, 11], [7, 11], [9, 4]]), 9, 11) if padded else None
    if padded:
        x, residual_map = torch.where(area.mask, x, 0.0), torch.where(area.mask, residual_map, 0.0)
    plain = results(layers, x, area, residual_map if residual else None, grad)
    for memory in ("balanced", "lean"):
        set_memory(layers, memory)
        found = results(layers, x, area, residual_map if residual else None, grad)
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


def test_the_padding_affects_nothing() -> None:
    layers = conv_norms(NORMS["gn"], (3, 3), residual=False)
    set_memory(layers, "balanced")
    area = ValidArea.of(torch.tensor([[5, 6]]), 9, 11)
    x, grad = torch.randn(1, 16, 9, 11).double(), torch.randn(1, 16, 9, 11).double()
    clean = results(layers, torch.where(area.mask, x, 0.0), area, None, torch.where(area.mask, grad, 0.0))
    dirty = results(layers, torch.where(area.mask, x, 0.0), area, None, torch.where(area.mask, grad, torch.inf))
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_regions_run_in_chunks_and_independently() -> None:
    layers = conv_norms(NORMS["gn"], (3, 3, 3), residual=False, regions=True)
    x, grad = torch.randn(2, 150, 16, 7, 7, dtype=torch.float64).unbind()  # more than one part
    plain = results(layers, x, None, None, grad)
    set_memory(layers, "balanced")
    torch.testing.assert_close(results(layers, x, None, None, grad), plain, rtol=1e-10, atol=1e-10)
    alone = results(layers, x[140:141], None, None, grad[140:141])
    together = results(layers, x, None, None, grad)
    torch.testing.assert_close(alone[:2], [tensor[140:141] for tensor in together[:2]])


def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    layers = conv_norms(NORMS["gn"], (3,), residual=False)
    set_memory(layers, "balanced")
    source, made = torch.randn(2, 16, 6, 6, dtype=torch.float64), []

    def make() -> Tensor:
        made.append(1)
        return 2 * source

    grad = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    kept = torch.autograd.grad(tower(layers, 2 * source), list(layers.parameters()), grad)
    recomputed = torch.autograd.grad(tower(layers, make(), make_input=make), list(layers.parameters()), grad)
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)
    assert len(made) == 2


def losses_and_gradients(model: MaskRCNN, memory: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    set_memory(model, memory)
    model.zero_grad()
    losses = model(make_batch([(96, 128), (128, 80)]))
    sum(loss.sum() for loss in losses.values()).backward()
    return losses, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    "norm", [NormConfig(channels_per_group=16), NormConfig(kind="frozen_bn")], ids=["gn", "frozen"]
)
@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_every_option_gives_the_same_losses_and_gradients(norm: NormConfig, depth: int) -> None:
    backbone = small_config(norm).backbone.model_copy(update={"depth": depth})
    model = small_model(norm, backbone=backbone).double()
    plain = losses_and_gradients(model, "fast")
    for memory in ("balanced", "lean"):
        torch.testing.assert_close(losses_and_gradients(model, memory), plain, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("memory", MODES)
def test_running_statistics_see_a_batch_once(memory: str) -> None:
    model = small_model(NormConfig(kind="bn"))
    losses_and_gradients(model, memory)
    assert {int(value) for name, value in model.state_dict().items() if name.endswith("batches_tracked")} == {1}


def kept_bytes(model: MaskRCNN, memory: str) -> int:
    """Return the bytes of the backbone's tensors that are alive between the forward and the backward pass."""
    set_memory(model, memory)
    x = torch.randn(1, 3, 192, 256)
    with TensorBytes(1 << 40) as counted:
        features = model.backbone(x, dict.fromkeys((2, 4, 8, 16, 32, 64)))
    assert len(features) == 4
    return counted.live


@pytest.mark.parametrize(("depth", "balanced_share", "lean_share"), [(50, 0.4, 0.4), (18, 0.6, 0.3)])
def test_each_option_keeps_less_than_the_one_before(depth: int, balanced_share: float, lean_share: float) -> None:
    model = small_model(backbone=small_config().backbone.model_copy(update={"depth": depth}))
    fast, balanced, lean = (kept_bytes(model, memory) for memory in MODES)
    assert lean <= balanced
    assert balanced < balanced_share * fast
    assert lean < lean_share * fast


def test_hooks_see_every_module_while_all_is_kept() -> None:
    model, seen = small_model(), []
    set_memory(model, "lean")
    model.backbone.res2[0].conv1.norm.register_forward_hook(lambda *_: seen.append(1))
    with keeping_all(model):
        model(make_batch([(64, 64)]))
    assert seen == [1]
    assert model.backbone.memory == model.backbone.res2[0].conv1.memory == "lean"


def test_mixed_precision_keeps_float32_statistics_and_half_of_the_bytes() -> None:
    layers = conv_norms(NORMS["gn"], (3, 3), residual=False).float()
    x = torch.randn(2, 16, 12, 12)
    exact = tower(layers, x + 100)
    set_memory(layers, "balanced")
    with torch.autocast("cpu", torch.bfloat16):
        y = tower(layers, x + 100)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.05 * exact.norm()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layers.parameters())


class Copies(TorchDispatchMode):
    """Counts the operators that cast tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_all_weights_of_a_tower_are_cast_at_once_and_a_frozen_one_gets_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = conv_norms(NORMS["gn"], (1, 3, 1), residual=False).float()
    layers[0].conv.weight.requires_grad_(False)
    set_memory(layers, "balanced")
    x, copies, found = torch.randn(2, 16, 12, 12, dtype=torch.bfloat16), Copies(), []
    for cast in (
        recompute._weights_as,
        lambda dtype, tensors: [t if i % 4 > 1 or t is None else t.to(dtype) for i, t in enumerate(tensors)],
    ):
        monkeypatch.setattr(recompute, "_weights_as", cast)
        layers.zero_grad()
        with copies, torch.autocast("cpu", torch.bfloat16):
            tower(layers, x).square().sum().backward()
        found.append([parameter.grad for parameter in layers.parameters() if parameter.grad is not None])
        if len(found) == 1:
            assert sum("_foreach_copy_" in name for name in copies.names) == 2  # forward and backward
    assert len(found[0]) == 2 + 3 * 2  # two weights, three pairs of gamma and beta
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
