"""Fine-tuning carries over what fits, class rows by name, and lists everything that does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gndet.checkpoint import point, save_checkpoint
from gndet.config.loading import config_from_dict
from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.weights.load import load_weights
from gndet.weights.policy import with_policy
from gndet.weights.read import read_source

GN = {"kind": "gn", "groups": 8}
HEADS = {"rpn", "box_head", "mask_head"}
OLD, NEW = ("cat", "dog", "bus"), ("bus", "tram", "cat")  # tram is new, dog is gone


def small(**changes: Any) -> Config:
    """Return the config of a small model; changes: sections of `model`."""
    model = {
        "norm": GN,
        "backbone": {"depth": 18},
        "fpn": {"channels": 16},
        "box_head": {"conv_channels": 16, "fc_channels": 24, "num_convs": 1},
        "mask_head": {"channels": 16, "num_convs": 1},
    }
    return config_from_dict({"model": {**model, **changes}}, "test")


def trained(cfg: Config, num_classes: int = len(OLD)) -> dict[str, Tensor]:
    """Return a model's weights with a different number in every element, as after training."""
    state = build_model(cfg.model, num_classes).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.rand(value.shape, generator=generator) + 2 if value.is_floating_point() else value
        for key, value in state.items()
    }


def save(path: Path, cfg: Config, classes: tuple[str, ...] = OLD, **groups: dict[str, Tensor]) -> Path:
    meta = {"update": 7, "classes": classes, "config": cfg.model_dump(mode="json")}
    save_checkpoint(path, groups or {"model": trained(cfg, len(classes))}, meta)
    return path


def loaded(path: Path, cfg: ModelConfig, classes: tuple[str, ...] = NEW) -> tuple[dict, dict, list[str]]:
    """Return the weights of a new model before and after loading, and the report."""
    model = build_model(cfg, len(classes))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load(model, path, classes, cfg)
    return before, model.state_dict(), report


def load(model: MaskRCNN, path: Path, classes: tuple[str, ...], cfg: ModelConfig) -> list[str]:
    """Load a checkpoint as training does; return the report."""
    whole = Config(model=cfg)
    source = read_source(str(path), whole.train.source)
    with_policy(source, cfg, whole.train)
    return load_weights(model, source, classes, whole)[0]


def test_rows_follow_their_class_by_name_and_all_else_is_equal(tmp_path: Path) -> None:
    cfg = small()
    source = trained(cfg)
    before, after, report = loaded(save(tmp_path / "a", cfg, model=source), cfg.model)
    for key, value in after.items():
        layer = key.rpartition(".")[0]
        if layer == "box_head.cls_score":  # bus, tram, cat, background <- cat 0, dog 1, bus 2, background 3
            assert torch.equal(value[[0, 2, 3]], source[key][[2, 0, 3]])
            assert torch.equal(value[1], before[key][1])
        elif layer == "box_head.bbox_pred":
            assert torch.equal(value[:4], source[key][8:12]) and torch.equal(value[8:], source[key][:4])
            assert torch.equal(value[4:8], before[key][4:8])
        elif layer == "mask_head.logits":
            assert torch.equal(value[[0, 2]], source[key][[2, 0]])
            assert torch.equal(value[1], before[key][1])
        else:
            assert torch.equal(value, source[key]), key
    assert report[1].startswith("tensors: backbone ")
    assert report[2:] == [
        "classes carried over by name: bus, cat",
        "newly initialized classes: tram",
        "classes of the file not used: dog",
    ]


def test_the_same_classes_give_the_same_model(tmp_path: Path) -> None:
    cfg = small()
    source = trained(cfg)
    _, after, report = loaded(save(tmp_path / "a", cfg, model=source), cfg.model, OLD)
    assert all(torch.equal(after[key], source[key]) for key in after)
    assert report[-1] == "classes carried over by name: cat, dog, bus"


def test_averaged_weights_of_a_runs_best_checkpoint_are_preferred(tmp_path: Path) -> None:
    cfg = small()
    source = trained(cfg)
    wrong = {key: torch.zeros_like(value) for key, value in source.items()}
    best = save(tmp_path / "checkpoints" / "update-1", cfg, model=wrong, ema=source)
    save(tmp_path / "checkpoints" / "update-2", cfg, model=wrong)
    point(tmp_path, "best", best)
    _, after, report = loaded(tmp_path, cfg.model, OLD)
    assert torch.equal(after["fpn.lateral2.conv.weight"], source["fpn.lateral2.conv.weight"])
    assert report[0].endswith("update-1, group ema, update 7")


