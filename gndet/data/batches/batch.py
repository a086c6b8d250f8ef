"""Batches: samples put onto one canvas, cut into micro-batches, and the largest that a data set can make."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gndet.config.schema import DataConfig
from gndet.data.batches.transforms import Sample, resized, test_sample
from gndet.data.datasets.packed import count_objects
from gndet.data.records import MASK_SIDE, Dataset
from gndet.structures import Batch, GroundTruth

MIN_SLOTS = 8  # M is a power of two from here on, so that few shapes occur


def collate(
    samples: list[Sample],
    canvas_multiple: int,
    exact: bool = True,
    canvases: Sequence[tuple[int, int]] = (),
    objects: int = 0,
) -> Batch:
    """Put B samples on one canvas, their objects in M slots; the rest is zero and not valid.

    The canvas is that of the pictures if all have one size (then padded is False), else the largest height
    and width rounded up to a multiple of canvas_multiple.  M holds the most objects of an image: none is
    dropped.  exact False: the canvas is rounded up even for pictures of one size.  canvases: the only ones there may
    be; the smallest that holds the pictures is taken.  objects: M holds so many at the least.
    """
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples])  # (B, 2)
    canvas, padded = _canvas(sizes, canvas_multiple, exact, canvases)
    slots, side = _slots(max(objects, *(len(sample.labels) for sample in samples))), samples[0].masks.shape[-1]
    num = len(samples)
    # channels last, as resized and as the convolutions want it: a third of the cost of taking the colours apart
    images = torch.zeros(num, *canvas, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes, labels = torch.zeros(num, slots, 4), torch.zeros(num, slots, dtype=torch.int64)
    masks = torch.zeros(num, slots, side, side, dtype=torch.bool)
    valid = torch.zeros(num, slots, dtype=torch.bool)
    for b, sample in enumerate(samples):
        height, width = sample.image.shape[1:]
        images[b, :, :height, :width] = sample.image
        filled = slice(len(sample.labels))
        boxes[b, filled], labels[b, filled], masks[b, filled] = sample.boxes, sample.labels, sample.masks
        valid[b, filled] = True
    keys = torch.tensor([sample.key for sample in samples])
    return Batch(images, sizes, keys, GroundTruth(boxes, labels, masks, valid), padded)


def _canvas(
    sizes: Tensor, multiple: int, exact: bool, canvases: Sequence[tuple[int, int]] = ()
) -> tuple[tuple[int, int], bool]:
    """The canvas for pictures of sizes (B, 2), and whether any of them does not fill it.

    Of given canvases it is the smallest, and taken to be padded: another graph for those rare pictures that fill it
    costs more than their masks.
    """
    padded = bool((sizes != sizes[0]).any())
    height, width = sizes.amax(0).tolist()
    if canvases:
        fitting = [canvas for canvas in canvases if height <= canvas[0] and width <= canvas[1]]
        return min(fitting, key=lambda canvas: canvas[0] * canvas[1]), True
    if padded or not exact:
        height, width = (-(-edge // multiple) * multiple for edge in (height, width))
    return (height, width), bool((sizes != torch.tensor([height, width])).any())


def _slots(num: int) -> int:
    """M for images with num objects at the most."""
    return 1 << (max(MIN_SLOTS, num) - 1).bit_length()


def split(
    batch: Batch, num: int, canvas_multiple: int, exact: bool = True, canvases: Sequence[tuple[int, int]] = ()
) -> list[Batch]:
    """Cut a batch into batches of num images, the last perhaps fewer, each on the smallest canvas that holds it.

    For a norm that keeps images apart nothing changes but memory.
    """
    if len(batch.images) <= num:
        return [batch]
    parts = []
    here = [canvas for canvas in canvases if canvas[0] <= batch.images.shape[2] and canvas[1] <= batch.images.shape[3]]
    for first in range(0, len(batch.images), num):
        rows = slice(first, first + num)
        (height, width), padded = _canvas(batch.sizes[rows], canvas_multiple, exact, here)
        images = batch.images[rows, :, :height, :width]  # never wider than the canvas it comes from
        images = images.contiguous(memory_format=torch.channels_last)
        gt = GroundTruth(*(field[rows] for field in batch.gt))
        parts.append(Batch(images, batch.sizes[rows], batch.keys[rows], gt, padded))
    return parts


def largest_batch(dataset: Dataset, data: DataConfig, num: int, *, masks: bool, objects: int = 0) -> Batch:
    """A made-up batch as large as num training images can be: noise, of the largest canvas and M.

    One image is the largest picture; of two, one may be the tallest and the other the widest.  It has as many objects
    as any image has, and `objects` at least.  With data.canvases it fills the largest of these.
    """
    shapes = np.unique(count_objects(dataset.records).sizes, axis=0).tolist()
    edges = (min(data.shortest_edge), max(data.shortest_edge))
    sizes = torch.tensor([resized(shape, edge, data.max_edge) for shape in shapes for edge in edges])  # (.., 2)
    if num == 1:
        sizes = sizes[sizes.prod(1).argmax()][None]
    (height, width), padded = _canvas(sizes, data.canvas_multiple, data.exact_canvas)
    if data.canvases:
        (height, width), padded = max(data.canvases, key=math.prod), True
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num, height, width, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    most = max(objects, most_objects(dataset))
    slots, side = _slots(most), MASK_SIDE if masks else 0
    corners = torch.rand(num, slots, 2, 2, generator=generator).sort(dim=2).values * torch.tensor([width, height])
    valid = (torch.arange(slots) < most).repeat(num, 1)
    gt = GroundTruth(
        corners.flatten(2), torch.zeros(num, slots, dtype=torch.int64),
        torch.ones(num, slots, side, side, dtype=torch.bool), valid,
    )  # fmt: skip
    keys = torch.arange(num)
    return Batch(images, torch.tensor([[height, width]] * num), keys, gt, padded)


def most_objects(dataset: Dataset) -> int:
    """The most objects that an image of a data set has."""
    return int(count_objects(dataset.records).objects.max())


def sample_batch(dataset: Dataset, data: DataConfig, num: int, max_shortest_edge: int) -> Batch:
    """A batch of num images, or all, spread evenly over a data set, as in evaluation, without objects.

    max_shortest_edge: pixels; larger ones are scaled down to it.  Raises DataError for a picture that cannot be read.
    """
    edge = min(data.shortest_edge_test, max_shortest_edge)
    scaled = data.model_copy(
        update={"shortest_edge_test": edge, "max_edge": data.max_edge * edge // data.shortest_edge_test}
    )
    count = min(num, len(dataset.records))
    records = [dataset.records[i * len(dataset.records) // count] for i in range(count)]
    return collate([test_sample(record, scaled) for record in records], data.canvas_multiple, data.exact_canvas)
