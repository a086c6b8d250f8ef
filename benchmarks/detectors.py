"""`python -m benchmarks detectors`: time each kind of detector, and torchvision's model of the same layers beside it.

All have GN everywhere, 80 classes, random weights and a ResNet-50, but for resnext (ResNeXt-50 32x4d, in gndet with
weight standardization) and timm (RegNetY-1.6GF); all but fcos, atss and retinanet have masks.  Region heads see boxes
near the objects, as `benchmarks step` does.  torchvision has no C4 and no DC5: its blocks are joined to one.  Beside
the cascade stands its Mask R-CNN, beside ATSS its FCOS.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection import MaskRCNN as PeerMaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, RPNHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from benchmarks.report import machine, table
from benchmarks.scene import CLASSES, NEAR, PROPOSALS, make_scenes
from benchmarks.step import RATE, Losses, gndet_model, guide, guide_peer, near, peer_model, peer_sample, to_batch
from benchmarks.turns import WALL, Subject, Work, take_turns
from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.training.memory import MIB, TensorBytes

RATIOS = (0.5, 1.0, 2.0)
ONE_LEVEL = ((32, 64, 128, 256, 512),)  # anchors of C4 and DC5
GN = {"kind": "gn"}
Size = tuple[int, int]


class Row(NamedTuple):
    """A detector of gndet and the torchvision model beside it."""

    model: dict[str, Any]  # options of gndet's model, beside the norm
    peer: Callable[[Size], nn.Module]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time a training step and a detection of each row; count parameters, and what forward keeps for backward."""
    height, width = options.size
    say(f"{height}x{width}, {options.batch} picture(s)\n{machine(options.threads)}")
    for name in options.only or ROWS:
        args = (name, options.size, options.batch)
        subjects = [Subject("gndet", gndet_subject, args), Subject("torchvision", torchvision_subject, args)]
        turns = take_turns(subjects, options.rounds, threads=options.threads, warmup=0)  # work() was done once
        say(f"\n{name}")
        say(table(turns, against="torchvision", facts=("detect s", "kept MiB", "parameters M", "loss")))
    say("\ns: per step")


def gndet_subject(name: str, size: Size, num: int) -> Work:
    """Return a training step of gndet's detector, then a detection by it; the detection's seconds are a fact."""
    cfg = row_config(name, size, num)
    model, autocast = gndet_model(cfg)
    scenes = make_scenes(size, num, 0)
    batch = to_batch(scenes)
    if not cfg.model.masks:
        batch = batch._replace(gt=batch.gt._replace(masks=batch.gt.masks[:, :, :0, :0]))
    if hasattr(model, "rpn"):
        guide(model, near(scenes), NEAR)

    def losses() -> Losses:
        with autocast():
            return model(batch)

    def detect() -> Any:
        with torch.inference_mode():
            return model.detect(batch.images, batch.sizes, batch.padded)

    return _work(model, losses, detect)


def row_config(name: str, size: Size, num: int) -> Config:
    """Return gndet's config of a row for pictures of size (height, width), num at once."""
    tree = {
        "model": {"norm": GN, **ROWS[name].model},
        "train": {"global_batch": num, "images_per_gpu": num, "optimizer": {"lr": RATE}},
        "data": {"shortest_edge": [min(size)]},
        "device": "cpu",
    }
    cfg = config_from_dict(tree, "benchmarks detectors")
    part = "dense" if cfg.model.is_dense else "box_head"
    own = {part: {**ROWS[name].model.get(part, {}), "score_threshold": 0.0}, "rpn": {"post_nms_train": PROPOSALS}}
    tree["model"] = {**tree["model"], **own}
    return config_from_dict(tree, "benchmarks detectors")


