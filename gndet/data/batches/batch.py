"""Batches: collate samples on one canvas, split a batch, and make up the largest batch of a data set.

Letters: B images, M ground-truth slots, S mask side, (H, W) canvas.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gndet.config.data import DataConfig
from gndet.data.batches.crops import resized
from gndet.data.batches.transforms import Sample, test_sample
from gndet.data.datasets.packed import count_objects
from gndet.data.records import MASK_SIDE, Dataset
from gndet.structures import Batch, GroundTruth

MIN_SLOTS = 8  # M is a power of two and at least this, so that few shapes occur


def collate(
    samples: list[Sample],
    canvas_multiple: int,
    exact: bool = True,
    canvases: Sequence[tuple[int, int]] = (),
    objects: int = 0,
) -> Batch:
    """Put B samples on one canvas, and their objects in M slots; the rest is zero and invalid.

    If all pictures have the same size, the canvas has that size and padded is False; otherwise it has their largest
    height and width, rounded up to a multiple of canvas_multiple.  M is large enough for every object.
    exact: False rounds up for pictures of the same size, too.  canvases: if given, the smallest of these that holds the
    pictures is the canvas.  objects: lower limit of M.
    """
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples])  # (B, 2)
    canvas, padded = _canvas(sizes, canvas_multiple, exact, canvases)
    slots, side = _slots(max(objects, *(len(sample.labels) for sample in samples))), samples[0].masks.shape[-1]
    num = len(samples)
    # channels last, as resizing leaves it and convolutions expect it: a third of the cost of separating the channels
    images = torch.zeros(num, *canvas, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes, labels = torch.zeros(num, slots, 4), torch.zeros(num, slots, dtype=torch.int64)
    masks = torch.zeros(num, slots, side, side, dtype=torch.bool)
    valid = torch.zeros(num, slots, dtype=torch.bool)
    shares = torch.zeros(num, slots) if any(sample.shares is not None for sample in samples) else None
    for b, sample in enumerate(samples):
        height, width = sample.image.shape[1:]
        images[b, :, :height, :width] = sample.image
        filled = slice(len(sample.labels))
        boxes[b, filled], labels[b, filled], masks[b, filled] = sample.boxes, sample.labels, sample.masks
        valid[b, filled] = True
        if shares is not None:
            own = torch.ones(1) if sample.shares is None else sample.shares
            shares[b, : len(own)] = own
    keys = torch.tensor([sample.key for sample in samples])
    return Batch(images, sizes, keys, GroundTruth(boxes, labels, masks, valid), padded, shares)


def _canvas(
    sizes: Tensor, multiple: int, exact: bool, canvases: Sequence[tuple[int, int]] = ()
) -> tuple[tuple[int, int], bool]:
    """Return the canvas for pictures of sizes (B, 2), and whether any of them does not fill it.

    A canvas from `canvases` always counts as padded: a second graph for the rare pictures that fill it would cost more
    than masking them.
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
    """Return M for images with at most num objects."""
    return 1 << (max(MIN_SLOTS, num) - 1).bit_length()


def split(
    batch: Batch, num: int, canvas_multiple: int, exact: bool = True, canvases: Sequence[tuple[int, int]] = ()
) -> list[Batch]:
    """Split a batch into batches of num images, the last perhaps smaller, each on the smallest canvas that holds it.

    A norm that does not mix images gives the same results in less memory.
    """
    if len(batch.images) <= num:
        return [batch]
    parts = []
    whole = batch.images.shape[2:]
    smaller = [canvas for canvas in canvases if canvas[0] <= whole[0] and canvas[1] <= whole[1]]
    for first in range(0, len(batch.images), num):
        rows = slice(first, first + num)
        (height, width), padded = _canvas(batch.sizes[rows], canvas_multiple, exact, smaller)
        images = batch.images[rows, :, :height, :width]  # never larger than the whole batch's canvas
        images = images.contiguous(memory_format=torch.channels_last)
        gt = GroundTruth(*(field[rows] for field in batch.gt))
        shares = None if batch.shares is None else batch.shares[rows]
        parts.append(Batch(images, batch.sizes[rows], batch.keys[rows], gt, padded, shares))
    return parts


def largest_batch(dataset: Dataset, data: DataConfig, num: int, *, masks: bool, objects: int = 0) -> Batch:
    """Make up a batch of noise with the largest canvas and M that num training images can have.

    A single image has the size of the largest picture; of several, one may be the tallest and another the widest.  Each
    has as many objects as the fullest image of the data set, and at least `objects`.  With data.canvases, the batch
    fills the largest canvas.
    """
    if data.crop is None:
        shapes = np.unique(count_objects(dataset.records).sizes, axis=0).tolist()
        edges = (min(data.shortest_edge), max(data.shortest_edge))
        sizes = torch.tensor([resized(shape, edge, data.max_edge) for shape in shapes for edge in edges])  # (.., 2)
    else:
        sizes = torch.tensor([[data.crop.size] * 2])
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
    shares = torch.full((num, slots), 1 / slots) if data.crop is not None and data.crop.mixes else None
    return Batch(images, torch.tensor([[height, width]] * num), keys, gt, padded, shares)


def most_objects(dataset: Dataset) -> int:
    """Return the largest number of objects in an image of the data set."""
    return int(count_objects(dataset.records).objects.max())


def sample_batch(dataset: Dataset, data: DataConfig, num: int, max_shortest_edge: int) -> Batch:
    """Load a batch of num images spread evenly over a data set (all if it has fewer), as for evaluation.

    max_shortest_edge: pixels; larger pictures are scaled down to it.  Raises DataError for an unreadable picture.
    """
    edge = min(data.shortest_edge_test, max_shortest_edge)
    scaled = data.model_copy(
        update={"shortest_edge_test": edge, "max_edge": data.max_edge * edge // data.shortest_edge_test}
    )
    count = min(num, len(dataset.records))
    records = [dataset.records[i * len(dataset.records) // count] for i in range(count)]
    return collate([test_sample(record, scaled) for record in records], data.canvas_multiple, data.exact_canvas)
