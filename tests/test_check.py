"""`gndet check` lists every fault of a data set with its outcome, whatever the data, and writes nothing into it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from gndet.check import check, guess_folder
from gndet.config import DataConfig, DatasetConfig
from gndet.contact_sheet import chosen, contact_sheet
from gndet.data import inspect_dataset, read_dataset
from gndet.data.faults import FAULTS
from gndet.data.pictures import Picture, look_at_all, look_at_picture
from gndet.errors import DataError, OutputError

WIDTH, HEIGHT = 40, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]
NAN, INF = float("nan"), float("inf")
Report = dict[str, Any]


class Hostile:
    """A data set that is made wrong step by step; its image 1 stays good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures = folder, folder / "pictures"
        self.pictures.mkdir(parents=True)
        self.tree: dict[str, list[dict[str, Any]]] = {
            "images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }  # fmt: skip
        self.image(), self.object(category_id=2)

    def image(
        self, picture: Image.Image | bytes | None = None, suffix: str = "png", save: Any = (), **entry: Any
    ) -> Path:
        """Add an image with a good object, and its file."""
        number = len(self.tree["images"]) + 1
        path = self.pictures / f"{number:02d}.{suffix}"
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            plain = Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0))  # no two files are equal
            (picture or plain).save(path, **dict(save))
        usual = {"id": number, "file_name": path.name, "width": WIDTH, "height": HEIGHT}
        self.tree["images"].append(usual | entry)
        self.object()
        return path

    def object(self, **entry: Any) -> None:
        """Add an object to the last image."""
        number = len(self.tree["annotations"]) + 1
        usual = {"id": number, "image_id": self.tree["images"][-1]["id"], "category_id": 1, "bbox": [2, 2, 10, 10]}
        self.tree["annotations"].append(usual | {"area": 100, "iscrowd": 0, "segmentation": [SQUARE]} | entry)

    def write(self, name: str = "file.json") -> Path:
        (self.folder / name).write_text(json.dumps(self.tree))
        return self.folder / name


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `gndet check` in a process of its own; it must not die by a signal."""
    command = [sys.executable, "-m", "gndet.cli", "check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done


def found(part: Any) -> dict[str, tuple[str, int]]:
    return {one["code"]: (one["severity"], one["count"]) for one in part}


def noise(mode: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    pixels = np.random.default_rng(len(mode)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(path: Path) -> bytes:
    noise("RGB").save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def make_bad_objects(data: Hostile) -> None:
    """Every fault that an object can have; each beside a good object."""
    rle = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    data.image()
    for box in ([2, 2, 0, 10], [12, 2, -10, 10]):
        data.object(bbox=box)  # box-empty
    data.object(bbox=[-1, 2, 10, 10])  # box-clipped
    data.object(bbox=[-5, 2, 18, 10])  # box-clipped, box-overhang
    data.object(bbox=[40, 2, 10, 10])  # box-outside
    for box in ([NAN, 2, 10, 10], [2, 2, INF, 10], [2, 2, 10], "2 2 10 10", [2, 2, 10, "10"], None, [1e308] * 4):
        data.object(bbox=box)  # box-malformed; json-nan twice
    data.object(bbox=[2, 2, 0.5, 10], segmentation=[[2, 2, 2.5, 2, 2.5, 12, 2, 12]])  # box-tiny
    data.object(iscrowd=1, bbox=[3, 0, 2, 30], segmentation=rle)  # crowd
    data.object(iscrowd=1)  # crowd, crowd-polygon
    data.object(iscrowd=2)  # crowd-value
    data.object(area=-1)  # area-value
    data.object(area=None)  # area-missing
    data.object(segmentation=[SQUARE, [1, 2, 3, 4], SQUARE[:7]])  # polygon-short twice
    data.object(segmentation=[SQUARE[:5]])  # polygon-short, mask-missing
    for point in (NAN, -INF, 1e12, 10**400, "8", None, True, [1]):
        data.object(segmentation=[[*SQUARE[:7], point]])  # polygon-number; json-nan twice
    for value in (SQUARE, "x", 7, [[SQUARE], 3]):
        data.object(segmentation=value)  # segmentation-malformed
    data.object(segmentation=rle | {"counts": [1, 2]})  # rle-counts
    data.object(segmentation=rle | {"counts": [HEIGHT * WIDTH + 1, -1]})  # rle-counts
    data.object(segmentation=rle | {"size": [WIDTH, HEIGHT]})  # rle-size
    data.object(segmentation=rle | {"counts": "~~~"})  # rle-malformed
    data.object(segmentation=rle | {"counts": [HEIGHT * WIDTH]})  # mask-empty, mask-missing
    data.object(bbox=[25, 15, 10, 10])  # mask-elsewhere
    data.object(image_id=99), data.object(image_id="2")  # image-unknown
    data.object(category_id=99)  # category-unknown
    data.object(id=1)  # annotation-id-twice
    data.object(id="8")  # annotation-id
    data.object(id=900.0)  # number-float


BAD_OBJECTS = {
    "box-empty": ("F", 2), "box-clipped": ("F", 2), "box-overhang": ("N", 1), "box-outside": ("E", 1),
    "box-malformed": ("E", 7), "box-tiny": ("N", 1), "crowd": ("N", 2), "crowd-polygon": ("N", 1),
    "crowd-value": ("E", 1), "area-value": ("E", 1), "area-missing": ("F", 1), "polygon-short": ("F", 3),
    "polygon-number": ("E", 8), "segmentation-malformed": ("E", 4), "rle-counts": ("E", 2), "rle-size": ("E", 1),
    "rle-malformed": ("E", 1), "mask-empty": ("F", 1), "mask-missing": ("N", 2), "mask-elsewhere": ("N", 1),
    "image-unknown": ("E", 2), "category-unknown": ("E", 1), "annotation-id-twice": ("E", 1),
    "annotation-id": ("E", 1), "number-float": ("F", 1), "json-nan": ("N", 4),
}  # fmt: skip


def make_bad_images(data: Hostile) -> None:
    """Every fault that an image's entry and its place can have."""
    outside = data.folder / "outside"
    outside.mkdir()
    noise("RGB").save(outside / "x.png")
    data.image(), data.tree["annotations"].pop()  # image-empty
    data.image(id="7")  # image-id; its object: image-unknown
    data.image(id=1)  # image-id-twice
    data.image(width=0), data.image(height=None), data.image(height=30.5)  # image-size
    data.image(width=20_000, height=20_000)  # image-pixels
    data.image(file_name=None)  # file-name
    data.image(file_name="../file.json"), data.image(file_name=str(outside / "x.png"))  # file-escape
    data.image().unlink()  # file-missing
    data.image(suffix="jpg", file_name="13.JPG")  # file-missing: the case
    path = data.image()
    path.unlink(), path.symlink_to(outside / "x.png")  # file-escape
    (data.pictures / "more").symlink_to(outside)
    data.image(file_name="more/x.png")  # file-escape
    path = data.image()
    path.unlink(), path.mkdir()  # file-missing: a folder
    data.image(b"")  # file-empty
    data.image(file_name="01.png")  # file-twice
    data.image(width=40.0)  # number-float
    for name in (unicodedata.normalize("NFD", "größe 1.png"), "a b.png", "#.png"):  # all these are good
        path = data.image(file_name=unicodedata.normalize("NFC", name))
        path.rename(data.pictures / name)
    data.tree["categories"] += [{"id": 9, "name": "bird"}]  # category-gaps, category-unused
    data.tree["categories"] += [{"id": 2, "name": "cow"}, {"id": "5", "name": "ox"}]  # category-id-twice, category-id
    data.tree["categories"] += [{"id": 10}, {"id": 11, "name": "cat"}]  # category-name, category-name-twice
    data.tree["annotations"][0]["id"] = 0  # annotation-id-low


