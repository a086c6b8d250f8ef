"""The cache of a data set gives the same records as reading it, or is not used."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Hostile, make_bad_objects
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import load_config
from gndet.data.datasets import cache as cache_module
from gndet.data.datasets.cache import keep_pictures
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.comparing import between
from gndet.data.datasets.packed import Packed
from gndet.data.datasets.reading import inspect_both, inspect_dataset, read_dataset
from gndet.data.records import Dataset
from gndet.errors import ConfigError, DataError
from gndet.toolbox.check.check import check

CFG = DatasetConfig(annotations="file.json", images="pictures")
READ = """
import sys
from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset

cfg = DatasetConfig(annotations="file.json", images="pictures")
dataset = read_dataset(cfg, DataConfig(root=sys.argv[1], cache=sys.argv[2]))
print(dataset.records.again is not None, sum(record.boxes.sum() for record in dataset.records))
"""


@pytest.fixture
def data(tmp_path: Path) -> Hostile:
    hostile = Hostile(tmp_path / "data")
    hostile.image()
    hostile.write()
    return hostile


def read(data: Hostile, cache: Any, **changes: Any) -> Dataset:
    return inspect_dataset(CFG, DataConfig(root=str(data.folder), cache=str(cache), **changes))


def assert_equal(one: Dataset, other: Dataset) -> None:
    assert one._replace(records=[], notes=()) == other._replace(records=[], notes=())
    for a, b in zip(one.records, other.records, strict=True):
        for name, value in a._asdict().items():
            same = getattr(b, name)
            if isinstance(value, np.ndarray):
                assert value.dtype == same.dtype and np.array_equal(value, same), name
                assert value.flags.writeable and same.flags.writeable
            elif name == "load":
                assert value.func is same.func and value.args == same.args
            elif name == "segmentations":
                assert list(value) == list(same)
            else:
                assert value == same, name


@pytest.mark.parametrize("name", ["bccd train", "coco-tiny train2017", "nuclei val", "hostile"])
def test_the_cache_gives_what_reading_gave(data_root: Path, tmp_path: Path, name: str, data: Hostile) -> None:
    if name == "hostile":
        make_bad_objects(data)
        data.write()
        cfg, root = CFG, data.folder
    else:
        folder, part = name.split()
        cfg, root = DatasetConfig(annotations=f"annotations/instances_{part}.json", images=part), data_root / folder
    plain = inspect_dataset(cfg, DataConfig(root=str(root), cache=""))
    first, second = (inspect_dataset(cfg, DataConfig(root=str(root), cache=str(tmp_path / "c"))) for _ in range(2))
    assert_equal(plain, first)
    assert_equal(plain, second)
    assert first.records.again is not None and plain.records.again is None


def test_a_changed_file_or_folder_is_read_again(data: Hostile, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    assert len(read(data, cache).records) == 2
    data.tree["annotations"][0]["bbox"][0] = 3
    data.write()
    changed = read(data, cache)  # with the same listing
    assert changed.records[0].boxes[0, 0] == 3 and changed.notes == () and changed.records.again is not None
    (data.pictures / "02.png").rename(data.pictures / "02.PNG")
    assert read(data, cache).refused  # another listing
    (data.pictures / "02.PNG").rename(data.pictures / "02.png")
    assert not read(data, cache).refused
    (data.pictures / "02.png").unlink()
    (data.pictures / "02.png").symlink_to(data.folder / "file.json")
    assert [one.code for one in read(data, cache).findings] == ["file-escape"]
    assert read(data, cache, max_pixels=100).findings[0].code == "image-pixels"


@pytest.mark.parametrize("way", ["written over", "put back from a copy", "renamed over", "another link"])
def test_a_picture_that_was_replaced_with_its_size_and_date_counts_as_changed(tmp_path: Path, way: str) -> None:
    data = Hostile(tmp_path / "data")
    path = data.image(suffix="bmp")
    data.write()
    spoiled, cache = b"\0" * path.stat().st_size, f"data.cache={tmp_path / 'c'}"
    kept = tmp_path / "kept.bmp"
    shutil.copy2(path, kept)
    assert check(str(data.folder / "file.json"), [cache], lambda _: None, images=True)
    assert read(data, tmp_path / "c").notes[0].endswith("unchanged since")
    before = path.stat()
    if way in ("renamed over", "another link"):
        other = path.with_name("other")
        other.write_bytes(spoiled)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        if way == "renamed over":
            other.rename(path)
        else:
            path.unlink()
            path.symlink_to(other.name)
    else:
        path.write_bytes(spoiled)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert read(data, tmp_path / "c").notes == ()  # not taken for the one that was decoded
    assert not check(str(data.folder / "file.json"), [cache], lambda _: None, images=True)
    assert read(data, tmp_path / "c").refused
    if way == "put back from a copy":
        shutil.copy2(kept, path)  # as cp -p, rsync -a and tar do
        assert not read(data, tmp_path / "c").refused


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "facts", "other version", "no facts", "object array"])
def test_a_damaged_cache_is_not_used(data: Hostile, tmp_path: Path, damage: str) -> None:
    plain = read(data, "")
    read(data, tmp_path / "c")
    (home,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    boxes, facts = home / "boxes.npy", home / "facts.json"
    content = bytearray(boxes.read_bytes())
    content[-3] ^= 64
    seal, text = facts.read_text().split("\n")
    {
        "flip": lambda: boxes.write_bytes(content),
        "cut": lambda: boxes.write_bytes(content[:-8]),
        "remove": boxes.unlink,
        "facts": lambda: facts.write_text(f"{seal}\n{text.replace('cat', 'dog')}"),
        "other version": lambda: facts.write_text(f"{seal}\n{text.replace('reader', 'writer')}"),
        "no facts": facts.unlink,
        "object array": lambda: np.save(boxes, np.array([print], dtype=object), allow_pickle=True),
    }[damage]()
    assert_equal(plain, read(data, tmp_path / "c"))
    assert boxes.read_bytes() != content  # and it was replaced


def test_a_cache_that_cannot_be_written_is_reported_and_does_no_harm(data: Hostile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dataset = read(data, tmp_path / "file" / "c")
    assert_equal(read(data, ""), dataset)
    assert len(dataset.notes) == 1 and "cannot be written" in dataset.notes[0]


def test_nothing_is_kept_among_the_pictures(data: Hostile) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: .* lies in the image folder"):
        read(data, data.pictures / "c")
    assert not (data.pictures / "c").exists()


def test_one_of_many_processes_reads_and_all_get_the_same(data: Hostile, tmp_path: Path) -> None:
    words = [sys.executable, "-c", READ, str(data.folder), str(tmp_path / "c")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    total = sum(record.boxes.sum() for record in read(data, "").records)
    assert {process.communicate()[0] for process in processes} == {f"True {total}\n"}


def test_a_process_waits_for_another_that_reads_the_same(data: Hostile, tmp_path: Path) -> None:
    read(data, tmp_path / "done")
    (home,) = (path for path in (tmp_path / "done").iterdir() if path.is_dir())
    (tmp_path / "c").mkdir()
    with (tmp_path / "c" / f"{home.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # as another process that is reading the data does
        reader = subprocess.Popen([sys.executable, "-c", READ, str(data.folder), str(tmp_path / "c")])
        while not holds(reader.pid, lock.name):
            assert reader.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        home.rename(tmp_path / "c" / home.name)
        before = (tmp_path / "c" / home.name).stat().st_ino
    assert reader.wait() == 0
    assert (tmp_path / "c" / home.name).stat().st_ino == before  # used as the other process left it


def holds(pid: int, path: str) -> bool:
    """Return whether a process has opened a file."""
    with contextlib.suppress(OSError):
        return any(os.path.realpath(link) == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_records_travel_to_other_processes_without_their_arrays(data_root: Path, tmp_path: Path) -> None:
    cfg = DatasetConfig(annotations="annotations/instances_val.json", images="val")
    folder = DataConfig(root=str(data_root / "nuclei"), cache=str(tmp_path / "c"))
    dataset = read_dataset(cfg, folder)
    sent = pickle.dumps(dataset.records[3:9])
    assert len(sent) < 10_000
    assert_equal(dataset._replace(records=dataset.records[3:9]), dataset._replace(records=pickle.loads(sent)))
    one = pickle.loads(pickle.dumps(dataset.records[3]))
    assert_equal(dataset._replace(records=[dataset.records[3]]), dataset._replace(records=[one]))
    assert len(pickle.dumps(dataset.records[3])) < 100_000
    plain = read_dataset(cfg, folder.model_copy(update={"cache": ""}))
    assert_equal(plain, plain._replace(records=pickle.loads(pickle.dumps(plain.records))))
    (home,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    (home / "boxes.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cache was changed while it was in use"):
        pickle.loads(sent)


def test_slices_are_as_those_of_a_list(data: Hostile) -> None:
    for _ in range(5):
        data.image()
    data.write()
    records = read(data, "").records
    ids = [record.image_id for record in records]
    for part in (slice(2), slice(-3, None), slice(5, 1, -2), slice(3, 3), slice(None, None, 2)):
        assert [record.image_id for record in records[part]] == ids[part]
    assert records[-1].image_id == ids[-1] and records[2:][1:][0].image_id == ids[3]
    with pytest.raises(IndexError):
        records[len(ids)]


def test_bad_pictures_are_remembered_until_they_change(data: Hostile, tmp_path: Path) -> None:
    (data.pictures / "02.png").write_bytes(b"no picture")
    cache = f"data.cache={tmp_path / 'c'}"
    assert read(data, tmp_path / "c").notes == ()
    assert not check(str(data.folder / "file.json"), [cache], lambda _: None, images=True)
    known = read(data, tmp_path / "c")
    assert [(one.code, one.count) for one in known.findings] == [("picture-unreadable", 1)]
    assert known.notes[0].startswith("all 2 pictures were decoded by gndet check on 20")
    with pytest.raises(DataError, match=r"(?s)picture-unreadable \(1\): .*02\.png.*data\.skip_unreadable=true"):
        read_dataset(CFG, DataConfig(root=str(data.folder), cache=str(tmp_path / "c")))
    skip = DataConfig(root=str(data.folder), cache=str(tmp_path / "c"), skip_unreadable=True, max_unreadable=0.5)
    skipping = read_dataset(CFG, skip)
    assert "skip_unreadable" not in skipping.findings[0].remedy  # it is set already
    assert skipping.fixes == {"pictures that cannot be decoded, skipped (data.skip_unreadable)": 1}
    Image.new("RGB", (40, 30)).save(data.pictures / "02.png")
    mended = read(data, tmp_path / "c")
    assert mended.findings == () and mended.notes == ()


def test_more_unreadable_pictures_than_training_takes_are_refused(data: Hostile, tmp_path: Path) -> None:
    (data.pictures / "02.png").write_bytes(b"no picture")
    (tmp_path / "config.yaml").write_text(json.dumps(both(data, tmp_path / "c")))
    words = ["data.skip_unreadable=true", "data.max_unreadable=0.4"]
    told: list[str] = []
    assert not check(str(tmp_path / "config.yaml"), words, told.append, images=True)
    assert "fix them (1 of 2; data.max_unreadable allows a share of 0.4), or raise" in "\n".join(told)
    assert not check(str(tmp_path / "config.yaml"), words, told.append)  # from the cache
    words[1] = "data.max_unreadable=0.5"
    assert check(str(tmp_path / "config.yaml"), words, told.append)
    assert check(str(tmp_path / "config.yaml"), words, told.append, images=True)


def both(data: Hostile, cache: Path, **val: str) -> dict[str, Any]:
    """A config that trains and validates on the set."""
    part = {"annotations": "file.json", "images": "pictures"}
    return {"data": {"root": str(data.folder), "train": part, "val": part | val, "cache": str(cache)}}


def test_equal_pictures_of_both_sets_are_remembered(data: Hostile, tmp_path: Path) -> None:
    (data.folder / "val").mkdir()
    (data.folder / "val" / "other.png").write_bytes((data.pictures / "01.png").read_bytes())
    data.tree["images"] = [data.tree["images"][0] | {"file_name": "other.png"}]
    data.tree["annotations"] = data.tree["annotations"][:1]
    data.write("val.json")
    (tmp_path / "config.yaml").write_text(json.dumps(both(data, tmp_path / "c", annotations="val.json", images="val")))

    def twins() -> list[tuple[str, int]]:
        cfg = load_config(tmp_path / "config.yaml")
        return [(one.code, one.count) for one in between(*inspect_both(cfg.data, masks=False))]

    assert twins() == []
    check(str(tmp_path / "config.yaml"), [], lambda _: None, images=True)
    assert twins() == [("picture-in-both", 1)]
    Image.new("RGB", (40, 30), (9, 9, 9)).save(data.folder / "val" / "other.png")
    assert twins() == []


def test_without_a_folder_no_picture_is_looked_at_and_nothing_kept(data: Hostile, tmp_path: Path) -> None:
    tree = both(data, tmp_path / "c")
    tree["data"]["train"] = tree["data"]["train"] | {"images": "gone"}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    told: list[str] = []
    assert not check(str(tmp_path / "config.yaml"), [], told.append, images=True)
    assert "folder-missing" in "\n".join(told) and "picture-" not in "\n".join(told)
    alone = inspect_file(data.folder / "file.json", None, DataConfig(cache=str(tmp_path / "c")))
    assert alone.records.path(0) == data.folder / "01.png"  # not /01.png
    alone.records.note_digests({0: 1, 1: 2})
    keep_pictures(alone.records, [])
    assert len(list((tmp_path / "c").glob("*/pictures.json"))) == 1  # the one of val


def test_a_file_in_the_place_of_an_entry_is_replaced(data: Hostile, tmp_path: Path) -> None:
    read(data, tmp_path / "c")
    (home,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    shutil.rmtree(home)
    home.touch()
    assert read(data, tmp_path / "c").notes == () and home.is_dir()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_process_that_waits_for_another_says_so(data: Hostile, tmp_path: Path) -> None:
    read(data, tmp_path / "c")
    (lock,) = (tmp_path / "c").glob("*.lock")
    told: list[str] = []
    words = [sys.executable, "-c", HOLD, str(lock)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"

    def tell(line: str) -> None:
        told.append(line)
        holder.communicate()  # closes its stdin, which ends it

    inspect_dataset(CFG, DataConfig(root=str(data.folder), cache=str(tmp_path / "c")), tell=tell)
    assert len(told) == 1 and f"waiting for another process that is reading it ({lock})" in told[0]


def test_a_part_of_the_pictures_is_not_taken_for_all(data: Hostile, tmp_path: Path) -> None:
    part = {"annotations": "file.json", "images": "pictures"}
    tree = {"data": {"root": str(data.folder), "train": part, "val": part, "cache": str(tmp_path / "c")}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    check(str(tmp_path / "config.yaml"), ["data.train.limit=1", "data.val.limit=1"], lambda _: None, images=True)
    assert read(data, tmp_path / "c").notes == ()
    check(str(tmp_path / "config.yaml"), ["data.classes=[dog]", "data.keep_empty=true"], lambda _: None, images=True)
    assert len(read(data, tmp_path / "c").notes) == 1


def test_what_a_killed_process_left_is_swept(data: Hostile, tmp_path: Path) -> None:
    read(data, tmp_path / "c")
    (home,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    home.rename(home.with_name(f".tmp-{'0' * 32}"))  # killed before the rename
    assert_equal(read(data, ""), read(data, tmp_path / "c"))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [home.name, f"{home.name}.lock"]


def test_a_file_that_was_hashed_is_not_hashed_again_until_its_stat_changes(
    data: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    true_hash = cache_module._hash
    monkeypatch.setattr(cache_module, "_hash", lambda path: hashed.append(path) or true_hash(path))
    monkeypatch.setattr(cache_module, "SETTLED", 0)
    first = read(data, tmp_path / "c")
    hashed.clear()
    assert_equal(read(data, tmp_path / "c"), first)
    assert len(hashed) == 1 + len(Packed._fields)  # just written: a change within the same tick would not show
    hashed.clear()
    assert_equal(read(data, tmp_path / "c"), first)
    assert not hashed
    (boxes,) = (tmp_path / "c").glob("*/boxes.npy")
    os.utime(boxes)
    assert_equal(read(data, tmp_path / "c"), first)
    assert hashed == [boxes]
