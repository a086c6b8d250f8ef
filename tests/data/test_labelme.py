"""LabelMe's files are read as the same data in COCO's JSON; a bad shape costs that shape, named with file and place."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labeled import assert_equal, codes, examples, first_pictures, make_pictures, read, window
from PIL import Image
from pycocotools import mask as coco_mask

from gndet.data.datasets.exports.labelme import open_labelme
from gndet.data.datasets.segmentation import to_rle

SQUARE = [[5, 6], [25, 6], [25, 36], [5, 36]]


def shape(label: Any = "cup", points: Any = None, kind: str | None = "polygon", **more: Any) -> dict[str, Any]:
    points = SQUARE if points is None else points
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | more


def content(*shapes: Any, **more: Any) -> dict[str, Any]:
    """Return the content of a file for a picture of 96 x 72 pixels."""
    base = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": "a.png", "imageData": None}
    return base | {"imageHeight": 72, "imageWidth": 96} | more


def write(folder: Path, *shapes: Any, name: str = "a.json", **more: Any) -> Path:
    """Write a file, and its picture a.png beside it.  Returns the folder."""
    make_pictures(folder, "a.png")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content(*shapes, **more)))
    return folder


def png(pixels: np.ndarray) -> str:
    """Return a mask (h, w) bool as LabelMe embeds it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def mask_shape(pixels: np.ndarray, left: int, top: int, **more: Any) -> dict[str, Any]:
    height, width = pixels.shape
    points = [[left, top], [left + width - 1, top + height - 1]]
    return shape(points=points, kind="mask", mask=png(pixels), **more)


def to_shapes(item: dict[str, Any], group: int) -> list[dict[str, Any]]:
    """Return an annotation as LabelMe writes it, the parts of an object as a group."""
    mask = item.get("segmentation")
    if isinstance(mask, dict):
        return [mask_shape(*window(mask), label=item["name"])]
    if mask:
        groups = {"group_id": group if len(mask) > 1 else None}
        return [shape(item["name"], np.reshape(part, (-1, 2)).tolist(), **groups) for part in mask]
    x, y, width, height = item["bbox"]
    return [shape(item["name"], [[x + width, y], [x, y + height]], "rectangle")]  # the corners in any order


@pytest.mark.parametrize(("name", "num"), [("bccd", 20), ("nuclei", 8), ("coco", 20)])
def test_real_data_reads_as_its_coco_json(data_root: Path, tmp_path: Path, name: str, num: int) -> None:
    truth = first_pictures(data_root, tmp_path, name, num)
    folder = tmp_path / "labels"
    folder.mkdir()
    for image, items in truth.pictures():
        shapes = [part for group, item in enumerate(items) for part in to_shapes(item, group)]
        sides = {"imageHeight": image["height"], "imageWidth": image["width"]}
        file = content(*shapes, imagePath=f"..\\pictures\\{image['file_name']}", **sides)
        (folder / image["file_name"]).with_suffix(".json").write_text(json.dumps(file))
    dataset = read(open_labelme, folder, truth.images)
    assert set(dataset.classes) == set(truth.dataset.classes)
    assert_equal(dataset, truth.dataset, boxes=0.02 if name == "coco" else 1e-6)


def test_each_kind_of_shape_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((9, 7)) < 0.5
    dataset = read(open_labelme, write(
        tmp_path,
        shape(),
        shape(kind=None),  # as old versions wrote polygons
        shape("plate", [[40, 30], [10, 5]], "rectangle"),
        shape("plate", [[10, 5], [40, 5], [40, 30], [10, 30]], "rectangle"),  # as X-AnyLabeling writes it
        shape("plate", [[48, 36], [48, 16]], "circle"),
        shape("plate", [[20, 10], [30, 20], [20, 30], [10, 20]], "rotation"),
        mask_shape(pixels, 80, 60),
    ))  # fmt: skip
    assert codes(dataset) == {} and dataset.classes == ("cup", "plate")
    record = dataset.records[0]
    assert record.boxes[:5].tolist() == [
        [5, 6, 25, 36], [5, 6, 25, 36], [10, 5, 40, 30], [10, 5, 40, 30], [28, 16, 68, 56]
    ]  # fmt: skip
    masks = [None if mask is None else coco_mask.decode(to_rle(mask, (72, 96))) for mask in record.segmentations]
    assert masks[2] is masks[3] is None
    assert masks[5].sum() == pytest.approx(200, rel=0.06)
    assert masks[4].sum() == pytest.approx(np.pi * 20**2, rel=0.01)
    assert (masks[6][60:69, 80:87] == pixels).all() and masks[6].sum() == pixels.sum()


