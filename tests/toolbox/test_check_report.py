"""The report of `gndet check` tells sizes as they are: both of two, and widths and heights apart for more."""

import json
from pathlib import Path

import pytest

from gndet.config.data import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.toolbox.check.report import sizes_in_words, summarize


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(96, 72), (96, 72)], "96 x 72 pixels"),
        ([(96, 72), (72, 96)], "72 x 96 and 96 x 72 pixels"),
        ([(96, 72), (72, 96), (80, 80)], "widths 72 to 96, heights 72 to 96 pixels (3 sizes)"),
        ([(96, 10), (96, 20), (96, 30)], "widths 96, heights 10 to 30 pixels (3 sizes)"),
    ],
)
def test_sizes_are_told_as_they_are(tmp_path: Path, sizes: list[tuple[int, int]], words: str) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    tree = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    (tmp_path / "ann.json").write_text(json.dumps(tree))
    assert sizes_in_words(summarize(inspect_file(tmp_path / "ann.json", None, DataConfig(cache="")))) == words
