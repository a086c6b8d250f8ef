"""A file name of another machine is found if one file in the image folder fits; nothing outside the folder is read."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.guess import guess_folder
from gndet.data.datasets.reading import inspect_dataset
from gndet.data.records import Dataset
from gndet.toolbox.check.check import check

PLAIN = DataConfig(cache="")


def picture(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (color, 0, 0)).save(path)
    return path


def annotations(path: Path, *names: Any, key: str = "file_name") -> Path:
    """Write a file whose images have these names, with an object in each."""
    images = [{"id": i, key: name, "width": 30, "height": 20} for i, name in enumerate(names, start=1)]
    usual = {"category_id": 1, "bbox": [2, 2, 9, 9], "area": 81}
    objects = [usual | {"id": image["id"], "image_id": image["id"]} for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cup"}]}))
    return path


def codes(dataset: Dataset) -> dict[str, tuple[str, int]]:
    usual = ("mask-missing",)
    return {one.code: (one.severity, one.count) for one in dataset.findings if one.code not in usual}


def texts(dataset: Dataset) -> str:
    return "\n".join(example for one in dataset.findings for example in one.examples)


def read(folder: Path, *names: Any, **options: Any) -> Dataset:
    file = annotations(folder / "file.json", *names, **options)
    return inspect_file(file, folder / "pictures", PLAIN)


NAMES = {  # code, where the picture is
    r"sub\001.png": ("file-backslash", "sub/001.png"),
    r"sub\deep/001.png": ("file-backslash", "sub/deep/001.png"),
    r".\001.png": ("file-backslash", "001.png"),
    r"images\1/001.png": ("file-by-end", "001.png"),
    r"D:\photos\set\001.png": ("file-by-end", "001.png"),
    r"D:\photos\sub\001.png": ("file-by-end", "sub/001.png"),
    "D:/photos/set/001.png": ("file-by-end", "001.png"),
    r"\\server\share\001.png": ("file-by-end", "001.png"),
    r"..\..\media\upload\4\001.png": ("file-by-end", "001.png"),
    "../../media/upload/4/001.png": ("file-by-end", "001.png"),
    "/home/someone/sub/001.png": ("file-by-end", "sub/001.png"),
    "train/sub/001.png": ("file-by-end", "sub/001.png"),
    "http://example.org/set/001.png": ("file-by-end", "001.png"),
    "https://bucket.example.org/set/001.png?X=1&Y=a/b.png": ("file-by-end", "001.png"),
    "https://example.org/001.png#top": ("file-by-end", "001.png"),
    "https://example.org/a%20b/my%20cup.png": ("file-by-end", "my cup.png"),
    "s3://bucket/sub/001.png": ("file-by-end", "sub/001.png"),
    "file:///C:/sub/001.png": ("file-by-end", "sub/001.png"),
    "/data/local-files/?d=shots/001.png": ("file-by-end", "001.png"),
    "/data/local-files/?d=shots%5Csub%5C001.png": ("file-by-end", "sub/001.png"),
    "/data/upload/1/größe.png": ("file-by-end", "größe.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_another_machine_is_read_counted_and_told(tmp_path: Path, name: str) -> None:
    code, path = NAMES[name]
    picture(tmp_path / "pictures" / unicodedata.normalize("NFD", path))
    dataset = read(tmp_path, name)
    assert codes(dataset) == {code: ("F", 1)} and f"is taken as {unicodedata.normalize('NFD', path)!r}" in texts(
        dataset
    )
    assert dataset.records[0].load().shape == (20, 30, 3) and dataset.records[0].file_name == name


@pytest.mark.parametrize("name", [r"a\001.png", "what?.png", "50%20.png", "c:001.png", "http:.png"])
def test_a_file_that_has_the_name_as_it_is_comes_first(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "pictures" / name, 7)
    picture(tmp_path / "pictures" / "a" / "001.png")
    dataset = read(tmp_path, name)
    assert codes(dataset) == {} and dataset.records[0].load()[0, 0, 0] == 7


def test_two_files_that_fit_a_name_are_both_named(tmp_path: Path) -> None:
    for folder in ("a", "b", "c/deep"):
        picture(tmp_path / "pictures" / folder / "001.png")
    dataset = read(tmp_path, r"D:\set\001.png")
    assert codes(dataset)["file-unclear"] == ("E", 1) and "both a/001.png and b/001.png end like it" in texts(dataset)
    assert codes(read(tmp_path, r"D:\deep\001.png"))["file-missing"] == ("E", 1)  # c is not in the name
    assert codes(read(tmp_path, r"D:\set\b\001.png"))["file-by-end"] == ("F", 1)


def test_two_names_that_end_at_one_file_are_both_named(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "001.png")
    dataset = read(tmp_path, "http://a.org/monday/001.png", "http://a.org/sunday/001.png")
    assert codes(dataset)["file-unclear"] == ("E", 1)
    assert (
        "sunday/001.png' is taken as '001.png', and so is file_name 'http://a.org/monday/001.png' of image 1"
        in texts(dataset)
    )
    far = f"http://a.org/{'x' * 60}/"
    assert codes(read(tmp_path, f"{far}1/001.png", f"{far}2/001.png"))["file-unclear"] == ("E", 1)
    same = read(tmp_path, "http://a.org/001.png", "http://a.org/001.png")
    assert codes(same) == {"file-by-end": ("F", 2), "file-twice": ("N", 1)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (r"images\001.PNG", "the nearest name there is '001.png'"),
        ("https://example.org/002.png", "the nearest name there is '001.png'"),
        (r"D:\set\003.png", r"003\.png is in \S*pictures/sub: file_name is relative to the image folder"),
        ("other/003.png", r"003\.png is in \S*pictures/sub"),
    ],
)
def test_a_name_that_nothing_fits_is_refused_with_what_is_there(tmp_path: Path, name: str, words: str) -> None:
    picture(tmp_path / "pictures" / "001.png"), picture(tmp_path / "pictures" / "sub" / "003.png")
    dataset = read(tmp_path, name)
    assert dataset.refused and re.search(words, texts(dataset))


@pytest.mark.parametrize("name", ["../secret.png", r"..\secret.png", "{home}/secret.png", "sub/../../secret.png"])
def test_nothing_outside_the_image_folder_is_read(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.png"), picture(tmp_path / "pictures" / "sub" / "001.png")
    dataset = read(tmp_path, name.replace("{home}", str(tmp_path)))
    assert dataset.refused and re.search("leads out of the image folder|is not in", texts(dataset))
    assert not len(dataset.records)
    data = DataConfig(cache="", follow_links=True)
    assert inspect_file(tmp_path / "file.json", tmp_path / "pictures", data).refused


def linked(tmp_path: Path) -> Path:
    """Write pictures as Hugging Face's cache holds them: links that lead out of their folder."""
    picture(tmp_path / "blobs" / "001.png")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "001.png").symlink_to("../blobs/001.png")
    return annotations(tmp_path / "snapshot" / "file.json", "001.png")


