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
from gndet.modeling.dense import DenseDetector
from gndet.modeling.detection_model import DetectionModel
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
REGIONS = 150
# what detectron2's configs of these models say, beside its defaults
RESNET = ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.DEPTH", 50, "MODEL.MASK_ON", True]
HEADS = [
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2",
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14,
]  # fmt: skip
LEVELS = ["p2", "p3", "p4", "p5"]
STAGES = ["res2", "res3", "res4", "res5"]
FPN = [
    *RESNET, *HEADS, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES", STAGES,
    "MODEL.FPN.IN_FEATURES", STAGES, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES", [*LEVELS, "p6"], "MODEL.ROI_HEADS.IN_FEATURES", LEVELS,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 2000, "MODEL.RPN.PRE_NMS_TOPK_TEST", 1000,
]  # fmt: skip
RETINANET = [
    *RESNET, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", STAGES[1:], "MODEL.FPN.IN_FEATURES", STAGES[1:], "MODEL.ANCHOR_GENERATOR.SIZES",
    [[side * 2 ** (third / 3) for third in range(3)] for side in (32, 64, 128, 256, 512)],
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0, "MODEL.MASK_ON", False,
]  # fmt: skip
TWO_FC = ["MODEL.ROI_BOX_HEAD.NUM_FC", 2]
GN = [
    "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN",
    "MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 256,
]  # fmt: skip
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
MODELS: dict[str, tuple[str, list[Any]]] = {  # (the backbone's norm, options)
    "fpn": ("BN", [*FPN, *TWO_FC]),
    "fpn gn": ("GN", [*FPN, *GN]),
    "c4": ("BN", [*RESNET, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14]),
    "dc5": ("BN", [
        *RESNET, *HEADS, *TWO_FC, "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.RES5_DILATION", 2,
        "MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
    ]),
    "cascade": ("BN", [*FPN, *TWO_FC, *CASCADE]),
    "cascade gn": ("GN", [*FPN, *GN, *CASCADE]),
    "retinanet": ("BN", RETINANET),
    "retinanet gn": ("GN", [*RETINANET, "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RETINANET.NORM", "GN"]),
}  # fmt: skip


def settings(kind: str, norm: str) -> CfgNode:
    """Return detectron2's config of a model with few regions and that norm in the backbone."""
    cfg = get_cfg()
    cfg.merge_from_list([
        *MODELS[kind][1], "MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", norm,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 2 * REGIONS, "MODEL.RPN.POST_NMS_TOPK_TEST", REGIONS,
        "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES, "MODEL.RETINANET.NUM_CLASSES", NUM_CLASSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", REGIONS,
    ])  # fmt: skip
    return cfg


def predictors(model: nn.Module) -> dict[str, float]:
    """Return the standard deviation that the outputs of each predictor get: neither flat nor saturated."""
    ends = {
        "rpn_head.objectness_logits": 2.0, "rpn_head.anchor_deltas": 0.3, "mask_head.predictor": 2.0,
        "cls_score": 1.5, "bbox_pred": 0.3 if "head.bbox_pred.weight" in model.state_dict() else 1.0,
    }  # fmt: skip
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
    return {name: spread for name in names for end, spread in ends.items() if name.endswith(end)}


def as_input(image: Tensor) -> dict[str, Any]:
    return {"image": image.flip(0), "height": SIZE[0], "width": SIZE[1]}  # BGR