def torchvision_subject(name: str, size: Size, num: int) -> Work:
    """Return the same of torchvision's model."""
    torch.manual_seed(0)
    model = ROWS[name].peer(size).train()
    samples = [peer_sample(scene, pin=False) for scene in make_scenes(size, num, 0)]
    images, targets = [image for image, _ in samples], [target for _, target in samples]
    if hasattr(model, "roi_heads"):
        guide_peer(model)

    def detect() -> Any:
        with torch.inference_mode():
            return model(images)

    return _work(model, lambda: model(images, targets), detect)


def _work(model: nn.Module, losses: Callable[[], Losses], detect: Callable[[], Any]) -> Work:
    """Return a step of SGD as work, whose seconds are those of the step, after a first one that counts memory."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9, fused=True)
    facts = {"parameters M": sum(p.numel() for p in model.parameters()) / 1e6}

    def step() -> float:
        total = sum((loss.mean() for loss in losses().values()), torch.zeros(()))
        facts.setdefault("kept MiB", counted.live / MIB)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return float(total.detach())

    def work() -> dict[str, float]:
        start = perf_counter()
        loss = step()
        middle = perf_counter()
        model.eval()
        detect()
        model.train()
        return {**facts, WALL: middle - start, "detect s": perf_counter() - middle, "loss": loss}

    with TensorBytes(limit=1 << 62) as counted:
        step()
    work()
    return work


# --- torchvision's models


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _region_options(size: Size, sizes: tuple[tuple[int, ...], ...], channels: int) -> dict[str, Any]:
    """Return options of torchvision's two-stage models on one level."""
    return {
        "min_size": min(size), "max_size": max(size), "box_score_thresh": 0.0,
        "rpn_anchor_generator": AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        "rpn_head": RPNHead(channels, 15), "rpn_pre_nms_top_n_train": 12000, "rpn_post_nms_top_n_train": PROPOSALS,
        "rpn_pre_nms_top_n_test": 6000, "rpn_post_nms_top_n_test": PROPOSALS,
    }  # fmt: skip


class _Stages(nn.Sequential):
    """The layers of a ResNet from its stem to a stage, as a backbone of one level."""

    def __init__(self, body: Any, last: int, channels: int) -> None:
        stages = [getattr(body, f"layer{number}") for number in range(1, last + 1)]
        super().__init__(body.conv1, body.bn1, body.relu, body.maxpool, *stages)
        self.out_channels = channels


class _Pooled(nn.Sequential):
    """A box head that averages the maps of res5."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps).mean((2, 3))


def c4(size: Size) -> nn.Module:
    """Return a C4 model of torchvision's blocks; its mask head runs res5 once more, on the positive regions."""
    body = torchvision.models.resnet50(weights=None, norm_layer=_group_norm)
    pool = MultiScaleRoIAlign(["0"], 14, 2)
    return PeerMaskRCNN(
        _Stages(body, 3, 1024), num_classes=None, box_roi_pool=pool, box_head=_Pooled(body.layer4),
        box_predictor=FastRCNNPredictor(2048, CLASSES + 1), mask_roi_pool=pool, mask_head=body.layer4,
        mask_predictor=MaskRCNNPredictor(2048, 256, CLASSES + 1), **_region_options(size, ONE_LEVEL, 1024),
    )  # fmt: skip


def dc5(size: Size) -> nn.Module:
    """Return a DC5 model of torchvision's blocks."""
    dilated = [False, False, True]
    body = torchvision.models.resnet50(weights=None, norm_layer=_group_norm, replace_stride_with_dilation=dilated)
    return PeerMaskRCNN(
        _Stages(body, 4, 2048), num_classes=None, box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(2048 * 49, 1024), box_predictor=FastRCNNPredictor(1024, CLASSES + 1),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2), mask_head=MaskRCNNHeads(2048, [256] * 4, 1, _group_norm),
        mask_predictor=MaskRCNNPredictor(256, 256, CLASSES + 1), **_region_options(size, ONE_LEVEL, 2048),
    )  # fmt: skip


