"""Reading all annotations at once, or a file in parts, finds and keeps exactly what reading one by one does."""

import copy
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gndet.config.data import DataConfig
from gndet.data.datasets import coco, json_parts
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.columns import Columns, Known, end_to_end, read_columns
from gndet.data.datasets.faults import Findings
from gndet.data.datasets.masks import Masks
from gndet.data.datasets.packed import count_objects
from gndet.data.records import Dataset
from gndet.errors import MachineError

PLAIN = DataConfig(cache="")


def outline(rng: random.Random, size: int = 40) -> list[float]:
    x, y = rng.uniform(0, 100 - size), rng.uniform(0, 80 - size)
    return [x, y, x + size, y, x + size, y + size, x, y + size]


def annotation(rng: random.Random, number: int, images: int) -> dict[str, Any]:
    polygons = [outline(rng) for _ in range(rng.randint(1, 3))]
    x0, y0 = (min(v for polygon in polygons for v in polygon[i::2]) for i in (0, 1))
    x1, y1 = (max(v for polygon in polygons for v in polygon[i::2]) for i in (0, 1))
    return {
        "id": number + 1, "image_id": rng.randrange(images), "category_id": rng.choice((3, 7)), "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0], "area": rng.choice((100, 12.5)), "segmentation": polygons,
    }  # fmt: skip


ODD = [
    {"id": None}, {"id": 0}, {"id": -4}, {"id": 5.0}, {"id": True}, {"id": 1}, {"id": 10**30}, {"id": "7"},
    {"image_id": 10**6}, {"image_id": 2.0}, {"image_id": None}, {"image_id": 2**63}, {"category_id": 99},
    {"category_id": 3.0}, {"iscrowd": 1}, {"iscrowd": 2}, {"iscrowd": None}, {"iscrowd": False}, {"iscrowd": "0"},
    {"area": None}, {"area": -1}, {"area": 1e30}, {"area": True}, {"area": 10**400}, {"area": "1"},
    {"bbox": [1, 2, 3]}, {"bbox": [1, 2, 0, 5]}, {"bbox": [1, 2, 0.5, 5]}, {"bbox": [-30, 2, 60, 5]},
    {"bbox": [500, 2, 5, 5]}, {"bbox": [0, 0, 100.005, 5]}, {"bbox": [0, 0, 101, 5]}, {"bbox": [0, 0, True, 5]},
    {"bbox": [0, 0, 10**400, 5]}, {"bbox": ["0", 0, 4, 5]}, {"bbox": None}, {"bbox": [1e7, 0, 4, 5]},
    {"segmentation": []}, {"segmentation": None}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [[1, 2, 3, 4, 5]]},
    {"segmentation": [[0, 0, 9, 0, 9, 9, 5]]}, {"segmentation": [[0, 0, 9, 0, 9, "9"]]},
    {"segmentation": [[0, 0, 9, 0, 9, 1e9]]}, {"segmentation": [[0, 0, 9, 0, 9, 10**400]]},
    {"segmentation": [[0, 0, 9, 0, 9, True]]}, {"segmentation": [[0, 0, 9, 0, 9, [9]]]}, {"segmentation": [7]},
    {"segmentation": [[5, 5, 5, 5, 5, 5]]}, {"segmentation": [[10, 10, 10.2, 10, 10.2, 10.2]]},
    {"segmentation": [[-120, 0, 9, 0, 9, 9]]}, {"segmentation": [[-20, 0, 9, 0, 9, 99]]}, {"segmentation": "text"},
    {"segmentation": {"size": [80, 100], "counts": [10, 20, 7970]}},
    {"segmentation": {"size": [80, 100], "counts": [9]}},
    {"segmentation": [[10, 10, 60, 60, 60, 10, 10, 60]]},
    {"segmentation": [[10, 10, 10.1, 60, 10, 60], [3, 3, 3, 9, 3, 5]]},
    {"segmentation": [[0, 0, 50, 0, 50, 50, 0, 50], [1, 2]]}, {"extra": {"a": [{}, {"b": 1}]}},
    {"ignore": 1}, {"ignore": 0}, {"ignore": "1"}, {"ignore": [1]}, {"ignore": True, "iscrowd": 1},
    {"bbox": []}, {"bbox": [], "segmentation": []}, {"bbox": None, "segmentation": None}, {"bbox": [None] * 4},
    {"bbox": None, "segmentation": {"size": [80, 100], "counts": [10, 20, 7970]}}, {"bbox": [], "segmentation": "x"},
    {"attributes": {"rotation": 30.0}}, {"attributes": {"rotation": 1}, "segmentation": []}, {"attributes": [3]},
    {"attributes": {"rotation": 10**400}}, {"attributes": {"rotation": "x"}}, {"area": 0}, {"area": 5e3},
    {"segmentation": [0, 0, 9, 0, 9, 9]}, {"segmentation": [[0, 0], [9, 0], [9, 9]]}, {"segmentation": [[], [7, 7]]},
    {"segmentation": [[[0, 0], [9, 0], [9, 9]]]}, {"segmentation": [[[0, 0, 9, 0, 9, 9]], [[1, 1], [5, 1], [1, 5]]]},
    {"segmentation": [{"size": [80, 100], "counts": [10, 20, 7970]}]}, {"segmentation": [[[]]]},
]  # fmt: skip


