"""Files of dense detectors become the same network in gndet, and torchvision and detectron2 read what gndet writes."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import read, weights
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.weights.foreign.export import export_weights
from gndet.weights.foreign.files import WeightFile, write_torch
from gndet.weights.foreign.source import understand
from gndet.weights.load import load_weights
from gndet.weights.read import Source, read_source

BUILDERS = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2, "fcos": fcos_resnet50_fpn}
CLASSES = ("ant", "bee", "cow")
UNNAMED = SourceConfig(classes=CLASSES)
RETINANET = {"detector": "retinanet", "masks": False, "fpn": {"channels": 32, "p6": "c5", "norm": {"kind": "none"}}}


def of_torchvision(kind: str, num_classes: int = 3) -> nn.Module:
    """Return a detector of torchvision with random weights, biases too."""
    torch.manual_seed(0)
    model = BUILDERS[kind](weights=None, weights_backbone=None, num_classes=num_classes + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def without_background(state: dict[str, Tensor], rows: int = 4) -> dict[str, Tensor]:
    """Return torchvision's tensors without the rows of the class that stands for nothing."""
    name = "head.classification_head.cls_logits."
    return {k: v.unflatten(0, (-1, rows))[:, 1:] if k.startswith(name) else v for k, v in state.items()}


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_state_dict_of_torchvision_is_read_and_exported_as_it_was(tmp_path: Path, kind: str) -> None:
    model = of_torchvision(kind)
    source = understand(WeightFile(tmp_path / "file.pth", model.state_dict(), {}), UNNAMED)
    assert source.parts == ("backbone", "fpn", "dense") and source.num_classes == 3 and not source.unused
    cfg = source.model
    assert (cfg.detector, cfg.fpn.p6, cfg.dense.conv_bias, cfg.dense.box_loss) == {
        "v1": ("retinanet", "p5", True, "l1"), "v2": ("retinanet", "c5", False, "giou"),
        "fcos": ("fcos", "p5", True, "giou"),
    }[kind]  # fmt: skip
    export = export_weights(source.state, cfg, CLASSES, "torchvision")
    got, expected = without_background(export.tensors), without_background(model.state_dict())
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    fresh = BUILDERS[kind](weights=None, weights_backbone=None, num_classes=4)
    fresh.load_state_dict(export.tensors)
    scores = fresh.head([torch.randn(1, 256, 2, 2)] * 5)["cls_logits"].sigmoid()
    assert scores[..., 0].max() < 1e-20 < scores[..., 1:].min()
    write_torch(tmp_path / "again.pth", export.content)
    again = read_source(str(tmp_path / "again.pth"), UNNAMED)
    assert again.model == cfg and all(torch.equal(again.state[key], value) for key, value in source.state.items())


def test_classes_of_coco_are_picked_from_torchvision_s_91_rows() -> None:
    model = of_torchvision("fcos", 90)
    source = understand(WeightFile(Path("file.pth"), model.state_dict(), {}), SourceConfig())
    scores = model.head.classification_head.cls_logits.weight
    assert source.num_classes == 80 and source.classes[11] == "stop sign"  # id 13: COCO has no 12
    assert torch.equal(source.state["dense.cls_logits.weight"][11], scores[13])


def test_names_of_torchvision_s_older_files_and_their_eps() -> None:
    state = {}
    for key, tensor in of_torchvision("v1").state_dict().items():
        key = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda match: f"{match[1]}.{2 * int(match[2])}.", key)
        state[re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)] = tensor
    new = understand(WeightFile(Path("any.pth"), of_torchvision("v1").state_dict(), {}), UNNAMED)
    old = understand(WeightFile(Path("retinanet_resnet50_fpn_coco-eeacb38b.pth"), state, {}), UNNAMED)
    assert all(torch.equal(old.state[key], value) for key, value in new.state.items())
    assert (old.model.backbone.norm.eps, new.model.backbone.norm.eps) == (0, 1e-5)


# --- detectron2's RetinaNet


