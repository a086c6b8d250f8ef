"""`python -m benchmarks predict`: time prediction and evaluation of gndet, and torchvision's model in a plain loop.

Both have the same untrained weights, canvas and settings, and start from the same JPEG files: r50 is torchvision's own
R50-FPN with BN at 800/1333, quickstart the network of configs/quickstart.yaml with GN at 128 pixels.  Every picture
has as many detections as a detector may return.  torchvision decodes, detects, and pastes masks into the picture.
`gndet predict` also writes each picture as PNG, and `gndet evaluate` also reads the annotations and scores.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNConvFCHead, FastRCNNPredictor, RPNHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from benchmarks.loader import draw
from benchmarks.report import machine, table
from benchmarks.scene import CATEGORIES, CLASSES
from benchmarks.turns import Subject, Work, take_turns
from gndet.distributed.process import process
from gndet.evaluation.detector import evaluate_checkpoint, load_detector
from gndet.toolbox.convert import convert
from gndet.toolbox.predict.predict import predict

SIZES = {"r50": (480, 640), "quickstart": (128, 128)}  # height, width of the pictures
EDGES = {"r50": (800, 1333), "quickstart": (128, 1333)}  # shorter and longest edge that the networks see
SETTINGS = {  # what a file of weights does not say
    "r50": [],
    "quickstart": ["model.rpn.anchor_sizes=[16,32,64,96,128]", "model.rpn.pre_nms_test=200",
                   "model.rpn.post_nms_test=100"],
}  # fmt: skip
CALIBRATION = 4  # pictures that BN takes its statistics from


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time `gndet predict`, `gndet evaluate` and torchvision on drawn pictures."""
    network, masks = options.network, not options.boxes
    with TemporaryDirectory() as folder:
        annotations, pictures = draw(Path(folder), options.num, SIZES[network])
        files = sorted(pictures.iterdir())
        weights, detector = same_weights(Path(folder), network, masks, files)
        overrides = [
            *settings(network), f"train.precision={options.precision}", f"data.val.annotations={annotations}",
            f"data.val.images={pictures}", *options.overrides,
        ]  # fmt: skip
        say(f"{network}, {'masks' if masks else 'boxes only'}, {options.num} pictures, {options.precision}")
        subjects = [
            Subject("gndet predict", predict_subject, (detector, overrides, files)),
            Subject("gndet evaluate", evaluate_subject, (detector, overrides)),
            Subject("torchvision", torchvision_subject, (network, masks, weights, files, options.precision)),
        ]
        turns = take_turns(subjects, options.rounds, threads=options.threads, say=say)
    say(f"\n{machine(options.threads)}")
    say(table(turns, against="torchvision", per=options.num, facts=("detections",)))
    say("s: per picture; detections: per turn")


def same_weights(folder: Path, network: str, masks: bool, files: Sequence[Path]) -> tuple[Path, Path]:
    """Write random weights to a folder: torchvision's file, and gndet's checkpoint made of it.  Returns both."""
    weights, detector = folder / "peer.pth", folder / "detector"
    torch.save(untrained(network, masks, files[:CALIBRATION]).state_dict(), weights)
    names = ",".join(f'"{category["name"]}"' for category in CATEGORIES)
    convert(
        str(weights), detector, [f"train.source.classes=[{names}]"], lambda line: None, to=None, policy="convert",
        channels_per_group=16, damp=0.0, pictures=(), count=0,
    )  # fmt: skip
    return weights, detector


def settings(network: str) -> list[str]:
    """Return the overrides with which gndet's detector works as torchvision's."""
    edge, longest = EDGES[network]
    own = ["model.box_head.score_threshold=0", f"data.shortest_edge_test={edge}", f"data.max_edge={longest}"]
    return [*SETTINGS[network], *own, "data.cache="]


def predict_subject(checkpoint: Path, overrides: Sequence[str], files: Sequence[Path]) -> Work:
    """Return the work of `gndet predict` after its start; few objects score enough to be drawn."""
    with process("cpu") as proc:  # its settings stay in force afterwards
        detector = load_detector(checkpoint, overrides, proc)

    def work() -> dict[str, float]:
        with TemporaryDirectory() as out:
            predict(detector, list(map(str, files)), Path(out), proc.device, lambda line: None, threshold=0.99)
        return {}

    return work


def evaluate_subject(checkpoint: Path, overrides: Sequence[str]) -> Work:
    """Return the work of `gndet evaluate` after its start."""
    with process("cpu") as proc:
        detector = load_detector(checkpoint, overrides, proc)
    return lambda: {"detections": len(evaluate_checkpoint(detector, proc)[1].results)}


def torchvision_subject(network: str, masks: bool, weights: Path, files: Sequence[Path], precision: str) -> Work:
    """Return torchvision's work: a plain loop over the files."""
    model = peer_model(network, masks)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()

    def work() -> dict[str, float]:
        count = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for file in files:
                found = model([decoded(file)])[0]
                if masks:
                    found["masks"] = found["masks"] > 0.5  # as bitmaps of the picture's size
                count += len(found["scores"])
        return {"detections": count}

    return work


def decoded(file: Path) -> Tensor:
    """Return a picture as torchvision's models take it, (3, H, W) float32 in [0, 1]."""
    return to_dtype(pil_to_tensor(Image.open(file).convert("RGB")), torch.float32, scale=True)


def untrained(network: str, masks: bool, files: Sequence[Path]) -> nn.Module:
    """Return torchvision's model with random weights; BN takes its statistics from the pictures."""
    torch.manual_seed(0)
    model = peer_model(network, masks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all pictures
    model.backbone.train()
    with torch.no_grad():
        for file in files:
            model.backbone(model.transform([decoded(file)])[0].tensors)
    return model.eval()


def peer_model(network: str, masks: bool) -> Any:
    """Return torchvision's Mask R-CNN, or Faster R-CNN, with its own settings or with those of the quickstart."""
    edge, longest = EDGES[network]
    limits = {"min_size": edge, "max_size": longest, "box_score_thresh": 0.0}
    if network == "r50":
        build = detection.maskrcnn_resnet50_fpn if masks else detection.fasterrcnn_resnet50_fpn
        return build(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **limits)
    norm = partial(nn.GroupNorm, 32)
    body = torchvision.models.resnet18(weights=None, norm_layer=norm)
    stages, levels = {f"layer{i + 1}": str(i) for i in range(4)}, ["0", "1", "2", "3"]
    backbone = BackboneWithFPN(body, stages, [64, 128, 256, 512], 64, LastLevelMaxPool(), norm)
    parts = {
        "rpn_anchor_generator": AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        "rpn_head": RPNHead(64, 3), "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 100,
        "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
        "box_head": FastRCNNConvFCHead((64, 7, 7), [64] * 2, [256], norm),
        "box_predictor": FastRCNNPredictor(256, CLASSES + 1),
    }  # fmt: skip
    if not masks:
        return detection.FasterRCNN(backbone, **parts, **limits)
    return detection.MaskRCNN(
        backbone, mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2), mask_head=MaskRCNNHeads(64, [64] * 2, 1, norm),
        mask_predictor=MaskRCNNPredictor(64, 64, CLASSES + 1), **parts, **limits,
    )  # fmt: skip
