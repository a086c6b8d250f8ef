"""With the same weights and image, detections and losses equal torchvision's Mask R-CNN."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FrozenBatchNorm2d

from gndet.config.training import SourceConfig
from gndet.data.records import MASK_SIDE
from gndet.evaluation.results import paste_masks
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.structures import Batch, GroundTruth, Step
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.source import understand

NUM_CLASSES = 6
SIZE = (250, 310)  # on a canvas of 256 x 320, so that padding is tested too
KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("v1", "v2")] + ["gn"]
REGIONS = 150  # fewer than usual, to save time
SPREAD = {  # standard deviation of each predictor's output: neither flat nor saturated
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 1.5,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_predictor.mask_fcn_logits": 2.0,
}


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(1, 3, 10, 12, generator=generator)
    return (255 * nn.functional.interpolate(smooth, SIZE, mode="bilinear"))[0].to(torch.uint8)


def torchvision_model(kind: str) -> TorchvisionMaskRCNN:
    """Build a Mask R-CNN with random weights whose features and predictions have ordinary ranges, in float64."""
    torch.manual_seed(0)
    sizes = {
        "num_classes": NUM_CLASSES + 1, "min_size": SIZE[0], "max_size": SIZE[1], "rpn_post_nms_top_n_test": REGIONS,
        "rpn_post_nms_top_n_train": 2 * REGIONS, "box_batch_size_per_image": REGIONS,
    }  # fmt: skip
    none = {"weights": None, "weights_backbone": None}
    if kind == "v1":
        model = maskrcnn_resnet50_fpn(**none, **sizes)
    elif kind == "v2":
        model = maskrcnn_resnet50_fpn_v2(**none, **sizes)
    else:
        norm = group_norm
        backbone = _resnet_fpn_extractor(torchvision.models.resnet50(norm_layer=norm), 5, norm_layer=norm)
        box_head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm)
        mask_head = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=norm)
        model = TorchvisionMaskRCNN(backbone, box_head=box_head, mask_head=mask_head, **sizes)
    image = picture(9).float() / 255
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # average the running statistics over all batches
        model.train().backbone(torch.randn(2, 3, 128, 160))
        if kind == "v2":
            model.roi_heads.box_head(torch.randn(32, 256, 7, 7))
            model.roi_heads.mask_head(torch.randn(8, 256, 14, 14))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight += 0.4 * torch.rand(len(module.weight)) - 0.2
                module.bias += 0.4 * torch.rand(len(module.bias)) - 0.2
        model.eval().roi_heads.score_thresh = 0.0
        for name, spread in SPREAD.items():
            rescale(model, name, spread, image)
        model.roi_heads.score_thresh = 0.05
    if kind == "v1":
        freeze(model)
    return model.double().eval()


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def rescale(model: nn.Module, name: str, spread: float, image: Tensor) -> None:
    """Give a predictor's outputs mean 0 per channel and the standard deviation spread."""
    layer, outputs = model.get_submodule(name), []
    handle = layer.register_forward_hook(lambda module, arguments, out: outputs.append(out.transpose(0, 1).flatten(1)))
    model([image])
    handle.remove()
    out = torch.cat(outputs, dim=1)
    scale = spread / (out - out.mean(1, keepdim=True)).std()
    layer.weight *= scale
    layer.bias.copy_(-(out.mean(1) - layer.bias) * scale)


def freeze(module: nn.Module) -> None:
    """Replace BatchNorm2d by FrozenBatchNorm2d, as torchvision does for pretrained v1 models."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze(child)


def converted(model: nn.Module) -> MaskRCNN:
    """Return the same network in gndet."""
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    source = understand(WeightFile(Path("model.pth"), tensors, {}), SourceConfig())
    assert source.format == "torchvision" and not source.unused and source.num_classes == NUM_CLASSES
    rpn = source.model.rpn.model_copy(update={"post_nms_test": REGIONS, "post_nms_train": 2 * REGIONS})
    box_head = source.model.box_head.model_copy(update={"regions_per_image": REGIONS})
    result = build_model(source.model.model_copy(update={"rpn": rpn, "box_head": box_head}), source.num_classes)
    result.load_state_dict(source.state)
    return result.double().eval()


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[TorchvisionMaskRCNN, MaskRCNN]]:
    reference = torchvision_model(request.param)
    yield reference, converted(reference)


def on_canvas(image: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the picture as torchvision pads it."""
    canvas = torch.zeros(1, 3, 256, 320, dtype=torch.uint8)
    canvas[0, :, : SIZE[0], : SIZE[1]] = image
    return canvas, torch.tensor([SIZE]), True


