"""Detections of a file are read in parts like one by one, with the same words for the same fault."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gndet.data.datasets.segmentation import run_lengths
from gndet.errors import DataError
from gndet.evaluation import results_file
from gndet.evaluation.results import from_coco
from gndet.evaluation.results_file import Known, read_detections

KNOWN = Known({7: (30, 40), 2: (50, 20), 2**53 + 1: (9, 9)}, frozenset({3, 90, 2**60 + 1}))
COUNT = 60


def detections(seed: int, *, masks: bool = True) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), []
    for _ in range(COUNT):
        image_id = list(KNOWN.sizes)[rng.integers(3)]
        mask = rng.random(KNOWN.sizes[image_id]) < rng.choice([0, 0.01, 0.5, 1])
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        row = {
            "image_id": image_id, "category_id": sorted(KNOWN.category_ids)[rng.integers(3)],
            "bbox": [*rng.uniform(0, 9, 2).tolist(), int(rng.integers(9)), 0.5], "score": float(rng.random()),
        }  # fmt: skip
        rows.append(row | ({"segmentation": code | {"counts": code["counts"].decode()}} if masks else {}))
    return rows


@pytest.fixture(params=[1, 300, 2500, 1 << 40], ids=lambda size: f"parts-of-{size}")
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read files in parts of some bytes, or as a whole."""
    monkeypatch.setattr(results_file, "LEAST", 0 if request.param < 1 << 40 else request.param)
    monkeypatch.setattr(results_file, "PART", request.param)
    return request.param


@pytest.mark.parametrize("masks", [True, False])
def test_parts_give_the_detections_of_the_file(tmp_path: Path, parts: int, masks: bool) -> None:
    rows, path = detections(1, masks=masks), tmp_path / "results.json"
    # braces in a text, and a list of objects, must not mislead the cuts
    rows[3] |= {"note": "}, {", "parts": [{"a": {}}, {}, {"b": '\\"}, {'}]}
    for text in (json.dumps(rows), json.dumps(rows, indent=1), json.dumps(rows, separators=(",", ":")) + " \n\t"):
        path.write_text(text)
        read = read_detections(path, KNOWN, "made up")
        del rows[3]["note"], rows[3]["parts"]
        assert list(read) == rows and (read.areas == from_coco(rows).areas).all()
        rows[3] |= {"note": "}, {", "parts": []}
    path.write_text("[]")
    assert len(read_detections(path, KNOWN, "made up")) == 0


def changed(rows: list[dict[str, Any]], place: int, key: str, value: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    inner = rows[place]["segmentation"] if key in ("counts", "size") else rows[place]
    inner[key] = value
    return rows


FAULTS: list[tuple[str, Any]] = [
    ("image_id", 1), ("image_id", 7.0), ("image_id", True), ("category_id", 4), ("category_id", "3"),
    ("score", "0.5"), ("score", 1e9), ("score", float("nan")), ("score", True), ("score", 10**400),
    ("bbox", [1, 2, 3]), ("bbox", [1, 2, -3, 4]), ("bbox", [1, 2, 3, None]), ("bbox", "1234"),
    ("segmentation", 5), ("segmentation", {"size": [9, 9]}), ("size", [9, 8]), ("size", None),
    ("counts", "é"), ("counts", "0p"), ("counts", "1P"), ("counts", "ooooooooo0"), ("counts", 3),
    ("counts", coco_mask.encode(np.ones((9, 10), dtype=np.uint8, order="F"))["counts"].decode()),  # too many pixels
    ("counts", coco_mask.encode(np.ones((9, 8), dtype=np.uint8, order="F"))["counts"].decode()),  # too few
    ("counts", "Qb2OM"),  # 81, -1, -3 ... : lengths below zero
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FAULTS, ids=lambda value: str(value)[:20])
def test_a_fault_is_named_like_in_a_file_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    rows, path, texts = detections(2), tmp_path / "results.json", []
    place = random.Random(str(value)).randrange(COUNT)
    rows[place] |= {"image_id": 2**53 + 1, "segmentation": {"size": [9, 9], "counts": "b20"}}
    rows[place]["segmentation"]["counts"] = coco_mask.encode(np.ones((9, 9), dtype=np.uint8, order="F"))[
        "counts"
    ].decode()
    path.write_text(json.dumps(changed(rows, place, key, value)))
    monkeypatch.setattr(results_file, "PART", 1500)
    for least in (0, 1 << 40):
        monkeypatch.setattr(results_file, "LEAST", least)
        with pytest.raises(DataError, match=rf"1 of {COUNT} detections") as caught:
            read_detections(path, KNOWN, "made up")
        texts.append(str(caught.value))
    monkeypatch.setattr(results_file, "_are_usual", lambda items, known: False)
    with pytest.raises(DataError) as caught:
        read_detections(path, KNOWN, "made up")
    assert {*texts, str(caught.value)} == {texts[0]} and f"\n  detection {place}: " in texts[0]


def test_what_is_not_usual_is_read_one_by_one(tmp_path: Path, parts: int) -> None:
    rows, path = detections(3), tmp_path / "results.json"
    outline = {"image_id": 7, "segmentation": [[2, 2, 12, 2, 12, 9, 2, 9]]}
    listed = {"image_id": 2**53 + 1, "segmentation": {"size": [9, 9], "counts": [9, 18, 54]}}
    rows[5] |= outline
    rows[40] |= listed
    del rows[40]["bbox"]
    path.write_text(json.dumps(rows))
    read = read_detections(path, KNOWN, "made up")
    assert read.areas[[5, 40]].tolist() == [70, 18] and read.boxes[40].tolist() == [1, 0, 2, 9]
    others = [index for index in range(COUNT) if index not in (5, 40)]
    assert list(read.take(np.array(others))) == [rows[index] for index in others]
    rows[8]["segmentation"] = None
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=f"1 of {COUNT} detections have no segmentation"):
        read_detections(path, KNOWN, "made up")


def test_sums_of_run_lengths_are_those_of_the_codes() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        size = rng.integers(1, 2000, 2)
        lengths = [rng.integers(0, 10 ** rng.integers(1, 8), rng.integers(1, 9)).tolist() for _ in range(5)]
        codes = coco_mask.frPyObjects([{"size": size.tolist(), "counts": counts} for counts in lengths], *size.tolist())
        texts = [code["counts"] for code in codes]
        assert [run_lengths(text.decode()) for text in texts] == lengths
        assert results_file._sum_of_runs(texts) == sum(map(sum, lengths))
