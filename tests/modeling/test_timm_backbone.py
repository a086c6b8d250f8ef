"""Networks of timm: timm's maps at the same weights, functions of each picture alone; other networks are refused."""

import sys
from typing import Any

import pytest
import torch
from models import make_batch, small_config
from torch import Tensor, nn

from gndet.config.model import ClassifierConfig, ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.norms.layers import GroupNorm
from gndet.modeling.norms.valid_area import clear_padding, picture_areas
from gndet.modeling.recompute import set_memory
from gndet.modeling.timm_backbone import TimmBackbone
from gndet.toolbox.invariance.leaks import find_leaks

timm: Any = pytest.importorskip("timm")

FAMILIES = (  # the smallest network of each
    "resnet18", "resnext26ts", "regnetx_002", "regnety_002", "densenet121", "efficientnet_b0", "mobilenetv3_small_050",
    "convnext_atto",
)  # fmt: skip
OTHERS = ("convnextv2_atto", "seresnext26d_32x4d", "mobilenetv4_conv_small", "test_resnet", "resnetv2_18d")
PRE_ACTIVATION = ("resnetv2_50d_gn", "resnetv2_50x1_bit")  # GN from the start; BiT standardizes its weights
GN8 = NormConfig(channels_per_group=8)  # divides the channels of all families
SIZES = [(70, 52), (45, 90)]


def backbone(name: str, norm: NormConfig = GN8, **options: object) -> TimmBackbone:
    """Build a backbone in float64 whose norms and layer scales do something."""
    torch.manual_seed(0)
    built = TimmBackbone(BackboneConfig(kind="timm", name=name, **options), norm).double()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for key, buffer in built.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return built


def padded(seed: int = 0) -> tuple[Tensor, dict]:
    """Return two pictures on one canvas, and their areas."""
    areas = picture_areas(torch.tensor(SIZES), 96, 96, True)
    generator = torch.Generator().manual_seed(seed)
    return clear_padding(torch.randn(2, 3, 96, 96, generator=generator, dtype=torch.float64), areas[1]), areas


@pytest.mark.parametrize("name", FAMILIES)
def test_with_bn_the_maps_are_timms(name: str) -> None:
    ours = backbone(name, NormConfig(kind="bn")).eval()
    theirs = timm.create_model(name).double().eval()
    names = ours.timm_names()
    state = {names[key]: tensor for key, tensor in ours.state_dict().items()}
    assert set(state) <= set(theirs.state_dict())
    theirs.load_state_dict(theirs.state_dict() | state)
    x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    found = ours(x, picture_areas(torch.tensor([(96, 128)] * 2), 96, 128, False))
    assert [tuple(level.shape[2:]) for level in found] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert ours.channels == tuple(level.shape[1] for level in found)
    by_shape = {level.shape: level for level in theirs.forward_intermediates(x, intermediates_only=True)}
    for level in found:
        assert torch.allclose(level, by_shape[level.shape], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", [*FAMILIES, *OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in PRE_ACTIVATION)]
)
def test_a_picture_is_computed_as_if_alone(name: str) -> None:
    built = backbone(name)
    assert max(built.differences()) < 1e-13
    x, areas = padded()
    together = built(x, areas)
    for i, (height, width) in enumerate(SIZES):
        alone = built(
            x[i : i + 1, :, :height, :width], picture_areas(torch.tensor(SIZES[i : i + 1]), height, width, False)
        )
        for small, large in zip(alone, together, strict=True):
            rows, columns = small.shape[2:]
            assert torch.allclose(large[i, :, :rows, :columns], small[0], rtol=1e-10, atol=1e-10)
            assert not large[i, :, rows:].any() and not large[i, :, :, columns:].any()


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_050", "convnext_atto"])
def test_its_gradients_reach_no_other_picture(name: str) -> None:
    built = backbone(name)
    x, areas = padded()
    x.requires_grad_()
    sum(level[0].square().sum() for level in built(x, areas)).backward()
    assert x.grad[0].any() and not x.grad[1].any()


def test_the_norms_of_timm_become_the_configs_and_layer_norms_stay() -> None:
    for name in ("regnety_002", "test_resnet"):
        kinds = {type(module) for module in backbone(name).modules()}
        assert GroupNorm in kinds and not kinds & {nn.BatchNorm2d, nn.GroupNorm}
    kinds = {type(module).__name__ for module in backbone("convnext_atto").modules()}
    assert "LayerNorm2d" in kinds and "GroupNorm" not in kinds


def test_the_gn_of_a_pre_activation_network_is_replaced_and_its_standardized_convolutions_stay() -> None:
    modules = list(backbone("resnetv2_50x1_bit").modules())
    assert {type(module).__name__ for module in modules if isinstance(module, nn.Conv2d)} == {"StdConv2d"}
    norms = [module for module in modules if type(module).__name__.startswith("GroupNorm")]
    assert len(norms) == 48 and all(type(norm) is GroupNorm and norm.masked for norm in norms)


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050"])
def test_gradients_do_not_depend_on_what_is_kept(name: str) -> None:
    built = backbone(name).train()
    x, areas = padded()
    gradients = []
    for memory in ("fast", "balanced", "lean"):
        set_memory(built, memory)
        built.zero_grad()
        sum(level.square().mean() for level in built(x, areas)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in built.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_less_is_kept_for_the_backward_pass() -> None:
    built, (x, areas) = backbone("regnety_002").train(), padded()
    kept = {}
    for memory in ("fast", "lean"):
        set_memory(built, memory)
        sizes: dict[int, int] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.update({x.untyped_storage().data_ptr(): x.nbytes}) or x, lambda x: x
        )
        with hooks:
            levels = built(x, areas)
        kept[memory] = sum(sizes.values())
        del levels
    assert kept["lean"] < kept["fast"] / 2


