"""Masks with endless outlines: refused where tracing them would take gigabytes, unchanged where it is bounded."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from gndet.config.data import DataConfig
from gndet.data.datasets import segmentation
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.masks import check_masks
from gndet.data.datasets.segmentation import (
    MAX_OUTLINE,
    box_frame_masks,
    into_frames,
    mask_window,
    outline_lengths,
    to_rle,
)
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco

SIDE = 1000


def zigzag(pixels: int) -> list[float]:
    """Return an outline of about this length that goes to and fro between the sides of the picture."""
    rows = np.linspace(0, SIDE, pixels // SIDE + 1)
    return np.stack([np.arange(len(rows)) % 2 * float(SIDE), rows], axis=1).ravel().tolist()


def triangles(count: int) -> list[list[float]]:
    corners = np.random.default_rng(0).uniform(0, SIDE - 9, (count, 1, 2))
    return (corners + np.array([[0, 0], [8, 0], [0, 8]])).reshape(count, 6).round(1).tolist()


def test_the_length_of_an_outline_is_that_of_its_edges_along_the_longer_axis() -> None:
    square, line = [0, 0, 10, 0, 10, 10, 0, 10], [0, 0, 3, 40, -3, 40]
    points = np.array([*square, *line, 5, 5], dtype=float).reshape(-1, 2)
    assert outline_lengths(points, np.array([4, 3, 1])).tolist() == [40, 40 + 6 + 40, 0]


def test_only_masks_that_are_too_long_are_refused() -> None:
    fine, long = zigzag(MAX_OUTLINE - 2 * SIDE), zigzag(MAX_OUTLINE + SIDE)
    half = zigzag(MAX_OUTLINE // 2 + SIDE)
    rle = {"size": [SIDE, SIDE], "counts": [0] * (MAX_OUTLINE - 1) + [SIDE * SIDE]}
    masks = [
        [fine],
        [long],
        [half, half],
        rle,
        rle | {"counts": [0, *rle["counts"]]},
        rle | {"counts": "0" * 4_000_001},
    ]
    checked = check_masks(masks, np.array([[SIDE, SIDE]] * len(masks)))
    assert checked.refused.tolist() == [False, True, True, False, True, True]
    assert {fault.code for fault in checked.faults} == {"mask-long"}
    texts = [fault.text for fault in checked.faults]
    assert texts[0].startswith("an outline of 4,00") and texts[0].endswith("expected at most 4,000,000")
    assert texts[2] == "RLE counts of length 4,000,001, expected at most 4,000,000"
    assert checked.mask(0) == [fine]


def test_a_polygon_of_half_a_million_points_is_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "img" / "a.png")
    points = np.random.default_rng(0).integers(0, SIDE, 1_000_000).tolist()
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, SIDE, SIDE], "area": 9.0, "iscrowd": 0}
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "a"}], "annotations": [annotation | {"segmentation": [points]}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(tree))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = inspect_file(tmp_path / "a.json", None, DataConfig(cache=""))
    assert [finding.code for finding in dataset.findings if finding.severity == "E"] == ["mask-long"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB; tracing takes 8 GB


def test_an_outline_too_long_for_the_frame_of_its_box_is_traced_in_the_picture() -> None:
    rng = np.random.default_rng(0)
    box = np.array([[500, 500, 500.01, 500.01]])
    points = (500 + rng.uniform(-0.1, 0.1, 60_000)).tolist()  # 3,000 pixels, but 8 million cells of the frame
    assert into_frames([[points]], box, 112) == [None]
    assert into_frames([[points[:600]]], box, 112) != [None]
    assert box_frame_masks([[points]], box, (SIDE, SIDE), 112).shape == (1, 112, 112)


def test_an_rle_is_sampled_in_the_frame_of_its_box_as_when_it_is_decoded_whole() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 60, (200, 2)):
        mask = np.zeros((height, width), dtype=np.uint8)
        y, x = rng.integers(height), rng.integers(width)
        mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = 1
        box = np.sort(rng.uniform(0, 1, (2, 2)) * [width, height], axis=0).ravel()
        code = coco_mask.encode(np.asfortranarray(mask))
        top, left, window = mask_window(code)
        whole = np.zeros_like(mask)
        whole[top : top + window.shape[0], left : left + window.shape[1]] = window
        assert (whole == mask).all() and window[0].any() and window[:, -1].any()
        centers = [first + (np.arange(28) + 0.5) * (last - first) / 28 - 0.5 for first, last in (box[1::2], box[::2])]
        rows = np.stack([np.interp(centers[0], range(height), column) for column in mask.T])  # (w, S)
        expected = np.stack([np.interp(centers[1], range(width), row) for row in rows.T]) >= 0.5
        drawn = box_frame_masks([code], box[None], (height, width), 28)[0]
        assert (drawn != expected).mean() < 0.01  # halves are rounded


def test_thousands_of_polygons_make_the_mask_of_their_union() -> None:
    parts = triangles(1000)
    expected = coco_mask.merge(coco_mask.frPyObjects(parts, SIDE, SIDE))
    assert to_rle(parts, (SIDE, SIDE)) == expected
    assert len(parts) > segmentation.MERGED_AT_ONCE**1.5  # merged in several rounds


def test_objects_of_many_polygons_score_as_their_union(tmp_path: Path) -> None:
    parts, size = triangles(100), (SIDE, SIDE)
    union = to_rle(parts, size)
    x, y, width, height = coco_mask.toBbox(union).tolist()
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "iscrowd": 0}
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "a"}], "annotations": [annotation | {"segmentation": parts}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(tree))
    truths = coco_truths(inspect_file(tmp_path / "a.json", None, DataConfig(cache="")), masks=True)
    mask = {"size": list(size), "counts": union["counts"].decode()}
    assert truths["segm"]["annotations"][0]["segmentation"] == mask
    found = {"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.5, "segmentation": mask}
    for engine in ("hotcoco", "pycocotools"):
        metrics = coco_metrics(truths, from_coco([found]), engine=engine, max_detections=100)
        assert metrics["segm"].summary["AP"] == pytest.approx(1)
