"""Unusable weights are refused; the error names the file, the keys or the option, and what to do."""

import pickle
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import BN_META, detector, named, only, read, saved, weights
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig, TrainConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.weights.load import initial_model
from gndet.weights.read import read_source

CLASSES = ("ant", "bee", "cow")
SMALL = detector("frozen_bn", "none", "2fc", 18)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """Return the tensors of a small frozen-BN detector, by gndet's names."""
    return weights(SMALL)


def refusal(where: Path | str, cfg: SourceConfig | None = None) -> str:
    """Read weights that must be refused; return the error's text, which must name them."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_source(str(where), cfg or SourceConfig())
    assert str(where) in str(caught.value)
    return str(caught.value)


def without(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def test_a_truncated_file_is_named_as_such(tmp_path: Path, small: dict[str, Tensor]) -> None:
    file = saved(tmp_path / "file.pth", named(small, "torchvision", box="2fc"))
    file.write_bytes(file.read_bytes()[:-100_000])
    assert "damaged or truncated" in refusal(file)


class Attack:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "run")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_what_a_file_asks_for_is_not_run(tmp_path: Path, suffix: str) -> None:
    content = {"blobs": {"conv1_w": Attack(tmp_path / "canary")}}
    file = saved(tmp_path / f"file{suffix}", content)
    assert "nothing was run" in refusal(file)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "canary").exists(), "the attack does not work, so the test proves nothing"


def test_keys_of_an_unknown_format_are_listed(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pth", {"encoder.0.weight": torch.rand(4, 3), "encoder.0.bias": torch.rand(4)})
    text = refusal(file)
    assert "encoder.0.weight [4, 3], encoder.0.bias [4]" in text and "maskrcnn-benchmark" in text


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("backbone.fpn_output", "backbone.fpn_output2.weight (fpn.output2.conv.weight here): absent"),
        ("backbone.bottom_up.res4.1", "its backbone has (2, 2, 1, 2) basic blocks"),
        ("backbone.bottom_up.res4.1.conv2", "backbone.bottom_up.res4.1.conv2.weight"),
        ("backbone.bottom_up.res4.1.conv2.norm.running_var", "1 tensors of a detectron2 model"),
        (
            "backbone.bottom_up.stem.conv1.norm.running_var",
            "norm.running_mean here): [64] in the file, expected none",
        ),
        ("proposal_generator.rpn_head.anchor_deltas", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("roi_heads.box_head.fc2", "roi_heads.box_head.fc2.weight (box_head.fcs.1.weight here): absent"),
        ("roi_heads.mask_head.deconv", "roi_heads.mask_head.deconv.weight"),
        ("roi_heads.mask_head.mask_fcn2", "roi_heads.mask_head.mask_fcn"),
    ],
)
def test_half_a_part_is_named_by_its_absent_keys(
    tmp_path: Path, small: dict[str, Tensor], gone: str, word: str
) -> None:
    file = saved(tmp_path / "file.pth", {"model": without(named(small, "detectron2", box="2fc"), gone)})
    text = refusal(file)
    assert word in text and "missing" in text


def odd_files() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Return tensors of models that gndet does not support, and a word that the error must contain."""
    conv, bias = torch.zeros(64, 64, 1, 1), torch.zeros(4)
    return {
        "detectron2's RPN on C4": (
            {"backbone.res2.0.conv1.weight": conv, "proposal_generator.rpn_head.conv.bias": bias}, "(1, 0, 0, 0)"
        ),
        "Detectron on C5": ({"conv1_w": conv, "conv_rpn_w": conv, "fc6_w": conv}, "without a pyramid"),
        "maskrcnn-benchmark C4": ({"roi_heads.box.feature_extractor.head.layer4.0.conv1.weight": conv}, "C4"),
        "mmdetection DC5": ({"backbone.layer1.0.bn1.bias": bias, "roi_head.bbox_head.fc_cls.weight": bias}, "DC5"),
        "mmdetection 1": ({"backbone.layer1.0.conv1.weight": conv, "bbox_head.fc_cls.weight": bias}, "mmdetection 1"),
        "RetinaNet": ({"backbone.layer1.0.conv1.weight": conv, "bbox_head.retina_cls.weight": bias}, "one-stage"),
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_files())
def test_unsupported_models_are_named(tmp_path: Path, name: str) -> None:
    tensors, word = odd_files()[name]
    assert word in refusal(saved(tmp_path / "file.pth", tensors))


def test_a_stage_with_other_groups_than_the_first_is_refused(tmp_path: Path) -> None:
    tensors = named(only(weights(detector("gn", "none")), "backbone"), "resnet")
    for i in range(3):
        tensors[f"layer1.{i}.conv2.weight"] = torch.zeros(64, 4, 3, 3)
    text = refusal(saved(tmp_path / "file.pth", tensors))
    assert "layer2.0.conv2.weight (backbone.res3.0.conv2.conv.weight here): [128, 128, 3, 3] in the file" in text