def test_shapes_of_one_label_and_group_are_one_object(tmp_path: Path) -> None:
    parts = [[[x, 10], [x + 10, 10], [x + 10, 20], [x, 20]] for x in (0, 20, 40, 60)]
    dataset = read(open_labelme, write(
        tmp_path,
        shape(points=parts[0], group_id=0),
        shape("plate", parts[1], group_id=0),
        shape(points=parts[2], group_id=0),
        shape(points=parts[3]),
        mask_shape(np.ones((2, 2), dtype=bool), 70, 50, group_id=2),
        shape(points=[[80, 50], [84, 54]], kind="rectangle", group_id=2),
    ))  # fmt: skip
    assert codes(dataset) == {"shape-joined": 2}
    assert examples(dataset, "shape-joined").startswith("a.json, shapes[0]: 2 shapes of cup")
    record = dataset.records[0]
    assert record.boxes.tolist() == [[0, 10, 50, 20], [20, 10, 30, 20], [60, 10, 70, 20], [70, 50, 84, 54]]
    assert [coco_mask.area(to_rle(mask, (72, 96))) for mask in record.segmentations] == [200, 100, 100, 20]


def test_points_lines_and_background_are_no_objects(tmp_path: Path) -> None:
    lines = [shape(points=[[1, 2], [3, 4]], kind=kind) for kind in ("line", "linestrip", "point", "points")]
    dataset = read(open_labelme, write(tmp_path, *lines, shape("__ignore__"), shape("_background_"), shape()))
    assert codes(dataset) == {"shape-other": 6} and len(dataset.records[0].labels) == 1
    assert "a.json, shapes[0]: a line" in examples(dataset, "shape-other")


