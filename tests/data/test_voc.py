"""A Pascal VOC export is read as the same data in COCO's format, whatever its layout; oddities are named or counted."""

import os
from pathlib import Path
from typing import Any

import pytest
from exported import assert_equal, boxes, coco_tree, codes, inspected, inspected_alone, read_tree, words, write

from gndet.data.datasets.exports.voc import open_voc
from gndet.data.datasets.layout import find_sets
from gndet.data.records import Dataset

SIDES = ("xmin", "ymin", "xmax", "ymax")


def item(corners: Any = (17, 13, 48, 36), name: str = "cell", more: str = "") -> str:
    """Write an object; the corners are those of BOX, counted from 1."""
    box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(*items: str, filename: str = "a.png", size: tuple[Any, Any] = (48, 64), head: str = "") -> str:
    height, width = size
    size_of = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    rest = "".join(items) or item()
    return f"{head}<annotation><folder>x</folder><filename>{filename}</filename>{size_of}{rest}</annotation>"


PIXELS = [0, 16.0, 12.0, 48.0, 36.0]  # of `item()`, after its label


def read(folder: Path, split: str = "train", **options: Any) -> Dataset:
    return inspected(open_voc, folder, split, **options)


def one(tmp_path: Path, text: str | bytes, **files: str | None) -> Dataset:
    """Read an export of a picture whose XML file has this text."""
    return read(write(tmp_path, {"JPEGImages/a.png": None, "Annotations/a.xml": text} | files))


def write_voc(folder: Path, tree: dict[str, Any], first: int) -> list[str]:
    """Write a COCO tree in VOC's format, pixels counted from first.  Returns the stems."""
    names = {category["id"]: category["name"] for category in tree["categories"]}
    items: dict[int, list[str]] = {image["id"]: [] for image in tree["images"]}
    for one in tree["annotations"]:
        x, y, w, h = one["bbox"]
        corners = (x + first, y + first, x + w, y + h)
        items[one["image_id"]].append(item(corners, names[one["category_id"]], "<difficult>0</difficult>"))
    for image in tree["images"]:
        size = (image["height"], image["width"])
        text = xml(*items[image["id"]], filename=image["file_name"], size=size)
        write(folder, {f"{Path(image['file_name']).stem}.xml": text})
    return [Path(image["file_name"]).stem for image in tree["images"]]


@pytest.mark.parametrize("first", [0, 1])
def test_boxes_in_vocs_layout_are_those_of_the_coco_file(tmp_path: Path, data_root: Path, first: int) -> None:
    (tmp_path / "JPEGImages").mkdir()
    trees = {split: coco_tree(data_root / "bccd", split) for split in ("train", "val")}
    trees["train"]["annotations"][0]["bbox"][0] = 0  # at the edge; no other box is
    number = {1: 2, 2: 3, 3: 1}  # VOC's classes are sorted by name
    for split, tree in trees.items():
        for one in (*tree["categories"], *tree["annotations"]):
            key = "id" if "name" in one else "category_id"
            one[key] = number[one[key]]
        stems = write_voc(tmp_path / "Annotations", tree, first)
        write(tmp_path, {f"ImageSets/Main/{split}.txt": "\n".join(stems)})
        for image in tree["images"]:
            os.link(data_root / "bccd" / split / image["file_name"], tmp_path / "JPEGImages" / image["file_name"])
    for split, tree in trees.items():
        dataset = read(tmp_path, split)
        assert_equal(dataset, read_tree(tmp_path, tree, tmp_path / "JPEGImages"))
        assert codes(dataset) == ({} if first else {"corners-from-0": 1})


XML = xml()
LAYOUTS: dict[str, dict[str, str | None]] = {
    "VOC": {
        "Annotations/a.xml": XML, "Annotations/b.xml": XML, "JPEGImages/a.png": None, "JPEGImages/b.png": None,
        "ImageSets/Main/train.txt": "a\n", "ImageSets/Main/val.txt": "b\n", "ImageSets/Main/trainval.txt": "a\nb\n",
        "ImageSets/Main/cell_train.txt": "a 1\n", "SegmentationClass/a.png": None,
    },
    "VOC with suffixes and numbers in its lists": {
        "Annotations/a.xml": XML, "Annotations/b.xml": XML, "JPEGImages/a.png": None, "JPEGImages/b.png": None,
        "ImageSets/Main/train.txt": "a.png\r\n", "ImageSets/Main/val.txt": "b  1\r\n",
    },
    "a devkit": {
        "VOCdevkit/VOC2007/Annotations/a.xml": XML, "VOCdevkit/VOC2007/JPEGImages/a.png": None,
        "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt": "a", "VOCdevkit/VOC2012/Annotations/b.xml": XML,
        "VOCdevkit/VOC2012/JPEGImages/b.png": None, "VOCdevkit/VOC2012/ImageSets/Main/val.txt": "b",
    },
    "an unpacked archive": {
        "set/export/train/a.xml": XML, "set/export/train/a.png": None, "set/export/valid/b.xml": XML,
        "set/export/valid/b.png": None,
    },
    "Roboflow": {"train/a.xml": XML, "train/a.png": None, "valid/b.xml": XML, "valid/b.png": None, "README.txt": "x"},
    "folders of both": {
        "train/Annotations/a.xml": XML, "train/images/a.png": None, "val/Annotations/b.xml": XML,
        "val/images/b.png": None,
    },
    "sets below": {
        "annotations/train/a.xml": XML, "annotations/val/b.xml": XML, "images/train/a.png": None,
        "images/val/b.png": None,
    },
    "sets of XML files, pictures together": {
        "annotations/train/a.xml": XML, "annotations/val/b.xml": XML, "images/a.png": None, "images/b.png": None,
    },
}  # fmt: skip


