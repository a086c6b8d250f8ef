"""`gndet predict` finds what evaluation finds, writes what was requested, and harms no input."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from gndet.cli.main import main
from gndet.data.datasets.images import picture_record, picture_size, read_image
from gndet.data.records import Dataset
from gndet.distributed.process import Process
from gndet.errors import ConfigError, DataError, OutputError
from gndet.evaluation.detector import Detector, load_detector
from gndet.evaluation.evaluate import detect_share
from gndet.evaluation.video import read_frames, video_writer
from gndet.toolbox.predict.output import Output
from gndet.toolbox.predict.predict import predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    overrides = ["model.box_head.score_threshold=0.01", "data.workers=1", "evaluation.images_per_gpu=2"]
    return load_detector(trained, overrides, Process(0, 1, CPU))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.png, b.png, c.jpg of different sizes."""
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0)
    for name, size in (("a.png", (80, 100)), ("b.png", (64, 64)), ("c.jpg", (90, 70))):
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def run(detector: Detector, sources: Sequence[object], out: Path, **wanted: object) -> list[str]:
    lines: list[str] = []
    predict(detector, [str(one) for one in sources], out, CPU, lines.append, **wanted)
    return lines


def found(out: Path) -> list[dict]:
    return json.loads((out / "predictions.json").read_text())


def images(out: Path) -> list[dict]:
    return json.loads((out / "images.json").read_text())["images"]


def middle(out: Path) -> float:
    """Return a threshold that about half of the detections reach."""
    return float(np.median([one["score"] for one in found(out)]))


