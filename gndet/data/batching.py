"""Batches: samples padded to one canvas, and the two streams of them, for training and for evaluation.

The training stream is endless. Position p is image `order(seed, p // n, n)[p % n]`; update u covers positions
[u * global_batch, (u + 1) * global_batch) whatever the number of processes: a run resumes by arithmetic, and no image
is left out or comes twice where an epoch ends within an update.
Letters: B images, M ground-truth slots, n images of the data set, S mask side, (H, W) canvas.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gndet.config.schema import DataConfig
from gndet.data.loader import Notify, prepared
from gndet.data.packed import count_objects
from gndet.data.records import MASK_SIDE, Dataset, Record
from gndet.data.transforms import Sample, UnreadablePicture, check_masks, resized, test_sample, train_sample
from gndet.errors import DataError
from gndet.ops.noise import Stream, hash_ints
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


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    image_id: int
    reason: str


class Loaded(NamedTuple):
    """A batch of the training stream."""

    batch: Batch
    image_ids: tuple[int, ...]  # of the B images, in order
    skipped: tuple[Skipped, ...]  # those that others of these stand in for


class Tested(NamedTuple):
    """A batch of the evaluation stream."""

    indices: list[int]  # places of the B images in dataset.records
    batch: Batch | None  # None where no picture could be read
    image_ids: tuple[int, ...]  # of the B images and those that could not be read, in order
    skipped: tuple[Skipped, ...]  # those that could not be read


class Replay:
    """The batches of one update, to be gone through more than once: what was taken is kept."""

    def __init__(self, take: Callable[[], Loaded], count: int) -> None:
        self.take, self.count = take, count
        self.taken: list[Loaded] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.count):
            if i == len(self.taken):
                self.taken.append(self.take())
            yield self.taken[i].batch


def micro_batches(global_batch: int, size: int, rank: int, world: int) -> list[range]:
    """The places in an update of the images that a process computes, by micro-batch of `size` images at the most.

    In rounds of size x world images, which the processes share in order, the last round as evenly as can be: shares
    of an update differ by one image at the most.
    """
    rounds = []
    for first in range(0, global_batch, size * world):
        left = min(size * world, global_batch - first)
        rounds.append(range(first + left * rank // world, first + left * (rank + 1) // world))
    return [places for places in rounds if places]


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Shuffle n images as a function of seed and epoch.  Returns (n,) int64, a permutation."""
    return np.random.Generator(np.random.PCG64(hash_ints(seed, Stream.ORDER, epoch))).permutation(n)


def train_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    seed: int,
    start: int,
    stop: int,
    images_per_gpu: int,
    global_batch: int,
    rank: int,
    world: int,
    masks: bool,
    pin_memory: bool,
    notify: Notify | None = None,
) -> Generator[Loaded, None, None]:
    """Give this process its micro-batches of the updates start .. stop - 1.

    An update's global_batch positions are dealt as `micro_batches` says.  The result does not depend on data.workers.
    Where a picture cannot be read, the next of the epoch's order that can be stands in for it.
    notify: told of loader processes that were killed and replaced, a line each.
    Raises DataError for a data set without an image to train on or, with masks, for an object without one; while
    iterating, where no picture of an epoch can be read, or loader processes are killed again and again.
    """
    counts = count_objects(dataset.records)
    kept = np.flatnonzero((counts.trainable > 0) | data.keep_empty)
    usable = kept.tolist()
    if not usable:
        raise DataError(f"{dataset.name}: none of {len(dataset.records)} images has an object to train on")
    if masks:
        for index in kept[counts.unmasked[kept]].tolist():
            check_masks(dataset.records[index])  # the first raises
    stream = _Stream(dataset, data, seed, masks, usable, most_objects(dataset) if data.canvases else 0)
    mine = micro_batches(global_batch, images_per_gpu, rank, world)
    runs = (
        range(update * global_batch + places.start, update * global_batch + places.stop)
        for update in range(start, stop)
        for places in mine
    )
    return prepared(
        stream.load, runs, workers=data.workers, pin_memory=pin_memory, describe=stream.describe, notify=notify
    )


