"""What `gndet predict` calls its outputs: every name fits a file system, and no output replaces another."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gndet.distributed.process import Process
from gndet.evaluation.detector import Detector, load_detector
from gndet.evaluation.video import video_writer
from gndet.toolbox.predict.output import crop_folders, unique_names
from gndet.toolbox.predict.predict import predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    box_head = "model.box_head={score_threshold: 0.01, detections_per_image: 4}"
    return load_detector(trained, [box_head, "data.workers=0", "data.shortest_edge_test=64"], Process(0, 1, CPU))


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, Image.registered_extensions()[path.suffix])
    return path


def video(path: Path) -> Path:
    with video_writer(path.with_name("made.mp4"), 10) as write:
        for number in range(3):
            write(np.random.default_rng(number).integers(0, 255, (64, 72, 3), dtype=np.uint8), number / 10)
    return path.with_name("made.mp4").rename(path)


def outputs(detector: Detector, sources: list[Path], out: Path) -> tuple[list[str], list[str]]:
    """Predict with crops of all objects.  Returns the names of pictures and videos; checks that no crop is missing."""
    sources = [os.fspath(source) for source in sources]
    predict(detector, sources, out, CPU, lambda line: None, threshold=0.0, crops=True, sheet=True)
    crops = [str(file.relative_to(out)) for file in (out / "crops").rglob("*.png")]
    assert len({name.casefold() for name in crops}) == len(json.loads((out / "predictions.json").read_text())) > 0
    names = [file.name for file in out.iterdir()]
    assert len({name.casefold() for name in names}) == len(names)
    assert not [name for name in names if name.startswith(".tmp-")]
    made = [name for name in names if name not in ("predictions.json", "images.json", "sheet.png", "crops")]
    return sorted(made), crops


def test_files_of_one_stem_lose_nothing(detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("av")
    names = ["clip.png", "clip.jpg", "CLIP.png", "clip-f000000.png", "Clip-F000001.png", "deep/clip.png", "sheet.png"]
    pictures = [picture(tmp_path / "in" / name) for name in names]
    videos = [video(tmp_path / "in" / name) for name in ("clip.mp4", "clip.avi", "CLIP.mov", "deep/clip.mp4")]
    made, _ = outputs(detector, [*pictures, *videos], tmp_path / "out")
    assert len([name for name in made if name.endswith(".png")]) == len(pictures)
    assert len([name for name in made if name.endswith(".mp4")]) == len(videos)
    frames = [one for one in json.loads((tmp_path / "out" / "images.json").read_text())["images"] if "frame" in one]
    assert len(frames) == 3 * len(videos)


@pytest.mark.parametrize("letter", ["n", "🙂"])
def test_names_of_255_bytes_and_classes_of_300_letters_fit(detector: Detector, tmp_path: Path, letter: str) -> None:
    pytest.importorskip("av")
    stem = letter * (250 // len(letter.encode()))
    sources = [picture(tmp_path / "in" / f"{stem}{suffix}") for suffix in (".png", ".jpg")]
    sources.append(picture(tmp_path / "in" / f"{stem[:-1]}x.png"))  # the same once it is cut
    sources += [video(tmp_path / "in" / f"{stem}{suffix}") for suffix in (".mp4", ".avi")]
    long = replace(detector, classes=tuple(f"{letter * 300}{end}" for end in range(len(detector.classes))))
    made, crops = outputs(long, sources, tmp_path / "out")
    assert len(made) == 5 and all(set(Path(name).stem) <= set(f"{letter}-0123456789") for name in made)
    assert all(set(Path(name).parent.name) <= {letter, *"_-0123456789"} for name in crops)


def test_names_of_any_bytes_and_letters_are_written(detector: Detector, tmp_path: Path) -> None:
    names = [
        os.fsdecode(b"\xff\xfe"),
        "a\nb",
        " ",
        "...",
        "-rf",
        "$(id)",
        "%s",
        "a\x1b[31m",
        "‮gnp",
        "CON",
        "a" * 199 + "é",
    ]
    sources = [picture(tmp_path / "in" / f"{name}.png") for name in names]
    strange = ["../../x", "/etc", "..", "", "\ud83d", "a/b", "A/B", "\0", "con", " . "]
    classes = tuple(strange[: len(detector.classes)]) + detector.classes[len(strange) :]
    made, crops = outputs(replace(detector, classes=classes), sources, tmp_path / "out")
    assert len(made) == len(names)
    assert {Path(name).parts[0] for name in crops} == {"crops"} and {len(Path(name).parts) for name in crops} == {3}
    folders = crop_folders(strange)
    assert len({folder.casefold() for folder in folders}) == len(strange)
    assert not [name for name in folders if "/" in name or name in ("", ".", "..") or "\0" in name]


def test_the_name_of_a_frame_is_that_of_no_picture_whatever_the_order() -> None:
    names = unique_names(["a-f000000", "a-f12", "a-f0000001", "A-F000000", "b"], ".png", r"a-f\d{6,}|b")
    assert names == ["a-f000000-1.png", "a-f12.png", "a-f0000001-3.png", "A-F000000-4.png", "b-5.png"]


def test_a_second_prediction_replaces_the_first(detector: Detector, tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / f"{'n' * 250}.png")
    for _ in range(2):
        made, _ = outputs(detector, [source], tmp_path / "out")
    assert made == [f"{'n' * 200}.png"]