BAD_IMAGES = {
    "image-empty": ("N", 1), "image-id": ("E", 1), "image-unknown": ("E", 1), "image-id-twice": ("E", 1),
    "image-size": ("E", 3), "image-pixels": ("E", 1), "file-name": ("E", 1), "file-escape": ("E", 4),
    "file-missing": ("E", 3), "file-empty": ("E", 1), "file-twice": ("N", 1), "number-float": ("F", 1),
    "category-gaps": ("F", 5), "category-unused": ("N", 3), "category-id-twice": ("E", 1), "category-id": ("E", 1),
    "category-name": ("E", 1), "category-name-twice": ("E", 1), "annotation-id-low": ("F", 17),
}  # fmt: skip


def make_bad_pictures(data: Hostile) -> None:
    """Every fault that only decoding shows."""
    whole = jpeg(data.folder / "x.jpg")
    data.image(whole[: len(whole) // 2], "jpg")
    data.image(b"<!DOCTYPE html><html>404</html>", "jpg")
    with zipfile.ZipFile(data.folder / "x.zip", "w") as file:
        file.writestr("../canary.png", whole)
    data.image((data.folder / "x.zip").read_bytes(), "png")  # picture-unreadable, so far
    for mode, suffix in (("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png")):
        data.image(noise(mode), suffix)  # picture-mode
    data.image(Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH)))  # picture-16bit
    exif = Image.Exif()
    exif[0x0112] = 6
    data.image(noise("RGB", (HEIGHT, WIDTH)), "jpg", {"exif": exif})  # picture-turned
    data.image(noise("RGB", (WIDTH, HEIGHT)), "jpg", {"exif": exif})  # picture-unrotated
    data.image(noise("RGB", (HEIGHT, WIDTH)))  # picture-size
    frames = [noise("RGB"), Image.new("RGB", (WIDTH, HEIGHT))]
    data.image(frames[0], "gif", {"save_all": True, "append_images": frames[1:]})  # picture-animated, picture-mode
    data.image(Image.new("1", (10_001, 10_000)))  # picture-pixels
    data.image(data.image().read_bytes())  # picture-twice