def cut_off(picture: Path, to: Path) -> Path:
    """Write a picture whose header is whole and whose pixels end early."""
    content = picture.read_bytes()
    to.write_bytes(content[: len(content) // 2])
    return to


def test_every_picture_is_drawn_and_coco_reads_the_results(trained: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    for name in ("a/one.png", "a/two.jpg", "one.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    out = tmp_path / "out"
    words = ["predict", str(trained), str(tmp_path / "a"), str(tmp_path / "one.jpg"), str(tmp_path / "gray.png")]
    assert main([*words, "--out", str(out), "--threshold", "0.1", "model.box_head.score_threshold=0.01"]) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"one.png", "two.png", "one-3.png", "gray.png", "predictions.json", "images.json"}
    truth = COCO(str(out / "images.json"))
    results = truth.loadRes(str(out / "predictions.json"))
    assert len(results.anns) > 0 and {one["image_id"] for one in results.anns.values()} <= {1, 2, 3, 4}


def test_detections_are_those_of_the_evaluation(detector: Detector, folder: Path, tmp_path: Path) -> None:
    run(detector, [folder], tmp_path / "out")
    files = sorted(folder.iterdir())
    records = [picture_record(n, file, read_image(file).shape[:2]) for n, file in enumerate(files, start=1)]
    dataset = Dataset("these", detector.classes, detector.category_ids, records)
    alone = Process(0, 1, CPU)
    expected = detect_share(detector.model, dataset, detector.config, alone, autocast=detector.autocast).results
    assert found(tmp_path / "out") == list(expected) and len(expected)
    assert [one["file_name"] for one in images(tmp_path / "out")] == [str(file) for file in files]


@pytest.mark.parametrize("overlap", [True, False])
def test_drawing_during_detection_changes_nothing(
    detector: Detector, folder: Path, tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw at the same time, as with a GPU, and in turns; with more batches than are held at once."""
    monkeypatch.setattr("gndet.toolbox.predict.output.usable_cores", lambda: 1)
    monkeypatch.setattr("gndet.toolbox.predict.predict.Output", lambda *rest: Output(*rest[:3], overlap))
    files = [shutil.copy(file, folder / f"{n}{file.name}") for n in range(4) for file in sorted(folder.glob("?.*"))]
    assert len(files) == 12
    lines = run(detector, [folder], tmp_path / "out")
    assert [line.split(":")[0] for line in lines[:15]] == [str(file) for file in sorted(folder.iterdir())]
    assert [one["id"] for one in images(tmp_path / "out")] == list(range(1, 16))


def test_classes_are_filtered_and_an_unknown_one_is_named(detector: Detector, folder: Path, tmp_path: Path) -> None:
    run(detector, [folder], tmp_path / "all")
    every = {one["category_id"] for one in found(tmp_path / "all")}
    ids = dict(zip(detector.classes, detector.category_ids, strict=True))
    chosen = next(name for name in detector.classes if ids[name] in every)
    run(detector, [folder], tmp_path / "some", classes=(chosen,))
    assert found(tmp_path / "some") == [one for one in found(tmp_path / "all") if one["category_id"] == ids[chosen]]
    assert len(every) > 1
    with pytest.raises(ConfigError, match=r"--classes: 'dsic' is not a class.*you mean 'disc'\? It knows disc, box"):
        run(detector, [folder], tmp_path / "none", classes=("dsic",))
    assert not (tmp_path / "none").exists()


def test_crops_are_the_drawn_objects_cut_out_along_their_boxes(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    run(detector, [folder / "a.png"], tmp_path / "all")
    threshold = middle(tmp_path / "all")
    run(detector, [folder / "a.png"], tmp_path / "out", threshold=threshold, crops=True)
    assert found(tmp_path / "out") == found(tmp_path / "all")  # the threshold concerns the drawings only
    shown = sorted((one for one in found(tmp_path / "out") if one["score"] >= threshold), key=lambda one: -one["score"])
    assert len(list((tmp_path / "out" / "crops").rglob("*.png"))) == len(shown) > 1
    pixels = read_image(folder / "a.png")
    for number, one in enumerate(shown, start=1):
        name = detector.classes[detector.category_ids.index(one["category_id"])]
        crop = read_image(tmp_path / "out" / "crops" / name / f"a-{number}-{one['score']:.2f}.png")
        x, y, width, height = one["bbox"]
        rows, columns = slice(int(y), int(np.ceil(y + height))), slice(int(x), int(np.ceil(x + width)))
        assert np.array_equal(crop, pixels[rows, columns])


def test_a_sheet_shows_the_first_pictures(detector: Detector, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sheet.png")  # a drawing of it must not take the sheet's name
    run(detector, [folder], tmp_path / "out", sheet=True)
    height, width = read_image(tmp_path / "out" / "sheet.png").shape[:2]
    assert width > 4 * 400 and 400 < height < 800  # four beside each other
    assert (tmp_path / "out" / "sheet-4.png").exists()


def test_a_pattern_goes_into_folders_and_one_without_a_match_is_named(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.copy(folder / "c.jpg", folder / "deep" / "er" / "d.jpg")
    (folder / "notes.txt").write_text("none of the pictures")
    run(detector, [folder / "**" / "*", folder / "a.png"], tmp_path / "out")
    names = [Path(one["file_name"]).name for one in images(tmp_path / "out")]
    assert sorted(names) == ["a.png", "b.png", "c.jpg", "d.jpg"]  # each once
    run(detector, [folder], tmp_path / "flat")
    assert len(images(tmp_path / "flat")) == 3
    with pytest.raises(DataError, match=r"\*\.bmp: matches no picture and no video"):
        run(detector, [folder, folder / "*.bmp"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(detector: Detector, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "a.png", folder / "x[1].png")
    run(detector, [folder / "x[1].png"], tmp_path / "out")
    assert (tmp_path / "out" / "x[1].png").exists()


def test_no_picture_is_overwritten_and_each_has_a_name(trained: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a-3.png", "._a.jpg"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    assert main(["predict", str(trained), str(tmp_path), "--out", str(tmp_path)]) == 2
    assert (tmp_path / "a.png").read_bytes() == before
    assert main(["predict", str(trained), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_no_crop_is_overwritten_by_crops(detector: Detector, folder: Path) -> None:
    (folder / "crops").mkdir()
    shutil.copy(folder / "a.png", folder / "crops" / "a.png")
    with pytest.raises(OutputError, match="not a picture that gndet drew"):
        run(detector, [folder / "crops"], folder, crops=True)
    run(detector, [folder / "a.png"], folder / "out", threshold=0.0, crops=True)
    crop = next((folder / "out" / "crops").rglob("a-1-*.png"))
    shutil.copy(folder / "a.png", folder / "out" / "a.png")
    with pytest.raises(OutputError, match="would overwrite"):
        run(detector, [folder / "a.png"], folder, crops=True)
    with pytest.raises(OutputError, match="would overwrite"):
        run(detector, [folder / "out" / "a.png", crop], folder / "out", crops=True)


@pytest.mark.parametrize("bad", ["missing.jpg", "empty.jpg", "text.jpg", "text.mp4"])
def test_a_bad_file_that_is_named_is_reported_before_anything_is_written(
    trained: Path, tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jpg").touch()
    for name in ("text.jpg", "text.mp4"):
        (tmp_path / name).write_text("<html>not found</html>")
    assert main(["predict", str(trained), str(tmp_path / bad), "--out", str(tmp_path / "out")]) == 2
    assert bad in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_of_a_folder_is_skipped_and_reported(detector: Detector, folder: Path, tmp_path: Path) -> None:
    cut_off(folder / "a.png", folder / "b1.png")
    (folder / "empty.png").touch()
    lines = run(detector, [folder], tmp_path / "out")
    assert "2 of 5 files could not be read" in lines[-1] and "b1.png" in lines[-1] and "empty.png" in lines[-1]
    kept = images(tmp_path / "out")
    assert [Path(one["file_name"]).name for one in kept] == ["a.png", "b.png", "c.jpg"]
    assert {one["image_id"] for one in found(tmp_path / "out")} <= {one["id"] for one in kept}


def test_a_named_picture_that_turns_out_broken_fails_when_the_rest_is_written(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    broken = cut_off(folder / "a.png", tmp_path / "broken.png")
    with pytest.raises(DataError, match=r"1 of 4 files could not be read(.|\n)*broken\.png"):
        run(detector, [broken, folder], tmp_path / "out")
    assert len(images(tmp_path / "out")) == 3 and (tmp_path / "out" / "c.png").exists()


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_gives_the_size_of_the_upright_picture(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{kind}", exif=exif)
    assert picture_size(tmp_path / f"a.{kind}") == read_image(tmp_path / f"a.{kind}").shape[:2]


def test_an_orientation_after_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
    chunk = content[start:end]
    (tmp_path / "a.png").write_bytes(content[:start] + content[end:-12] + chunk + content[-12:])
    assert picture_size(tmp_path / "a.png") == (30, 20) == read_image(tmp_path / "a.png").shape[:2]


def write_video(path: Path, sizes: tuple[int, int], seconds: Sequence[float]) -> None:
    noise = np.random.default_rng(1)
    with video_writer(path, 10) as write:
        for at in seconds:
            coarse = noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            write(np.asarray(Image.fromarray(coarse).resize(sizes[::-1])), at)


def test_a_video_is_the_pictures_of_its_frames(detector: Detector, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video, seconds = tmp_path / "film.mp4", [0, 0.1, 0.2, 0.5, 0.6]  # uneven: the times are kept
    write_video(video, (64, 96), seconds)
    frames = list(read_frames(video, 1))
    (tmp_path / "frames").mkdir()
    for frame in frames:
        Image.fromarray(frame.pixels).save(tmp_path / "frames" / f"{frame.index}.png")
    run(detector, [tmp_path / "frames"], tmp_path / "still")
    run(detector, [video, folder / "a.png"], tmp_path / "out", crops=True, threshold=0.02)
    moved = [one | {"image_id": one["image_id"] - 1} for one in found(tmp_path / "out") if one["image_id"] > 1]
    assert moved == found(tmp_path / "still") and moved
    shots = images(tmp_path / "out")[1:]
    assert [shot["file_name"] for shot in shots] == [f"{video}#t={at:.3f}" for at in seconds]
    assert [shot["frame"] for shot in shots] == [0, 1, 2, 3, 4]
    assert [(shot["height"], shot["width"]) for shot in shots] == [(64, 96)] * 5
    drawn = list(read_frames(tmp_path / "out" / "film.mp4", 1))
    assert [frame.seconds for frame in drawn] == pytest.approx(seconds, abs=1e-4)
    assert any((tmp_path / "out" / "crops").rglob("film-f00000*.png"))
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_every_nth_frame_is_taken_and_shown_when_it_was(detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "film.mp4", (64, 64), [n / 10 for n in range(7)])
    run(detector, [tmp_path / "*.mp4"], tmp_path / "out", every=3)
    assert [one["frame"] for one in images(tmp_path / "out")] == [0, 3, 6]
    drawn = list(read_frames(tmp_path / "out" / "film.mp4", 1))
    assert [frame.seconds for frame in drawn] == pytest.approx([0, 0.3, 0.6], abs=1e-4)


def test_a_turned_video_is_read_upright(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[:32, :48] = 255  # the upper left quarter
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    frame = next(iter(read_frames(tmp_path / "a.mp4", 1)))
    assert frame.pixels.shape == (96, 64, 3)
    corners = [frame.pixels[y, x].mean() > 128 for y in (10, 85) for x in (10, 50)]
    assert corners == [False, False, True, False]  # counter-clockwise: what was above is on the left


def test_a_video_without_the_extra_names_it(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gndet.evaluation.video.av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=r"a\.mp4: .*pip install av"):
        run(detector, [tmp_path / "a.mp4"], tmp_path / "out")


def test_a_damaged_video_that_a_pattern_matched_is_left_out(detector: Detector, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(folder / "film.mp4", (64, 64), [n / 10 for n in range(40)])
    content = bytearray((folder / "film.mp4").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # its index, at the end, is lost
    (folder / "film.mp4").write_bytes(content)
    lines = run(detector, [folder / "*"], tmp_path / "out")
    assert "1 of 4 files could not be read" in lines[-1] and "film.mp4" in lines[-1]
    assert len(images(tmp_path / "out")) == 3
