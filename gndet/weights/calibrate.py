"""A converted detector beside the one it comes from, on the same images: how far apart, and fitted to it if asked.

Both have the same convolutions, so one network computes both in one pass: every image comes twice, and each norm gives
the first half of the batch to the file's own norm (weights/convert.py: Twin). B images, R regions an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.detection_model import DetectionModel
from gndet.structures import Batch
from gndet.weights.convert import run_twins


class Comparison(NamedTuple):
    """Relative errors ||new - old|| / ||old - mean old||, those of all layers before included."""

    layers: dict[str, float]  # by norm layer
    stages: dict[str, float]  # of "C2".."C5", "P2".."P6"


def compare(model: DetectionModel, references: dict[str, nn.Module], batch: Batch, *, fit: bool) -> Comparison:
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

    def run() -> None:
        images, sizes = torch.cat([batch.images] * 2), torch.cat([batch.sizes] * 2)
        model.probe(images, sizes, batch.padded, copies=2, regions=any(map(model.sees_regions, references)))

    handles = [model.backbone.register_forward_hook(note(2, "C")), model.fpn.register_forward_hook(note(2, "P"))]
    try:
        layers = run_twins(model, references, run, fit=fit)
    finally:
        for handle in handles:
            handle.remove()
    return Comparison(layers, stages)
