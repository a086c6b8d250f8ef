"""A converted detector beside the one it comes from, on the same images: how far apart, and fitted to it if asked.

Both have the same convolutions, so one network computes both in one pass: every image comes twice, and each norm gives
the first half of the batch to the file's own norm (weights/convert.py: Twin). B images, R regions an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.structures import Batch, Proposals
from gndet.weights.convert import run_twins

REGIONS = 64  # an image, for the norms of the heads


class Comparison(NamedTuple):
    """Relative errors ||new - old|| / ||old - mean old||, those of all layers before included."""

    layers: dict[str, float]  # by norm layer
    stages: dict[str, float]  # of "C2".."C5", "P2".."P6"


def compare(model: MaskRCNN, references: dict[str, nn.Module], batch: Batch, *, fit: bool) -> Comparison:
    """Run a converted model and its original side by side.

    references: the original's norm for each norm layer that was converted.  fit: fit gamma and beta of those layers, in
    forward order (method C).  The regions of both are those that the original proposes.
    """
    stages: dict[str, float] = {}

    def note(first: int, letter: str) -> object:
        def hook(module: nn.Module, arguments: object, maps: list[Tensor]) -> None:
            for level, x in enumerate(maps, start=first):
                old, new = x.chunk(2)
                varies = old - old.mean((0, 2, 3), keepdim=True)
                stages[f"{letter}{level}"] = float((new - old).norm() / varies.norm().clamp(min=1e-12))

        return hook

    handles = [model.backbone.register_forward_hook(note(2, "C")), model.fpn.register_forward_hook(note(2, "P"))]
    try:
        layers = run_twins(model, references, lambda: _run(model, batch, references), fit=fit)
    finally:
        for handle in handles:
            handle.remove()
    return Comparison(layers, stages)


def _run(model: MaskRCNN, batch: Batch, references: dict[str, nn.Module]) -> None:
    """Pass every image twice through the pyramid and, where norms of the heads were converted, through the heads."""
    images, sizes = torch.cat([batch.images] * 2), torch.cat([batch.sizes] * 2)
    features, areas = model.features(images, sizes, batch.padded)
    if not any(name.startswith(("rpn.", "box_head.", "mask_head.")) for name in references):
        return
    logits, deltas = model.rpn(features, areas)
    anchors = model.rpn.anchors(features, areas, images.shape[2:])
    proposals = model.rpn.propose(logits, deltas, anchors, sizes)
    half = Proposals(*(field[: len(batch.images), :REGIONS] for field in proposals))
    boxes = torch.where(half.valid[..., None], half.boxes, half.boxes[:, :1])  # (B, R, 4); an empty slot: the best
    boxes = torch.cat([boxes, boxes])  # (2B, R, 4)
    pyramid, strides = model.pooled_levels(features, areas)
    model.box_head(pyramid, strides, boxes)
    if model.mask_head is not None:
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        labels = torch.zeros_like(image)
        model.mask_head(pyramid, strides, boxes.flatten(0, 1), image, labels)
