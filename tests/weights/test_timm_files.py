"""Weights of timm: a network by its name, and ResNets that gndet builds itself, in both directions."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gndet.config.loading import config_from_dict
from gndet.config.model import ClassifierConfig, ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.norms.valid_area import picture_areas
from gndet.modeling.resnet import ResNet
from gndet.modeling.timm_backbone import TimmBackbone
from gndet.weights.foreign.export import export_weights
from gndet.weights.load import initial_model
from gndet.weights.read import read_source

timm: Any = pytest.importorskip("timm")

DEEP = ("resnet18d", "resnet50d")
BN_NETWORK, LN_NETWORK = "regnety_002", "convnext_atto"


def network(name: str) -> nn.Module:
    """Build a network of timm in evaluation mode whose norms do something."""
    torch.manual_seed(0)
    built = timm.create_model(name)
    with torch.no_grad():
        for key, tensor in [*built.named_parameters(), *built.named_buffers()]:
            if key.endswith("running_var") or (tensor.dim() == 1 and key.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("running_mean", "bias")):
                tensor.uniform_(-0.3, 0.3)
    return built.eval()


def saved(folder: Path, net: nn.Module) -> str:
    path = folder / "model.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, path)
    return str(path)


def config(path: str, name: str, norm: dict[str, Any], policy: str = "error", **model: Any) -> Config:
    model = {"backbone": {"kind": "timm", "name": name}, "norm": norm, **model}
    train = {"weights": path, "norm_policy": policy}
    data = {"train": {"kind": "shapes", "count": 2}, "val": {"kind": "shapes", "count": 2}}
    return config_from_dict({"model": model, "train": train, "data": data}, "test")


def same_maps(found: list[Tensor], net: nn.Module, x: Tensor) -> bool:
    """Return whether maps are timm's of the same shape."""
    theirs = net.forward_intermediates(x, intermediates_only=True)
    by_shape = {level.shape: level for level in theirs}
    return all(torch.allclose(level, by_shape[level.shape], rtol=1e-9, atol=1e-9) for level in found)


def maps(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    areas = picture_areas(torch.tensor([x.shape[2:]] * len(x)), *x.shape[2:], False)
    return backbone.double().eval()(x, areas)


@pytest.mark.parametrize(("name", "norm"), [(BN_NETWORK, "frozen_bn"), (BN_NETWORK, "bn"), (LN_NETWORK, "gn")])
def test_a_file_named_in_the_config_gives_timms_maps(tmp_path: Path, name: str, norm: str) -> None:
    net = network(name)
    start = initial_model(config(saved(tmp_path, net), name, {"kind": norm}), ("a",))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    assert same_maps(maps(start.model.backbone, x), net.double(), x)
    assert any(note.startswith(f"read as timm's {name}") for note in start.notes)
    unused = next(note for note in start.notes if note.startswith("tensors of the file not used"))
    assert re.search(r"head\.(fc\.)?weight", unused) and "s4" not in unused


def test_its_bn_becomes_gn_by_the_policies_of_every_network(tmp_path: Path) -> None:
    path, gn = saved(tmp_path, network(BN_NETWORK)), {"kind": "gn", "channels_per_group": 8}
    with pytest.raises(CheckpointError, match=r"its backbone has bn, this model has gn .8 channels per group"):
        initial_model(config(path, BN_NETWORK, gn), ("a",))
    fates = initial_model(config(path, BN_NETWORK, gn, "convert"), ("a",)).fates
    assert len(fates) == 44 and all(fate.what == "converted from bn, damp 1" for fate in fates.values())
    assert all(0 < fate.expected_error < 0.5 for fate in fates.values())
    fates = initial_model(config(path, BN_NETWORK, gn, "reinit"), ("a",)).fates
    assert {fate.what for fate in fates.values()} == {"anew"}


def test_the_closed_form_holds_in_each_layer(tmp_path: Path) -> None:
    """Where the groups' statistics are those of BN, the converted norm computes what BN does."""
    net = network(BN_NETWORK)
    norm = {"kind": "gn", "channels_per_group": 8}
    model = initial_model(config(saved(tmp_path, net), BN_NETWORK, norm, "convert"), ("a",)).model
    bn, gn = net.stem.bn.double(), model.backbone.net.stem.bn.norm.double()
    x = torch.randn(1, 32, 64, 64, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    x = x * bn.running_var.sqrt()[:, None, None] + bn.running_mean[:, None, None]
    expected = nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    assert torch.allclose(gn(x), expected, rtol=1e-3, atol=1e-3)


def test_a_file_can_be_read_without_a_config(tmp_path: Path) -> None:
    path = saved(tmp_path, network(BN_NETWORK))
    source = read_source(path, SourceConfig(format="timm", name=BN_NETWORK))
    assert source.parts == ("backbone",) and source.model.backbone.name == BN_NETWORK
    assert source.model.backbone.norm == NormConfig(kind="bn", padding="plain")
    with pytest.raises(ConfigError, match=r"train\.source\.name is not set"):
        read_source(path, SourceConfig(format="timm"))
    with pytest.raises(CheckpointError, match=r"(?s)tensors do not fit timm's regnety_004.*another network"):
        read_source(path, SourceConfig(format="timm", name="regnety_004"))


def test_pictures_are_prepared_as_the_network_expects_or_it_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, network("mobilenetv3_small_050"))
    stated = SourceConfig(format="timm", name="mobilenetv3_small_050", pixel_std=(127.5, 127.5, 127.5))
    assert read_source(path, stated).model.pixel_std == (127.5, 127.5, 127.5)
    cfg = config(path, "mobilenetv3_small_050", {"kind": "bn"})
    source = cfg.train.source.model_copy(update={"pixel_std": (127.5, 127.5, 127.5)})
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"source": source})})
    with pytest.raises(CheckpointError, match=r"pixel_std: \(127\.5"):
        initial_model(cfg, ("a",))


