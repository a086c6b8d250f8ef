"""Cascades and class-agnostic boxes of detectron2 and mmdetection come over with every tensor, and go back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import NUM_CLASSES, detector, named, read, saved, weights
from torch import Tensor

from gndet.config.cascade import MMDETECTION, CascadeConfig
from gndet.config.loading import config_from_dict
from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.build import build_model
from gndet.weights.foreign.export import export_weights
from gndet.weights.load import load_weights
from gndet.weights.read import read_source

CLASSES = ("ant", "bee", "cow")
FORMATS = ("detectron2", "mmdetection")


def cascade(
    toolkit: str, backbone: str = "gn", heads: str = "gn", box: str = "4conv1fc", **changes: Any
) -> ModelConfig:
    cfg = detector(backbone, heads, box, 18, detector="cascade_rcnn", **changes)
    box_head = cfg.box_head.model_copy(update={"class_agnostic": True})
    own = CascadeConfig(**(MMDETECTION.defaults["cascade"] if toolkit == "mmdetection" else {}))
    return cfg.model_copy(update={"box_head": box_head, "cascade": own})


def file_of(cfg: ModelConfig, toolkit: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's tensors by gndet's names and by the toolkit's."""
    state, kind = weights(cfg), "gn" if cfg.norm.kind == "gn" else "bn"
    return state, named(state, toolkit, kind, cfg.box_head.kind)


@pytest.mark.parametrize("toolkit", FORMATS)
@pytest.mark.parametrize("norms", [("gn", "gn", "4conv1fc"), ("bn", "none", "2fc")], ids=lambda norms: norms[0])
def test_a_cascade_s_file_is_read_and_written_again_as_it_was(
    tmp_path: Path, toolkit: str, norms: tuple[str, str, str]
) -> None:
    cfg = cascade(toolkit, *norms)
    state, file = file_of(cfg, toolkit)
    key = {
        "detectron2": "roi_heads.box_predictor.2.bbox_pred.weight",
        "mmdetection": "roi_head.bbox_head.2.fc_reg.bias",
    }
    assert len(file[key[toolkit]]) == 4
    stated = {"bgr": False, "pixel_std": (58.395, 57.12, 57.375)} if toolkit == "mmdetection" else {}
    source = read(tmp_path / "file.pth", file, SourceConfig(classes=CLASSES, **stated))
    assert (source.format, source.num_classes, source.unused) == (toolkit, NUM_CLASSES, [])
    assert source.state.keys() == state.keys()
    assert all(torch.equal(source.state[name], value) for name, value in state.items())
    model = source.model
    assert (model.detector, model.cascade, model.box_head.class_agnostic) == ("cascade_rcnn", cfg.cascade, True)
    assert any("a cascade of 3 stages" in note and "deltas of all classes" in note for note in source.notes)
    export = export_weights(source.state, model, CLASSES, toolkit)
    assert export.tensors.keys() == file.keys()
    assert all(torch.equal(export.tensors[name], value) for name, value in file.items())
    assert any("Cascade" in note for note in export.notes)
    assert not any("cascade." in note for note in export.notes if note.startswith("differs"))


@pytest.mark.parametrize("toolkit", FORMATS)
def test_a_cascade_without_masks_is_read(tmp_path: Path, toolkit: str) -> None:
    _, file = file_of(cascade(toolkit, masks=False), toolkit)
    source = read(tmp_path / "file.pth", file)
    assert (source.model.detector, source.model.masks) == ("cascade_rcnn", False)
    assert source.parts == ("backbone", "fpn", "rpn", "box_head")


def test_class_agnostic_boxes_of_one_stage_are_read_and_written(tmp_path: Path) -> None:
    cfg = detector("gn", "gn", depth=18)
    cfg = cfg.model_copy(update={"box_head": cfg.box_head.model_copy(update={"class_agnostic": True})})
    state, file = file_of(cfg, "detectron2")
    source = read(tmp_path / "file.pth", file)
    assert source.model.detector == "mask_rcnn" and source.model.box_head.class_agnostic
    assert all(torch.equal(source.state[name], value) for name, value in state.items())
    export = export_weights(source.state, source.model, CLASSES, "detectron2")
    assert export.tensors.keys() == file.keys() and any("CLS_AGNOSTIC" in note for note in export.notes)
    with pytest.raises(ConfigError, match="class_agnostic: torchvision's detectors have a box per class"):
        export_weights(source.state, source.model, CLASSES, "torchvision")


