"""An export equals the file that the toolkit itself would write, and computes what the model computed in gndet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign import NUM_CLASSES, RPN2, detector, named, only, weights
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import FrozenBatchNorm2d

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BoxHeadConfig, RPNConfig
from gndet.config.training import SourceConfig
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.layers import GroupNorm
from gndet.weights.foreign.export import TOOLKITS, Export, export_weights
from gndet.weights.foreign.files import write_torch
from gndet.weights.read import Source, read_source

CLASSES = ("ant", "bee", "cow")
UNNAMED = SourceConfig(classes=CLASSES)  # detectron2 and torchvision do not name them
NORMS = [("bn", "none", "2fc"), ("bn", "bn", "4conv1fc"), ("frozen_bn", "none", "2fc"), ("gn", "gn", "4conv1fc")]


def through_disk(export: Export, folder: Path) -> Source:
    """Write an export to a file and read it back."""
    path = folder / "exported.pth"
    write_torch(path, export.content)
    source = read_source(str(path), UNNAMED)
    path.unlink()
    return source


@pytest.mark.parametrize(
    ("toolkit", "norms"),
    [
        (toolkit, norms)
        for toolkit in TOOLKITS
        for norms in NORMS
        if (toolkit, norms[0]) != ("mmdetection", "frozen_bn")  # mmdetection uses bn in evaluation mode instead
    ],
)  # fmt: skip
def test_a_file_is_exported_as_it_was_and_read_again_as_it_was(
    tmp_path: Path, toolkit: str, norms: tuple[str, str, str]
) -> None:
    backbone, heads, box = norms
    kind = "gn" if backbone == "gn" else "bn"
    file = named(weights(detector(backbone, heads, box, 18)), toolkit, kind, box)
    torch.save(file, tmp_path / "file.pth")
    first = read_source(str(tmp_path / "file.pth"), UNNAMED)
    if toolkit == "mmdetection" and backbone == "gn":
        first = first._replace(model=first.model.model_copy(update={"pixel_std": (58.395, 57.12, 57.375)}))
        file |= {"backbone.conv1.weight": file["backbone.conv1.weight"].flip(1)}  # read as BGR; written as RGB
    export = export_weights(first.state, first.model, CLASSES, toolkit)
    assert export.tensors.keys() == file.keys()
    assert all(torch.equal(export.tensors[key], value) for key, value in file.items())
    second = through_disk(export, tmp_path)
    assert second.state.keys() == first.state.keys()
    assert all(torch.equal(second.state[key], value) for key, value in first.state.items())
    assert (second.model, second.classes) == (first.model, CLASSES) and not second.unused


def test_a_bottleneck_s_export_says_where_its_stride_is(tmp_path: Path) -> None:
    cfg = detector("frozen_bn", "none", "2fc", pixel_std=(1.0, 1.0, 1.0))
    backbone = cfg.backbone.model_copy(update={"stride_in_1x1": True})
    state = only(weights(cfg), "backbone", "fpn")
    for toolkit in ("detectron2", "mmdetection"):
        export = export_weights(state, cfg.model_copy(update={"backbone": backbone}), CLASSES, toolkit)
        source = through_disk(export, tmp_path)
        assert source.model.backbone.stride_in_1x1 and source.parts == ("backbone", "fpn")
        assert all(torch.equal(source.state[key], value) for key, value in state.items())
        assert any("STRIDE_IN_1X1 True" in note or "style=caffe" in note for note in export.notes)


# --- torchvision's own models


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def of_torchvision(kind: str) -> nn.Module:
    """Return a Mask R-CNN of torchvision on the meta device."""
    sizes: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": NUM_CLASSES + 1}
    with torch.device("meta"):
        if kind == "v1":
            return maskrcnn_resnet50_fpn(**sizes)
        if kind == "v2":
            return maskrcnn_resnet50_fpn_v2(**sizes)
        if kind == "frozen":
            resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
            return TorchvisionMaskRCNN(_resnet_fpn_extractor(resnet, 5), NUM_CLASSES + 1)
        backbone = _resnet_fpn_extractor(torchvision.models.resnet50(norm_layer=group_norm), 5, norm_layer=group_norm)
        box_head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=group_norm)
        mask_head = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=group_norm)
        return TorchvisionMaskRCNN(backbone, NUM_CLASSES + 1, box_head=box_head, mask_head=mask_head)


@pytest.mark.parametrize(
    ("kind", "norms", "depth", "rpn"),
    [
        ("v1", ("bn", "none", "2fc"), 50, RPNConfig()),
        ("v2", ("bn", "bn", "4conv1fc"), 50, RPN2),
        ("gn", ("gn", "gn", "4conv1fc"), 50, RPNConfig()),
        ("frozen", ("frozen_bn", "none", "2fc"), 18, RPNConfig()),
    ],
)
def test_torchvision_s_own_models_load_an_export_strictly(
    kind: str, norms: tuple[str, str, str], depth: int, rpn: RPNConfig
) -> None:
    narrow = detector(*norms, depth)
    wide = ModelConfig(norm=narrow.norm, backbone=narrow.backbone, rpn=rpn, box_head=BoxHeadConfig(kind=norms[2]))
    with torch.device("meta"):
        shapes = build_model(wide, NUM_CLASSES).state_dict()
    state = {key: torch.zeros(like.shape, dtype=like.dtype) for key, like in shapes.items()}
    export = export_weights(state, wide, CLASSES, "torchvision")
    of_torchvision(kind).load_state_dict(export.tensors, strict=True, assign=True)


# --- the weights contain what a toolkit's settings cannot express


def with_norms(norm: NormConfig, **changes: object) -> ModelConfig:
    cfg = detector("gn", "gn", "4conv1fc", 18, **changes)
    backbone = cfg.backbone.model_copy(update={"norm": None})
    return cfg.model_copy(update={"norm": norm, "backbone": backbone})


def damped(model: MaskRCNN) -> None:
    """Give every norm a different eps, as after a conversion from BN."""
    for number, module in enumerate(module for module in model.modules() if isinstance(module, GroupNorm)):
        module.eps = 0.05 * (1 + number % 7)


STANDARDIZED = NormConfig(kind="gn", weight_standardization=True)
ODD: dict[str, tuple[ModelConfig, Callable[[MaskRCNN], None]]] = {
    "an eps for each layer": (with_norms(NormConfig(kind="gn")), damped),
    "eps 0.001 of GN": (with_norms(NormConfig(kind="gn", eps=1e-3)), lambda model: None),
    "eps 0.001 of BN": (with_norms(NormConfig(kind="bn", eps=1e-3)), lambda model: None),
    "no eps of frozen BN": (with_norms(NormConfig(kind="frozen_bn", eps=0.0)), lambda model: None),
    "weight standardization": (with_norms(STANDARDIZED), lambda model: None),
    "all, and another pixel_std": (
        with_norms(STANDARDIZED, pixel_std=(70.0, 1.5, 50.0), pixel_mean=(100.0, 110.0, 90.0)), damped,
    ),
}  # fmt: skip


def pyramid_of(model: MaskRCNN, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return model.double().eval().features(image, torch.tensor([[64, 96]]), False)[0]


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize("name", ODD)
def test_features_of_an_export_are_the_model_s(tmp_path: Path, name: str, toolkit: str) -> None:
    cfg, change = ODD[name]
    model = build_model(cfg, NUM_CLASSES)
    model.load_state_dict(weights(cfg))
    change(model)
    export = export_weights(model.state_dict(), cfg, CLASSES, toolkit)
    mean = SourceConfig(classes=CLASSES, pixel_mean=cfg.pixel_mean)  # a setting of the toolkit
    path = tmp_path / "exported.pth"
    write_torch(path, export.content)
    source = read_source(str(path), mean)
    assert not any(key.endswith(".eps") for key in source.state) and not source.unused
    norm = source.model.part_norms()["backbone"]
    assert not norm.weight_standardization and norm.eps == 1e-5
    reread = build_model(source.model, NUM_CLASSES)
    reread.load_state_dict(source.state, strict=True)
    image = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for found, expected in zip(pyramid_of(reread, image), pyramid_of(model, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    expected_std = {"detectron2": (1.0, 1.0, 1.0), "torchvision": (58.395, 57.12, 57.375)}  # mmdetection states its own
    assert source.model.pixel_std == expected_std.get(toolkit, cfg.pixel_std)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_heads_of_an_export_are_the_model_s(tmp_path: Path, toolkit: str) -> None:
    cfg, change = ODD["an eps for each layer"]
    model = build_model(cfg, NUM_CLASSES)
    model.load_state_dict(weights(cfg))
    change(model)
    source = through_disk(export_weights(model.state_dict(), cfg, CLASSES, toolkit), tmp_path)
    reread = build_model(source.model, NUM_CLASSES).double().eval()
    reread.load_state_dict(source.state, strict=True)
    model.double().eval()
    x = torch.randn(2, 32, 14, 14, dtype=torch.float64)
    with torch.no_grad():
        for part in ("box_head", "mask_head"):
            found, expected = x, x
            for conv, reread_conv in zip(getattr(model, part).convs, getattr(reread, part).convs, strict=True):
                expected, found = conv(expected), reread_conv(found)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_export_reports_what_the_toolkit_does_differently() -> None:
    cfg = detector("gn", "gn", depth=18).model_copy(update={"norm": NormConfig(kind="gn", groups=16)})
    cfg = cfg.model_copy(update={"rpn": cfg.rpn.model_copy(update={"anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0)})})
    notes = export_weights(weights(cfg), cfg, CLASSES, "torchvision").notes
    assert "differs: box_head.roi_align is aligned in this model, unaligned by torchvision's default" in notes
    assert any(note.startswith("fpn: GN with 16 groups; torchvision builds 32 groups unless") for note in notes)
    assert any("num_classes 4 (background first)" in note for note in notes)
    assert any(note.startswith("differs: rpn.anchor_sizes is (8.0, 16.0") for note in notes)


def test_an_export_of_a_backbone_reports_no_difference_of_other_parts() -> None:
    cfg = ModelConfig(rpn=RPNConfig(positive_iou=0.6))
    state = {key: tensor for key, tensor in weights(cfg).items() if key.startswith("backbone.")}
    assert not [line for line in export_weights(state, cfg, CLASSES, "detectron2").notes if "differs: rpn" in line]
    assert [line for line in export_weights(weights(cfg), cfg, CLASSES, "detectron2").notes if "differs: rpn" in line]


@pytest.mark.parametrize(
    ("cfg", "toolkit", "message"),
    [
        (detector("gn", "gn", rpn=RPNConfig(norm=NormConfig())), "detectron2", r"model\.rpn\.norm: gn; detectron2"),
        (detector("none", "gn"), "mmdetection", r"model\.backbone\.norm: none; mmdetection"),
        (detector("gn", "gn", rpn=RPNConfig(aspect_ratios=(1.0,))), "torchvision", r"aspect_ratios: \(1\.0,\)"),
        (
            detector("gn", "gn", box_head=BoxHeadConfig(norm_last=False)),
            "detectron2",
            r"box_head\.norm_last: false; det",
        ),
    ],
)
def test_a_model_that_the_toolkit_cannot_build_is_refused(cfg: ModelConfig, toolkit: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        export_weights(build_model(cfg, NUM_CLASSES).state_dict(), cfg, CLASSES, toolkit)


def test_a_stride_in_the_1x1_is_refused_for_torchvision() -> None:
    cfg = detector("bn", "bn")
    cfg = cfg.model_copy(update={"backbone": cfg.backbone.model_copy(update={"stride_in_1x1": True})})
    with torch.device("meta"), pytest.raises(ConfigError, match=r"backbone\.stride_in_1x1: .* 3x3 only"):
        export_weights(build_model(cfg, NUM_CLASSES).state_dict(), cfg, CLASSES, "torchvision")
