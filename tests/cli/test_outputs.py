"""Where commands may write: no verb replaces, or writes among, what gndet did not write itself."""

import argparse
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from faults.tiny import CONFIG
from PIL import Image
from pycocotools.coco import COCO
from writing import only_by_the_writer

from gndet.cli.arguments import path
from gndet.cli.main import VERBS, main, parser
from gndet.config.loading import load_config
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.shapes import read_shapes
from gndet.evaluation.video import VIDEO, video_writer
from gndet.files import is_own
from gndet.toolbox.doctor import doctor
from gndet.toolbox.invariance import invariance
from gndet.toolbox.invariance.invariance import Report
from gndet.train import train

pytestmark = pytest.mark.usefixtures("thin")


class Row(NamedTuple):
    """An output option of a verb, its command line in the folder of `home`, and the files that it writes."""

    verb: str
    option: str  # argparse's name for it; "" for an override
    words: str
    files: tuple[str, ...]
    again: bool = True  # whether a second run replaces them


ROWS = [
    Row("analyze", "json", "analyze detections.json --data ann.json --json out/a.json", ("out/a.json",)),
    Row(
        "analyze", "csv", "analyze run --csv out",
        tuple(f"out/{name}.csv" for name in ("classes", "errors", "thresholds", "confusion", "images", "suspects")),
    ),
    Row("check", "json", "check ann.json --json out/a.json", ("out/a.json",)),
    Row("check", "sheet", "check ann.json --sheet out/sheet.png", ("out/sheet.png",)),
    Row("check", "sheet", "check ann.json --sheet out/sheet.JPG", ("out/sheet.JPG",)),
    Row("convert", "out", "convert run out/start", ("out/start",), again=False),
    Row("convert", "out", "convert run out/start.pth --to torchvision", ("out/start.pth",), again=False),
    Row("convert-data", "out", "convert-data ann.json out --to coco", ("out/data.yaml", "out/notes.txt"), again=False),
    Row("convert-data", "out", "convert-data ann.json out --to yolo", ("out/data.yaml",), again=False),
    Row("doctor", "json", "doctor --config tiny.yaml --json out/a.json", ("out/a.json",)),
    Row("evaluate", "out", "evaluate run --out out/a.json", ("out/a.json",)),
    Row("export", "onnx", "export run --onnx out/a.onnx --size 64x64", ("out/a.onnx",)),
    Row("invariance", "out", "invariance tiny.yaml --out out/a.json", ("out/a.json",)),
    Row("norm-study", "out", "norm-study tiny.yaml --out out", ("out/study.json", "out/notes.txt"), again=False),
    Row(
        "predict", "out", "predict run photo.jpg --out out --threshold 0 --save-crops --sheet",
        ("out/photo.png", "out/predictions.json", "out/images.json", "out/sheet.png"),
    ),
    Row("report", "out", "report run --out out/a.html", ("out/a.html",)),
    Row("report", "out", "report run", ("run/report.html",)),
    Row("train", "", "train tiny.yaml out=out", ("out/config.yaml", "out/notes.txt"), again=False),
]  # fmt: skip
WHOLE = ("convert-data", "norm-study", "train")  # take a folder of their own, and refuse one of the user's by its name
INPUTS = {
    ("analyze", "source"), ("check", "image_folder"), ("convert", "images"), ("convert-data", "image_folder"),
    ("evaluate", "checkpoint"),
    ("export", "checkpoint"), ("export", "picture"), ("predict", "checkpoint"), ("report", "runs"),
}  # fmt: skip
BOX = {"image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
NAMES = [f"{row.words} ({name})" for row in ROWS for name in row.files]
PLACES = [(row, name) for row in ROWS for name in row.files]


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, "PNG")
    return file.getvalue()


