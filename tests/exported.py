"""Write exports of labelling tools as real tools do, and read them; the truth is the same data as COCO JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.exports.engine import Opener, inspect_export
from gndet.data.datasets.reading import inspect_both, read_dataset
from gndet.data.records import Dataset

SIZE = (48, 64)  # height, width of `picture`


def picture(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(path)


def write(folder: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Write files below a folder: text, bytes, or None for a picture of 64 x 48 pixels.  Returns the folder."""
    for name, content in files.items():
        if content is None:
            picture(folder / name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def inspected(opener: Opener, annotations: Path, split: str = "train", images: Path | None = None) -> Dataset:
    return inspect_export(opener, annotations, images, split, DataConfig(root=str(annotations), cache=""))


def inspected_alone(root: Path, **train: str) -> tuple[Dataset, Dataset]:
    """Read the training and validation set of a folder that is given alone, or with options of data.train."""
    cfg = DatasetConfig(split="train", **train)
    return inspect_both(DataConfig(root=str(root), cache="", train=cfg), masks=False)


def codes(dataset: Dataset) -> dict[str, int]:
    """Return how often each code was found, but for those that hold for all exports without masks."""
    skipped = ("mask-missing", "image-empty", "category-unused")
    return {found.code: found.count for found in dataset.findings if found.code not in skipped}


def words(dataset: Dataset) -> str:
    return "\n".join(text for found in dataset.findings for text in (*found.examples, found.remedy))


def boxes(dataset: Dataset) -> dict[str, list[list[float]]]:
    """Return the boxes by the name of the picture, each after its label."""
    return {
        record.file_name: [
            [label, *box] for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
        ]
        for record in dataset.records
    }


def coco_tree(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def read_tree(folder: Path, tree: dict[str, Any], images: Path) -> Dataset:
    """Read a COCO tree, whose pictures lie in images."""
    (folder / "coco.json").write_text(json.dumps(tree))
    data = DataConfig(root=str(folder), cache="")
    return read_dataset(DatasetConfig(annotations="coco.json", images=str(images)), data)


def assert_equal(dataset: Dataset, truth: Dataset, tolerance: float = 1e-9) -> None:
    """Compare names, sizes, classes, labels and boxes of two data sets, picture by picture, in any order."""
    assert dataset.classes == truth.classes and not dataset.refused
    assert len(dataset.records) == len(truth.records) > 0
    expected = {record.file_name: record for record in truth.records}
    for record in dataset.records:
        other = expected[record.file_name]
        assert record.size == other.size
        assert record.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(record.boxes, other.boxes, rtol=0, atol=tolerance)