def test_rows_of_classes_are_carried_over_in_every_stage_and_boxes_as_they_are(tmp_path: Path) -> None:
    cfg = cascade("mmdetection")
    state, file = file_of(cfg, "mmdetection")
    stated = SourceConfig(classes=CLASSES, bgr=False, pixel_std=(58.395, 57.12, 57.375))
    source = read(tmp_path / "file.pth", file, stated)
    wanted = config_from_dict({"train": {"norm_policy": "error"}}, "test")
    model_cfg = source.model.model_copy(update={"norm": NormConfig(kind="gn", padding="plain")})
    wanted = wanted.model_copy(update={"model": model_cfg})
    model = build_model(model_cfg, 2)
    notes, _ = load_weights(model, source, ("cow", "dog"), wanted)
    loaded = model.state_dict()
    for i in range(3):
        scores, masks = f"box_head.stages.{i}.cls_score.weight", f"mask_head.stages.{i}.logits.weight"
        assert torch.equal(loaded[scores][0], state[scores][2]) and torch.equal(loaded[scores][-1], state[scores][-1])
        assert torch.equal(loaded[masks][0], state[masks][2]) and not torch.equal(loaded[scores][1], state[scores][1])
        boxes = f"box_head.stages.{i}.bbox_pred.weight"
        assert torch.equal(loaded[boxes], state[boxes])
    assert "classes carried over by name: cow" in notes


def test_a_cascade_of_other_stages_is_refused(tmp_path: Path) -> None:
    _, file = file_of(cascade("detectron2"), "detectron2")
    path = saved(tmp_path / "file.pth", {key: value for key, value in file.items() if ".2." not in key[:27]})
    with pytest.raises(CheckpointError, match=r"a cascade of 2 stages .* expected 3 stages"):
        read_source(str(path), SourceConfig())


def test_a_cascade_with_a_box_for_each_class_is_refused_by_name(tmp_path: Path) -> None:
    """mmdetection's reg_class_agnostic=False."""
    _, file = file_of(cascade("mmdetection"), "mmdetection")
    for key in [key for key in file if ".fc_reg." in key]:
        file[key] = torch.cat([file[key]] * NUM_CLASSES)
    with pytest.raises(
        CheckpointError,
        match=r"roi_head\.bbox_head\.0\.fc_reg has 12 rows, a box for each class; expected 4, .* choose a cascade with "
        "reg_class_agnostic=True, or a file without cascade",
    ):
        read(tmp_path / "file.pth", file)


def test_mask_heads_that_a_toolkit_s_cascade_does_not_have_are_refused() -> None:
    for ours, theirs, words in (
        ("mmdetection", "detectron2", "mask_stages: each; a cascade of detectron2 has one mask head"),
        ("detectron2", "mmdetection", "mask_stages: first; a cascade of mmdetection has a mask head per stage"),
    ):
        cfg = cascade(ours)
        with pytest.raises(ConfigError, match=words):
            export_weights(weights(cfg), cfg, CLASSES, theirs)


def test_a_mask_rcnn_s_heads_do_not_become_a_cascade_s(tmp_path: Path) -> None:
    plain = detector("gn", "gn", depth=18)
    source = read(tmp_path / "file.pth", named(weights(plain), "detectron2", "gn"), SourceConfig(classes=CLASSES))
    cfg = source.model.model_copy(update={"detector": "cascade_rcnn", "box_head": cascade("detectron2").box_head})
    whole = config_from_dict({}, "test").model_copy(update={"model": cfg})
    with pytest.raises(CheckpointError, match=r"model\.detector: mask_rcnn in the file, cascade_rcnn here"):
        load_weights(build_model(cfg, NUM_CLASSES), source, CLASSES, whole)
