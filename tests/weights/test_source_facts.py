"""What a file states about itself, and what a checkpoint keeps of its origin, is neither lost nor overridden."""

from pathlib import Path

import pytest
import torch
from foreign import detector, named, only, read, saved, weights
from torch import Tensor

from gndet.checkpoint import save_checkpoint
from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.toolbox.convert import with_group_norm
from gndet.weights.foreign.export import export_weights
from gndet.weights.foreign.files import WeightFile, write_torch
from gndet.weights.foreign.source import understand
from gndet.weights.read import Source, read_source

CLASSES = ("ant", "bee", "cow")
SMALL = detector("frozen_bn", "none", "2fc", 18)


def gndet_checkpoint(path: Path, cfg: ModelConfig, state: dict[str, Tensor]) -> str:
    save_checkpoint(path, {"model": state}, {"config": Config(model=cfg).model_dump(mode="json"), "classes": CLASSES})
    return str(path)


def test_affine_bn_is_recognized_by_its_statistics_after_training_too(tmp_path: Path) -> None:
    state = weights(SMALL)
    for key in [key for key in state if key.startswith("backbone.") and "running" in key]:
        state[key] = torch.full_like(state[key], 0.0 if key.endswith("mean") else 1 - 1e-5)
    assert read_source(gndet_checkpoint(tmp_path / "a", SMALL, state), SourceConfig()).fused == ("backbone",)
    assert read_source(gndet_checkpoint(tmp_path / "b", SMALL, weights(SMALL)), SourceConfig()).fused == ()


def test_ninety_classes_of_other_toolkits_stay_ninety(tmp_path: Path) -> None:
    state = weights(SMALL, 90)
    for format, classes, expected in (
        ("maskrcnn-benchmark", None, 90),
        ("torchvision", None, 80),
        ("torchvision", tuple(f"kind {i}" for i in range(90)), 90),
    ):
        source = read(tmp_path / "file.pth", named(state, format, box="2fc"), SourceConfig(classes=classes))
        assert source.num_classes == expected and source.classes == (classes or source.classes)


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("torchvision", "backbone.body.layer1.0.se.fc1.weight"),
        ("detectron2", "backbone.bottom_up.res3.0.conv2_offset.weight"),
        ("detectron2", "roi_heads.mask_head.coarse_head.weight"),
        ("mmdetection", "neck.pafpn_convs.0.conv.weight"),
    ],
)
def test_unknown_tensors_inside_a_known_part_are_refused(tmp_path: Path, format: str, key: str) -> None:
    tensors = named(weights(SMALL), format, box="2fc") | {key: torch.ones(3)}
    with pytest.raises(CheckpointError, match=f"1 tensors of parts that gndet reads have no place .*{key} \\[3\\]"):
        read(tmp_path / "file.pth", tensors)
    (tmp_path / "file.pth").unlink()
    del tensors[key]
    assert read(tmp_path / "file.pth", tensors).format == format


def of_mmdetection(tmp_path: Path, settings: str) -> Source:
    state = named(weights(detector("gn", "gn")), "mmdetection", "gn")
    return read(tmp_path / "file.pth", {"meta": {"config": settings}, "state_dict": state})


def test_settings_in_mmdetection_s_meta_are_used(tmp_path: Path) -> None:
    model = of_mmdetection(tmp_path, "style='caffe', norm_cfg=dict(type='GN', num_groups=16)").model
    assert model.backbone.stride_in_1x1 and model.part_norms()["fpn"].groups == 16
    model = of_mmdetection(tmp_path, "style='pytorch', conv_cfg=dict(type='ConvWS')").model
    assert not model.backbone.stride_in_1x1 and model.part_norms()["backbone"].weight_standardization
    assert not model.part_norms()["rpn"].weight_standardization
    assert model.part_norms()["fpn"].standardization == "qiao"


@pytest.mark.parametrize("toolkit", ["mmdetection", "torchvision", "detectron2"])
def test_channels_per_group_come_from_the_file_or_the_config(tmp_path: Path, toolkit: str) -> None:
    cfg = detector("gn", "gn", depth=18)
    norm = NormConfig(kind="gn", channels_per_group=16, padding="plain")
    parts = {part: getattr(cfg, part).model_copy(update={"norm": norm}) for part in ("backbone", "fpn", "box_head")}
    cfg = cfg.model_copy(update={**parts, "mask_head": cfg.mask_head.model_copy(update={"norm": norm}), "norm": norm})
    write_torch(tmp_path / "file.pth", export_weights(weights(cfg), cfg, CLASSES, toolkit).content)
    stated = SourceConfig(channels_per_group=None if toolkit == "mmdetection" else 16)
    assert read_source(str(tmp_path / "file.pth"), stated).model.part_norms()["fpn"].channels_per_group == 16


def test_what_a_gndet_checkpoint_states_cannot_be_overridden(tmp_path: Path) -> None:
    path = gndet_checkpoint(tmp_path / "a", SMALL, weights(SMALL))
    for stated in (SourceConfig(bgr=True), SourceConfig(pixel_mean=(1, 2, 3)), SourceConfig(format="torchvision")):
        with pytest.raises(ConfigError, match=r"train\.source\.\w+: .*is a gndet checkpoint"):
            read_source(path, stated)
    with pytest.raises(ConfigError, match="names 1 classes, its heads have 3"):
        read_source(path, SourceConfig(classes=("one",)))


def test_a_stated_format_must_be_the_file_s(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pth", named(weights(SMALL), "torchvision", box="2fc"))
    with pytest.raises(CheckpointError, match=r"expected train\.source\.format: detectron2"):
        read_source(str(file), SourceConfig(format="detectron2"))


@pytest.mark.parametrize(
    ("origin", "eps"),
    [
        ("MaskRCNN_ResNet50_FPN_Weights.COCO_V1", 0.0),
        ("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", 1e-5),
        ("", 1e-5),
        ("KeypointRCNN_ResNet50_FPN_Weights.COCO_V1", 0.0),
        ("KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY", 1e-5),
    ],
)
def test_torchvision_s_coco_weights_have_no_eps(origin: str, eps: float) -> None:
    file = WeightFile(Path("file.pth"), named(weights(SMALL), "torchvision", box="2fc"), {})
    source = understand(file, SourceConfig(), origin=origin)
    assert source.model.part_norms()["backbone"].eps == eps
    assert f"eps {eps:g}" in source.notes[0]


@pytest.mark.parametrize("rest", [NormConfig(kind="none"), NormConfig(kind="gn", groups=32)])
def test_gn_for_bn_leaves_the_other_parts_as_they_are(tmp_path: Path, rest: NormConfig) -> None:
    cfg = detector("frozen_bn", "gn", "4conv1fc", 18)
    inherit = {part: getattr(cfg, part).model_copy(update={"norm": None}) for part in ("fpn", "box_head", "mask_head")}
    cfg = cfg.model_copy(update=inherit | {"norm": rest})
    state = only(weights(cfg), "backbone", "fpn", "rpn", "box_head", "mask_head")
    source = read_source(gndet_checkpoint(tmp_path / "a", cfg, state), SourceConfig())
    norms = with_group_norm(source, source.model, 16).part_norms()
    assert norms["backbone"] == NormConfig(kind="gn", channels_per_group=16)
    assert {norms[part] for part in ("fpn", "box_head", "mask_head")} == {rest}