def test_boxes_that_are_neither_by_class_nor_of_all_classes_are_refused(
    tmp_path: Path, small: dict[str, Tensor]
) -> None:
    tensors = named(small, "detectron2", box="2fc")
    tensors["roi_heads.box_predictor.bbox_pred.weight"] = torch.zeros(8, 48)
    assert "8 rows beside 4 of" in (text := refusal(saved(tmp_path / "file.pth", tensors))) and "4 per class" in text
    tensors = named(small, "maskrcnn-benchmark", box="2fc")
    tensors["roi_heads.box.predictor.bbox_pred.weight"] = torch.zeros(8, 48)  # of the background and of all classes
    assert "class-agnostic boxes are read from detectron2 and" in refusal(saved(tmp_path / "file.pth", tensors))


def test_other_numbers_of_anchors_are_refused(tmp_path: Path, small: dict[str, Tensor]) -> None:
    tensors = named(small, "detectron2", box="2fc")
    tensors["proposal_generator.rpn_head.objectness_logits.weight"] = torch.zeros(9, 32, 1, 1)
    assert "9 anchors per cell, expected 3" in refusal(saved(tmp_path / "file.pth", tensors))


def test_a_bias_before_gn_is_refused(tmp_path: Path) -> None:
    tensors = named(only(weights(detector("gn", "none", depth=18)), "backbone"), "resnet")
    text = refusal(saved(tmp_path / "file.pth", tensors | {"layer1.0.conv1.bias": torch.ones(64)}))
    assert "layer1.0.conv1 has a bias before layer1.0.bn1, a GN" in text


# --- weight names


def test_a_name_without_network_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it caches the proxy
    text = refusal("ResNet50_Weights.IMAGENET1K_V2")
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in text
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth") in text


def test_a_name_is_read_from_torchvision_s_folder_and_nothing_in_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = only(weights(detector("bn", "none", depth=18)), "backbone")
    saved(folder / "resnet18-f37072fd.pth", named(state, "resnet"))
    source = read_source("torchvision:ResNet18_Weights.IMAGENET1K_V1", SourceConfig())
    assert source.notes[0] == "loaded torchvision ResNet18_Weights.IMAGENET1K_V1"
    assert all(torch.equal(source.state[key], value) for key, value in state.items())
    saved(folder / "resnet18-f37072fd.pth", {"state_dict": Attack(tmp_path / "canary")})
    with pytest.raises(CheckpointError, match="nothing was run"):
        read_source("ResNet18_Weights.IMAGENET1K_V1", SourceConfig())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["ResNet51_Weights.IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V9"])
def test_a_name_that_torchvision_does_not_have_is_refused(name: str) -> None:
    assert "torchvision has no such weights" in refusal(name)


def test_nonsense_is_neither_file_nor_name(tmp_path: Path) -> None:
    for where in ("resnet fifty", tmp_path / "absent.pth"):
        assert "no such file or folder, and it is not a weight name like ResNet50_Weights" in refusal(where)


def test_a_name_of_timm_without_timm_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    text = refusal("timm:resnet50_gn.a1h_in1k")
    assert "pip install timm" in text and "https://huggingface.co/timm/resnet50_gn.a1h_in1k" in text


# --- what the user states about a file


def test_stated_facts_override_the_usual_ones_of_the_format(tmp_path: Path, small: dict[str, Tensor]) -> None:
    mean, std = (120.0, 110.0, 100.0), (2.0, 3.0, 4.0)
    stated = SourceConfig(
        format="detectron2", bgr=False, pixel_mean=mean, pixel_std=std, norm_eps=0.001, classes=CLASSES,
    )  # fmt: skip
    tensors = named(small, "detectron2", box="2fc")
    source = read(tmp_path / "file.pth", {"model": tensors}, stated)
    assert torch.equal(source.state["backbone.stem.conv.weight"], tensors["backbone.bottom_up.stem.conv1.weight"])
    assert (source.model.pixel_mean, source.model.pixel_std, source.classes) == (mean, std, CLASSES)
    assert source.model.backbone.norm.eps == 0.001


def test_the_number_of_groups_is_the_stated_one(tmp_path: Path) -> None:
    tensors = named(only(weights(detector("gn", "none", depth=18)), "backbone"), "resnet")
    assert read(tmp_path / "file.pth", tensors, SourceConfig(groups=8)).model.backbone.norm.groups == 8


def test_classes_of_another_number_are_refused(tmp_path: Path, small: dict[str, Tensor]) -> None:
    file = saved(tmp_path / "file.pth", named(small, "detectron2", box="2fc"))
    text = refusal(file, SourceConfig(classes=("ant", "bee")))
    assert "train.source.classes names 2 classes, its heads have 3" in text
    meta = {"CLASSES": ["ant"], "config": BN_META}
    file = saved(file, {"meta": meta, "state_dict": named(small, "mmdetection", box="2fc")})
    assert "its meta names 1 classes, its heads have 3" in refusal(file)