def test_links_to_files_are_followed_by_an_option_that_the_refusal_names(tmp_path: Path) -> None:
    file, data = linked(tmp_path), DataConfig(cache=str(tmp_path / "cache"))
    refused = inspect_file(file, file.parent, data)
    assert codes(refused) == {"file-escape": ("E", 1)} and "data.follow_links=true" in texts(refused)
    follow = data.model_copy(update={"follow_links": True})
    for _ in range(2):  # read, and from the cache
        followed = inspect_file(file, file.parent, follow)
        assert codes(followed) == {} and followed.records[0].load().shape == (20, 30, 3)
    assert inspect_file(file, file.parent, data).refused
    lines: list[str] = []
    assert check(str(file), ["data.follow_links=true", "data.cache="], lines.append, images=True)


def test_a_linked_folder_and_a_broken_link_stay_refused(tmp_path: Path) -> None:
    file = linked(tmp_path)
    (file.parent / "more").symlink_to(tmp_path / "blobs")
    (file.parent / "gone.png").symlink_to("../blobs/gone.png")
    annotations(file, "more/001.png", "gone.png")
    dataset = inspect_file(file, file.parent, DataConfig(cache="", follow_links=True))
    assert dataset.refused and not len(dataset.records)


def test_a_link_that_git_wrote_as_text_is_named(tmp_path: Path) -> None:
    file = annotations(tmp_path / "file.json", "001.png")
    (tmp_path / "001.png").write_text("../../blobs/001.png")
    lines: list[str] = []
    assert not check(str(file), ["data.cache="], lines.append, images=True)
    assert "a link written as text" in "\n".join(lines)