def retinanet(norm: str = "none", **dense: object) -> ModelConfig:
    parts = {"backbone": {"depth": 18, "norm": {"kind": "frozen_bn"}}, "dense": {"norm": {"kind": norm}, **dense}}
    return ModelConfig.model_validate({**RETINANET, **parts, "compat": "detectron2", "norm": {"kind": "frozen_bn"}})


def of_detectron2(state: dict[str, Tensor], normed: bool) -> dict[str, Tensor]:
    """Return tensors as detectron2 names them, written from a description of its modules."""
    kinds, subnets = 9, {"cls": "cls_subnet", "box": "bbox_subnet"}
    step = 3 if normed else 2  # convolution, norm and ReLU in a sequence
    result = {}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        if key == "backbone.stem.conv.weight":
            value = value.flip(1)
        if layer == "dense.cls_logits":  # anchor by anchor
            value = value.unflatten(0, (3, kinds)).transpose(0, 1).flatten(0, 1)
        name = layer.replace("backbone.stem", "backbone.bottom_up.stem.conv1")
        name = re.sub(r"^backbone\.res", "backbone.bottom_up.res", name)
        name = re.sub(r"^fpn\.(lateral|output)", r"backbone.fpn_\1", name)
        name = re.sub(r"^fpn\.(p[67])", r"backbone.top_block.\1", name)
        name = name.replace("dense.cls_logits", "head.cls_score").replace("dense.boxes", "head.bbox_pred")
        if match := re.match(r"dense\.(cls|box)_convs\.(\d)\.(conv|norm)", name):
            place = step * int(match[2]) + (match[3] == "norm")
            result[f"head.{subnets[match[1]]}.{place}.{parameter}"] = value
            continue
        result[f"{re.sub(r'[.]conv$', '', name)}.{parameter}"] = value
    return result


@pytest.mark.parametrize("norm", ["none", "gn"])
def test_a_file_of_detectron2_is_read_and_exported_as_it_was(tmp_path: Path, norm: str) -> None:
    cfg = retinanet(norm, conv_bias=True)
    state = weights(cfg)
    file = of_detectron2(state, norm == "gn")
    assert f"head.cls_subnet.{9 if norm == 'gn' else 6}.bias" in file
    source = read(tmp_path / "model.pth", file, UNNAMED)
    assert source.format == "detectron2" and not source.unused and source.num_classes == 3
    assert all(torch.equal(source.state[key], value) for key, value in state.items())
    assert source.model.dense.model_copy(update={"norm": None}) == cfg.dense.model_copy(update={"norm": None})
    export = export_weights(source.state, source.model, CLASSES, "detectron2")
    assert export.tensors.keys() == file.keys()
    assert all(torch.equal(export.tensors[key], value) for key, value in file.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.pop("head.cls_subnet.4.weight"), r"head\.cls_subnet"),
        (lambda file: file.pop("backbone.top_block.p7.bias"), r"p7\.bias .*absent in the file"),
        (lambda file: file.update({"head.ctrness.weight": torch.zeros(1, 32, 3, 3)}), r"head\.ctrness\.weight"),
        (lambda file: file.update({"head.bbox_pred.weight": torch.zeros(12, 32, 3, 3)}), "12 rows .*: 36 rows"),
        (lambda file: file.update({"head.bbox_pred.weight": torch.zeros(37, 32, 3, 3)}), "37 rows .*: 36 rows"),
        (lambda file: file.update({"head.cls_score.weight": torch.zeros(28, 32, 3, 3)}), "28 of class .*of 9"),
    ],
)
def test_what_is_missing_or_unknown_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    file = of_detectron2(weights(retinanet()), normed=False)
    change(file)
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "model.pth", file, UNNAMED)


# --- fine-tuning and refusals


def source_of(cfg: ModelConfig) -> Source:
    state = weights(cfg)
    return Source("file", "gndet", state, cfg, ("backbone", "fpn", "dense"), CLASSES, 3, (), [], [])


