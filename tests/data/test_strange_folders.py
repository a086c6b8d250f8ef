"""Folders as strangers bring them: without pictures, with a folder around them, with other data beside them."""

import json
from pathlib import Path

import pytest
from exported import codes, write
from test_data_folders import COCO, CVAT, DATA_YAML, LABELME, LAYOUTS, VOC, YOLO, data_of

from gndet.config.data import DatasetConfig
from gndet.data.datasets.comparing import between
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.layout import find_sets
from gndet.data.datasets.reading import inspect_both, inspect_dataset
from gndet.data.records import Dataset
from gndet.toolbox.check.check import check

BOX = [8.0, 6.0, 24.0, 18.0]


def read(root: Path, split: str = "train", **named: str) -> Dataset:
    return inspect_dataset(DatasetConfig(split=split, **named), data_of(root))


def words(dataset: Dataset) -> str:
    return "\n".join(text for found in dataset.findings for text in (*found.examples, found.remedy))


def test_pictures_of_another_data_set_beside_the_export_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, {"mine/result.json": COCO, "other/a.png": None, "images/b.png": None})
    assert guess_folder(tmp_path / "mine" / "result.json") is None
    write(tmp_path, {"mine/annotations/file.json": COCO, "mine/pics/a.png": None})
    assert guess_folder(tmp_path / "mine" / "annotations" / "file.json") == tmp_path / "mine" / "pics"


@pytest.mark.parametrize("layout", ["Roboflow, COCO", "Roboflow, YOLO", "VOC", "CVAT for images", "LabelMe", "VIA"])
def test_the_only_folder_that_holds_data_is_read(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "export", LAYOUTS[layout][2])
    write(tmp_path, {"__MACOSX/export/._data.yaml": b"\0\5", "docs/index.html": "<html>", "unlabeled/b.png": None})
    (record,) = read(tmp_path).records
    assert record.boxes.tolist() == [BOX]


def test_folders_of_labelmes_files_make_one_set(tmp_path: Path) -> None:
    write(
        tmp_path, {f"day{day}/{name}": text for day in "123" for name, text in (("a.json", LABELME), ("a.png", None))}
    )
    assert {record.file_name for record in read(tmp_path).records} == {f"day{day}/a.png" for day in "123"}


def test_labelmes_files_in_a_folder_labels_are_not_taken_for_yolos(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.png": None, "labels/a.json": LABELME})
    assert find_sets(tmp_path)[""].kind == "labelme" and read(tmp_path).records[0].boxes.tolist() == [BOX]


def test_several_data_sets_in_a_folder_are_named(tmp_path: Path) -> None:
    for task in ("task_1", "task_2"):
        write(tmp_path / task, {"annotations.xml": CVAT, "images/a.png": None})
    assert "task_1 (cvat) and task_2 (cvat); give one of them" in words(read(tmp_path))


@pytest.mark.parametrize("name", ["train/_annotations.createml.json", "a/b/x.json"])
def test_a_format_that_is_not_read_is_named_in_folders_below(tmp_path: Path, name: str) -> None:
    content = json.dumps([{"image": "a.png", "annotations": [{"label": "cup", "coordinates": {"x": 1, "y": 2}}]}])
    write(tmp_path, {name: content, "train/a.png": None, "valid/a.png": None})
    with pytest.raises(Fault, match="CreateML's JSON; export"):
        find_sets(tmp_path)


def test_rows_in_a_folder_of_annotations_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.png": None, "annotations/a.txt": YOLO, "annotations/classes.txt": "cup\n"})
    dataset = read(tmp_path)
    assert dataset.classes == ("cup",) and dataset.records[0].boxes.tolist() == [BOX] and not codes(dataset)


def test_pictures_in_a_folder_of_their_own_find_their_labels(tmp_path: Path) -> None:
    write(tmp_path, {"pics/a.png": None, "pics/b.png": None, "labels/a.txt": YOLO, "classes.txt": "cup\n"})
    for named in ({}, {"images": "pics"}):
        assert {record.file_name: record.boxes.tolist() for record in read(tmp_path, **named).records} == {
            "a.png": [BOX], "b.png": [],
        }  # fmt: skip


@pytest.mark.parametrize("files", [
    {"pics/a.png": None, "one/a.txt": YOLO, "two/a.txt": YOLO}, {"x/a.png": None, "y/a.png": None, "one/a.txt": YOLO},
])  # fmt: skip
def test_labels_of_one_name_are_not_guessed(tmp_path: Path, files: dict[str, str | None]) -> None:
    write(tmp_path, files | {"data.yaml": "train: [pics, x, y]\nnames: [cup]\n"})
    for folder in ("pics", "x", "y"):
        (tmp_path / folder).mkdir(exist_ok=True)
    assert codes(read(tmp_path)) == {"file-unclear": 1}


def test_labels_of_another_set_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, {"images/train/a.png": None, "images/val/a.png": None, "labels/train/a.txt": YOLO})
    assert codes(read(tmp_path, "val")) == {"labels-missing": 1} and not codes(read(tmp_path)).get("labels-missing")


