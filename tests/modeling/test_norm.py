"""Compare the norms with float64 formulas, with torch and with each other."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults.launch import spawn
from models import make_batch, rows, small_model
from torch import nn

from gndet.config.norm import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.conv_norm import ConvNorm, StandardizedConv2d, standardized_once
from gndet.modeling.norms import group_norm
from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.norms.layers import NORMS, BatchRenorm, GroupNorm, make_norm
from gndet.modeling.norms.valid_area import ValidArea

B, C, H, W = 3, 8, 6, 7
MASKABLE = sorted(set(NORMS) - {"bn", "sync_bn", "brn"})


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


@pytest.mark.parametrize("kind", MASKABLE)
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


@pytest.mark.parametrize("kind", ["bn", "sync_bn"])
def test_bn_of_one_value_names_the_option_and_the_way_on(kind: str) -> None:
    norm, x = layer(kind), images()[:1, :, :1, :1]
    with pytest.raises(ConfigError, match=r"train\.images_per_gpu: 1 .* no variance; .*model\.norm\.kind: gn"):
        norm.train()(x)
    assert norm.train()(images()[:2, :, :1, :1]).isfinite().all() and norm.eval()(x).isfinite().all()
    norm.running_mean = norm.running_var = None  # as evaluation.batch_statistics leaves it
    with pytest.raises(ConfigError, match=r"evaluation\.images_per_gpu: 1 .* leave out evaluation\.batch_statistics"):
        norm(x)


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["frn", "evonorm_s0"])
def test_frn_and_evonorm_have_the_formula_and_the_gradient_of_their_papers(kind: str, padded: bool) -> None:
    norm, sizes = layer(kind, eps=0.3), [(6, 7), (4, 5), (1, 3)] if padded else [(H, W)] * B
    if kind == "evonorm_s0":
        norm.v.data = torch.linspace(-2, 2, C).double()
    area = ValidArea.of(torch.tensor(sizes), H, W) if padded else None
    x, y = images().numpy(), norm(images(), area).detach().numpy()
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for b, (height, width) in enumerate(sizes):
        for c in range(C):
            own, group = x[b, c, :height, :width], x[b, c // 2 * 2 : c // 2 * 2 + 2, :height, :width]
            if kind == "frn":  # Singh & Krishnan 2020: nu^2 is the mean of the squares
                expected = own / np.sqrt(np.sum(own**2) / own.size + 0.3)
            else:  # Liu et al. 2020: x sigmoid(v x) / std of the group
                gate = 1 / (1 + np.exp(-norm.v[c].item() * own))
                expected = own * gate / np.sqrt(np.sum((group - group.mean()) ** 2) / group.size + 0.3)
            np.testing.assert_allclose(y[b, c, :height, :width], gamma[c] * expected + beta[c], rtol=1e-12, atol=1e-12)
    names = [name for name, _ in norm.named_parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x, area))

    assert torch.autograd.gradcheck(run, (images().requires_grad_(), *norm.parameters()))


@pytest.mark.parametrize("kind", ["gn", "frn", "evonorm_s0"])
def test_the_activation_follows_the_norm_at_once_or_the_addition(kind: str) -> None:
    """FRN's is max(x, tau).  EvoNorm-S0 is its own; without it there is no norm, and ReLU follows the addition."""
    x, residual = images(), images(7)
    first, plain, last = (
        ConvNorm(C, C, 1, norm=NormConfig(kind=kind, groups=4), relu=relu, adds=adds).double()
        for relu, adds in ((True, False), (False, False), (False, True))
    )
    for conv in (first, plain, last):
        conv.load_state_dict(first.state_dict(), strict=False)
        if conv.tlu is not None:
            conv.tlu.tau.data.fill_(-0.4)
    maps = F.conv2d(x, first.conv.weight)
    normed = {"evonorm_s0": maps}.get(kind, first.norm(maps))
    low = -0.4 if kind == "frn" else 0.0
    torch.testing.assert_close(first(x), first.norm(maps) if kind == "evonorm_s0" else normed.clamp(min=low))
    torch.testing.assert_close(plain(x), normed)
    torch.testing.assert_close(last(x, None, residual), (normed + residual).clamp(min=low))
    assert [conv.tlu is not None for conv in (first, plain, last)] == [kind == "frn", False, kind == "frn"]


