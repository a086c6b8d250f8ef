"""Stochastic depth: blocks are skipped as an image's key says, in training only, in every memory mode and graph."""

from typing import Any

import pytest
import torch
from models import make_batch, rows, small_model
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.valid_area import picture_areas
from gndet.modeling.recompute import set_memory
from gndet.modeling.resnet import Residual, ResNet
from gndet.structures import Batch
from gndet.training.side_by_side import add_gradients

SIZES = [(96, 128), (128, 97), (65, 80), (128, 128)]
KINDS: dict[str, dict[str, Any]] = {
    "resnet18d": {"depth": 18, "stem": "deep", "average_shortcuts": True},
    "resnext50": {"depth": 50, "cardinality": 32, "group_width": 4},
}


def backbone(rate: float, options: dict[str, Any] | None = None, kind: str = "gn") -> ResNet:
    torch.manual_seed(0)
    cfg = BackboneConfig(width=0.25, stochastic_depth=rate, **(options or {"depth": 18}))
    return ResNet(cfg, NormConfig(kind=kind, channels_per_group=8)).double()


def skipping(model: torch.nn.Module) -> list[Residual]:
    return [module for module in model.modules() if isinstance(module, Residual)]


def detector(rate: float) -> MaskRCNN:
    return small_model(backbone=BackboneConfig(depth=18, stochastic_depth=rate)).double().train()


def gradients(model: MaskRCNN, *batches: Batch) -> Tensor:
    model.zero_grad()
    for batch in batches:
        sum(model(batch).values()).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_rate_grows_linearly_from_zero_over_all_blocks() -> None:
    rates = [block.skipped for block in skipping(backbone(0.3, {"depth": 34}))]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])


def test_each_image_gets_the_shortcut_alone_or_the_scaled_convolutions() -> None:
    block = skipping(backbone(0.5))[-1].train()
    x, keys = torch.rand(64, 128, 4, 4, dtype=torch.float64), torch.arange(64) * 7919
    shortcut, convolved = x, block.conv2(block.conv1(x))
    found = block(x, None, None, keys)
    alone = (found == shortcut.relu()).flatten(1).all(1)
    assert 20 < alone.sum() < 44
    expected = torch.where(alone[:, None, None, None], shortcut, shortcut + convolved / 0.5).relu()
    assert torch.equal(found, expected)
    assert torch.equal(block(x[5:9], None, None, keys[5:9]), found[5:9])
    assert torch.equal(block.eval()(x, None, None, keys), (shortcut + convolved).relu())


def test_the_mean_over_images_is_that_of_evaluation_and_blocks_are_independent() -> None:
    keys, found = torch.arange(20_000) * 104_729, []
    for block in (skipping(backbone(0.4))[i].train() for i in (5, 7)):
        torch.nn.init.zeros_(block.last.norm.weight), torch.nn.init.ones_(block.last.norm.bias)
        channels = block.conv1.conv.in_channels
        with torch.no_grad():  # the shortcut is 0, the convolutions are 1
            found.append(block(torch.zeros(len(keys), channels, 1, 1).double(), None, None, keys)[:, 0, 0, 0])
    assert [x.mean().item() for x in found] == pytest.approx([1.0, 1.0], abs=0.03)
    shares = [(x == 0).double().mean().item() for x in found]
    assert shares == pytest.approx([0.4 * 5 / 7, 0.4], abs=0.01)
    assert ((found[0] == 0) & (found[1] == 0)).double().mean().item() == pytest.approx(0.4**2 * 5 / 7, abs=0.01)