BAD_PICTURES = {
    "picture-unreadable": ("E", 3), "picture-mode": ("F", 7), "picture-16bit": ("F", 1), "picture-turned": ("F", 1),
    "picture-unrotated": ("E", 1), "picture-size": ("E", 1), "picture-animated": ("N", 1), "picture-pixels": ("E", 1),
    "picture-twice": ("N", 1),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "expected", "images", "kept"),
    [
        (make_bad_objects, BAD_OBJECTS, 2, 2),
        (make_bad_images, BAD_IMAGES, 22, 8),
        (make_bad_pictures, BAD_PICTURES, 18, 18),
    ],
)
def test_t17_every_fault_has_its_outcome(
    tmp_path: Path, make: Callable[[Hostile], None], expected: dict[str, tuple[str, int]], images: int, kept: int
) -> None:
    """T17: 42 hostile images in three sets; the exact list of findings, and no signal."""
    data = Hostile(tmp_path / "data")
    make(data)
    path = data.write()
    before = {file: file.lstat().st_mtime_ns for file in sorted((tmp_path / "data").rglob("*"))}
    done = run(path, "--image-folder", data.pictures, "--images", "--json", tmp_path / "report.json")
    report: Report = json.loads((tmp_path / "report.json").read_text())
    (part,) = report["sets"]
    assert found(part["findings"]) == expected
    assert len(data.tree["images"]) == images and part["summary"]["images"] == kept
    assert report["refused"] and done.returncode == 1 and "\nrefused: " in done.stdout
    for one in part["findings"]:
        assert f"{one['severity']} {one['code']} ({one['count']}): {FAULTS[one['code']].what}" in done.stdout
        assert 1 <= len(one["examples"]) <= 3 and all(example in done.stdout for example in one["examples"])
        assert one["remedy"] in done.stdout and (one["remedy"] or one["severity"] == "F")
    severities = [one["severity"] for one in part["findings"]]
    assert severities == sorted(severities, key="EFN".index)
    assert before == {file: file.lstat().st_mtime_ns for file in sorted((tmp_path / "data").rglob("*"))}


