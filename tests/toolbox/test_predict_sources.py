"""A folder or pattern gives its pictures and videos, and counts what it passes over; a refusal says where to look."""

import contextlib
import glob
import os
import socket
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


def test_a_pattern_matches_what_glob_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "x/b.png", "x/y/c.png", "x/y/.d.png", ".x/e.png", "x/[1]/f.png", "xy/g.png", "xy/z/h.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    patterns = ["**/*.png", "*.png", "x/**/*.png", "x*/**/*", "**", "**/y/*", "./**/*.png", "**/**/?.png", "x**/*.png"]
    for pattern in [*patterns, f"{tmp_path}/**/*.png", f"{tmp_path}//**//*.png"]:
        expected = sorted(set(map(Path, glob.glob(pattern, recursive=True))))
        assert find_sources([pattern]).pictures == [file for file in expected if file.is_file()]


def test_links_that_lead_back_end_no_search_and_double_no_picture(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    picture.save(tmp_path / "in" / "deep" / "a.png")
    for name, target in (("up", ".."), ("here", "."), ("deep/top", "../.."), ("aside", "deep"), ("lost", "gone")):
        (tmp_path / "in" / name).symlink_to(target)
    assert find_sources([f"{tmp_path}/in/**/*.png"]).pictures == [tmp_path / "in" / "deep" / "a.png"]
    with pytest.raises(DataError, match="1 picture below it"):
        find_sources([str(tmp_path / "in")])


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_pipes_sockets_devices_and_lost_links_are_left_out_and_named(
    tmp_path: Path, picture: Image.Image, suffix: str
) -> None:
    picture.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (tmp_path / f"null{suffix}").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):  # a socket's path must be short
        server.bind(f"socket{suffix}")
        for word in (str(tmp_path), f"{tmp_path}/*"):
            found = find_sources([word])
            assert found.pictures == [tmp_path / "a.png"] and not found.videos
            assert all(
                f"'{name}{suffix}' that is no file" in found.notes[0] for name in ("pipe", "loop", "null", "socket")
            )
        with pytest.raises(DataError, match="is neither a file nor a folder"):
            find_sources([f"pipe{suffix}"])
