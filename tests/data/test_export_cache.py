"""What the cache keeps of an export holds until a label, a picture or the set of them changes."""

import shutil
from pathlib import Path

import pytest
from exported import write
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets import reading
from gndet.data.datasets.exports import engine
from gndet.data.datasets.reading import inspect_dataset
from gndet.data.records import Dataset

ROW = "0 0.25 0.25 0.25 0.25\n"
FILES = {"classes.txt": "cup\n", "images/a.png": None, "images/b.png": None, "labels/a.txt": ROW, "labels/b.txt": ROW}


@pytest.fixture(params=[1, 1000], ids=["parts in processes", "one part"])
def root(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine, "PART", request.param)
    return write(tmp_path / "data", FILES)


def read(root: Path) -> Dataset:
    return inspect_dataset(DatasetConfig(split="train"), DataConfig(root=str(root), cache=str(root.parent / "cache")))


def test_an_unchanged_export_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(root)
    monkeypatch.setattr(engine, "_parts", None)
    again = read(root)
    assert again._replace(records=[]) == first._replace(records=[])
    assert [record.boxes.tolist() for record in again.records] == [record.boxes.tolist() for record in first.records]


def test_a_changed_label_is_read(root: Path) -> None:
    read(root)
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    assert read(root).records[0].boxes.tolist() == [[24, 18, 40, 30]]


@pytest.mark.parametrize("labeled", [True, False])
def test_a_new_picture_is_read(root: Path, labeled: bool) -> None:
    read(root)
    write(root, {"images/c.png": None} | ({"labels/c.txt": ROW} if labeled else {}))
    assert [len(record.labels) for record in read(root).records] == [1, 1, int(labeled)]


def test_a_picture_of_another_size_is_read(root: Path) -> None:
    read(root)
    Image.new("RGB", (128, 96)).save(root / "images" / "a.png")
    assert [record.size for record in read(root).records] == [(96, 128), (48, 64)]


def test_a_label_that_is_gone_is_background(root: Path) -> None:
    read(root)
    (root / "labels" / "b.txt").unlink()
    assert [len(record.labels) for record in read(root).records] == [1, 0]


def test_a_picture_named_twice_is_counted_once(root: Path) -> None:
    voc = "<annotation><filename>a.png</filename></annotation>"
    shutil.rmtree(root)
    write(root, {"images/a.png": None, "Annotations/a.xml": voc, "Annotations/b.xml": voc})
    assert {finding.code: finding.count for finding in read(root).findings}["file-twice"] == 1


def test_all_readers_are_tried_here_or_by_their_own_tests() -> None:
    names = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(reading.OPENERS) <= names
