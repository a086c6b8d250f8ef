"""The streams of batches for training and for evaluation, prepared by processes that are replaced if they die.

The training stream is endless.  Position p is image `order(seed, p // n, n)[p % n]`; update u covers positions
[u * global_batch, (u + 1) * global_batch) for any number of ranks.  So a run resumes by arithmetic, and an epoch that
ends within an update neither skips nor repeats an image.
Letters: B images, M ground-truth slots, n images of the data set, S mask side, (H, W) canvas.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gndet.config.data import DataConfig
from gndet.data.batches.batch import collate, most_objects
from gndet.data.batches.transforms import Sample, UnreadablePicture, mixed_sample, test_sample, train_sample
from gndet.data.datasets.packed import count_objects
from gndet.data.records import Dataset, Record, Tell
from gndet.data.workers import REMEDY, Death, Failure, map_ahead
from gndet.errors import DataError, MachineError
from gndet.ops.noise import Stream, hash_ints, uniform
from gndet.structures import Batch


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    image_id: int
    reason: str


class Loaded(NamedTuple):
    """A batch of the training stream."""

    batch: Batch
    image_ids: tuple[int, ...]  # of the B images, in order
    skipped: tuple[Skipped, ...]  # unreadable images, each replaced by one of the B, or missing in its mixture


class Tested(NamedTuple):
    """A batch of the evaluation stream."""

    indices: list[int]  # of the B images in dataset.records
    batch: Batch | None  # None if no picture could be read
    image_ids: tuple[int, ...]  # of the B images and the unreadable ones, in order
    skipped: tuple[Skipped, ...]  # the unreadable ones


class Replay:
    """The batches of one update; iterating again yields the same batches."""

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
    """List the positions of a rank's images within an update, one range per micro-batch of at most `size` images.

    The ranks share rounds of size x world images in order, and the last round as evenly as possible, so their shares
    of an update differ by at most one image.
    """
    rounds = []
    for first in range(0, global_batch, size * world):
        left = min(size * world, global_batch - first)
        rounds.append(range(first + left * rank // world, first + left * (rank + 1) // world))
    return [places for places in rounds if places]


@functools.lru_cache(maxsize=2)  # a micro-batch may span two epochs
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
    notify: Tell | None = None,
) -> Generator[Loaded, None, None]:
    """Yield a rank's micro-batches of updates start .. stop - 1.

    `micro_batches` shares the global_batch positions of an update among the ranks.  data.workers does not change the
    result.  The next readable picture in the epoch's order replaces an unreadable one.
    notify: called with one line per loader process that was killed and replaced.
    Raises DataError if the data set has no image to train on.  While iterating, raises it for an object without a mask
    (if masks), if no picture of an epoch can be read, or if loader processes are killed repeatedly.
    """
    usable = np.flatnonzero((count_objects(dataset.records).trainable > 0) | data.keep_empty).tolist()
    if not usable:
        raise DataError(f"{dataset.name}: none of {len(dataset.records)} images has an object to train on")
    stream = _Stream(dataset, data, seed, masks, usable, most_objects(dataset) if data.canvases else 0)
    parts = micro_batches(global_batch, images_per_gpu, rank, world)
    runs = (
        range(update * global_batch + places.start, update * global_batch + places.stop)
        for update in range(start, stop)
        for places in parts
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
    notify: Tell | None = None,
) -> Generator[Tested, None, None]:
    """Yield the images rank::world in batches, with the reason for each picture that cannot be read.

    The last batch may be smaller, and so may a batch with an unreadable picture.  notify: as in `train_batches`.
    Raises DataError while iterating, if loader processes are killed repeatedly.
    """
    share = list(range(rank, len(dataset.records), world))
    items = (share[first : first + images_per_gpu] for first in range(0, len(share), images_per_gpu))
    return prefetch(
        functools.partial(_load_test, dataset.records, data), items, workers=data.workers, pin_memory=pin_memory,
        describe=lambda indices: _images(dataset.records[index].image_id for index in indices), notify=notify,
    )  # fmt: skip


class _Stream(NamedTuple):
    """The training stream, addressed by position."""

    dataset: Dataset
    data: DataConfig
    seed: int
    masks: bool
    usable: list[int]  # indices in dataset.records of the n images to train on
    min_slots: int  # lower limit of M; with data.canvases the most objects of any image, so that batches have one shape

    def load(self, positions: range) -> Loaded:
        """Make the batch of these positions."""
        samples, image_ids, skipped = zip(*map(self._sample_at, positions), strict=True)
        data = self.data
        batch = collate(list(samples), data.canvas_multiple, data.exact_canvas, data.canvases, self.min_slots)
        return Loaded(batch, image_ids, tuple(itertools.chain(*skipped)))

    def describe(self, positions: range) -> str:
        """Name the images of these positions."""
        return _images(self._record(*divmod(position, len(self.usable))).image_id for position in positions)

    def _record(self, epoch: int, place: int) -> Record:
        num = len(self.usable)
        return self.dataset.records[self.usable[order(self.seed, epoch, num)[place % num]]]

    def _sample(self, record: Record, key: int) -> tuple[Sample, tuple[Skipped, ...]]:
        """Return the sample of a record, with data.crop.mixup or cutmix mixed with another image of the data set.

        That one, and what is random about it, is a function of the key.  If it is unreadable, it is returned as
        skipped, and the sample is not mixed.  Raises UnreadablePicture for the record.
        """
        sample, crop = train_sample(record, self.data, key, self.masks), self.data.crop
        if crop is None or not crop.mixes:
            return sample, ()
        other = self.dataset.records[self.usable[int(uniform(key, Stream.PARTNER) * len(self.usable))]]
        try:
            partner = train_sample(other, self.data, hash_ints(key, other.image_id), self.masks)
        except UnreadablePicture as error:
            return sample._replace(shares=torch.ones(1)), (Skipped(other.image_id, str(error)),)
        return mixed_sample(sample, partner, crop), ()

    def _sample_at(self, position: int) -> tuple[Sample, int, tuple[Skipped, ...]]:
        """Return the sample at a position, its image id, and the unreadable images that it does without.

        The replacement is the next readable picture in the epoch's order, a function of seed, position and which
        pictures are unreadable.  Its key differs from the key at its own position.  Raises DataError if there is none.
        """
        epoch, place = divmod(position, len(self.usable))
        own = self._record(epoch, place)
        try:
            sample, missing = self._sample(own, hash_ints(self.seed, epoch, own.image_id))
            return sample, own.image_id, missing
        except UnreadablePicture as error:
            skipped = Skipped(own.image_id, str(error))
        for next_place in range(place + 1, place + len(self.usable)):
            record = self._record(epoch, next_place)
            key = hash_ints(self.seed, epoch, record.image_id, position)
            with suppress(UnreadablePicture):  # reported at its own position
                sample, missing = self._sample(record, key)
                return sample, record.image_id, (skipped, *missing)
        raise DataError(
            f"{self.dataset.name}: none of its {len(self.usable)} pictures to train on can be read; {skipped.reason}"
        )


def _load_test(records: Sequence[Record], data: DataConfig, indices: list[int]) -> Tested:
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
    return f"image(s) {', '.join(map(str, ids))}"


def prefetch(
    load: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int,
    pin_memory: bool,
    describe: Callable[[Any], str],
    notify: Tell | None = None,
) -> Generator[Any, None, None]:
    """Yield load(item) for each item, in order, prepared by `workers` single-threaded processes, or by this one if 0.

    The processes end when the generator is exhausted, closed or garbage-collected.
    load: must depend on the item alone; its GndetErrors are raised here.  describe: names an item in messages.
    notify: called with a line when a process was killed; a new process then prepares its items again.
    Raises DataError if two processes in a row die on the same item.
    """

    def retry(item: Any, death: Death, deaths: int) -> None:
        if deaths > 1:
            raise DataError(
                f"{death} while preparing {describe(item)}, and so did the one before it; data.workers=0 "
                "shows the cause; if memory is short, lower data.workers"
            )
        if notify:
            notify(f"{death} while preparing {describe(item)}; restarted")

    if workers == 0:
        results = ((item, load(item)) for item in items)
    else:
        results = map_ahead(functools.partial(_on_one_thread, load), items, workers=workers, on_death=retry)
    with closing(results):
        for item, result in results:
            if isinstance(result, Failure) and result.out_of_memory:
                raise MachineError(f"a loader process ran out of memory: {REMEDY}")
            if isinstance(result, Failure):
                raise RuntimeError(f"in a loader process, while preparing {describe(item)}:\n{result.text}")
            batch = _mapped(_from_memory, _Memory, result) if workers else result
            # a GPU can read pinned memory asynchronously
            yield _mapped(Tensor.pin_memory, Tensor, batch) if pin_memory else batch


def _on_one_thread(load: Callable[[Any], Any], item: Any) -> Any:
    """Load an item with a single thread, because the workers share the cores.  Its tensors become their memory."""
    torch.set_num_threads(1)
    return _mapped(_to_memory, Tensor, load(item))


class _Memory(NamedTuple):
    """A tensor as `map_ahead` passes it on: NumPy may lose the order of its dimensions in memory."""

    values: np.ndarray  # (n,) all of its storage
    layout: tuple[Sequence[int], Sequence[int], int]  # shape, strides, offset


def _to_memory(tensor: Tensor) -> _Memory:
    values = tensor.new_empty(0).set_(tensor.untyped_storage())
    return _Memory(values.numpy(), (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))


def _from_memory(memory: _Memory) -> Tensor:
    return torch.from_numpy(memory.values).as_strided(*memory.layout)


def _mapped(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """Apply a function to the values of a kind in nested NamedTuples."""
    if isinstance(value, kind):
        return function(value)
    return type(value)(*(_mapped(function, kind, part) for part in value)) if hasattr(value, "_fields") else value
