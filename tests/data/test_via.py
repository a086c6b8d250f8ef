"""VIA's projects, JSON and CSV are read as the same data in COCO's JSON, and their class attribute is found."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labeled import assert_equal, codes, examples, first_pictures, make_pictures, read
from pycocotools import mask as coco_mask

from gndet.data.datasets.exports.via import open_via
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import Dataset

RECT = {"name": "rect", "x": 5, "y": 6, "width": 20, "height": 30}
COLUMNS = (
    "filename", "file_size", "file_attributes", "region_count", "region_id", "region_shape_attributes",
    "region_attributes",
)  # fmt: skip
FORMS = ("project", "regions", "via1", "csv")


def region(shape: Any = RECT, **attributes: Any) -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": attributes}


def write(path: Path, form: str, pictures: dict[str, list[Any]], attributes: Any = None) -> Path:
    """Write regions by picture in one of FORMS; attributes: those of regions that a project declares."""
    files = {
        f"{name}123": {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}
        for name, regions in pictures.items()
    }
    if form == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            for name, regions in pictures.items():
                for number, (shape, values) in enumerate(map(dict.values, regions)):
                    row = (name, 123, "{}", len(regions), number, json.dumps(shape), json.dumps(values))
                    table.writerow(row)
                if not regions:
                    table.writerow((name, 123, "{}", 0, 0, "{}", "{}"))
        return path
    if form == "via1":
        for file in files.values():
            file |= {"regions": {str(i): item for i, item in enumerate(file["regions"])}, "base64_img_data": ""}
    content: dict[str, Any] = files
    if form == "project":
        settings = {"core": {"default_filepath": ""}, "project": {"name": "x"}}
        declared = {"region": attributes or {}, "file": {}}
        content = {"_via_settings": settings, "_via_img_metadata": files, "_via_attributes": declared}
    path.write_text(json.dumps(content))
    return path


def small(folder: Path, *regions: Any, form: str = "regions", attributes: Any = None) -> Dataset:
    """Read a file with the regions of a picture a.png of 96 x 72 pixels."""
    make_pictures(folder, "a.png")
    return read(open_via, write(folder / "via", form, {"a.png": list(regions)}, attributes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bccd", "coco"])
def test_real_data_reads_as_its_coco_json(data_root: Path, tmp_path: Path, name: str, form: str) -> None:
    truth = first_pictures(data_root, tmp_path, name, 15, lambda item: len(item.get("segmentation") or [[]]) == 1)
    pictures = {}
    for image, items in truth.pictures():
        shapes = []
        for item in items:
            shape: dict[str, Any] = dict(zip(("x", "y", "width", "height"), item["bbox"], strict=True)) | {
                "name": "rect"
            }
            if mask := item.get("segmentation"):
                shape = {"name": "polygon", "all_points_x": mask[0][::2], "all_points_y": mask[0][1::2]}
            shapes.append(region(shape, label=item["name"]))
        pictures[image["file_name"]] = shapes
    dataset = read(open_via, write(tmp_path / "via", form, pictures), truth.images)
    assert set(dataset.classes) == set(truth.dataset.classes)
    assert_equal(dataset, truth.dataset, boxes=0.02 if name == "coco" else 1e-6)


def test_each_kind_of_shape_is_read(tmp_path: Path) -> None:
    dataset = small(
        tmp_path,
        region(kind="cup"),
        region({"name": "circle", "cx": 48, "cy": 36, "r": 20.5}, kind="cup"),
        region({"name": "ellipse", "cx": 48, "cy": 36, "rx": 30, "ry": 12}, kind="cup"),
        region({"name": "ellipse", "cx": 48, "cy": 36, "rx": 30, "ry": 12, "theta": np.pi / 2}, kind="plate"),
    )
    assert codes(dataset) == {} and dataset.classes == ("cup", "plate")
    boxes = [[5, 6, 25, 36], [27.5, 15.5, 68.5, 56.5], [18, 24, 78, 48], [36, 6, 60, 66]]
    np.testing.assert_allclose(dataset.records[0].boxes, boxes)
    areas = [coco_mask.area(to_rle(mask, (72, 96))) for mask in list(dataset.records[0].segmentations)[1:]]
    np.testing.assert_allclose(areas, np.pi * np.array([20.5**2, 360, 360]), rtol=0.01)


def test_points_and_lines_are_no_objects(tmp_path: Path) -> None:
    shapes = [{"name": "point", "cx": 1, "cy": 2}, {"name": "polyline", "all_points_x": [1], "all_points_y": [2]}]
    dataset = small(tmp_path, region(kind="cup"), *(region(shape, kind="cup") for shape in shapes))
    assert codes(dataset) == {"shape-other": 2} and "regions[1]: a point" in examples(dataset, "shape-other")


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_without_regions_is_a_negative(tmp_path: Path, form: str) -> None:
    make_pictures(tmp_path, "a.png", "b.png")
    dataset = read(open_via, write(tmp_path / "via", form, {"a.png": [region(kind="cup")], "b.png": []}))
    assert codes(dataset) == {} and [len(record.labels) for record in dataset.records] == [1, 0]


CLASSES = {  # the attributes of two regions: the classes
    "one attribute": ([{"kind": "cup"}, {"kind": "plate"}], ("cup", "plate")),
    "one that has values": ([{"kind": "cup", "note": ""}, {"kind": "plate", "note": ""}], ("cup", "plate")),
    "one of a known name": ([{"class": "cup", "color": "red"}, {"class": "plate"}], ("cup", "plate")),
    "in another case": ([{"Label": "cup", "color": "red"}, {"Label": "plate"}], ("cup", "plate")),
    "a checkbox": ([{"kind": {"cup": True}}, {"kind": {"cup": False, "plate": True}}], ("cup", "plate")),
    "a number": ([{"kind": 1}, {"kind": " 2 "}], ("1", "2")),
    "none": ([{}, {}], ("object",)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_is_the_only_attribute_or_the_one_of_a_known_name(tmp_path: Path, name: str, form: str) -> None:
    attributes, classes = CLASSES[name]
    dataset = small(tmp_path, *(region(**values) for values in attributes), form=form)
    assert codes(dataset) == {} and dataset.classes == classes
    assert dataset.records[0].labels.tolist() == [0, len(classes) - 1]
    assert any("class" in note for note in dataset.notes)


@pytest.mark.parametrize("names", [("color", "size"), ("class", "label")])
def test_attributes_of_which_none_is_surely_the_class_are_named(tmp_path: Path, names: tuple[str, str]) -> None:
    dataset = small(tmp_path, region(**dict.fromkeys(names, "cup")))
    assert codes(dataset) == {"class-attribute": 1}
    assert all(repr(name) in examples(dataset, "class-attribute") for name in names)


def test_a_projects_options_are_the_classes_in_their_order(tmp_path: Path) -> None:
    options = {"p": "plate", "c": "cup", "fork": ""}
    declared = {"kind": {"type": "dropdown", "description": "", "options": options, "default_options": {}}}
    regions = region(kind="c"), region(kind="fork"), region(kind="spoon")
    dataset = small(tmp_path, *regions, form="project", attributes=declared)
    assert dataset.classes == ("plate", "cup", "fork", "spoon")
    assert dataset.records[0].labels.tolist() == [1, 2, 3]


BAD: list[tuple[Any, str, str]] = [
    (region(kind=""), "shape-label", "kind '', expected one value"),
    (region(), "shape-label", "kind None"),
    (region(kind={"cup": True, "plate": True}), "shape-label", "'cup': True, 'plate': True"),
    (region(kind={"cup": False}), "shape-label", "expected one value"),
    (region({"name": "rect", "x": 1, "y": 2, "width": 3}, kind="cup"), "shape-malformed", "x, y, width, height"),
    (region({"name": "rect", "x": 1, "y": 2, "width": 0, "height": 3}, kind="cup"), "box-empty", "bbox"),
    (region({"name": "rect", "x": 96, "y": 2, "width": 9, "height": 3}, kind="cup"), "box-outside", "width 96"),
    (region({"name": "circle", "cx": 1, "cy": 2, "r": 0}, kind="cup"), "shape-malformed", "radii 0"),
    (region({"name": "circle", "cx": "1", "cy": 2, "r": 1}, kind="cup"), "shape-malformed", "cx, cy, r"),
    (region({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, kind="cup"), "shape-malformed", "[1, 2]"),
    (
        region({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1, 2]}, kind="cup"),
        "polygon-short",
        "2 points",
    ),
    (region({"name": "polygon"}, kind="cup"), "shape-malformed", "all_points_x None"),
    (region([], kind="cup"), "shape-malformed", "shape []"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_region_costs_that_region_and_is_named_with_its_place(tmp_path: Path, number: int, form: str) -> None:
    bad, code, words = BAD[number]
    dataset = small(tmp_path, region(kind="cup"), bad, region(kind="cup"), form=form)
    assert codes(dataset) == {code: 1} and words in examples(dataset, code)
    assert ("via, line 3: " if form == "csv" else "via, a.png, regions[1]: ") in examples(dataset, code)
    assert len(dataset.records[0].labels) == 2


def test_a_csv_with_commas_in_names_and_vias_own_quoting_is_read(tmp_path: Path) -> None:
    make_pictures(tmp_path, "a, b.png", "größe.png")
    cells = '"{}",1,0,"{""name"":""rect"",""x"":5,""y"":6,""width"":20,""height"":30}","{""kind"":""größe""}"'
    rows = [",".join(COLUMNS), *(f"{name},123,{cells}" for name in ("a, b.png", "größe.png"))]
    for mark, heading in (("", ""), ("", "#"), ("\ufeff", "")):
        (tmp_path / "via.csv").write_text(mark + heading + "\n".join(rows), encoding="utf-8")
        dataset = read(open_via, tmp_path / "via.csv")
        assert codes(dataset) == {} and dataset.classes == ("größe",)
        assert [record.file_name for record in dataset.records] == ["a, b.png", "größe.png"]


@pytest.mark.parametrize("comma", [";", "\t"])
def test_a_csv_that_a_table_program_has_written_anew_is_read(tmp_path: Path, comma: str) -> None:
    make_pictures(tmp_path, "a.png")
    rows = list(csv.reader(write(tmp_path / "via", "csv", {"a.png": [region(kind="cup")] * 2}).open(newline="")))
    with (tmp_path / "via").open("w", newline="") as file:
        csv.writer(file, delimiter=comma).writerows(rows)
    dataset = read(open_via, tmp_path / "via")
    assert codes(dataset) == {} and len(dataset.records[0].labels) == 2


@pytest.mark.parametrize("place", ["a.png", "images/a.png", "data/x/a.png", "../a.png"])
def test_the_pictures_are_found_near_the_file_and_where_the_project_says(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "set"
    make_pictures(folder, place)
    path = write(folder / "via.json", "project", {"a.png": [region(kind="cup")]})
    path.write_text(path.read_text().replace('"default_filepath": ""', '"default_filepath": "./data/x/"'))
    dataset = read(open_via, path)
    assert codes(dataset) == {} and dataset.records[0].load().shape == (72, 96, 3)


REFUSED = {
    "another format": ('{"images": [], "annotations": []}', "data-unknown", "not VIA's"),
    "cut": ('{"_via_settings": {}, "_via_img_metadata": {', "json-broken", "not a JSON file"),
    "no metadata": ('{"_via_settings": {}, "_via_img_metadata": []}', "data-unknown", "holds no picture"),
    "missing metadata": ('{"_via_settings": {}}', "data-unknown", "holds no picture"),
    "another encoding": (f"{','.join(COLUMNS)}\nä.png".encode("latin-1"), "text-encoding", "UTF-8"),
    "a cut row": (f"{','.join(COLUMNS)}\na.png,12\n", "csv-broken", "line 2: expected the columns filename"),
    "no file name": ("region_shape_attributes,region_attributes\n{},{}\n", "csv-broken", "filename"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_vias_is_refused(tmp_path: Path, name: str) -> None:
    text, code, words = REFUSED[name]
    (tmp_path / "via").write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = read(open_via, tmp_path / "via")
    assert list(codes(dataset)) == [code] and words in examples(dataset, code)


def test_an_empty_project_has_no_picture(tmp_path: Path) -> None:
    dataset = read(open_via, write(tmp_path / "via", "project", {}))
    assert list(codes(dataset)) == ["data-unknown"] and "no picture" in examples(dataset, "data-unknown")