@pytest.mark.parametrize("kind", ["frn", "evonorm_s0"])
def test_features_with_negative_activations_do_not_depend_on_the_batch(kind: str) -> None:
    """The zeros in the padding must not win in the stem's max pooling."""
    sizes = [(96, 128), (65, 80)]
    model, batch = small_model(NormConfig(kind=kind, channels_per_group=16)).double(), make_batch(sizes)
    for name, tensor in model.named_parameters():
        if name.endswith((".tau", "norm.bias")):
            tensor.data.fill_(-0.5)
    together, _ = model.features(batch.images, batch.sizes, batch.padded)
    for row, (height, width) in enumerate(sizes):
        alone = rows(batch, row, row + 1)
        expected, _ = model.features(alone.images[:, :, :height, :width], alone.sizes, False)
        for level, features in zip(together, expected, strict=True):
            found = level[row : row + 1, :, : features.shape[2], : features.shape[3]]
            torch.testing.assert_close(found, features, rtol=1e-10, atol=1e-10)


VIDEO = {
    "gn": lambda: nn.GroupNorm(4, C), "ln": lambda: nn.GroupNorm(1, C), "in": lambda: nn.InstanceNorm3d(C, affine=True),
    "bn": lambda: nn.BatchNorm3d(C), "sync_bn": lambda: nn.BatchNorm3d(C), "brn": lambda: nn.BatchNorm3d(C),
    "frozen_bn": lambda: nn.BatchNorm3d(C).eval(), "none": nn.Identity,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_norms_of_videos_are_torch_s_or_those_of_the_frames_side_by_side(kind: str) -> None:
    x, weights = torch.randn(2, 2, C, 3, 4, 5, dtype=torch.float64).unbind()
    norm = layer(kind)
    reference = VIDEO[kind]().double() if kind in VIDEO else copy.deepcopy(norm)
    if kind in VIDEO and kind != "none":
        reference.weight.data, reference.bias.data = norm.weight.data, norm.bias.data

    def results(module: nn.Module, maps: torch.Tensor) -> list[torch.Tensor]:
        y = module(maps.requires_grad_()).view_as(x)
        parameters = [getattr(module, name) for name, _ in norm.named_parameters()]
        grad_x, *others = torch.autograd.grad((y * weights).sum(), [maps, *parameters])
        return [y, grad_x.view_as(x), *others]

    expected = results(reference, x.clone() if kind in VIDEO else x.flatten(2, 3))
    torch.testing.assert_close(results(norm, x.clone()), expected, rtol=1e-10, atol=1e-10)
    if kind in MASKABLE:
        with pytest.raises(ValueError, match="cannot be padded"):
            norm(x, ValidArea.of(torch.tensor([[4, 5]] * 2), 4, 5))


def test_the_kernels_take_no_videos() -> None:
    """Not even in a layout that looks like channels last."""
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32, dim=lambda: 5, is_contiguous=lambda **_: True)
    assert not norm_kernels.usable(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (6, 5, 1, 1)])
def test_weight_standardization_has_the_formula_and_the_gradient_of_its_papers(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    weight = torch.randn(shape, dtype=torch.float64).add(0.3).contiguous(memory_format=layout)
    standard = StandardizedConv2d.standardize(weight)
    rows = weight.reshape(shape[0], -1).numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-10)
    np.testing.assert_allclose(standard.reshape(shape[0], -1).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert standard.is_contiguous(memory_format=layout)
    rounded = StandardizedConv2d.standardize(weight.float())
    torch.testing.assert_close(rounded, standard.float(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(StandardizedConv2d.standardize, weight.requires_grad_())


def test_weight_standardization_as_in_qiaos_code_divides_by_the_unbiased_deviation() -> None:
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    rows = weight.reshape(8, -1).numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-5)
    block = ConvNorm(3, 8, 3, norm=NormConfig(groups=4, weight_standardization=True, standardization="qiao")).double()
    block.conv.weight.data.copy_(weight)
    np.testing.assert_allclose(block.weight().detach().reshape(8, -1).numpy(), expected, rtol=1e-12)
    with standardized_once(block) as shared:
        np.testing.assert_allclose(shared[block.conv.weight].detach().reshape(8, -1).numpy(), expected, rtol=1e-12)
    constant = StandardizedConv2d.standardize(torch.ones(2, 3, 3, 3), "qiao")
    assert not constant.any() and constant.isfinite().all()


def test_weights_that_are_standardized_once_get_the_gradient_of_all_passes() -> None:
    norm = NormConfig(kind="none", weight_standardization=True)
    model = nn.ModuleList(ConvNorm(3, C, 3, norm=norm).double() for _ in range(3))
    model[2].conv.weight.requires_grad_(False)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def passes() -> None:
        for part in x.split(1):
            (model[0](part).square() * model[2](part)).sum().backward()  # the second is not used

    passes()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with standardized_once(model) as shared:
        assert shared.keys() == {block.conv.weight for block in model}
        passes()
        assert model[0].conv.weight.grad is None
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    model[0].conv.weight.data *= 2
    assert all(block.conv.shared is None for block in model)


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
