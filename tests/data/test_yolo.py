"""A YOLO export is read as the same data in COCO's format, whatever its layout; rows that are none are named."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import assert_equal, boxes, coco_tree, codes, inspected, inspected_alone, read_tree, words, write
from PIL import Image

from gndet.config.data import DataConfig
from gndet.data.datasets.exports.engine import inspect_export
from gndet.data.datasets.exports.yolo import open_outlines, open_yolo
from gndet.data.datasets.layout import find_sets, sets_at
from gndet.data.records import Dataset

BOX = "0 0.5 0.5 0.5 0.5\n"
PIXELS = [0, 16.0, 12.0, 48.0, 36.0]  # of BOX in a picture of 64 x 48, after its label
OUTLINE = "1 0.25 0.25 0.75 0.25 0.5 0.75"
YAML = "train: images/train\nval: images/val\nnames: [cell, plate]\n"
PAIR: dict[str, str | None] = {
    "images/train/a.png": None, "labels/train/a.txt": BOX, "images/val/b.png": None, "labels/val/b.txt": BOX,
}  # fmt: skip
DEEP = {f"data/{name.replace('/', '/v1/', 1)}": text for name, text in PAIR.items()}


def read(folder: Path, split: str = "train", **options: Any) -> Dataset:
    return inspected(open_yolo, folder, split, **options)


def one(tmp_path: Path, text: str | bytes, **files: str | None) -> Dataset:
    """Read an export of a picture whose label file has this text."""
    return read(write(tmp_path, {"classes.txt": "cell\nplate\n", "images/a.png": None, "labels/a.txt": text, **files}))


def rows_of(tree: dict[str, Any], outlines: bool) -> dict[str, list[str]]:
    """Write a COCO tree as rows by file_name."""
    label = {number: index for index, number in enumerate(sorted(item["id"] for item in tree["categories"]))}
    images = {image["id"]: image for image in tree["images"]}
    rows = defaultdict(list)
    for item in tree["annotations"]:
        image = images[item["image_id"]]
        scale = np.array([image["width"], image["height"]])
        x, y, w, h = item["bbox"]
        box = np.array([[x + w / 2, y + h / 2], [w, h]])
        numbers = np.array(item["segmentation"][0]).reshape(-1, 2) if outlines else box
        shares = " ".join(f"{number:.17g}" for number in (numbers / scale).ravel())
        rows[image["file_name"]].append(f"{label[item['category_id']]} {shares}")
    return rows


def test_boxes_in_roboflows_layout_are_those_of_the_coco_file(tmp_path: Path, data_root: Path) -> None:
    names = ["RBC", "WBC", "Platelets"]
    yaml = f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\nnames: {names}\n"
    for split, folder in (("train", "train"), ("val", "valid")):
        tree = coco_tree(data_root / "bccd", split)
        for file_name, rows in rows_of(tree, outlines=False).items():
            write(tmp_path, {f"{folder}/labels/{Path(file_name).stem}.txt": "\n".join(rows)})
        (tmp_path / folder / "images").symlink_to(data_root / "bccd" / split)
        write(tmp_path, {"data.yaml": yaml})
        for place in (tmp_path, tmp_path / "data.yaml", tmp_path / folder):
            dataset = read(place, split)
            assert_equal(dataset, read_tree(tmp_path, tree, data_root / "bccd" / split))
            assert codes(dataset) == {}


def test_a_folder_of_labels_and_one_of_pictures_are_named(tmp_path: Path) -> None:
    write(tmp_path, {**PAIR, "classes.txt": "cell\nplate", "txt/a.txt": BOX, "pics/a.png": None})
    for annotations, images in (("labels/train", "images/train"), ("txt", "pics")):
        for kind in ("auto", "yolo"):
            dataset, _ = inspected_alone(tmp_path, annotations=annotations, images=images, kind=kind)
            assert boxes(dataset)["a.png"] == [PIXELS]


def test_labels_outside_the_folder_of_a_relative_data_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"datasets/my/{name}": text for name, text in PAIR.items()})
    write(tmp_path, {"yamls/my.yaml": f"path: ../datasets/my\n{YAML}"})
    monkeypatch.chdir(tmp_path)
    for place in (Path("yamls/my.yaml"), tmp_path / "yamls" / "my.yaml"):
        dataset = inspected(open_yolo, place)
        assert boxes(dataset)["a.png"] == [PIXELS] and codes(dataset) == {}


def test_a_label_file_alone_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    dataset = inspected(open_yolo, tmp_path / "labels/train/a.txt")
    assert codes(dataset) == {"data-unknown": 1} and "labels of one picture" in words(dataset)


def test_outlines_are_the_polygons_of_the_coco_file(tmp_path: Path, data_root: Path) -> None:
    tree = coco_tree(data_root / "coco-tiny", "val2017")
    tree["annotations"] = [
        item
        for item in tree["annotations"]
        if isinstance(item["segmentation"], list) and len(item["segmentation"]) == 1
    ]
    for file_name, rows in rows_of(tree, outlines=True).items():
        write(tmp_path, {f"labels/val2017/{Path(file_name).stem}.txt": "\n".join(rows)})
    for item in tree["annotations"]:
        points = np.array(item["segmentation"][0]).reshape(-1, 2)
        item["bbox"] = [*points.min(0), *np.ptp(points, axis=0)]
    names = {index: item["name"] for index, item in enumerate(sorted(tree["categories"], key=lambda item: item["id"]))}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val2017").symlink_to(data_root / "coco-tiny" / "val2017")
    write(tmp_path, {"coco.yaml": f"path: ../datasets/coco\nval: images/val2017\nnames: {names}\n"})
    dataset, truth = read(tmp_path, "val"), read_tree(tmp_path, tree, data_root / "coco-tiny" / "val2017")
    assert_equal(dataset, truth)
    expected = {record.file_name: record for record in truth.records}
    for record in dataset.records:
        for ours, theirs in zip(record.segmentations, expected[record.file_name].segmentations, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


LAYOUTS: dict[str, tuple[dict[str, str | bytes | None], str]] = {  # files, and what is given as the annotations
    "Ultralytics": (PAIR | {"data.yaml": YAML}, ""),
    "its data.yaml": (PAIR | {"data.yaml": YAML}, "data.yaml"),
    "another name": (PAIR | {"cells.yml": YAML}, ""),
    "no data.yaml": (PAIR | {"classes.txt": "cell\nplate"}, ""),
    "the labels": (PAIR | {"classes.txt": "cell\nplate"}, "labels"),
    "Windows, another machine": (PAIR | {"data.yaml": YAML.replace("images/", "D:\\me\\set\\images\\")}, ""),
    "path of another machine": (PAIR | {"data.yaml": "path: /content/set\n" + YAML}, ""),
    "absolute on another machine": (PAIR | {"data.yaml": YAML.replace("images/", "/content/set/images/")}, ""),
    "lists of folders": (PAIR | {"data.yaml": YAML.replace("images/train", "[images/train]")}, ""),
    "valid and test": (PAIR | {"data.yaml": YAML.replace("val:", "test: images/test\nvalidation:")}, ""),
    "text lists": (
        PAIR | {"data.yaml": YAML.replace("images/train", "train.txt"), "train.txt": "./images/train/a.png\r\n"}, ""
    ),
    "CVAT's Ultralytics": (
        PAIR | {
            "data.yaml": "path: .\ntrain: train.txt\nval: val.txt\nnames:\n  0: cell\n  1: plate\n",
            "train.txt": "data/images/train/a.png\n", "val.txt": "data/images/val/b.png\n",
        }, "",
    ),
    "CVAT's YOLO 1.1": (
        {
            "obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n",
            "obj.names": "cell\nplate\n", "train.txt": "data/obj_train_data/a.png\n", "obj_train_data/a.png": None,
            "obj_train_data/a.txt": BOX, "val.txt": "data/obj_valid_data/b.png", "obj_valid_data/b.png": None,
            "obj_valid_data/b.txt": BOX,
        }, "",
    ),
    "Roboflow's Darknet": (
        {
            "README.roboflow.txt": "some words", "train/_darknet.labels": "cell\nplate", "train/a.png": None,
            "train/a.txt": BOX, "valid/_darknet.labels": "cell\nplate", "valid/b.png": None, "valid/b.txt": BOX,
        }, "",
    ),
    "an unpacked archive": ({f"set/x/{name}": text for name, text in PAIR.items()} | {"set/x/data.yaml": YAML}, ""),
    "sets two folders down": (DEEP | {"classes.txt": "cell\nplate"}, ""),
    "other programs' files": (
        PAIR | {
            "args.yaml": "val: true\nsplit: val\ndata: x.yaml\n", "broken.yaml": "{{ a", "other.data": b"\xff\xfe\0",
            "my.yaml": "data: {root: x}\ntrain: {schedule: {updates: 9}}\n", "set.yaml": YAML,
        }, "",
    ),
    "folders of sets": (
        {
            "train/images/a.png": None, "train/labels/a.txt": BOX, "val/images/b.png": None, "val/labels/b.txt": BOX,
            "classes.txt": "cell\nplate",
        }, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_sets_of_a_layout_are_found(tmp_path: Path, layout: str) -> None:
    files, annotations = LAYOUTS[layout]
    write(tmp_path, files)
    for split, name in (("train", "a.png"), ("val", "b.png")):
        dataset = read(tmp_path / annotations, split)
        assert boxes(dataset) == {name: [PIXELS]} and dataset.classes == ("cell", "plate"), words(dataset)
        assert codes(dataset) == {}
    train, val = inspected_alone(tmp_path)
    assert boxes(train) == {"a.png": [PIXELS]} and boxes(val) == {"b.png": [PIXELS]}
    assert train.classes == val.classes == ("cell", "plate")


WHOLE: dict[str, dict[str, str | None]] = {
    "Label Studio": {"images/a.png": None, "labels/a.txt": BOX, "classes.txt": "cell\nplate\n", "notes.json": "{}"},
    "beside the pictures": {"a.png": None, "a.txt": BOX, "classes.txt": "cell\nplate"},
    "a folder of labels in the folder": {"a.png": None, "labels/a.txt": BOX, "labels/classes.txt": "cell\nplate"},
    "another name of the folder": {"JPEGImages/a.png": None, "labels/a.txt": BOX, "classes.txt": "cell\nplate"},
    "deeper": {"images/x/y/a.png": None, "labels/x/y/a.txt": BOX, "classes.txt": "cell\nplate"},
    "train and test are names of pictures": {
        "test.png": None, "test.txt": BOX, "train.png": None, "train.txt": BOX, "classes.txt": "cell\nplate"
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", WHOLE)
def test_an_export_that_is_not_divided_is_the_training_set(tmp_path: Path, layout: str) -> None:
    write(tmp_path, WHOLE[layout])
    dataset = read(tmp_path)
    assert set(map(str, boxes(dataset).values())) == {str([PIXELS])} and codes(dataset) == {}
    assert boxes(read(tmp_path, "")) == boxes(dataset)
    missing = read(tmp_path, "val")
    assert codes(missing) == {"set-missing": 1} and "share=0.2" in words(missing)
    images = next(path for path in tmp_path.rglob("*.png")).parent
    assert boxes(read(tmp_path, "val", images=images)).keys() == {path.name for path in images.iterdir()} - {
        path.name for path in images.iterdir() if path.suffix != ".png"
    }


def test_pictures_outside_the_folders_of_sets_are_the_training_set(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.png": None, "labels/a.txt": BOX, "images/test/b.png": None, "labels/test/b.txt": BOX})
    write(tmp_path, {"classes.txt": "cell"})
    assert boxes(read(tmp_path)) == {"a.png": [PIXELS]} and boxes(read(tmp_path, "test")) == {"b.png": [PIXELS]}
    assert boxes(read(tmp_path, "")) == {"a.png": [PIXELS], "test/b.png": [PIXELS]}


def test_a_set_that_is_missing_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, PAIR | {"data.yaml": YAML})
    assert codes(read(tmp_path, "test")) == {"set-missing": 1}
    assert "no test (test or testing); it has train, val" in words(read(tmp_path, "test"))
    (tmp_path / "data.yaml").unlink()
    assert "it has train, val" in words(read(tmp_path, "test"))


def test_a_test_set_that_data_yaml_names_but_that_is_not_there_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, PAIR | {"data.yaml": YAML + "test: ../test/images\n"})
    assert list(find_sets(tmp_path)) == list(sets_at(tmp_path / "data.yaml")) == ["train", "val"]
    write(tmp_path, {"images/test/c.png": None, "labels/test/c.txt": BOX, "data.yaml": YAML + "test: images/test\n"})
    assert list(find_sets(tmp_path)) == ["train", "val", "test"]


def test_a_folder_that_is_not_there_is_not_taken_for_another(tmp_path: Path) -> None:
    files = {"images/a.png": None, "labels/a.txt": BOX, "data.yaml": YAML.replace("images/val", "../valid/images")}
    dataset = read(write(tmp_path, files), "val")
    assert codes(dataset) == {"set-missing": 1} and "valid/images" in words(dataset)
    missing = read(write(tmp_path / "labels only", {"labels/a.txt": BOX, "classes.txt": "cell"}))
    assert codes(missing) == {"folder-missing": 1} and "no pictures there" in words(missing)


NAMES = {
    "a list": ("names: [cell, plate]", ("cell", "plate")),
    "a map": ("names:\n  0: cell\n  1: plate", ("cell", "plate")),
    "a map out of order, with a gap": ("names: {7: plate, 0: cell}", ("cell", "plate")),
    "words that YAML takes for others": ("names: [no, 007, 1.0, 'null']", ("no", "007", "1.0", "null")),
    "a file": ("names: cells.names", ("cell", "plate")),
    "only their count": ("nc: 2", ("0", "1")),
    "a wrong count": ("nc: 3\nnames: [cell, plate]", ("cell", "plate")),
    "Japanese": ("names: [細胞, 皿]", ("細胞", "皿")),
    "none at all": ("", ("0", "1")),
}


@pytest.mark.parametrize("case", NAMES)
def test_class_names_are_found(tmp_path: Path, case: str) -> None:
    text, names = NAMES[case]
    write(tmp_path, PAIR | {"cells.names": "cell\nplate\n", "labels/train/a.txt": BOX + OUTLINE.replace("1 ", "7 ")})
    if "gap" not in case:
        write(tmp_path, {"labels/train/a.txt": BOX + OUTLINE})
    dataset = read(write(tmp_path, {"data.yaml": f"train: images/train\n{text}\n"}))
    assert dataset.classes == names and dataset.records[0].labels.tolist() == [0, 1]
    assert codes(dataset) == ({"names-missing": 1} if case == "none at all" else {})
    assert any("nc" in note for note in dataset.notes) == (case == "a wrong count")


def test_classes_without_names_are_the_numbers_of_the_training_set_in_both_sets(tmp_path: Path) -> None:
    text = f"{BOX}2 0.5 0.5 0.2 0.2\n"
    train, val = inspected_alone(write(tmp_path, PAIR | {"labels/train/a.txt": text}))
    assert train.classes == val.classes == ("0", "2") and val.records[0].labels.tolist() == [0]
    write(tmp_path, {"labels/train/a.txt": f"{text}-1 0.5 0.5 0.2 0.2\n0.5 0.5 0.5 0.2 0.2\n"})
    assert codes(inspected_alone(tmp_path)[0]) == {"row-class": 2, "names-missing": 1}


def test_a_change_of_any_file_that_was_read_is_seen_in_spite_of_the_cache(tmp_path: Path) -> None:
    files = {
        "obj.data": "train = train.txt\nnames = obj.names",
        "obj.names": "cell",
        "train.txt": "set/a.png\nset/b.png",
    }
    home = write(tmp_path / "data", files | {"set/a.png": None, "set/b.png": None, "set/a.txt": BOX, "set/b.txt": ""})
    data = DataConfig(root=str(home), cache=str(tmp_path / "cache"))

    def read_again() -> tuple[tuple[str, ...], dict[str, list[list[float]]]]:
        dataset = inspect_export(open_yolo, home, None, "train", data)
        return dataset.classes, boxes(dataset)

    assert read_again() == (("cell",), {"a.png": [PIXELS], "b.png": []})
    write(home, {"obj.names": "cup"})
    assert read_again() == (("cup",), {"a.png": [PIXELS], "b.png": []})
    write(home, {"train.txt": "set/a.png"})
    assert read_again() == (("cup",), {"a.png": [PIXELS]})
    write(home, {"set/a.txt": BOX * 2 + OUTLINE.replace("1 ", "0 ", 1)})
    assert len(read_again()[1]["a.png"]) == 2


BROKEN = {
    "not YAML": ("names:\n  [cell", "yaml-broken", "line 2: not valid YAML: expected ',' or ']'"),
    "a name twice": ("names: [cell, cell]", "category-name-twice", "'cell' occurs twice"),
    "a class without a number": ("names: {cell: 0}", "yaml-broken", "a name for each class number"),
    "a class within a class": ("names: [[cell]]", "yaml-broken", "a name for each class number"),
    "a file that is not there": ("names: none.names", "yaml-broken", "a file of names"),
    "huge": ("#" * 4_000_001, "yaml-broken", "over 4,000,000 bytes"),
    "UTF-16 without a mark": ("names: [cell]".encode("utf-16-le"), "yaml-broken", "not valid YAML"),
    "Latin-1": ("names: [Zürich]".encode("latin-1"), "text-encoding", "expected UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_data_yaml_that_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    text, code, expected = BROKEN[case]
    write(tmp_path, PAIR | {"data.yaml": text})
    dataset = read(tmp_path / "data.yaml")
    assert codes(dataset) == {code: 1} and expected in words(dataset) and "data.yaml" in words(dataset)


def test_a_data_yaml_may_name_ten_thousand_classes(tmp_path: Path) -> None:
    """V3Det has 13,204."""
    names = "".join(f"  {number}: a class named {number}\n" for number in range(10_000))
    row = BOX.replace("0 ", "9999 ", 1)
    write(tmp_path, PAIR | {"data.yaml": f"train: images/train\nnames:\n{names}", "labels/train/a.txt": row})
    dataset = read(tmp_path / "data.yaml")
    assert dataset.classes[-1] == "a class named 9999" and dataset.records[0].labels.tolist() == [9999]


def test_nothing_in_a_data_yaml_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    run = f"!!python/object/apply:os.system ['touch {canary}']"
    write(tmp_path, PAIR | {"data.yaml": f"{YAML}download: |\n  touch {canary}\nnc: {run}\nx: {run}\n"})
    assert boxes(read(tmp_path)) == {"a.png": [PIXELS]} and not canary.exists()


GOOD_ROWS = {
    "Windows line ends": (BOX.replace("\n", "\r\n"), {}),
    "tabs and more spaces": (BOX.replace(" ", " \t  ") + "  \n\n", {}),
    "a byte order mark": ("\ufeff" + BOX, {}),
    "UTF-16, as PowerShell writes it": (BOX.encode("utf-16"), {}),
    "the class as a float": (BOX.replace("0 ", "0.0 ", 1), {}),
    "no line end": (BOX.strip(), {}),
    "equal rows": (BOX + "0 0.50 0.500 0.5 0.5\n" + BOX, {"row-twice": 2}),
    "a score": ("0 0.5 0.5 0.5 0.5 0.93\n", {"row-score": 1}),
    "over the edge by rounding": (BOX + "1 0.995 0.5 0.012 0.5", {"box-clipped": 1, "box-tiny": 1}),
    "exponents": ("0 5e-1 .5 0.5 +0.5", {}),
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_a_row_with_one_meaning_is_read(tmp_path: Path, case: str) -> None:
    text, expected = GOOD_ROWS[case]
    dataset = one(tmp_path, text)
    assert boxes(dataset)["a.png"][0] == PIXELS and codes(dataset) == expected
    assert len(dataset.records[0].labels) == 1 + ("edge" in case)


BAD_ROWS = {
    "a name for the class": ("cell 0.5 0.5 0.5 0.5", "row-malformed", "expected numbers"),
    "UTF-16 without a mark": ("0\0 \0", "row-malformed", "expected numbers"),
    "commas": ("0,0.5,0.5,0.5,0.5", "row-malformed", "between spaces"),
    "decimal commas": ("0 0,5 0,5 0,5 0,5", "row-malformed", "a decimal point"),
    "four numbers": ("0 0.5 0.5 0.5", "row-malformed", "4 numbers"),
    "one number": ("0", "row-malformed", "1 number, expected 5"),
    "an angle": ("0 0.5 0.5 0.5 0.5 35", "row-malformed", "the sixth number is 35"),
    "half a point": ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1", "row-malformed", "8 numbers"),
    "no number": ("0 0.5 0.5 nan 0.5", "row-malformed", "not finite"),
    "infinity": ("0 0.5 0.5 inf 0.5", "row-malformed", "not finite"),
    "DOTA": ("1 1 9 1 9 9 1 9 plane 0", "row-malformed", "OBB"),
    "a class beyond the names": (
        "2 0.5 0.5 0.5 0.5",
        "row-class",
        "class 2, expected one of 0 to 1; are the classes numbered from 1?",
    ),
    "a negative class": ("-1 0.5 0.5 0.5 0.5", "row-class", "class -1"),
    "half a class": ("0.5 0.5 0.5 0.5 0.5", "row-class", "class 0.5"),
    "pixels": ("0 32 24 10 10", "row-pixels", "32, expected shares from 0 to 1"),
    "an outline in pixels": ("0 1 1 9 1 9 9", "row-pixels", "9, expected shares"),
    "outside": ("0 1.5 0.5 0.1 0.1", "box-outside", "in an image of width 64"),
    "an empty box": ("0 0.5 0.5 0 0.1", "box-empty", "bbox"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_costs_that_row_and_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    row, code, expected = BAD_ROWS[case]
    dataset = one(tmp_path, f"{BOX}{row}\n{OUTLINE}\n")
    assert codes(dataset) == {code: 1}
    assert "labels/a.txt, line 2" in words(dataset) and expected in words(dataset)
    assert dataset.records[0].labels.tolist() == [0, 1]


def test_boxes_and_outlines_are_told_apart_row_by_row(tmp_path: Path) -> None:
    dataset = one(tmp_path, BOX + OUTLINE + "\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5")
    assert dataset.records[0].boxes.tolist()[:2] == [PIXELS[1:], [16, 12, 48, 36]]
    assert [None if mask is None else len(mask[0]) for mask in dataset.records[0].segmentations] == [None, 6, 8]


CORNERS = ["0 0.1 0.2 0.4 0.1 0.5 0.4 0.2 0.5", "1 0.5 0.5 0.8 0.5 0.8 0.9 0.5 0.9"]
POSE_3 = "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1 0 0 0"
POSE_2 = "0 0.5 0.5 0.4 0.4 0.4 0.6 0.6 0.35 0 0"
OTHERS = {
    "oriented boxes": ("\n".join(CORNERS), "", "rows-obb", "oriented boxes (OBB), or outlines of 4 points"),
    "one oriented box": (CORNERS[0], "", "rows-obb", "labels/a.txt, line 1"),
    "oriented boxes with scores": (f"{CORNERS[0]} 0.9", "", "rows-obb", "OBB"),
    "keypoints with flags": (POSE_3, "", "rows-pose", "3 keypoints of 3 numbers"),
    "keypoints by data.yaml": (POSE_2, "kpt_shape: [3, 2]", "rows-pose", "kpt_shape"),
    "keypoints after boxes": (f"{BOX}{POSE_3}", "kpt_shape: [3, 3]", "rows-pose", "line 2"),
    "points in their boxes": (f"{POSE_2}\n{POSE_2.replace('0.6', '0.55')}", "", "rows-pose", "or outlines of 5 points"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_rows_of_another_task_are_refused_by_name(tmp_path: Path, case: str) -> None:
    text, yaml, code, expected = OTHERS[case]
    dataset = one(tmp_path, text, **{"data.yaml": f"names: [cell, plate]\n{yaml}\n"})
    assert codes(dataset) == {code: 1} and expected in words(dataset)
    write(tmp_path, {"data.yaml": f"names: [cell, plate]\n{yaml}\n"})
    as_outlines = inspected_alone(tmp_path, kind="yolo")[0]
    assert ("kind: yolo" in words(dataset)) == (not as_outlines.refused)  # what the remedy says is true


def test_rows_of_equal_length_are_outlines_if_the_user_says_so(tmp_path: Path) -> None:
    for text, points in (("\n".join(CORNERS), 4), (POSE_2, 5)):
        write(tmp_path, {"classes.txt": "cell\nplate\n", "images/a.png": None, "labels/a.txt": text})
        dataset = inspected(open_outlines, tmp_path)
        assert len(dataset.records[0].segmentations[0][0]) == 2 * points and not dataset.refused
        assert inspected_alone(tmp_path)[0].refused and not inspected_alone(tmp_path, kind="yolo")[0].refused
    write(tmp_path, {"data.yaml": "names: [cell, plate]\nkpt_shape: [3, 2]\n"})
    assert codes(inspected(open_outlines, tmp_path)) == {"rows-pose": 1}


def test_outlines_of_five_points_that_are_no_keypoints_are_read(tmp_path: Path) -> None:
    assert codes(one(tmp_path, "0 0.1 0.1 0.3 0.1 0.35 0.2 0.3 0.3 0.1 0.3")) == {}


def test_pictures_without_rows_are_background_and_labels_without_a_picture_are_noted(tmp_path: Path) -> None:
    files = {"images/empty.png": None, "labels/empty.txt": "\n", "images/none.png": None, "labels/gone.txt": BOX}
    dataset = one(tmp_path, BOX, **files)
    assert boxes(dataset) == {"a.png": [PIXELS], "empty.png": [], "none.png": []}
    assert codes(dataset) == {"label-stray": 1} and "labels/gone.txt" in words(dataset)


def test_a_list_of_a_set_makes_no_strays_of_the_other_set(tmp_path: Path) -> None:
    files = {"images/b.png": None, "labels/b.txt": BOX, "train.txt": "images/a.png", "val.txt": "images/b.png"}
    dataset = one(tmp_path, BOX, **files)
    assert boxes(dataset) == {"a.png": [PIXELS]} and codes(dataset) == {}
    assert boxes(read(tmp_path / "val.txt", "val")) == {"b.png": [PIXELS]}


def test_no_label_at_all_is_refused_with_the_folders_that_were_looked_in(tmp_path: Path) -> None:
    dataset = read(write(tmp_path, {"images/a.png": None, "text/b.txt": BOX, "classes.txt": "cell"}))
    assert codes(dataset) == {"labels-missing": 1} and "like 'a.png'" in words(dataset)
    assert f"looked in {tmp_path}/labels" in words(dataset)
    write(tmp_path, {"labels/b.txt": BOX})
    assert f"{tmp_path}/labels has 'b.txt'" in words(read(tmp_path))


def test_shares_are_of_the_picture_as_its_exif_turns_it(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": "cell", "labels/a.txt": "0 0.5 0.25 1 0.5"})
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.jpg", exif=exif)
    dataset = read(tmp_path)
    assert dataset.records[0].size == (64, 48) and boxes(dataset) == {"a.jpg": [[0, 0, 0, 48, 32]]}


def test_names_in_either_unicode_form_and_suffixes_in_any_case_match(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "u\u0308.PNG", format="PNG")
    dataset = read(write(tmp_path, {"labels/\u00fc.txt": BOX, "classes.txt": "cell", "images/._a.png": "x"}))
    assert list(boxes(dataset).values()) == [[PIXELS]] and codes(dataset) == {}


def test_a_picture_that_cannot_be_read_and_a_label_that_is_no_text_are_named(tmp_path: Path) -> None:
    files = {"images/b.png": "no picture", "labels/b.txt": BOX, "images/c.png": None}
    write(tmp_path, {"labels/c.txt": b"0 0.5 \xff"})
    dataset = one(tmp_path, BOX, **files)
    assert codes(dataset) == {"picture-unreadable": 1, "text-encoding": 1}
    assert "b.png" in words(dataset) and "labels/c.txt" in words(dataset)
    assert boxes(dataset) == {"a.png": [PIXELS], "c.png": []}


def test_pictures_of_several_folders_make_one_set(tmp_path: Path) -> None:
    files = {"day/images/a.png": None, "day/labels/a.txt": BOX, "night/images/a.png": None, "night/labels/a.txt": BOX}
    yaml = "train: [day/images, ../night/images]\nnames: [cell]\n"
    dataset = read(write(tmp_path, files | {"data.yaml": yaml}))
    assert boxes(dataset) == {"day/images/a.png": [PIXELS], "night/images/a.png": [PIXELS]} and codes(dataset) == {}
