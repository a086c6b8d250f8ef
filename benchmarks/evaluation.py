"""`python -m benchmarks eval`: time COCO's metrics of boxes and masks, starting from detections in memory.

gndet keeps detections in columns.  pycocotools (used by torchvision's reference scripts) and hotcoco (used by gndet)
take lists of dicts, once with boxes and once with masks; in the latter case mask areas decide what is small or large.
"""

import argparse
import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import hotcoco
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.report import machine, table
from benchmarks.scene import CATEGORIES, CLASSES, OBJECTS, Scene, make_scenes
from benchmarks.turns import Subject, Work, take_turns
from gndet.evaluation.coco_metrics import coco_metrics
from gndet.evaluation.results import from_coco

SIZE = (480, 640)  # height, width of the pictures
SCENES = 32  # synthetic scenes; pictures repeat them with other scores
NEAR, RIGHT = 0.5, 0.85  # share of detections near an object; share of these that have its class
FACTS = ("box AP", "mask AP")

Truth, Found = dict[str, Any], list[dict[str, Any]]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time all three on the same synthetic detections, and show their AP."""
    num, each = options.num, options.detections
    say(f"COCO metrics of boxes and masks: {num} pictures, {num * each} detections")
    subjects = [
        Subject("gndet", gndet_subject, (num, each)),
        Subject("hotcoco", listed_subject, ("hotcoco", num, each)),
        Subject("pycocotools", listed_subject, ("pycocotools", num, each)),
    ]
    turns = take_turns(subjects, options.rounds, threads=options.threads, warmup=0, say=say)
    say(f"\n{machine(options.threads)}\n{table(turns, against='pycocotools', facts=FACTS)}")


def gndet_subject(num: int, each: int) -> Work:
    """Return the work of gndet's metrics on results in columns."""
    truth, found = detected(num, each)
    results = from_coco(found)
    del found  # a run holds only the columns
    return functools.partial(_gndet_scores, truth, results)


def _gndet_scores(truth: Truth, results: Any) -> dict[str, float]:
    metrics = coco_metrics({"bbox": truth, "segm": truth}, results, engine="hotcoco", max_detections=100)
    return dict(zip(FACTS, (metrics[kind].summary["AP"] for kind in ("bbox", "segm")), strict=True))


def listed_subject(engine: str, num: int, each: int) -> Work:
    """Return the work of an evaluator that takes lists of dicts."""
    return functools.partial(_listed_scores, engine, *detected(num, each))


def _listed_scores(engine: str, truth: Truth, found: Found) -> dict[str, float]:
    scores = []
    with contextlib.redirect_stdout(io.StringIO()):
        expected = hotcoco.COCO(truth) if engine == "hotcoco" else _pycocotools_truth(truth)
        evaluator = hotcoco.COCOeval if engine == "hotcoco" else COCOeval
        for kind, left_out in (("bbox", "segmentation"), ("segm", "bbox")):
            listed = [{key: value for key, value in row.items() if key != left_out} for row in found]
            scorer = evaluator(expected, expected.loadRes(listed), kind)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            scores.append(float(scorer.stats[0]))
    return dict(zip(FACTS, scores, strict=True))


def _pycocotools_truth(truth: Truth) -> COCO:
    """Return the ground truth for pycocotools, with copied annotations because pycocotools writes into them."""
    coco = COCO()
    coco.dataset = truth | {"annotations": [dict(annotation) for annotation in truth["annotations"]]}
    coco.createIndex()
    return coco


def detected(num: int, each: int) -> tuple[Truth, Found]:
    """Return a COCO data set of num pictures, and COCO results: `each` detections per picture by descending score."""
    rng = np.random.default_rng(0)
    scenes = make_scenes(SIZE, SCENES, 0)
    drawn = [_detections(scene, each, rng) for scene in scenes]
    images, annotations, found = [], [], []
    for number in range(1, num + 1):
        scene, detections = scenes[number % SCENES], drawn[number % SCENES]
        images.append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        annotations += scene.annotations(number, len(annotations) + 1)
        scores = np.sort(rng.uniform(0, 1, each))[::-1].tolist()
        found += [{"image_id": number, **row, "score": score} for row, score in zip(detections, scores, strict=True)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, found


def _detections(scene: Scene, each: int, rng: np.random.Generator) -> Found:
    """Return detections of a scene, those near objects first: outlines of objects, moved and scaled."""
    limits, found = np.array(SIZE[::-1]), []
    for number in range(each):
        near, which = number < NEAR * each, int(rng.integers(OBJECTS))
        outline = np.reshape(scene.polygons[which][0], (-1, 2))  # (points, 2)
        middle = outline.mean(0)
        side = outline.max(0) - outline.min(0)
        target = middle + 0.06 * side * rng.normal(size=2) if near else rng.uniform(0, limits)
        moved = ((outline - middle) * np.exp(0.08 * rng.normal(size=2)) + target).clip(0, limits)
        low, high = moved.min(0), moved.max(0)
        label = int(scene.labels[which]) if near and rng.uniform() < RIGHT else int(rng.integers(CLASSES))
        code = coco_mask.frPyObjects([moved.ravel().tolist()], *SIZE)[0]
        found.append({
            "category_id": label + 1,
            "bbox": [*low.tolist(), *(high - low).tolist()],
            "segmentation": {"size": list(SIZE), "counts": code["counts"].decode("ascii")},
        })  # fmt: skip
    return found
