"""Real data written as a labelling tool would export it, and the comparison with the same data as COCO's JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.exports.engine import Opener, inspect_export
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import Dataset

SETS = {  # folder, annotations, pictures
    "bccd": ("bccd", "instances_val.json", "val"),
    "nuclei": ("nuclei", "instances_val.json", "val"),
    "coco": ("coco-tiny", "instances_val2017.json", "val2017"),
}
DATA = DataConfig(cache="", keep_empty=True)


class Truth(NamedTuple):
    """The first pictures of a data set: its COCO content, as gndet reads it, and its image folder."""

    content: dict[str, Any]
    dataset: Dataset
    images: Path

    def pictures(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Yield each image with its annotations; these have a class name, too."""
        names = {category["id"]: category["name"] for category in self.content["categories"]}
        for image in self.content["images"]:
            mine = [item for item in self.content["annotations"] if item["image_id"] == image["id"]]
            yield image, [item | {"name": names[item["category_id"]]} for item in mine]


def first_pictures(data_root: Path, tmp_path: Path, name: str, num: int, keep: Any = None) -> Truth:
    """Take the first images, and the annotations that keep() selects, without crowd regions."""
    folder, file, pictures = SETS[name]
    content = json.loads((data_root / folder / "annotations" / file).read_text())
    content["images"] = content["images"][:num]
    ids = {image["id"] for image in content["images"]}
    taken = [item for item in content["annotations"] if item["image_id"] in ids and not item.get("iscrowd")]
    content["annotations"] = [item for item in taken if keep is None or keep(item)]
    used = {item["category_id"] for item in content["annotations"]}
    content["categories"] = [category for category in content["categories"] if category["id"] in used]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    dataset = inspect_file(tmp_path / "truth.json", data_root / folder / pictures, DATA)
    assert not dataset.refused and len(dataset.records) == num
    return Truth(content, dataset, data_root / folder / pictures)


def read(opener: Opener, annotations: Path, images: Path | None = None, split: str = "") -> Dataset:
    """Read an export."""
    return inspect_export(opener, annotations, images, split, DATA)


def codes(dataset: Dataset) -> dict[str, int]:
    """Return the counts of the findings, without those that every small set has."""
    usual = ("category-unused", "image-empty", "mask-missing", "category-gaps", "box-tiny")
    return {finding.code: finding.count for finding in dataset.findings if finding.code not in usual}


def examples(dataset: Dataset, code: str) -> str:
    """Return the words of a finding."""
    return "\n".join(line for finding in dataset.findings if finding.code == code for line in finding.examples)


def assert_equal(dataset: Dataset, truth: Dataset, *, boxes: float = 1e-6, iou: float = 1.0) -> None:
    """Compare pictures, classes by name, boxes to so many pixels, and masks."""
    assert not dataset.refused, dataset.findings
    mine, theirs = ({record.file_name: record for record in data.records} for data in (dataset, truth))
    assert set(mine) == set(theirs)
    for name, record in mine.items():
        other = theirs[name]
        assert record.size == other.size
        names = [dataset.classes[label] for label in record.labels]
        assert names == [truth.classes[label] for label in other.labels]
        np.testing.assert_allclose(record.boxes, other.boxes, atol=boxes, rtol=0)
        for mask, expected in zip(record.segmentations, other.segmentations, strict=True):
            if expected is not None:
                both = [to_rle(segmentation, record.size) for segmentation in (mask, expected)]
                assert coco_mask.iou(both[:1], both[1:], [0])[0, 0] >= iou


def window(mask: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """Return an RLE's mask cut to its box, (h, w) bool, and the first pixel's x and y."""
    pixels = coco_mask.decode(mask).astype(bool)
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(columns[0]), int(rows[0])


def make_pictures(folder: Path, *names: str, size: tuple[int, int] = (72, 96)) -> None:
    """Write gray pictures of height, width."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1]).save(folder / name)
