"""A folder alone tells its sets: which format, which annotations, which pictures; a share makes val of one set."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import codes, picture, words, write

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.comparing import between
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.formats import HEAD, sniff
from gndet.data.datasets.layout import find_sets, set_of
from gndet.data.datasets.reading import inspect_both, inspect_dataset, read_dataset
from gndet.errors import DataError
from gndet.toolbox.check.check import check

COCO = json.dumps({
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 16, 12], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cup"}],
})  # fmt: skip
NO_OBJECT = json.dumps({"images": [], "annotations": [], "captions": []})
VOC = (
    "<annotation><filename>a.png</filename><size><width>64</width><height>48</height></size><object><name>cup</name>"
    "<bndbox><xmin>9</xmin><ymin>7</ymin><xmax>24</xmax><ymax>18</ymax></bndbox></object></annotation>"
)
CVAT = (
    '<annotations><meta><task><labels><label><name>cup</name></label></labels></task></meta><image id="0" name="a.png" '
    'width="64" height="48"><box label="cup" xtl="8" ytl="6" xbr="24" ybr="18" occluded="0"/></image></annotations>'
)
LABELME = json.dumps({
    "version": "5.4.1", "flags": {}, "imagePath": "a.png", "imageData": None, "imageHeight": 48, "imageWidth": 64,
    "shapes": [{"label": "cup", "points": [[8, 6], [24, 18]], "shape_type": "rectangle", "group_id": None}],
})  # fmt: skip
VIA = json.dumps({
    "a.png123": {"filename": "a.png", "size": 123, "file_attributes": {}, "regions": [{
        "shape_attributes": {"name": "rect", "x": 8, "y": 6, "width": 16, "height": 12},
        "region_attributes": {"class": "cup"},
    }]},
})  # fmt: skip
YOLO = "0 0.25 0.25 0.25 0.25\n"
DATA_YAML = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cup']\n"
BOX = [8.0, 6.0, 24.0, 18.0]

LAYOUTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # format, sets, files (None: a picture)
    "COCO": ("coco", ["train", "val"], {
        "annotations/instances_train2017.json": COCO, "annotations/instances_val2017.json": COCO,
        "annotations/captions_train2017.json": NO_OBJECT, "train2017/a.png": None, "val2017/a.png": None}),
    "Roboflow, COCO": ("coco", ["train", "val", "test"], {
        f"{part}/{name}": content for part in ("train", "valid", "test")
        for name, content in {"_annotations.coco.json": COCO, "a.png": None}.items()} | {"README.roboflow.txt": "x"}),
    "CVAT, COCO": ("coco", [""], {"annotations/instances_default.json": COCO, "images/default/a.png": None}),
    "Label Studio, COCO": ("coco", [""], {"result.json": COCO, "images/a.png": None}),
    "two files": ("coco", ["train", "val"], {"train.json": COCO, "val.json": COCO, "images/a.png": None}),
    "Ultralytics": ("yolo", ["train", "val"], {
        "data.yaml": "path: .\ntrain: images/train\nval: images/val\nnames: {0: cup}\n",
        **{f"images/{part}/a.png": None for part in ("train", "val")},
        **{f"labels/{part}/a.txt": YOLO for part in ("train", "val")}}),
    "Roboflow, YOLO": ("yolo", ["train", "val"], {
        "data.yaml": DATA_YAML, **{f"{part}/images/a.png": None for part in ("train", "valid")},
        **{f"{part}/labels/a.txt": YOLO for part in ("train", "valid")}}),
    "Label Studio, YOLO": ("yolo", [""], {
        "classes.txt": "cup\n", "notes.json": '{"categories": [{"id": 0, "name": "cup"}], "info": {}}',
        "images/a.png": None, "labels/a.txt": YOLO}),
    "CVAT, YOLO 1.1": ("yolo", ["train"], {
        "obj.data": "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "obj.names": "cup\n", "train.txt": "data/obj_train_data/a.png\n", "obj_train_data/a.png": None,
        "obj_train_data/a.txt": YOLO}),
    "VOC": ("voc", ["train", "val"], {
        "Annotations/a.xml": VOC, "JPEGImages/a.png": None, "ImageSets/Main/train.txt": "a\n",
        "ImageSets/Main/val.txt": "a\n"}),
    "Roboflow, VOC": ("voc", ["train", "val"], {
        f"{part}/{name}": content for part in ("train", "valid")
        for name, content in {"a.xml": VOC, "a.png": None}.items()}),
    "Label Studio, VOC": ("voc", [""], {"Annotations/a.xml": VOC, "images/a.png": None}),
    "CVAT for images": ("cvat", [""], {"annotations.xml": CVAT, "images/a.png": None}),
    "LabelMe": ("labelme", [""], {"a.json": LABELME, "a.png": None}),
    "LabelMe, sets": ("labelme", ["train", "val"], {
        f"{part}/{name}": content for part in ("train", "val")
        for name, content in {"a.json": LABELME, "a.png": None}.items()}),
    "VIA": ("via", [""], {"via_region_data.json": VIA, "a.png": None}),
}  # fmt: skip


def data_of(root: Path, **val: Any) -> DataConfig:
    tree = {"root": str(root), "cache": "", "val": val}
    return DataConfig.model_validate(tree)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_alone_is_read(tmp_path: Path, layout: str) -> None:
    kind, sets, files = LAYOUTS[layout]
    found = find_sets(write(tmp_path, files))
    assert list(found) == sets and {source.kind for source in found.values()} == {kind}
    dataset = read_dataset(DatasetConfig(split="train"), data_of(tmp_path))
    (record,) = dataset.records
    assert dataset.classes == ("cup",) and record.boxes.tolist() == [BOX] and record.size == (48, 64)
    assert record.load().shape == (48, 64, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_shows_what_was_taken_for_what(tmp_path: Path, layout: str) -> None:
    kind, sets, files = LAYOUTS[layout]
    lines: list[str] = []
    assert check(str(write(tmp_path, files)), [], lines.append, images=True)
    table = [line.split()[:2] for line in lines[1 : 1 + len(sets)]]
    assert lines[0].split() == ["set", "format", "annotations", "pictures", "images"]
    assert table == [[name or "all", kind] for name in sets]
    assert str(tmp_path) in lines[1] and lines[1].split()[-1] == "1"


@pytest.mark.parametrize("layout", ["Roboflow, COCO", "Roboflow, YOLO", "VOC"])
def test_a_folder_in_the_folder_is_read(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "export", LAYOUTS[layout][2])
    assert len(read_dataset(DatasetConfig(split="train"), data_of(tmp_path)).records) == 1


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_two_formats_of_one_export_are_refused_and_one_is_chosen(tmp_path: Path, kind: str) -> None:
    write(tmp_path, LAYOUTS["Ultralytics"][2] | LAYOUTS["COCO"][2])
    refused = inspect_dataset(DatasetConfig(split="train"), data_of(tmp_path))
    assert codes(refused) == {"set-twice": 1} and "data.yaml" in words(refused) and "train2017.json" in words(refused)
    chosen = read_dataset(DatasetConfig(kind=kind, split="train"), data_of(tmp_path))
    assert [record.boxes.tolist() for record in chosen.records] == [[BOX]]


def test_a_folder_of_pictures_says_what_it_holds(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(Fault, match=r"holds a\.png"):
        find_sets(tmp_path)


def test_a_set_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["Ultralytics"][2])
    missing = inspect_dataset(DatasetConfig(split="test"), data_of(tmp_path))
    assert codes(missing) == {"set-missing": 1} and "train, val" in words(missing)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("instances_train2017", "train"), ("valid", "val"), ("Validation", "val"), ("trained", None), ("result", None),
     ("my-test_set", "test"), ("trainval2007", None)],
)  # fmt: skip
def test_names_of_sets(name: str, expected: str | None) -> None:
    assert set_of(name) == expected


# --- a share for validation


def export_of(folder: Path, num: int) -> Path:
    """Write a Label Studio export: COCO JSON of one set; every 4th image holds a bowl, too."""
    images = [{"id": i, "file_name": f"{i:03}.png", "width": 64, "height": 48} for i in range(1, num + 1)]
    boxes = [(i, 1, [8, 6, 16, 12]) for i in range(1, num + 1)] + [(i, 2, [30, 6, 9, 9]) for i in range(4, num + 1, 4)]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": 0} for n, (i, c, box) in enumerate(boxes, 1)
    ]
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "bowl"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    return write(folder, {"result.json": json.dumps(tree)} | {f"images/{image['file_name']}": None for image in images})


def test_val_without_a_set_names_the_share(tmp_path: Path) -> None:
    data = data_of(export_of(tmp_path, 4))
    with pytest.raises(DataError, match=r"(?s)no val.*data\.val\.share=0\.2"):
        read_dataset(data.val, data)


def test_label_studios_order_of_lists_is_known_however_long_they_are(tmp_path: Path) -> None:
    """Images, categories, annotations: neither the beginning nor the end of the file shows two lists."""
    tree = json.loads((export_of(tmp_path, 1200) / "result.json").read_text())
    text = json.dumps({key: tree[key] for key in ("images", "categories", "annotations")} | {"info": {"year": 2026}})
    assert text.index('"categories"') > HEAD and len(text) - text.index('"annotations"') > HEAD
    (tmp_path / "result.json").write_text(text)
    assert sniff(tmp_path / "result.json") == "coco"


@pytest.mark.parametrize("split", ["val", "test", "tset"])
def test_a_set_that_is_not_there_is_not_replaced_by_train(tmp_path: Path, split: str) -> None:
    export_of(tmp_path, 4)
    data = DataConfig(root=str(tmp_path), cache="", val=DatasetConfig(split=split))
    with pytest.raises(DataError, match=f"one set of images, and no {split}"):
        read_dataset(data.val, data)


def test_a_share_and_another_split_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"val\.share=null lets val have a split of its own"):
        DataConfig.model_validate({"val": {"share": 0.25, "split": "test"}})


def test_a_user_s_own_keys_are_not_taken_for_an_export_s(tmp_path: Path) -> None:
    tree = json.loads(COCO)
    tree["images"][0]["place"] = "kitchen"
    tree["annotations"][0] |= {"category": "dog", "place": "floor", "category_id": 7}
    write(tmp_path, {"a.json": json.dumps(tree), "a.png": None})
    cfg = DatasetConfig(annotations="a.json", images=".")
    said = words(inspect_dataset(cfg, DataConfig(root=str(tmp_path), cache="", train=cfg)))
    assert "annotation 1" in said and "category_id 7 is not in the file" in said
    assert "dog" not in said and "floor" not in said and "kitchen" not in said


def test_a_share_divides_one_set(tmp_path: Path) -> None:
    data = data_of(export_of(tmp_path, 40), share=0.25)
    train, val = inspect_both(data, masks=False)
    names = [{record.file_name for record in dataset.records} for dataset in (train, val)]
    assert list(map(len, names)) == [30, 10] and not names[0] & names[1]
    assert between(train, val) == ()
    bowls = sum(1 in record.labels for record in val.records)
    assert 2 <= bowls <= 3  # a quarter of 10
    assert "10 of 40 images" in val.notes[-1] and "share 0.25, seed 0" in train.notes[-1]
    moved = data_of(shutil.copytree(tmp_path, tmp_path / "elsewhere" / "x"), share=0.25)
    assert {record.file_name for record in read_dataset(moved.val, moved).records} == names[1]


def test_a_share_comes_before_the_shapes_of_a_config(tmp_path: Path) -> None:
    """As in `gndet train quickstart data.train.kind=auto data.val.share=0.25 data.root=FOLDER`."""
    data = data_of(export_of(tmp_path, 8), share=0.25, kind="shapes")
    assert len(read_dataset(data.val, data).records) == 2


def test_the_share_holds_with_a_cache_a_limit_and_chosen_classes(tmp_path: Path) -> None:
    tree = {"root": str(export_of(tmp_path / "data", 40)), "cache": str(tmp_path / "cache"), "classes": ["bowl"]}
    data = DataConfig.model_validate(tree | {"val": {"share": 0.25}, "train": {"limit": 7}})
    plain = data.model_copy(update={"cache": ""})
    for part in ("train", "val"):
        first, again, without = (
            [record.file_name for record in read_dataset(getattr(one, part), one).records]
            for one in (data, data, plain)
        )
        assert first == again == without
    assert len(read_dataset(data.train, data).records) == 7


def test_a_share_of_annotations_without_declared_classes_keeps_all_classes(tmp_path: Path) -> None:
    for index in range(10):
        name = "bowl" if index == 0 else "cup"
        write(
            tmp_path, {f"{index}.xml": VOC.replace("cup", name).replace("a.png", f"{index}.png"), f"{index}.png": None}
        )
    train, val = inspect_both(data_of(tmp_path, share=0.2), masks=False)
    assert train.classes == val.classes == ("bowl", "cup") and len(val.records) == 2


def test_a_set_that_lacks_a_class_gets_the_classes_of_train(tmp_path: Path) -> None:
    files = LAYOUTS["Roboflow, VOC"][2] | {"train/b.xml": VOC.replace("cup", "bowl").replace("a.png", "b.png")}
    data = data_of(write(tmp_path, files | {"train/b.png": None}))
    train, val = inspect_both(data, masks=False)
    assert train.classes == val.classes == ("bowl", "cup")
    assert [record.labels.tolist() for record in val.records] == [[1]]
    assert not val.refused and between(train, val)[0].code != "classes-differ"


def test_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    files = LAYOUTS["Roboflow, VOC"][2] | {"valid/a.xml": VOC.replace("cup", "Cup")}
    train, val = inspect_both(data_of(write(tmp_path, files)), masks=False)
    found = next(finding for finding in between(train, val) if finding.code == "classes-differ")
    assert "'Cup' (nearest: 'cup')" in found.examples[0]


def test_chosen_classes_may_be_missing_where_none_are_declared(tmp_path: Path) -> None:
    files = LAYOUTS["Roboflow, VOC"][2] | {"train/b.xml": VOC.replace("cup", "bowl").replace("a.png", "b.png")}
    root = write(tmp_path, files | {"train/b.png": None})
    data = DataConfig(root=str(root), cache="", classes=("cup", "bowl"))
    train, val = inspect_both(data, masks=False)
    assert train.classes == val.classes == ("cup", "bowl")
    assert np.concatenate([record.labels for record in val.records]).tolist() == [0]
