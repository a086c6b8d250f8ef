"""Compare a converted detector with the one it comes from on the same images, and fit it if asked.

Both have the same convolutions, so one network computes both in one pass: every image comes twice, and each norm gives
the first half of the batch to the file's own norm (weights/convert.py: Twin).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.config.schema import Config
from gndet.data.batches.batch import sample_batch
from gndet.data.records import Dataset
from gndet.errors import ConfigError
from gndet.modeling.detection_model import DetectionModel
from gndet.structures import Batch
from gndet.weights.convert import run_twins
from gndet.weights.policy import Fate

FAR_APART = 0.8  # relative error of a level's features from which the report warns
MEASURED_IMAGES = 4  # on which a conversion is compared with its original
CALIBRATION_EDGE = 256  # pixels, the longest shorter edge: the images are computed at once


class Comparison(NamedTuple):
    """Relative errors ||new - old|| / ||old - mean old||, those of all layers before included."""

    layers: dict[str, float]  # by norm layer
    stages: dict[str, float]  # of "C2".."C5", "P2".."P6"


def measure_norms(
    model: DetectionModel, references: dict[str, nn.Module], fates: dict[str, Fate], cfg: Config,
    images: Dataset | None, *, pyramid: bool,
) -> tuple[dict[str, Fate], list[str]]:  # fmt: skip
    """Compare the converted norms with the file's own on images and, under `calibrate`, fit them.

    references, fates: of the converted layers, by name; pyramid: report the levels behind the backbone, too.
    Returns the fates with their measured errors, and lines for the report; nothing is new without images.
    Raises ConfigError where there is nothing to fit on.
    """
    fit = cfg.train.norm_policy == "calibrate"
    if images is None:
        if fit:
            raise ConfigError("train.norm_policy: calibrate needs training images to fit on")
        return fates, []
    batch = sample_batch(images, cfg.data, cfg.train.calibration_images if fit else MEASURED_IMAGES, CALIBRATION_EDGE)
    comparison, count = compare_with_original(model, references, batch, fit=fit), len(batch.images)
    stages = {name: error for name, error in comparison.stages.items() if pyramid or name.startswith("C")}
    lines = [
        f"features against the file's own norms, relative error on {count} images: "
        + ", ".join(f"{name} {error:.2f}" for name, error in stages.items())
    ]
    if max(comparison.stages.values()) > FAR_APART and cfg.train.norm_policy != "affine":
        lines.append(
            "warning: the converted features are far from the file's own on these images; do they look like those "
            "it was trained on, with its pixel_mean and channel order? Larger groups are more faithful"
        )
    fitted = f", fitted on {count} images" if fit else ""
    measured = {
        name: fates[name]._replace(what=fates[name].what + fitted, measured_error=error)
        for name, error in comparison.layers.items()
    }
    return fates | measured, lines


def compare_with_original(
    model: DetectionModel, references: dict[str, nn.Module], batch: Batch, *, fit: bool
) -> Comparison:
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
