"""What can be written can be read: texts of any code points and bytes go through data, caches, checkpoints, results."""

import csv
import hashlib
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.config.data import DataConfig
from gndet.data.batches.transforms import test_sample as load_sample
from gndet.data.datasets.coco import inspect_file, to_coco
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, DataError
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco, save_results
from gndet.text import csv_table, text_table, valid_text
from gndet.toolbox.analysis.analysis import read_results

RANGES = [(0x1, 0x20), (0x20, 0x7F), (0x7F, 0xA1), (0x300, 0x370), (0x590, 0x600), (0x2000, 0x2070), (0xD800, 0xE000),
          (0xFB50, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0x1, 0x10FFFF)]  # fmt: skip
COUNT = 120


def any_text(rng: random.Random) -> str:
    """A text of any code points."""
    return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randint(0, 20)))


def any_name(rng: random.Random) -> str:
    """The name of a file, of any bytes."""
    name = bytes(rng.choice(range(1, 256)) for _ in range(rng.randint(0, 40))) or any_text(rng).encode(
        "utf-8", "ignore"
    )
    return os.fsdecode(name.replace(b"/", b"\\"))


def tree_of(names: list[str], files: list[str]) -> dict[str, Any]:
    """A data set with a picture per file and an object per picture and name, in turn."""
    return {
        "images": [{"id": i, "file_name": name, "width": 20, "height": 20} for i, name in enumerate(files, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i % len(names) + 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}
            for i in range(1, len(files) + 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


def written(folder: Path, names: list[str], files: list[str]) -> Path:
    for number, name in enumerate(files):
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number % 256, 0, 0)).save(
            os.fsencode(path).decode("utf-8", "surrogateescape"), "PNG"
        )
    path = folder / "file.json"
    path.write_text(json.dumps(tree_of(names, files)))
    return path


def read(path: Path, cache: Path) -> Dataset:
    return inspect_file(path, path.parent / "pictures", DataConfig(cache=str(cache)))


def test_class_names_of_any_code_points_become_valid_and_are_told(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = json.loads(json.dumps([f"{i}{any_text(rng)}" for i in range(COUNT)]))  # JSON joins pairs of surrogates
    broken = [name for name in names if valid_text(name) != name]
    path = written(tmp_path, names, [f"{i}.png" for i in range(COUNT)])
    first, again = read(path, tmp_path / "cache"), read(path, tmp_path / "cache")
    assert len(broken) > COUNT / 4 and len(first.classes) == COUNT
    for name, valid in zip(names, first.classes, strict=True):
        assert valid == re.sub("[\ud800-\udfff]", "\ufffd", name)
    (found,) = [one for one in first.findings if one.severity != "N"]
    assert (found.code, found.severity, found.count) == ("category-name-cut", "F", len(broken))
    assert (again.classes, again.findings) == (first.classes, first.findings)
    "".join(first.classes).encode()  # no surrogate is left
    table = text_table([["class"], *([name] for name in names)])
    assert table.isascii() or all(line.isprintable() for line in table.splitlines())
    assert len(table.splitlines()) == COUNT + 1
    for ends in ("\r", "\n", "\r\n", '"', ",", "\u2028"):
        rows = [[name, f"{ends}{name}{ends}"] for name in first.classes]
        assert list(csv.reader(io.StringIO(csv_table(rows), newline=""))) == rows


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    dataset = read(written(tmp_path, ["a\ud83d", "a\ude00", "b"], ["1.png", "2.png", "3.png"]), tmp_path / "cache")
    found = {one.code: (one.severity, one.count) for one in dataset.findings if one.severity != "N"}
    assert found == {"category-name-cut": ("F", 2), "category-name-twice": ("E", 2)}
    assert valid_text("\ud83d\ude00 a\ud83d\ud83db\ude00") == "\U0001f600 a\ufffd\ufffdb\ufffd"


def test_file_names_of_any_bytes_are_found_and_scored(tmp_path: Path) -> None:
    rng = random.Random(1)
    files = [f"{any_name(rng)[:20]}-{i}/{i}{any_name(rng)}" for i in range(COUNT)]
    path = written(tmp_path, ["a", "b"], files)
    assert sum(valid_text(name) != name for name in files) > COUNT / 2
    for _ in ("read", "from the cache"):
        dataset = read(path, tmp_path / "cache")
        assert [record.file_name for record in dataset.records] == files
        assert not [one for one in dataset.findings if one.severity != "N"]
    for number, record in enumerate(dataset.records):
        assert record.load()[0, 0].tolist() == [number % 256, 0, 0]
    assert load_sample(dataset.records[0], DataConfig()).image.shape[0] == 3
    rows = [annotation | {"score": 0.5} for annotation in to_coco(dataset)["annotations"]]
    for engine in ("hotcoco", "pycocotools"):
        truths = coco_truths(dataset, masks=False)
        metrics = coco_metrics(truths, from_coco(rows), engine=engine, max_detections=100)
        assert metrics["bbox"].summary["AP"] == pytest.approx(1.0)
    save_results(tmp_path / "results.json", from_coco(rows))
    assert list(read_results(tmp_path / "results.json", dataset)) == list(from_coco(rows))


def test_a_name_of_other_bytes_from_another_machine_is_found_by_its_end(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/im\xff.png")
    path = written(tmp_path, ["a"], [name])
    for other in (f"/home/them/{name}", f"C:\\{name}".replace("/", "\\"), f"https://there/{name}?x=1"):
        path.write_text(json.dumps(tree_of(["a"], [other])))
        (record,) = read(path, tmp_path / "cache").records
        assert record.load().shape == (20, 20, 3) and record.file_name == other
    path.write_text(json.dumps(tree_of(["a"], ["/home/a\ud83d.png"])))  # no file has half of a character
    assert [one.code for one in read(path, tmp_path / "cache").findings if one.severity == "E"] == ["file-escape"]


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [odd_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if kind == 8:
        return {any_text(rng): odd_value(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    large = rng.choice([2**63, 2**70, -(2**70), 10**400])
    return [any_text(rng), any_name(rng), large, rng.choice([float("nan"), float("inf"), 5e-324, 1e308]), None, True,
            any_text(rng) * 5000][kind]  # fmt: skip


def test_whatever_meta_holds_is_read_back(tmp_path: Path) -> None:
    rng = random.Random(2)
    for number in range(60):
        meta = {f"{i}{any_text(rng)}": odd_value(rng) for i in range(10)}
        save_checkpoint(
            tmp_path / f"{number}", {"model": {any_text(rng).encode("utf-8", "ignore").decode(): torch.ones(2)}}, meta
        )
        assert json.dumps(load_checkpoint(tmp_path / f"{number}").meta) == json.dumps(
            meta
        )  # NaN is not equal to itself
    save_checkpoint(tmp_path / "last", {}, {"classes": ["cat \ud83d", "dog"]})
    assert load_checkpoint(tmp_path / "last").meta["classes"] == ["cat \ufffd", "dog"]


@pytest.mark.parametrize(
    "text",
    [b"", b"17", b"[]", b"null", b'"text"', b"{", b"[" * 1_000_000, b'{"a":' * 100_000, b"\xff\xfe", b"{} {}",
     b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xff"}', "{}".encode("utf-16")],
    ids=range(13),
)  # fmt: skip
@pytest.mark.parametrize("name", ["meta.json", "manifest.json", "model.safetensors"])
def test_foreign_content_of_a_checkpoint_is_named(tmp_path: Path, text: bytes, name: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"model": {"weight": torch.ones(2)}}, {"update": 1})
    (folder / name).write_bytes(text)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if text == "{}".encode("utf-16") and name == "meta.json":
        assert load_checkpoint(folder).meta == {}  # valid JSON
        return
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "tensor",
    [{"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]},
     {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}],
    ids=["F4", "F8_E8M0", "2**63"],
)  # fmt: skip
def test_tensors_that_torch_does_not_know_are_named(tmp_path: Path, tensor: dict[str, Any]) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"model": {}}, {"update": 1})
    head = json.dumps({"a": tensor}).encode()
    content = len(head).to_bytes(8, "little") + head + b"\0" * tensor["data_offsets"][1]
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(folder)


ODD_RESULTS = [None, True, -1, 2**70, 10**400, 1e308, float("nan"), float("inf"), "x", "\ud83d", [], {}, [[]], [1] * 4,
               [1e308] * 4, {"size": [20, 20], "counts": "\ud83d"}, {"size": [2**70, 1], "counts": [1]},
               {"size": [20, 20], "counts": [2**70]}, [[float("nan")] * 6], [["1", "2"] * 3]]  # fmt: skip


def test_detections_of_any_values_are_read_or_named(tmp_path: Path) -> None:
    dataset = read(written(tmp_path, ["a", "b"], ["1.png", "2.png"]), tmp_path / "cache")
    good = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "score": 0.5, "name": "\ud83d"}
    path = tmp_path / "results.json"
    for key in ("image_id", "category_id", "bbox", "score", "segmentation"):
        for value in ODD_RESULTS:
            path.write_text(json.dumps([good, good | {key: value}]))
            if (key == "segmentation" and not value) or (key, value) in (("score", -1), ("bbox", [1] * 4)):
                assert len(read_results(path, dataset)) == 2
                continue
            with pytest.raises(DataError, match=r"results\.json: 1 of 2 detections"):
                read_results(path, dataset)
    for text in (b"", b"\xff", b"[" * 1_000_000, b'[{"a": ' + b"9" * 5000 + b"}]", b"17", b'{"a": "\\ud83d"}', b"[1"):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"results\.json"):
            read_results(path, dataset)
    path.unlink()
    for make in (path.mkdir, lambda: (path.rmdir(), os.mkfifo(path))):
        make()
        with pytest.raises(DataError, match="not a file, expected detections"):
            read_results(path, dataset)


@pytest.mark.parametrize("large", [2**63, 2**64 - 1, 2**64, 2**70 + 1, 10**40])
def test_ids_beyond_64_bits_are_numbered(tmp_path: Path, large: int) -> None:
    path = written(tmp_path, ["a", "b"], ["1.png", "2.png", "3.png"])
    plain, tree = read(path, tmp_path / "cache"), json.loads(path.read_text())
    for item in tree["images"]:
        item["id"] += large
    for item in tree["annotations"]:
        item.update(id=item["id"] + large, image_id=item["image_id"] + large, category_id=item["category_id"] + large)
    for item in tree["categories"]:
        item["id"] += large
    path.write_text(json.dumps(tree))
    dataset = read(path, tmp_path / "cache")
    fixed = {one.code: one.count for one in dataset.findings if one.severity == "F"}
    assert fixed == {"image-id-text": 3, "category-id-text": 2, "annotation-id": 3}
    assert not [one for one in dataset.findings if one.severity == "E"] and dataset.classes == plain.classes
    for one, other in zip(dataset.records, plain.records, strict=True):
        assert (one.file_name, one.image_id, one.labels.tolist()) == (
            other.file_name,
            other.image_id,
            other.labels.tolist(),
        )
        assert np.array_equal(one.annotation_ids, other.annotation_ids)


def test_a_name_beside_the_largest_id_gets_a_number(tmp_path: Path) -> None:
    path = written(tmp_path, ["a"], ["1.png", "2.png"])
    tree = json.loads(path.read_text())
    tree["images"][0]["id"] = tree["annotations"][0]["image_id"] = 2**63 - 1
    tree["images"][1]["id"] = tree["annotations"][1]["image_id"] = "x"
    path.write_text(json.dumps(tree))
    assert [record.image_id for record in read(path, tmp_path / "cache").records] == [2**63 - 1, 1]
