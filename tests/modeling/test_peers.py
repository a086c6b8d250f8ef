"""With the same weights and image, detections and losses equal detectron2's; needs detectron2, run with -m peers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import NUM_CLASSES, SIZE, on_canvas, picture, rescale, truth
from torch import Tensor, nn

from gndet.config.training import SourceConfig
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.structures import Batch, Step
from gndet.weights.foreign.export import export_weights
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.source import understand
from gndet.weights.read import Source

pytest.importorskip("detectron2", reason="detectron2 is not installed")
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model as build_detectron2
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

pytestmark = pytest.mark.peers
SPREAD = {
    "proposal_generator.rpn_head.objectness_logits": 2.0,
    "proposal_generator.rpn_head.anchor_deltas": 0.3,
    "roi_heads.box_predictor.cls_score": 1.5,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_head.predictor": 2.0,
}
REGIONS = 150


def settings(kind: str, norm: str) -> CfgNode:
    """Return the config of detectron2's R50-FPN Mask R-CNN: frozen BN with 2fc, or GN with 4conv1fc."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = (
        "build_resnet_fpn_backbone",
        ["res2", "res3", "res4", "res5"],
    )
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = (
        [[32], [64], [128], [256], [512]],
        [[0.5, 1.0, 2.0]],
    )
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 2000, 1000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 2 * REGIONS, REGIONS
    heads = cfg.MODEL.ROI_HEADS
    heads.NAME, heads.IN_FEATURES, heads.NUM_CLASSES = "StandardROIHeads", ["p2", "p3", "p4", "p5"], NUM_CLASSES
    heads.BATCH_SIZE_PER_IMAGE = REGIONS
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    cfg.MODEL.MASK_ON = True
    box.NAME, box.POOLER_RESOLUTION, box.POOLER_TYPE = "FastRCNNConvFCHead", 7, "ROIAlignV2"
    mask.NAME, mask.NUM_CONV, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 4, 14
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = 50, norm, 0
    if kind == "gn":
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        cfg.MODEL.FPN.NORM = box.NORM = mask.NORM = "GN"
        box.NUM_CONV, box.NUM_FC, box.CONV_DIM = 4, 1, 256
    else:
        box.NUM_FC = 2
    return cfg


def as_input(image: Tensor) -> dict[str, Any]:
    return {"image": image.flip(0), "height": SIZE[0], "width": SIZE[1]}  # BGR