def tree(seed: int, count: int, odd: int) -> dict[str, Any]:
    """A file of `count` annotations, `odd` of them odd in some way."""
    rng = random.Random(seed)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 100} for i in range(20)]
    images[3]["width"] = "wide"
    items = [annotation(rng, i, len(images)) for i in range(count)]
    for place in rng.sample(range(count), odd):
        items[place] |= copy.deepcopy(rng.choice(ODD))
        if rng.random() < 0.1:
            del items[place][rng.choice(sorted(items[place]))]
    return {"images": images, "annotations": items, "categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}]}


def described(dataset: Dataset) -> tuple[Any, ...]:
    records = [
        (r.image_id, r.file_name, r.size, r.boxes.tolist(), r.labels.tolist(), r.crowd.tolist(), r.area.tolist(),
         r.annotation_ids.tolist(), list(r.segmentations))
        for r in dataset.records
    ]  # fmt: skip
    return dataset.classes, dataset.category_ids, dataset.findings, records


def one_by_one(items: list[dict[str, Any]], known: Known, found: Findings) -> Columns:
    parts = []
    for place, item in enumerate(items):
        noted = Findings()
        parts.append(read_columns([item], known, noted))
        found.take(noted.listed(), place)
    return end_to_end(parts)


@pytest.mark.parametrize("seed", range(12))
def test_columns_keep_and_find_what_one_by_one_does(seed: int) -> None:
    content = tree(seed, 120, 10 * (seed % 4) + seed)
    sizes = {image["id"]: (80, 100) if image["width"] == 100 else None for image in content["images"]}
    known, found, found_singly = Known.of(sizes, (3, 7)), Findings(), Findings()
    at_once = read_columns(content["annotations"], known, found)
    singly = one_by_one(content["annotations"], known, found_singly)
    assert found.listed() == found_singly.listed()
    for values, expected in zip((*at_once, *at_once.masks), (*singly, *singly.masks), strict=True):
        if not isinstance(values, Masks):
            np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=["json", "indented", "tight"])
@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("annotations", "categories", "images")])
@pytest.mark.parametrize("seed", range(3))
def test_a_file_in_parts_is_the_file(
    seed: int, order: tuple[str, ...], layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "a.json", tree(seed, 300, 60 * seed)
    path.write_text(json.dumps({key: whole[key] for key in order}, **layout))
    expected = described(inspect_file(path, None, PLAIN))
    monkeypatch.setattr(json_parts, "LEAST", 0)
    monkeypatch.setattr(json_parts, "PART", 5000)
    assert len(json_parts.take_apart(path)) > 3
    if seed == 0:  # the others may hold values that force reading the file as a whole
        monkeypatch.setattr(coco, "read_columns", None)
    assert described(inspect_file(path, None, PLAIN)) == expected


@pytest.mark.faults
def test_a_killed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree(0, 300, 0)))
    monkeypatch.setattr(json_parts, "LEAST", 0)
    monkeypatch.setattr(json_parts, "_read_part", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(MachineError, match=r"a\.json: a process that read it was killed: out of memory\?"):
        inspect_file(path, None, PLAIN)


STRANGE = [
    '{"annotations": [', '{"annotations": []}', '{"annotations": [}, {]}', '"annotations": [{}]', "[]", "",
    '{"annotations": [{"id": "}, {"}], "images": []}',
    '{"annotations": [{"id": 1}], "annotations": [{"id": 2}], "images": [], "categories": []}',
    '{"annotations": [{"id": NaN}, {"id": 1}], "images": [{"id": 1}], "categories": [{"id": 1}]}',
    '{"annotations": [{"id": 1, "parts": [{"a": 1}, {"b": 2}]}], "images": [{"id": 1}], "categories": [{"id": 1}]}',
    '{"annotations": [], "images": [{"id": 1, "width": 9, "height": 9, "file_name": "a"}], '
    '"categories": [{"id": 1, "name": "a"}]}',
    '{"annotations": [{"id": 1}], "categories": [{"id": 1, "name": "\\"images\\""}], "images": [{"id": 1}]}',
    '{"note": "annotations", "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [1, 2]}',
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_a_strange_file_is_judged_as_a_whole(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    expected = described(inspect_file(path, None, PLAIN))
    monkeypatch.setattr(json_parts, "LEAST", 0)
    monkeypatch.setattr(json_parts, "PART", 12)
    monkeypatch.setattr(json_parts, "SHORT", 64)
    assert described(inspect_file(path, None, PLAIN)) == expected


@pytest.mark.parametrize("seed", range(4))
def test_objects_are_counted_without_making_records(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree(seed, 120, 60)))
    records = inspect_file(path, None, PLAIN).records[1:]
    for fast, slow in zip(count_objects(records), count_objects(list(records)), strict=True):
        np.testing.assert_array_equal(fast, slow)