def gndet_input(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the picture (3, H, W) as detectron2 pads it for a model: only for a pyramid."""
    return on_canvas(image) if model.backbone.size_divisibility else (image[None], torch.tensor([SIZE]), False)


def infer(model: nn.Module, image: Tensor) -> Instances:
    """Return detectron2's detections in a picture (3, H, W) RGB [0 to 255], masks in the frames of their boxes."""
    if hasattr(model, "roi_heads"):
        (found,) = model.inference([as_input(image)], do_postprocess=False)
        return found
    (result,) = model([as_input(image)])
    return result["instances"]


class Caller(nn.Module):
    """Wrap detectron2's model so that `rescale` can call it with [image in 0..1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> None:
        infer(self.model, (255 * images[0]).round())

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)


def detectron2_model(kind: str) -> nn.Module:
    """Build a detectron2 model with random weights whose features and predictions have ordinary ranges."""
    torch.manual_seed(0)
    norm, _ = MODELS[kind]
    model = build_detectron2(settings(kind, norm))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        found = model.train().backbone(torch.randn(2, 3, 128, 160) * 58)
        if kind == "c4":
            model.roi_heads.res5(found["res4"])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight += 0.4 * torch.rand(len(module.weight)) - 0.2
                module.bias += 0.4 * torch.rand(len(module.bias)) - 0.2
        if norm == "BN":
            live = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
            model = build_detectron2(settings(kind, "FrozenBN"))
            model.load_state_dict(live)
        model.eval()
        set_threshold(model, 0.0)
        for name, spread in predictors(model).items():
            rescale(Caller(model), name, spread, picture(9).float() / 255)
        set_threshold(model, 0.05)
    model.double().eval()
    for name, part in model.named_modules():  # detectron2's boxes are float32, so the scores must be too
        if name == "head" or (name.endswith(("rpn_head", "cls_score", "bbox_pred")) and not name.startswith("head.")):
            part.register_forward_hook(single)
    return model


def set_threshold(model: nn.Module, threshold: float) -> None:
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = threshold


def single(module: nn.Module, arguments: Any, result: Any) -> Any:
    """Return the results in float32."""
    if isinstance(result, Tensor):
        return result.float()
    return tuple([x.float() for x in part] if isinstance(part, list) else part.float() for part in result)


def understood(model: nn.Module) -> Source:
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    return understand(WeightFile(Path("model.pth"), tensors, {}), SourceConfig())


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, DetectionModel, Source]]:
    reference = detectron2_model(request.param)
    source = understood(reference)
    assert source.format.startswith("detectron2") and source.num_classes == NUM_CLASSES
    changes = {
        "rpn": {"post_nms_test": REGIONS, "post_nms_train": 2 * REGIONS},
        "box_head": {"regions_per_image": REGIONS},
        "dense": {"positives": "image"},
    }
    parts = {name: getattr(source.model, name).model_copy(update=new) for name, new in changes.items()}
    model = build_model(source.model.model_copy(update=parts), NUM_CLASSES)
    model.load_state_dict(source.state)
    assert isinstance(model, DetectionModel)
    yield reference, model.double().eval(), source


def test_an_export_loads_strictly_into_detectron2(pair: tuple[nn.Module, DetectionModel, Source]) -> None:
    reference, _, source = pair
    export = export_weights(source.state, source.model, tuple("abcdef"), "detectron2")
    reference.load_state_dict({key: value.double() for key, value in export.tensors.items()}, strict=True)
    assert {key: value.shape for key, value in reference.state_dict().items()} == {
        key: value.shape for key, value in export.tensors.items()
    }


def test_detections_equal_detectron2_s(pair: tuple[nn.Module, DetectionModel, Source]) -> None:
    reference, model, _ = pair
    image = picture(1)
    with torch.no_grad():
        expected = infer(reference, image)
        found = model.detect(*gndet_input(reference, image))
    expected.pred_boxes.clip(SIZE)  # RetinaNet's are clipped behind the model
    num = int(found.valid.sum())
    assert num >= len(expected) > 20
    # detectron2's RetinaNet drops boxes outside the picture from its 100; gndet drops them first and has 100 others
    assert num == len(expected) or isinstance(model, DenseDetector)
    valid = slice(len(expected))
    assert torch.equal(found.labels[0, valid], expected.pred_classes)
    torch.testing.assert_close(found.boxes[0, valid].float(), expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores[0, valid], expected.scores.double(), rtol=0, atol=1e-4)
    if expected.has("pred_masks"):
        torch.testing.assert_close(found.masks[0, valid], expected.pred_masks[:, 0].double(), rtol=0, atol=1e-3)


def test_losses_equal_detectron2_s_for_the_same_samples(pair: tuple[nn.Module, DetectionModel, Source]) -> None:
    reference, model, _ = pair
    gt, target = truth()
    images, sizes, padded = gndet_input(reference, picture(1))
    batch = Batch(images, sizes, torch.tensor([7]), gt, padded)
    step = model.train().requires_grad_(False).step(*model.features(images, sizes, padded), batch)
    objects = Instances(SIZE, gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"] - 1)
    objects.gt_masks = BitMasks(target["masks"])
    reference.train()
    if isinstance(step, Step):
        sample = step.anchors
        reference.proposal_generator._subsample_labels = lambda label: _labels(sample, len(label))
        reference.roi_heads.label_and_sample_proposals = lambda proposals, targets: [_regions(step, objects)]
        assert sample.valid.all() and step.regions.positive.sum() >= 3
    else:  # a dense detector; detectron2 divides by an average over earlier updates
        reference._ema_update = lambda name, value, initial: value
        assert (step.assigned.label == 1).sum() >= 3
    with torch.no_grad(), EventStorage():
        expected = reference([as_input(picture(1)) | {"instances": objects}])
    reference.eval(), model.eval()
    assert step.losses.keys() == expected.keys()
    for name, value in step.losses.items():
        # gndet samples a mask target at 4 x 4 points per bin, detectron2 at as many as the bin has pixels
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-2 if name == "loss_mask" else 1e-4), name


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
