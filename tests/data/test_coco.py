"""A COCO file is read as it is, or refused with its faults named; pycocotools never gets a bad mask."""

import copy
import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.masks import check_masks, check_segmentation
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.segmentation import box_frame_masks, run_lengths, to_rle
from gndet.data.records import Dataset
from gndet.errors import DataError

Tree = dict[str, Any]
SQUARE = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
NAN, INF = float("nan"), float("inf")


def small() -> Tree:
    """A good file: two images of 20 x 30, three objects, category ids with a gap and out of order."""
    base = {"iscrowd": 0, "bbox": [2, 2, 6, 6], "area": 36}
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "height": 20, "width": 30},
            {"id": 5, "file_name": "a.png", "height": 20, "width": 30},
        ],
        "annotations": [
            base | {"id": 1, "image_id": 7, "category_id": 9, "segmentation": [SQUARE]},
            base | {"id": 2, "image_id": 5, "category_id": 3, "segmentation": [SQUARE]},
            base | {"id": 3, "image_id": 7, "category_id": 3, "segmentation": [SQUARE]},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def read(folder: Path, tree: Any) -> Dataset:
    (folder / "pictures").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(folder / "pictures" / name)
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (folder / "file.json").write_text(text)
    return read_dataset(DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(folder)))


def test_records_keep_the_files_order_and_labels_follow_category_ids(tmp_path: Path) -> None:
    dataset = read(tmp_path, small())
    assert dataset.classes == ("cat", "dog") and dataset.category_ids == (3, 9)
    assert [(one.code, one.severity, one.count) for one in dataset.findings] == [("category-gaps", "F", 2)]
    assert [record.image_id for record in dataset.records] == [7, 5]
    first = dataset.records[0]
    assert first.labels.tolist() == [1, 0] and first.annotation_ids.tolist() == [1, 3]
    assert first.boxes.tolist() == [[2, 2, 8, 8]] * 2 and list(first.segmentations) == [[SQUARE]] * 2
    assert pickle.loads(pickle.dumps(first.load))().shape == (20, 30, 3)