@pytest.mark.parametrize("format", ["mmdetection", "resnet", "detectron", "torchvision", "maskrcnn-benchmark"])
def test_another_format_than_the_stated_one_is_refused(tmp_path: Path, small: dict[str, Tensor], format: str) -> None:
    file = saved(tmp_path / "file.pth", named(small, "detectron2", box="2fc"))
    text = refusal(file, SourceConfig(format=format))
    assert f"expected train.source.format: {format}, but its tensors are named as in detectron2" in text


# --- in a model


def started(file: Path, model: ModelConfig, **train: Any) -> list[str]:
    """Return the report of a training that starts from a file."""
    train = {"weights": str(file), "source": SourceConfig(classes=CLASSES)} | train
    return initial_model(Config(model=model, train=TrainConfig(**train)), CLASSES).notes


@pytest.mark.parametrize(
    ("depth", "tensor"),
    [
        (101, "backbone.res4.6.conv1.conv.weight: [256, 1024, 1, 1] in the file, absent here"),
        (18, "backbone.res2.0.conv1.conv.weight: [64, 64, 3, 3] in the file, expected [64, 64, 1, 1]"),
    ],
)
def test_a_backbone_of_another_depth_is_the_likely_cause(tmp_path: Path, depth: int, tensor: str) -> None:
    state = only(weights(detector("frozen_bn", "none", depth=depth)), "backbone")
    file = saved(tmp_path / "file.pth", named(state, "resnet"))
    model = ModelConfig.model_validate({"norm": {"kind": "none"}, "backbone": {"norm": {"kind": "frozen_bn"}}})
    with pytest.raises(CheckpointError) as caught:
        started(file, model)
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and tensor in text
    assert f"likely cause: model.backbone.depth: {depth} in the file, 50 here" in text
    file.unlink()


CHANGES = [
    ("pixel_mean", (123.675, 116.28, 103.53), "model.pixel_mean: (122.7717, 115.9465, 102.9801) in the file"),
    ("rpn.anchors", "exact", "model.rpn.anchors: detectron in the file, exact here"),
    ("box_head.roi_align", "aligned", "model.box_head.roi_align: detectron in the file, aligned here"),
    ("mask_head.roi_align", "aligned", "model.mask_head.roi_align: detectron in the file, aligned here"),
]


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Tensor]) -> tuple[Path, ModelConfig]:
    """Return a file of maskrcnn-benchmark, and the model that fits its weights."""
    file = tmp_path_factory.mktemp("benchmark") / "file.pth"
    saved(file, {"model": named(small, "maskrcnn-benchmark", box="2fc")})
    return file, read_source(str(file), SourceConfig()).model


def test_a_model_with_the_file_s_conventions_is_accepted(benchmark_file: tuple[Path, ModelConfig]) -> None:
    assert not any("warning" in note for note in started(*benchmark_file))


@pytest.mark.parametrize(("option", "value", "message"), CHANGES)
def test_conventions_that_disagree_are_refused_by_name_or_reported(
    benchmark_file: tuple[Path, ModelConfig], option: str, value: object, message: str
) -> None:
    file, model = benchmark_file
    part, _, name = option.rpartition(".")
    section = getattr(model, part).model_copy(update={name: value}) if part else value
    model = model.model_copy(update={part or name: section})
    with pytest.raises(CheckpointError) as caught:
        started(file, model)
    assert message in str(caught.value) and "train.source.differences=report" in str(caught.value)
    source = SourceConfig(classes=CLASSES, differences="report")
    warnings = [note for note in started(file, model, source=source) if note.startswith("warning: ")]
    assert len(warnings) == 1 and message in warnings[0]


def test_the_preset_that_would_fit_is_named(benchmark_file: tuple[Path, ModelConfig]) -> None:
    file, model = benchmark_file
    plain = ModelConfig.model_validate(SMALL.model_dump(exclude_unset=True) | {"rpn": {"norm": None}})
    plain = plain.model_copy(update={"pixel_mean": model.pixel_mean})
    with pytest.raises(CheckpointError, match=r"model\.compat=detectron sets all of its toolkit's conventions"):
        started(file, plain)


def test_a_stride_elsewhere_is_refused(tmp_path: Path) -> None:
    state = only(weights(detector("frozen_bn", "none")), "backbone")
    file = saved(tmp_path / "file.pth", {"model": named(state, "detectron2_backbone")})
    model = detector("frozen_bn", "none", "2fc")
    with pytest.raises(CheckpointError, match=r"model\.backbone\.stride_in_1x1: True in the file, False here"):
        started(file, model)
    started(file, model, source=SourceConfig(stride_in_1x1=False))
    file.unlink()
