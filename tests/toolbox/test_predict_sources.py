"""A folder or pattern gives its pictures and videos, and counts what it passes over; a refusal says where to look."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gndet.data.datasets.images import FORMATS, PICTURES, read_image
from gndet.errors import DataError
from gndet.evaluation.sources import find_sources


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_every_suffix_of_a_format_that_is_read_is_taken_from_a_folder(tmp_path: Path, picture: Image.Image) -> None:
    written = []
    for suffix in PICTURES:
        mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
        picture.convert(mode).save(tmp_path / f"a{suffix.upper()}")
        written.append(tmp_path / f"a{suffix.upper()}")
    found = find_sources([str(tmp_path)])
    assert found.pictures == sorted(written) and found.notes == []
    assert {read_image(file).shape for file in found.pictures} == {(20, 30, 3)}
    assert {Image.open(file).format for file in found.pictures} == set(FORMATS)


def test_what_a_folder_passes_over_is_counted_in_one_line(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.jfif")
    for name in ("a.txt", "b.TXT", "LICENSE", "clip.mp4", ".hidden"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "deep").mkdir()
    found = find_sources([str(tmp_path)])
    assert [file.name for file in found.pictures] == ["a.jfif"]
    (note,) = found.notes
    kinds, folders = f"{tmp_path}: passed over 2 .txt, 1 without suffix, 1 .mp4", f"'{tmp_path}/**/*' would search"
    assert note == f"{kinds}, 1 folder, which {folders}"


def test_what_a_pattern_passes_over_is_counted(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.gif")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").write_text("{}")
    found = find_sources([f"{tmp_path}/**/*"])
    assert found.pictures == [tmp_path / "a.gif"]
    assert found.notes == [f"{tmp_path}/**/*: passed over 1 .json"]


@pytest.mark.parametrize("name", ["nested", "nested [1]"])
def test_the_refusal_of_a_folder_names_a_pattern_that_finds_the_pictures_below_it(
    tmp_path: Path, picture: Image.Image, name: str
) -> None:
    deep = tmp_path / name / "deep" / "er"
    deep.mkdir(parents=True)
    picture.save(deep / "y.jpg")
    picture.save(deep / "z.png")
    with pytest.raises(DataError, match=r"no pictures in .*; 2 pictures below it, which '.*' would name") as error:
        find_sources([str(tmp_path / name)])
    pattern = str(error.value).split("'")[1]
    assert find_sources([pattern]).pictures == [deep / "y.jpg", deep / "z.png"]


def test_the_refusal_of_a_folder_of_videos_names_the_pattern_for_them(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    with pytest.raises(DataError, match=r"it has 1 video, which '.*/\*\.mp4' would name$") as error:
        find_sources([str(tmp_path)])
    assert find_sources([str(error.value).split("'")[1]]).videos == [tmp_path / "a.mp4"]


def test_an_empty_folder_is_refused_without_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pictures in this folder \(\.jpg, .*\.pnm\)$"):
        find_sources([str(tmp_path)])


def test_a_tilde_is_the_home_folder(tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture.save(tmp_path / "a.png")
    for word in ("~", "~/a.png", "~/*.png"):
        assert find_sources([word]).pictures == [tmp_path / "a.png"]
