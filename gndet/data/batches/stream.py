"""Batches: samples padded to one canvas, and the two streams of them, for training and for evaluation.

The training stream is endless. Position p is image `order(seed, p // n, n)[p % n]`; update u covers positions
[u * global_batch, (u + 1) * global_batch) whatever the number of processes: a run resumes by arithmetic, and no image
is left out or comes twice where an epoch ends within an update.
Letters: B images, M ground-truth slots, n images of the data set, S mask side, (H, W) canvas.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from gndet.config.schema import DataConfig
from gndet.data.batches.batch import collate, most_objects
from gndet.data.batches.prefetch import Notify, prefetch
from gndet.data.batches.transforms import Sample, UnreadablePicture, check_masks, test_sample, train_sample
from gndet.data.datasets.packed import count_objects
from gndet.data.records import Dataset, Record
from gndet.errors import DataError
from gndet.ops.noise import Stream, hash_ints
from gndet.structures import Batch


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
    return prefetch(
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
    return prefetch(
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
