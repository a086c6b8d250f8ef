"""Dense detectors: losses and gradients, images kept apart, what is detected, and what losses are divided by."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from models import NUM_CLASSES, make_batch, rows
from torch import Tensor

from gndet.checkpoint import load_checkpoint
from gndet.cli.main import main
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import train_sample
from gndet.data.datasets.reading import read_dataset
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.dense import DenseDetector
from gndet.modeling.dense_head import Predicted
from gndet.modeling.fpn import halved
from gndet.modeling.recompute import set_memory
from gndet.toolbox.invariance.leaks import Leak, find_leaks
from gndet.weights.load import initial_model
from gndet.weights.positives import with_positives

SIZES = [(96, 128), (128, 97), (65, 80), (128, 128)]  # the fourth has no objects
KINDS: dict[str, dict[str, Any]] = {
    "atss": {"detector": "fcos"},
    "center": {"detector": "fcos", "dense": {"assign": "center", "quality": "iou", "positives": "image"}},
    "retinanet": {"detector": "retinanet"},
    "retinanet, giou": {"detector": "retinanet", "fpn": {"p6": "c5"}, "dense": {"box_loss": "giou", "assign": "atss"}},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("thin")


def config(kind: str, **dense: object) -> ModelConfig:
    given = KINDS[kind]
    return ModelConfig.model_validate({
        "detector": given["detector"], "masks": False, "norm": {"channels_per_group": 8}, "backbone": {"depth": 18},
        "fpn": {"channels": 16, **given.get("fpn", {})},
        "dense": {"num_convs": 1, "positives": 10.0, **given.get("dense", {}), **dense},
    })  # fmt: skip


def model_of(kind: str, **dense: object) -> DenseDetector:
    torch.manual_seed(0)
    return build_model(config(kind, **dense), NUM_CLASSES).double()


def gradients(model: DenseDetector, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum(loss.sum() for loss in losses.values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@each_kind
def test_an_image_without_objects_trains_every_parameter_and_no_box(kind: str) -> None:
    model, batch = model_of(kind), rows(make_batch(SIZES), 3, 4)
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    scores = torch.cat([level.logits for level in model.dense(features, areas)], 1).sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.2)
    losses = model(batch)
    assert 0 < losses.pop("loss_cls").item() < 1 and all(loss.item() == 0 for loss in losses.values())
    found = gradients(model, model(batch))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["dense.cls_logits.bias"].any() and not found["dense.boxes.bias"].any()


@each_kind
def test_an_image_trains_and_detects_alone_as_in_any_batch(kind: str) -> None:
    model, batch = model_of(kind, score_threshold=0.0), make_batch(SIZES)
    losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_box_reg"} | ({"loss_quality"} if "retina" not in kind else set())
    assert all((loss[:3] > 0).all() for loss in losses.values())
    together, found = gradients(model, losses), model.eval().detect(batch.images, batch.sizes, batch.padded)
    model.train()
    total = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for i, size in enumerate(SIZES):
        alone = make_batch([size], first=i)
        for name, loss in model(alone).items():
            torch.testing.assert_close(loss[0], losses[name][i], rtol=1e-10, atol=1e-12)
        for name, gradient in gradients(model, model(alone)).items():
            total[name] += gradient
        single = model.eval().detect(alone.images, alone.sizes, alone.padded)
        model.train()
        torch.testing.assert_close(single.scores[0], found.scores[i], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(single.boxes[0], found.boxes[i], rtol=1e-9, atol=1e-9)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-8, atol=1e-10)


def leaks(model: DenseDetector) -> list[Leak]:
    return find_leaks(model, [make_batch([size], first=i) for i, size in enumerate(SIZES)], make_batch(SIZES))


@each_kind
def test_no_coupling_of_images(kind: str) -> None:
    assert leaks(model_of(kind)) == []


def test_a_coupling_is_found() -> None:
    model = model_of("atss")
    model.dense._divisor = lambda positive: positive.sum().clamp(min=1)  # of the batch, as in torchvision's FCOS
    assert [(leak.coupling, leak.where) for leak in leaks(model)] == [("normalizer", "loss_cls")]
    assert leaks(model_of("retinanet", anchors_in_padding=True))
    assert "model.dense.anchors_in_padding: true" in config("atss", anchors_in_padding=True).batch_coupling()


@pytest.mark.parametrize("memory", ["balanced", "lean"])
def test_less_memory_gives_the_same_gradients(memory: str) -> None:
    model, batch = model_of("atss"), make_batch(SIZES)
    for module in model.dense.modules():  # biases before a norm
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    expected = gradients(model, model(batch))
    set_memory(model, memory)
    for name, gradient in gradients(model, model(batch)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert expected["dense.cls_convs.0.conv.bias"].any()


def test_the_best_of_all_anchors_and_classes_are_found_with_ties() -> None:
    model = model_of("atss", pre_nms=6, score_threshold=0.3)
    head, generator = model.dense, torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randint(-2, 3, (1, 40, NUM_CLASSES), generator=generator).double()
        quality = torch.randint(-1, 2, (1, 40), generator=generator).double()
        anchors = torch.arange(160.0).view(40, 4)
        inside = torch.rand(1, 40, generator=generator) < 0.8
        predicted = Predicted(logits, torch.zeros(1, 40, 4), quality)
        scores, boxes, labels = head._candidates(predicted, anchors, 8, inside)
        whole = (logits.sigmoid() * quality.sigmoid()[..., None]).sqrt()
        whole = torch.where(inside[..., None] & (whole > 0.3), whole, -1.0).flatten()
        best = sorted(range(len(whole)), key=lambda i: (-whole[i].item(), i))[:6]
        assert scores[0].tolist() == whole[best].tolist()
        real = [i for i in best if whole[i] > 0]
        assert labels[0, : len(real)].tolist() == [i % NUM_CLASSES for i in real]
        centers = torch.stack([anchors[i // NUM_CLASSES].view(2, 2).mean(0) for i in real])
        torch.testing.assert_close(boxes[0, : len(real), :2], centers)  # distances of 0 give the center


@pytest.mark.parametrize(("boxes", "found"), [("clipped", [0.9]), ("whole", [0.9, 0.8])])
def test_nms_compares_boxes_before_or_after_they_are_clipped(
    monkeypatch: pytest.MonkeyPatch, boxes: str, found: list[float]
) -> None:
    head = model_of("retinanet", nms_boxes=boxes, nms_threshold=0.5).dense
    candidates = torch.tensor([[[-60.0, 10, 40, 50], [0, 10, 40, 50]]])  # IoU 0.4; 1 inside the picture
    best = torch.tensor([[0.9, 0.8]]), candidates, torch.zeros(1, 2, dtype=torch.long)
    monkeypatch.setattr(head, "_candidates", lambda *level: best)
    monkeypatch.setattr(head, "_levels", lambda *maps: [()])
    result = head.detect([], SimpleNamespace(inside=[None]), torch.tensor([[100, 100]]))
    assert result.scores[result.valid].tolist() == pytest.approx(found)
    assert (result.boxes[result.valid] == torch.tensor([0.0, 10, 40, 50])).all()


def test_the_pyramid_ends_with_the_sizes_of_strided_convolutions() -> None:
    model, batch = model_of("retinanet, giou"), make_batch([(65, 80), (130, 200)])
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    assert model.strides == (8, 16, 32, 64, 128)
    assert [tuple(x.shape[2:]) for x in features] == [(17, 25), (9, 13), (5, 7), (3, 4), (2, 2)]
    assert areas[128].sizes.tolist() == [[1, 1], [2, 2]]
    for x, stride in zip(features, model.strides, strict=True):
        assert not torch.where(areas[stride].mask, 0.0, x).any() and x.any()


def test_halving_a_single_cell_has_the_gradient_of_its_middle_weight_in_bf16() -> None:
    conv = torch.nn.Conv2d(16, 16, 3, 2, 1).to(torch.bfloat16)
    for shape in ((1, 1), (1, 3), (4, 1), (5, 5)):
        x = torch.randn(2, 16, *shape, dtype=torch.bfloat16)
        torch.testing.assert_close(halved(conv, x), conv(x))
        junk = [torch.full((2304 * n,), torch.nan, dtype=torch.bfloat16) for n in (1, 2, 3, 4)]  # freed, then reused
        del junk
        conv.zero_grad()
        halved(conv, x).sum().backward()
        expected = conv.weight.float().detach().requires_grad_()
        torch.nn.functional.conv2d(x.float(), expected, stride=2, padding=1).sum().backward()
        torch.testing.assert_close(conv.weight.grad.float(), expected.grad, rtol=0.02, atol=0.1)


# --- the number that losses are divided by


def tiny(**dense: object) -> dict[str, Any]:
    head = {"num_convs": 1, "anchor_sizes": [32, 64, 128, 256, 512], **dense}
    kept = {key: CONFIG["model"][key] for key in ("norm", "backbone", "fpn")}
    return {**CONFIG, "model": {**kept, "detector": "fcos", "masks": False, "dense": head}}


@pytest.mark.parametrize("assign", ["atss", "center"])
def test_the_measured_positives_are_those_of_training(assign: str) -> None:
    cfg = config_from_dict(tiny(assign=assign) | {"data": {**CONFIG["data"], "shortest_edge": [72]}}, "test")
    dataset = read_dataset(cfg.data.train, cfg.data)
    changed, (line,) = with_positives(cfg, dataset)
    model = build_model(changed.model, len(dataset.classes))
    counts = []
    for record in dataset.records:  # flipped or not
        batch = collate([train_sample(record, cfg.data, key=record.image_id, masks=False)], 32)
        features, areas = model.features(batch.images, batch.sizes, batch.padded)
        counts.append(int((model.step(features, areas, batch).assigned.label == 1).sum()))
    assert changed.model.dense.positives == float(f"{sum(counts) / len(counts):.3g}") > 1
    assert line == f"model.dense.positives: {changed.model.dense.positives:g}, the mean of 7 training images"
    assert with_positives(changed, dataset) == (changed, [])
    built = initial_model(cfg, dataset.classes, images=dataset)
    assert built.cfg == changed and built.notes == [line] and built.model.dense.cfg == changed.model.dense


def test_a_loss_without_that_number_says_how_to_get_it() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.dense\.positives: measure, which `gndet train` replaces by a number"
    ):
        model_of("atss", positives="measure")(make_batch(SIZES[:1]))


def test_the_number_is_part_of_a_run_which_evaluates_and_converts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    out = tmp_path / "run"
    first = [f"out={out}", "train.schedule.updates=2", "model.norm.kind=bn"]
    assert main(["train", str(tmp_path / "tiny.yaml"), *first]) == 2  # P7 of one picture has a single cell
    assert main(["train", str(tmp_path / "tiny.yaml"), *first, "train.images_per_gpu=2"]) == 0
    assert main(["evaluate", str(out / "last"), "--out", str(tmp_path / "evaluated")]) == 0
    assert load_checkpoint(out / "last").meta["config"]["model"]["dense"]["positives"] > 1
    more = [f"out={tmp_path / 'more'}", f"train.weights={out}", "train.norm_policy=convert", "train.schedule.updates=1"]
    capsys.readouterr()
    assert main(["train", str(tmp_path / "tiny.yaml"), *more]) == 0
    said = capsys.readouterr().out
    assert "model.dense.positives: " in said and "norm of dense: 2 gn" in said and "converted" in said


# --- config


def test_retinanet_has_its_own_defaults_below_a_preset_and_the_config() -> None:
    plain = ModelConfig.model_validate({"detector": "retinanet", "masks": False}).dense
    assert (plain.assign, plain.kinds, plain.quality, plain.box_weight) == ("iou", 9, "none", 1)
    assert plain.positives == "measure"
    preset = {"detector": "retinanet", "masks": False, "compat": "torchvision", "dense": {"nms_threshold": 0.4}}
    mixed = ModelConfig.model_validate(preset).dense
    assert (mixed.anchors, mixed.positives, mixed.nms_threshold, mixed.assign) == ("rounded", "image", 0.4, "iou")
    again = ModelConfig.model_validate(ModelConfig.model_validate(preset).model_dump())
    assert again.dense == mixed


@pytest.mark.parametrize(
    ("detector", "compat", "expected"),
    [
        ("fcos", "torchvision", {"assign": "center", "score_threshold": 0.2, "detections_per_image": 100}),
        ("retinanet", "torchvision", {"assign": "iou", "score_threshold": 0.05, "detections_per_image": 300}),
        ("retinanet", "detectron2", {"conv_bias": True, "nms_boxes": "whole", "offset": 0.0}),
        ("fcos", "gndet", {"assign": "atss", "score_threshold": 0.05, "conv_bias": True}),
    ],
)
def test_a_toolkit_s_detector_has_its_defaults(detector: str, compat: str, expected: dict[str, Any]) -> None:
    model = ModelConfig.model_validate({"detector": detector, "masks": False, "compat": compat})
    assert {name: getattr(model.dense, name) for name in expected} == expected
    other = with_overrides(Config(), ["model.masks=false", "model.detector=fcos", "model.compat=torchvision"], "a run")
    assert with_overrides(other, [f"model.detector={detector}", f"model.compat={compat}"], "a run").model == model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"detector": "fcos"}, "model: masks: detector: fcos finds boxes only; expected model.masks=false"),
        ({"detector": "fcos", "masks": False, "dense": {"scales": [1, 2]}}, "fcos has one anchor per cell"),
        ({"detector": "fcos", "masks": False, "dense": {"box_loss": "l1"}}, "one anchor per cell and box_loss: giou"),
        ({"detector": "retinanet", "masks": False, "dense": {"assign": "center"}}, "needs one anchor per cell, got 9"),
        ({"dense": {"scales": [1, 2, 3, 4, 5, 6], "aspect_ratios": [1, 2, 3]}}, "18 anchors per cell"),
        ({"dense": {"positives": 0}}, "positives: got 0; expected measure, image or a positive number"),
        ({"dense": {"positives": "batch"}}, "positives: got 'batch'; expected measure, image or a positive number"),
        ({"dense": {"negative_iou": 0.6}}, "negative_iou: 0.6 is above positive_iou: 0.5"),
    ],
)
def test_what_a_dense_detector_cannot_be_is_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict({"model": model}, "test")
