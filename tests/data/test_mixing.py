"""Mixup and CutMix: a mixed picture is a function of seed, epoch and image, whatever batch, rank or worker makes it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classes import write_classes

from gndet.config.data import CropConfig, DataConfig
from gndet.data.batches import crops, transforms
from gndet.data.batches.stream import Loaded, train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset

BOTH = CropConfig(size=32, mixup=0.2, cutmix=1.0, rand_augment=2, magnitude=21)


def data_of(root: Path, crop: CropConfig = BOTH) -> DataConfig:
    kinds = {"kind": "folders", "split": "train"}
    return DataConfig(root=str(root), train=kinds, val={"kind": "folders"}, crop=crop, cache="", workers=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("mixing") / "set")


@pytest.fixture(scope="module")
def dataset(root: Path) -> Dataset:
    data = data_of(root)
    return read_dataset(data.train, data)


def loaded(dataset: Dataset, data: DataConfig, **options: Any) -> list[Loaded]:
    defaults = {"seed": 0, "start": 0, "stop": 8, "images_per_gpu": 2, "global_batch": 4, "rank": 0, "world": 1}
    return list(train_batches(dataset, data, **defaults | {"masks": False, "pin_memory": False} | options))


def by_key(batches: list[Loaded]) -> dict[int, tuple[Any, ...]]:
    """Return the picture, the classes and the shares of each image by its key."""
    found = {}
    for batch, _, _ in batches:
        rows = zip(batch.keys.tolist(), batch.images, batch.gt.labels, batch.gt.valid, batch.shares, strict=True)
        for key, image, labels, valid, shares in rows:
            assert not shares[~valid].any()
            found[key] = image.numpy().tobytes(), tuple(labels[valid].tolist()), tuple(shares[valid].tolist())
    return found


def test_a_sample_does_not_depend_on_batches_ranks_workers_or_a_resumption(root: Path, dataset: Dataset) -> None:
    data = data_of(root)
    expected = by_key(loaded(dataset, data))
    assert len(expected) == 32 and all(len(labels) == 2 for _, labels, _ in expected.values())
    assert all(sum(shares) == pytest.approx(1) for *_, shares in expected.values())
    assert by_key(loaded(dataset, data, images_per_gpu=4)) == expected
    assert by_key(loaded(dataset, data.model_copy(update={"workers": 2}))) == expected
    ranks = [by_key(loaded(dataset, data, rank=rank, world=2)) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == expected
    assert expected.items() >= by_key(loaded(dataset, data, start=5)).items()
    assert not expected.keys() & by_key(loaded(dataset, data, seed=1)).keys()


def test_partners_come_from_the_whole_data_set_and_change_by_epoch(root: Path, dataset: Dataset) -> None:
    found = by_key(loaded(dataset, data_of(root), stop=15))  # four epochs of 15 images
    pairs = Counter(labels for _, labels, _ in found.values())
    assert len(found) == 60 and len(pairs) == 9 and max(pairs.values()) < 20


def test_loading_leaves_the_global_generators_alone(root: Path, dataset: Dataset) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    loaded(dataset, data_of(root), stop=2)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_rand_augment_is_a_function_of_the_key_and_off_by_default() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).permute(2, 0, 1)
    crop = CropConfig(rand_augment=2, magnitude=21)
    first = [crops.rand_augment(image, crop, key) for key in range(20)]
    torch.manual_seed(1)
    again = [crops.rand_augment(image, crop, key) for key in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({x.numpy().tobytes() for x in first}) > 15
    assert all(x.shape == image.shape and x.dtype == torch.uint8 for x in first)
    assert crops.rand_augment(image, CropConfig(), 3) is image


def test_evaluation_may_see_larger_pictures_than_training(root: Path) -> None:
    data = DataConfig(root=str(root), train={"kind": "folders"}, val={"kind": "folders"}, cache="", workers=0,
                      crop={"size": 16, "size_test": 28})  # fmt: skip
    assert data.shortest_edge_test == 32
    record = read_dataset(data.train, data).records[0]
    assert transforms.train_sample(record, data, 5, False).image.shape == (3, 16, 16)
    assert transforms.test_sample(record, data).image.shape == (3, 28, 28)


def test_mixup_is_the_weighted_mean_and_cutmix_a_box_of_the_other() -> None:
    one, two = (torch.full((3, 40, 50), value, dtype=torch.uint8) for value in (200, 40))
    blends, cut = 0, list[float]()
    for key in range(600):
        mixed, share = crops.mix(one, two, CropConfig(mixup=1.0), key)
        assert mixed.unique().tolist() == [round(share * 200 + (1 - share) * 40)]
        mixed, share = crops.mix(one, two, CropConfig(cutmix=1.0), key)
        box = mixed[0] == 40  # one rectangle, whose area decides the share
        assert share == pytest.approx(1 - box.double().mean().item())
        assert box.any(0).sum() * box.any(1).sum() == box.sum() and ((mixed == 40) | (mixed == 200)).all()
        cut.append(share)
        blends += not {40, 200} >= set(crops.mix(one, two, CropConfig(mixup=1.0, cutmix=1.0), key)[0].unique().tolist())
    assert blends == pytest.approx(300, abs=40)  # with both, each takes half of the pictures
    assert 0.55 < np.mean(cut) < 0.75  # a half, and more because boxes are cut off at the edges


@pytest.mark.parametrize("alpha", [0.1, 8.0])
def test_the_share_follows_a_beta_distribution(alpha: float) -> None:
    black, crop = torch.zeros(3, 4, 4, dtype=torch.uint8), CropConfig(mixup=alpha)
    shares = np.array([crops.mix(black, black, crop, key)[1] for key in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # of Beta(a, a)


def test_a_partner_that_cannot_be_read_is_counted_and_the_picture_stays_as_it_is(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "set")
    data = data_of(root)
    dataset = read_dataset(data.train, data)
    path = root / "train" / "red" / "train-red-1.png"
    path.write_bytes(path.read_bytes()[:300])
    (bad,) = (record.image_id for record in dataset.records if record.file_name.endswith("train-red-1.png"))
    whole, plain = (
        by_key(loaded(dataset, data, stop=60)),
        data_of(root, BOTH.model_copy(update={"mixup": 0.0, "cutmix": 0.0})),
    )
    pure = {key: image for key, (image, labels, shares) in whole.items() if shares == (1.0,)}
    found = loaded(dataset, data, stop=60, images_per_gpu=1)
    assert {skipped.image_id for batch in found for skipped in batch.skipped} == {bad}
    assert by_key(found) == whole and 5 < len(pure) < 40  # 240 images, 1 of 15 partners
    for batch, *_ in loaded(dataset, plain, stop=60):
        assert batch.shares is None
        for key, image in zip(batch.keys.tolist(), batch.images, strict=True):
            assert pure.get(key, image.numpy().tobytes()) == image.numpy().tobytes()