def test_lists_of_pictures_that_lie_elsewhere_divide_the_folder_that_is_named(tmp_path: Path) -> None:
    """As CVAT exports a project without its pictures."""
    for part, name in (("train", "a"), ("valid", "b")):
        write(tmp_path, {f"{part}.txt": f"data/obj_{part}_data/{name}.png\n", f"obj_{part}_data/{name}.txt": YOLO})
    write(tmp_path, {"obj.data": "train = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"})
    write(tmp_path, {"obj.names": "cup\n", "pics/a.png": None, "pics/b.png": None})
    assert codes(read(tmp_path)) == {"folder-missing": 1}
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (record,) = read(tmp_path, split, images="pics").records
        assert record.file_name == name and record.boxes.tolist() == [BOX]


def test_labels_without_pictures_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"labels/a.txt": YOLO, "classes.txt": "cup\n"})
    assert "no pictures there, but 2 text files, like 'labels/a.txt'" in words(read(tmp_path))


@pytest.mark.parametrize("lists", [True, False])
def test_folders_with_a_year_are_sets(tmp_path: Path, lists: bool) -> None:
    for part in ("train2017", "val2017"):
        write(tmp_path, {f"images/{part}/{part[0]}.png": None, f"labels/{part}/{part[0]}.txt": YOLO})
        write(tmp_path, {f"{part}.txt": f"./images/{part}/{part[0]}.png\n"} if lists else {})
    assert list(find_sets(tmp_path)) == ["train", "val"]
    for split, name in (("train", "t.png"), ("val", "v.png")):
        assert [record.file_name for record in read(tmp_path, split).records] == [name]


def test_an_export_of_a_training_set_alone_names_the_share(tmp_path: Path) -> None:
    """As Roboflow exports it: its data.yaml names all three sets."""
    write(tmp_path, {"data.yaml": DATA_YAML, "train/images/a.png": None, "train/labels/a.txt": YOLO})
    assert not read(tmp_path).refused
    assert codes(read(tmp_path, "val")) == {"set-missing": 1} and "data.val.share=0.2" in words(read(tmp_path, "val"))


def test_pictures_of_vocs_xml_are_found_in_a_folder_of_any_name(tmp_path: Path) -> None:
    write(tmp_path, {"labels_xml/a.xml": VOC, "photos/a.png": None})
    assert [record.boxes.tolist() for record in read(tmp_path).records] == [[BOX]]


def test_a_turned_box_in_vocs_xml_becomes_the_box_around_it(tmp_path: Path) -> None:
    turned = VOC.replace("</object>", "<attributes><attribute><name>rotation</name><value>90.0</value></attribute>"
                         "</attributes></object>")  # fmt: skip
    write(tmp_path, {"Annotations/a.xml": turned, "JPEGImages/a.png": None})
    dataset = read(tmp_path)
    assert codes(dataset) == {"box-rotated": 1}
    assert dataset.records[0].boxes.round(6).tolist() == [[10, 4, 22, 20]]  # 16 x 12 around 16, 12


