"""Ids, numbers, names, sizes and categories that have one meaning are read and counted; what is not is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets import json_parts
from gndet.data.datasets.coco import inspect_file, to_coco
from gndet.data.datasets.comparing import between
from gndet.data.datasets.faults import FAULTS
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.ids import to_integer
from gndet.data.datasets.reading import inspect_both
from gndet.data.records import Dataset
from gndet.toolbox.check.check import check

PLAIN = DataConfig(cache="")
Tree = dict[str, Any]


def tree() -> Tree:
    """A good file: three images of 20 x 30 with two objects each."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in (1, 2, 3)]
    annotations = [
        {
            "id": i + 1, "image_id": i // 2 + 1, "category_id": i % 2 + 1, "bbox": [i, 2, 6.5, 6], "area": 39.0,
            "iscrowd": 0, "segmentation": [[i, 2, i + 6.5, 2, i + 6.5, 8, i, 8]],
        }
        for i in range(6)
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [category(1, "cup"), category(2, "plate")]}


def category(number: Any, name: Any, parent: str = "") -> dict[str, Any]:
    return {"id": number, "name": name, "supercategory": parent or "none"}


def write(folder: Path, content: Tree, name: str = "file.json") -> Path:
    for image in content["images"]:
        Image.new("RGB", (30, 20)).save(folder / image["file_name"])
    (folder / name).write_text(json.dumps(content))
    return folder / name


def read(folder: Path, content: Tree) -> Dataset:
    return inspect_file(write(folder, content), folder, PLAIN)


def codes(dataset: Dataset) -> dict[str, tuple[str, int]]:
    return {one.code: (one.severity, one.count) for one in dataset.findings}


def texts(dataset: Dataset) -> str:
    return "\n".join(example for one in dataset.findings for example in one.examples)


def content(dataset: Dataset, *, ids: bool = True) -> list[Any]:
    return [
        (r.image_id, r.file_name, r.size, r.boxes.tolist(), r.labels.tolist(), r.area.tolist(),
         r.annotation_ids.tolist() if ids else None, list(r.segmentations))
        for r in dataset.records
    ]  # fmt: skip


def each(key: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Tree], Any]:
    return lambda t: [item.update(change(item)) for item in t[key]]


def texted(value: Any) -> Any:
    return [texted(part) for part in value] if isinstance(value, list) else str(value)


def both(*changes: Callable[[Tree], Any]) -> Callable[[Tree], Any]:
    return lambda t: [change(t) for change in changes]


LENIENT: dict[str, tuple[Callable[[Tree], Any], dict[str, int]]] = {  # what is written otherwise, and what is told
    "annotation ids as text": (each("annotations", lambda a: {"id": str(a["id"])}), {"number-text": 6}),
    "image ids as text": (
        both(
            each("images", lambda i: {"id": str(i["id"])}),
            each("annotations", lambda a: {"image_id": str(a["image_id"])}),
        ),
        {"number-text": 9},
    ),
    "image ids as text in images": (each("images", lambda i: {"id": f"{i['id']:012d}"}), {"number-text": 3}),
    "category ids as text": (
        each("annotations", lambda a: {"category_id": f"{a['category_id']}.0"}), {"number-text": 6}
    ),
    "one category id as text": (lambda t: t["categories"][1].update(id="2"), {"number-text": 1}),
    "sides as text": (each("images", lambda i: {"width": "30", "height": " 20.0 "}), {"number-text": 3}),
    "boxes as text": (each("annotations", lambda a: {"bbox": texted(a["bbox"])}), {"number-text": 6}),
    "one number as text": (lambda t: t["annotations"][3]["bbox"].__setitem__(2, "6.5"), {"number-text": 1}),
    "outlines as text": (
        each("annotations", lambda a: {"segmentation": texted(a["segmentation"])}), {"number-text": 6}
    ),
    "all numbers as text": (
        each("annotations", lambda a: {key: texted(value) for key, value in a.items()}), {"number-text": 6}
    ),
    "sizes missing": (lambda t: [i.pop("width") and i.pop("height") for i in t["images"]], {"size-missing": 3}),
    "sizes null or 0": (lambda t: t["images"][1].update(width=None, height=0), {"size-missing": 1}),
    "one side missing": (lambda t: t["images"][1].pop("width"), {"size-missing": 1}),
    "no supercategory": (lambda t: [c.pop("supercategory") for c in t["categories"]], {}),
    "supercategory null": (each("categories", lambda c: {"supercategory": None}), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LENIENT)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_a_file_that_writes_numbers_otherwise_is_the_same_file(
    tmp_path: Path, kind: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(read(tmp_path, tree()))
    if parts:
        monkeypatch.setattr(json_parts, "LEAST", 0)
        monkeypatch.setattr(json_parts, "PART", 100)
    change, told = LENIENT[kind]
    changed = tree()
    change(changed)
    dataset = read(tmp_path, changed)
    assert codes(dataset) == {code: ("F", count) for code, count in told.items()}
    assert content(dataset) == expected


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("12", 12), ("12.0", 12), (" -3 ", -3), ("007", 7), (12.0, 12), (2**63 - 1, 2**63 - 1), ("1e3", None),
        ("12.5", None), ("", None), ("0x1f", None), ("1_000", None), ("٣", None), ("nan", None), (True, None),
        ("9" * 5000, None), (str(2**63), None), (None, None), ("1,000", None),
    ],
)  # fmt: skip
def test_only_plain_digits_are_an_integer(value: Any, number: int | None) -> None:
    assert to_integer(value) == number


