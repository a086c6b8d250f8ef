"""Time to AP: train gndet's quickstart, and torchvision's Mask R-CNN of like size by its reference loop.

    python -m benchmarks.time_to_ap FOLDER                # both, one after the other
    python -m benchmarks.time_to_ap FOLDER --only gndet

Both see the same pictures of the quickstart in random order, flipped at random, 2 per update, for as many updates, at
the same size, and are evaluated on the same pictures by the same metrics.  torchvision's network has the quickstart's
backbone and anchors and its channels in the pyramid and the heads; its loop is that of its reference scripts (SGD with
momentum 0.9 and weight decay 1e-4, learning rate 0.02 for 16 images scaled to 2, 1,000 updates of warm-up that start at
0.001, divided by 10 twice near the end) or, as `adamw`, that with the optimizer of the quickstart.  The time is that of
updates, loading included, without evaluations.  FOLDER gets curves.json and time_to_ap.png.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset, Record
from gndet.distributed.process import keep_freed_memory
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco
from gndet.train import train
from gndet.training.log import read_metrics

CONFIG = "quickstart"
POINTS = 12  # evaluations per run
LR, REFERENCE_BATCH, WARMUP = 0.02, 16, 1000  # of torchvision's reference scripts for detection
DROPS = (16 / 26, 22 / 26)  # their --lr-steps 16 22 of 26 epochs
WORKERS = 1
Curve = list[tuple[int, float, float, float]]  # updates, seconds, box AP, mask AP


def gndet_curve(folder: Path, seed: int, updates: int) -> Curve:
    """Train the quickstart and return its curve."""
    options = [f"out={folder / 'gndet'}", f"seed={seed}", f"train.schedule.updates={updates}", "train.log_every=10"]
    cfg = load_config(CONFIG, [*options, f"train.eval_every={-(-updates // POINTS)}", "train.norm_images=0"])
    train(cfg, fresh=True)
    curve: Curve = []
    seconds, before = 0.0, 0
    for entry in read_metrics(folder / "gndet" / "metrics.jsonl"):
        if entry["kind"] == "train":
            seconds += (entry["update"] - before) * cfg.train.global_batch / entry["images_per_s"]
            before = entry["update"]
        else:
            curve.append((entry["update"], seconds, entry["box/AP"], entry["mask/AP"]))
    return curve


# --- torchvision


class Pictures(torch.utils.data.Dataset):
    """A data set as torchvision's reference scripts load it: tensors and targets, flipped at random."""

    def __init__(self, dataset: Dataset, flip: bool) -> None:
        self.records, self.flip = dataset.records, flip

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record: Record = self.records[index]
        image = torch.from_numpy(record.load()).permute(2, 0, 1).float() / 255
        boxes, masks = torch.from_numpy(record.boxes).float(), torch.from_numpy(_bitmaps(record))
        if self.flip and torch.rand(()) < 0.5:
            image, masks = image.flip(2), masks.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": torch.from_numpy(record.labels) + 1, "masks": masks}


def _bitmaps(record: Record) -> np.ndarray:
    """Return the masks of a record, (n, H, W) uint8."""
    codes = [code | {"counts": code["counts"].encode()} for code in record.segmentations]
    return np.ascontiguousarray(coco_mask.decode(codes).transpose(2, 0, 1))


