"""`gndet predict` with a classifier tells and writes the classes of pictures and frames, and harms no input."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from classes import random_classifier, write_classes
from PIL import Image

import gndet
from gndet.cli.main import main
from gndet.evaluation.video import video_writer

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_classes(folder / "set")
    random_classifier(folder)
    return folder


def rows(out: Path) -> list[dict]:
    return json.loads((out / "predictions.json").read_text())


def test_pictures_get_their_classes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pattern = tmp_path / "out", f"{home}/set/val/**/*.png"
    assert main(["predict", str(home / "checkpoint"), pattern, "--out", str(out), "--top", "2", "--sheet"]) == 0
    said = capsys.readouterr().out
    expected = list(gndet.load_classifier(home / "checkpoint", "cpu").predict(pattern))
    images = {image["id"]: image for image in json.loads((out / "images.json").read_text())["images"]}
    assert len(expected) == len(images) == 6
    found = [(row["file_name"], row["label"], row["score"]) for row in rows(out)]
    assert found == [(str(p.path), item["label"], item["score"]) for p in expected for item in p.top(2)]
    for row in rows(out):
        assert images[row["image_id"]]["file_name"] == row["file_name"]
        assert ("blue", "green", "red")[row["category_id"] - 1] == row["label"]
    for prediction in expected:
        first, second = prediction.top(2)
        line = f"{first['label']} {first['score']:.3f}, {second['label']} {second['score']:.3f}"
        assert f"{prediction.path}: {line}" in said
    for name in {prediction.name for prediction in expected}:
        count = sum(prediction.name == name for prediction in expected)
        assert any(line.split() == [name, str(count)] for line in said.splitlines())
    assert np.asarray(Image.open(out / "sheet.png")).std() > 10
    assert main(["predict", str(home / "checkpoint"), pattern, "--out", str(out)]) == 0  # replaces its own files
    assert len(rows(out)) == 18


def test_unreadable_pictures_are_told_and_files_of_the_user_stay(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, {"in": 1})
    folder = tmp_path / "in" / "red"
    content = (folder / "in-red-0.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    (folder / "none.png").write_bytes(b"no picture")
    out, checkpoint = tmp_path / "out", str(home / "checkpoint")
    assert main(["predict", checkpoint, str(folder), "--out", str(out)]) == 0
    assert "2 of 3 files could not be read" in capsys.readouterr().out and len(rows(out)) == 3
    assert main(["predict", checkpoint, str(folder / "half.png"), "--out", str(tmp_path / "half")]) == 2
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "predictions.json").write_text("[1]")
    assert main(["predict", checkpoint, str(folder), "--out", str(tmp_path / "own")]) == 2
    assert "exists and is not a file of detections" in capsys.readouterr().err
    assert (tmp_path / "own" / "predictions.json").read_text() == "[1]"


def test_each_frame_of_a_video_gets_its_classes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    frames = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
    with video_writer(tmp_path / "clip.mp4", Fraction(2)) as append:
        for number, frame in enumerate(frames):
            append(frame, number / 2)
    words = [str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "out"), "--every", "2", "--top", "1"]
    assert main(["predict", str(home / "checkpoint"), *words]) == 0
    assert "clip.mp4: 3 frames" in capsys.readouterr().out
    found = list(gndet.load_classifier(home / "checkpoint", "cpu").predict(tmp_path / "clip.mp4", every=2))
    assert [row["score"] for row in rows(tmp_path / "out")] == [prediction.score for prediction in found]
    assert [row["file_name"].partition("#")[2] for row in rows(tmp_path / "out")] == ["t=0.000", "t=1.000", "t=2.000"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "0.2"], "--threshold: {} is a classifier, which finds no objects; --top N sets how many"),
        (["--classes", "red"], "--classes: {} is a classifier"),
        (["--save-crops"], "--save-crops: {} is a classifier"),
    ],
)
def test_options_for_objects_are_refused(
    home: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(home / "checkpoint")
    assert main(["predict", checkpoint, str(home / "set"), "--out", str(tmp_path / "out"), *words]) == 2
    assert said.format(checkpoint) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_detector_has_no_top(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(trained), str(tmp_path), "--out", str(tmp_path / "out"), "--top", "3"]) == 2
    assert f"--top: {trained} is a detector" in capsys.readouterr().err
