"""Files of other toolkits become the same network in gndet, with every tensor and every convention preserved."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from foreign import BN_META, NUM_CLASSES, RPN2, detector, named, only, read, weights
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.config.training import SourceConfig
from gndet.modeling.build import build_model
from gndet.modeling.resnet import ResNet
from gndet.weights.read import Source

Tensors = dict[str, Tensor]
RGB = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
IMAGENET = (RGB[0], (1.0, 1.0, 1.0))  # detectron2's BGR 103.530, 116.280, 123.675
CAFFE = ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))
WHOLE = ("backbone", "fpn", "rpn", "box_head", "mask_head")
UNPADDED = dict.fromkeys((2, 4, 8, 16, 32, 64))


def arrays(tensors: Tensors) -> dict[str, Any]:
    return {key: value.numpy() for key, value in tensors.items()}


def fused(state: Tensors) -> Tensors:
    """Return BN as an affine map, with mean 0 and variance 1, which Detectron's files leave out."""
    values = {"running_mean": 0.0, "running_var": 1.0}
    return {
        key: torch.full_like(value, values[key.rpartition(".")[2]]) if key.endswith(tuple(values)) else value
        for key, value in state.items()
    }


def without_statistics(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.endswith(("_rm", "_riv", "num_batches_tracked"))}


