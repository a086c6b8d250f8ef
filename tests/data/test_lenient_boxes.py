"""What has one meaning is read, counted and told: boxes, outlines, areas and flags that are not as COCO writes them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from gndet.config.data import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import describe_finding
from gndet.data.records import Dataset, Finding

WIDTH, HEIGHT = 96, 72
BOX = [32, 7, 18, 16]
OUTLINE = [32, 7, 50, 7, 50, 23, 32, 23]
ABSENT = object()


def rle(mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def filled(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def write(folder: Path, *entries: dict[str, Any], good: int = 0) -> Path:
    """Write a file of one annotation per entry, then of good ones; a key is left out if its value is ABSENT."""
    usual = {"image_id": 1, "category_id": 1, "bbox": BOX, "area": 288, "iscrowd": 0, "segmentation": [OUTLINE]}
    items = [{"id": i} | usual | entry for i, entry in enumerate((*entries, *[{}] * good), start=1)]
    items = [{key: value for key, value in item.items() if value is not ABSENT} for item in items]
    images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]
    path = folder / "file.json"
    path.write_text(json.dumps({"images": images, "annotations": items, "categories": [{"id": 1, "name": "cup"}]}))
    return path


def read(folder: Path, *entries: dict[str, Any], good: int = 0) -> Dataset:
    path = write(folder, *entries, good=good)
    before = path.read_bytes()
    dataset = inspect_file(path, None, DataConfig(cache=""))
    assert path.read_bytes() == before
    return dataset


def found(dataset: Dataset) -> dict[str, tuple[str, int]]:
    return {one.code: (one.severity, one.count) for one in dataset.findings}


def finding(dataset: Dataset, code: str) -> Finding:
    return next(one for one in dataset.findings if one.code == code)


# --- boxes


@pytest.mark.parametrize("bbox", [ABSENT, None, [], [None] * 4], ids=["absent", "null", "empty", "nulls"])
@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([OUTLINE], [32, 7, 50, 23]),
        ([OUTLINE, [60, 41.5, 89, 41.5, 89, 69]], [32, 7, 89, 69]),
        (rle(filled(41, 69, 60, 89)), [60, 41, 89, 69]),
        (OUTLINE, [32, 7, 50, 23]),
    ],
    ids=["polygon", "polygons", "rle", "flat"],
)
def test_a_missing_box_is_that_of_its_mask(tmp_path: Path, bbox: Any, segmentation: Any, box: list[float]) -> None:
    dataset = read(tmp_path, {}, {"bbox": bbox, "segmentation": segmentation, "area": ABSENT})
    assert dataset.records[0].boxes.tolist() == [[32, 7, 50, 23], box]
    assert found(dataset)["box-missing"] == ("F", 1) and not dataset.refused
    assert describe_finding(finding(dataset, "box-missing"))[0].startswith("box-missing (1 of 2): ")


def test_the_box_of_an_uncompressed_rle_is_pycocotools_own(tmp_path: Path) -> None:
    counts = [5 * HEIGHT + 3, 10, HEIGHT - 10, 20, (WIDTH - 6) * HEIGHT - 23]
    dataset = read(tmp_path, {"bbox": None, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}})
    code = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
    x, y, width, height = coco_mask.toBbox(code).tolist()
    assert dataset.records[0].boxes.tolist() == [[x, y, x + width, y + height]]


@pytest.mark.parametrize("segmentation", [ABSENT, None, [], [[1, 2, 3, 4]]], ids=["absent", "null", "empty", "short"])
def test_an_empty_box_without_a_mask_is_no_object(tmp_path: Path, segmentation: Any) -> None:
    entries = [{"bbox": bbox, "segmentation": segmentation, "area": 0} for bbox in ([], None)]
    dataset = read(tmp_path, *entries, good=2)
    assert found(dataset)["box-none"] == ("F", 2) and not dataset.refused
    assert dataset.records[0].annotation_ids.tolist() == [3, 4]


def test_an_image_of_which_only_an_empty_box_is_left_has_no_object(tmp_path: Path) -> None:
    dataset = read(tmp_path, {"bbox": [], "segmentation": [], "area": 0})
    assert found(dataset) == {"box-none": ("F", 1), "category-unused": ("N", 1), "image-empty": ("N", 1)}


def test_without_the_key_bbox_and_a_mask_an_annotation_is_refused(tmp_path: Path) -> None:
    dataset = read(tmp_path, {"bbox": ABSENT, "segmentation": []}, good=1)
    assert finding(dataset, "box-malformed").severity == "E"
    assert "annotation 1: bbox is missing, expected 4 finite numbers" in finding(dataset, "box-malformed").examples[0]


@pytest.mark.parametrize(
    ("segmentation", "code"),
    [([[1, 2, 3, 4, 5, "x"]], "polygon-number"), ("x", "segmentation-malformed"), ({"counts": [3]}, "rle-size")],
)
def test_a_missing_box_does_not_hide_what_is_wrong_with_the_mask(tmp_path: Path, segmentation: Any, code: str) -> None:
    dataset = read(tmp_path, {"bbox": None, "segmentation": segmentation}, good=1)
    assert [one.code for one in dataset.findings if one.severity == "E"] == [code]


def test_other_boxes_stay_refused(tmp_path: Path) -> None:
    boxes: list[Any] = [[1, 2, 3], [None, 1, 2, 3], {}, "", 7, [[1, 2, 3, 4]]]
    assert found(read(tmp_path, *({"bbox": box} for box in boxes)))["box-malformed"] == ("E", len(boxes))


# --- turned boxes


@pytest.mark.parametrize("degrees", [30.0, 45, -20, 90, 135.5, 330, 720 + 10, "15.5"])
def test_the_box_of_a_turned_rectangle_encloses_its_corners(tmp_path: Path, degrees: Any) -> None:
    dataset = read(tmp_path, {"attributes": {"occluded": False, "rotation": degrees}, "segmentation": []}, good=1)
    angle, (x, y, width, height) = math.radians(float(degrees)), BOX
    corners = [
        (x + width / 2 + dx * math.cos(angle) - dy * math.sin(angle),
         y + height / 2 + dx * math.sin(angle) + dy * math.cos(angle))
        for dx in (-width / 2, width / 2) for dy in (-height / 2, height / 2)
    ]  # fmt: skip
    expected = [min(c[0] for c in corners), min(c[1] for c in corners), max(c[0] for c in corners)]
    assert dataset.records[0].boxes[0].tolist() == pytest.approx([*expected, max(c[1] for c in corners)])
    assert dataset.records[0].area[0] == 288  # turning keeps the area
    assert found(dataset)["box-rotated"] == ("F", 1)
    assert "rotation" in finding(dataset, "box-rotated").examples[0]


def test_a_box_that_leaves_the_image_by_its_turn_is_clipped_without_a_doubt_about_its_numbers(tmp_path: Path) -> None:
    dataset = read(tmp_path, {"bbox": [60, 41, 29, 28], "attributes": {"rotation": 45}, "segmentation": None})
    assert set(found(dataset)) == {"box-rotated", "box-clipped", "mask-missing"}


@pytest.mark.parametrize(
    "attributes",
    [None, {}, [], "x", {"rotation": 0.0}, {"rotation": 360}, {"rotation": 180.0}, {"rotation": None},
     {"rotation": "left"}, {"rotation": "nan"}, {"rotation": ""}, {"rotation": True}, {"rotation": [30]},
     {"occluded": True}],
)  # fmt: skip
def test_a_box_that_is_not_turned_stays(tmp_path: Path, attributes: Any) -> None:
    dataset = read(tmp_path, {"attributes": attributes})
    assert not dataset.findings and dataset.records[0].boxes.tolist() == [[32, 7, 50, 23]]


def test_a_turned_box_with_a_mask_is_that_of_the_mask(tmp_path: Path) -> None:
    attributes = {"rotation": 45.0}
    diamond = [41, 3, 53, 15, 41, 27, 29, 15]
    dataset = read(tmp_path, {"attributes": attributes, "segmentation": [diamond]}, {"attributes": attributes})
    assert dataset.records[0].boxes.tolist() == [[29, 3, 53, 27], [32, 7, 50, 23]]
    assert found(dataset) == {"box-rotated": ("F", 1)}


# --- outlines


POINTS = [[32, 7], [50, 7], [50, 23], [32, 23]]
TRIANGLE, TRIANGLE_POINTS = [40, 10, 45, 10, 45, 20], [[40, 10], [45, 10], [45, 20]]


@pytest.mark.parametrize(
    ("segmentation", "read_as"),
    [
        (OUTLINE, [OUTLINE]),
        (POINTS, [OUTLINE]),
        ([POINTS], [OUTLINE]),
        ([[POINTS]], [OUTLINE]),
        ([[OUTLINE]], [OUTLINE]),
        ([[[OUTLINE]]], [OUTLINE]),
        ([POINTS, TRIANGLE_POINTS], [OUTLINE, TRIANGLE]),
        ([OUTLINE, TRIANGLE_POINTS], [OUTLINE, TRIANGLE]),
        ([[OUTLINE], [TRIANGLE]], [OUTLINE, TRIANGLE]),
        ([[POINTS], [TRIANGLE_POINTS]], [OUTLINE, TRIANGLE]),
        (TRIANGLE_POINTS, [TRIANGLE]),
        ([rle(filled(7, 23, 32, 50))], rle(filled(7, 23, 32, 50))),
    ],
)
def test_outlines_in_another_shape_are_read(tmp_path: Path, segmentation: Any, read_as: Any) -> None:
    dataset = read(tmp_path, {"segmentation": segmentation, "area": ABSENT, "bbox": ABSENT}, good=1)
    assert list(dataset.records[0].segmentations) == [read_as, [OUTLINE]]
    assert found(dataset)["segmentation-shape"] == ("F", 1) and not dataset.refused


@pytest.mark.parametrize(
    ("segmentation", "outcome"),
    [
        (OUTLINE[:7], ("segmentation-malformed", "E")),
        ([1, 2, 3, 4], ("segmentation-malformed", "E")),
        ([[OUTLINE], 3], ("segmentation-malformed", "E")),
        ([rle(filled(7, 23, 32, 50))] * 2, ("segmentation-malformed", "E")),
        ([[POINTS, TRIANGLE_POINTS]], ("polygon-number", "E")),  # two parts, or a hole
        ([[[1, 2], [3, 4], [5, "x"]]], ("polygon-number", "E")),
        ([[[1, 2], [3, 4], [5, 6, 7]]], ("polygon-number", "E")),
        ([[1, 2], [3, 4]], ("polygon-short", "F")),
        ([[[1, 2], [3, 4]]], ("polygon-short", "F")),
        ([[1, 2, 3, 4]], ("polygon-short", "F")),  # two points, or pycocotools' box: dropped as ever
    ],
)
def test_outlines_that_are_not_clear_are_not_read(tmp_path: Path, segmentation: Any, outcome: tuple[str, str]) -> None:
    dataset = read(tmp_path, {"segmentation": segmentation}, good=1)
    assert finding(dataset, outcome[0]).severity == outcome[1]
    assert dataset.refused == (outcome[1] == "E")


def test_a_shape_is_read_wherever_it_stands(tmp_path: Path) -> None:
    entries = [{}] * 40
    entries[0], entries[17], entries[39] = {"segmentation": POINTS}, {"segmentation": OUTLINE}, {"segmentation": []}
    dataset = read(tmp_path, *entries)
    masks = list(dataset.records[0].segmentations)
    assert masks == [[OUTLINE]] * 39 + [None] and finding(dataset, "segmentation-shape").count == 2


# --- flags


@pytest.mark.parametrize("ignore", [1, True, 1.0])
def test_ignore_1_is_a_crowd_region(tmp_path: Path, ignore: Any) -> None:
    dataset = read(tmp_path, {"ignore": ignore}, {"ignore": 0}, {"ignore": None}, {"ignore": False}, good=2)
    assert dataset.records[0].crowd.tolist() == [True] + [False] * 5
    assert found(dataset) == {"ignore-flag": ("F", 1)}
    assert describe_finding(finding(dataset, "ignore-flag"))[0].startswith("ignore-flag (1 of 6): ")


def test_ignore_and_iscrowd_agree_or_add_up(tmp_path: Path) -> None:
    code = rle(filled(7, 23, 32, 50))
    entries = [{"ignore": 1, "iscrowd": 1}, {"ignore": 0, "iscrowd": 1}, {"ignore": 1, "iscrowd": ABSENT}]
    dataset = read(tmp_path, *({"segmentation": code} | entry for entry in entries))
    assert dataset.records[0].crowd.all() and found(dataset) == {"ignore-flag": ("F", 1), "crowd": ("N", 2)}


@pytest.mark.parametrize("flags", [{"ignore": 2}, {"ignore": "perhaps"}, {"ignore": [1]}, {"iscrowd": 3, "ignore": 0}])
def test_other_flags_are_refused_by_name(tmp_path: Path, flags: dict[str, Any]) -> None:
    dataset = read(tmp_path, {"iscrowd": 0} | flags, good=1)
    (example,) = finding(dataset, "crowd-value").examples
    assert dataset.refused and all(f"{key} {value!r}" in example for key, value in flags.items())


# --- areas


@pytest.mark.parametrize(
    ("entry", "area"),
    [
        ({"area": 0}, 288),
        ({"area": 0.0, "segmentation": []}, 288),
        ({"area": 50_000}, 288),
        ({"area": 50_000, "segmentation": None}, 288),
        ({"area": 400, "segmentation": [[32, 7, 50, 7, 32, 23]]}, 144),
        ({"area": 0, "iscrowd": 1, "segmentation": rle(filled(7, 23, 32, 41))}, 144),
        ({"area": 900, "bbox": ABSENT}, 288),
    ],
)
def test_an_impossible_area_is_computed_from_the_mask_or_the_box(tmp_path: Path, entry: Any, area: float) -> None:
    dataset = read(tmp_path, {}, entry, good=1)
    assert dataset.records[0].area.tolist() == [288, pytest.approx(area, rel=0.05), 288]
    assert found(dataset)["area-wrong"] == ("F", 1)
    assert describe_finding(finding(dataset, "area-wrong"))[0].startswith("area-wrong (1 of 3): ")


@pytest.mark.parametrize(
    "entry",
    [{"area": 1.0}, {"area": 144}, {"area": 2, "segmentation": []},
     {"area": 1, "segmentation": rle(filled(7, 23, 32, 50))}],
)  # fmt: skip
def test_an_area_that_does_not_fit_is_noted_and_kept(tmp_path: Path, entry: dict[str, Any]) -> None:
    dataset = read(tmp_path, entry, good=1)
    assert dataset.records[0].area.tolist() == [entry["area"], 288]
    noted = finding(dataset, "area-odd")
    assert (noted.severity, noted.count, noted.of) == ("N", 1, 2) and f"area {entry['area']}" in noted.examples[0]


def test_the_area_of_the_box_is_told_apart(tmp_path: Path) -> None:
    """Roboflow writes width x height for every area."""
    dataset = read(tmp_path, *[{"segmentation": [[32, 7, 50, 7, 32, 23]]}] * 5)
    assert found(dataset) == {"area-box": ("N", 5)} and dataset.records[0].area.tolist() == [288] * 5


def circle(x: float, y: float, radius: float) -> list[float]:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack((x + radius * np.cos(angles), y + radius * np.sin(angles)), 1).ravel().tolist()


@pytest.mark.parametrize(
    "polygons",
    [
        [circle(40, 30, 20)],
        [circle(40, 30, 1.2)],
        [circle(40, 30, 20), circle(42, 30, 20)],  # overlapping: the sum of both is almost twice the area
        [[20, 10, 60, 10, 20, 50, 60, 50]],  # crossing itself: the shoelace formula gives 0
        [[20, 10, 70, 10, 70, 11, 20, 11]],
    ],
    ids=["disk", "dot", "overlap", "crossing", "line"],
)
@pytest.mark.parametrize("drawn", [True, False])
def test_areas_of_masks_are_silent_whether_drawn_or_computed(
    tmp_path: Path, polygons: list[list[float]], drawn: bool
) -> None:
    code = coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))
    as_rle = {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    low, high = points.min(0), points.max(0)
    bbox = [*low.tolist(), *(high - low).tolist()]
    entry = {"bbox": bbox, "area": int(coco_mask.area(code)), "segmentation": as_rle if drawn else polygons}
    assert not read(tmp_path, entry, {}).findings


@pytest.mark.parametrize("extra", [0, 1])
def test_a_rounded_box_and_its_area_are_silent(tmp_path: Path, extra: int) -> None:
    """Tools that count both ends of a box write (width + 1) x (height + 1)."""
    areas = [(width + extra) * (height + extra) for width, height in ((1, 1), (3, 40), (60, 50))]
    boxes = [[10, 5, 1, 1], [10, 5, 3, 40], [10, 5, 60, 50]]
    dataset = read(
        tmp_path, *({"bbox": box, "area": area, "segmentation": []} for box, area in zip(boxes, areas, strict=True))
    )
    assert set(found(dataset)) == {"mask-missing"}


@pytest.mark.parametrize("name", ["coco-tiny", "nuclei", "bccd"])
def test_real_data_is_silent(data_root: Path, name: str) -> None:
    files = sorted((data_root / name / "annotations").glob("*.json"))
    assert files
    for path in files:
        codes = {one.code for one in inspect_file(path, None, DataConfig(cache="")).findings}
        assert codes <= {"category-gaps", "crowd", "mask-missing", "category-unused"}


@pytest.mark.parametrize("key", ["bbox", "segmentation"])
def test_real_boxes_are_those_of_real_masks(data_root: Path, tmp_path: Path, key: str) -> None:
    """Without its boxes, COCO reads as with them: COCO's boxes are the extents of its polygons."""
    path = data_root / "coco-tiny" / "annotations" / "instances_val2017.json"
    tree = json.loads(path.read_text())
    for item in tree["annotations"]:
        if key == "bbox":
            del item["bbox"]
        elif type(item[key]) is list:
            item[key] = [[list(pair) for pair in zip(*[iter(polygon)] * 2, strict=True)] for polygon in item[key]]
    (tmp_path / "file.json").write_text(json.dumps(tree))
    changed = inspect_file(tmp_path / "file.json", None, DataConfig(cache=""))
    truth, ids = COCO(str(path)), set()
    for record in changed.records:
        for number, box, mask in zip(record.annotation_ids.tolist(), record.boxes, record.segmentations, strict=True):
            x, y, width, height = truth.anns[number]["bbox"]
            assert box == pytest.approx([x, y, x + width, y + height], abs=1.01 if record.crowd.any() else 0.02)
            if type(truth.anns[number]["segmentation"]) is list:
                assert mask == truth.anns[number]["segmentation"]
            ids.add(number)
    assert ids == set(truth.anns) and not changed.refused
