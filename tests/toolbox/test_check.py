"""`gndet check` lists every fault of any data set with its outcome, and writes nothing into the data."""

import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from hostile import (
    BAD_IMAGES,
    BAD_OBJECTS,
    BAD_PICTURES,
    Hostile,
    make_bad_images,
    make_bad_objects,
    make_bad_pictures,
    noise,
)
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import load_config
from gndet.data.datasets.faults import FAULTS
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.images import Reading
from gndet.data.datasets.reading import inspect_dataset, read_dataset
from gndet.errors import ConfigError, DataError, OutputError
from gndet.evaluation.drawing import placard
from gndet.toolbox.check.check import check
from gndet.toolbox.check.pictures import Decoded, PictureFile, choose_images, contact_sheet, decode, decode_all
from gndet.training.task import read_both

Report = dict[str, Any]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `gndet check` in a process of its own; it must not die by a signal."""
    command = [sys.executable, "-m", "gndet.cli", "check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done


def found(part: Any) -> dict[str, tuple[str, int]]:
    return {one["code"]: (one["severity"], one["count"]) for one in part}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "expected", "images", "kept"),
    [
        (make_bad_objects, BAD_OBJECTS, 2, 2),
        (make_bad_images, BAD_IMAGES, 23, 9),
        (make_bad_pictures, BAD_PICTURES, 19, 19),
    ],
)
def test_t17_every_fault_has_its_outcome(
    tmp_path: Path, make: Callable[[Hostile], None], expected: dict[str, tuple[str, int]], images: int, kept: int
) -> None:
    """T17: 43 hostile images in three sets; the exact list of findings, and no signal."""
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
        number = f"{one['count']} of {one['of']}" if one["of"] and one["severity"] != "E" else one["count"]
        assert f"{one['severity']} {one['code']} ({number}): {FAULTS[one['code']].what}" in done.stdout
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
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "data-unknown"),
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
    data.object(bbox=3)
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
    texts = [path.read_text() for path in (REPOSITORY / "tests" / "data").glob("test_*.py")]
    tried |= {code for code in FAULTS if any(f'"{code}"' in text for text in texts)}
    assert set(FAULTS) - tried == {"picture-crash"}  # below: decode_or_die


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
    assert guess_folder(path) == (tmp_path / folder if "train2017" in folder else None)  # by its name
    (tmp_path / folder / "a ü.png").touch()
    assert guess_folder(path) == tmp_path / folder


def test_without_pictures_the_annotations_are_checked(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    (data.pictures / "01.png").unlink()
    path = data.write()
    passed, report, text = report_of(tmp_path, path)
    assert passed and "only annotations are checked" in text and report["sets"][0]["images"] is None
    for option, wanted in (("--images", {"images": True}), ("--sheet", {"sheet": tmp_path / "sheet.png"})):
        with pytest.raises(OutputError, match=f"{option} needs the pictures; --image-folder names them"):
            check(str(path), [], lambda _: None, **wanted)
    path.write_text('{"images": [3]}')
    _, report, text = report_of(tmp_path, path, images=True)
    assert "only annotations are" not in text and found(report["sets"][0]["findings"]) == {"json-other": ("E", 1)}


def test_a_folder_is_guessed_though_its_first_picture_is_missing(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(), (data.pictures / "01.png").unlink()
    passed, report, _ = report_of(tmp_path, data.write())
    assert not passed and found(report["sets"][0]["findings"]) == {"file-missing": ("E", 1)}
    (data.pictures / "02.png").unlink()
    data.pictures.rename(data.folder / "train")
    passed, report, _ = report_of(tmp_path, data.write("instances_train.json"))
    assert not passed and found(report["sets"][0]["findings"]) == {"file-missing": ("E", 2)}


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(noise("RGB", (120, 100)), width=120, height=100)
    data.object(bbox=[0, 0, 100, 60], area=5000, segmentation=None)
    data.object(bbox=[0, 0, 120, 100], area=10_000, iscrowd=1)
    _, report, text = report_of(tmp_path, data.write())
    summary = report["sets"][0]["summary"]
    assert (summary["images"], summary["objects"], summary["crowd_regions"], summary["most_objects"]) == (2, 5, 1, 3)
    assert summary["smallest"] == [40, 30] and summary["largest"] == [120, 100]
    assert summary["small_medium_large"] == [3, 1, 1]
    assert summary["classes"] == [
        {"id": 1, "name": "cat", "objects": 4, "images": 2}, {"id": 2, "name": "dog", "objects": 1, "images": 1},
    ]  # fmt: skip
    assert "2 images of 40 x 30 and 120 x 100 pixels, 5 objects, 2.5 per image, at most 3" in text


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


@pytest.mark.parametrize("name", ["file.json", "val.json", "config.yaml", "base.yaml", "other.json", "link.json"])
def test_no_file_of_the_user_is_overwritten(tmp_path: Path, name: str) -> None:
    data = Hostile(tmp_path / "data")
    data.write(), data.write("val.json"), data.write("other.json")
    config(data, annotations="val.json").rename(data.folder / "base.yaml")
    (data.folder / "config.yaml").write_text("base: base.yaml\n")
    os.link(data.folder / "file.json", data.folder / "link.json")
    before = (data.folder / name).read_bytes()
    with pytest.raises(OutputError, match=r"among your data|not a report of gndet check"):
        check(str(data.folder / "config.yaml"), [], lambda _: None, out=data.folder / name)
    with pytest.raises(OutputError, match=r"not a picture that gndet drew|among your data"):
        check(str(data.folder / "config.yaml"), [], lambda _: None, sheet=data.folder / name)
    assert (data.folder / name).read_bytes() == before


def test_an_old_report_is_overwritten_and_outputs_must_differ(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    path = data.write()
    for _ in range(2):
        report_of(tmp_path, path, sheet=tmp_path / "sheet.png")
    with pytest.raises(OutputError, match="given to --sheet and to --json"):
        check(str(path), [], lambda _: None, sheet=tmp_path / "sheet.png", out=tmp_path / "x" / ".." / "sheet.png")
    (tmp_path / "sheet.png").write_text("notes")
    with pytest.raises(OutputError, match="is not a picture"):
        check(str(path), [], lambda _: None, sheet=tmp_path / "sheet.png")
    shapes = {"data": {part: {"kind": "shapes", "count": 1, "size": 64} for part in ("train", "val")}}
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(shapes))
    with pytest.raises(OutputError, match="among your data"):
        check(str(tmp_path / "shapes.yaml"), [], lambda _: None, out=tmp_path / "shapes.yaml")


# --- what is said


def test_one_file_of_two_names_is_found_in_both_sets(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.write()
    data.tree["images"][0]["file_name"] = "pictures/01.png"
    data.write("val.json")
    passed, report, text = report_of(tmp_path, config(data, annotations="val.json", images="."))
    assert passed and found(report["both"]) == {"file-in-both": ("N", 1)}
    assert "'01.png', 'pictures/01.png': image 1 of train, 1 of val; one file" in text


def test_masks_are_not_required_if_none_are_trained(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.object(segmentation=None)
    path = data.write()
    for source, expected in ((config(data), {}), (path, {})):
        _, report, _ = report_of(tmp_path, source, "model.masks=false")
        assert all(found(one["findings"]) == expected for one in report["sets"])
    assert found(report_of(tmp_path, path)[1]["sets"][0]["findings"]) == {"mask-missing": ("N", 1)}
    _, report, _ = report_of(tmp_path, path, "model.masks=true")
    assert found(report["sets"][0]["findings"]) == {"mask-needed": ("E", 1)}


def test_options_without_effect_on_a_json_file_are_refused(tmp_path: Path) -> None:
    path = Hostile(tmp_path / "data").write()
    for word in ("data.train.limit=1", "seed=3", "data={cache: x}"):
        with pytest.raises(ConfigError, match="has no effect on data without a config"):
            check(str(path), [word], lambda _: None)
    _, report, text = report_of(tmp_path, path, "data.classes=[dog]")
    assert report["sets"][0]["summary"]["objects"] == 1 and "only 1 of 2 classes are used" in text


def test_findings_beyond_the_limit_are_explained(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(), data.object(bbox=[2, 2, 0, 10])
    data.write()
    _, report, text = report_of(tmp_path, config(data), "data.train.limit=1")
    assert "only the first 1 of 2 images are used; the findings are of the whole file" in text
    assert report["sets"][1]["notes"] == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Cat", "dog"], "only train has 'cat' (nearest: 'Cat'); only val has 'Cat' (nearest: 'cat')"),
        (["dog", "cat"], "the same names in another order: label 0 is 'cat' in train, 'dog' in val"),
        (["cat", "dog", "dog"], "the same names in another order: label 2 is 'nothing' in train, 'dog' in val"),
        (["cat", "dog", *map(str, range(9))], "only val has '0', '1', '2', '3', '4' and 4 more"),
    ],
)
def test_differing_classes_are_reported(tmp_path: Path, names: list[str], words: str) -> None:
    data = Hostile(tmp_path / "data")
    data.write()
    data.tree["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    data.object(category_id=min(3, len(names)))  # a name that occurs twice is left out if no object has it
    data.write("val.json")
    passed, _, text = report_of(tmp_path, config(data, annotations="val.json"))
    assert not passed and words in text


def test_names_from_the_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.tree["categories"] = [{"id": 1, "name": "\x1b[2J" + "x" * 99}, {"id": 2, "name": "\ud800\n"}]
    done = run(
        data.write(), "--image-folder", data.pictures, "--sheet", tmp_path / "s.png", "--json", tmp_path / "r.json"
    )
    assert "\x1b" not in done.stdout and r"\x1b[2Jxxx" in done.stdout and r"\ud800\n" in done.stdout
    assert "x" * 61 not in done.stdout and "1 image of 40 x 30 pixels, 2 objects" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["sets"][0]["summary"]["classes"][1]["name"] == "\ufffd\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n", "it is a picture"),
    ],
)
def test_an_annotation_file_that_is_not_json_is_named_by_its_kind(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert words in report_of(tmp_path, tmp_path / "a.json")[2]


def test_a_folder_without_data_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "is empty" in report_of(tmp_path, tmp_path / "none")[2]


def test_an_id_out_of_range_is_reported_as_such(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(id=-5), data.image(id=2**70)
    text = report_of(tmp_path, data.write())[2]
    assert "image-id (1): images whose id is not an integer from 0 to 2**63 - 1" in text
    assert f"image id {2**70} becomes 2" in text
    assert "annotations of an image that is not in the file (or its id is wrong)" in text


# --- the start of a training run


def test_a_run_is_refused_with_all_that_is_wrong_in_both_sets_and_between(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.write(), data.object(bbox=3)
    data.write("train.json"), data.tree["annotations"].pop()
    data.tree["annotations"][0]["area"] = -1
    data.tree["categories"].append({"id": 3, "name": "cow"})
    data.write("val.json")
    cfg = load_config(config(data, annotations="val.json"), ["data.train.annotations=train.json"])
    with pytest.raises(
        DataError, match=r"(?s)data\.train: .*box-malformed.*data\.val: .*area-value.*only val has 'cow'"
    ):
        read_both(cfg)
    notes = read_both(load_config(config(data), ["model.masks=false"]))[2]
    assert "data.train and data.val: noted: file-in-both (1): file names in both train and val" in notes


# --- the contact sheet


def test_the_sheet_shows_faults_first_then_evenly(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    for _ in range(39):
        data.image()
    data.tree["annotations"][-1]["bbox"] = [-5, 2, 18, 10]  # image 40: box-clipped, box-overhang
    data.write()
    cfg = DatasetConfig(annotations="file.json", images="pictures")
    dataset = inspect_dataset(cfg, DataConfig(root=str(data.folder)))
    picked = choose_images(dataset, 4)
    assert picked == {0: [], 10: [], 20: [], 39: ["box-clipped", "box-overhang"]}
    assert list(choose_images(dataset, 100)) == list(range(40))


def test_a_picture_that_cannot_be_shown_is_a_placard(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(b"no picture")
    data.write()
    cfg, folder = DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(data.folder))
    sheet = contact_sheet([("", inspect_dataset(cfg, folder))])
    assert sheet is not None and (sheet == 225).all(-1).mean() > 0.1  # the placard's ground
    assert contact_sheet([("", inspect_dataset(cfg, folder)._replace(records=[]))]) is None


def test_a_picture_of_another_size_is_shown_without_boxes(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    data.image(Image.new("RGB", (60, 60), (0, 0, 250)))
    data.write()
    cfg, folder = DatasetConfig(annotations="file.json", images="pictures"), DataConfig(root=str(data.folder))
    sheet = contact_sheet([("", inspect_dataset(cfg, folder)._replace(classes=("cat", "dog")))])
    assert (sheet == (0, 0, 250)).all(-1).sum() == 640 * 640  # all of it, and nothing over it


def test_a_placard_breaks_between_words() -> None:
    words = "/a/file/of/some/length.png: height, width are (20, 30), the annotation file says (30, 20); it fits"
    picture, parts = placard(words, 640), words.split()
    ink = np.flatnonzero((picture < 200).any((1, 2)))
    assert 0 < len(ink) < 100 and all(placard(part, 640).shape == picture.shape for part in parts)
    # a line that is full to the last letter would reach the margin: here the next word does not fit
    assert np.flatnonzero((placard("x" * 200, 640) < 200).any((0, 2))).max() > 600


# --- decoding in processes of their own


def decode_or_die(picture: PictureFile) -> Decoded:
    """Decode a picture, unless its name says to die, hang or fail."""
    faulthandler.disable()  # pytest's would print a dump
    if "kill" in picture.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in picture.path.name:
        os._exit(3)
    if "ctrl" in picture.path.name:
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C goes to the whole process group
    if "sleep" in picture.path.name:
        time.sleep(600)
    if "large" in picture.path.name:
        raise MemoryError("80 GiB")
    return decode(picture)


@pytest.mark.faults
def test_a_picture_that_kills_its_process_is_named_and_the_others_are_decoded(tmp_path: Path) -> None:
    names = [f"{i}{kind}.png" for i, kind in enumerate(["", "kill", "", "ctrl", "exit", "kill", "large", ""])]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    pictures = [PictureFile(tmp_path / name, (4, 4), Reading(100)) for name in names]
    decoded = list(decode_all(pictures, 2, decode_or_die))
    assert len(decoded) == 8
    codes = {place: faults[0][0] for place, (faults, *_) in enumerate(decoded) if faults}
    assert codes == dict.fromkeys((1, 4, 5, 6), "picture-crash")
    assert "1kill.png: ended the process that decoded it by SIGSEGV" in decoded[1].faults[0][1]
    assert "exit status 3" in decoded[4].faults[0][1]
    assert decoded[6].faults[0][1].endswith("6large.png: MemoryError: 80 GiB")
    assert decoded[0].digest == decoded[2].digest != ""


@pytest.mark.faults
def test_a_picture_that_takes_too_long_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "sleep.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    pictures = [PictureFile(path, (4, 4), Reading(100)) for path in sorted(tmp_path.glob("*.png"))]
    faults = [picture.faults for picture in decode_all(pictures, 1, decode_or_die, time_limit=5)]
    assert faults == [[], [], [("picture-crash", f"{tmp_path / 'sleep.png'}: took over 5 s to decode")]]


INTERRUPTED = """
import os, signal, sys, threading
from gndet.cli.main import main
from gndet.toolbox.check import pictures

