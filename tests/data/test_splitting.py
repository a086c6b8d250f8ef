"""A share of a data set: stratified by class, the same on every machine and in every order of the images."""

from functools import partial

import numpy as np
import pytest

from gndet.data.datasets.splitting import choose_share
from gndet.data.records import Record


def record(name: str, labels: list[int]) -> Record:
    num = len(labels)
    boxes, ones, classes = np.tile([0.0, 0, 9, 9], (num, 1)), np.ones(num), np.array(labels, dtype=np.int64)
    load = partial(np.zeros, (9, 9, 3), np.uint8)
    return Record(1, name, (9, 9), load, boxes, classes, ones < 0, ones, np.arange(num), [None] * num)


def names_of(records: list[Record], taken: np.ndarray) -> set[str]:
    return {record.file_name for record, is_taken in zip(records, taken, strict=True) if is_taken}


RNG = np.random.default_rng(0)
RECORDS = [
    record(f"{index}.jpg", [0] * (index % 2) + [1] * (index % 10 == 3) + [2] * (index % 50 == 7))
    for index in range(400)
]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_each_class_is_divided_by_the_share(share: float) -> None:
    taken = choose_share(RECORDS, 3, share, seed=0)
    assert abs(taken.mean() - share) < 0.01
    for label in range(3):
        holds = np.array([label in record.labels for record in RECORDS])
        assert abs(taken[holds].sum() - share * holds.sum()) <= 1


def test_the_order_of_the_images_does_not_matter() -> None:
    order = RNG.permutation(len(RECORDS))
    shuffled = [RECORDS[index] for index in order]
    assert names_of(RECORDS, choose_share(RECORDS, 3, 0.2, 5)) == names_of(shuffled, choose_share(shuffled, 3, 0.2, 5))


def test_another_seed_takes_other_images() -> None:
    assert (choose_share(RECORDS, 3, 0.2, 0) != choose_share(RECORDS, 3, 0.2, 1)).sum() > 50


def test_the_choice_is_this_one_on_every_machine() -> None:
    """SHA-256 of the seed and the name orders the images; these two of ten come first."""
    few = [record(f"{index}.jpg", [0]) for index in range(10)]
    assert names_of(few, choose_share(few, 1, 0.2, 0)) == {"2.jpg", "4.jpg"}


def test_copies_that_roboflow_made_stay_together() -> None:
    records = [
        record(f"{index}_jpg.rf.{copy:032x}.jpg", [0]) for index in range(20) for copy in (index * 7 + 1, index * 7 + 2)
    ]
    taken = choose_share(records, 1, 0.25, 0)
    assert taken.sum() == 10 and (taken[::2] == taken[1::2]).all()


@pytest.mark.parametrize("num", [2, 3])
def test_a_class_of_two_pictures_has_one_on_each_side(num: int) -> None:
    taken = choose_share([record(f"{index}.jpg", [0]) for index in range(num)], 1, 0.01, 0)
    assert taken.sum() == 1


def test_a_single_picture_is_trained_on() -> None:
    assert not choose_share([record("a.jpg", [0])], 1, 0.5, 0).any()
