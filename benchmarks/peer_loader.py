"""gndet's input pipeline for a harness that compares toolkits: build(coco_root, split) -> (num, get).

coco_root holds annotations/instances_SPLIT.json and the pictures in SPLIT.  get(i) returns image i as a training batch:
800 pixels on the shorter edge, at most 1,333 on the longer, flipped half of the time.
"""

from collections.abc import Callable

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import train_sample
from gndet.data.datasets.reading import read_dataset
from gndet.structures import Batch


def build(coco_root: str, split: str) -> tuple[int, Callable[[int], Batch]]:
    """Return the number of images, and a function that makes the batch of image i."""
    data = DataConfig(root=coco_root, shortest_edge=(800,), max_edge=1333)
    source = DatasetConfig(annotations=f"annotations/instances_{split}.json", images=split)
    records = read_dataset(source, data, masks=True).records
    return len(records), lambda i: collate([train_sample(records[i], data, i, True)], data.canvas_multiple)