def test_rows_of_known_classes_carry_over_to_other_data() -> None:
    cfg = retinanet(positives=10)
    source, classes = source_of(cfg), ("cow", "dog", "ant")
    model = build_model(cfg, 3)
    before = model.dense.cls_logits.weight.clone()
    load_weights(model, source, classes, Config.model_validate({"model": cfg.model_dump()}))
    tensors = model.dense.cls_logits.weight, source.state["dense.cls_logits.weight"], before
    rows, theirs, initial = (tensor.view(3, 9, 32, 3, 3) for tensor in tensors)  # a class has 9 rows
    assert torch.equal(rows[0], theirs[2]) and torch.equal(rows[2], theirs[0])
    assert torch.equal(rows[1], initial[1])
    assert torch.equal(model.dense.boxes.weight, source.state["dense.boxes.weight"])


def loaded(cfg: ModelConfig, **changes: object) -> list[str]:
    """Load weights of cfg into a model whose dense head has other options; return the report."""
    other = ModelConfig.model_validate({**cfg.model_dump(), "dense": {**cfg.dense.model_dump(), **changes}})
    whole = Config.model_validate({"model": other.model_dump()})
    return load_weights(build_model(other, 3), source_of(cfg), CLASSES, whole)[0]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("offset", 0.5, r"0\.0 in the file, 0\.5 here"),
        ("scales", (1.0, 1.5, 2.0), r"\(1\.0, 1\.2599.*\) in the file, \(1\.0, 1\.5, 2\.0\) here"),
        ("aspect_ratios", (1.0, 2.0, 4.0), r"\(0\.5, 1\.0, 2\.0\) in the file, \(1\.0, 2\.0, 4\.0\) here"),
    ],
)
def test_another_convention_is_refused(option: str, value: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"mean something else .*\n  model\.dense\.{option}: {words}"):
        loaded(retinanet(positives=10), **{option: value})


def test_stated_anchors_are_those_of_the_file() -> None:
    state = of_torchvision("v1").state_dict()
    stated = {"aspect_ratios": (0.3, 1.0, 3.0), "anchor_sizes": (16.0, 32.0, 64.0, 128.0, 256.0)}
    dense = understand(WeightFile(Path("file.pth"), state, {}), SourceConfig(classes=CLASSES, **stated)).model.dense
    assert (dense.aspect_ratios, dense.anchor_sizes) == tuple(stated.values())


def test_a_centerness_is_not_read_as_an_iou() -> None:
    cfg = ModelConfig.model_validate({**RETINANET, "detector": "fcos", "backbone": {"depth": 18}})
    assert cfg.dense.quality == "centerness" and not any("model." in line for line in loaded(cfg, positives=10))
    with pytest.raises(CheckpointError, match=r"model\.dense\.quality: centerness in the file, iou here"):
        loaded(cfg, quality="iou", positives=10)


def test_other_sizes_of_anchors_are_reported_as_the_rpn_s_are() -> None:
    cfg, sizes = retinanet(positives=10), (16, 32, 64, 128, 256)
    assert not any("model.dense" in line for line in loaded(cfg))
    assert f"model.dense.anchor_sizes: {cfg.dense.anchor_sizes} in the file, {tuple(map(float, sizes))} here" in loaded(
        cfg, anchor_sizes=sizes
    )


@pytest.mark.parametrize(
    ("toolkit", "model", "words"),
    [
        ("mmdetection", {"detector": "retinanet"}, "model.detector: retinanet for torchvision and detectron2 only"),
        ("detectron2", {"detector": "fcos"}, "model.detector: fcos for torchvision only"),
        ("torchvision", {"detector": "fcos", "dense": {"quality": "iou"}}, "dense.quality: iou; .* has centerness"),
        ("torchvision", {"detector": "retinanet", "dense": {"scales": [1.0]}}, r"model\.dense\.scales: \(1\.0,\)"),
    ],
)
def test_what_a_toolkit_cannot_build_is_not_exported(toolkit: str, model: dict[str, Any], words: str) -> None:
    cfg = ModelConfig.model_validate({**model, "masks": False, "backbone": {"depth": 18}, "fpn": {"channels": 32}})
    with pytest.raises(ConfigError, match=words):
        export_weights(weights(cfg), cfg, CLASSES, toolkit)


