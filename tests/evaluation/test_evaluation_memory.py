"""Evaluating a large picture with many masks takes the memory of few of them: they are pasted and scored as codes."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_drawing_memory import little_memory
from torch import Tensor, nn

from gndet.config.data import DataConfig
from gndet.config.schema import Config
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import Dataset, Record
from gndet.distributed.process import Process
from gndet.evaluation.evaluate import evaluate
from gndet.structures import Detections

SIZE = (3000, 4000)  # 12 million pixels
OBJECTS, FOUND, EDGE = 300, 1000, 200  # decoded at once, the masks would take 3.6 and 12 GB
ROOM = 1 << 30  # bytes beside what the process has
SHORTEST = 300  # pixels of the resized picture


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A picture with squares, outlined by polygons and RLEs in turn."""
    corners = np.random.default_rng(0).integers(0, np.array(SIZE[::-1]) - EDGE, (OBJECTS, 2))
    boxes = np.hstack((corners, corners + EDGE)).astype(np.float64)
    masks: list[Any] = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    masks[::2] = [code | {"counts": code["counts"].decode()} for code in (to_rle(mask, SIZE) for mask in masks[::2])]
    zeros = np.zeros(OBJECTS, dtype=np.int64)
    record = Record(
        1, "a.png", SIZE, lambda: np.zeros((*SIZE, 3), dtype=np.uint8), boxes, zeros, zeros > 0, zeros + EDGE**2,
        zeros + 1, masks,
    )  # fmt: skip
    return Dataset("made up", ("cup",), (1,), [record._replace(annotation_ids=np.arange(1, OBJECTS + 1))])


class Finder(nn.Module):
    """Find every object, and the same objects again with lower scores, until there are FOUND."""

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.boxes = boxes.repeat(FOUND // OBJECTS + 1, 1)[:FOUND] * (SHORTEST / SIZE[0])

    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        scores = torch.linspace(0.9, 0.1, FOUND)[None]
        masks = torch.ones(1, FOUND, 28, 28)
        return Detections(self.boxes[None], scores, torch.zeros_like(scores).long(), masks, torch.ones_like(scores))


def test_a_picture_of_12_megapixels_with_300_masks_and_1000_detections_takes_little(dataset: Dataset) -> None:
    data = DataConfig(workers=0, shortest_edge_test=SHORTEST, max_edge=SHORTEST * 2)
    cfg = Config.model_validate({"data": data, "evaluation": {"images_per_gpu": 1, "max_detections": FOUND}})
    model: Any = Finder(torch.from_numpy(dataset.records[0].boxes).float())
    with little_memory(ROOM):
        found = evaluate(model, dataset, cfg, Process(0, 1, torch.device("cpu")), nullcontext)
    assert found.mask is not None and len(found.results) == FOUND
    assert min(found.box.summary["AR"], found.mask.summary["AR"]) > 0.95
