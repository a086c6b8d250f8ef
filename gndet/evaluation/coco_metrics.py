"""COCO's metrics of detections that are there: the same numbers by hotcoco and by pycocotools.

This module imports no torch.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import hotcoco
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gndet.data.datasets.coco import gc_paused, to_coco
from gndet.data.records import Dataset
from gndet.evaluation.results import Results

Kind = Literal["bbox", "segm"]
EXACT = 2**53  # float64 holds the integers up to here
IOU_50, IOU_75 = 0, 5  # places in COCO's IoU thresholds 0.50, 0.55 ... 0.95
ALL, SMALL, MEDIUM, LARGE = range(4)  # places in COCO's area ranges: any, below 32 x 32, up to 96 x 96, above
RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO takes the precision
SUMMARY_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


class Metrics(NamedTuple):
    """COCO numbers of one kind (bbox or segm) in [0, 1]; nan where the data set has no such object."""

    summary: dict[str, float]  # the keys of SUMMARY_COLUMNS, in the order of pycocotools' stats
    per_class: list[dict[str, Any]]  # name, AP, AP50, AR, num_objects, num_images (crowd regions not counted)
    curves: dict[str, list[float]]  # by class name: precision at IoU 0.5 and recalls 0, 0.01 ... 1; only where defined


def coco_truths(dataset: Dataset, *, masks: bool) -> dict[Kind, dict[str, Any]]:
    """The data set as COCO's evaluation takes it, for boxes and, where it has any and they are asked for, masks.

    Objects without a mask, beside others that have one, are crowd regions over their boxes there: what is found there
    does not count.
    """
    with gc_paused():
        truth = to_coco(dataset)
    if not masks or not any("segmentation" in one for one in truth["annotations"]):
        return {"bbox": truth}
    return {"bbox": truth, "segm": _with_masks(truth)}


def _with_masks(truth: dict[str, Any]) -> dict[str, Any]:
    """Make objects without a mask crowd regions over their boxes."""
    if all("segmentation" in annotation for annotation in truth["annotations"]):
        return truth
    annotations = []
    for annotation in truth["annotations"]:
        if "segmentation" not in annotation:
            x, y, width, height = annotation["bbox"]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotation = annotation | {"iscrowd": 1, "segmentation": [corners]}
        annotations.append(annotation)
    return truth | {"annotations": annotations}


def evaluated(truth: dict[str, Any], results: Results, kind: Kind, max_detections: int) -> hotcoco.COCOeval:
    """hotcoco's evaluator after its matching, for objects of any size: detection i of the results has the id i + 1."""
    with gc_paused():
        ((_, scorer),) = _hotcoco({kind: truth}, results)
        params = scorer.params
        params.areaRng, params.areaRngLbl = [[0, 1e10]], ["all"]
        params.maxDets = [1, min(10, max_detections), max_detections]
        scorer.params = params
        scorer.evaluate()
        scorer.accumulate()
    return scorer


def coco_metrics(
    truths: Mapping[Kind, dict[str, Any]],
    results: Results,
    *,
    engine: Literal["hotcoco", "pycocotools"],
    max_detections: int,
) -> dict[Kind, Metrics]:
    """Score COCO results: the same numbers by both engines, pycocotools' own stats at max_detections=100.

    truths: a COCO data set for each kind to score, which may be the same for both; they are left as they are.
    max_detections: how many count, an image and class, by falling score.  For segm a detection's size is its mask's
    area, as in detectron2, not its box's.
    """
    metrics = {}
    with gc_paused(), contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for kind, scorer in (_hotcoco if engine == "hotcoco" else _pycocotools)(truths, results):
            params = scorer.params
            params.maxDets = [1, min(10, max_detections), max_detections]  # the engines sort them
            scorer.params = params
            scorer.evaluate()
            scorer.accumulate()
            # precision (10 IoU thresholds, 101 recalls, classes, 4 areas, 3 limits); recall: less the recalls
            precision, recall = (scorer.eval[key] for key in ("precision", "recall"))
            metrics[kind] = _metrics(precision, recall, truths[kind], list(scorer.params.catIds))
            del scorer  # hotcoco copies results that are in use when their areas are changed
    return metrics