# --- what an export says of the toolkit's defaults


def dense_differences(cfg: ModelConfig, toolkit: str) -> dict[str, str]:
    """Return {option of the head: "this model's value, the toolkit's"} of an export's notes."""
    found = (re.match(r"differs: dense\.(\w+) is (.*) in this model, (.*) by", note) for note in exported(cfg, toolkit))
    return {match[1]: f"{match[2]}, {match[3]}" for match in found if match}


def exported(cfg: ModelConfig, toolkit: str) -> list[str]:
    """Return the notes of an export."""
    shapes = {"backbone.stem.conv": (64, 3, 7, 7), "fpn.p6": (1,), "dense.boxes": (4 * cfg.dense.kinds, 1)}
    return export_weights({f"{k}.weight": torch.zeros(v) for k, v in shapes.items()}, cfg, CLASSES, toolkit).notes


@pytest.mark.parametrize("kind", BUILDERS)
def test_torchvision_s_own_detectors_differ_in_nothing_from_its_defaults(kind: str) -> None:
    source = understand(WeightFile(Path("file.pth"), of_torchvision(kind).state_dict(), {}), UNNAMED)
    assert dense_differences(source.model, "torchvision") == {}
    assert not any("LastLevelP6P7" in note for note in exported(source.model, "torchvision"))
    theirs = inspect.signature(type(of_torchvision(kind))).parameters
    options = {
        "score_threshold": "score_thresh", "nms_threshold": "nms_thresh", "detections_per_image": "detections_per_img",
        "pre_nms": "topk_candidates", "center_radius": "center_sampling_radius", "positive_iou": "fg_iou_thresh",
        "negative_iou": "bg_iou_thresh",
    }  # fmt: skip
    found = {key: theirs[name].default for key, name in options.items() if name in theirs}
    assert len(found) >= 5 and found == {key: getattr(source.model.dense, key) for key in found}


@pytest.mark.parametrize("norm", ["none", "gn"])
def test_detectron2_s_retinanet_differs_in_nothing_from_its_defaults(tmp_path: Path, norm: str) -> None:
    file = of_detectron2(weights(retinanet(norm, conv_bias=True)), norm == "gn")
    assert dense_differences(read(tmp_path / "model.pth", file, UNNAMED).model, "detectron2") == {}


def test_an_export_of_a_model_of_gndet_says_what_torchvision_s_fcos_and_retinanet_do_otherwise() -> None:
    tree = {"masks": False, "compat": "torchvision", "backbone": {"depth": 18}}
    assert not dense_differences(ModelConfig.model_validate({**tree, "detector": "fcos"}), "torchvision")
    options = {"assign": "atss", "score_threshold": 0.05}
    fcos = ModelConfig.model_validate({**tree, "detector": "fcos", "dense": options})
    assert dense_differences(fcos, "torchvision") == {"assign": "atss, center", "score_threshold": "0.05, 0.2"}
    v1, v2 = (
        ModelConfig.model_validate(
            {**tree, "detector": "retinanet", "dense": {"norm": {"kind": kind}, "detections_per_image": 100}}
        )
        for kind in ("none", "gn")
    )
    assert dense_differences(v1, "torchvision") == {"detections_per_image": "100, 300"}
    assert dense_differences(v2, "torchvision") == {"detections_per_image": "100, 300", "box_loss": "l1, giou"}


# --- what P6 is made from


def settings_for_p6(detector: str, p6: str, toolkit: str, norm: str, depth: int = 18) -> list[str]:
    """Return what an export says on P6."""
    norms = {"norm": {"kind": "none"}, "backbone": {"depth": depth, "norm": {"kind": "bn"}}}
    dense = {"norm": {"kind": norm}, "conv_bias": detector == "fcos" or norm == "none"}
    tree = {"detector": detector, "masks": False, "fpn": {"p6": p6}, "dense": dense, **norms}
    cfg = ModelConfig.model_validate(tree)
    return [note for note in exported(cfg, toolkit) if "P6" in note or "_BASE_" in note]


