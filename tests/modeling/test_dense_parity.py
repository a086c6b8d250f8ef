"""With the same weights and image, a dense detector predicts, trains and detects as torchvision's in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

from gndet.config.training import SourceConfig
from gndet.modeling.build import build_model
from gndet.modeling.dense import DenseDetector
from gndet.structures import Batch, GroundTruth
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.source import understand

NUM_CLASSES = 6
SIZE, CANVAS = (122, 186), (128, 192)  # padded; P7 has 1 x 2 cells, which torchvision spaces by 96 and not by 128
BUILDERS: dict[str, Callable[..., Any]] = {
    "retinanet_v1": retinanet_resnet50_fpn, "retinanet_v2": retinanet_resnet50_fpn_v2, "fcos": fcos_resnet50_fpn,
}  # fmt: skip
SPREAD = {"classification_head.cls_logits": 1.5, "regression_head.bbox_reg": 0.5, "regression_head.bbox_ctrness": 1.0}
MEANS = {"classification_head.cls_logits": -3.0, "regression_head.bbox_reg": 0.0, "regression_head.bbox_ctrness": 0.0}
LOSSES = {"loss_cls": "classification", "loss_box_reg": "bbox_regression", "loss_quality": "bbox_ctrness"}


def picture() -> Tensor:
    smooth = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(1))
    return (255 * nn.functional.interpolate(smooth, SIZE, mode="bilinear"))[0].to(torch.uint8)


def torchvision_model(kind: str) -> nn.Module:
    """Build a detector with random weights whose features and predictions have ordinary ranges, in float64."""
    torch.manual_seed(0)
    sizes = {"min_size": SIZE[0], "max_size": SIZE[1], "detections_per_img": 100_000}
    model = BUILDERS[kind](weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1, **sizes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.backbone(torch.randn(2, 3, 128, 160))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight += 0.4 * torch.rand(len(module.weight)) - 0.2
                module.bias += 0.4 * torch.rand(len(module.bias)) - 0.2
        model.double().eval()
        rescale(model)
    return model


def rescale(model: nn.Module) -> None:
    """Give each predictor's outputs the mean and the standard deviation of MEANS and SPREAD; the background none."""
    layers = {name: layer for name, layer in model.head.named_modules() if name in SPREAD}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: outputs[name].append(out[0].flatten(1)))
    model([picture().double() / 255])
    for name, layer in layers.items():
        layer._forward_hooks.clear()
        out = torch.cat(outputs[name], dim=1)
        scale = SPREAD[name] / (out - out.mean(1, keepdim=True)).std()
        layer.weight *= scale
        layer.bias.copy_(MEANS[name] - (out.mean(1) - layer.bias) * scale)
    scores = layers["classification_head.cls_logits"]
    scores.weight[:: NUM_CLASSES + 1] = 0  # torchvision trains a background class, which is never found
    scores.bias[:: NUM_CLASSES + 1] = -100


def converted(model: nn.Module) -> DenseDetector:
    """Return the same network in gndet, read from its state dict."""
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    source = understand(WeightFile(Path("model.pth"), tensors, {}), SourceConfig())
    assert source.format == "torchvision" and not source.unused and source.num_classes == NUM_CLASSES
    dense = source.model.dense.model_copy(update={"detections_per_image": 100_000})
    result = build_model(source.model.model_copy(update={"dense": dense}), source.num_classes)
    result.load_state_dict(source.state)
    return result.double().eval()


KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "retinanet_v1" else []) for kind in BUILDERS]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, DenseDetector]]:
    reference = torchvision_model(request.param)
    reference.load_state_dict({key: value.float() for key, value in reference.state_dict().items()})
    yield reference, converted(reference)


def batch() -> Batch:
    """Return the picture as torchvision pads it, with objects of several sizes, two of which overlap."""
    canvas = torch.zeros(1, 3, *CANVAS, dtype=torch.uint8)
    canvas[0, :, : SIZE[0], : SIZE[1]] = picture()
    boxes = torch.tensor(
        [[5.0, 8, 37, 30], [60, 20, 150, 110], [80, 30, 140, 100], [100, 5, 114, 19], [0, 0, 186, 122]]
    )
    labels, valid = torch.tensor([[0, 3, 5, 1, 2]]), torch.ones(1, 5, dtype=torch.bool)
    gt = GroundTruth(boxes[None], labels, torch.zeros(1, 5, 0, 0), valid)
    return Batch(canvas, torch.tensor([SIZE]), torch.tensor([7]), gt, True)


def test_predictions_and_detections_equal_torchvision_s(pair: tuple[nn.Module, DenseDetector]) -> None:
    reference, model = pair
    given, outputs = batch(), []
    handle = reference.head.register_forward_hook(lambda module, arguments, out: outputs.append(out))
    with torch.no_grad():
        (expected,) = reference([picture().double() / 255])
        features, areas = model.features(given.images, given.sizes, True)
        predicted = model.dense(features, areas)
        found = model.detect(given.images, given.sizes, True)
    handle.remove()
    ratios, scales = len(model.dense.cfg.aspect_ratios), len(model.dense.cfg.scales)
    fields = {"logits": "cls_logits", "boxes": "bbox_regression", "quality": "bbox_ctrness"}
    for field, name in fields.items():
        if name not in outputs[0]:
            continue
        got = torch.cat([getattr(level, field) for level in predicted], 1)
        got = got.relu() if field == "boxes" and model.dense.distances else got  # torchvision clamps in its head
        want = outputs[0][name]
        want = want.view(1, -1, ratios, scales, want.shape[2]).transpose(2, 3).flatten(1, 3)  # scale by scale
        want = want[..., 1:] if field == "logits" else want.view_as(got)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    whole = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # torchvision keeps empty boxes
    valid, labels = found.valid[0], expected["labels"][whole]
    assert valid.sum() == len(labels) > 50 and len(labels.unique()) == NUM_CLASSES
    assert torch.equal(found.labels[0, valid], labels - 1)
    torch.testing.assert_close(found.boxes[0, valid], expected["boxes"][whole], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores[0, valid], expected["scores"][whole], rtol=0, atol=1e-6)


def test_losses_equal_torchvision_s(pair: tuple[nn.Module, DenseDetector]) -> None:
    reference, model = pair
    given = batch()
    with torch.no_grad():
        images, targets = reference.transform(
            [picture().double() / 255], [{"boxes": given.gt.boxes[0].double(), "labels": given.gt.labels[0] + 1}]
        )
        features = list(reference.backbone(images.tensors).values())
        anchors = reference.anchor_generator(images, features)
        sizes = [[x.shape[2] * x.shape[3] for x in features]] if model.dense.distances else []
        expected = reference.compute_loss(targets, reference.head(features), anchors, *sizes)
        losses = model(given)  # with BN's running statistics
    assert len(losses) == len(expected)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[LOSSES[name]].item(), rel=1e-6), name
        assert value > 1e-3