def test_pictures_are_found_where_labelmes_files_say(tmp_path: Path) -> None:
    for name, path in (("one", "../photos/a.png"), ("two", "..\\\\photos\\\\a.png")):
        write(tmp_path / name, {"marked/a.json": LABELME.replace("a.png", path), "photos/a.png": None})
        assert [record.boxes.tolist() for record in read(tmp_path / name).records] == [[BOX]]


def test_check_of_a_folder_refuses_a_class_that_only_val_has(tmp_path: Path) -> None:
    write(tmp_path, {"train/a.json": LABELME, "train/a.png": None, "val/b.png": None})
    write(tmp_path, {"val/b.json": LABELME.replace("a.png", "b.png").replace("cup", "fork")})
    lines: list[str] = []
    assert not check(str(tmp_path), ["data.cache="], lines.append)
    assert "only val has 'fork'" in "\n".join(lines)


def test_a_missing_picture_is_not_compared_with_annotation_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": LABELME.replace("a.png", "a.jpg"), "a.jpg.txt": "x"})
    assert codes(read(tmp_path)) == {"file-missing": 1} and "nearest" not in words(read(tmp_path))


def test_a_missing_key_is_called_missing_and_a_repeated_category_row_is_left_out(tmp_path: Path) -> None:
    content = json.loads(COCO)
    content["images"].append({"id": 2, "filename": "b.png", "width": 64, "height": 48})
    content["categories"] *= 2
    write(tmp_path, {"file.json": json.dumps(content), "a.png": None})
    dataset = read(tmp_path)
    assert codes(dataset) == {"file-name": 1, "category-left-out": 1, "area-missing": 1}
    assert "image 2: file_name is missing; it has id, filename, width, height" in words(dataset)


OTHERS = {  # what is named, in which files
    "Label Studio's CSV": {"a.csv": "image,id,label,annotator,annotation_id\n/data/a.png,1,cup,1,1\n"},
    "a CSV table of boxes": {"a.csv": "cup,10,20,20,30,a.png,96,72\nfork,1,2,20,30,a.png,96,72\n"},
    "VisDrone": {"annotations/a.txt": "684,8,273,116,0,0,0,0\n406,119,265,70,0,0,0,0\n", "images/a.png": None},
    "DOTA's labels": {"labelTxt/a.txt": "imagesource:GoogleEarth\ngsd:0.1\n1 1 9 1 9 9 1 9 plane 0\n"},
    "OpenImages' CSV": {"b.csv": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n", "images/a.png": None},
    "Hugging Face's metadata.jsonl": {"train/metadata.jsonl": '{"file_name": "a.png", "objects": {"bbox": []}}\n'},
    "BDD100K's JSON": {
        "labels/det/a.json": '[{"name": "a.png", "labels": [{"box2d": {"x1": 1}}]}]',
        "images/a.png": None,
    },
    "an archive; unpack it": {"export.zip": b"PK\x03\x04\0\0"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_export_in_another_format_is_named(tmp_path: Path, name: str) -> None:
    dataset = read(write(tmp_path, OTHERS[name]))
    assert codes(dataset) == {"data-unknown": 1} and name in words(dataset)


def test_kittis_rows_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "a.txt": "Car 0.00 0 -1.57 10.0 20.0 30.0 50.0 1.5 1.6 3.7 1.0 1.5 8.0 -1.5\n"})
    assert "as KITTI writes its labels" in words(read(tmp_path))


def test_a_val_set_in_coco_json_may_lack_a_class_of_train_anywhere_in_the_order(tmp_path: Path) -> None:
    train, val = json.loads(COCO), json.loads(COCO)
    train["categories"] = [{"id": number, "name": name} for number, name in ((3, "bowl"), (5, "cup"), (8, "fork"))]
    train["annotations"][0]["category_id"] = 5
    write(tmp_path, {"train.json": json.dumps(train), "val.json": json.dumps(val), "images/a.png": None})
    first, second = inspect_both(data_of(tmp_path), masks=False)
    assert first.classes == second.classes == ("bowl", "cup", "fork")
    assert second.category_ids == (2, 1, 3) and second.records[0].labels.tolist() == [1]  # 1 as in the file
    assert not second.refused and "classes-differ" not in [found.code for found in between(first, second)]


def test_a_val_set_with_a_class_that_train_lacks_stays_refused(tmp_path: Path) -> None:
    val = json.loads(COCO)
    val["categories"].append({"id": 2, "name": "fork"})
    write(tmp_path, {"train.json": COCO, "val.json": json.dumps(val), "images/a.png": None})
    assert "classes-differ" in [found.code for found in between(*inspect_both(data_of(tmp_path), masks=False))]


def test_xml_in_another_encoding_than_it_declares_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "a.xml": VOC.replace("cup", "pl\xe4te").encode("latin-1")})
    assert codes(read(tmp_path)) == {"text-encoding": 1}