def torchvision_model(cfg: Config, num_classes: int) -> MaskRCNN:
    """Return torchvision's Mask R-CNN with the quickstart's sizes, all layers trained from scratch with BN."""
    model, channels = cfg.model, cfg.model.fpn.channels
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{model.backbone.depth}", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    backbone.out_channels = channels
    backbone.fpn = _pyramid(backbone, channels)
    anchors = AnchorGenerator(tuple((size,) for size in model.rpn.anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
    head = model.box_head
    box_head = nn.Sequential(
        nn.Flatten(), nn.Linear(channels * 49, head.fc_channels), nn.ReLU(),
        nn.Linear(head.fc_channels, head.fc_channels), nn.ReLU(),
    )  # fmt: skip
    mask_channels = model.mask_head.channels
    edge = cfg.data.shortest_edge_test
    return MaskRCNN(
        backbone, min_size=edge, max_size=edge, rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=model.rpn.anchors_per_image, rpn_pre_nms_top_n_train=model.rpn.pre_nms_train,
        rpn_post_nms_top_n_train=model.rpn.post_nms_train, rpn_pre_nms_top_n_test=model.rpn.pre_nms_test,
        rpn_post_nms_top_n_test=model.rpn.post_nms_test,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), box_head=box_head,
        box_predictor=FastRCNNPredictor(head.fc_channels, num_classes + 1),
        box_batch_size_per_image=head.regions_per_image,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        mask_head=MaskRCNNHeads(channels, (mask_channels,) * model.mask_head.num_convs, 1),
        mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
    )  # fmt: skip


def _pyramid(backbone: Any, channels: int) -> nn.Module:
    """Return a pyramid with fewer channels in place of the backbone's."""
    inner = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    made = type(backbone.fpn)(inner, channels, extra_blocks=backbone.fpn.extra_blocks)
    return made


def torchvision_curve(kind: str, seed: int, updates: int) -> Curve:
    """Train torchvision's network and return its curve; kind: `sgd`, its reference recipe, or `adamw`."""
    cfg = load_config(CONFIG, [])
    keep_freed_memory()  # as gndet does: without it torchvision takes half as long again
    torch.manual_seed(seed)
    train_set, val_set = (read_dataset(part, cfg.data) for part in (cfg.data.train, cfg.data.val))
    model = torchvision_model(cfg, len(train_set.classes)).train()
    recipe = cfg.train.optimizer
    if kind == "sgd":
        lr = LR * cfg.train.global_batch / REFERENCE_BATCH
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
    loader = torch.utils.data.DataLoader(
        Pictures(train_set, flip=True), cfg.train.global_batch, shuffle=True, drop_last=True, num_workers=WORKERS,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )  # fmt: skip
    curve: Curve = []
    seconds, began = 0.0, time.perf_counter()
    for update, (images, targets) in enumerate(_endless(loader, updates)):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * _factor(kind, update, updates, cfg)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        if kind == "adamw":
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm or math.inf)
        optimizer.step()
        if (update + 1) % -(-updates // POINTS) == 0 or update + 1 == updates:
            seconds += time.perf_counter() - began
            curve.append((update + 1, seconds, *_score(model, val_set)))
            print(f"torchvision {kind}: update {update + 1}, {seconds:.0f} s, AP {curve[-1][2:]}", flush=True)
            began = time.perf_counter()
    return curve


def _factor(kind: str, update: int, updates: int, cfg: Config) -> float:
    """Return the learning rate of an update relative to the peak."""
    if kind == "adamw":  # the quickstart's schedule
        return (1 + math.cos(math.pi * update / updates)) / 2 * min(1.0, (update + 1) / cfg.train.schedule.warmup)
    warm = min(WARMUP, updates)
    return min(1.0, 0.001 + 0.999 * update / warm) * 0.1 ** sum(update >= drop * updates for drop in DROPS)


def _endless(loader: Any, updates: int) -> Iterator[Any]:
    done = 0
    while True:
        for batch in loader:
            if done == updates:
                return
            done += 1
            yield batch


@torch.inference_mode()
def _score(model: MaskRCNN, val_set: Dataset) -> tuple[float, float]:
    """Return box AP and mask AP."""
    model.eval()
    found = []
    for record, (image, _) in zip(val_set.records, Pictures(val_set, flip=False), strict=True):
        (output,) = model([image])
        masks = (output["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        codes = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        columns = (output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist(), codes)
        for (x0, y0, x1, y1), label, score, code in zip(*columns, strict=True):
            found.append(
                {
                    "image_id": record.image_id, "category_id": val_set.category_ids[label - 1], "score": score,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": code | {"counts": code["counts"].decode()},
                }
            )  # fmt: skip
    model.train()
    metrics = coco_metrics(coco_truths(val_set, masks=True), from_coco(found), engine="hotcoco", max_detections=100)
    return metrics["bbox"].summary["AP"], metrics["segm"].summary["AP"]


# --- both


def time_to(curve: Curve, ap: float) -> float | None:
    """Return the seconds until a box AP is reached, interpolated between two evaluations; None if it is not."""
    for (_, start, low, _), (_, end, high, _) in pairwise([(0, 0.0, 0.0, 0.0), *curve]):
        if high >= ap:
            return start + (end - start) * (ap - low) / (high - low)
    return None


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draw box AP against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, curve in curves.items():
        axes.plot(
            [0, *(point[1] for point in curve)], [0, *(100 * point[2] for point in curve)], "o-", ms=3, label=name
        )
    axes.set(xlabel="seconds of training", ylabel="box AP", title="The quickstart's data and budget")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, train, and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("gndet", "sgd", "adamw"))
    parser.add_argument("--updates", type=int, default=load_config(CONFIG, []).train.schedule.updates)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "curves.json"
    curves = json.loads(kept.read_text()) if kept.exists() else {}
    for kind in (options.only,) if options.only else ("gndet", "sgd", "adamw"):
        name = "gndet" if kind == "gndet" else f"torchvision, {kind}"
        if kind == "gndet":
            curves[name] = gndet_curve(options.folder, options.seed, options.updates)
        else:
            curves[name] = torchvision_curve(kind, options.seed, options.updates)
        kept.write_text(json.dumps(curves))
    draw(curves, options.folder / "time_to_ap.png")
    for name, curve in curves.items():
        _, seconds, box, mask = curve[-1]
        line = f"{name}: box AP {100 * box:.1f}, mask AP {100 * mask:.1f} after {seconds:.0f} s"
        if name != "gndet" and "gndet" in curves:
            reached = time_to(curves["gndet"], box)
            line += "; gndet never reaches it" if reached is None else f"; gndet reaches it in {reached:.0f} s"
            line += "" if reached is None else f", {reached / seconds:.2f} of the time"
        print(line)


if __name__ == "__main__":
    main()