class Caller(nn.Module):
    """Wrap detectron2's model so that `rescale` can call it with [image in 0..1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> None:
        self.model.inference([as_input((255 * image).round()) for image in images], do_postprocess=False)

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)


def detectron2_model(kind: str) -> nn.Module:
    """Build a detectron2 model with random weights whose features and predictions have ordinary ranges."""
    torch.manual_seed(0)
    model = build_detectron2(settings(kind, "GN" if kind == "gn" else "BN"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train().backbone(torch.randn(2, 3, 128, 160) * 58)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight += 0.4 * torch.rand(len(module.weight)) - 0.2
                module.bias += 0.4 * torch.rand(len(module.bias)) - 0.2
        if kind != "gn":
            live = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
            model = build_detectron2(settings(kind, "FrozenBN"))
            model.load_state_dict(live)
        model.eval().roi_heads.box_predictor.test_score_thresh = 0.0
        for name, spread in SPREAD.items():
            rescale(Caller(model), name, spread, picture(9).float() / 255)
        model.roi_heads.box_predictor.test_score_thresh = 0.05
    model.double().eval()
    for part in (model.proposal_generator.rpn_head, model.roi_heads.box_predictor):
        part.register_forward_hook(single)  # detectron2's boxes are float32, so the scores must be too
    return model


def single(module: nn.Module, arguments: Any, result: Any) -> Any:
    """Return the results in float32."""
    return tuple([x.float() for x in part] if isinstance(part, list) else part.float() for part in result)


def understood(model: nn.Module) -> Source:
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    return understand(WeightFile(Path("model.pth"), tensors, {}), SourceConfig())


@pytest.fixture(scope="module", params=["frozen_bn", "gn"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, MaskRCNN, Source]]:
    reference = detectron2_model(request.param)
    source = understood(reference)
    assert source.format == "detectron2" and source.num_classes == NUM_CLASSES
    rpn = source.model.rpn.model_copy(update={"post_nms_test": REGIONS, "post_nms_train": 2 * REGIONS})
    box_head = source.model.box_head.model_copy(update={"regions_per_image": REGIONS})
    model = build_model(source.model.model_copy(update={"rpn": rpn, "box_head": box_head}), NUM_CLASSES)
    model.load_state_dict(source.state)
    yield reference, model.double().eval(), source


def test_an_export_loads_strictly_into_detectron2(pair: tuple[nn.Module, MaskRCNN, Source]) -> None:
    reference, _, source = pair
    export = export_weights(source.state, source.model, tuple("abcdef"), "detectron2")
    reference.load_state_dict({key: value.double() for key, value in export.tensors.items()}, strict=True)
    assert {key: value.shape for key, value in reference.state_dict().items()} == {
        key: value.shape for key, value in export.tensors.items()
    }


def test_detections_equal_detectron2_s(pair: tuple[nn.Module, MaskRCNN, Source]) -> None:
    reference, model, _ = pair
    image = picture(1)
    with torch.no_grad():
        (expected,) = reference.inference([as_input(image)], do_postprocess=False)
        found = model.detect(*on_canvas(image))
    valid = found.valid[0]
    assert valid.sum() == len(expected) > 20
    assert torch.equal(found.labels[0, valid], expected.pred_classes)
    torch.testing.assert_close(found.boxes[0, valid].float(), expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores[0, valid], expected.scores.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.masks[0, valid], expected.pred_masks[:, 0].double(), rtol=0, atol=1e-3)


def test_losses_equal_detectron2_s_for_the_same_samples(pair: tuple[nn.Module, MaskRCNN, Source]) -> None:
    reference, model, _ = pair
    gt, target = truth()
    batch = Batch(*on_canvas(picture(1))[:2], torch.tensor([7]), gt, True)
    step = model.train().requires_grad_(False).step(*model.features(batch.images, batch.sizes, True), batch)
    objects = Instances(SIZE, gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"] - 1)
    objects.gt_masks = BitMasks(target["masks"])
    sample = step.anchors
    reference.train().proposal_generator._subsample_labels = lambda label: _labels(sample, len(label))
    reference.roi_heads.label_and_sample_proposals = lambda proposals, targets: [_regions(step, objects)]
    with torch.no_grad(), EventStorage():
        expected = reference([as_input(picture(1)) | {"instances": objects}])
    reference.eval(), model.eval()
    assert sample.valid.all() and step.regions.positive.sum() >= 3
    for name, value in step.losses.items():
        # gndet samples a mask target at 4 x 4 points per bin, detectron2 at as many as the bin has pixels
        assert value.item() == pytest.approx(expected[name].item(), rel=5e-3 if name == "loss_mask" else 1e-4), name


def _labels(sample: Any, num: int) -> Tensor:
    label = torch.full((num,), -1)
    label[sample.index[0, sample.valid[0]]] = sample.positive[0, sample.valid[0]].long()
    return label.to(torch.int8)


def _regions(step: Step, objects: Instances) -> Instances:
    """Return gndet's regions as detectron2's label_and_sample_proposals does."""
    valid = step.regions.valid[0]
    boxes, labels, matched = (
        part[0, valid] for part in (step.regions.boxes, step.regions.labels, step.regions.matched)
    )
    regions = Instances(SIZE, proposal_boxes=Boxes(boxes), gt_classes=labels, gt_boxes=objects.gt_boxes[matched])
    regions.gt_masks = objects.gt_masks[matched]
    regions.objectness_logits = torch.zeros(len(boxes))
    return regions
