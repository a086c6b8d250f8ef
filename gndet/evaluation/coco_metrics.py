"""COCO metrics of detections, computed by hotcoco or pycocotools with the same result.

This module imports no torch.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from operator import itemgetter
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
AT_ONCE = 24 << 20  # bytes of detections to match at once; matching takes up to six times that
RECORD = 200  # bytes of a detection beside its mask's code
IOU_50, IOU_75 = 0, 5  # indices into COCO's IoU thresholds 0.50, 0.55 ... 0.95
ALL, SMALL, MEDIUM, LARGE = range(4)  # indices into COCO's area ranges: any, below 32 x 32, up to 96 x 96, above
RECALLS = np.linspace(0.0, 1.0, 101)  # recalls at which COCO samples the precision
SUMMARY_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


class Metrics(NamedTuple):
    """COCO numbers of one kind (bbox or segm) in [0, 1]; nan if the data set has no such object."""

    summary: dict[str, float]  # the keys of SUMMARY_COLUMNS, in the order of pycocotools' stats
    per_class: list[dict[str, Any]]  # name, AP, AP50, AR, num_objects, num_images (crowd regions not counted)
    curves: dict[str, list[float]]  # by class name: precision at IoU 0.5 and recalls 0, 0.01 ... 1, if defined
    precision: np.ndarray  # (10, 101, K) by IoU threshold, recall and class, for objects of any size; -1 if undefined


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


def _table(image_ids: np.ndarray, category_ids: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return n detections in the form of hotcoco, (n, 7) float64: image, box xywh, score, category."""
    return np.column_stack((image_ids, boxes, scores, category_ids))


def _limited(params: Any, max_detections: int) -> Any:
    params.maxDets = [1, min(10, max_detections), max_detections]  # the engines sort them
    return params


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise MachineError for a panic of hotcoco, as when it cannot start its threads; it is no Exception."""
    try:
        yield
    except BaseException as error:
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
    accumulated = _hotcoco if engine == "hotcoco" else _pycocotools

    def metrics(kind: Kind) -> Metrics:
        scored: Any = accumulated(truths[kind], results, kind, max_detections).eval
        # precision (10 IoU thresholds, 101 recalls, classes, 4 areas, 3 limits); recall: the same without recalls
        return _metrics(scored["precision"], scored["recall"], truths[kind])

    # hotcoco matches without the interpreter's lock, so that one kind is matched while the other is converted
    threads = ThreadPoolExecutor(len(truths) if engine == "hotcoco" else 1)
    with gc_paused(), contextlib.redirect_stdout(io.StringIO()), threads:  # pycocotools prints
        return dict(zip(truths, threads.map(metrics, truths), strict=True))


def _hotcoco(truth: dict[str, Any], results: Results, kind: Kind, max_detections: int) -> hotcoco.COCOeval:
    """Match AT_ONCE bytes of images, objects and detections at a time, and keep only who matches whom.

    Images and categories are numbered in the order of their ids: hotcoco's table holds floats, not integers of 64 bits.
    """
    images, categories = (sorted(truth[key], key=itemgetter("id")) for key in ("images", "categories"))
    image_numbers, class_numbers = (
        {row["id"]: number for number, row in enumerate(rows)} for rows in (images, categories)
    )
    image, label = _numbers(results.image_ids, image_numbers), _numbers(results.category_ids, class_numbers)
    rows = np.flatnonzero((image >= 0) & (label >= 0))
    rows = rows[image[rows].argsort(kind="stable")]  # within an image, detections of one score stay in order
    if not np.array_equal(rows, np.arange(len(results))):
        results, image, label = results.take(rows), image[rows], label[rows]
    objects: list[list[dict[str, Any]]] = [[] for _ in images]
    for annotation in truth["annotations"]:
        number = image_numbers[annotation["image_id"]]
        objects[number].append({
            "image_id": number, "category_id": class_numbers[annotation["category_id"]],
            "bbox": annotation.get("bbox"), "area": annotation.get("area"), "iscrowd": annotation.get("iscrowd", 0),
            "segmentation": annotation.get("segmentation") if kind == "segm" else None,
        })  # fmt: skip
    params = _limited(hotcoco.Params(kind), max_detections)
    numbered = [{"id": number, "name": str(number)} for number in class_numbers.values()]
    stream = hotcoco.StreamingEval(numbered, kind, params=params)
    with _told():
        for first, last, part in _parts(image, len(images), results):
            found, shown = results[part], enumerate(images[first:last], first)
            boxes, masks = found.boxes, None
            if kind == "segm":  # the size of a row is its box's; who matches whom is decided by the masks alone
                boxes, masks = found.areas[:, None] * (0, 0, 1, 0) + (0, 0, 0, 1), found.masks()
            table = _table(image[part], label[part], boxes, found.scores)
            sizes = [{"id": number, "height": row["height"], "width": row["width"]} for number, row in shown]
            stream.update(sizes, list(chain.from_iterable(objects[first:last])), table, segmentation=masks)
        scorer = stream.finalize()
        scorer.accumulate()
    return scorer


def _numbers(ids: np.ndarray, numbers: dict[int, int]) -> np.ndarray:
    """Return the number of each id (n,), or -1 if it has none.  numbers: {id: number}, ascending from 0 on."""
    known = np.array([*numbers, 0], dtype=np.int64)
    place = np.searchsorted(known[:-1], ids)
    return np.where((known[place] == ids) & (place < len(numbers)), place, -1)


def _parts(images: np.ndarray, count: int, results: Results) -> Iterator[tuple[int, int, slice]]:
    """Cut images 0 to count - 1 into parts of AT_ONCE bytes, or of one image.

    images (n,): the image of each detection, ascending.
    Yields the first image, the image after the last, and the part's detections.
    """
    starts = np.searchsorted(images, np.arange(count + 1))
    size = RECORD + np.array(list(map(len, results.codes or ())) or [0] * len(results), dtype=np.int64)  # (n,)
    before = np.append(0, size.cumsum())[starts] + RECORD * np.arange(count + 1)
    firsts = np.flatnonzero(np.diff(before[:-1] // AT_ONCE, prepend=-1)).tolist()
    for first, last in pairwise([*firsts, count]):
        yield first, last, slice(starts[first], starts[last])


def _pycocotools(truth: dict[str, Any], results: Results, kind: Kind, max_detections: int) -> COCOeval:
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
    scorer = COCOeval(expected, found, kind)
    _limited(scorer.params, max_detections)
    scorer.evaluate()
    scorer.accumulate()
    return scorer


def _metrics(precision: np.ndarray, recall: np.ndarray, ground_truth: dict[str, Any]) -> Metrics:
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
    for index, id in enumerate(sorted(names)):  # the engines' order
        curve = precision[IOU_50, :, index, ALL, -1]  # (101,)
        per_class.append({
            "name": names[id], "AP": _mean(precision[:, :, index, ALL, -1]), "AP50": _mean(curve),
            "AR": _mean(recall[:, index, ALL, -1]), "num_objects": num_objects[id], "num_images": num_images[id],
        })  # fmt: skip
        if (curve > -1).all():
            curves[names[id]] = curve.tolist()
    means = {name: _mean(values) for name, values in summary.items()}
    return Metrics(means, per_class, curves, summary["AP"].copy())  # a view would keep the whole array


def _mean(values: np.ndarray) -> float:
    """Return the mean of the defined values; the engines mark undefined ones with -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")