@pytest.mark.parametrize("kind", ["gn", "frn", "evonorm_s0", "frozen_bn"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_image_has_the_same_maps_alone_and_in_a_batch(options: dict[str, Any], kind: str) -> None:
    model = backbone(0.7, options, kind).train()
    for tensor in (p for name, p in model.named_parameters() if name.endswith(("norm.weight", "norm.bias", "tau"))):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    batch = make_batch(SIZES)
    x = batch.images.double() / 100
    together = model(x, picture_areas(batch.sizes, 128, 128, True), batch.keys)
    calm = model(x, picture_areas(batch.sizes, 128, 128, True))
    assert (together[-1] - calm[-1]).norm() > 0.1 * calm[-1].norm()
    for i, (height, width) in enumerate(SIZES):
        areas = picture_areas(batch.sizes[i : i + 1], height, width, False)
        alone = model(x[i : i + 1, :, :height, :width], areas, batch.keys[i : i + 1])
        for small, large in zip(alone, together, strict=True):
            got = large[i, :, : small.shape[2], : small.shape[3]]
            assert (got - small[0]).norm() < 1e-12 * small.norm() and large[i].norm().isclose(got.norm())


def test_a_rate_of_zero_changes_no_bit_and_evaluation_skips_nothing() -> None:
    batch = make_batch(SIZES)
    plain, zero = detector(0.0), detector(0.0)
    features = plain.features(batch.images, batch.sizes, batch.padded)[0]
    for a, b in zip(features, zero.features(batch.images, batch.sizes, batch.padded, batch.keys)[0], strict=True):
        assert torch.equal(a, b)
    deep = detector(0.9).eval()
    assert torch.equal(deep.features(batch.images, batch.sizes, batch.padded, batch.keys)[0][0], features[0])
    assert torch.equal(gradients(detector(0.0), batch), gradients(plain, batch))


def test_accumulation_and_images_side_by_side_give_the_gradient_of_one_batch() -> None:
    model, batch = detector(0.6), make_batch(SIZES * 2)
    whole = gradients(model, batch)
    assert (gradients(model, *(rows(batch, i, i + 2) for i in (0, 2, 4, 6))) - whole).norm() < 1e-9 * whole.norm()
    model.zero_grad()
    parts = [rows(batch, i, i + 4) for i in (0, 4)]
    add_gradients(lambda part: {name: loss.sum() for name, loss in model(part).items()}, parts, model)
    threads = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (threads - whole).norm() < 1e-9 * whole.norm()


@pytest.mark.parametrize("memory", ["balanced", "lean"])
@pytest.mark.parametrize("depth", [18, 50])
def test_recomputation_draws_the_same(memory: str, depth: int) -> None:
    model, batch = backbone(0.6, {"depth": depth}).train(), make_batch(SIZES)
    areas, results = picture_areas(batch.sizes, 128, 128, True), []
    for chosen in ("fast", memory):
        set_memory(model, chosen)
        model.zero_grad()
        sum(x.square().mean() for x in model(batch.images.double() / 100, areas, batch.keys)).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[1] - results[0]).norm() < 1e-9 * results[0].norm()


def test_the_global_generator_is_left_alone_and_the_forward_is_one_graph() -> None:
    model, batch = backbone(0.5).train(), make_batch(SIZES)
    arguments = batch.images.double() / 100, picture_areas(batch.sizes, 128, 128, True), batch.keys
    before = torch.get_rng_state()
    model(*arguments)
    assert torch.equal(torch.get_rng_state(), before)
    explained = torch._dynamo.explain(model)(*arguments)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_frozen_stage_skips_nothing() -> None:
    blocks = skipping(ResNet(BackboneConfig(depth=18, freeze_at=2, stochastic_depth=0.5), NormConfig()).train())
    assert [block.training for block in blocks] == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"backbone": {"kind": "vgg", "depth": 16}}, "only resnet has residual blocks"),
        ({"backbone": {"kind": "timm", "name": "regnety_016"}}, "only resnet has residual blocks"),
        ({"backbone": {}, "neck": "c4"}, "skips no block on the regions of neck: c4"),
    ],
)
def test_networks_without_blocks_to_skip_refuse_it(model: dict[str, Any], said: str) -> None:
    model["backbone"]["stochastic_depth"] = 0.1
    with pytest.raises(ValueError, match=said):
        ModelConfig(**model)