@pytest.mark.parametrize("name", ["resnet50_gn", "resnext50_32x4d", *DEEP])
def test_gndets_own_resnet_computes_timms_maps(tmp_path: Path, name: str) -> None:
    net = network(name)
    source = read_source(saved(tmp_path, net), SourceConfig())
    is_wide = name.startswith("resnext")
    assert (source.model.backbone.cardinality, source.model.backbone.group_width) == ((32, 4) if is_wide else (1, 64))
    assert (source.model.backbone.stem == "deep") == source.model.backbone.average_shortcuts == (name in DEEP)
    backbone = ResNet(source.model.backbone, source.model.part_norms()["backbone"])
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in source.state.items()})
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert same_maps(maps(backbone, x), net.double(), x)


def test_an_exported_gn_classifier_is_timms_resnet50_gn() -> None:
    cfg = ModelConfig(detector="classifier", masks=False, classifier=ClassifierConfig(), backbone=BackboneConfig())
    torch.manual_seed(0)
    model = build_model(cfg, 5).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    export = export_weights(dict(model.state_dict()), cfg, tuple("abcde"), "torchvision")
    theirs = timm.create_model("resnet50_gn", num_classes=5).double().eval()
    theirs.load_state_dict(export.tensors, strict=True)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (cfg.pixel_mean, cfg.pixel_std))
    expected = theirs((images - mean) / std)
    found = model.classify(images, torch.tensor([(64, 96)] * 2), False)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_pre_activation_networks_with_standardized_weights_compute_timms_maps(tmp_path: Path) -> None:
    """BiT: GN and weight standardization before each convolution (Kolesnikov et al. 2020)."""
    net = network("resnetv2_50x1_bit")
    cfg = config(
        saved(tmp_path, net), "resnetv2_50x1_bit", {"kind": "gn"}, pixel_mean=[127.5] * 3, pixel_std=[127.5] * 3
    )
    start = initial_model(cfg, ("a",))
    assert {fate.what for fate in start.fates.values()} == {"as in the file"}
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert same_maps(maps(start.model.backbone, x), net.double(), x)


def test_a_name_of_timm_is_read_as_timms_or_as_gndets_own_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append((name, pretrained))
        return original(name, **options)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    assert read_source(f"timm:{BN_NETWORK}.pycls_in1k", SourceConfig()).format == "timm"
    assert asked[0] == (f"{BN_NETWORK}.pycls_in1k", True) and not any(pretrained for _, pretrained in asked[1:])
    assert read_source("timm:resnet18.a1_in1k", SourceConfig()).format == "resnet"
    source = read_source("timm:resnet18.a1_in1k", SourceConfig(), "resnet18")
    assert (source.format, source.model.backbone.kind) == ("timm", "timm")


def test_strides_without_parameters_that_gndet_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: original(name, **options))
    for name in ("resnetaa50", "resnetblur18"):
        with pytest.raises(CheckpointError, match=rf"strides are anti-aliased.* model\.backbone\.name={name} takes"):
            read_source(f"timm:{name}", SourceConfig())
    assert read_source("timm:resnet18d", SourceConfig()).format == "resnet"


def test_what_a_network_s_name_says_cannot_be_stated(tmp_path: Path) -> None:
    path = saved(tmp_path, network(BN_NETWORK))
    with pytest.raises(
        ConfigError, match=r"train\.source\.bgr: remove this option; it has no effect on a network of timm"
    ):
        read_source(path, SourceConfig(bgr=True, name=BN_NETWORK, format="timm"))


def test_a_stranger_s_checkpoint_needs_timm_only_if_it_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    build_model(ModelConfig(backbone=BackboneConfig(depth=18)), 2)
    with pytest.raises(ConfigError, match="pip install timm"):
        TimmBackbone(BackboneConfig(kind="timm", name="resnet18"), NormConfig())
