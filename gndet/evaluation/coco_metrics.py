"""COCO metrics of detections, computed by hotcoco or pycocotools with the same result.

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
from gndet.data.datasets.segmentation import MERGED_AT_ONCE, to_rle
from gndet.data.records import Dataset
from gndet.errors import MachineError, in_one_line
from gndet.evaluation.results import Results

Kind = Literal["bbox", "segm"]
EXACT = 2**53  # float64 holds the integers up to here
IOU_50, IOU_75 = 0, 5  # indices into COCO's IoU thresholds 0.50, 0.55 ... 0.95
ALL, SMALL, MEDIUM, LARGE = range(4)  # indices into COCO's area ranges: any, below 32 x 32, up to 96 x 96, above
RECALLS = np.linspace(0.0, 1.0, 101)  # recalls at which COCO samples the precision
SUMMARY_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


class Metrics(NamedTuple):
    """COCO numbers of one kind (bbox or segm) in [0, 1]; nan if the data set has no such object."""

    summary: dict[str, float]  # the keys of SUMMARY_COLUMNS, in the order of pycocotools' stats
    per_class: list[dict[str, Any]]  # name, AP, AP50, AR, num_objects, num_images (crowd regions not counted)
    curves: dict[str, list[float]]  # by class name: precision at IoU 0.5 and recalls 0, 0.01 ... 1, if defined


def coco_truths(dataset: Dataset, *, masks: bool) -> dict[Kind, dict[str, Any]]:
    """Return the data set as input for COCO's evaluation of boxes and, if masks is true and there are any, of masks.

    For masks, objects without a mask become crowd regions over their boxes: detections there do not count.
    """
    truth = to_coco(dataset)
    if masks:
        _merge_many_polygons(truth)
    for image in truth["images"]:
        del image["file_name"]  # hotcoco takes only valid Unicode, and the name of a file may be any bytes
    without = ["segmentation" not in annotation for annotation in truth["annotations"]]
    if not masks or all(without):
        return {"bbox": truth}
    if not any(without):
        return {"bbox": truth, "segm": truth}  # the same object, so that it is converted only once
    annotations = []
    for annotation in truth["annotations"]:
        if "segmentation" not in annotation:
            x, y, width, height = annotation["bbox"]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotation = annotation | {"iscrowd": 1, "segmentation": [corners]}
        annotations.append(annotation)
    return {"bbox": truth, "segm": truth | {"annotations": annotations}}


def _merge_many_polygons(truth: dict[str, Any]) -> None:
    """Replace the polygons of objects that have thousands by an RLE: the engines would merge them one by one."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for annotation in truth["annotations"]:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list) and len(polygons) > MERGED_AT_ONCE:
            code = to_rle(polygons, sizes[annotation["image_id"]])
            annotation["segmentation"] = code | {"counts": code["counts"].decode("ascii")}


def evaluated(truth: dict[str, Any], results: Results, kind: Kind, max_detections: int) -> hotcoco.COCOeval:
    """Return hotcoco's evaluator after matching objects of any size; detection i of the results has the id i + 1."""
    ((_, scorer),) = _hotcoco({kind: truth}, results)
    params = scorer.params
    params.areaRng, params.areaRngLbl = [[0, 1e10]], ["all"]
    scorer.params = params
    _accumulate(scorer, max_detections)
    return scorer


def _accumulate(scorer: hotcoco.COCOeval | COCOeval, max_detections: int) -> None:
    params = scorer.params
    params.maxDets = [1, min(10, max_detections), max_detections]  # the engines sort them
    scorer.params = params
    try:
        scorer.evaluate()
        scorer.accumulate()
    except BaseException as error:  # a panic of hotcoco, as when it cannot start its threads, is no Exception
        if type(error).__name__ != "PanicException":
            raise
        ways = "raise the limit of processes (ulimit -u), or set evaluation.engine=pycocotools or RAYON_NUM_THREADS=1"
        raise MachineError(f"hotcoco cannot score: {in_one_line(error)}: {ways}") from None


