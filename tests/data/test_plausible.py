"""Numbers of a whole file that decide something are plausible, or named with their share of the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gndet.config.data import DataConfig
from gndet.config.loading import load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import describe_finding
from gndet.data.datasets.plausible import limit_notes
from gndet.data.records import Dataset
from gndet.toolbox.check.check import check
from gndet.training.task import read_both

WIDTH, HEIGHT = 96, 72
BOXES = [[32, 7, 18, 16], [60, 41, 29, 28], [12, 31, 26, 20], [55, 38, 14, 26], [34, 14, 14, 28], [40, 1, 32, 17]]
PLAIN = DataConfig(cache="")


def write(path: Path, boxes: list[Any], masks: bool = False, **more: Any) -> Path:
    """Write a file with these values of bbox, and as masks the first of BOXES."""
    items = []
    for i, box in enumerate(boxes):
        x, y, w, h = BOXES[i % len(BOXES)]
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]] if masks else []
        items.append({"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": outline, "iscrowd": 0})
    images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    tree = {"images": images, "annotations": items, "categories": [{"id": 1, "name": "cup"}]}
    path.write_text(json.dumps(tree | more))
    return path


def read(folder: Path, boxes: list[Any], masks: bool = False) -> Dataset:
    return inspect_file(write(folder / "file.json", boxes, masks), None, PLAIN)


def refused(dataset: Dataset) -> list[str]:
    return [describe_finding(one)[0] for one in dataset.findings if one.severity == "E"]


def shares(dataset: Dataset) -> dict[str, str]:
    return {one.code: f"{one.count} of {one.of}" for one in dataset.findings}


def normalized(box: list[float]) -> list[float]:
    return [round(value / side, 4) for value, side in zip(box, (WIDTH, HEIGHT) * 2, strict=True)]


def corners(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def centered(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x + width / 2, y + height / 2, width, height]


# --- boxes of other formats


@pytest.mark.parametrize("form", [list, corners, centered])
@pytest.mark.parametrize("masks", [True, False])
def test_boxes_from_0_to_1_are_refused(tmp_path: Path, form: Any, masks: bool) -> None:
    dataset = read(tmp_path, [normalized(form(box)) for box in BOXES], masks)
    assert refused(dataset) == ["boxes-normalized (6 of 6): boxes whose numbers all lie in 0 to 1"]
    (finding,) = (one for one in dataset.findings if one.code == "boxes-normalized")
    assert "multiply x and width by the image's width" in finding.remedy
    assert f"annotation 1: bbox {normalized(form(BOXES[0]))} in an image of width 96" in finding.examples[0]


def test_boxes_that_are_whole_images_from_0_to_1_are_refused(tmp_path: Path) -> None:
    assert refused(read(tmp_path, [[0, 0, 1, 1]] * 3))[0].startswith("boxes-normalized (3 of 3)")


@pytest.mark.parametrize("places", [[0], [5], [1, 4]])
def test_some_boxes_from_0_to_1_are_noted_with_their_share(tmp_path: Path, places: list[int]) -> None:
    dataset = read(tmp_path, [normalized(box) if i in places else box for i, box in enumerate(BOXES)])
    assert not dataset.refused and shares(dataset)["box-tiny"] == f"{len(places)} of 6"


def test_small_boxes_anywhere_else_are_not_taken_for_parts_of_an_image(tmp_path: Path) -> None:
    assert not read(tmp_path, [[10 + i, 20, 0.5, 0.7] for i in range(6)]).refused


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_as_corners_are_refused_with_their_share(tmp_path: Path, masks: bool) -> None:
    dataset = read(tmp_path, [corners(box) for box in BOXES], masks)
    share = "6 of 6" if masks else "4 of 6"  # without masks, two of them are possible boxes of both kinds
    assert refused(dataset) == [
        f"boxes-xyxy ({share}): boxes that fit as [x0, y0, x1, y1], not as [x, y, width, height]"
    ]
    assert shares(dataset)["box-overhang"] == "4 of 6"
    if masks:
        assert shares(dataset)["mask-elsewhere"] == "4 of 6"


@pytest.mark.parametrize(("places", "outcome"), [([0, 1, 2], True), ([1], False), ([1, 2], False)])
def test_from_half_on_corners_are_refused(tmp_path: Path, places: list[int], outcome: bool) -> None:
    dataset = read(tmp_path, [corners(box) if i in places else box for i, box in enumerate(BOXES)], masks=True)
    assert dataset.refused == outcome and shares(dataset)["box-overhang"]


def test_centered_boxes_are_noted_with_their_share(tmp_path: Path) -> None:
    assert shares(read(tmp_path, [centered(box) for box in BOXES], masks=True))["mask-elsewhere"] == "6 of 6"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("masks", [True, False])
def test_drawn_sets_are_read_as_they_are_and_refused_as_corners(tmp_path: Path, seed: int, masks: bool) -> None:
    rng = np.random.default_rng(seed)
    reach = (0.1, 0.4, 0.99)[seed % 3]  # small, medium and very large boxes
    sides = rng.uniform(2, 2 + reach * np.array([WIDTH - 2, HEIGHT - 2]), (60, 2))
    boxes = np.hstack((rng.uniform(0, [WIDTH, HEIGHT] - sides), sides)).round(2)
    if seed >= 6:  # near the corner at the top left, of which the numbers are small
        boxes[:, :2] *= 0.2
    drawn = boxes.tolist()
    path = tmp_path / "file.json"
    for form in (list, corners):
        write(path, [form(box) for box in drawn])
        tree = json.loads(path.read_text())
        for item, (x, y, w, h) in zip(tree["annotations"], drawn if masks else [], strict=masks):
            item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        path.write_text(json.dumps(tree))
        dataset = inspect_file(path, None, PLAIN)
        if form is list:
            assert not dataset.refused and "boxes-xyxy" not in shares(dataset)
        elif masks or seed < 6:
            assert [text.partition(" ")[0] for text in refused(dataset)] == ["boxes-xyxy"]


@pytest.mark.parametrize("overhang", [1, 3])
def test_boxes_that_overhang_a_little_are_no_corners(tmp_path: Path, overhang: int) -> None:
    """Amodal boxes leave the image; one that starts right of its width cannot be corners."""
    boxes = [[70, 40, 26 + overhang, 32], [80, 50, 10, 22 + overhang], [60, 60, 36 + overhang, 12 + overhang]]
    assert not read(tmp_path, boxes).refused


@pytest.mark.parametrize("name", ["coco-tiny", "nuclei", "bccd"])
def test_real_boxes_are_refused_as_corners_and_from_0_to_1_only(data_root: Path, tmp_path: Path, name: str) -> None:
    path = next((data_root / name / "annotations").glob("*val*.json"))
    assert not inspect_file(path, None, PLAIN).refused
    for code in ("boxes-xyxy", "boxes-normalized"):
        for bare in (True, False):
            tree = json.loads(path.read_text())
            sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
            for item in tree["annotations"]:
                x, y, w, h = item["bbox"]
                width, height = sizes[item["image_id"]]
                parts = [x / width, y / height, w / width, h / height]
                item["bbox"] = [x, y, x + w, y + h] if code == "boxes-xyxy" else parts
                item["segmentation"] = [] if bare else item.get("segmentation")
            (tmp_path / "file.json").write_text(json.dumps(tree))
            dataset = inspect_file(tmp_path / "file.json", None, PLAIN)
            assert [text.partition(" ")[0] for text in refused(dataset)] == [code]


def test_shares_survive_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "file.json", [[-3, 2, 20, 20], *BOXES])
    first, again = (inspect_file(path, None, DataConfig(cache=str(tmp_path / "cache"))) for _ in range(2))
    assert first.findings == again.findings and shares(again)["box-clipped"] == "1 of 7"
    assert list(tmp_path.glob("cache/*/facts.json"))


# --- limits of a config


def limits(train: Dataset, val: Dataset, *overrides: str) -> list[str]:
    return limit_notes(train, val, with_overrides(Config(), overrides, "the defaults"))


def test_more_objects_than_the_limits_are_said_once(tmp_path: Path) -> None:
    few, many = read(tmp_path, BOXES), read(tmp_path, BOXES * 20)
    assert not limits(few, few)
    assert limits(few, few, "model.box_head.detections_per_image=6", "evaluation.max_detections=6") == []
    assert limits(few, few, "model.box_head.detections_per_image=5") == [
        f"{which}: 1 of 1 images have more objects than model.box_head.detections_per_image=5, at most 6: "
        "a detector cannot find them all"
        for which in ("train", "val")
    ]
    notes = limits(few, many, "model.box_head.detections_per_image=200")
    assert notes == [
        "val: 1 of 1 images have more objects of a class than evaluation.max_detections=100, at most 120: "
        "the metric does not count all that are found"
    ]


def test_objects_of_several_classes_share_the_limit_of_an_image_only(tmp_path: Path) -> None:
    path = write(tmp_path / "file.json", BOXES)
    tree = json.loads(path.read_text())
    tree["categories"].append({"id": 2, "name": "plate"})
    for item in tree["annotations"][:3]:
        item["category_id"] = 2
    path.write_text(json.dumps(tree))
    dataset = inspect_file(path, None, PLAIN)
    assert not limits(dataset, dataset, "evaluation.max_detections=3")
    assert len(limits(dataset, dataset, "evaluation.max_detections=2")) == 1


def test_a_val_set_without_objects_and_many_classes_are_said(tmp_path: Path) -> None:
    classes = [{"id": i, "name": f"class {i}"} for i in range(1, 1204)]
    train = inspect_file(write(tmp_path / "train.json", BOXES, categories=classes), None, PLAIN)
    val = inspect_file(write(tmp_path / "val.json", [], categories=classes), None, PLAIN)
    assert limits(train, val) == [
        "val: no image has an object, so that there is no AP",
        "train: 1,203 classes: scores are low where so many compete; for LVIS, model.box_head.score_threshold=0.0001 "
        "and detections_per_image=300 are usual",
    ]


def test_training_and_check_say_the_limits(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    (tmp_path / "cfg.yaml").write_text(
        f"data: {{root: {tmp_path}, cache: '', train: {{annotations: a.json, images: images}}, "
        "val: {annotations: b.json, images: images}}\nmodel: {masks: false, box_head: {detections_per_image: 4}}\n"
    )
    for name in ("a.json", "b.json"):
        write(tmp_path / name, BOXES)
    lines: list[str] = []
    check(str(tmp_path / "cfg.yaml"), [], lines.append)
    expected = "val: 1 of 1 images have more objects than model.box_head.detections_per_image=4, at most 6"
    assert sum(expected in line for line in lines) == 1
    notes = read_both(load_config(str(tmp_path / "cfg.yaml"), []))[2]
    assert sum(expected in note for note in notes) == 1