def test_a_file_of_vocs_own_layout_is_read_alone(tmp_path: Path) -> None:
    dataset = read(write(tmp_path, LAYOUTS["VOC"]) / "Annotations" / "a.xml", "")
    assert boxes(dataset) == {"a.png": [PIXELS]} and codes(dataset) == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_sets_of_a_layout_are_found(tmp_path: Path, layout: str) -> None:
    for name, text in LAYOUTS[layout].items():
        write(tmp_path, {name: text.replace("a.png", f"{Path(name).stem}.png") if text and text == XML else text})
    for split, name in (("train", "a.png"), ("val", "b.png")):
        dataset = read(tmp_path, split)
        assert {Path(name).name: found for name, found in boxes(dataset).items()} == {name: [PIXELS]}, words(dataset)
        assert codes(dataset) == {}
    assert {Path(name).name for name in boxes(read(tmp_path, ""))} == {"a.png", "b.png"}
    train, val = inspected_alone(tmp_path)
    assert list(boxes(train).values()) == list(boxes(val).values()) == [[PIXELS]] and not train.refused
    missing = read(tmp_path, "test")
    assert codes(missing) == {"set-missing": 1} and "it has " in words(missing)


WHOLE: dict[str, dict[str, str | None]] = {
    "Label Studio": {"Annotations/a.xml": XML, "images/a.png": None},
    "beside the pictures": {"a.xml": XML, "a.png": None},
    "a folder of XML files in the folder": {"xmls/a.xml": XML, "a.png": None},
    "CVAT": {
        "Annotations/a.xml": XML, "JPEGImages/a.png": None, "ImageSets/Main/default.txt": "a",
        "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:9,9,9::\n",
    },
    "CVAT with folders": {"Annotations/x/a.xml": XML.replace("a.png", "x/a.png"), "JPEGImages/x/a.png": None},
}  # fmt: skip


@pytest.mark.parametrize("layout", WHOLE)
def test_an_export_that_is_not_divided_is_the_training_set(tmp_path: Path, layout: str) -> None:
    dataset = read(write(tmp_path, WHOLE[layout]))
    assert list(find_sets(tmp_path)) == [""]
    assert list(boxes(dataset).values()) == [[PIXELS]] and codes(dataset) == {}
    assert boxes(read(next(tmp_path.rglob("*.xml")))).values() != []
    missing = read(tmp_path, "val")
    assert codes(missing) == {"set-missing": 1} and "share=0.2" in words(missing)
    assert list(boxes(read(tmp_path, "val", images=next(tmp_path.rglob("a.png")).parent)).values()) == [[PIXELS]]


def test_pictures_in_a_folder_of_their_own_are_named_by_one_option(tmp_path: Path) -> None:
    write(tmp_path, {"notes/a.xml": XML, "elsewhere/pictures/a.png": None})
    assert codes(read(tmp_path / "notes")) == {"file-missing": 1}
    assert boxes(read(tmp_path / "notes", images=tmp_path / "elsewhere" / "pictures")) == {"a.png": [PIXELS]}


def test_classes_of_labelmap_are_in_its_order_and_others_are_sorted(tmp_path: Path) -> None:
    text = xml(item(), item(name="plate"), item(name="bowl"))
    assert one(tmp_path, text).classes == ("bowl", "cell", "plate")
    dataset = one(tmp_path, text, **{"labelmap.txt": "background:::\nplate:::\ncell:::\ncup:::\n"})
    assert dataset.classes == ("plate", "cell", "cup")
    assert codes(dataset) == {"category-unknown": 1} and "a.xml, object 3" in words(dataset)