moment, number, with_thread = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "thread"
forks = []

def interrupt():
    if len(forks) == number:
        os.killpg(0, signal.SIGINT)  # as Ctrl-C, to all

os.register_at_fork(**{moment: interrupt})
os.register_at_fork(before=lambda: forks.append(1))  # the last to be registered is the first to be called
pictures.usable_cores = lambda: 2
if with_thread:  # which takes the signal when the main thread has blocked it
    threading.Thread(target=threading.Event().wait, daemon=True).start()
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("moment", "number", "threads"),
    [("before", 1, "alone"), ("after_in_parent", 2, "thread"), ("after_in_child", 2, "alone")],
)
def test_an_interrupt_while_the_processes_start_ends_it_quietly(
    tmp_path: Path, moment: str, number: int, threads: str
) -> None:
    """The signal is sent from within the fork, so that no load on the machine can make it come late."""
    data = Hostile(tmp_path / "data")
    for _ in range(20):
        data.image()
    command = [sys.executable, "-c", INTERRUPTED, moment, str(number), threads, "check", str(data.write()), "--images"]
    command += ["data.cache=", "--image-folder", str(data.pictures)]
    done = subprocess.run(command, capture_output=True, start_new_session=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, b"gndet check: interrupted\n")


def test_processes_that_cannot_be_started_are_reported(tmp_path: Path) -> None:
    data = Hostile(tmp_path / "data")
    code = "import sys, resource; from gndet.toolbox.check import check; from gndet.cli.main import main\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8)); raise SystemExit(main(sys.argv[1:]))"
    words = ["check", str(data.write()), "--images", "--image-folder", str(data.pictures), "data.cache="]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "a loader process cannot be started: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_decoding_can_be_left_early(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    decoded = decode_all([PictureFile(tmp_path / "a.png", (4, 4), Reading(100))] * 50, 2)
    assert next(decoded).faults == []
    decoded.close()
    assert not multiprocessing.active_children()
