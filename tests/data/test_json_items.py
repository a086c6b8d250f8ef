"""Annotations read from JSON text are those that Python's parser reads; outlines become the numbers that they hold."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gndet.config.data import DataConfig
from gndet.data.datasets import json_parts
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.json_items import JsonItems, Raw, column, parse_outlines

IN_FORM: list[Any] = [
    [[1, 2, 3.5, -4, 5e-3, 6]],
    [[0, 0, 1, 0, 1, 1], [5, 5, 6, 5, 6, 6, 5, 6]],
    [[-0.0, 9007199254740993, 0.1, 1e22, 5, 18446744073709551615]],
    [[1], [2, 3, 4]],
]
OTHERS: list[Any] = [None, [], {"size": [2, 2], "counts": [4]}, 5, "[[1, 2]]", False]


def raws(values: list[Any], **layout: Any) -> list[Raw]:
    return msgspec.json.decode(json.dumps(values, **layout).encode(), type=list[Raw])


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=["json", "indented", "tight"])
@pytest.mark.parametrize("values", [IN_FORM, [*IN_FORM[:2], *OTHERS, *IN_FORM[2:]], OTHERS[:1] + IN_FORM])
def test_outlines_become_their_numbers(values: list[Any], layout: dict[str, Any]) -> None:
    parsed = parse_outlines(raws(values, **layout))
    assert parsed is not None
    owner, lengths, points = parsed
    expected = [(i, part) for i, value in enumerate(values) if isinstance(value, list) for part in value]
    assert owner.tolist() == [i for i, _ in expected]
    assert lengths.tolist() == [len(part) for _, part in expected]
    numbers = np.array([number for _, part in expected for number in part], dtype=np.float64)
    assert points.dtype == np.float64 and points.tobytes() == numbers.tobytes()


@pytest.mark.parametrize("value", [
    [1, 2, 3, 4, 5, 6], [[1, 2], 3], [3, [1, 2]], [[]], [[], 5], [5, []], [[], [1, 2]], [[[1, 2], [3, 4]]], [[1, None]],
    [[1, "2"]], [["[1,2]"]], [[True, 1]], [{"size": [1, 1], "counts": [1]}], [[1, 2], None], [[10**30, 1]],
    [[[]], 1, 2], [[[1], 2], [3]],
], ids=json.dumps)  # fmt: skip
def test_a_list_in_another_form_is_left_to_the_reader_of_lists(value: Any) -> None:
    assert parse_outlines(raws([IN_FORM[0], value, IN_FORM[1]])) is None


def test_an_item_has_the_values_of_the_file() -> None:
    items: list[dict[str, Any]] = [
        {"id": 10**40, "bbox": None, "area": 5, "segmentation": {"size": [1, 1], "counts": "01"}, "ignore": [1]},
        {"bbox": [1, 2.0, "3"], "attributes": {"rotation": 90}, "iscrowd": True, "segmentation": [[1, 2]]},
        {"id": "7", "image_id": -0.0, "category_id": [], "segmentation": None},
    ]
    stated = [item | {"unknown": {"id": 2}, "caption": "\u00e9", "place": "x", "category": "cat"} for item in items]
    read = JsonItems(json.dumps(stated).encode())
    assert len(read) == 3 and list(map(repr, map(in_order, read))) == list(map(repr, map(in_order, items)))
    for key in ("id", "image_id", "category_id", "iscrowd", "ignore", "area", "bbox", "attributes"):
        assert repr(column(read, key)) == repr(column(items, key))


def in_order(item: dict[str, Any]) -> list[Any]:
    return sorted(item.items())


@pytest.mark.parametrize("value", [
    b'"\xff"', b"NaN", b"1e400", b'"\\ud800"', b"01", b'"\x01"', b"[" * 2000 + b"]" * 2000, b'{"id": 1, "id": 2}',
    b"truex", b'"annotations"', b"5}, {", b"5}, 5, {", b'"}, {"', b"5, \"id\": 3",
], ids=lambda value: repr(value[:12]))  # fmt: skip
@pytest.mark.parametrize("key", [b"unknown", b"segmentation", b"area", b"\\u0069d"])
def test_a_file_in_parts_is_refused_or_read_like_the_whole_file(
    key: bytes, value: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    item = (
        b'{"id": %d, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "segmentation": [[2, 2, 11, 2, 11, 11]]%s}'
    )
    items = [item % (number, b', "%s": %s' % (key, value) if number == 60 else b"") for number in range(1, 120)]
    path.write_bytes(
        b'{"images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}], "annotations": ['
        + b", ".join(items) + b'], "categories": [{"id": 1, "name": "cat"}]}'
    )  # fmt: skip
    expected = inspect_file(path, None, DataConfig(cache=""))
    monkeypatch.setattr(json_parts, "LEAST", 0)
    monkeypatch.setattr(json_parts, "PART", 2000)
    assert len(json_parts.take_apart(path)) > 3
    dataset = inspect_file(path, None, DataConfig(cache=""))
    assert dataset.findings == expected.findings and dataset.classes == expected.classes
    assert [repr(record._replace(load=print)) for record in dataset.records] == [
        repr(record._replace(load=print)) for record in expected.records
    ]