def _hotcoco(truths: Mapping[Kind, dict[str, Any]], results: Results) -> Iterator[tuple[Kind, hotcoco.COCOeval]]:
    """A scorer a kind; ground truth and results are converted once for all of them."""
    found, converted, masks = None, {}, results.masks()
    for kind, truth in truths.items():
        if id(truth) not in converted:
            converted[id(truth)] = hotcoco.COCO(truth)
        found = found or _found(converted[id(truth)], results, masks)
        if kind == "segm" and len(results):  # it has taken those of the boxes
            found.update_anns(ids=np.arange(1, len(results) + 1), area=results.areas)
        yield kind, hotcoco.COCOeval(converted[id(truth)], found, kind)


def _found(truth: hotcoco.COCO, results: Results, masks: list[dict[str, Any]] | None) -> hotcoco.COCO:
    """The results as hotcoco has them, numbered from 1."""
    ids = np.stack((results.image_ids, results.category_ids), axis=1)  # (n, 2)
    if (np.abs(ids) > EXACT).any():
        return truth.loadRes(list(results))  # the table below is of floats
    table = np.column_stack((ids[:, 0], results.boxes, results.scores, ids[:, 1]))  # (n, 7)
    return truth.loadRes(table, segmentation=masks)


def _pycocotools(truths: Mapping[Kind, dict[str, Any]], results: Results) -> Iterator[tuple[Kind, COCOeval]]:
    """A scorer a kind."""
    for kind, truth in truths.items():
        # it writes into the annotations
        truth = truth | {"annotations": [dict(one) for one in truth["annotations"]]}
        shape = "bbox" if kind == "bbox" else "segmentation"  # with a bbox beside, segm would take the box's area
        keys = ("image_id", "category_id", "score", shape)
        expected, found = COCO(), COCO()
        expected.dataset = truth
        expected.createIndex()
        if len(results):
            found = expected.loadRes([{key: one[key] for key in keys} for one in results])
        else:  # loadRes looks at the first result
            found.dataset = truth | {"annotations": []}
            found.createIndex()
        yield kind, COCOeval(expected, found, kind)


def _metrics(precision: np.ndarray, recall: np.ndarray, ground_truth: dict, category_ids: list[int]) -> Metrics:
    """Read the numbers off the arrays as pycocotools' summarize() does, which knows a limit of 100 alone."""
    summary = {
        "AP": _mean(precision[:, :, :, ALL, -1]),
        "AP50": _mean(precision[IOU_50, :, :, ALL, -1]),
        "AP75": _mean(precision[IOU_75, :, :, ALL, -1]),
        "APs": _mean(precision[:, :, :, SMALL, -1]),
        "APm": _mean(precision[:, :, :, MEDIUM, -1]),
        "APl": _mean(precision[:, :, :, LARGE, -1]),
        "AR1": _mean(recall[:, :, ALL, 0]),
        "AR10": _mean(recall[:, :, ALL, 1]),
        "AR": _mean(recall[:, :, ALL, -1]),
        "ARs": _mean(recall[:, :, SMALL, -1]),
        "ARm": _mean(recall[:, :, MEDIUM, -1]),
        "ARl": _mean(recall[:, :, LARGE, -1]),
    }
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    objects = [one for one in ground_truth["annotations"] if not one.get("iscrowd", 0)]
    num_objects = Counter(one["category_id"] for one in objects)
    num_images = Counter(category for category, _ in {(one["category_id"], one["image_id"]) for one in objects})
    per_class = [
        {
            "name": names[id],
            "AP": _mean(precision[:, :, place, ALL, -1]),
            "AP50": _mean(precision[IOU_50, :, place, ALL, -1]),
            "AR": _mean(recall[:, place, ALL, -1]),
            "num_objects": num_objects[id],
            "num_images": num_images[id],
        }
        for place, id in enumerate(category_ids)
    ]
    curves = {
        names[id]: precision[IOU_50, :, place, ALL, -1].tolist()
        for place, id in enumerate(category_ids) if (precision[IOU_50, :, place, ALL, -1] > -1).all()
    }  # fmt: skip
    return Metrics(summary, per_class, curves)


def _mean(values: np.ndarray) -> float:
    """Mean over what is defined; the engines mark the rest with -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")