def test_detections_equal_torchvision_s(pair: tuple[TorchvisionMaskRCNN, MaskRCNN]) -> None:
    reference, model = pair
    image, maps = picture(1), []
    handle = reference.roi_heads.mask_predictor.register_forward_hook(lambda module, arguments, out: maps.append(out))
    with torch.no_grad():
        (expected,) = reference([image.double() / 255])
        found = model.detect(*on_canvas(image))
    handle.remove()
    valid, labels = found.valid[0], expected["labels"]
    assert valid.sum() == len(labels) > 20 and len(labels.unique()) > 2
    assert torch.equal(found.labels[0, valid], labels - 1)
    torch.testing.assert_close(found.boxes[0, valid], expected["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores[0, valid], expected["scores"], rtol=0, atol=1e-4)
    masks = maps[0].sigmoid()[torch.arange(len(labels)), labels]
    torch.testing.assert_close(found.masks[0, valid], masks, rtol=0, atol=1e-3)
    # pasted: the same pixels, except where a probability is a half up to rounding
    codes = paste_masks(found.masks[0, valid].numpy(), found.boxes[0, valid].numpy(), SIZE, "rounded")
    pasted = paste_masks_in_image(masks[:, None], expected["boxes"], SIZE)[:, 0].numpy()
    for code, soft in zip(codes, pasted, strict=True):
        different = coco_mask.decode(code) != (soft >= 0.5)
        assert (np.abs(soft[different] - 0.5) < 1e-3).all()


class Chosen:
    """A sampler for torchvision that returns what gndet sampled."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        self.masks = [positive], [negative]

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for label, positive, negative in zip(labels, *self.masks, strict=True):
            assert (label[positive] >= 1).all() and (label[negative] == 0).all(), "torchvision labels them differently"
        return self.masks


def truth() -> tuple[GroundTruth, dict[str, Tensor]]:
    """Return three objects for gndet and for torchvision; boxes have the size of stored masks, so that both agree."""
    corners = torch.tensor([[20, 30], [150, 60], [90, 128]])
    boxes = torch.cat([corners, corners + MASK_SIDE], dim=1).double()
    frames = nn.functional.interpolate(
        torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(2)), (MASK_SIDE, MASK_SIDE), mode="bilinear"
    )[0] > 0.45  # fmt: skip
    whole = torch.zeros(3, *SIZE, dtype=torch.uint8)
    for mask, frame, (x, y) in zip(whole, frames, corners.tolist(), strict=True):
        mask[y : y + MASK_SIDE, x : x + MASK_SIDE] = frame
    labels = torch.tensor([0, 3, 5])
    gt = GroundTruth(boxes[None], labels[None], frames[None], torch.ones(1, 3, dtype=torch.bool))
    return gt, {"boxes": boxes, "labels": labels + 1, "masks": whole}


def test_losses_equal_torchvision_s_for_the_same_samples(pair: tuple[TorchvisionMaskRCNN, MaskRCNN]) -> None:
    reference, model = copy.deepcopy(pair)  # training changes the running statistics of v2
    image = picture(1)
    gt, target = truth()
    batch = Batch(*on_canvas(image)[:2], torch.tensor([7]), gt, True)
    model.train()
    model.requires_grad_(False)
    step = model.step(*model.features(batch.images, batch.sizes, True), batch)
    sample, regions = step.anchors, step.regions
    anchors = sum(3 * (256 // s) * (320 // s) for s in (4, 8, 16, 32, 64))
    reference.train()
    reference.rpn.fg_bg_sampler = Chosen(*_masks(sample.index[0], sample.positive[0], sample.valid[0], anchors))
    reference.roi_heads.select_training_samples = lambda proposals, targets: _training_samples(step, gt, targets)
    with torch.no_grad():
        expected = reference([image.double() / 255], [target])
    reference.eval()
    model.eval()
    names = {
        "loss_rpn_cls": "loss_objectness", "loss_rpn_loc": "loss_rpn_box_reg", "loss_cls": "loss_classifier",
        "loss_box_reg": "loss_box_reg", "loss_mask": "loss_mask",
    }  # fmt: skip
    assert sample.positive.sum() >= 3 and regions.positive.sum() >= 3 and sample.valid.all()
    for own_name, name in names.items():
        assert step.losses[own_name].item() == pytest.approx(expected[name].item(), rel=1e-4), own_name
        assert expected[name] > 1e-3


def _masks(index: Tensor, positive: Tensor, valid: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the sampled indices as torchvision's two masks over all candidates."""
    masks = torch.zeros(2, num, dtype=torch.bool)
    masks[0, index[positive]] = True
    masks[1, index[valid & ~positive]] = True
    return masks[0], masks[1]


def _training_samples(step: Step, gt: GroundTruth, targets: list[dict[str, Tensor]]) -> tuple[list[Tensor], ...]:
    """Return gndet's regions as torchvision's select_training_samples does."""
    regions = Step(*step).regions
    valid = regions.valid[0]
    boxes, matched = regions.boxes[0, valid], regions.matched[0, valid]
    labels = torch.where(regions.positive[0, valid], regions.labels[0, valid] + 1, 0)
    coded = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode([gt.boxes[0, matched]], [boxes])
    return [boxes], [matched], [labels], list(coded)
