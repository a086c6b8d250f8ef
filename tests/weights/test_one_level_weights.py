"""C4 and DC5 files of other toolkits become the same network, and detectron2's can be written again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import NUM_CLASSES, named, only, read, saved, weights
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.weights.foreign.export import export_weights
from gndet.weights.foreign.formats import layer_names
from gndet.weights.load import initial_model

CLASSES = ("ant", "bee", "cow")
PARTS = ("backbone", "rpn", "box_head", "mask_head")
FILES = {  # neck, norm and depth of the backbone by format
    "detectron2_c4": ("c4", "gn", 18),
    "detectron2_dc5": ("dc5", "frozen_bn", 50),
    "detectron_c4": ("c4", "gn", 50),
    "mmdetection_c4": ("c4", "bn", 50),
}
BY_RATIO = ("detectron_c4", "mmdetection_c4")  # how the anchors of a cell are ordered


def detector(neck: str, kind: str, depth: int = 18, **changes: object) -> ModelConfig:
    """Return the config of a Mask R-CNN on one level; kind: of the backbone's norm."""
    tree = {
        "neck": neck, "norm": {"kind": "none"}, "backbone": {"norm": {"kind": kind}, "depth": depth},
        "mask_head": {"channels": 32}, "box_head": {"fc_channels": 48},
    }  # fmt: skip
    return ModelConfig.model_validate(tree | changes)


