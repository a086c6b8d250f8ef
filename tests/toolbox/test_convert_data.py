"""gndet convert-data: the copy reads as the original does, and nothing else is touched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exported import codes, write
from labeled import first_pictures
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import Dataset
from gndet.errors import DataError, OutputError
from gndet.toolbox.convert_data import convert_data

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 16, 12], "iscrowd": 0}


def read(root: Path, split: str = "train") -> Dataset:
    return read_dataset(DatasetConfig(split=split), DataConfig(root=str(root), cache=""))


def tree(*annotations: dict[str, Any], names: tuple[str, ...] = ("a.png",)) -> str:
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names, start=1)]
    categories = [{"id": 7, "name": "cup"}, {"id": 1, "name": "ünder"}]
    return json.dumps({"images": images, "annotations": list(annotations), "categories": categories})


def small(folder: Path, *annotations: dict[str, Any], names: tuple[str, ...] = ("a.png",)) -> Path:
    return write(folder, {"result.json": tree(*annotations, names=names)} | {f"images/{name}": None for name in names})


def assert_same(copy: Dataset, truth: Dataset, tolerance: float) -> None:
    """Compare the pictures, classes, boxes and masks of two data sets, in any order of the pictures."""
    assert copy.classes == truth.classes and len(copy.records) == len(truth.records)
    expected = {record.file_name: record for record in truth.records}
    for record in copy.records:
        other = expected[record.file_name]
        np.testing.assert_array_equal(record.load(), other.load())
        assert record.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(record.boxes, other.boxes, atol=tolerance)
        for mask, same in zip(record.segmentations, other.segmentations, strict=True):
            assert (mask is None) == (same is None)
            if mask is not None:
                pair = [to_rle(mask, record.size)], [to_rle(same, record.size)]
                assert coco_mask.iou(*pair, [0])[0, 0] > 0.98  # a bridge between parts may cover a pixel


@pytest.mark.parametrize("to", ["coco", "yolo"])
@pytest.mark.parametrize("name", ["bccd", "coco"])
def test_a_copy_of_real_data_reads_as_the_original(data_root: Path, tmp_path: Path, name: str, to: str) -> None:
    truth = first_pictures(data_root, tmp_path, name, 8)
    convert_data(str(tmp_path / "truth.json"), tmp_path / "copy", to, [], lambda line: None, truth.images)
    assert_same(read(tmp_path / "copy"), truth.dataset, 0.01)


def test_masks_of_run_length_codes_become_outlines(data_root: Path, tmp_path: Path) -> None:
    truth = first_pictures(data_root, tmp_path, "nuclei", 3)
    convert_data(str(tmp_path / "truth.json"), tmp_path / "copy", "yolo", [], lambda line: None, truth.images)
    copy = read(tmp_path / "copy")
    for record in copy.records:
        other = next(one for one in truth.dataset.records if one.file_name == record.file_name)
        for mask, same in zip(record.segmentations, other.segmentations, strict=True):
            assert coco_mask.iou([to_rle(mask, record.size)], [to_rle(same, record.size)], [0])[0, 0] > 0.95


@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_sets_names_and_ids_stay(tmp_path: Path, to: str) -> None:
    for part in ("train", "valid"):
        write(tmp_path / "data" / part, {"_annotations.coco.json": tree(BOX), "a.png": None})
    said: list[str] = []
    convert_data(str(tmp_path / "data"), tmp_path / "copy", to, [], said.append)
    for part in ("train", "val"):
        copy = read(tmp_path / "copy", part)
        assert copy.classes == ("ünder", "cup") and copy.records[0].boxes.tolist() == [[8, 6, 24, 18]]
    assert [line.partition(":")[0] for line in said] == ["train", "val"] and "1 image of" in said[0]
    if to == "coco":
        content = json.loads((tmp_path / "copy" / "annotations" / "instances_train.json").read_text())
        assert [category["id"] for category in content["categories"]] == [1, 7]


def test_what_is_refused_is_not_copied(tmp_path: Path) -> None:
    source = small(tmp_path / "data", BOX | {"bbox": [900, 6, 16, 12]})
    with pytest.raises(DataError, match="box-outside"):
        convert_data(str(source), tmp_path / "copy", "coco", [], lambda line: None)
    assert not (tmp_path / "copy").exists()


def test_the_copy_holds_what_was_fixed(tmp_path: Path) -> None:
    source = small(tmp_path / "data", BOX | {"bbox": [-4, 6, 16, 12]}, BOX | {"id": 0, "bbox": [5, 5, 0, 9]})
    said: list[str] = []
    convert_data(str(source), tmp_path / "copy", "coco", [], said.append)
    copy = read(tmp_path / "copy")
    assert copy.records[0].boxes.tolist() == [[0, 6, 12, 18]] and codes(copy) == {"category-gaps": 2}
    assert "1 boxes of zero or negative width or height dropped" in said[-1]


def test_crowd_regions_and_mixed_rows_are_told(tmp_path: Path) -> None:
    outline = BOX | {"id": 2, "segmentation": [[8, 6, 24, 6, 24, 18]]}
    source = small(tmp_path / "data", BOX, outline, BOX | {"id": 3, "iscrowd": 1})
    said: list[str] = []
    convert_data(str(source), tmp_path / "copy", "yolo", [], said.append)
    assert "1 crowd region left out" in said[0] and "1 objects have a box only, 1 an outline" in said[1]
    rows = (tmp_path / "copy" / "labels" / "all" / "a.txt").read_text().splitlines()
    assert rows == ["0 0.25 0.25 0.25 0.25", "0 0.125 0.125 0.375 0.125 0.375 0.375"]


def test_outlines_of_four_points_are_not_taken_for_oriented_boxes(tmp_path: Path) -> None:
    square = BOX | {"segmentation": [[8, 6, 24, 6, 24, 18, 8, 18]]}
    convert_data(str(small(tmp_path / "data", square)), tmp_path / "copy", "yolo", [], lambda line: None)
    copy = read(tmp_path / "copy")
    assert copy.records[0].boxes.tolist() == [[8, 6, 24, 18]] and copy.records[0].segmentations[0] is not None


def test_pictures_of_one_stem_keep_their_own_labels(tmp_path: Path) -> None:
    second = BOX | {"id": 2, "image_id": 2, "bbox": [1, 1, 9, 9]}
    source = small(tmp_path / "data", BOX, second, names=("a.png", "a.bmp"))
    convert_data(str(source), tmp_path / "copy", "yolo", [], lambda line: None)
    copy = read(tmp_path / "copy")
    assert {record.file_name: round(record.boxes[0, 0]) for record in copy.records} == {"a.png": 8, "a-2.bmp": 1}


def test_pictures_in_a_folder_images_keep_their_labels(tmp_path: Path) -> None:
    second = BOX | {"id": 2, "image_id": 2, "bbox": [1, 1, 9, 9]}
    source = small(tmp_path / "data", BOX, second, names=("images/a.png", "labels/deep/b.png"))
    convert_data(str(source), tmp_path / "copy", "yolo", [], lambda line: None)
    copy = read(tmp_path / "copy")
    found = {record.file_name: round(record.boxes[0, 0]) for record in copy.records}
    assert found == {"images_/a.png": 8, "labels_/deep/b.png": 1}


def test_numbered_names_fit_and_differ_not_only_in_case(tmp_path: Path) -> None:
    names = ("ü" * 125 + ".png", "ü" * 125 + ".bmp", "A.png", "a.bmp")
    boxes = [BOX | {"id": place, "image_id": place} for place in range(1, 5)]
    convert_data(str(small(tmp_path / "data", *boxes, names=names)), tmp_path / "copy", "yolo", [], lambda line: None)
    copied = {record.file_name for record in read(tmp_path / "copy").records}
    assert copied == {names[0], "ü" * 100 + "-2.bmp", "A.png", "a-2.bmp"}


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, taken: str) -> None:
    source, out = small(tmp_path / "data", BOX), tmp_path / "copy"
    (out / "mine.txt" if taken == "folder" else out).parent.mkdir(exist_ok=True)
    (out / "mine.txt" if taken == "folder" else out).write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        convert_data(str(source), out, "coco", [], lambda line: None)


def test_a_copy_that_a_kill_left_half_moved_is_whole_after_the_same_command(tmp_path: Path) -> None:
    source, out = small(tmp_path / "data", BOX), tmp_path / "copy"
    convert_data(str(source), out, "coco", [], lambda line: None)
    (out / ".gndet-copy").mkdir()
    (out / "all").rename(out / ".gndet-copy" / "all")
    with pytest.raises(OutputError, match="not an empty folder"):
        convert_data(str(source), out, "coco", [], lambda line: None)
    assert {path.name for path in out.iterdir()} == {"annotations", "all"} and len(read(out).records) == 1


def test_sets_of_different_classes_are_refused(tmp_path: Path) -> None:
    other = tree(BOX).replace('"cup"', '"bowl"')
    for part, content in (("train", tree(BOX)), ("valid", other)):
        write(tmp_path / "data" / part, {"_annotations.coco.json": content, "a.png": None})
    with pytest.raises(DataError, match=r"val: has the classes .*bowl.*others .*cup"):
        convert_data(str(tmp_path / "data"), tmp_path / "copy", "yolo", [], lambda line: None)
    assert not (tmp_path / "copy").exists()


def test_pictures_are_not_named_beside_a_config(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"--image-folder .*: only for data without a config; quickstart names"):
        convert_data("quickstart", tmp_path / "out", "coco", [], lambda line: None, tmp_path)


def test_drawn_data_has_no_files_to_copy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no picture files"):
        convert_data("quickstart", tmp_path / "copy", "coco", ["data.train.count=2"], lambda line: None)


@pytest.mark.parametrize("line_break", ["\x85", "\u2028", "\u2029"])
def test_class_names_with_line_breaks_of_unicode_stay_in_data_yaml(tmp_path: Path, line_break: str) -> None:
    names = [f"cup{line_break}", f"ünder{line_break}ground"]
    small(tmp_path / "data", BOX)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = json.loads(tree(BOX)) | {"categories": categories}
    (tmp_path / "data" / "result.json").write_text(json.dumps(content))
    convert_data(str(tmp_path / "data"), tmp_path / "copy", "yolo", [], lambda line: None)
    assert yaml.safe_load((tmp_path / "copy" / "data.yaml").read_bytes())["names"] == dict(enumerate(names))