BAD_FILES = {
    "no file": (None, r"cannot read"),
    "not JSON": ("{", r"not a JSON file"),
    "a list": ([], r"expected an object"),
    "no annotations": ({"images": [{}], "categories": [{}]}, r"annotations is missing; it has images, categories"),
    "annotations of another kind": (small() | {"annotations": {"1": {}}}, r"annotations: .*expected a list"),
    "no images": (small() | {"images": []}, r"images: the list is empty"),
    "nested too deep": ("[" * 100_000, r"not a JSON file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_coco_is_refused(tmp_path: Path, name: str) -> None:
    tree, message = BAD_FILES[name]
    cfg = DatasetConfig(annotations="none.json", images="pictures")
    with pytest.raises(DataError, match=message) as error:
        read_dataset(cfg, DataConfig(root=str(tmp_path))) if tree is None else read(tmp_path, tree)
    assert ("none.json" if tree is None else "file.json") in str(error.value)


def rle(counts: Any, size: Any = (20, 30)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


BAD_RECORDS: list[tuple[str, int, dict[str, Any], str]] = [
    ("images", 1, {"id": 7}, "image id 7 occurs twice"),
    ("images", 1, {"id": "x"}, "annotation 2: image_id 5 is not in the file"),
    ("images", 1, {"id": None}, r"images\[1\]: image id None"),
    ("images", 1, {"id": -1}, "image id -1, expected an integer of 0 or more"),
    ("images", 0, {"width": -1}, "image 7: width -1"),
    ("images", 0, {"height": 20.5}, "image 7: width 30, height 20.5"),
    ("images", 0, {"width": 10**6}, "image 7: width 1000000"),
    ("images", 0, {"file_name": None}, "image 7: file_name None"),
    ("images", 0, {"file_name": "c.png"}, r"image 7: file_name 'c.png' is not in"),
    ("images", 0, {"file_name": "B.png"}, r"image 7: file_name 'B.png'.*nearest name there is 'b.png'"),
    ("images", 0, {"file_name": "../file.json"}, "image 7: file_name '../file.json' leads out"),
    ("images", 0, {"file_name": "/etc/passwd"}, "image 7: file_name '/etc/passwd' leads out"),
    ("images", 0, {"file_name": "x\0y/b.png"}, "image 7: file_name .* is not in"),
    ("images", 0, {"file_name": "\ud800/b.png"}, "image 7: file_name .* is not in"),
    ("categories", 1, {"id": 9}, "category id 9 occurs twice"),
    ("categories", 1, {"name": "dog"}, "category 9: name 'dog' occurs twice"),
    ("categories", 1, {"name": True}, "category 3: name True"),
    ("annotations", 1, {"id": 1}, "annotation id 1 occurs twice"),
    ("annotations", 1, {"image_id": 6}, "annotation 2: image_id 6 is not"),
    ("annotations", 1, {"image_id": [6]}, r"annotation 2: image_id \[6\] is not"),
    ("annotations", 1, {"category_id": 4}, "annotation 2: category_id 4 is not"),
    ("annotations", 1, {"iscrowd": 2}, "annotation 2: iscrowd 2"),
    ("annotations", 1, {"area": -1}, "annotation 2: area -1"),
    ("annotations", 1, {"area": NAN}, "annotation 2: area nan"),
    ("annotations", 1, {"bbox": 3}, "annotation 2: bbox 3"),
    ("annotations", 1, {"bbox": [1, 2, 3]}, r"annotation 2: bbox \[1, 2, 3\], expected 4"),
    ("annotations", 1, {"bbox": [1, 2, 3, "four"]}, "annotation 2: bbox .*expected 4 finite"),
    ("annotations", 1, {"bbox": [1, 2, 3, NAN]}, "annotation 2: bbox .*expected 4 finite"),
    ("annotations", 1, {"bbox": [1, 2, INF, 4]}, "annotation 2: bbox .*expected 4 finite"),
    ("annotations", 1, {"bbox": [1, 2, 10**400, 4]}, "annotation 2: bbox .*expected 4 finite"),
    (
        "annotations",
        1,
        {"bbox": [30, 2, 6, 6]},
        r"box-outside \(1\): .*\n.*annotation 2: bbox .* of width 30, height 20",
    ),
    (
        "annotations",
        1,
        {"bbox": [2, -9, 6, 6]},
        r"box-outside \(1\): .*\n.*annotation 2: bbox .* of width 30, height 20",
    ),
    ("annotations", 1, {"segmentation": SQUARE[:5]}, "annotation 2: segmentation .*expected a list of polygons"),
    ("annotations", 1, {"segmentation": "x"}, "annotation 2: segmentation 'x'"),
    ("annotations", 1, {"segmentation": [[*SQUARE[:5], NAN]]}, "annotation 2: polygon coordinate nan"),
    ("annotations", 1, {"segmentation": [[*SQUARE[:5], -INF]]}, "annotation 2: polygon coordinate -inf"),
    ("annotations", 1, {"segmentation": [[*SQUARE[:5], 1e12]]}, "annotation 2: polygon coordinate 1000"),
    ("annotations", 1, {"segmentation": [[*SQUARE[:5], "x"]]}, "annotation 2: polygon coordinate 'x'"),
    ("annotations", 1, {"segmentation": [[*SQUARE[:5], True]]}, "annotation 2: polygon coordinate True"),
    ("annotations", 1, {"segmentation": rle([600], (30, 20))}, r"annotation 2: RLE size \[30, 20\]"),
    ("annotations", 1, {"segmentation": {"counts": [600]}}, "annotation 2: RLE size None"),
    ("annotations", 1, {"segmentation": rle([300, 299])}, "annotation 2: RLE counts .*sum to 599"),
    ("annotations", 1, {"segmentation": rle([601, -1])}, "annotation 2: RLE counts .*least is -1"),
    ("annotations", 1, {"segmentation": rle([600.0])}, "annotation 2: RLE counts .*list of integers"),
    ("annotations", 1, {"segmentation": rle(None)}, "annotation 2: RLE counts None"),
    ("annotations", 1, {"segmentation": rle("")}, "annotation 2: RLE counts ''.*sum to 0"),
    ("annotations", 1, {"segmentation": rle("abc")}, "annotation 2: RLE counts 'abc'"),
    ("annotations", 1, {"segmentation": rle("P" * 40)}, "annotation 2: RLE counts .*not a compressed"),
    ("annotations", 1, {"segmentation": rle("P" * 40 + "0")}, "annotation 2: RLE counts .*not a compressed"),
    ("annotations", 1, {"segmentation": rle(" 1")}, "annotation 2: RLE counts ' 1', not a compressed"),
    ("annotations", 1, {"segmentation": rle("~é")}, "annotation 2: RLE counts '~é', not a compressed"),
]


@pytest.mark.parametrize(("part", "index", "change", "message"), BAD_RECORDS)
def test_a_bad_record_is_named(tmp_path: Path, part: str, index: int, change: dict[str, Any], message: str) -> None:
    tree = small()
    tree[part][index] |= change
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, tree)
    assert str(tmp_path / "file.json") in str(error.value)


def test_all_faults_are_counted_and_three_of_a_kind_shown(tmp_path: Path) -> None:
    tree = small()
    tree["annotations"] = [tree["annotations"][0] | {"id": k, "bbox": [k]} for k in range(1, 10)]
    tree["images"][1]["file_name"] = "none.png"
    with pytest.raises(DataError, match=r"file\.json: 10 faults;") as error:
        read(tmp_path, tree)
    assert "none.png" in str(error.value) and "annotation 3: bbox [3]" in str(error.value)
    assert "annotation 4" not in str(error.value) and "and 6 more" in str(error.value)


def test_a_missing_image_folder_is_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    tree = small()
    tree["annotations"][0]["bbox"] = 3
    with pytest.raises(DataError):
        read(tmp_path, tree)
    cfg = DatasetConfig(annotations="file.json", images="elsewhere")
    with pytest.raises(DataError, match=r"(?s)elsewhere: .*expected a folder of pictures.*annotation 1: bbox 3"):
        read_dataset(cfg, DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_image_folder_is_refused(tmp_path: Path, linked: str) -> None:
    read(tmp_path, small())
    Image.new("RGB", (30, 20)).save(tmp_path / "c.png")
    link = tmp_path / "pictures" / ("c.png" if linked == "file" else "more")
    link.symlink_to(tmp_path / "c.png" if linked == "file" else tmp_path)
    tree = small()
    tree["images"][0]["file_name"] = "c.png" if linked == "file" else "more/c.png"
    with pytest.raises(DataError, match=r"image 7: .* is reached by a link that leads out"):
        read(tmp_path, tree)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.symlink_to(p), "cannot be accessed: Too many levels of symbolic links"),
        (lambda p: p.symlink_to(p.with_name("gone")), "is a broken link, a folder or a device"),
    ],
)
def test_a_link_that_leads_nowhere_spoils_no_other_picture(tmp_path: Path, make: Any, words: str) -> None:
    read(tmp_path, small())
    make(tmp_path / "pictures" / "link.png")
    assert len(read(tmp_path, small()).records) == 2
    tree = small()
    tree["images"][0]["file_name"] = "link.png"
    with pytest.raises(DataError, match=rf"file-missing \(1\): .*\n.*'link\.png' {words}"):
        read(tmp_path, tree)
    tree["images"][0]["file_name"] = "link.png/x.png"
    with pytest.raises(DataError, match=r"file-missing \(1\): .*\n.*(which cannot be listed: Too many|is not in)"):
        read(tmp_path, tree)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sub/c.png", r"c\.png is in \S*pictures/Sub: file_name is relative to the image folder"),
        ("sub/d.png", "the nearest name there is 'Sub'"),
        ("Sub/C.png", "the nearest name there is 'c.png'"),
    ],
)
def test_a_name_with_a_wrong_folder_gets_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "pictures" / "Sub").mkdir(parents=True)
    (tmp_path / "pictures" / "Sub" / "c.png").touch()
    tree = small()
    tree["images"][0]["file_name"] = name
    with pytest.raises(DataError, match=rf"is not in .*{hint}"):
        read(tmp_path, tree)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_either_unicode_form_of_a_folder_is_found(tmp_path: Path, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    folder = tmp_path / "pictures" / unicodedata.normalize(form, "größe") / "ü"
    folder.mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(folder / "c.png")
    tree = small()
    tree["images"][0]["file_name"] = unicodedata.normalize(other, "größe/") + "ü/c.png"
    dataset = read(tmp_path, tree)
    assert dataset.records[0].load().shape == (20, 30, 3) and not dataset.refused


def test_a_thin_polygon_is_kept_and_polygons_are_drawn_to_be_sure(tmp_path: Path) -> None:
    tree = small()
    thin = [2.1, 2.1, 2.3, 2.1, 2.3, 7.9, 2.1, 7.9]  # no pixel of the image, some of the finer frame of its box
    tree["annotations"][0]["segmentation"] = [thin]
    assert read(tmp_path, tree).records[0].segmentations[0] == [thin]
    rng = np.random.default_rng(0)
    for _ in range(300):
        polygon = (rng.uniform(-10, 30, (rng.integers(3, 7), 2)) * rng.choice([1, 0.1])).ravel().tolist()
        box = np.array([[25.0, 15, 30, 20]])
        drawn = coco_mask.area(to_rle([polygon], (20, 30))) > 0
        drawn = drawn or box_frame_masks([[polygon]], box, (20, 30), 112).any()
        assert check_masks([[polygon]], np.array([[20, 30]]), box).mask(0) == ([polygon] if drawn else None)


def test_subfolders_and_either_unicode_form_of_a_name_are_found(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "sub dir").mkdir(parents=True)
    stored, written = (unicodedata.normalize(form, "sub dir/größe.png") for form in ("NFD", "NFC"))
    assert stored != written
    Image.new("RGB", (30, 20)).save(tmp_path / "pictures" / stored)
    tree = small()
    tree["images"][0]["file_name"] = written
    assert read(tmp_path, tree).records[0].load().shape == (20, 30, 3)


FIXES: list[tuple[str, Callable[[Tree], Any], list[tuple[str, int]]]] = [
    ("zero area", lambda t: t["annotations"][0].update(bbox=[2, 2, 0, 6]), [("box-empty", 1)]),
    ("negative", lambda t: t["annotations"][0].update(bbox=[8, 2, -6, 6]), [("box-empty", 1)]),
    ("lost in rounding", lambda t: t["annotations"][0].update(bbox=[2, 2, 1e-20, 6]), [("box-empty", 1)]),
    ("overhang", lambda t: t["annotations"][0].update(bbox=[-1, 2, 8, 6]), [("box-clipped", 1)]),
    ("id 0", lambda t: t["annotations"][0].update(id=0), [("annotation-id-low", 3)]),
    ("short", lambda t: t["annotations"][0]["segmentation"].append([1, 2, 3, 4]), [("polygon-short", 1)]),
    ("odd", lambda t: t["annotations"][0]["segmentation"].append(SQUARE[:7]), [("polygon-short", 1)]),
    ("no polygon", lambda t: t["annotations"][0].update(segmentation=[[], [1, 2]]), [("polygon-short", 2)]),
    ("no pixel", lambda t: t["annotations"][0].update(segmentation=rle([600])), [("mask-empty", 1)]),
    ("a point", lambda t: t["annotations"][0].update(segmentation=[[10] * 6]), [("mask-empty", 1)]),
    ("outside", lambda t: t["annotations"][0].update(segmentation=[[-9, -9, -5, -9, -5, -5]]), [("mask-empty", 1)]),
    ("floats", lambda t: t["annotations"][0].update(id=1.0, image_id=7.0), [("number-float", 1)]),
    ("no area", lambda t: t["annotations"][0].pop("area"), [("area-missing", 1)]),
]


@pytest.mark.parametrize("fix", FIXES, ids=[fix[0] for fix in FIXES])
def test_fixes_are_counted(tmp_path: Path, fix: tuple[str, Callable[[Tree], Any], list]) -> None:
    tree = small()
    fix[1](tree)
    dataset = read(tmp_path, tree)
    fixed = [(one.code, one.count) for one in dataset.findings if one.severity == "F" and one.code != "category-gaps"]
    assert fixed == fix[2]
    assert dataset.fixes == {one.what: one.count for one in dataset.findings if one.severity == "F"}


@pytest.mark.parametrize("segmentation", [[], None, [[1, 2]], rle([600]), [[10] * 6], [[-9, -9, -5, -9, -5, -5]]])
def test_an_object_without_a_mask_is_refused_if_masks_are_trained(tmp_path: Path, segmentation: Any) -> None:
    tree = small()
    tree["annotations"][1]["segmentation"] = segmentation
    assert [one.count for one in read(tmp_path, tree).findings if one.code == "mask-missing"] == [1]
    cfg, data = DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(tmp_path))
    with pytest.raises(DataError, match=r"mask-needed \(1\): .*\n.*annotation 2 of a\.png has no usable segmentation"):
        read_dataset(cfg, data, masks=True)
    other = data.model_copy(update={"classes": ("dog",)})  # the object without a mask is a cat
    assert len(read_dataset(cfg, other, masks=True).records[1].labels) == 0
    tree["annotations"][1]["iscrowd"] = 1  # a crowd region needs none
    read(tmp_path, tree)
    read_dataset(cfg, data, masks=True)
    tree["annotations"][2]["segmentation"] = None
    read(tmp_path, tree)
    with pytest.raises(DataError, match=r"mask-needed \(1\): .*\n.*annotation 3 of b\.png"):
        read_dataset(cfg, data, masks=True)