def test_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    images_per_gpu: int,
    rank: int,
    world: int,
    pin_memory: bool,
    notify: Notify | None = None,
) -> Generator[Tested, None, None]:
    """Give this process the images rank::world, each once, or say why it cannot be read.

    The last batch may be smaller, and so is one with an unreadable picture.  notify: as in `train_batches`.
    Raises DataError while iterating, where loader processes are killed again and again.
    """
    share = list(range(rank, len(dataset.records), world))
    items = (share[first : first + images_per_gpu] for first in range(0, len(share), images_per_gpu))
    return prepared(
        functools.partial(_load_test, dataset.records, data), items, workers=data.workers, pin_memory=pin_memory,
        describe=lambda indices: _images(dataset.records[index].image_id for index in indices), notify=notify,
    )  # fmt: skip


class _Stream(NamedTuple):
    """The training stream, by position."""

    dataset: Dataset
    data: DataConfig
    seed: int
    masks: bool
    usable: list[int]  # places in dataset.records of the n images that are trained on
    objects: int  # that M holds at the least; with data.canvases the most there are, so that all batches are alike

    def load(self, positions: range) -> Loaded:
        """Make the batch of these positions."""
        samples, image_ids, skipped = zip(*map(self._sample_at, positions), strict=True)
        data = self.data
        batch = collate(list(samples), data.canvas_multiple, data.exact_canvas, data.canvases, self.objects)
        return Loaded(batch, image_ids, tuple(one for one in skipped if one))

    def describe(self, positions: range) -> str:
        """Name the images of these positions."""
        return _images(self._record(*divmod(position, len(self.usable))).image_id for position in positions)

    def _record(self, epoch: int, place: int) -> Record:
        """The record at a place of an epoch's order, counted from its beginning again where it ends."""
        num = len(self.usable)
        return self.dataset.records[self.usable[_order(self.seed, epoch, num)[place % num]]]

    def _sample_at(self, position: int) -> tuple[Sample, int, Skipped | None]:
        """The sample at a position, its image's id, and the image that it stands in for, if it does.

        Where a picture cannot be read, the next one of the epoch's order that can stands in, with a key of its own: a
        function of seed, position and which pictures are bad alone.  Raises DataError where none can be read.
        """
        epoch, place = divmod(position, len(self.usable))
        own = self._record(epoch, place)
        try:
            key = hash_ints(self.seed, epoch, own.image_id)
            return train_sample(own, self.data, key, self.masks), own.image_id, None
        except UnreadablePicture as error:
            skipped = Skipped(own.image_id, str(error))
        for other in range(place + 1, place + len(self.usable)):
            record = self._record(epoch, other)
            key = hash_ints(self.seed, epoch, record.image_id, position)
            with suppress(UnreadablePicture):  # it is told of at its own position
                return train_sample(record, self.data, key, self.masks), record.image_id, skipped
        raise DataError(
            f"{self.dataset.name}: none of its {len(self.usable)} pictures to train on can be read; {skipped.reason}"
        )


_order = functools.lru_cache(maxsize=2)(order)  # a micro-batch may lie in two epochs


def _load_test(records: Sequence[Record], data: DataConfig, indices: list[int]) -> Tested:
    """Make one evaluation batch."""
    samples, read, skipped = [], [], []
    for index in indices:
        try:
            samples.append(test_sample(records[index], data))
            read.append(index)
        except UnreadablePicture as error:
            skipped.append(Skipped(records[index].image_id, str(error)))
    batch = collate(samples, data.canvas_multiple, data.exact_canvas) if samples else None
    return Tested(read, batch, tuple(records[index].image_id for index in indices), tuple(skipped))


def _images(ids: Iterable[int]) -> str:
    """Name images by their ids."""
    return f"image(s) {', '.join(map(str, ids))}"


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
