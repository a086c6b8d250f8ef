"""Compare the norms with float64 formulas, with torch and with each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults.launch import spawn
from torch import nn

from gndet.config.schema import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.norms import group_norm
from gndet.modeling.norms.layers import NORMS, BatchRenorm, GroupNorm, make_norm
from gndet.modeling.norms.valid_area import ValidArea

B, C, H, W = 3, 8, 6, 7


def layer(kind: str, **options: object) -> nn.Module:
    norm = make_norm(NormConfig(kind=kind, **({"groups": 4} | options)), C).double()
    if kind != "none":
        generator = torch.Generator().manual_seed(1)
        norm.weight.data = torch.randn(C, generator=generator).double()
        norm.bias.data = torch.randn(C, generator=generator).double()
    return norm


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def by_formula(x: torch.Tensor, axes: tuple[int, ...], groups: int, norm: nn.Module) -> torch.Tensor:
    """Return gamma (x - mu) / sqrt(var + eps) + beta, with statistics over axes of (B, G, C/G, H, W)."""
    grouped = x.view(B, groups, C // groups, H, W)
    mu = grouped.mean(axes, keepdim=True)
    var = ((grouped - mu) ** 2).mean(axes, keepdim=True)
    normal = ((grouped - mu) / (var + 1e-5).sqrt()).view(B, C, H, W)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize(
    ("kind", "axes", "groups"),
    [("gn", (2, 3, 4), 4), ("ln", (2, 3, 4), 1), ("in", (2, 3, 4), C), ("bn", (0, 3, 4), 1), ("sync_bn", (0, 3, 4), 1)],
)
def test_statistics_are_taken_over_the_paper_s_axes(kind: str, axes: tuple[int, ...], groups: int) -> None:
    norm = layer(kind)
    expected = by_formula(images(), axes, groups, norm)
    torch.testing.assert_close(norm(images()), expected, rtol=1e-10, atol=1e-10)


def test_one_group_is_ln_and_one_group_per_channel_is_in() -> None:
    x = images()
    torch.testing.assert_close(layer("gn", groups=1)(x), layer("ln")(x))
    torch.testing.assert_close(layer("gn", groups=C)(x), layer("in")(x))
    torch.testing.assert_close(layer("gn", channels_per_group=2)(x), layer("gn", groups=4)(x))


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_every_norm_keeps_shape_and_type_and_has_gamma_and_beta_per_channel(kind: str) -> None:
    norm = make_norm(NormConfig(kind=kind, groups=4), C)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = norm(images().to(dtype))
        assert y.shape == (B, C, H, W) and y.dtype == dtype
    if kind != "none":
        assert norm.weight.shape == norm.bias.shape == (C,)


@pytest.mark.parametrize("kind", ["gn", "ln", "in", "frozen_bn", "none"])
def test_masked_norm_of_a_padded_image_is_that_of_the_image_alone(kind: str) -> None:
    norm = layer(kind)
    sizes = torch.tensor([[6, 7], [4, 5], [1, 3]])
    area = ValidArea.of(sizes, H, W)
    y = norm(torch.where(area.mask, images(), 1e3), area)  # the padding must not matter
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = norm(images()[i : i + 1, :, :height, :width])
        torch.testing.assert_close(y[i : i + 1, :, :height, :width], alone, rtol=1e-10, atol=1e-10)
        assert y[i, :, height:].abs().sum() == 0 and y[i, :, :, width:].abs().sum() == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_masked_group_norm_has_the_gradient_of_its_formula(compiled: bool) -> None:
    """A CPU uses crops; a compiled graph (and a GPU) uses masks.  Both are tested."""
    norm, area = layer("gn"), ValidArea.of(torch.tensor([[6, 7], [4, 5], [2, 3]]), H, W)
    forward = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm

    def run(x: torch.Tensor) -> torch.Tensor:
        return forward(x, area)

    assert torch.autograd.gradcheck(run, images().requires_grad_())
    inside = torch.where(area.mask, images(), 0.0).requires_grad_()
    weights = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (run(inside) * weights).sum().backward()
    gamma, beta = norm.weight.grad.clone(), norm.bias.grad.clone()
    norm.zero_grad()
    for i, (height, width) in enumerate(area.sizes.tolist()):
        alone = F.group_norm(inside[i : i + 1, :, :height, :width], 4, norm.weight, norm.bias, norm.eps)
        (alone * weights[i : i + 1, :, :height, :width]).sum().backward()
    torch.testing.assert_close(gamma, norm.weight.grad)
    torch.testing.assert_close(beta, norm.bias.grad)


def test_plain_padding_lets_the_padding_in() -> None:
    norm, area = layer("gn", padding="plain"), ValidArea.of(torch.tensor([[4, 5]] * B), H, W)
    torch.testing.assert_close(norm(images(), area), norm(images()))


def test_group_norm_of_no_regions_at_all() -> None:
    assert make_norm(NormConfig(groups=4), C)(torch.zeros(0, C, 7, 7)).shape == (0, C, 7, 7)


def test_a_group_of_one_value_gives_beta_for_any_batch_size() -> None:
    layer = GroupNorm(4, groups=4, eps=1e-5, masked=False)
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x[:1]).flatten(), layer.bias) and torch.equal(layer(x)[:1], layer(x[:1]))


def test_frozen_bn_is_bn_in_evaluation_and_trains_nothing() -> None:
    reference, frozen = nn.BatchNorm2d(C).double(), layer("frozen_bn")
    reference(images(3))
    frozen.running_mean.copy_(reference.running_mean)
    frozen.running_var.copy_(reference.running_var)
    reference.weight.data, reference.bias.data = frozen.weight, frozen.bias
    torch.testing.assert_close(frozen(images()), reference.eval()(images()))
    assert not list(frozen.parameters())


def test_batch_renorm_starts_as_bn_and_later_follows_ioffe_s_formula() -> None:
    brn, bn = BatchRenorm(C).double(), nn.BatchNorm2d(C).double()
    torch.testing.assert_close(brn(images()), bn(images()))
    torch.testing.assert_close(brn.running_var, bn.running_var)
    brn.num_batches_tracked.fill_(40_000)  # r_max = 3, d_max = 5
    brn.running_mean.fill_(0.5)
    brn.running_var.fill_(9.0)
    x = images()
    mu = x.mean((0, 2, 3))
    sigma = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    r = (sigma / 9.00001**0.5).clamp(1 / 3, 3)
    d = ((mu - 0.5) / 9.00001**0.5).clamp(-5, 5)
    expected = (x - mu[:, None, None]) / sigma[:, None, None] * r[:, None, None] + d[:, None, None]
    torch.testing.assert_close(brn(x), expected)


def test_groups_that_do_not_divide_are_an_error_that_names_what_does() -> None:
    with pytest.raises(ConfigError, match=r"groups: 32 does not divide 48 channels.*16, 24, 48"):
        make_norm(NormConfig(groups=32), 48)
    with pytest.raises(ConfigError, match=r"channels_per_group: 32 does not divide 48"):
        make_norm(NormConfig(channels_per_group=32), 48)


def test_weight_standardization_makes_the_convolution_blind_to_scale_and_shift_of_its_weights() -> None:
    block = ConvNorm(3, C, 3, norm=NormConfig(groups=4, weight_standardization=True)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = block(x)
    weight = block.conv.weight
    standard = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.var(
        (1, 2, 3), correction=0, keepdim=True
    ).sqrt()
    torch.testing.assert_close(block.conv(x), F.conv2d(x, standard, padding=1))
    weight.data = 3 * weight.data + 0.7
    torch.testing.assert_close(block(x), before)


def test_a_convolution_has_a_bias_only_without_a_norm() -> None:
    assert ConvNorm(3, C, 3, norm=NormConfig(groups=4)).conv.bias is None
    assert ConvNorm(3, C, 3, norm=NormConfig(kind="none")).conv.bias is not None


def test_paper_default() -> None:
    norm = make_norm(NormConfig(), 64)
    assert isinstance(norm, GroupNorm) and norm.groups == 32 and norm.eps == 1e-5


def sync_bn_half(rank: int, rendezvous: str, outputs: str) -> None:
    """Run one of two ranks: normalize its half of the batch, save the result and the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    norm, x = layer("sync_bn"), images()[rank * 2 : rank * 2 + 2].requires_grad_()  # 2 images and 1
    y = norm(x)
    y.pow(3).sum().backward()
    torch.save({"y": y.detach(), "x": x.grad, "mean": norm.running_mean, "var": norm.running_var}, f"{outputs}/{rank}")
    dist.destroy_process_group()


def test_sync_bn_over_two_processes_is_bn_over_the_whole_batch(tmp_path: Path) -> None:
    spawn(sync_bn_half, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    halves = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    whole, x = layer("bn"), images().requires_grad_()
    y = whole(x)
    y.pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([half["y"] for half in halves]), y.detach())
    torch.testing.assert_close(torch.cat([half["x"] for half in halves]), x.grad)
    for half in halves:
        torch.testing.assert_close(half["mean"], whole.running_mean)
        torch.testing.assert_close(half["var"], whole.running_var)


def test_torch_s_own_kernels_get_channels_last_maps_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU assume the plain layout, and torch 2.11 refuses another."""
    seen = []

    def own(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        seen.append(x)
        return x, x.new_ones(B, 4), x.new_ones(B, 4)

    monkeypatch.setattr(torch, "native_group_norm", own)
    for device, layout in (("cpu", torch.channels_last), ("meta", torch.contiguous_format)):
        x = torch.empty(B, 16, H, W, device=device).contiguous(memory_format=torch.channels_last)
        gamma = torch.ones(16, device=device)
        group_norm.normalize(x, gamma, gamma, 4, 1e-5, None)
        assert seen[-1].is_contiguous(memory_format=layout)
