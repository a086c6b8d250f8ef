"""With the same weights and image, detections and losses equal mmdetection's; needs mmdet, run with -m peers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import NUM_CLASSES, SIZE, on_canvas, picture, rescale, truth
from torch import Tensor, nn

from gndet.config.training import SourceConfig
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import DetectionModel
from gndet.structures import Batch, Regions
from gndet.weights.foreign.files import WeightFile
from gndet.weights.foreign.source import understand

pytest.importorskip("mmdet", reason="mmdetection is not installed")
import mmdet
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

pytestmark = pytest.mark.peers
CONFIGS = {
    "mask rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "mask rcnn gn": "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py",
    "cascade": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
}
REGIONS = 150
SPREAD = {"rpn_cls": 2.0, "rpn_reg": 0.3, "fc_cls": 1.5, "fc_reg": 1.0, "conv_logits": 2.0}  # of predictors' outputs
LOSSES = {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_mask": "loss_mask"}


class Caller(nn.Module):
    """Wrap mmdetection's model so that `rescale` can call it with [image in 0..1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> None:
        infer(self.model, (255 * images[0]).round())

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)


def sample_of() -> DetDataSample:
    sample = DetDataSample()
    canvas = (256, 320)
    sample.set_metainfo({"img_shape": SIZE, "ori_shape": SIZE, "pad_shape": canvas, "batch_input_shape": canvas})
    return sample


def features(model: nn.Module, image: Tensor) -> Any:
    """Return P2..P6 of a picture (3, H, W) RGB, prepared as mmdetection's config of the model says."""
    canvas, prepared = torch.zeros(1, 3, 256, 320, dtype=next(model.parameters()).dtype), model.data_preprocessor
    image = image if prepared._channel_conversion else image.flip(0)
    canvas[0, :, : SIZE[0], : SIZE[1]] = (image - prepared.mean) / prepared.std
    return model.extract_feat(canvas)


def infer(model: nn.Module, image: Tensor) -> InstanceData:
    """Return mmdetection's detections, with `probabilities` of the masks in the frames of their boxes."""
    masks: list[Tensor] = []

    def keep(mask_preds: list[Tensor], results_list: list[InstanceData], *rest: Any, **options: Any) -> Any:
        masks.append(mask_preds[0] if options.get("activate_map") else mask_preds[0].sigmoid())
        return results_list  # without pasting the masks into the picture

    heads = model.roi_head.mask_head
    last = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    original, last.predict_by_feat = last.predict_by_feat, keep
    x = features(model, image)
    sample = sample_of()
    sample.set_metainfo({"scale_factor": (1.0, 1.0)})
    proposals = model.rpn_head.predict(x, [sample], rescale=False)
    (found,) = model.roi_head.predict(x, proposals, [sample], rescale=False)
    last.predict_by_feat = original
    found.probabilities = masks[0][torch.arange(len(found)), found.labels]
    return found


def mmdetection_model(kind: str) -> nn.Module:
    """Build a model of mmdetection with random weights whose features and predictions have ordinary ranges."""
    register_all_modules()
    torch.manual_seed(0)
    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / CONFIGS[kind])
    cfg.model.backbone.init_cfg = None
    cfg.model.train_cfg.rpn_proposal.max_per_img, cfg.model.test_cfg.rpn.max_per_img = 2 * REGIONS, REGIONS
    heads = cfg.model.roi_head
    for key in ("bbox_head", "mask_head"):
        for head in heads[key] if isinstance(heads[key], list) else [heads[key]]:
            head.num_classes = NUM_CLASSES
    model = MODELS.build(cfg.model)
    with torch.no_grad():
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
        batch_norms = [norm for norm in norms if isinstance(norm, nn.BatchNorm2d)]
        for norm in batch_norms:
            norm.train().momentum = None
        model.extract_feat(torch.randn(2, 3, 128, 160))
        for norm in norms:
            norm.weight += 0.4 * torch.rand(len(norm.weight)) - 0.2
            norm.bias += 0.4 * torch.rand(len(norm.bias)) - 0.2
        model.eval().roi_head.test_cfg.score_thr = 0.0
        names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
        for name, spread in ((name, spread) for name in names for end, spread in SPREAD.items() if name.endswith(end)):
            rescale(Caller(model), name, spread, picture(9).float() / 255)
        model.roi_head.test_cfg.score_thr = 0.05
    return model.double().eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, DetectionModel]]:
    reference = mmdetection_model(request.param)
    tensors = {
        key: value.float() if value.is_floating_point() else value for key, value in reference.state_dict().items()
    }
    source = understand(WeightFile(Path("model.pth"), tensors, {}), SourceConfig())
    assert source.format == "mmdetection" and source.num_classes == NUM_CLASSES and not source.unused
    changes = {
        "rpn": {"post_nms_test": REGIONS, "post_nms_train": 2 * REGIONS}, "box_head": {"regions_per_image": REGIONS},
    }  # fmt: skip
    parts = {name: getattr(source.model, name).model_copy(update=new) for name, new in changes.items()}
    model = build_model(source.model.model_copy(update=parts), NUM_CLASSES)
    model.load_state_dict(source.state)
    assert isinstance(model, DetectionModel)
    yield reference, model.double().eval()