def anchors_by_ratio(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Order a cell's 15 anchors as Detectron and mmdetection do: row 5 * ratio + size is gndet's 3 * size + ratio."""
    rows = [3 * size + ratio for ratio in range(3) for size in range(5)]
    result = dict(state)
    for key in ("rpn.objectness.weight", "rpn.objectness.bias"):
        result[key] = state[key][rows]
    for key in ("rpn.deltas.weight", "rpn.deltas.bias"):
        result[key] = state[key][[4 * row + side for row in rows for side in range(4)]]
    return result


@pytest.mark.parametrize("format", FILES)
def test_every_tensor_of_a_file_comes_over(tmp_path: Path, format: str) -> None:
    neck, norm, depth = FILES[format]
    truth = weights(detector(neck, norm, depth))
    kind = "bn" if format == "mmdetection_c4" else "gn"
    content = named(anchors_by_ratio(truth) if format in BY_RATIO else truth, format, kind, "2fc")
    suffix = ".pkl" if format == "detectron_c4" else ".pth"
    if suffix == ".pkl":
        content = {"blobs": {key: tensor.numpy() for key, tensor in content.items()}}
    source = read(tmp_path / f"file{suffix}", content)
    assert (source.format, source.parts, source.unused) == (format, PARTS, [])
    assert (source.model.neck, source.num_classes) == (neck, NUM_CLASSES)
    assert source.model.compat == format.partition("_")[0]
    heads = (source.model.box_head, source.model.mask_head)
    assert {head.sampling_ratio for head in heads} == {0}  # no toolkit's C4 or DC5 config states another
    assert source.model.backbone.stride_in_1x1 == (norm in ("bn", "frozen_bn"))
    assert source.model.part_norms()["backbone"].kind == norm
    model = build_model(source.model, NUM_CLASSES)
    model.load_state_dict(source.state, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in truth.items())


def test_mmdetection_s_c4_files_are_told_from_its_others(tmp_path: Path) -> None:
    truth = weights(detector("c4", "bn", 18, masks=False))
    content = named(anchors_by_ratio(truth), "mmdetection_c4", "bn", "2fc")
    assert {key.split(".layer")[0] for key in content if ".layer" in key} == {"backbone", "roi_head.shared_head"}
    source = read(tmp_path / "file.pth", content)
    note = next(note for note in source.notes if note.startswith("read as"))
    assert "read as mmdetection C4: ResNet-18" in note and "BGR, converted to RGB" in note
    assert source.model.pixel_std == (1.0, 1.0, 1.0) and source.parts == PARTS[:-1]
    assert (source.model.rpn.pre_nms_train, source.model.box_head.pool_size) == (12000, 14)
    meta = {"config": "style='pytorch', img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb=True)"}
    source = read(tmp_path / "file.pth", {"state_dict": content, "meta": meta})
    assert (source.model.pixel_mean, source.model.pixel_std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    content = {key.replace("roi_head.shared_head.", "backbone."): value for key, value in content.items()}
    with pytest.raises(CheckpointError, match=r"mmdetection without a pyramid .*DC5; gndet reads .* of detectron2"):
        read(tmp_path / "file.pth", content)


def test_detectron2_s_names_of_res5_are_those_of_a_region_head() -> None:
    names = layer_names("detectron2_c4", detector("c4", "gn", 50), PARTS)
    assert names["backbone.stem.conv"] == "backbone.stem.conv1"
    assert names["backbone.res4.0.conv1.norm"] == "backbone.res4.0.conv1.norm"
    assert names["backbone.res5.0.shortcut.conv"] == "roi_heads.res5.0.shortcut"
    assert names["backbone.res5.2.conv3.norm"] == "roi_heads.res5.2.conv3.norm"
    assert names["mask_head.deconv"] == "roi_heads.mask_head.deconv" and "box_head.fcs.0" not in names


@pytest.mark.parametrize("format", ["detectron2_c4", "detectron2_dc5"])
def test_an_export_to_detectron2_reads_back_equal(tmp_path: Path, format: str) -> None:
    neck, norm, depth = FILES[format]
    cfg = detector(neck, norm, depth, pixel_std=(1.0, 1.0, 1.0))
    state = weights(cfg)
    export = export_weights(state, cfg, CLASSES, "detectron2")
    assert set(named(state, format, "gn", "2fc")) == set(export.tensors)
    assert f"_BASE_ Base-RCNN-{'C4' if neck == 'c4' else 'DilatedC5'}.yaml" in export.notes
    stated = SourceConfig(stride_in_1x1=False)
    source = read(tmp_path / "file.pth", export.content, stated)
    assert source.state.keys() == state.keys()
    assert all(torch.equal(source.state[key], tensor) for key, tensor in state.items())


def test_no_other_toolkit_takes_them() -> None:
    cfg, state = detector("c4", "gn"), {"backbone.stem.conv.weight": torch.zeros(64, 3, 7, 7)}
    with pytest.raises(ConfigError, match=r"model\.neck: c4; torchvision has no such detector, --to detectron2"):
        export_weights(state, cfg, CLASSES, "torchvision")
    cfg = detector("dc5", "gn", backbone={"depth": 50, "dilated_blocks": "after_first"})
    with pytest.raises(ConfigError, match="after_first; detectron2 dilates all blocks"):
        export_weights(state, cfg, CLASSES, "detectron2")


def test_a_backbone_s_file_fills_res5_of_the_regions(tmp_path: Path) -> None:
    cfg = detector("c4", "gn", 50)
    truth = only(weights(cfg), "backbone")
    tensors = named(truth, "detectron", "gn") | {"pred_w": torch.zeros(1000, 8), "pred_b": torch.zeros(1000)}
    file = saved(tmp_path / "R-50-GN.pkl", {key: np.asarray(value) for key, value in tensors.items()})
    caffe = {"pixel_mean": (122.7717, 115.9465, 102.9801), "pixel_std": (1.0, 1.0, 1.0)}
    config = Config.model_validate(
        {"model": cfg.model_copy(update=caffe).model_dump(), "train": {"weights": str(file)}}
    )
    model, _, notes, fates = initial_model(config, CLASSES)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in truth.items())
    (new,) = (note for note in notes if note.startswith("newly initialized tensors"))
    assert "backbone" not in new and "rpn.objectness.weight" in new
    assert {fate.what for name, fate in fates.items() if "res5" in name} == {"as in the file"}


def test_sizes_that_the_file_does_not_state_can_be_stated(tmp_path: Path) -> None:
    cfg = detector("c4", "gn", rpn={"anchor_sizes": (64, 128, 256, 512)}, masks=False)
    content = named(weights(cfg), "detectron2_c4", "gn", "2fc")
    with pytest.raises(CheckpointError, match=r"12 anchors per cell, expected 15 .*; train\.source\.anchor_sizes"):
        read(tmp_path / "file.pth", content)
    source = read(tmp_path / "file.pth", content, SourceConfig(anchor_sizes=(64, 128, 256, 512)))
    assert source.model.rpn.anchor_sizes == (64, 128, 256, 512) and source.parts == PARTS[:-1]


def test_a_dc5_detector_is_refused_where_other_blocks_are_dilated(tmp_path: Path) -> None:
    cfg = detector("dc5", "gn", 50, compat="detectron2")
    file = saved(tmp_path / "file.pth", named(weights(cfg), "detectron2_dc5", "gn", "2fc"))
    model = cfg.model_dump()
    model["backbone"]["dilated_blocks"] = "after_first"
    config = Config.model_validate({"model": model, "train": {"weights": str(file)}})
    with pytest.raises(CheckpointError, match=r"backbone\.dilated_blocks: all in the file, after_first here"):
        initial_model(config, CLASSES)
