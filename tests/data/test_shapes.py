"""The drawn data set is a function of its seed, and its annotations are the visible parts of its objects."""

import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.shapes import CLASSES, draw_image
from gndet.data.records import Dataset
from gndet.errors import DataError


def shapes(seed: int = 0, count: int = 40, size: int = 96) -> Dataset:
    return read_dataset(DatasetConfig(kind="shapes", seed=seed, count=count, size=size), DataConfig())


def test_an_image_depends_on_seed_and_index_alone() -> None:
    few, many = shapes(count=3), shapes(count=8)
    assert np.array_equal(few.records[2].boxes, many.records[2].boxes)
    assert np.array_equal(few.records[2].load(), pickle.loads(pickle.dumps(many.records[2])).load())
    assert not np.array_equal(draw_image(0, 2, 96), draw_image(0, 3, 96))
    assert not np.array_equal(draw_image(0, 2, 96), draw_image(1, 2, 96))


def test_seeds_share_no_image_id() -> None:
    first, second = ({record.image_id for record in shapes(seed).records} for seed in (0, 1))
    assert len(first) == len(second) == 40 and not first & second


def test_masks_are_disjoint_and_fill_their_boxes() -> None:
    for record in shapes().records:
        masks = coco_mask.decode(record.segmentations)  # (h, w, n)
        assert masks.sum(2).max() == 1
        for k, (x0, y0, x1, y1) in enumerate(record.boxes):
            rows, columns = np.nonzero(masks[..., k])
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
            assert masks[..., k].sum() == record.area[k]


def test_an_object_has_one_color_within_its_mask_and_another_outside() -> None:
    for record in shapes(count=10, size=160).records:
        image, masks = record.load().astype(float), coco_mask.decode(record.segmentations).astype(bool)
        background = image[~masks.any(2)].std(0).mean()
        for k in range(len(record.labels)):
            inside = image[masks[..., k]]
            assert inside.std(0).max() < 14  # the noise alone, of sigma 12 at most
            assert np.abs(inside.mean(0) - image[~masks.any(2)].mean(0)).max() > 20
        assert background > 1


def test_counts_and_classes_are_as_promised() -> None:
    dataset = shapes(count=100)
    numbers = [len(record.labels) for record in dataset.records]
    assert min(numbers) == 2 and max(numbers) == 5
    assert set(np.concatenate([record.labels for record in dataset.records])) == set(range(len(CLASSES)))
    ids = np.concatenate([record.annotation_ids for record in dataset.records])
    assert ids.min() == 1 and len(set(ids)) == len(ids) == sum(numbers)


def test_no_object_is_a_fragment() -> None:
    smallest = min(record.area.min() for record in shapes(count=100, size=160).records)
    assert smallest > 0.5 * 250  # a star of the least radius, 16 pixels, drawn whole has about 290 pixels


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match=f"seed {2**33}"):
        shapes(seed=2**33)


def test_classes_are_chosen_and_ordered_by_name() -> None:
    whole = shapes()
    data = DataConfig(classes=("star", "disc"))
    chosen = read_dataset(DatasetConfig(kind="shapes", count=40, size=96), data)
    assert chosen.classes == ("star", "disc") and chosen.category_ids == (4, 1)
    for old, new in zip(whole.records, chosen.records, strict=True):
        kept = [k for k, label in enumerate(old.labels) if CLASSES[label] in data.classes]
        assert [CLASSES[old.labels[k]] for k in kept] == [chosen.classes[label] for label in new.labels]
        assert np.array_equal(old.boxes[kept], new.boxes)
        assert [old.segmentations[k] for k in kept] == new.segmentations


@pytest.mark.parametrize("classes", [("disc", "blob"), ("disc", "disc"), ()])
def test_wrong_class_names_are_refused_with_the_known_ones(classes: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"data\.classes.*disc, box, triangle, star"):
        read_dataset(DatasetConfig(kind="shapes", count=1), DataConfig(classes=classes))