USERS = {
    "annotations": json.dumps({"images": [], "annotations": [], "categories": []}, indent=1).encode(),
    "results of another tool": json.dumps([BOX]).encode(),
    "no results": b"[]",
    "a report of another tool": b'{"refused": true, "healthy": true, "note": "gndet"}',
    "a page": b'<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="Sphinx">\n',
    "a picture": picture(),
    "a table": b"class,images,objects\n",
    "a config": b"# mine\nbase: quickstart\n",
    "spaces": b" " * 200 + b"\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """A folder with a run, its config, its data as COCO JSON, detections of another tool, and a photo."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}))
    cfg = load_config(folder / "tiny.yaml", [f"out={folder / 'run'}", "train.schedule.updates=2", "train.vis_images=2"])
    with only_by_the_writer(folder) as written:
        train(cfg)
    assert written >= {"config.yaml", "metrics.jsonl", "norms.jsonl", "meta.json", "last", "best", "predictions.png"}
    dataset = read_shapes(cfg.data.val)
    (folder / "ann.json").write_text(json.dumps(to_coco(dataset)))
    (folder / "images").mkdir()
    for record in dataset.records:
        Image.fromarray(record.load()).save(folder / "images" / record.file_name)
    (folder / "detections.json").write_text(json.dumps([BOX | {"image_id": dataset.records[0].image_id}]))
    Image.fromarray(dataset.records[0].load()).save(folder / "photo.jpg")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as the current folder; doctor and invariance skip what takes long."""
    shutil.copytree(made, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(doctor, "examine", lambda _: [])
    monkeypatch.setattr(invariance, "check_invariance", lambda *_: Report({"float64": {}}, {"float64": {}}, []))
    return tmp_path / "home"


def content(folder: Path) -> dict[str, bytes | str]:
    """Return every file below a folder with its bytes, and every link with its target."""
    found = sorted(folder.rglob("*"))
    links = {str(file.relative_to(folder)): os.readlink(file) for file in found if file.is_symlink()}
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.is_file()} | links


def refused(home: Path, words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused and change nothing.  Returns its message."""
    before = content(home)
    capsys.readouterr()
    assert main(words.split()) == 2, words
    said = capsys.readouterr()
    assert content(home) == before and "Traceback" not in said.err
    return said.err


def path_options() -> Iterator[tuple[str, str]]:
    verbs = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb, arguments in verbs.choices.items():
        yield from ((verb, action.dest) for action in arguments._actions if action.type is path)


def test_every_path_of_a_command_line_is_an_input_or_an_output_that_is_tried_here() -> None:
    assert set(path_options()) == INPUTS | {(row.verb, row.option) for row in ROWS if row.option}
    assert {row.verb for row in ROWS} == VERBS.keys() - {"config", "norms"}  # these two only print


@pytest.mark.parametrize(("row", "name"), PLACES, ids=NAMES)
def test_what_gndet_did_not_write_is_never_replaced(
    row: Row, name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, mine in USERS.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(mine)
        message = refused(home, row.words, capsys)
        assert Path(name).name in message or (" out: " in message and row.verb in WHOLE), what
        (home / name).unlink()


@pytest.mark.parametrize(("row", "name"), PLACES, ids=NAMES)
def test_links_folders_and_devices_are_never_replaced(
    row: Row, name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / name).parent.mkdir(exist_ok=True)
    (home / "empty").touch()
    for make in (
        lambda: (home / name).symlink_to(home / "empty"), lambda: (home / name).symlink_to(home / "missing"),
        lambda: os.link(home / "tiny.yaml", home / name), lambda: os.mkfifo(home / name),
    ):  # fmt: skip
        make()
        refused(home, row.words, capsys)
        (home / name).unlink()
    if row.verb not in WHOLE:
        (home / name / "deep").mkdir(parents=True)
        refused(home, row.words, capsys)


def without_verb(row: Row) -> str:
    return row.words


@pytest.mark.parametrize("row", [row for row in ROWS if row.again], ids=without_verb)
def test_a_second_run_replaces_what_the_first_wrote_and_an_empty_file(row: Row, home: Path) -> None:
    for name in row.files:
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    with only_by_the_writer(home) as written:
        assert main(row.words.split()) == 0
    assert written >= {Path(name).name for name in row.files}
    for name in row.files:
        assert (home / name).stat().st_size
        os.utime(home / name, (0, 0))
    assert main(row.words.split()) == 0
    assert all((home / name).stat().st_mtime for name in row.files)  # written again


@pytest.mark.parametrize("row", [row for row in ROWS if not row.again and row.verb == "convert"], ids=without_verb)
def test_converted_weights_are_not_even_replaced_by_converted_weights(
    row: Row, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(row.words.split()) == 0
    assert "exists; choose another name" in refused(home, row.words, capsys)


@pytest.mark.parametrize("row", [row for row in ROWS if row.again and row.verb != "predict"], ids=without_verb)
def test_what_another_option_wrote_is_not_replaced(row: Row, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", "photo.jpg", "--out", "other"]) == 0
    assert main(["check", "ann.json", "--json", "other/check.json"]) == 0
    others = ["other/images.json", *(["other/predictions.json"] if row.verb != "evaluate" else [])]
    others += ["other/photo.png"] if row.option != "sheet" else []
    others += ["other/check.json"] if row[:2] != ("check", "json") else []
    for name in row.files:
        (home / name).parent.mkdir(exist_ok=True)
        for other in others:
            shutil.copy(home / other, home / name)
            refused(home, row.words, capsys)


PARTS = [
    "config.yaml", "metrics.jsonl", "detections.json", "predictions.png", "norms.jsonl", "norms-start.safetensors",
    "last/meta.json", "best/model.safetensors", "checkpoints/update-0000002/manifest.json", ".lock",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_no_option_replaces_a_part_of_a_run(part: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run" / part).read_bytes()
    commands = ["evaluate run --out", "report run --out", "analyze run --json", "check ann.json --json",
                "doctor --json", "export run --onnx", "invariance tiny.yaml --out", "check ann.json --sheet",
                "convert run"]  # fmt: skip
    for command in commands:
        assert part.rpartition("/")[2] in refused(home, f"{command} run/{part}", capsys)


def test_a_drawing_and_the_detections_of_a_run_stay(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "photo.jpg").rename(home / "predictions.jpg")
    assert "predictions.png: exists" in refused(home, "predict run predictions.jpg --out run", capsys)
    (home / "run" / "predictions.png").unlink()
    assert "detections.json: exists" in refused(home, "evaluate run --out run/detections.json", capsys)
    assert main(["evaluate", "run", "--out", "run/new.json"]) == 0


# --- inputs


DATA = "data.root=. data.val={kind: coco, annotations: ann.json, images: images}"


@pytest.mark.parametrize(
    "target", ["ann.json", "./images/../ann.json", "hard.json", "soft.json", "IMAGE", "images/new"]
)
@pytest.mark.parametrize("command", ["evaluate run --out", "export run --onnx", "report run --out",
                                     "invariance tiny.yaml --out", "doctor --config tiny.yaml --json"])  # fmt: skip
def test_no_input_is_replaced_under_any_of_its_names_and_no_image_folder_gets_a_file(
    command: str, target: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.link(home / "ann.json", home / "hard.json")
    (home / "soft.json").symlink_to("ann.json")
    (home / "linked").symlink_to("images")
    target = target.replace("IMAGE", f"linked/{next((home / 'images').iterdir()).name}")
    before = content(home)
    words = [*command.split(), target, "data.root=.", "data.val={kind: coco, annotations: ann.json, images: images}"]
    assert main(words) == 2
    assert "among your data" in capsys.readouterr().err and content(home) == before


@pytest.mark.parametrize("target", ["new.json", "run/new.json", "later/new.json", "out/new.json"])
def test_beside_a_projects_folders_of_pictures_there_is_room(
    target: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image folder may be the project itself, if the names of the files lead into its folders."""
    tree = json.loads((home / "ann.json").read_text())
    tree["images"] = [image | {"file_name": f"images/{image['file_name']}"} for image in tree["images"]]
    (home / "ann.json").write_text(json.dumps(tree))
    assert main(["predict", "run", "photo.jpg", "--out", "out"]) == 0
    (home / "photo.jpg").unlink()
    words = ["data.root=.", "data.val={kind: coco, annotations: ann.json, images: .}"]
    assert main(["evaluate", "run", "--out", target, *words]) == 0
    assert main(["check", "ann.json", "--json", target.replace("new", "report")]) == 0
    for place in ("images/new.json", "images/deep/new.json"):
        assert main(["evaluate", "run", "--out", place, *words]) == 2
        assert main(["check", "ann.json", "--json", place]) == 2
    assert capsys.readouterr().err.count("among your data") == 4 and not (home / "images" / "deep").exists()


def test_an_input_is_kept_even_if_gndet_wrote_it_for_this_option(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "run", "--out", "ours.json"]) == 0
    assert "among your data" in refused(home, "analyze ours.json --data ann.json --json ours.json", capsys)
    assert "among your data" in refused(home, "analyze detections.json --data ann.json --json ann.json", capsys)
    assert main(["predict", "run", "photo.jpg", "--out", "out"]) == 0
    drawn = (home / "out" / "photo.png").read_bytes()
    assert main(["predict", "run", "out/photo.png", "--out", "out"]) == 2  # its drawing would replace it
    assert "would overwrite the picture" in capsys.readouterr().err
    assert (home / "out" / "photo.png").read_bytes() == drawn


# --- predict


def test_predict_beside_a_picture_keeps_all_that_is_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", "photo.jpg", "--out", "."]) == 0
    before = content(home)
    assert main(["predict", "run", "photo.jpg", "--out", "."]) == 0
    assert content(home).keys() == before.keys()
    for name in ("photo.png", "predictions.json", "images.json"):
        (home / name).write_bytes(picture())
        assert f"{name}: exists and is not" in refused(home, "predict run photo.jpg --out .", capsys)
        (home / name).unlink()


def test_predict_on_a_folder_passes_over_its_own_drawings_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mine").mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(home / "photo.jpg", home / "mine" / name)
    words = ["predict", "run", "mine", "--out", "mine", "--sheet", "--save-crops", "--threshold", "0"]
    assert main(words) == 0
    first = content(home / "mine")
    capsys.readouterr()
    assert main(words) == 0
    assert "mine: 3 pictures passed over, which gndet drew" in capsys.readouterr().out
    assert content(home / "mine").keys() == first.keys()
    assert main(["predict", "run", "mine/a.png", "mine/crops", "--out", "elsewhere"]) == 2  # none directly in crops/
    crops = next(folder for folder in (home / "mine" / "crops").iterdir())
    assert main(["predict", "run", "mine/a.png", str(crops), "--out", "elsewhere"]) == 0  # named, or not in --out
    for name in ("a.jpg", "b.jpg"):
        (home / "mine" / name).unlink()
    assert "there is no other" in refused(home, "predict run mine --out mine", capsys)


def test_crops_of_the_user_stay(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "predict run photo.jpg --out out --save-crops --threshold 0"
    assert main(words.split()) == 0
    crop = next((home / "out" / "crops").rglob("*-1-*.png"))
    crop.write_bytes(picture())
    (crop.parent / "holiday.png").write_bytes(picture())
    assert crop.name in refused(home, words, capsys)
    crop.unlink()
    assert main(words.split()) == 0
    assert (crop.parent / "holiday.png").read_bytes() == picture()
    shutil.rmtree(home / "out" / "crops")
    (home / "out" / "crops").write_text("notes")
    assert "crops: exists" in refused(home, words, capsys)


def test_videos_are_known_by_a_box_that_players_skip(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")

    def write(file: Path) -> None:
        with video_writer(file, 10) as append:
            for i in range(3):
                append(np.full((64, 64, 3), 80 * i, dtype=np.uint8), i / 10)

    write(home / "clip.mp4")
    with av.open(str(home / "clip.mp4")) as opened:
        assert len(list(opened.decode(video=0))) == 3
    assert is_own(home / "clip.mp4", VIDEO)
    for _ in range(2):
        assert main(["predict", "run", "clip.mp4", "--out", "out"]) == 0
    (home / "out" / "clip.mp4").write_bytes((home / "clip.mp4").read_bytes()[:-1])
    assert "clip.mp4: exists and is not a video" in refused(home, "predict run clip.mp4 --out out", capsys)
    assert "would overwrite" in refused(home, "predict run clip.mp4 --out .", capsys)


# --- what other programs see


def test_marks_do_not_disturb_what_reads_the_files(home: Path) -> None:
    assert main(["predict", "run", "photo.jpg", "--out", "out", "--threshold", "0"]) == 0
    assert main(["analyze", "run", "--csv", "tables"]) == 0
    coco = COCO(str(home / "out" / "images.json"))
    found = coco.loadRes(str(home / "out" / "predictions.json"))
    assert len(found.anns) == len(json.loads((home / "out" / "predictions.json").read_text())) > 0
    with Image.open(home / "out" / "photo.png") as opened:
        opened.load()
        assert opened.info["Software"] == "gndet"
    with (home / "tables" / "classes.csv").open() as file:
        assert next(csv.reader(file))[0] == "class"


def test_a_file_that_another_program_saved_again_is_the_users(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run", "--out", "a.json"]) == 0
    shutil.copy(home / "a.json", home / "b.json")
    assert main(["evaluate", "run", "--out", "b.json"]) == 0  # a copy is the same file
    (home / "b.json").write_text(json.dumps(json.loads((home / "b.json").read_text())))
    assert "b.json: exists" in refused(home, "evaluate run --out b.json", capsys)


def test_every_refusal_comes_before_anything_is_computed(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of the config is missing: a command that read it would say so."""
    monkeypatch.setattr("gndet.evaluation.trained_model.read_dataset", lambda *_: pytest.fail("read"))
    (home / "a.json").write_text("[]")
    assert "a.json: exists" in refused(home, "evaluate run --out a.json", capsys)


# --- run folders


def test_train_leaves_a_folder_of_the_user_as_it_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = home / "project"
    project.mkdir()
    (project / "config.yaml").write_text((home / "tiny.yaml").read_text() + "# my notes\n")
    (project / ".tmp-mine").write_text("mine")
    message = refused(home, "train project/config.yaml out=project", capsys)
    assert "gndet did not write its config.yaml" in message
    (project / "config.yaml").rename(project / "other.yaml")
    assert "no config.yaml" in refused(home, "train project/other.yaml out=project", capsys)


def test_fresh_does_not_move_the_data_aside(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = home / "project"
    project.mkdir()
    for name in ("images", "ann.json"):
        (home / name).rename(project / name)
    before, part = content(home), "{kind: coco, annotations: ann.json, images: images}"
    words = [
        "train",
        "tiny.yaml",
        "out=project",
        "--fresh",
        "data.root=project",
        f"data.train={part}",
        f"data.val={part}",
    ]
    assert main(words) == 2
    assert "with your data in it (project/ann.json)" in capsys.readouterr().err
    assert content(home) == before


def test_a_study_leaves_a_study_json_of_another_program(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "study.json").write_text('{"patients": 12}')
    assert "mine/study.json: not a norm study" in refused(home, "norm-study tiny.yaml --out mine", capsys)


@pytest.mark.parametrize("source", ["images/..", "ann.json"])
def test_a_copy_of_the_data_is_not_written_into_the_data(
    source: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "project").mkdir()
    for name in ("ann.json", "images"):
        (home / name).rename(home / "project" / name)
    (home / "other").symlink_to("project")
    inside = "ann.json" if source == "ann.json" else "copy"
    message = refused(home, f"convert-data project/{source} other/{inside} --to coco", capsys)
    assert "among your data" in message or "is not an empty folder" in message
    assert main(["convert-data", f"project/{source}", "copy", "--to", "coco"]) == 0


def test_a_home_folder_is_meant_by_a_tilde(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home / "me"))
    (home / "me").mkdir()
    assert main(["check", "ann.json", "--json=~/report.json"]) == 0
    assert (home / "me" / "report.json").exists() and not (home / "~").exists()