def test_images_and_labels_may_be_written_in_any_case(tmp_path: Path) -> None:
    write(tmp_path, {"Images/a.png": None, "Labels/a.txt": YOLO, "classes.txt": "cup\n"})
    assert [record.boxes.tolist() for record in read(tmp_path).records] == [[BOX]]


EMBEDDED = LABELME.replace("a.png", "b.png").replace("null", '"iVBORw0KGgo="', 1)
HALF = {  # exports that are refused because of a picture that is left out, beside one that is right
    "picture-unreadable": {
        "images/a.png": None, "images/b.png": "<!DOCTYPE html>", "labels/a.txt": YOLO, "labels/b.txt": YOLO},
    "picture-embedded": {"a.png": None, "a.json": LABELME, "b.json": EMBEDDED},
}  # fmt: skip


@pytest.mark.parametrize("code", HALF)
def test_decoding_the_pictures_forgets_no_picture_that_the_reader_left_out(tmp_path: Path, code: str) -> None:
    write(tmp_path / "set", HALF[code])
    for _ in range(2):  # the second time from the cache
        lines: list[str] = []
        assert not check(str(tmp_path / "set"), [f"data.cache={tmp_path}/cache"], lines.append, images=True)
        assert f"refused: {code}" in lines[-1] and sum(f"E {code} (1)" in line for line in lines) == 1


def test_labelmes_files_and_a_coco_file_of_them_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": LABELME, "a.png": None, "annotations.json": COCO})
    assert codes(read(tmp_path)) == {"set-twice": 1}
    for kind in ("labelme", "coco"):
        assert [record.boxes.tolist() for record in read(tmp_path, kind=kind).records] == [[BOX]]


@pytest.mark.parametrize("layout", ["Roboflow, VOC", "Roboflow, YOLO", "LabelMe, sets"])
def test_a_folder_that_is_named_for_val_is_val_whatever_its_name(tmp_path: Path, layout: str) -> None:
    write(tmp_path, LAYOUTS[layout][2])
    part = "valid" if (tmp_path / "valid").is_dir() else "val"
    (tmp_path / part).rename(tmp_path / "fold 3")
    dataset = read(tmp_path, "val", annotations="fold 3")
    assert [record.boxes.tolist() for record in dataset.records] == [[BOX]] and not dataset.refused


def test_the_root_may_be_a_file(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["Ultralytics"][2] | LAYOUTS["Label Studio, COCO"][2])
    for name in ("data.yaml", "result.json"):
        assert [record.boxes.tolist() for record in read(tmp_path / name).records] == [[BOX]]
    assert not read(tmp_path / "data.yaml", "val").refused
    assert codes(read(tmp_path / "result.json", "val")) == {"set-missing": 1}