@pytest.mark.parametrize("norm", [NormConfig(kind="bn"), NormConfig(padding="plain", channels_per_group=8)], ids=str)
def test_what_was_accepted_is_not_checked(norm: NormConfig) -> None:
    backbone("tf_mobilenetv3_small_minimal_100", norm).check()


def test_a_network_whose_maps_depend_on_the_batch_is_refused_by_name() -> None:
    built = backbone("tf_mobilenetv3_small_minimal_100")  # pads by the canvas's side
    assert max(built.differences()) > 1e-3
    with pytest.raises(ConfigError, match=r"tf_mobilenetv3_small_minimal_100.*C2 of a picture.*padding: plain"):
        built.check()


def test_a_leak_in_one_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pooling of squeeze-and-excitation, over the whole canvas."""
    monkeypatch.setattr("gndet.modeling.traced._Rewriter._is_mean", lambda self, node: False)
    with pytest.raises(ConfigError, match="C2 of a picture"):
        backbone("regnety_002").check()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_transformer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} does not give maps at strides 4, 8, 16 and 32"):
        backbone(name)


@pytest.mark.parametrize("name", ["regnety_17", "hf_hub:timm/resnet18", "local-dir:/tmp", "resnet18.no_such_weights"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name: timm has no network"):
        backbone(name)


def test_without_timm_the_command_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"model\.backbone: kind: timm needs timm: pip install timm"):
        build_model(ModelConfig(backbone=BackboneConfig(kind="timm", name="resnet18")), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": {"kind": "timm"}}, "needs the name"),
        ({"backbone": {"name": "resnet18"}}, "needs the name"),
        ({"backbone": {"kind": "timm", "name": "resnet18", "cardinality": 32}}, "cardinality: kind: timm has no such"),
        ({"backbone": {"kind": "timm", "name": "resnet18"}, "norm": {"kind": "frn"}}, "norm kind: frn"),
        ({"backbone": {"kind": "timm", "name": "resnet18", "norm": {"kind": "none"}}}, "norm kind: none"),
    ],
)
def test_options_of_other_backbones_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(options)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups: 32 does not divide 24 channels"):
        backbone("regnety_002", NormConfig())


@pytest.mark.parametrize(
    ("name", "freeze_at"), [("regnety_002", 1), ("regnety_002", 3), ("convnext_atto", 2), ("resnetblur18", 3)]
)
def test_frozen_layers_are_those_up_to_the_level(name: str, freeze_at: int) -> None:
    built, (x, areas) = backbone(name, freeze_at=freeze_at).train(), padded()
    levels = built(x, areas)
    trained = [level.requires_grad for level in levels]
    assert trained == [number > freeze_at for number in (2, 3, 4, 5)] if freeze_at > 1 else all(trained)
    stem = {"regnety_002": "stem.conv", "convnext_atto": "stem.0", "resnetblur18": "conv1"}[name]
    assert not built.net.get_submodule(stem).weight.requires_grad
    assert all(not part.training for part in built.frozen) and built.training


def test_a_gamma_of_zero_is_timms_only_if_asked_for() -> None:
    for asked in (True, False):
        torch.manual_seed(0)
        cfg = BackboneConfig(kind="timm", name="resnet18", zero_init_last_gamma=asked)
        gammas = [module.weight for module in TimmBackbone(cfg, GN8).modules() if isinstance(module, GroupNorm)]
        assert sum(not gamma.any() for gamma in gammas) == (8 if asked else 0)


@pytest.mark.parametrize("name", ["regnety_002", pytest.param("convnextv2_atto", marks=pytest.mark.slow)])
def test_a_detector_on_it_has_no_leak(name: str) -> None:
    cfg = small_config(GN8).model_copy(update={"backbone": BackboneConfig(kind="timm", name=name)})
    torch.manual_seed(0)
    model = build_model(cfg, 5).double().train()
    sizes = [(96, 64), (64, 110), (128, 128)]
    singles = [make_batch([size], first=i) for i, size in enumerate(sizes)]
    assert find_leaks(model, singles, make_batch(sizes)) == []


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("regnety_002", marks=pytest.mark.slow)])
def test_the_forward_is_one_graph(name: str) -> None:
    """That of a detector behind its maps is one graph with any backbone."""
    built = backbone(name).float().train()

    def forward(x: Tensor, sizes: Tensor) -> list[Tensor]:
        return built(x, picture_areas(sizes, 96, 96, True))

    explained = torch._dynamo.explain(forward)(padded()[0].float(), torch.tensor(SIZES))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_classifier_can_have_it() -> None:
    cfg = ModelConfig(
        detector="classifier", masks=False, norm=GN8, classifier=ClassifierConfig(),
        backbone=BackboneConfig(kind="timm", name="regnety_002"),
    )  # fmt: skip
    model = build_model(cfg, 3)
    assert model.classify(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]), False).shape == (1, 3)
