"""Count the positives that a dense detector trains on per image, the number that its losses are divided by.

The anchors that are positive follow from boxes and sizes alone, so no picture is loaded and no weight is needed.
"""

import numpy as np
import torch

from gndet.config.data import DataConfig
from gndet.config.schema import Config
from gndet.data.batches.crops import resized
from gndet.data.datasets.packed import count_objects
from gndet.data.records import Dataset, Record
from gndet.modeling.build import build_model
from gndet.modeling.dense import DenseDetector
from gndet.modeling.dense_head import DenseHead
from gndet.structures import GroundTruth

MOST = 500  # images; the mean of more differs by a few percent


def with_positives(cfg: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """Replace model.dense.positives: measure by the mean number of positives per training image.

    Takes up to MOST images, spread over the data set, at the middle one of data.shortest_edge, and rounds to three
    digits; at least 1.  Returns the config and a line for the log; the config as it is if there is nothing to measure.
    """
    if not cfg.model.is_dense or cfg.model.dense.positives != "measure":
        return cfg, []
    usable = np.flatnonzero((count_objects(dataset.records).trainable > 0) | cfg.data.keep_empty)
    if not len(usable):
        return cfg, []
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, min(MOST, len(usable))).astype(int))]
    with torch.device("meta"):
        model = build_model(cfg.model, 1)
    assert isinstance(model, DenseDetector)
    counts = [_positives(model.dense, dataset.records[i], cfg.data) for i in chosen.tolist()]
    mean = max(float(f"{np.mean(counts):.3g}"), 1.0)
    dense = cfg.model.dense.model_copy(update={"positives": mean})
    changed = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dense": dense})})
    return changed, [f"model.dense.positives: {mean:g}, the mean of {len(counts)} training images"]


def _positives(head: DenseHead, record: Record, data: DataConfig) -> int:
    """Return how many anchors of an image are positive."""
    height, width = resized(record.size, sorted(data.shortest_edge)[len(data.shortest_edge) // 2], data.max_edge)
    scale = np.array([width / record.size[1], height / record.size[0]] * 2)
    boxes = torch.from_numpy((record.boxes[~record.crowd] * scale).astype(np.float32))[None]  # (1, M, 4)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    if not valid.numel():
        return 0
    gt = GroundTruth(boxes, torch.zeros(boxes.shape[:2], dtype=torch.int64), torch.zeros(0), valid)
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in head.strides]
    anchors = head.anchors(maps, dict.fromkeys(head.strides), (height, width))
    return int((head.assign(anchors, gt).label == 1).sum())