def test_a_changed_target_of_a_link_is_read_again(tmp_path: Path) -> None:
    file, data = linked(tmp_path), DataConfig(cache=str(tmp_path / "cache"), follow_links=True)
    assert not inspect_file(file, file.parent, data).refused
    (tmp_path / "blobs" / "001.png").write_bytes(b"")
    assert codes(inspect_file(file, file.parent, data)) == {"file-empty": ("E", 1)}


def test_the_folder_with_most_of_the_pictures_is_guessed(tmp_path: Path) -> None:
    file = annotations(tmp_path / "file.json", *(f"{i:03d}.png" for i in range(8)))
    picture(tmp_path / "images" / "003.png")
    for number in range(7):
        picture(tmp_path / "photos" / f"{number:03d}.png")
    assert guess_folder(file) == tmp_path / "photos"
    for names in ([rf"D:\x\{i:03d}.png" for i in range(8)], [f"http://a.org/{i:03d}.png?q=1" for i in range(8)]):
        assert guess_folder(annotations(file, *names)) == tmp_path / "photos"
    assert guess_folder(annotations(file, *(rf"photos\{i:03d}.png" for i in range(7)))) == tmp_path


@pytest.mark.parametrize("name", ["http://a.org/x.png", "/home/someone/x.png", r"D:\x.png", r"..\x.png", "../x.png"])
def test_foreign_names_without_pictures_are_said(tmp_path: Path, name: str) -> None:
    file, lines = annotations(tmp_path / "a" / "b" / "file.json", name), []
    assert not check(str(file), ["data.cache="], lines.append)
    text = "\n".join(lines)
    assert "E file-foreign (1)" in text and "--image-folder" in text and "nothing is refused" not in text
    assert codes(inspect_file(file, None, PLAIN)) == {"file-foreign": ("N", 1)}  # no picture is needed


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "set" / "001.png"), annotations(tmp_path / "set" / "file.json", "001.png")
    for root, names in (("~/set", ("file.json", ".")), ("/nowhere", ("~/set/file.json", "~/set"))):
        cfg = DatasetConfig(annotations=names[0], images=names[1])
        assert not inspect_dataset(cfg, DataConfig(root=root, cache="")).refused
    lines: list[str] = []
    assert check(
        str(tmp_path / "set" / "file.json"), ["data.cache="], lines.append, image_folder=Path("~/set"), images=True
    )


@pytest.mark.parametrize("folder", ["", "train2017"])
def test_lvis_finds_its_pictures_by_their_urls_and_says_how_it_is_scored(tmp_path: Path, folder: str) -> None:
    picture(tmp_path / "pictures" / folder / "000000391895.jpg")
    file = annotations(tmp_path / "f.json", "http://images.cocodataset.org/train2017/000000391895.jpg", key="coco_url")
    tree = json.loads(file.read_text())
    tree["images"][0] |= {"not_exhaustive_category_ids": [], "neg_category_ids": [1]}
    file.write_text(json.dumps(tree))
    dataset = inspect_file(file, tmp_path / "pictures", PLAIN)
    assert codes(dataset) == {"file-by-end": ("F", 1), "lvis-federated": ("N", 1)}
    assert dataset.records[0].load().shape == (20, 30, 3) and dataset.records[0].file_name.endswith("391895.jpg")
    assert guess_folder(file) == tmp_path / "pictures"