def old_torchvision(tensors: Tensors) -> Tensors:
    """Return the names before torchvision 0.13, when convolutions without a norm were not in a sequence."""
    result = {}
    for key, tensor in tensors.items():
        for n in range(4):
            key = key.replace(f"fpn.inner_blocks.{n}.0.", f"fpn.inner_blocks.{n}.")
            key = key.replace(f"fpn.layer_blocks.{n}.0.", f"fpn.layer_blocks.{n}.")
            key = key.replace(f"roi_heads.mask_head.{n}.0.", f"roi_heads.mask_head.mask_fcn{n + 1}.")
        result[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = tensor
    return result


def zero_biases(tensors: Tensors) -> Tensors:
    """Return a zero bias for each convolution, as in Detectron's MSRA backbones."""
    convolutions = [key for key in tensors if key == "conv1_w" or (key.startswith("res") and key.endswith("_w"))]
    return {f"{key[:-1]}b": torch.zeros(len(tensors[key])) for key in convolutions}


FC = {"fc1000_w": torch.zeros(1000, 8), "fc1000_b": torch.zeros(1000)}
ANCHORS = {f"{{}}.anchor_generator.cell_anchors.{n}": torch.zeros(3, 4) for n in range(5)}
GN_META = """data_preprocessor = dict(bgr_to_rgb=False, mean=[\n    103.53,\n    116.28,\n    123.675,\n],
    std=[\n    1.0,\n    1.0,\n    1.0,\n])\nmodel = dict(backbone=dict(style='pytorch'))"""


def detectron2(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    extra = {key.format("proposal_generator"): value for key, value in ANCHORS.items()}
    return {"model": named(state, "detectron2", norm, box) | extra, "iteration": 89999, "optimizer": {"state": {}}}


def detectron2_torchvision(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    """Write what tools/convert-torchvision-to-d2.py writes: RGB, and the classifier is in the stem."""
    bgr = named(state, "detectron2_backbone")
    rgb = bgr | {"stem.conv1.weight": bgr["stem.conv1.weight"].flip(1), "stem.fc.bias": torch.zeros(1000)}
    return {"model": arrays(rgb), "__author__": "torchvision", "matching_heuristics": True}


def detectron2_msra(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    """Use Caffe2's names, except for the norms, which have statistics."""
    endings = {"_s": "_gamma", "_b": "_beta", "_rm": "_running_mean", "_riv": "_running_var"}
    tensors = named(state, "detectron")
    result = {}
    for key, tensor in tensors.items():
        name, _, ending = key.rpartition("_")
        result[name + endings[f"_{ending}"] if name.endswith("_bn") else key] = tensor
    return arrays(result | FC)


def detectron(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    """Write a detector of Detectron's model zoo, which still holds leftovers of the backbone's training."""
    tensors = without_statistics(named(state, "detectron", norm, box))
    kept = zero_biases(tensors) | FC if norm == "bn" else {}
    momentum = {f"{key}_momentum": value for key, value in tensors.items() if key.startswith("fc")}
    return {"blobs": arrays(tensors | kept | momentum), "cfg": "MODEL:\n  TYPE: generalized_rcnn\n"}


def detectron_backbone(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    tensors = without_statistics(named(state, "detectron", norm))
    extra = {"pred_w": torch.zeros(1000, 8), "pred_b": torch.zeros(1000)} if norm == "gn" else FC
    return arrays(tensors | extra | (zero_biases(tensors) if norm == "bn" else {}))


def mmdetection(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    meta = {"epoch": 12, "CLASSES": ("ant", "bee", "cow"), "config": BN_META}
    if norm == "gn":
        meta = {"epoch": 24, "dataset_meta": {"classes": ["ant", "bee", "cow"]}, "cfg": GN_META}
        stem = state["backbone.stem.conv.weight"]
        state = state | {"backbone.stem.conv.weight": stem.flip(1)}
    return {"meta": meta, "state_dict": named(state, "mmdetection", norm, box)}


def maskrcnn_benchmark(state: Tensors, norm: str, box: str) -> dict[str, Any]:
    extra = {key.format("rpn"): value for key, value in ANCHORS.items()}
    tensors = named(state, "maskrcnn-benchmark", norm, box) | extra
    return {"model": {f"module.{key}": value for key, value in tensors.items()}, "iteration": 90000}


def resnext(backbone: str, heads: str) -> ModelConfig:
    """Return the config of a ResNeXt-50 32x4d Mask R-CNN; backbone and heads: the kinds of their norms."""
    wide = BackboneConfig(cardinality=32, group_width=4, norm=NormConfig(kind=backbone))
    return detector(backbone, heads).model_copy(update={"backbone": wide})


class Case(NamedTuple):
    """A kind of file, and what reading it must give."""

    format: str
    write: Callable[[Tensors, str, str], Any]  # (tensors by gndet's names, bn or gn, 2fc or 4conv1fc)
    model: ModelConfig
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]]
    compat: str
    eps: float = 1e-5  # of the backbone's norm
    stride_in_1x1: bool = False
    parts: tuple[str, ...] = WHOLE
    unused: int = 0  # keys of the file
    suffix: str = ".pth"


BACKBONE = {"parts": ("backbone",)}
CASES = {
    "torchvision, old names": Case(
        "torchvision", lambda state, norm, box: old_torchvision(named(state, "torchvision", norm, box)),
        detector("frozen_bn", "none", "2fc", 18), RGB, "torchvision",
    ),
    "torchvision, new names": Case(
        "torchvision", lambda state, norm, box: named(state, "torchvision", norm, box),
        detector("frozen_bn", "none", "2fc"), RGB, "torchvision",
    ),
    "torchvision v2": Case(
        "torchvision", lambda state, norm, box: {"model": named(state, "torchvision", norm, box), "epoch": 25},
        detector("bn", "bn", depth=18, rpn=RPN2), RGB, "torchvision",
    ),
    "timm GN": Case(
        "resnet", lambda state, norm, box: named(state, "resnet") | {"fc.weight": FC["fc1000_w"]},
        detector("gn", "gn"), RGB, "gndet", unused=1, **BACKBONE,
    ),
    "detectron2": Case(
        "detectron2", detectron2, detector("frozen_bn", "none", "2fc"), IMAGENET, "detectron2", unused=5,
        stride_in_1x1=True,
    ),
    "detectron2 GN": Case("detectron2", detectron2, detector("gn", "gn"), IMAGENET, "detectron2", unused=5),
    "detectron2 of torchvision": Case(
        "detectron2_backbone", detectron2_torchvision, detector("bn", "none"), RGB, "detectron2", unused=1,
        suffix=".pkl", **BACKBONE,
    ),
    "detectron2 MSRA": Case(
        "detectron", detectron2_msra, detector("frozen_bn", "none"), IMAGENET, "detectron2", stride_in_1x1=True,
        unused=2, suffix=".pkl", **BACKBONE,
    ),
    "mmdetection ResNeXt": Case("mmdetection", mmdetection, resnext("gn", "gn"), IMAGENET, "mmdetection"),
    "backbone of mmdetection": Case(
        "resnet", lambda state, norm, box: {
            re.sub(r"(^|\.)bn(\d)", r"\1gn\2", key): value for key, value in named(state, "resnet").items()
        }, detector("gn", "gn"), RGB, "gndet", **BACKBONE,
    ),
    "detectron2 ResNeXt": Case("detectron2", detectron2, resnext("bn", "none"), RGB, "detectron2", unused=5),
    "Detectron": Case(
        "detectron", detectron, detector("frozen_bn", "none", "2fc"), CAFFE, "detectron", 0.0, stride_in_1x1=True,
        unused=2, suffix=".pkl",
    ),
    "Detectron backbone": Case(
        "detectron", detectron_backbone, detector("frozen_bn", "none"), CAFFE, "detectron", 0.0, stride_in_1x1=True,
        unused=2, suffix=".pkl", **BACKBONE,
    ),
    "Detectron GN": Case("detectron", detectron, detector("gn", "gn"), CAFFE, "detectron", suffix=".pkl"),
    "Detectron GN backbone": Case(
        "detectron", detectron_backbone, detector("gn", "gn"), CAFFE, "detectron", unused=2, suffix=".pkl", **BACKBONE
    ),
    "mmdetection": Case("mmdetection", mmdetection, detector("bn", "none", "2fc"), RGB, "mmdetection"),
    "mmdetection GN": Case("mmdetection", mmdetection, detector("gn", "gn", depth=18), IMAGENET, "mmdetection"),
    "maskrcnn-benchmark": Case(
        "maskrcnn-benchmark", maskrcnn_benchmark, detector("frozen_bn", "none", "2fc"), CAFFE, "detectron", 0.0,
        stride_in_1x1=True, unused=5,
    ),
    "maskrcnn-benchmark GN": Case(
        "maskrcnn-benchmark", maskrcnn_benchmark, detector("gn", "gn"), CAFFE, "detectron", unused=5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_and_every_convention_of_a_file_comes_over(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    box = case.model.box_head.kind
    truth = only(weights(case.model), *case.parts)
    if name in ("Detectron", "Detectron backbone"):
        truth = fused(truth)
    norm = "gn" if case.model.backbone.norm.kind == "gn" else "bn"
    source = read(tmp_path / f"file{case.suffix}", case.write(truth, norm, box))
    assert (source.format, source.parts) == (case.format, case.parts)
    assert len(source.unused) == case.unused, source.unused
    model, kinds = source.model, source.model.part_norms()
    assert (model.backbone.depth, model.backbone.stride_in_1x1) == (case.model.backbone.depth, case.stride_in_1x1)
    assert model.backbone.cardinality == case.model.backbone.cardinality
    assert (model.pixel_mean, model.pixel_std, model.compat) == (*case.mean_std, case.compat)
    assert kinds["backbone"].eps == case.eps and kinds["backbone"].groups == 32
    expected = case.model.part_norms()
    if box == "2fc":
        expected["box_head"] = expected["rpn"]  # none
    assert all(kinds[part].kind == expected[part].kind for part in case.parts)
    assert model.masks == ("mask_head" in case.parts)
    assert source.fused == (("backbone",) if name in ("Detectron", "Detectron backbone") else ())
    assert ("background row" in source.notes[0]) <= ("box_head" in case.parts)
    if case.parts == WHOLE:
        assert source.num_classes == NUM_CLASSES and model.box_head.kind == box
        assert source.classes == (("ant", "bee", "cow") if case.format == "mmdetection" else None)
        built = build_model(model, NUM_CLASSES)
        built.load_state_dict(source.state, strict=True)
        source = source._replace(state=built.state_dict())
    assert source.state.keys() == truth.keys()
    assert all(torch.equal(source.state[key], value) for key, value in truth.items())


def test_the_91_rows_of_torchvision_s_coco_models_become_80_classes_by_name(tmp_path: Path) -> None:
    truth = weights(detector("frozen_bn", "none", "2fc", 18), 90)
    for layer, rows in (("box_head.cls_score", 1), ("box_head.bbox_pred", 4), ("mask_head.logits", 1)):
        bias = torch.arange(90 * rows).float()  # row 4 k + d of the boxes is d of class k: class-major
        truth[f"{layer}.bias"] = torch.cat([bias, bias.new_tensor([-1.0])]) if layer == "box_head.cls_score" else bias
    source = read(tmp_path / "file.pth", named(truth, "torchvision", box="2fc"))
    categories = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # __background__, then ids 1..90 or N/A
    ids = [i for i, name in enumerate(categories) if name not in ("__background__", "N/A")]
    assert source.classes == tuple(categories[i] for i in ids) and source.num_classes == len(ids) == 80
    assert source.category_ids == tuple(ids)
    rows = torch.tensor(ids).float() - 1  # in truth, the row of an id is one less
    assert torch.equal(source.state["box_head.cls_score.bias"], torch.cat([rows, torch.tensor([-1.0])]))
    assert torch.equal(source.state["box_head.bbox_pred.bias"].view(80, 4), rows[:, None] * 4 + torch.arange(4.0))
    assert torch.equal(source.state["mask_head.logits.bias"], rows)
    build_model(source.model, 80).load_state_dict(source.state, strict=True)


@pytest.mark.parametrize("format", ["torchvision", "detectron2", "mmdetection"])
def test_a_file_without_masks_is_a_faster_rcnn(tmp_path: Path, format: str) -> None:
    truth = weights(detector("bn", "none", "2fc", 18, masks=False))
    source = read(tmp_path / "file.pth", named(truth, format, box="2fc"))
    assert source.parts == WHOLE[:-1] and not source.model.masks
    model = build_model(source.model, NUM_CLASSES)
    model.load_state_dict(source.state, strict=True)
    assert all(torch.equal(value, truth[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("file", "eps"), [("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", 0.0), ("model_25.pth", 1e-5)]
)  # fmt: skip
def test_torchvision_s_first_coco_models_have_no_eps(tmp_path: Path, file: str, eps: float) -> None:
    state = weights(detector("frozen_bn", "none", "2fc", 18))
    source = read(tmp_path / file, old_torchvision(named(state, "torchvision", box="2fc")))
    assert source.model.backbone.norm.eps == eps


def test_mmdetection_without_meta_is_taken_for_what_its_norm_suggests(tmp_path: Path) -> None:
    for norm, bgr in (("bn", False), ("gn", True)):
        state = weights(detector(norm, "none", "2fc", 18))
        source = read(tmp_path / "file.pth", {"state_dict": named(state, "mmdetection", norm, "2fc")})
        stem = state["backbone.stem.conv.weight"]
        assert torch.equal(source.state["backbone.stem.conv.weight"], stem.flip(1) if bgr else stem)
        assert (source.model.pixel_std == (1.0, 1.0, 1.0)) == bgr and source.model.pixel_mean == RGB[0]


def test_caffe_style_of_mmdetection_has_its_stride_in_the_1x1(tmp_path: Path) -> None:
    state = only(weights(detector("bn", "none")), "backbone", "fpn")
    meta = {
        "config": "backbone = dict(style='caffe')\nmean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False"
    }
    source = read(tmp_path / "file.pth", {"meta": meta, "state_dict": named(state, "mmdetection", "bn")})
    assert source.model.backbone.stride_in_1x1 and source.model.pixel_mean == RGB[0]


def test_early_detectron2_files_say_which_colors_they_take(tmp_path: Path) -> None:
    state = weights(detector("bn", "none", "2fc", 18))
    for mean, std, bgr in (
        ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), True),
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False),
        ((127.5, 127.5, 127.5), (1.0, 1.0, 1.0), True),
    ):
        pixel = {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.tensor(std).view(3, 1, 1)}
        source = read(tmp_path / "file.pth", {"model": named(state, "detectron2", box="2fc") | pixel})
        stem = state["backbone.stem.conv.weight"]  # written as BGR
        assert torch.equal(source.state["backbone.stem.conv.weight"], stem if bgr else stem.flip(1))
        order = slice(None, None, -1 if bgr else 1)
        assert (source.model.pixel_mean, source.model.pixel_std) == (mean[order], std[order])  # exactly


# --- the same numbers


def trained(network: nn.Module) -> nn.Module:
    """Give every norm statistics and an affine map as after training."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def backbone_of(source: Source) -> ResNet:
    """Build the backbone of a source, in float64."""
    model = build_model(source.model, max(source.num_classes, 1))
    model.load_state_dict(model.state_dict() | source.state)
    return model.double().eval().backbone


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_features_equal_those_of_torchvision_s_classifier(tmp_path: Path, depth: int, norm: str) -> None:
    layer = nn.BatchNorm2d if norm == "bn" else lambda channels: nn.GroupNorm(32, channels)
    reference = trained(getattr(torchvision.models, f"resnet{depth}")(norm_layer=layer))
    source = read(tmp_path / "file.pth", reference.state_dict())
    assert source.unused == ["fc.weight", "fc.bias"] and source.model.backbone.norm.kind == norm
    x, reference = torch.randn(2, 3, 64, 96, dtype=torch.float64), reference.double()
    with torch.no_grad():
        found = backbone_of(source)(x, UNPADDED)
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for feature, number in zip(found, "1234", strict=True):
            y = getattr(reference, f"layer{number}")(y)
            torch.testing.assert_close(feature, y, rtol=1e-9, atol=1e-9)


def plain_bottleneck(x: Tensor, conv: Callable[[str, Tensor, int], Tensor], stride: int, in_1x1: bool) -> Tensor:
    """Compute a block with a shortcut; conv(name, x, stride) is a convolution and its norm."""
    y = conv("conv1", x, stride if in_1x1 else 1).relu()
    y = conv("conv2", y, 1 if in_1x1 else stride).relu()
    return (conv("conv3", y, 1) + conv("shortcut", x, stride)).relu()


@pytest.mark.parametrize("stated", [None, True, False])
def test_the_stride_of_detectron2_s_bottlenecks_is_kept(tmp_path: Path, stated: bool | None) -> None:
    file = named(only(weights(detector("frozen_bn", "none")), "backbone"), "detectron2_backbone")
    backbone = backbone_of(read(tmp_path / "file.pth", {"model": file}, SourceConfig(stride_in_1x1=stated)))

    def conv(name: str, x: Tensor, stride: int) -> Tensor:
        weight, *norm = (
            file[f"res3.0.{name}.{parameter}"].double()
            for parameter in ("weight", "norm.running_mean", "norm.running_var", "norm.weight", "norm.bias")
        )
        return F.batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2), *norm, eps=1e-5)

    x = torch.randn(1, 256, 12, 10, dtype=torch.float64)
    with torch.no_grad():
        found = backbone.res3[0](x, None, None)
    expected, other = (plain_bottleneck(x, conv, 2, in_1x1) for in_1x1 in (stated is not False, stated is False))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, other, rtol=0.1)


def test_fused_bn_of_detectron_is_the_affine_map_on_blue_green_red(tmp_path: Path) -> None:
    state = fused(only(weights(detector("frozen_bn", "none")), "backbone"))
    blobs = without_statistics(named(state, "detectron"))
    source = read(tmp_path / "file.pkl", arrays(blobs | zero_biases(blobs)))
    model = build_model(source.model, 1)
    model.load_state_dict(model.state_dict() | source.state)
    image = torch.randint(0, 256, (1, 3, 40, 56)).double()  # RGB

    def conv(name: str, x: Tensor, stride: int) -> Tensor:
        norm = "res_conv1_bn" if name == "conv1" else f"{name}_bn"
        weight, scale, shift = (blobs[key].double() for key in (f"{name}_w", f"{norm}_s", f"{norm}_b"))
        y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        return scale[:, None, None] * y + shift[:, None, None]

    bgr = image.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717], dtype=torch.float64)[:, None, None]
    x = F.max_pool2d(conv("conv1", bgr, 2).relu(), 3, 2, 1)
    letters = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    expected = plain_bottleneck(x, lambda name, *rest: conv(f"res2_0_{letters[name]}", *rest), 1, True)
    model = model.double().eval()
    with torch.no_grad():
        x = F.max_pool2d(model.backbone.stem((image - model.pixel_mean) / model.pixel_std), 3, 2, 1)
        found = model.backbone.res2[0](x, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # the mean is a float32


def test_a_bias_before_bn_goes_into_its_mean(tmp_path: Path) -> None:
    state = only(weights(detector("bn", "none", depth=18)), "backbone")
    tensors, bias = named(state, "resnet"), torch.randn(64)
    with_bias = read(tmp_path / "a.pth", tensors | {"conv1.bias": bias})
    plain = read(tmp_path / "b.pth", tensors)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        found, stem = backbone_of(with_bias).stem(x), backbone_of(plain).stem
        expected = stem.norm(stem.conv(x) + bias[:, None, None].double()).relu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not with_bias.unused
