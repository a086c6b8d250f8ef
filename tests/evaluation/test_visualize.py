"""Pictures: what is drawn where, and that nothing is drawn outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset
from gndet.evaluation import drawing as visualize

GRAY = np.full((700, 900, 3), 120, dtype=np.uint8)
BOX = np.array([[100.0, 200.0, 300.0, 400.0]])


def coded(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask))


def changed(picture: np.ndarray, image: np.ndarray = GRAY) -> np.ndarray:
    return (picture != image).any(-1)


def test_a_box_is_outlined_at_its_place_in_its_class_color() -> None:
    picture = visualize.draw_objects(GRAY, BOX, ["cat"], [3])
    assert picture.shape == GRAY.shape and picture.dtype == np.uint8
    assert (picture[400, 100:301] == visualize.color(3)).all()
    assert (picture[200:401, 300] == visualize.color(3)).all()
    assert not changed(picture)[210:390, 110:290].any()  # the inside stays as it was
    ys, xs = np.nonzero(changed(picture))
    assert xs.min() == 100 and xs.max() == 300 and ys.max() == 400
    assert 170 < ys.min() < 190  # the label stands above


def test_labels_stay_inside_the_picture() -> None:
    boxes = np.array([[0, 0, 30, 30], [880, 0, 900, 10], [890, 690, 900, 700], [-5, 680, 20, 720]], float)
    plain = visualize.draw_objects(GRAY, boxes, [""] * 4, [0, 1, 2, 4])
    labeled = visualize.draw_objects(GRAY, boxes, ["a long name"] * 4, [0, 1, 2, 4])
    corners = (labeled != plain).any(-1)
    for ys in (slice(0, 60), slice(640, 700)):
        for xs in (slice(0, 200), slice(700, 900)):
            assert corners[ys, xs].sum() > 500  # the whole background of the label is there, not a part of it


def test_labels_are_left_out_if_they_would_cover_the_picture() -> None:
    for count, labeled in ((visualize.MAX_LABELS, True), (visualize.MAX_LABELS + 1, False)):
        boxes = np.repeat(BOX, count, axis=0)
        picture = visualize.draw_objects(GRAY, boxes, ["cat"] * count, [0] * count)
        assert changed(picture)[:199].any() == labeled
        assert changed(picture)[400].any()


def test_a_mask_tints_its_pixels_and_no_others() -> None:
    mask = np.zeros(GRAY.shape[:2], dtype=bool)
    mask[220:380, 120:280] = True
    picture = visualize.draw_objects(GRAY, BOX, ["cat"], [0], [coded(mask)])
    wanted = GRAY[0, 0] + visualize.MASK_OPACITY * (np.array(visualize.color(0)) - GRAY[0, 0])
    assert (np.abs(picture[225:375, 125:275] - wanted) <= 1).all()
    assert (picture[220, 120:280] == visualize.color(0)).all()  # outline
    assert not changed(picture)[205:220, 105:295].any() and not changed(picture)[380:395, 105:295].any()


def test_a_small_picture_is_enlarged_with_its_objects() -> None:
    image = np.zeros((64, 32, 3), dtype=np.uint8)
    mask = np.zeros((64, 32), dtype=bool)
    mask[32:48, 16:24] = True
    picture = visualize.draw_objects(image, np.array([[16.0, 32, 24, 48]]), [""], [1], [coded(mask)])
    assert picture.shape == (visualize.MIN_SIDE, visualize.MIN_SIDE // 2, 3)
    factor = visualize.MIN_SIDE // 64
    assert changed(picture, np.zeros_like(picture))[32 * factor : 48 * factor, 16 * factor : 24 * factor].all()
    assert not picture[49 * factor :].any() and not picture[:, : 15 * factor].any()


def test_colors_of_neighboring_classes_differ() -> None:
    colors = np.array([visualize.color(index) for index in range(20)], dtype=float)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(20)
    assert distance.min() > 40


def test_detections_under_the_threshold_are_not_drawn() -> None:
    results = [
        {"image_id": 1, "category_id": 7, "bbox": [100.0, 200.0, 200.0, 200.0], "score": 0.9},
        {"image_id": 1, "category_id": 3, "bbox": [500.0, 200.0, 200.0, 200.0], "score": 0.3},
    ]
    picture = visualize.draw_detections(GRAY, results, ["dog", "cat"], [3, 7], 0.5)
    assert (picture[400, 100:301] == visualize.color(1)).all()
    assert not changed(picture)[:, 450:].any()
    assert changed(visualize.draw_detections(GRAY, results, ["dog", "cat"], [3, 7], 0.3))[:, 450:].any()
    assert not changed(visualize.draw_detections(GRAY, [], ["dog", "cat"], [3, 7], 0.3)).any()


def test_ground_truth_masks_lie_on_the_drawn_objects() -> None:
    dataset = read_dataset(DatasetConfig(kind="shapes", count=3, size=640), DataConfig())
    for record in dataset.records:
        image = record.load()
        difference = changed(visualize.draw_ground_truth(image, record, dataset.classes), image)
        for x0, y0, x1, y1 in record.boxes.round().astype(int):
            assert difference[y0:y1, x0:x1].mean() > 0.2


@pytest.mark.parametrize("folder", ["coco-tiny", "nuclei", "bccd"])
def test_real_ground_truth_draws(data_root: Path, folder: str) -> None:
    name = "instances_val2017" if folder == "coco-tiny" else "instances_val"
    images = "val2017" if folder == "coco-tiny" else "val"
    dataset = read_dataset(
        DatasetConfig(annotations=f"{folder}/annotations/{name}.json", images=f"{folder}/{images}"),
        DataConfig(root=str(data_root)),
    )
    record = max(dataset.records[:40], key=lambda record: record.crowd.any() * 1000 + len(record.labels))
    picture = visualize.draw_ground_truth(record.load(), record, dataset.classes)
    assert max(picture.shape) >= visualize.MIN_SIDE


def test_pictures_are_put_in_rows_and_captions_above(tmp_path: Path) -> None:
    pictures = [np.full((50, 40, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    sheet = visualize.grid(pictures, columns=2)
    assert sheet.shape == (2 * 50 + 3 * visualize.GAP, 2 * 40 + 3 * visualize.GAP, 3)
    assert [(sheet == value).all(-1).sum() for value in (10, 20, 30)] == [2000] * 3
    pair = visualize.side_by_side(GRAY, GRAY, ("ground truth", "detections"))
    assert (pair == 120).all(-1).sum() >= 2 * 700 * 900
    assert (pair[:30].sum(-1) < 100).any()  # the captions
    visualize.save_picture(tmp_path / "pair.png", pair)
    assert (np.asarray(Image.open(tmp_path / "pair.png")) == pair).all()