def config(data: Hostile, **changes: Any) -> Path:
    """A config that trains and validates on the set."""
    part = {"annotations": "file.json", "images": "pictures"}
    tree = {"data": {"root": str(data.folder), "train": part, "val": part | changes}, "model": {"masks": True}}
    (data.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return data.folder / "config.yaml"


def report_of(tmp_path: Path, source: Path, *overrides: str, **options: Any) -> tuple[bool, Report, str]:
    lines: list[str] = []
    passed = check(str(source), overrides, lines.append, out=tmp_path / "report.json", **options)
    return passed, json.loads((tmp_path / "report.json").read_text()), "\n".join(lines)


@pytest.mark.faults
def test_t17_faults_between_the_sets_and_with_the_config(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.write(), data.object(segmentation=None)
    data.write("train.json"), data.tree["categories"].append({"id": 3, "name": "cow"})
    data.write("val.json")
    path = config(data, annotations="val.json")
    passed, report, text = report_of(tmp_path, path, "data.train.annotations=train.json")
    assert not passed and found(report["both"]) == {"classes-differ": ("E", 1), "file-in-both": ("N", 1)}
    assert found(report["sets"][0]["findings"]) == {"mask-needed": ("E", 1)}
    assert found(report["sets"][1]["findings"]) == {"category-unused": ("N", 1), "mask-missing": ("N", 1)}
    assert "one file" in text and "refused: mask-needed, classes-differ" in text
    passed, report, _ = report_of(tmp_path, path, "data.classes=[cat,cow]")
    assert found(report["sets"][0]["findings"]) == {"classes-choice": ("E", 1)}
    passed, report, _ = report_of(tmp_path, path, "data.val.annotations=file.json", images=True)
    assert passed and found(report["both"]) == {"file-in-both": ("N", 1)}
    for annotation in data.tree["annotations"]:
        annotation["iscrowd"] = 1
    data.write("train.json")
    _, report, _ = report_of(tmp_path, path, "data.train.annotations=train.json")
    assert found(report["sets"][0]["findings"])["objects-none"] == ("E", 1)
    _, report, _ = report_of(tmp_path, path, "data.train.annotations=train.json", "data.keep_empty=true")
    assert "objects-none" not in found(report["sets"][0]["findings"])


@pytest.mark.faults
def test_equal_pictures_of_other_names_are_found_in_both_sets(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.write()
    (data.folder / "val").mkdir()
    (data.folder / "val" / "other.png").write_bytes((data.pictures / "01.png").read_bytes())
    data.tree["images"][0]["file_name"] = "other.png"
    data.write("val.json")
    passed, report, _ = report_of(tmp_path, config(data, annotations="val.json", images="val"), images=True)
    assert passed and found(report["both"]) == {"picture-in-both": ("N", 1)}


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: p.unlink(), "json-unreadable"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "json-unreadable"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "json-unreadable"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").writestr("../canary", "x"), "json-archive"),
    "tar": (lambda p: tar(p), "json-archive"),
    "empty": (lambda p: p.write_bytes(b""), "json-broken"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "json-broken"),
    "HTML": (lambda p: p.write_bytes(b"<html>404</html>"), "json-broken"),
    "huge number": (lambda p: p.write_text(f'{{"images": {"9" * 5000}}}'), "json-broken"),
    "deep": (lambda p: p.write_text("[" * 100_000), "json-broken"),
    "results": (lambda p: p.write_text('[{"image_id": 1, "score": 0.5}]'), "json-other"),
    "other lists": (lambda p: p.write_text('{"images": [3]}'), "json-other"),
    "no images": (lambda p: p.write_text('{"images": [], "annotations": [], "categories": []}'), "json-other"),
}


def tar(path: Path) -> None:
    """A tar whose member leads out of the folder it would be unpacked in."""
    path.with_name("member").write_text("x")
    path.unlink()
    with tarfile.open(path, "w") as file:
        file.add(path.with_name("member"), "../canary")


@pytest.mark.faults
@pytest.mark.parametrize("kind", FILES)
def test_t21_a_file_that_is_no_annotation_file_is_refused(tmp_path: Path, kind: str) -> None:
    """T21: archives are neither opened nor unpacked."""
    data = Hostile(tmp_path / "a" / "b")
    path = data.write()
    FILES[kind][0](path)
    passed, report, text = report_of(tmp_path, path, image_folder=data.pictures)
    assert not passed and found(report["sets"][0]["findings"]) == {FILES[kind][1]: ("E", 1)}
    assert str(path) in text and "no image is left" in text
    assert not list(tmp_path.rglob("canary"))
    with pytest.raises(DataError, match=FILES[kind][1]):
        read_dataset(DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(data.folder)))


@pytest.mark.faults
def test_t21_an_archive_for_an_image_folder_is_refused_and_the_rest_is_checked(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.object(bbox=None)
    path = data.write()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as file:
        file.write(data.pictures / "01.png", "../canary")
    passed, report, text = report_of(tmp_path, path, image_folder=tmp_path / "pictures.zip")
    expected = {"folder-missing": ("E", 1), "box-malformed": ("E", 1)}
    assert not passed and found(report["sets"][0]["findings"]) == expected
    assert "an archive, which is not opened, expected a folder" in text and not list(tmp_path.rglob("canary"))


def test_no_row_of_the_table_is_untried() -> None:
    tried = {*BAD_OBJECTS, *BAD_IMAGES, *BAD_PICTURES, *(code for _, code in FILES.values()), "folder-missing"}
    tried |= {"classes-differ", "classes-choice", "file-in-both", "picture-in-both", "mask-needed", "objects-none"}
    assert set(FAULTS) - tried == {"picture-crash"}  # below: look_or_die


def test_a_shapes_config_is_checked_and_drawn(tmp_path: Path) -> None:
    tree = {"data": {part: {"kind": "shapes", "count": 3, "size": 64} for part in ("train", "val")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    passed, report, text = report_of(tmp_path, tmp_path / "config.yaml", images=True, sheet=tmp_path / "sheet.png")
    assert passed and [one["summary"]["images"] for one in report["sets"]] == [3, 3] and report["both"] == []
    assert "nothing is refused" in text and "triangle" in text
    assert Image.open(tmp_path / "sheet.png").width > 4 * 640


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "annotations", "whatever"])
def test_the_image_folder_of_a_json_file_is_found(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text('{"images": [{"file_name": "a \\u00fc.png"}]}')
    assert guess_folder(path) is None
    (tmp_path / folder / "a ü.png").touch()
    assert guess_folder(path) == tmp_path / folder


def test_without_pictures_the_annotations_are_checked(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    (data.pictures / "01.png").unlink()
    passed, report, text = report_of(tmp_path, data.write(), images=True, sheet=tmp_path / "sheet.png")
    assert passed and "annotations alone are checked" in text and report["sets"][0]["images"] is None
    assert not (tmp_path / "sheet.png").exists()


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(noise("RGB", (64, 50)), width=64, height=50), data.object(area=5000), data.object(area=10_000, iscrowd=1)
    _, report, text = report_of(tmp_path, data.write())
    summary = report["sets"][0]["summary"]
    assert (summary["images"], summary["objects"], summary["crowd_regions"], summary["most_objects"]) == (2, 5, 1, 3)
    assert summary["smallest"] == [40, 30] and summary["largest"] == [64, 50]
    assert summary["small_medium_large"] == [3, 1, 1]
    assert summary["classes"] == [
        {"id": 1, "name": "cat", "objects": 4, "images": 2}, {"id": 2, "name": "dog", "objects": 1, "images": 1},
    ]  # fmt: skip
    assert "2 images of 40 x 30 to 64 x 50 (in 2 sizes) pixels, 5 objects, 2.5 an image, 3 at the most" in text


def test_nothing_is_written_among_the_data(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    path = data.write()
    for option in ("sheet", "out"):
        for target in (data.pictures / "01.png", data.pictures / "new.png", path):
            before = target.read_bytes() if target.exists() else None
            with pytest.raises(OutputError, match="among your data"):
                check(str(path), [], lambda _: None, image_folder=data.pictures, **{option: target})
            assert (target.read_bytes() if target.exists() else None) == before
    with pytest.raises(OutputError, match="cannot write"):
        check(str(path), [], lambda _: None, image_folder=data.pictures, sheet=tmp_path / "sheet.xyz")


# --- the contact sheet


def test_the_sheet_shows_faults_first_then_evenly(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    for _ in range(39):
        data.image()
    data.tree["annotations"][-1]["bbox"] = [-5, 2, 18, 10]  # image 40: box-clipped, box-overhang
    data.write()
    cfg = DatasetConfig(annotations="file.json", images="pictures")
    dataset = inspect_dataset(cfg, DataConfig(root=str(data.folder)))
    picked = chosen(dataset, 4)
    assert picked == {0: [], 10: [], 20: [], 39: ["box-clipped", "box-overhang"]}
    assert list(chosen(dataset, 100)) == list(range(40))


def test_a_picture_that_cannot_be_shown_is_a_placard(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(b"no picture")
    data.write()
    cfg, folder = DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(data.folder))
    sheet = contact_sheet([("", inspect_dataset(cfg, folder))])
    assert sheet is not None and (sheet == 225).all(-1).mean() > 0.1  # the placard's ground
    assert contact_sheet([("", inspect_dataset(cfg, folder)._replace(records=[]))]) is None


# --- decoding in processes of their own


def look_or_die(picture: Picture) -> Any:
    """As a decoder that some files kill."""
    if "kill" in picture.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in picture.path.name:
        os._exit(3)
    if "ctrl" in picture.path.name:
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C goes to the whole process group
    if "sleep" in picture.path.name:
        time.sleep(60)
    return look_at_picture(picture)


@pytest.mark.faults
def test_a_picture_that_kills_its_process_is_named_and_the_others_are_looked_at(tmp_path: Path) -> None:
    names = [f"{i}{kind}.png" for i, kind in enumerate(["", "kill", "", "ctrl", "exit", "kill", "", ""])]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    pictures = [Picture(tmp_path / name, (4, 4), 100) for name in names]
    looks = {look.place: look for look in look_at_all(pictures, 2, look_or_die)}
    assert sorted(looks) == list(range(8))
    codes = {place: look.faults[0][0] for place, look in looks.items() if look.faults}
    assert codes == dict.fromkeys((1, 4, 5), "picture-crash")
    assert "1kill.png: ended the process that decoded it by SIGSEGV" in looks[1].faults[0][1]
    assert "exit status 3" in looks[4].faults[0][1]
    assert looks[0].digest == looks[2].digest != ""


@pytest.mark.faults
def test_a_picture_that_takes_too_long_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "sleep.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    pictures = [Picture(path, (4, 4), 100) for path in sorted(tmp_path.glob("*.png"))]
    looks = {look.place: look.faults for look in look_at_all(pictures, 1, look_or_die, patience=1)}
    assert looks == {0: [], 1: [], 2: [("picture-crash", f"{tmp_path / 'sleep.png'}: took over 1 s to decode")]}


def test_looking_can_be_left_early(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    looks = look_at_all([Picture(tmp_path / "a.png", (4, 4), 100)] * 50, 2)
    assert next(looks).faults == []
    looks.close()