COUNTING = {
    "from 1": (item((1, 1, 64, 48)), [0, 0, 64, 48], {}),
    "from 0": (item((0, 5, 64, 48)), [0, 5, 64, 48], {"corners-from-0": 1}),
    "parts of pixels": (item((10.5, 5, 20.25, 48)), [10.5, 5, 20.25, 48], {"corners-from-0": 1}),
    "an empty box at 0 says nothing": (
        item((5, 5, 20, 20)) + item((0, 0, 0, 0)), [4, 4, 20, 20], {"box-empty": 1}
    ),
    "exchanged": (item((20, 30, 5, 10)), [4, 9, 20, 30], {"box-swapped": 1}),
    "one pixel": (item((5, 5, 5, 5)), [4, 4, 5, 5], {}),
    "spaces and floats": (item((" 5.0 ", "5\n", "+9", 9)), [4, 4, 9, 9], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTING)
def test_corners_are_counted_by_one_rule_for_the_export(tmp_path: Path, case: str) -> None:
    items, box, expected = COUNTING[case]
    dataset = one(tmp_path, xml(items))
    assert boxes(dataset)["a.png"][0] == [0, *box] and codes(dataset) == expected


def test_the_rule_holds_for_files_without_a_zero_and_for_the_other_set(tmp_path: Path) -> None:
    files = {f"{split}/{split}.png": None for split in ("train", "valid")}
    write(tmp_path, files | {"train/train.xml": xml(), "valid/valid.xml": xml(item((0, 0, 9, 9)))})
    assert boxes(read(tmp_path)) == {"train.png": [[0, 17, 13, 48, 36]]}


BAD_OBJECTS = {
    "no name": (item(name=""), "object-malformed", "no name"),
    "no box": ("<object><name>cell</name></object>", "object-malformed", "no bndbox"),
    "a turned box": ("<object><name>cell</name><robndbox/></object>", "object-malformed", "no bndbox, but robndbox"),
    "LabelMe's XML": ("<object><name>cell</name><polygon/></object>", "object-malformed", "no bndbox, but polygon"),
    "a word": (item(("abc", 1, 5, 5)), "object-malformed", "'abc'"),
    "a side missing": (item().replace("<xmin>17</xmin>", ""), "object-malformed", "None, '13'"),
    "not a number": (item(("nan", 1, 5, 5)), "box-malformed", "expected 4 finite numbers"),
    "outside": (item((70, 1, 80, 5)), "box-outside", "in an image of width 64"),
}


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_a_bad_object_costs_that_object_and_is_named(tmp_path: Path, case: str) -> None:
    text, code, expected = BAD_OBJECTS[case]
    dataset = one(tmp_path, xml(item(), text, item((1, 1, 9, 9), "plate")))
    assert codes(dataset) == {code: 1} and dataset.records[0].labels.tolist() == [0, 1]
    assert "Annotations/a.xml, object 2" in words(dataset) and expected in words(dataset)


def test_difficult_objects_are_trained_on_and_parts_are_none(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    dataset = one(tmp_path, xml(item(more="<difficult>1</difficult>"), item(more=f"<difficult>0</difficult>{part}")))
    assert codes(dataset) == {"box-difficult": 1} and boxes(dataset) == {"a.png": [PIXELS, PIXELS]}
    assert not dataset.records[0].crowd.any()


def test_outlines_are_noted_and_only_boxes_are_read(tmp_path: Path) -> None:
    polygon = "<polygon><x1>17</x1><y1>13</y1><x2>48</x2><y2>13</y2><x3>30</x3><y3>36</y3></polygon>"
    dataset = one(tmp_path, xml(item(more=polygon)), **{"SegmentationObject/a.png": None})
    assert codes(dataset) == {"outline-unread": 1} and boxes(dataset) == {"a.png": [PIXELS]}
    assert any("SegmentationObject" in note for note in dataset.notes)


@pytest.mark.parametrize("size", [(0, 0), ("", ""), (0, 64)])
def test_a_size_that_is_missing_is_read_from_the_picture(tmp_path: Path, size: tuple[Any, Any]) -> None:
    dataset = one(tmp_path, xml(size=size))
    assert dataset.records[0].size == (48, 64) and codes(dataset) == {}
    assert one(tmp_path, "<annotation/>").records[0].size == (48, 64)


def test_a_size_that_is_no_number_of_pixels_is_refused(tmp_path: Path) -> None:
    for size in ((48, "wide"), (-48, 64), (48, 64.5)):
        assert codes(one(tmp_path, xml(size=size))) == {"image-size": 1}
    assert codes(one(tmp_path, xml(size=("48.0", "64.0")))) == {}


FILE_NAMES = {
    "another name": ("other.jpg", "a.png", {"picture-renamed": 1}),
    "another suffix": ("a.jpg", "a.png", {}),
    "no suffix": ("a", "a.png", {}),
    "none": ("", "a.png", {}),
    "a path of Windows": ("C:\\me\\a.png", "a.png", {}),
    "the name of another picture": ("b.png", "a.png", {"picture-renamed": 1}),
}


@pytest.mark.parametrize("case", FILE_NAMES)
def test_the_picture_of_the_xml_files_own_name_goes_first(tmp_path: Path, case: str) -> None:
    filename, name, expected = FILE_NAMES[case]
    files = {"JPEGImages/b.png": None, "Annotations/b.xml": xml(filename="b.png")}
    dataset = one(tmp_path, xml(filename=filename), **files)
    assert set(boxes(dataset)) == {name, "b.png"} and codes(dataset) == expected


def test_of_pictures_that_differ_in_suffix_the_filename_chooses(tmp_path: Path) -> None:
    dataset = one(tmp_path, xml(filename="a.png"), **{"JPEGImages/a.bmp": None})
    assert set(boxes(dataset)) == {"a.png"}


def test_without_a_picture_of_its_own_name_the_filename_is_taken(tmp_path: Path) -> None:
    write(tmp_path, {"Annotations/0001.xml": xml(filename="photo.png"), "images/photo.png": None})
    dataset = read(tmp_path)
    assert boxes(dataset) == {"photo.png": [PIXELS]} and codes(dataset) == {}


def test_a_missing_picture_is_named_and_pictures_without_xml_are_noted(tmp_path: Path) -> None:
    files = {"JPEGImages/alone.png": None, "Annotations/gone.xml": xml(filename="gone.png")}
    dataset = one(tmp_path, XML, **files)
    assert boxes(dataset) == {"a.png": [PIXELS]} and codes(dataset) == {"file-missing": 1, "picture-unlabeled": 1}
    assert "gone.png" in words(dataset) and "alone.png: no XML file" in words(dataset)


def test_an_xml_file_that_a_list_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    dataset = one(tmp_path, XML, **{"ImageSets/Main/train.txt": "a\nb\n"})
    assert codes(dataset) == {"json-unreadable": 1} and "there is no Annotations/b.xml" in words(dataset)
    write(tmp_path, {"ImageSets/Main/train.txt": "b\n"})
    assert "there is no Annotations/b.xml" in words(read(tmp_path))


ENCODINGS = {
    "utf-8": "", "utf-8-sig": "", "utf-16": '<?xml version="1.0" encoding="UTF-16"?>\n',
    "iso-8859-1": '<?xml version="1.0" encoding="ISO-8859-1"?>', "cp1252": "<?xml version='1.0' encoding='cp1252' ?>",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_are_read_in_the_encoding_that_the_xml_declares(tmp_path: Path, encoding: str) -> None:
    text = xml(item(name="Zürich"), head=ENCODINGS[encoding]).encode(encoding)
    assert one(tmp_path, text).classes == ("Zürich",)


@pytest.mark.parametrize("encoding", ["gbk", "gb2312", "shift_jis", "euc-jp"])
def test_names_are_read_in_encodings_of_several_bytes_per_letter(tmp_path: Path, encoding: str) -> None:
    text = xml(item(name="日本"), head=f'<?xml version="1.0" encoding="{encoding}"?>').encode(encoding)
    assert one(tmp_path, text).classes == ("日本",)


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
FETCH = '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/hostname">]>'
BROKEN = {
    "cut off": (XML[:-20], "xml-broken", "Annotations/a.xml"),
    "empty": ("", "xml-broken", "no element found"),
    "another encoding": (xml(item(name="Zürich")).encode("latin-1"), "text-encoding", "expected UTF-8"),
    "an encoding that nobody knows": ('<?xml version="1.0" encoding="klingon"?>' + XML, "xml-broken", "klingon"),
    "entities": (xml(item(name="&b;"), head=BOMB), "xml-broken", "declares entities"),
    "entities in UTF-16": (xml(item(name="&b;"), head=BOMB).encode("utf-16"), "xml-broken", "declares entities"),
    "a file as an entity": (xml(item(name="&f;"), head=FETCH), "xml-broken", "declares entities"),
    "entities in an encoding of several bytes": (
        xml(head=f'<?xml version="1.0" encoding="gbk"?>{BOMB}').encode("gbk"), "xml-broken", "declares entities"
    ),
    "another format": ("<annotations><image/></annotations>", "data-unknown", "VOC's is 'annotation'"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "xml-broken", "not well-formed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_annotation_is_named_and_costs_no_other(tmp_path: Path, case: str) -> None:
    text, code, expected = BROKEN[case]
    files = {"JPEGImages/b.png": None, "Annotations/b.xml": xml(filename="b.png")}
    dataset = one(tmp_path, text, **files)
    assert codes(dataset) == {code: 1} and expected in words(dataset) and boxes(dataset) == {"b.png": [PIXELS]}


def test_a_document_type_without_entities_is_read(tmp_path: Path) -> None:
    assert codes(one(tmp_path, xml(head="<!DOCTYPE annotation>"))) == {}
