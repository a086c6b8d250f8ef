"""Fuzzing of the reader: whatever an annotation holds is accepted or refused as the table says, and no process dies."""

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import FAULTS
from gndet.data.datasets.segmentation import box_frame_masks, to_rle

CASES = 500  # of each kind: polygons, RLE masks, boxes, whole annotations
SIZE = (20, 30)
NASTY = [
    float("nan"), float("inf"), -float("inf"), 1e12, -1e12, 1e308, 10**400, -(10**400), 2**63, -1, 0, 0.0, -0.0, 1e-320,
    "", "8", "nan", "\ud800", None, True, False, [], {}, [[]], [[[]]], {"size": [20, 30]}, [1, [2, [3]]],
]  # fmt: skip


def number(rng: np.random.Generator) -> Any:
    """Draw a coordinate, mostly a valid one."""
    if rng.random() < 0.01:
        return NASTY[rng.integers(len(NASTY))]
    low, high = (-45, 75) if rng.random() < 0.05 else (-5, 35)
    return round(float(rng.uniform(low, high)), 2) if rng.random() < 0.7 else int(rng.integers(0, 30))


def polygons(rng: np.random.Generator) -> Any:
    return [[number(rng) for _ in range(rng.integers(0, 17))] for _ in range(rng.integers(0, 4))]


def rle(rng: np.random.Generator) -> Any:
    """Draw run lengths: right ones, some that may be right by chance, or random characters."""
    kind, size = rng.integers(5), list(SIZE) if rng.random() < 0.9 else [number(rng), number(rng)]
    runs = np.diff(np.sort(rng.integers(0, 601, rng.integers(0, 9))), prepend=0, append=600).tolist()
    if kind == 0:
        mask = np.asfortranarray(rng.random(SIZE) < rng.random(), dtype=np.uint8)
        return coco_mask.encode(mask) | {"size": size, "counts": coco_mask.encode(mask)["counts"].decode()}
    if kind == 1:
        counts: Any = bytes(rng.integers(40, 120, rng.integers(0, 12)).astype(np.uint8)).decode()
    elif kind == 2:
        counts = runs
    else:
        runs[rng.integers(len(runs))] += int(rng.integers(-700, 700)) if kind == 3 else 0
        counts = [number(rng) if kind == 4 and rng.random() < 0.2 else run for run in runs]
    return {"size": size, "counts": counts}


def annotation(rng: np.random.Generator, kind: str, index: int) -> dict[str, Any]:
    one = {"id": index + 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 15], "area": 300, "iscrowd": 0}
    one["segmentation"] = [[2, 2, 22, 2, 22, 17, 2, 17]]
    if kind == "polygon":
        one["segmentation"] = polygons(rng)
    elif kind == "rle":
        one["segmentation"] = rle(rng)
    elif kind == "box":
        one["bbox"] = [number(rng) for _ in range(4 if rng.random() < 0.95 else rng.integers(0, 7))]
    else:
        for key in rng.choice(list(one), rng.integers(1, 3), replace=False):
            one[key] = NASTY[rng.integers(len(NASTY))]
    return one


def read_all(folder: Path) -> None:
    """Read every case as a file of its own, in folder; check the accepted masks, and print the counted outcomes."""
    rng, outcomes = np.random.default_rng(20), collections.Counter()
    images = [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}]
    path = folder / "file.json"
    for index in range(4 * CASES):
        kind = ("polygon", "rle", "box", "record")[index % 4]
        items = [annotation(rng, kind, index)]
        path.write_text(json.dumps({"images": images, "annotations": items, "categories": [{"id": 1, "name": "x"}]}))
        dataset = inspect_file(path, None, DataConfig(cache="", train=DatasetConfig(annotations="x")))
        codes = {one.code for one in dataset.findings}
        assert codes <= set(FAULTS), codes
        outcomes.update(codes)
        for record in dataset.records:
            for box, segmentation in zip(record.boxes, record.segmentations, strict=True):
                assert np.isfinite(box).all() and (box[2:] > box[:2]).all()
                if segmentation is not None:
                    mask = coco_mask.decode(to_rle(segmentation, SIZE))
                    assert mask.shape == SIZE and set(np.unique(mask)) <= {0, 1}
                    frame = box_frame_masks([segmentation], box.clip(0, [30, 20, 30, 20])[None], SIZE, 112)
                    assert frame.shape == (1, 112, 112)
                    outcomes[f"{kind} mask accepted"] += 1
            outcomes["kept"] += len(record.labels)
        refused = {code for code in codes if FAULTS[code].severity == "E"}
        assert refused or dataset.records
        assert len(refused) <= 1, "an annotation is refused for its first fault"
        outcomes["refused"] += bool(refused)
    print(json.dumps(outcomes))


@pytest.mark.faults
def test_t18_no_annotation_ends_the_process_or_is_read_wrongly(tmp_path: Path) -> None:
    """T18: 2,000 random polygons, RLE masks, boxes and annotations in a process of their own."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(outcomes)
    assert outcomes["refused"] > 500 and outcomes["kept"] > 500
    assert all(outcomes[f"{kind} mask accepted"] > 100 for kind in ("polygon", "rle", "box"))
    tried = {"polygon-number", "polygon-short", "rle-counts", "rle-size", "rle-malformed", "mask-empty"}
    tried |= {
        "box-malformed",
        "box-outside",
        "box-empty",
        "box-clipped",
        "box-overhang",
        "segmentation-malformed",
        "annotation-id",
    }
    tried |= {"image-unknown", "category-unknown", "crowd-value", "area-value", "annotation-id-low"}
    assert tried <= set(outcomes)


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