def coco_metrics(
    truths: Mapping[Kind, dict[str, Any]],
    results: Results,
    *,
    engine: Literal["hotcoco", "pycocotools"],
    max_detections: int,
) -> dict[Kind, Metrics]:
    """Score COCO results; at max_detections=100 both engines give pycocotools' own stats.

    truths: a COCO data set for each kind to score, which may be the same for both; they are not changed.
    max_detections: number of detections that count per image and class, by descending score.  For segm a detection's
    size is the area of its mask, as in detectron2, not of its box.
    """
    metrics = {}
    with gc_paused(), contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for kind, scorer in (_hotcoco if engine == "hotcoco" else _pycocotools)(truths, results):
            _accumulate(scorer, max_detections)
            # precision (10 IoU thresholds, 101 recalls, classes, 4 areas, 3 limits); recall: the same without recalls
            scored: Any = scorer.eval
            precision, recall = (scored[key] for key in ("precision", "recall"))
            metrics[kind] = _metrics(precision, recall, truths[kind], list(scorer.params.catIds))
            del scorer  # otherwise hotcoco copies the results when their areas change
    return metrics


def _hotcoco(truths: Mapping[Kind, dict[str, Any]], results: Results) -> Iterator[tuple[Kind, hotcoco.COCOeval]]:
    """Yield a scorer per kind; ground truth and results are converted once for all of them."""
    found, converted, masks = None, {}, results.masks()
    for kind, truth in truths.items():
        if id(truth) not in converted:
            converted[id(truth)] = hotcoco.COCO(truth)
        found = found or _found(converted[id(truth)], results, masks)
        if kind == "segm" and len(results):  # hotcoco used the areas of the boxes
            found.update_anns(ids=np.arange(1, len(results) + 1), area=results.areas)
        yield kind, hotcoco.COCOeval(converted[id(truth)], found, kind)


def _found(truth: hotcoco.COCO, results: Results, masks: Any) -> hotcoco.COCO:
    """Return the results in hotcoco's form, numbered from 1."""
    ids = np.stack((results.image_ids, results.category_ids), axis=1)  # (n, 2)
    if (np.abs(ids) > EXACT).any():
        return truth.loadRes(list(results))  # the table below holds floats
    table = np.column_stack((ids[:, 0], results.boxes, results.scores, ids[:, 1]))  # (n, 7)
    return truth.loadRes(table, segmentation=masks)


def _pycocotools(truths: Mapping[Kind, dict[str, Any]], results: Results) -> Iterator[tuple[Kind, COCOeval]]:
    for kind, truth in truths.items():
        # pycocotools writes into the annotations
        truth = truth | {"annotations": [dict(annotation) for annotation in truth["annotations"]]}
        shape = "bbox" if kind == "bbox" else "segmentation"  # if a bbox is present, segm takes the box's area
        keys = ("image_id", "category_id", "score", shape)
        expected, found = COCO(), COCO()
        expected.dataset = truth
        expected.createIndex()
        if len(results):
            found = expected.loadRes([{key: result[key] for key in keys} for result in results])
        else:  # loadRes needs a first result
            found.dataset = truth | {"annotations": []}
            found.createIndex()
        yield kind, COCOeval(expected, found, kind)


def _metrics(precision: np.ndarray, recall: np.ndarray, ground_truth: dict, category_ids: list[int]) -> Metrics:
    """Read the numbers from the arrays like pycocotools' summarize(), but for any limit instead of only 100."""
    summary = {
        "AP": precision[:, :, :, ALL, -1],
        "AP50": precision[IOU_50, :, :, ALL, -1],
        "AP75": precision[IOU_75, :, :, ALL, -1],
        "APs": precision[:, :, :, SMALL, -1],
        "APm": precision[:, :, :, MEDIUM, -1],
        "APl": precision[:, :, :, LARGE, -1],
        "AR1": recall[:, :, ALL, 0],
        "AR10": recall[:, :, ALL, 1],
        "AR": recall[:, :, ALL, -1],
        "ARs": recall[:, :, SMALL, -1],
        "ARm": recall[:, :, MEDIUM, -1],
        "ARl": recall[:, :, LARGE, -1],
    }
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    objects = [(a["category_id"], a["image_id"]) for a in ground_truth["annotations"] if not a.get("iscrowd", 0)]
    num_objects = Counter(category for category, _ in objects)
    num_images = Counter(category for category, _ in set(objects))
    per_class, curves = [], {}
    for index, id in enumerate(category_ids):
        curve = precision[IOU_50, :, index, ALL, -1]  # (101,)
        per_class.append({
            "name": names[id], "AP": _mean(precision[:, :, index, ALL, -1]), "AP50": _mean(curve),
            "AR": _mean(recall[:, index, ALL, -1]), "num_objects": num_objects[id], "num_images": num_images[id],
        })  # fmt: skip
        if (curve > -1).all():
            curves[names[id]] = curve.tolist()
    return Metrics({name: _mean(values) for name, values in summary.items()}, per_class, curves)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the defined values; the engines mark undefined ones with -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")