def test_fixed_objects_match_the_counts(tmp_path: Path) -> None:
    tree = small()
    tree["annotations"][0].update(id=-4, bbox=[-2, 2, 6, 6])
    tree["annotations"][1].update(segmentation=[[1, 2, 3, 4], SQUARE])
    tree["annotations"][2].update(bbox=[2, 2, 6, 0])
    first, second = read(tmp_path, tree).records
    assert first.boxes.tolist() == [[-2, 2, 4, 8]]  # as in the file, because evaluation needs it so
    assert (first.annotation_ids.tolist(), second.annotation_ids.tolist()) == ([1], [2])
    assert list(second.segmentations) == [[SQUARE]]


def test_what_is_missing_is_completed(tmp_path: Path) -> None:
    tree = small()
    for annotation in tree["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    tree["annotations"][0]["segmentation"] = [[2, 2, 8, 2, 8, 8]]
    tree["annotations"][2]["segmentation"] = None
    first, second = read(tmp_path, tree).records
    assert not first.crowd.any() and first.segmentations[1] is None
    assert first.area[1] == 36 and second.area[0] == 36  # of the box, of the mask
    assert 12 <= first.area[0] <= 24  # half a square of 36 pixels


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(1, 300, 2))
    mask = np.asfortranarray(rng.random(size) < rng.choice([0, 0.001, 0.1, 0.5, 1]), dtype=np.uint8)
    counts = coco_mask.encode(mask)["counts"].decode()
    runs = run_lengths(counts)
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(size[::-1]).T, mask)
    check_segmentation(rle(counts, size), size)
    wider = (size[0], size[1] + 1)
    with pytest.raises(DataError, match=f"RLE counts .*sum to {mask.size}"):
        check_segmentation(rle(counts, wider), wider)