def test_weights_are_found_in_the_home_and_through_a_file_that_names_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without links has `last` as a file with the name of the checkpoint."""
    cfg = small()
    source = trained(cfg)
    save(tmp_path / "checkpoints" / "update-1", cfg, model=source)
    (tmp_path / "last").write_text("checkpoints/update-1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~", "~/last", str(tmp_path / "last")):
        state = read_source(name, SourceConfig()).state
        assert torch.equal(state["fpn.lateral2.conv.weight"], source["fpn.lateral2.conv.weight"])


@pytest.mark.parametrize("from_masks", [True, False])
def test_heads_that_one_side_lacks_are_listed_tensor_by_tensor(tmp_path: Path, from_masks: bool) -> None:
    target, origin = small(masks=not from_masks), small(masks=from_masks)
    before, after, report = loaded(save(tmp_path / "a", origin), target.model, OLD)
    mask_keys = {key for key in build_model(small().model, 3).state_dict() if key.startswith("mask_head.")}
    title = "tensors of the file not used" if from_masks else "newly initialized tensors"
    listed = next(line for line in report if line.startswith(title)).removeprefix(title + ": ")
    assert set(listed.split(", ")) == mask_keys
    assert all(torch.equal(after[key], before[key]) for key in after if key in mask_keys)


def test_heads_missing_from_the_file_are_newly_initialized(tmp_path: Path) -> None:
    cfg = small()
    source = {key: value for key, value in trained(cfg).items() if key.split(".")[0] not in HEADS}
    before, after, report = loaded(save(tmp_path / "a", cfg, model=source), cfg.model)
    assert all(torch.equal(after[key], source.get(key, before[key])) for key in after)
    assert not any(line.startswith("classes") for line in report)
    title = "newly initialized tensors: "
    listed = next(line for line in report if line.startswith(title)).removeprefix(title)
    assert set(listed.split(", ")) == after.keys() - source.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fpn": {"channels": 32}}, r"fpn\.channels: 32 in the file, 16 here"),
        ({"backbone": {"depth": 34}}, r"absent here(.|\n)*backbone\.depth: 34 in the file, 18 here"),
        (
            {"rpn": {"aspect_ratios": [1]}},
            r"rpn\.objectness\.weight: \[1, 16, 1, 1\] in the file, expected \[3,",
        ),
        (
            {"box_head": {"conv_channels": 16, "fc_channels": 8, "num_convs": 1}},
            r"box_head\.cls_score\.weight: \[4, 8\] in the file, expected \[4, 24\]",
        ),
        ({"box_head": {"norm_last": False}}, r"model\.box_head\.norm_last: False in the file, True here"),
    ],
)
def test_tensors_of_another_shape_are_refused_with_the_likely_cause(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "a", small(**change))
    model = build_model(small().model, len(NEW))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(model, path, NEW, small().model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_chosen_parts_of_a_detector_start_another_kind_of_detector(tmp_path: Path) -> None:
    path = save(tmp_path / "a", small(), model=trained(small()))
    dense = small(detector="fcos", masks=False, dense={"num_convs": 1, "positives": 1.0}).model
    model = build_model(dense, len(NEW))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"\n  train\.source\.parts=\[backbone\] takes only the parts that fit"):
        load(model, path, NEW, dense)
    with pytest.raises(
        CheckpointError, match=r"train\.source\.parts: it has no dense, only backbone, fpn, rpn, box_head"
    ):
        read_source(str(path), SourceConfig(parts=("backbone", "dense")))
    source = read_source(str(path), SourceConfig(parts=("backbone",)))
    report, _ = load_weights(model, source, NEW, small().model_copy(update={"model": dense}))
    assert "left out by train.source.parts: fpn, rpn, box_head, mask_head" in report
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained(small())[key] if key.startswith("backbone.") else before[key])


def test_a_tensor_missing_from_the_backbone_is_refused(tmp_path: Path) -> None:
    cfg = small()
    source = trained(cfg)
    gone = next(key for key in source if key.startswith("backbone."))
    del source[gone]
    with pytest.raises(CheckpointError, match=f"1 tensors do not fit this model\n  {gone}: absent from the file"):
        loaded(save(tmp_path / "a", cfg, model=source), cfg.model)


@pytest.mark.parametrize("part", ["backbone", "fpn", "rpn", "box_head", "mask_head"])
def test_weights_of_another_norm_are_refused_for_each_part(tmp_path: Path, part: str) -> None:
    section = small().model.model_dump(mode="json")[part]
    origin = small(**{part: {**section, "norm": {"kind": "bn"}}})
    target = small(**{part: {**section, "norm": GN}})
    with pytest.raises(
        CheckpointError,
        match=rf"its {part} has bn, this model has gn \(8 groups\); (.|\n)* model\.{part}\.norm=\{{kind: bn",
    ):
        loaded(save(tmp_path / "a", origin), target.model)


@pytest.mark.parametrize(
    ("file_kind", "model_kind"), [("bn", "frozen_bn"), ("frozen_bn", "sync_bn"), ("sync_bn", "bn"), ("bn", "brn")]
)
def test_batch_norms_load_each_others_weights(tmp_path: Path, file_kind: str, model_kind: str) -> None:
    cfg = small(norm={"kind": file_kind})
    source = trained(cfg)
    path = save(tmp_path / "a", cfg, model=source)
    _, after, report = loaded(path, small(norm={"kind": model_kind}).model, OLD)
    assert all(torch.equal(after[key], source[key]) for key in after.keys() & source.keys())
    assert not any("num_batches_tracked" in line or "newly" in line or "not used" in line for line in report)


def test_other_settings_of_the_same_norm_are_reported(tmp_path: Path) -> None:
    path = save(tmp_path / "a", small())
    _, _, report = loaded(path, small(norm={"kind": "gn", "groups": 8, "eps": 1e-4, "padding": "plain"}).model)
    assert "backbone.norm: eps 1e-05 of the file is kept, not 0.0001 of the config" in report
    assert any(
        line.startswith("warning: fpn.norm was trained with padding: masked, here it is plain") for line in report
    )


def test_other_groups_are_another_norm(tmp_path: Path) -> None:
    path = save(tmp_path / "a", small())
    with pytest.raises(CheckpointError, match=r"its backbone has gn \(8 groups\), this model has gn \(4 groups\)"):
        loaded(path, small(norm={"kind": "gn", "groups": 4}).model)


def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {"model": {}}, {"config": {}})
    with pytest.raises(CheckpointError, match=r"meta\.json has no classes"):
        read_source(str(tmp_path / "a"), SourceConfig())
    with pytest.raises(CheckpointError, match="no group ema or model; it has optimizer"):
        loaded(save(tmp_path / "b", small(), optimizer={}), small().model)