def test_detections_equal_mmdetection_s(pair: tuple[nn.Module, DetectionModel]) -> None:
    reference, model = pair
    image = picture(1)
    with torch.no_grad():
        expected, found = infer(reference, image), model.detect(*on_canvas(image))
    valid = found.valid[0]
    assert valid.sum() == len(expected) > 20
    assert torch.equal(found.labels[0, valid], expected.labels)
    torch.testing.assert_close(found.boxes[0, valid].double(), expected.bboxes.double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores[0, valid].double(), expected.scores.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.masks[0, valid].double(), expected.probabilities.double(), rtol=0, atol=1e-3)


def test_losses_of_the_heads_equal_mmdetection_s_for_the_same_samples(pair: tuple[nn.Module, DetectionModel]) -> None:
    reference, model = pair
    gt, target = truth()
    images, sizes, padded = on_canvas(picture(1))
    batch = Batch(images, sizes, torch.tensor([7]), gt, padded)
    with torch.no_grad():  # mmdetection trains with the running statistics of BN, too
        step = model.step(*model.features(images, sizes, padded), batch)
    regions = [step.regions, *step.later]
    assert step.regions.positive.sum() >= 3
    head, sample = reference.roi_head, sample_of()
    objects = InstanceData(bboxes=target["boxes"], labels=target["labels"] - 1)
    objects.masks = BitmapMasks(target["masks"].numpy(), *SIZE)
    sample.gt_instances, sample.ignored_instances = objects, InstanceData(bboxes=torch.zeros(0, 4))
    given = iter(regions)
    samplers = head.bbox_sampler if isinstance(head.bbox_sampler, list) else [head.bbox_sampler]
    for sampler in samplers:
        sampler.sample = lambda *args, **options: sampled(next(given), objects)
    proposals = InstanceData(bboxes=step.regions.boxes[0].double(), scores=torch.ones(step.regions.boxes.shape[1]))
    with torch.no_grad():
        losses = head.loss(features(reference, picture(1)), [proposals], [sample])
    compared = 0
    for name, value in step.losses.items():
        ours, _, stage = name.partition("_stage")
        if ours in LOSSES:
            theirs = losses[f"s{stage}.{LOSSES[ours]}" if stage else LOSSES[ours]]
            # gndet samples a mask target at 4 x 4 points per bin, mmdetection at as many as the bin has pixels
            assert value.item() == pytest.approx(theirs.item(), rel=1e-2 if ours == "loss_mask" else 1e-4), name
            compared += 1
    assert compared == sum("loss" in name for name in losses)


def sampled(regions: Regions, objects: InstanceData) -> SamplingResult:
    """Return gndet's regions of an image as a sampler of mmdetection does."""
    valid = regions.valid[0]
    boxes, positive, matched = (part[0, valid] for part in (regions.boxes, regions.positive, regions.matched))
    assigned = AssignResult(
        len(objects), torch.where(positive, matched + 1, 0), torch.ones(len(boxes)), objects.labels[matched]
    )
    places = positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]
    return SamplingResult(*places, boxes.double(), objects.bboxes, assigned, torch.zeros(len(boxes), dtype=torch.uint8))