@pytest.mark.parametrize("number", ["ten", "1,5", "", "nan", "inf", "0x10", "5 px"])
def test_text_that_is_no_plain_number_stays_refused(tmp_path: Path, number: str) -> None:
    changed = tree()
    changed["annotations"][2]["bbox"][0] = number
    dataset = read(tmp_path, changed)
    assert codes(dataset) == {"box-malformed": ("E", 1)} and f"annotation 3: bbox [{number!r}, 2" in texts(dataset)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize(
    ("new", "told"),
    [
        (dict.fromkeys(range(6)), "annotations[0]: no integer id"),
        ({i: f"00000000-0000-{i:04d}" for i in range(6)}, "annotations[0] (id '00000000-0000-0000'): no integer id"),
        ({3: None}, "annotations[3]: no integer id"),
        ({5: 2**70}, f"annotations[5] (id {2**70}): no integer id"),
        ({1: "b7", 4: 4.5, 5: [1]}, "annotations[4] (id 4.5): no integer id"),
    ],
    ids=["missing", "uuid", "one", "huge", "mixed"],
)
def test_annotations_without_ids_are_numbered_by_their_place(
    tmp_path: Path, new: dict[int, Any], told: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(json_parts, "LEAST", 0)
        monkeypatch.setattr(json_parts, "PART", 100)
    changed = tree()
    for place, number in new.items():
        changed["annotations"][place]["id"] = number
    changed["annotations"][0 if 0 not in new else 2].pop("iscrowd")
    dataset = read(tmp_path, changed)
    assert codes(dataset) == {"annotation-id": ("F", len(new))} and told in texts(dataset)
    assert [n for r in dataset.records for n in r.annotation_ids.tolist()] == [1, 2, 3, 4, 5, 6]
    assert content(dataset) == content(read(tmp_path, tree()))
    truth = COCO()
    truth.dataset = to_coco(dataset)
    truth.createIndex()
    assert len(truth.anns) == 6


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_a_fault_of_an_annotation_without_an_id_names_its_place(
    tmp_path: Path, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(json_parts, "LEAST", 0)
        monkeypatch.setattr(json_parts, "PART", 100)
    changed = tree()
    changed["annotations"][3] |= {"id": None, "bbox": [90, 2, 5, 5]}
    changed["annotations"][4] |= {"id": "b7", "segmentation": "?"}
    changed["annotations"][5] |= {"id": "c8", "image_id": 9}
    said = texts(read(tmp_path, changed))
    assert "annotations[3]: bbox [90, 2, 5, 5] in an image of width 30" in said
    assert "annotations[4] (id 'b7'): segmentation '?'" in said and "annotations[5] (id 'c8'): image_id 9 is" in said


NAMED: dict[str, tuple[dict[Any, Any], str]] = {
    "file names": ({1: "1.png", 2: "2.png", 3: "3.png"}, "image id '1.png' becomes 1"),
    "uuids": ({1: "e58ed763-928c", 2: "0b2c", 3: "12345678"}, "image id 'e58ed763-928c' becomes 1"),
    "zeros": ({1: "001", 2: "01", 3: "1a"}, "image id '01' becomes 2"),
    "mixed": ({1: "a", 2: 1, 3: 2}, "image id 'a' becomes 3"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_image_ids_that_are_names_are_numbered(
    tmp_path: Path, kind: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(json_parts, "LEAST", 0)
        monkeypatch.setattr(json_parts, "PART", 100)
    new, told = NAMED[kind]
    changed = tree()
    for item, key in [(i, "id") for i in changed["images"]] + [(a, "image_id") for a in changed["annotations"]]:
        item[key] = new[item[key]]
    dataset = read(tmp_path, changed)
    assert codes(dataset) == {"image-id-text": ("F", sum(isinstance(n, str) for n in new.values()))}
    assert told in texts(dataset)
    assert [row[1:] for row in content(dataset)] == [row[1:] for row in content(read(tmp_path, tree()))]
    assert len({record.image_id for record in dataset.records}) == 3


def test_a_number_is_no_name_and_a_name_of_nothing_is_refused(tmp_path: Path) -> None:
    changed = tree()
    for image, name in zip(changed["images"], "abc", strict=True):
        image["id"] = name
    dataset = read(tmp_path, changed)  # image_id 1 must not become the first image
    assert codes(dataset)["image-unknown"] == ("E", 6)
    changed["annotations"][0]["image_id"] = "A"
    assert "annotation 1: image_id 'A' is not in the file" in texts(read(tmp_path, changed))
    changed["images"][1]["id"] = "a"
    assert "image id 'a' occurs twice" in texts(read(tmp_path, changed))


@pytest.mark.parametrize("names", [{1: "cup", 2: "plate"}, {1: "c1", 2: "c2"}, {1: 7, 2: "x"}])
def test_category_ids_that_are_names_are_numbered(tmp_path: Path, names: dict[int, Any]) -> None:
    changed = tree()
    for item, key in [(c, "id") for c in changed["categories"]] + [(a, "category_id") for a in changed["annotations"]]:
        item[key] = names[item[key]]
    dataset = read(tmp_path, changed)
    assert codes(dataset)["category-id-text"] == ("F", sum(isinstance(n, str) for n in names.values()))
    assert dataset.classes == ("cup", "plate") and content(dataset) == content(read(tmp_path, tree()))


def test_category_names_that_are_numbers_are_text(tmp_path: Path) -> None:
    changed = tree()
    changed["categories"] = [category(1, 0), category(2, 1.5)]
    dataset = read(tmp_path, changed)
    assert dataset.classes == ("0", "1.5") and codes(dataset) == {"category-name-number": ("F", 2)}
    changed["categories"] = [category(1, 0), category(2, "0")]
    assert codes(read(tmp_path, changed))["category-name-twice"] == ("E", 1)


def test_a_missing_size_needs_the_picture(tmp_path: Path) -> None:
    changed = tree()
    del changed["images"][0]["width"], changed["images"][0]["height"]
    file = write(tmp_path, changed)
    assert codes(inspect_file(file, None, PLAIN))["image-size"] == ("E", 1)
    (tmp_path / "a" / "b").mkdir(parents=True)
    lines: list[str] = []
    assert not check(str(file.rename(tmp_path / "a" / "b" / "file.json")), ["data.cache="], lines.append)
    assert "--image-folder" in "\n".join(lines)
    changed["images"][0]["width"] = 31
    dataset = read(tmp_path, changed)
    assert "image 1: width 31, height None" in texts(dataset) and codes(dataset)["image-size"] == ("E", 1)


def test_a_missing_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    changed = tree()
    del changed["images"][0]["width"], changed["images"][0]["height"]
    file, exif = write(tmp_path, changed), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(tmp_path / "1.png", "JPEG", exif=exif)
    dataset = inspect_file(file, tmp_path, PLAIN)
    assert dataset.records[0].size == (20, 30) and dataset.records[0].load().shape == (20, 30, 3)
    (tmp_path / "1.png").write_bytes(b"x" * 99)
    assert codes(inspect_file(file, tmp_path, PLAIN))["picture-unreadable"] == ("E", 1)


CATEGORIES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], int]] = {  # categories, classes, left out
    "root": ([category(0, "all"), category(1, "cup", "all"), category(2, "plate", "all")], ("cup", "plate"), 1),
    "same name": ([category(0, "cup"), category(1, "cup", "cup"), category(2, "plate", "cup")], ("cup", "plate"), 1),
    "same name last": ([category(1, "cup"), category(2, "plate"), category(9, "cup")], ("cup", "plate"), 1),
    "two roots": (
        [category(0, "a"), category(5, "b"), category(1, "cup", "a"), category(2, "plate", "b")], ("cup", "plate"), 2
    ),
    "its own parent": ([category(1, "cup", "cup"), category(2, "plate", "plate"), category(3, "pan", "pan")],
                       ("cup", "plate", "pan"), 0),
    "a plain unused class": (
        [category(1, "cup"), category(2, "plate"), category(3, "pan")], ("cup", "plate", "pan"), 0
    ),
    "a used root": ([category(1, "cup"), category(2, "plate", "cup")], ("cup", "plate"), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", CATEGORIES)
def test_only_categories_that_structure_the_file_are_left_out(tmp_path: Path, kind: str) -> None:
    categories, classes, left_out = CATEGORIES[kind]
    dataset = read(tmp_path, tree() | {"categories": categories})
    assert dataset.classes == classes and len(dataset.left_out) == left_out and not dataset.refused
    assert codes(dataset).get("category-left-out", ("F", 0)) == ("F", left_out)
    assert content(dataset) == content(read(tmp_path, tree()))


def test_two_used_categories_of_one_name_stay_refused(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree() | {"categories": [category(1, "cup"), category(2, "cup")]})
    assert codes(dataset) == {"category-name-twice": ("E", 1)}


def test_train_and_val_of_one_export_keep_the_same_classes(tmp_path: Path) -> None:
    """Val has no object of a class that train has objects of, and that looks like a root or a double there."""
    exports = [
        [category(0, "vehicle"), category(1, "cup", "vehicle"), category(2, "plate", "vehicle")],
        [category(1, "cup"), category(2, "plate"), category(3, "cup")],
    ]
    for categories, used in ((exports[0], (0, 1, 2)), (exports[0], (1, 2)), (exports[1], (2, 3))):
        train, val = tree(), tree()
        for place, item in enumerate(train["annotations"]):
            item["category_id"] = used[place % len(used)]
        for item in val["annotations"]:
            item["category_id"] = 2
        write(tmp_path, train | {"categories": categories}, "train.json")
        write(tmp_path, val | {"categories": categories}, "val.json")
        sets = {part: DatasetConfig(annotations=f"{part}.json", images=".") for part in ("train", "val")}
        for root, cache in (
            (tmp_path, ""),
            (tmp_path, str(tmp_path.parent / "cache")),
            (tmp_path, str(tmp_path.parent / "cache")),
        ):
            a, b = inspect_both(DataConfig(root=str(root), cache=cache, **sets), masks=True)
            assert a.classes == b.classes and a.category_ids == b.category_ids
            assert not any(one.code == "classes-differ" for one in between(a, b))
            for dataset, whole in ((a, train), (b, val)):
                names = [dataset.category_ids[label] for r in dataset.records for label in r.labels]
                assert names == [item["category_id"] for item in whole["annotations"]]
    chosen = DataConfig(root=str(tmp_path), cache="", classes=("plate", "cup"), **sets)
    a, b = inspect_both(chosen, masks=True)
    assert a.classes == b.classes == ("plate", "cup") and not b.refused


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_in_any_unicode_encoding_is_read(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tree()
    changed["categories"][0]["name"] = "größe 杯"
    file = write(tmp_path, changed)
    expected = content(inspect_file(file, tmp_path, PLAIN))
    file.write_bytes(json.dumps(changed, ensure_ascii=False).encode(encoding))
    for least in (json_parts.LEAST, 0):
        monkeypatch.setattr(json_parts, "LEAST", least)
        dataset = inspect_file(file, tmp_path, PLAIN)
        assert codes(dataset) == {} and content(dataset) == expected and dataset.classes[0] == "größe 杯"
    assert guess_folder(file) == tmp_path


@pytest.mark.parametrize(
    ("encoding", "text"), [("latin-1", "Größe"), ("cp1252", "“cup”"), ("gbk", "杯子"), ("cp1251", "чашка")]
)
@pytest.mark.parametrize("least", [json_parts.LEAST, 0])
def test_another_encoding_is_named_with_its_place(
    tmp_path: Path, encoding: str, text: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_parts, "LEAST", least)
    changed = tree()
    changed["categories"][0]["name"] = text
    file = write(tmp_path, changed)
    raw = json.dumps(changed, ensure_ascii=False).encode(encoding)
    file.write_bytes(raw)
    dataset = inspect_file(file, tmp_path, PLAIN)
    assert codes(dataset) == {"text-encoding": ("E", 1)} and "UTF-8" in FAULTS["text-encoding"].remedy
    first = next(place for place, byte in enumerate(raw) if byte > 127)
    assert f"byte {first} ({raw[first]:#04x}) is not UTF-8" in texts(dataset)
    assert not check(str(file), ["data.cache="], lambda _: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [{}], "categories": [{}]}', "annotations is missing; it has images, categories"),
        ('{"images": [{}], "annotations": []}', "categories is missing; it has images, annotations"),
        ('{"images": [{}]}', "annotations and categories are missing; it has images"),
        ("{}", "images and annotations and categories are missing; it is empty"),
        ('{"images": [{}], "annotations": null, "categories": [{}]}', "annotations: None, expected a list"),
        ('{"images": [{}], "annotations": [{}, 5], "categories": [{}]}', "annotations[1]: 5, expected an object"),
        ('{"id": 1}\n{"id": 2}\n', "JSON Lines, one object per line"),
        ('{"id": 1}\r\n\r\n  {"id": 2}', "JSON Lines, one object per line"),
        ('{"id": 1} x', "not a JSON file: Extra data"),
        ('[{"image": "a.png", "annotations": [{"coordinates": {"x": 1}}]}]', "CreateML's JSON; export COCO's JSON"),
        ('{"shapes": [], "imagePath": "a.png", "version": "5"}', "LabelMe's JSON of one picture; give the folder"),
        ("0 0.5 0.5 0.2 0.2\n1 0.3 0.3 0.1 0.1\n", "YOLO's labels of one picture"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "file.json").write_text(text)
    dataset = inspect_file(tmp_path / "file.json", None, PLAIN)
    assert dataset.refused and words in texts(dataset)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_panoptic_annotations_are_named(tmp_path: Path, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        monkeypatch.setattr(json_parts, "LEAST", 0)
        monkeypatch.setattr(json_parts, "PART", 100)
    changed = tree()
    segment = {"id": 7, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}
    changed["annotations"] = [{"image_id": i, "file_name": f"{i}.png", "segments_info": [segment]} for i in (1, 2, 3)]
    dataset = read(tmp_path, changed)
    assert codes(dataset) == {"json-other": ("E", 1)} and "panoptic" in texts(dataset)


def test_many_classes_are_told_briefly(tmp_path: Path) -> None:
    changed = tree()
    changed["categories"] += [category(number, f"class {number}") for number in range(3, 1204)]
    lines: list[str] = []
    assert check(str(write(tmp_path, changed)), ["data.cache="], lines.append)
    assert max(map(len, lines)) < 300 and len(lines) < 150 and "and 1103 more classes" in "\n".join(lines)
    assert np.all([len(example) < 200 for one in read(tmp_path, changed).findings for example in one.examples])