@pytest.mark.parametrize("seed", range(10))
def test_checked_masks_do_pycocotools_no_harm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    passed = 0
    for _ in range(200):
        points = rng.choice([0, 7, 19.5, 29, 30, -20, 59, 1e3, 1e12, NAN, INF], 6, p=[0.13] * 7 + [0.0225] * 4)
        text = bytes(rng.integers(40, 116, rng.integers(1, 5)).astype(np.uint8)).decode()
        for segmentation in ([points.tolist()], rle(text), rle(rng.integers(-1, 400, 3).tolist())):
            try:
                checked = check_segmentation(segmentation, (20, 30))
            except DataError:
                continue
            if checked is None:
                continue
            passed += coco_mask.decode(to_rle(checked, (20, 30))).max() <= 1
    assert passed > 20


@pytest.mark.parametrize(
    ("name", "file", "images", "counts"),
    [
        ("coco-tiny", "instances_train2017.json", "train2017", (80, 705, 80)),
        ("coco-tiny", "instances_val2017.json", "val2017", (80, 815, 80)),
        ("bccd", "instances_train.json", "train", (205, 2804, 3)),
        ("nuclei", "instances_val.json", "val", (132, 4732, 1)),
    ],
)
def test_real_data_is_read_and_written_back_unchanged(
    data_root: Path, name: str, file: str, images: str, counts: tuple[int, int, int]
) -> None:
    path = data_root / name / "annotations" / file
    data = DataConfig(root=str(data_root / name))
    dataset = read_dataset(DatasetConfig(annotations=f"annotations/{file}", images=images), data)
    truth, tree = json.loads(path.read_text()), to_coco(dataset)
    assert {one.code for one in dataset.findings} <= {"category-gaps", "category-unused", "crowd", "mask-missing"}
    assert tuple(len(tree[key]) for key in ("images", "annotations", "categories")) == counts
    found = {annotation["id"]: annotation for annotation in tree["annotations"]}
    for annotation in truth["annotations"]:
        copied = found[annotation["id"]]
        assert np.allclose(copied.pop("bbox"), annotation["bbox"], rtol=0, atol=1e-9)
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and isinstance(mask["counts"], list):  # written compressed
            written = coco_mask.decode(copied.pop("segmentation"))
            assert np.array_equal(written, coco_mask.decode(to_rle(mask, mask["size"])))
        assert all(copied[key] == annotation[key] for key in copied)
    assert dataset.records[0].load().shape == (*dataset.records[0].size, 3)


def test_pycocotools_takes_the_written_dict(tmp_path: Path) -> None:
    truth = COCO()
    truth.dataset = copy.deepcopy(to_coco(read(tmp_path, small())))
    truth.createIndex()
    assert [truth.annToMask(truth.anns[number]).sum() for number in (1, 2, 3)] == [36, 36, 36]


def test_an_empty_picture_is_refused_before_training(tmp_path: Path) -> None:
    tree = small()
    tree["images"][0]["file_name"] = "c.png"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "c.png").touch()
    with pytest.raises(DataError, match=r"image 7: file_name 'c\.png' is an empty file"):
        read(tmp_path, tree)