BAD: list[tuple[Any, str, str]] = [
    (shape(points=[[1, 2], [3, 4]]), "polygon-short", "2 points"),
    (shape(points=[]), "polygon-short", "0 points"),
    (shape(points=[1, 2, 3, 4]), "shape-malformed", "expected [[x, y], ...]"),
    (shape(points=[["1", "2"], [3, 4], [5, 6]]), "shape-malformed", "expected [[x, y], ...]"),
    (shape(points=[[1, 2], [3, 4]], kind="circle") | {"points": [[1, 2], [1, 2]]}, "shape-malformed", "radii 0"),
    (shape(points=[[1, 2]], kind="rectangle"), "shape-malformed", "1 points, expected 2"),
    (shape(points=[[1, 2], [1, 9]], kind="rectangle"), "box-empty", "bbox"),
    (shape(points=[[100, 2], [120, 9]], kind="rectangle"), "box-outside", "width 96"),
    (shape(points=[[float("nan"), 2], [20, 9]], kind="rectangle"), "box-malformed", "nan"),
    (shape(None), "shape-label", "label None"),
    (shape(" "), "shape-label", "label ' '"),
    ("a text", "shape-label", "label None"),
    (shape(points=[[1, 2], [3, 4]], kind="mask", mask=None), "shape-malformed", "expected a PNG in base64"),
    (shape(points=[[1, 2], [3, 4]], kind="mask", mask="AAAA"), "shape-malformed", "expected a PNG in base64"),
    (mask_shape(np.ones((9, 9), dtype=bool), 5, 5) | {"points": [[5, 5], [30, 30]]}, "shape-malformed", "9 x 9 pixels"),
    (mask_shape(np.zeros((9, 9), dtype=bool), 5, 5), "mask-empty", "9 x 9 pixels"),
    (shape(points=[[1, 2], [9e4, 9e4]], kind="mask", mask=png(np.ones((9, 9), dtype=bool))), "shape-malformed", "89"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_shape_costs_that_shape_and_is_named_with_its_place(tmp_path: Path, number: int) -> None:
    bad, code, words = BAD[number]
    dataset = read(open_labelme, write(tmp_path, shape(), bad, shape()))
    assert codes(dataset) == {code: 1}
    assert "a.json, shapes[1]: " in examples(dataset, code) and words in examples(dataset, code)
    assert len(dataset.records[0].labels) == 2


PATHS = {  # imagePath: where the picture is, the annotations being in labels/
    "a.png": "labels/a.png",
    "../pictures/a.png": "pictures/a.png",
    "..\\pictures\\a.png": "pictures/a.png",
    "..\\images\\a.png": "images/a.png",
    "C:\\Users\\me\\a.png": "labels/a.png",
    "/home/me/images/a.png": "images/a.png",
    "sub/a.png": "labels/sub/a.png",
}


@pytest.mark.parametrize("stated", PATHS)
def test_the_picture_is_found_by_its_path_or_by_its_last_part(tmp_path: Path, stated: str) -> None:
    write(tmp_path / "labels", shape(), imagePath=stated)
    (tmp_path / "labels" / "a.png").unlink()
    make_pictures(tmp_path, PATHS[stated])
    images = tmp_path / "pictures" if "pictures" in stated else None
    dataset = read(open_labelme, tmp_path / "labels", images)
    assert codes(dataset) == {} and dataset.records[0].load().shape == (72, 96, 3)


def test_a_renamed_picture_is_found_by_the_name_of_its_file(tmp_path: Path) -> None:
    dataset = read(open_labelme, write(tmp_path, shape(), name="a.JSON", imagePath="IMG 1.jpg"))
    assert codes(dataset) == {"picture-renamed": 1}
    assert "a.JSON: imagePath 'IMG 1.jpg', read 'a.png'" in examples(dataset, "picture-renamed")
    assert len(dataset.records) == 1


def test_a_picture_that_is_only_embedded_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, shape(), name="b.json", imagePath="b.png", imageData="iVBORw0KGgo=")
    write(tmp_path, shape(), imageData="iVBORw0KGgo=")  # its picture is there
    dataset = read(open_labelme, tmp_path)
    assert codes(dataset) == {"picture-embedded": 1} and "b.json" in examples(dataset, "picture-embedded")
    assert len(dataset.records) == 1


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    write(tmp_path, shape(), name="b.json", imagePath="b.png")
    assert codes(read(open_labelme, tmp_path)) == {"file-missing": 1}


def test_a_missing_size_is_read_from_the_picture(tmp_path: Path) -> None:
    pixels = np.ones((9, 7), dtype=bool)
    for sides in ({"imageHeight": None, "imageWidth": None}, {"imageHeight": 72, "imageWidth": None}):
        dataset = read(open_labelme, write(tmp_path, shape(), mask_shape(pixels, 80, 60), **sides))
        assert codes(dataset) == {} and dataset.records[0].size == (72, 96)


def test_other_json_files_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, shape())
    (tmp_path / "classes.json").write_text('{"names": ["cup"]}')
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7")  # from an archive of a Mac
    dataset = read(open_labelme, tmp_path)
    assert not dataset.refused and len(dataset.records) == 1
    assert any(note.startswith("1 of 2 JSON files are not LabelMe's") for note in dataset.notes)


def test_files_below_a_folder_are_found_with_their_pictures(tmp_path: Path) -> None:
    write(tmp_path / "day", shape())
    write(tmp_path / "night", shape("plate"))
    dataset = read(open_labelme, tmp_path)
    assert codes(dataset) == {} and [record.file_name for record in dataset.records] == ["day/a.png", "night/a.png"]


def test_one_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, shape(), name="b.json")
    assert len(read(open_labelme, write(tmp_path, shape()) / "a.json").records) == 1


REFUSED = {
    "no files": (None, "data-unknown", "no JSON file of LabelMe's"),
    "another format": (
        '{"images": [], "annotations": [], "categories": []}',
        "data-unknown",
        "no JSON file of LabelMe's",
    ),
    "cut": (json.dumps(content(shape()))[:-9], "json-broken", "not a JSON file"),
    "another encoding": (
        json.dumps(content(shape("größe")), ensure_ascii=False).encode("latin-1"),
        "text-encoding",
        "UTF-8",
    ),
    "no shapes": (json.dumps(content(shapes=None)), "data-unknown", "shapes is not a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_labelmes_is_refused(tmp_path: Path, name: str) -> None:
    text, code, words = REFUSED[name]
    if text is not None:
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = read(open_labelme, tmp_path)
    assert list(codes(dataset)) == [code] and words in examples(dataset, code)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_read(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(content(shape("größe 杯"), imagePath="größe 杯.png"), ensure_ascii=False)
    (tmp_path / "größe 杯.json").write_text(text, encoding=encoding)
    make_pictures(tmp_path, "größe 杯.png")
    dataset = read(open_labelme, tmp_path)
    assert codes(dataset) == {} and dataset.classes == ("größe 杯",)
