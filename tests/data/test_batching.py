"""Batches lose nothing to padding, and the stream of images is a function of seed and position alone."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.batches import stream as batching
from gndet.data.batches.batch import collate, largest_batch, split
from gndet.data.batches.transforms import Sample
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import MASK_SIDE, Dataset
from gndet.errors import DataError
from gndet.ops.noise import hash_ints
from gndet.structures import Batch

DATA = DataConfig(shortest_edge=(32, 48), shortest_edge_test=48, workers=0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """11 drawn images of 64 pixels."""
    return read_dataset(DatasetConfig(kind="shapes", count=11, size=64), DataConfig())


def batches(dataset: Dataset, data: DataConfig = DATA, **options: Any) -> list[Batch]:
    defaults = {
        "seed": 0,
        "start": 0,
        "stop": 6,
        "images_per_gpu": 2,
        "global_batch": 4,
        "rank": 0,
        "world": 1,
    }
    stream = batching.train_batches(dataset, data, **defaults | {"masks": False, "pin_memory": False} | options)
    return [loaded.batch for loaded in stream]


def epoch_of_keys(dataset: Dataset, seed: int, epochs: int) -> dict[int, tuple[int, int]]:
    """Map every key that can occur in the first epochs to its (epoch, image id)."""
    pairs = [(epoch, record.image_id) for epoch in range(epochs) for record in dataset.records]
    return {hash_ints(seed, *pair): pair for pair in pairs}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def sample(height: int, width: int, number: int, side: int = MASK_SIDE) -> Sample:
    return Sample(
        image=torch.full((3, height, width), 7, dtype=torch.uint8),
        boxes=torch.rand(number, 4),
        labels=torch.arange(number),
        masks=torch.rand(number, side, side) > 0.5,
        key=hash_ints(height, width),
    )


def test_collate_pads_with_zeros_and_drops_nothing() -> None:
    samples = [sample(30, 50, 9), sample(40, 33, 0), sample(31, 31, 17)]
    batch = collate(samples, 32)
    assert batch.images.shape == (3, 3, 64, 64) and batch.padded
    assert batch.sizes.tolist() == [[30, 50], [40, 33], [31, 31]]
    assert batch.keys.tolist() == [one.key for one in samples] and batch.keys.dtype == torch.int64
    assert batch.gt.boxes.shape == (3, 32, 4) and batch.gt.masks.shape == (3, 32, MASK_SIDE, MASK_SIDE)
    assert batch.gt.valid.sum(1).tolist() == [9, 0, 17]
    assert batch.images.sum() == 7 * 3 * sum(one.image[0].numel() for one in samples)
    for b, one in enumerate(samples):
        number, (height, width) = len(one.labels), one.image.shape[1:]
        assert torch.equal(batch.images[b, :, :height, :width], one.image)
        assert equal(tuple(part[b, :number] for part in batch.gt[:3]), one[1:4])
        assert batch.gt.valid[b, :number].all() and not batch.gt.masks[b, number:].any()


def test_colors_of_a_pixel_lie_side_by_side_in_memory(dataset: Dataset) -> None:
    """Separating the channels costs four times as much as copying, and the convolutions would join them again."""
    for workers in (0, 1):
        loaded = batches(dataset, DATA.model_copy(update={"workers": workers}), stop=1, images_per_gpu=4)
        for batch in (*loaded, *split(loaded[0], 2, 32)):
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
    made = largest_batch(dataset, DATA, 2, masks=False)
    assert made.images.is_contiguous(memory_format=torch.channels_last)


def test_collate_gives_pictures_of_one_size_their_exact_canvas() -> None:
    batch = collate([sample(30, 50, 1), sample(30, 50, 2)], 32)
    assert batch.images.shape == (2, 3, 30, 50) and batch.padded is False


@pytest.mark.parametrize(("number", "slots"), [(0, 8), (8, 8), (9, 16), (375, 512)])
def test_slots_are_a_power_of_two_that_holds_all(number: int, slots: int) -> None:
    batch = collate([sample(8, 8, number, side=0)], 32)
    assert batch.gt.valid.shape == (1, slots) and batch.gt.valid.sum() == number
    assert batch.gt.masks.shape == (1, slots, 0, 0)


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    orders = [batching.order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(100)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    assert np.array_equal(orders[0], batching.order(0, 0, 100))


@pytest.mark.parametrize(("images_per_gpu", "global_batch"), [(1, 1), (2, 4), (4, 4), (16, 32)])
def test_every_image_comes_once_per_epoch(dataset: Dataset, images_per_gpu: int, global_batch: int) -> None:
    updates, keys = 66 // global_batch + 1, epoch_of_keys(dataset, 3, 20)
    found = batches(dataset, seed=3, stop=updates, images_per_gpu=images_per_gpu, global_batch=global_batch)
    stream = [keys[key] for batch in found for key in batch.keys.tolist()]
    assert len(stream) == updates * global_batch
    for epoch in range(len(stream) // 11):
        ids = [image_id for _, image_id in stream[epoch * 11 : epoch * 11 + 11]]
        assert {one for one, _ in stream[epoch * 11 : epoch * 11 + 11]} == {epoch}
        assert sorted(ids) == [record.image_id for record in dataset.records]
    assert [i for _, i in stream[:11]] != [i for _, i in stream[11:22]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_as_if_unbroken(dataset: Dataset, workers: int) -> None:
    data = DATA.model_copy(update={"workers": workers})
    whole = batches(dataset, masks=True)
    for start in (0, 1, 4) if workers == 0 else (2,):
        resumed = batches(dataset, data, start=start, masks=True)
        assert len(resumed) == len(whole) - 2 * start == 12 - 2 * start
        assert all(map(equal, resumed, whole[2 * start :]))


def test_ranks_share_the_stream_of_one_process(dataset: Dataset) -> None:
    alone = batches(dataset)
    first, second = (batches(dataset, rank=rank, world=2) for rank in (0, 1))
    assert all(map(equal, alone[0::2], first)) and all(map(equal, alone[1::2], second))
    assert len(first) == len(second) == 6


def test_the_seed_changes_order_and_keys(dataset: Dataset) -> None:
    assert not set(batches(dataset)[0].keys.tolist()) & set(batches(dataset, seed=1)[0].keys.tolist())


def test_loading_leaves_the_global_generator_alone(dataset: Dataset) -> None:
    torch.manual_seed(0)
    batches(dataset, DATA.model_copy(update={"workers": 1}), stop=1)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(("world", "global_batch"), [(2, 5), (3, 4), (3, 8), (5, 7)])
def test_no_image_is_lost_or_repeated_if_shares_differ_and_epochs_end_within_an_update(
    dataset: Dataset, world: int, global_batch: int
) -> None:
    epochs = 2 * global_batch  # 11 images: every place of an update sees the end of an epoch
    options = {"stop": 2 * 11, "global_batch": global_batch}
    parts = [batches(dataset, rank=rank, world=world, **options) for rank in range(world)]
    keys = Counter(key for part in parts for batch in part for key in batch.keys.tolist())
    assert keys == Counter(epoch_of_keys(dataset, 0, epochs).keys())
    assert {len(batch.images) for part in parts for batch in part} <= {1, 2}


def test_images_without_objects_are_left_out_unless_kept(dataset: Dataset) -> None:
    crowd = dataset.records[1]._replace(crowd=np.ones_like(dataset.records[1].crowd))
    none = np.zeros(0, dtype=int)
    empty = dataset.records[0]._replace(
        boxes=np.zeros((0, 4)), labels=none, crowd=none.astype(bool), annotation_ids=none, segmentations=[]
    )
    mixed = dataset._replace(records=[empty, crowd, *dataset.records[2:4]])
    keys = epoch_of_keys(mixed, 0, 12)
    for keep_empty, share in ((False, {2: 12, 3: 12}), (True, {0: 6, 1: 6, 2: 6, 3: 6})):
        found = batches(mixed, DATA.model_copy(update={"keep_empty": keep_empty}), masks=True)
        ids = Counter(keys[key][1] for batch in found for key in batch.keys.tolist())
        assert ids == {mixed.records[index].image_id: times for index, times in share.items()}
    with pytest.raises(DataError, match="none of 2 images has an object"):
        batches(dataset._replace(records=[empty, crowd]))


def test_a_missing_mask_is_reported_with_its_annotation(dataset: Dataset) -> None:
    """Reading the data with masks refuses it earlier: see test_coco."""
    last = dataset.records[-1]
    bare = last._replace(segmentations=[None] * len(last.labels))
    mixed = dataset._replace(records=[*dataset.records[:-1], bare])
    with pytest.raises(DataError, match=f"{last.file_name}: annotation {last.annotation_ids[0]}"):
        batches(mixed, masks=True)


@pytest.mark.parametrize("world", [1, 2, 3, 12])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once(dataset: Dataset, world: int, workers: int) -> None:
    data = DATA.model_copy(update={"workers": workers if world == 2 else 0})
    seen = []
    for rank in range(world):
        share = batching.test_batches(dataset, data, images_per_gpu=2, rank=rank, world=world, pin_memory=False)
        for indices, batch, image_ids, skipped in share:
            assert image_ids == tuple(dataset.records[index].image_id for index in indices) and not skipped
            assert len(indices) == len(batch.images) <= 2 and not batch.gt.valid.any()
            assert isinstance(batch, Batch) and batch.images.shape[2:] == (48, 48) and not batch.padded
            seen += indices
    assert sorted(seen) == list(range(11))