def _mask_rcnn(size: Size, backbone: nn.Module) -> nn.Module:
    """Return a Mask R-CNN whose box head has 2 linear layers."""
    levels = ["0", "1", "2", "3"]
    return PeerMaskRCNN(
        backbone, num_classes=CLASSES + 1, min_size=min(size), max_size=max(size), box_score_thresh=0.0,
        rpn_post_nms_top_n_train=PROPOSALS, box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2), mask_head=MaskRCNNHeads(256, [256] * 4, 1, _group_norm),
    )  # fmt: skip


def resnext(size: Size) -> nn.Module:
    """Return a Mask R-CNN on ResNeXt-50 32x4d; torchvision has no weight standardization."""
    body = torchvision.models.resnext50_32x4d(weights=None, norm_layer=_group_norm)
    return _mask_rcnn(size, _resnet_fpn_extractor(body, 5, extra_blocks=LastLevelMaxPool(), norm_layer=_group_norm))


def regnet(size: Size) -> nn.Module:
    """Return a Mask R-CNN on torchvision's RegNetY-1.6GF."""
    body = torchvision.models.regnet_y_1_6gf(weights=None, norm_layer=lambda c: nn.GroupNorm(c // 8, c))
    stages = nn.Sequential(body.stem, *body.trunk_output)
    names = {str(stage): str(stage - 1) for stage in (1, 2, 3, 4)}
    channels = [48, 120, 336, 888]
    return _mask_rcnn(size, BackboneWithFPN(stages, names, channels, 256, LastLevelMaxPool(), _group_norm))


def _dense_backbone() -> nn.Module:
    body = torchvision.models.resnet50(weights=None, norm_layer=_group_norm)
    extra = LastLevelP6P7(256, 256)
    return _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=extra, norm_layer=_group_norm)


def fcos(size: Size) -> nn.Module:
    """Return torchvision's FCOS, which takes the place of ATSS, too."""
    return FCOS(_dense_backbone(), CLASSES, min_size=min(size), max_size=max(size), score_thresh=0.0)


def retinanet(size: Size) -> nn.Module:
    """Return torchvision's RetinaNet v2."""
    sizes = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
    anchors, backbone = AnchorGenerator(sizes, (RATIOS,) * 5), _dense_backbone()
    head = RetinaNetHead(256, 9, CLASSES, norm_layer=_group_norm)
    limits = {"min_size": min(size), "max_size": max(size), "score_thresh": 0.0}
    return RetinaNet(backbone, CLASSES, anchor_generator=anchors, head=head, **limits)


_FOUR_CONVS = {"kind": "4conv1fc"}
ROWS = {  # by the name of --only
    "mask_rcnn": Row({"box_head": _FOUR_CONVS}, partial(peer_model, "gn")),
    "c4": Row({"neck": "c4"}, c4),
    "dc5": Row({"neck": "dc5"}, dc5),
    "cascade": Row(
        {"detector": "cascade_rcnn", "box_head": {**_FOUR_CONVS, "class_agnostic": True}}, partial(peer_model, "gn")
    ),
    "fcos": Row({"detector": "fcos", "masks": False, "dense": {"assign": "center", "positives": 60}}, fcos),
    "atss": Row({"detector": "fcos", "masks": False, "dense": {"assign": "atss", "positives": 60}}, fcos),
    "retinanet": Row({"detector": "retinanet", "masks": False, "dense": {"positives": 60}}, retinanet),
    "resnext": Row(
        {
            "norm": {**GN, "weight_standardization": True}, "backbone": {"cardinality": 32, "group_width": 4},
            "box_head": {"kind": "2fc"},
        },
        resnext,
    ),
    "timm": Row(
        {
            "norm": {**GN, "channels_per_group": 8}, "backbone": {"kind": "timm", "name": "regnety_016"},
            "box_head": {"kind": "2fc"},
        },
        regnet,
    ),
}  # fmt: skip
