"""On crowded pictures, matches are pycocotools' own; mistakes, their cost, confusion and suspects are hotcoco's."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gndet.config.data import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.records import Dataset
from gndet.evaluation.coco_metrics import RECALLS, coco_truths
from gndet.evaluation.results import Results, from_coco
from gndet.toolbox.analysis.analysis import Analysis, make_analysis
from gndet.toolbox.analysis.bootstrap import average_precision

SIZE, CLASSES = (60, 80), [3, 7, 50]  # height, width; ids


def rle(box: list[float]) -> dict[str, Any]:
    x, y, width, height = (int(side) for side in box)
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[max(y, 0) : y + height, max(x, 0) : x + width] = 1
    code = coco_mask.encode(mask)
    return {"size": list(SIZE), "counts": code["counts"].decode()}


def crowded(folder: Path, seed: int) -> tuple[Dataset, Results]:
    """Return pictures in any order with doubled objects, crowd regions and empty ones, and detections of equal scores.

    Objects are close to each other on a grid, so that many overlaps are equal, some of them to a threshold.
    """
    draws, annotations, found = np.random.default_rng(seed), [], []
    ids = draws.permutation(900)[:60].tolist()
    for image in ids:
        boxes = np.column_stack((draws.integers(2, 40, (8, 2)), draws.integers(4, 20, (8, 2)))).astype(float)
        boxes[1], boxes[2] = boxes[0], boxes[0] + (1, 0, 0, 0)
        labels = draws.choice(CLASSES, 8)
        labels[1] = labels[0]
        num = int(draws.choice((0, 1, 8)))
        for box, label in zip(boxes[:num].tolist(), labels.tolist(), strict=False):
            x, y, w, h = box
            crowd = draws.random() < 0.2
            drawn = rle(box) if crowd else [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box, "area": w * h,
                "iscrowd": int(crowd), "segmentation": drawn,
            })  # fmt: skip
        for _ in range(int(draws.integers(0, 40))):
            near = int(draws.integers(8))
            box = (boxes[near] + draws.integers(-2, 3, 4) * (draws.random() < 0.7)).tolist()
            label = int(labels[near] if draws.random() < 0.7 else draws.choice(CLASSES))
            score = float(draws.integers(1, 10) / 10)
            found.append(
                {"image_id": image, "category_id": label, "bbox": box, "score": score, "segmentation": rle(box)}
            )
    images = [{"id": id, "file_name": f"{id}.jpg", "height": SIZE[0], "width": SIZE[1]} for id in ids]
    categories = [{"id": id, "name": f"class {id}"} for id in CLASSES]
    file = folder / "truth.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return inspect_file(file, None, DataConfig(cache="")), from_coco(found)


@pytest.fixture(params=[(kind, limit, seed) for kind in ("box", "mask") for limit in (100, 2) for seed in range(2)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Dataset, Results, Analysis, int]:
    kind, limit, seed = request.param
    dataset, results = crowded(tmp_path, seed)
    return dataset, results, make_analysis(dataset, results, kind=kind, max_detections=limit), limit


def by_id(ids: Any, matches: np.ndarray, ignored: np.ndarray) -> dict[int, tuple[list[int], Any]]:
    return dict(zip(np.asarray(ids).tolist(), zip(matches.tolist(), ignored.tolist(), strict=True), strict=True))


def test_all_matches_are_pycocotools_own(case: tuple) -> None:
    dataset, results, found, limit = case
    kind = "segm" if found.kind == "mask" else "bbox"
    truth = coco_truths(dataset, masks=kind == "segm")[kind]
    key = "segmentation" if kind == "segm" else "bbox"
    rows = [{name: row[name] for name in ("image_id", "category_id", "score", key)} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = truth | {"annotations": [dict(row) for row in truth["annotations"]]}
        expected.createIndex()
        scorer = COCOeval(expected, expected.loadRes(rows), kind)
        scorer.params.maxDets = [1, 2, limit]
        scorer.evaluate()
    parts = [part for part in scorer.evalImgs if part and part["aRng"] == scorer.params.areaRng[0]]
    detections, objects = {}, {}
    for part in parts:
        detections |= by_id(part["dtIds"], part["dtMatches"].T, part["dtIgnore"].T)
        objects |= by_id(part["gtIds"], part["gtMatches"].T, part["gtIgnore"])
    matches = found.matches
    assert by_id(matches.index + 1, matches.matched, matches.ignored) == detections
    assert by_id(matches.object_ids, matches.object_index + 1, matches.object_ignored) == objects
    assert len(matches.index) == len(detections) > 50 and len(matches.object_ids) == len(objects) > 20
    # by image and class, then by score or as they are in the data set, with crowd regions last
    image, label = matches.image_ids[matches.image], matches.label
    assert (np.lexsort((matches.index, -matches.scores, label, image)) == np.arange(len(label))).all()
    image, label = matches.image_ids[matches.object_image], matches.object_label
    assert (np.lexsort((matches.object_ids, matches.object_ignored, label, image)) == np.arange(len(label))).all()


def test_mistakes_confusion_and_suspects_are_hotcocos(case: tuple) -> None:
    dataset, results, found, limit = case
    kind = "segm" if found.kind == "mask" else "bbox"
    expected = hotcoco.COCO(coco_truths(dataset, masks=kind == "segm")[kind])
    table = np.column_stack((results.image_ids, results.boxes, results.scores, results.category_ids))
    scorer = hotcoco.COCOeval(expected, expected.loadRes(table, segmentation=results.masks()), kind)
    params = scorer.params
    params.maxDets, params.areaRng, params.areaRngLbl = [1, 2, limit], [[0, 1e10]], ["all"]
    scorer.params = params
    scorer.evaluate()
    tide = scorer.tide_errors(0.5, 0.1)
    assert found.errors.counts == tide["counts"]
    assert found.errors.delta_ap == pytest.approx(tide["delta_ap"], abs=1e-12)
    assert min(found.errors.counts[kind] for kind in ("Cls", "Loc", "Bkg")) > 0
    confused = scorer.confusion_matrix(0.5, limit, found.threshold)["matrix"]
    np.testing.assert_array_equal(found.confusion, confused)
    ids = [record.image_id for record in dataset.records]
    suspects = [
        (row["image_id"], row["type"], row["dt_score"], row["dt_category"], row.get("gt_category") or "")
        for row in scorer.image_diagnostics(0.5, found.threshold)["label_errors"]
    ]
    assert sorted((ids[row.image], *row[1:-1]) for row in found.suspects) == sorted(suspects)
    assert {row.kind for row in found.suspects} <= {"wrong_label", "missing_annotation"}
    assert [row.score for row in found.suspects] == sorted((row.score for row in found.suspects), reverse=True)


def test_average_precision_looks_at_hits_only_and_is_that_of_all_detections() -> None:
    draws = np.random.default_rng(0)
    for n in (0, 1, 40, 300):
        state = draws.integers(0, 3, (n, 4))  # not counted, false, found; a detection may count at some thresholds only
        weight, objects = draws.integers(0, 4, (6, n)).astype(float), draws.integers(0, 3, 6) * float(3 * n)
        hit, wrong = state == 2, state == 1
        got = average_precision(hit, wrong, weight, objects)
        tp, fp = ((kind[None] * weight[:, :, None]).cumsum(1) for kind in (hit, wrong))  # (6, n, 4)
        best = np.maximum.accumulate((tp / (tp + fp + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
        recall = tp / np.where(objects > 0, objects, np.nan)[:, None, None]
        steps = np.diff(np.searchsorted(RECALLS, recall, side="right"), axis=1, prepend=0)
        expected = np.where(objects[:, None] > 0, (best * steps).sum(1) / len(RECALLS), np.nan)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_an_analysis_needs_no_torch() -> None:
    words = "import sys, gndet.toolbox.analysis.analyze; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