@pytest.mark.parametrize(
    ("detector", "p6", "norm", "depth", "words"),
    [
        ("retinanet", "p5", "none", 50, None),
        ("retinanet", "c5", "none", 50, "(2048, 256); retinanet_resnet50_fpn has LastLevelP6P7(256, 256)"),
        ("retinanet", "c5", "none", 18, "(512, 256); retinanet_resnet50_fpn has LastLevelP6P7(256, 256)"),
        ("retinanet", "c5", "gn", 50, None),
        ("retinanet", "p5", "gn", 50, "(256, 256); retinanet_resnet50_fpn_v2 has LastLevelP6P7(2048, 256)"),
        ("fcos", "p5", "gn", 50, None),
        ("fcos", "c5", "gn", 50, "(2048, 256); fcos_resnet50_fpn has LastLevelP6P7(256, 256)"),
    ],
)
def test_an_export_to_torchvision_says_what_p6_is_made_from(
    detector: str, p6: str, norm: str, depth: int, words: str | None
) -> None:
    expected = [] if words is None else [f"backbone with extra_blocks=LastLevelP6P7{words}"]
    assert settings_for_p6(detector, p6, "torchvision", norm, depth) == expected


@pytest.mark.parametrize("p6", ["p5", "c5"])
def test_torchvision_s_pyramid_with_the_stated_p6_computes_the_same(p6: str) -> None:
    norms = {"norm": {"kind": "none"}, "backbone": {"depth": 18, "norm": {"kind": "frozen_bn", "padding": "plain"}}}
    cfg = ModelConfig.model_validate({**RETINANET, **norms, "fpn": {"channels": 32, "p6": p6}})
    state = weights(cfg)
    export = export_weights(state, cfg, CLASSES, "torchvision")
    (channels,) = re.findall(r"=LastLevelP6P7\((\d+), (\d+)\);", "\n".join(export.notes))
    blocks = LastLevelP6P7(*map(int, channels))
    theirs = BackboneWithFPN(
        resnet18(norm_layer=FrozenBatchNorm2d), {f"layer{n}": str(n) for n in (2, 3, 4)}, [128, 256, 512], 32, blocks
    )
    prefix = "backbone."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in export.tensors.items() if k.startswith(prefix)})
    ours = build_model(cfg, 3)
    ours.load_state_dict(state)
    picture, size = torch.randint(0, 256, (1, 3, 128, 96)).float(), torch.tensor([[128, 96]])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.pixel_mean, cfg.pixel_std))
    with torch.no_grad():
        expected = theirs.eval()((picture - mean) / std)
        found, _ = ours.eval().features(picture, size, False)
    for level, maps in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(level, maps, rtol=1e-4, atol=1e-4 * float(maps.abs().max()))


def test_an_export_to_detectron2_names_the_config_that_makes_p6_from_the_same_map() -> None:
    assert settings_for_p6("retinanet", "c5", "detectron2", "none") == ["_BASE_ Base-RetinaNet.yaml"]
    (line,) = settings_for_p6("retinanet", "p5", "detectron2", "none")
    assert "model.backbone.top_block.in_channels 256, in_feature p5; Base-RetinaNet.yaml makes P6 from res5" in line


def test_p6_from_c5_is_refused_where_torchvision_would_take_p5() -> None:
    tree = {**RETINANET, "backbone": {"depth": 18}, "fpn": {"channels": 512, "p6": "c5"}}
    cfg = ModelConfig.model_validate(tree)
    with pytest.raises(ConfigError, match=r"model\.fpn\.p6: c5; torchvision makes P6 from P5 if .* the pyramid, 512"):
        export_weights(weights(cfg), cfg, CLASSES, "torchvision")
