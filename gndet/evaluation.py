"""COCO evaluation: run a detector over a data set, write its detections as COCO results, score them.

B images, n detections of one picture, (h, w) original picture, S mask side. Boxes are xyxy pixels of the
canvas in `Detections`, and in results, where the file format is met, xywh pixels of the original picture.
"""

import contextlib
import functools
import io
import json
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hotcoco
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from gndet.config import Config
from gndet.data.batching import test_batches
from gndet.data.coco import to_coco
from gndet.errors import DataError
from gndet.paste import Paste, paste_masks
from gndet.structures import Batch, Dataset, Detections

IOU_50, IOU_75 = 0, 5  # places in COCO's IoU thresholds 0.50, 0.55 ... 0.95
ALL, SMALL, MEDIUM, LARGE = range(4)  # places in COCO's area ranges: any, below 32 x 32, up to 96 x 96, above
SUMMARY_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


class Metrics(NamedTuple):
    """COCO numbers of one kind (bbox or segm) in [0, 1]; nan where the data set has no such object."""

    summary: dict[str, float]  # the keys of SUMMARY_COLUMNS, in the order of pycocotools' stats
    per_class: list[dict[str, Any]]  # name, AP, AP50, AR, num_objects, num_images (crowd regions not counted)


class Evaluation(NamedTuple):
    """The outcome of `evaluate`."""

    box: Metrics
    mask: Metrics | None  # None for a detector or a data set without masks
    results: list[dict[str, Any]]  # COCO results, images in the data set's order


def to_results(
    detections: Detections, indices: list[int], sizes: Tensor, dataset: Dataset, paste: Paste = "exact"
) -> list[dict[str, Any]]:
    """Turn a batch of detections into COCO results in the pixels of the original pictures.

    indices: places of the B images in dataset.records; sizes (B, 2) height, width of the resized pictures; paste: how
    masks are put into them.
    Returns a record for each valid detection: image_id, category_id, bbox xywh clipped to the picture, score,
    and segmentation (run-length code) where the detections have masks.
    """
    parts = Detections(*(part.float().cpu().numpy() for part in detections))  # NumPy knows no bfloat16
    results = []
    for image, index in enumerate(indices):
        record = dataset.records[index]
        valid = parts.valid[image] > 0
        height, width = record.size
        scale = np.array([width, height]) / sizes[image].cpu().numpy()[::-1]
        boxes = parts.boxes[image][valid].astype(np.float64) * np.tile(scale, 2)  # (n, 4)
        clipped = np.clip(boxes, 0, [width, height, width, height])
        clipped[:, 2:] -= clipped[:, :2]
        found = [
            {
                "image_id": record.image_id,
                "category_id": dataset.category_ids[int(label)],
                "bbox": box.tolist(),
                "score": float(score),
            }
            for label, box, score in zip(parts.labels[image][valid], clipped, parts.scores[image][valid], strict=True)
        ]
        if detections.masks.shape[-1]:
            codes = paste_masks(parts.masks[image][valid], boxes, record.size, paste)
            found = [one | {"segmentation": code} for one, code in zip(found, codes, strict=True)]
        results += found
    return results


def detect_dataset(
    model: nn.Module,
    dataset: Dataset,
    cfg: Config,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    rank: int = 0,
    world: int = 1,
    on_image: Callable[[int], None] | None = None,
    unreadable: Callable[[int, str], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Detect in this rank's share of the data set; the model is in eval mode meanwhile, then as it was.

    autocast: makes the context the model runs in.  on_image: called with each image id when it is done; what it raises
    ends the detection.  unreadable: called with the image id and the reason where a picture cannot be read, which then
    has no detections.  notify: told of loader processes that were killed and replaced.
    Returns COCO results as `to_results` does.  Without `unreadable`, raises DataError for a picture of that kind.
    """
    was_training = model.training
    batches = test_batches(
        dataset, cfg.data, images_per_gpu=cfg.evaluation.images_per_gpu, rank=rank, world=world,
        pin_memory=device.type == "cuda", notify=notify,
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    model.eval()
    try:
        with contextlib.closing(batches):
            for indices, batch, image_ids, skipped in batches:
                for image_id, reason in skipped:
                    if unreadable is None:
                        raise DataError(reason)
                    unreadable(image_id, reason)
                if batch is not None:
                    detections = _detect(model, batch, device, autocast)
                    results += to_results(detections, indices, batch.sizes, dataset, cfg.model.mask_head.paste)
                for image_id in image_ids if on_image else ():
                    on_image(image_id)
    finally:
        model.train(was_training)
    return results


def _detect(
    model: nn.Module, batch: Batch, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Detections:
    images, sizes = batch.images.to(device, non_blocking=True), batch.sizes.to(device, non_blocking=True)
    with torch.inference_mode(), autocast():
        return model.detect(images, sizes, batch.padded)


def coco_metrics(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    kind: Literal["bbox", "segm"],
    *,
    engine: Literal["hotcoco", "pycocotools"],
    max_detections: int,
) -> Metrics:
    """Score COCO results: the same numbers by both engines, pycocotools' own stats at max_detections=100.

    ground_truth: a COCO data set; it and results are left as they are.  max_detections: how many count,
    an image and class, by falling score.  For segm a detection's size is its mask's area, as in detectron2.
    """
    shape = "bbox" if kind == "bbox" else "segmentation"  # with a bbox beside, segm would take the box's area
    keys = ("image_id", "category_id", "score", shape)
    results = [{key: one[key] for key in keys} for one in results]
    # pycocotools writes into the annotations, and prints
    ground_truth = ground_truth | {"annotations": [dict(one) for one in ground_truth["annotations"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        run = _hotcoco if engine == "hotcoco" else _pycocotools
        scorer = run(ground_truth, results, kind)
        limits = [1, min(10, max_detections), max_detections]  # the engines sort them
        params = scorer.params
        params.maxDets = limits
        scorer.params = params
        scorer.evaluate()
        scorer.accumulate()
    # precision (10 IoU thresholds, 101 recalls, classes, 4 areas, 3 limits); recall: less the recalls
    return _metrics(scorer.eval["precision"], scorer.eval["recall"], ground_truth, list(scorer.params.catIds))


def _hotcoco(ground_truth: dict, results: list[dict], kind: str) -> hotcoco.COCOeval:
    truth = hotcoco.COCO(ground_truth)
    return hotcoco.COCOeval(truth, truth.loadRes(results), kind)


def _pycocotools(ground_truth: dict, results: list[dict], kind: str) -> COCOeval:
    truth, found = COCO(), COCO()
    truth.dataset = ground_truth
    truth.createIndex()
    if results:
        found = truth.loadRes(results)
    else:  # loadRes looks at the first result
        found.dataset = ground_truth | {"annotations": []}
        found.createIndex()
    return COCOeval(truth, found, kind)


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
    images_with = {id: [] for id in names}
    for annotation in ground_truth["annotations"]:
        if not annotation.get("iscrowd", 0):
            images_with[annotation["category_id"]].append(annotation["image_id"])
    per_class = [
        {
            "name": names[id],
            "AP": _mean(precision[:, :, place, ALL, -1]),
            "AP50": _mean(precision[IOU_50, :, place, ALL, -1]),
            "AR": _mean(recall[:, place, ALL, -1]),
            "num_objects": len(images_with[id]),
            "num_images": len(set(images_with[id])),
        }
        for place, id in enumerate(category_ids)
    ]
    return Metrics(summary, per_class)


def _mean(values: np.ndarray) -> float:
    """Mean over what is defined; the engines mark the rest with -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    cfg: Config,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    rank: int,
    world: int,
    gather: Callable[[list], list[list]],
    on_image: Callable[[int], None] | None = None,
    unreadable: Callable[[int, str], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Detect on all ranks, score everything on the first; every rank gets the same answer.

    gather: list of this rank in, the lists of all ranks out, on every rank.  on_image, unreadable, notify: of this
    rank's share, as in `detect_dataset`.
    Raises, on every rank: DataError where one of them does, RuntimeError where scoring fails, AssertionError where an
    image was not seen, or seen twice.
    """
    seen: list[int] = []

    def note(image_id: int) -> None:
        seen.append(image_id)
        if on_image:
            on_image(image_id)

    share: list[dict[str, Any]] = []
    refusal = ""
    try:
        share = detect_dataset(
            model, dataset, cfg, device=device, autocast=autocast, rank=rank, world=world, on_image=note,
            unreadable=unreadable, notify=notify,
        )  # fmt: skip
    except DataError as error:  # the other ranks would wait for this one
        refusal = str(error)
    parts = [part for (part,) in gather([(refusal, seen, share)])]
    if refusals := [text for text, _, _ in parts if text]:
        raise DataError("\n".join(refusals))
    order = {record.image_id: place for place, record in enumerate(dataset.records)}
    all_seen = [image_id for _, ids, _ in parts for image_id in ids]
    assert sorted(all_seen) == sorted(order), f"{len(all_seen)} images seen, not each of {len(order)} once"
    results = [one for _, _, found in parts for one in found]
    results.sort(key=lambda one: order[one["image_id"]])  # stable: an image's detections stay in their order
    outcome = gather([_score(dataset, results, cfg)] if rank == 0 else [])[0][0]
    if isinstance(outcome, str):
        raise RuntimeError(f"the first process could not score the detections:\n{outcome}")
    return Evaluation(*outcome, results)


def _score(dataset: Dataset, results: list[dict[str, Any]], cfg: Config) -> tuple[Metrics, Metrics | None] | str:
    """Score boxes and masks; or say what went wrong: the other ranks, who wait for the numbers, must hear of it."""
    try:
        truth = to_coco(dataset)
        score = functools.partial(
            coco_metrics, engine=cfg.evaluation.engine, max_detections=cfg.evaluation.max_detections
        )
        box, mask = score(truth, results, "bbox"), None
        if cfg.model.masks and any("segmentation" in annotation for annotation in truth["annotations"]):
            annotations = [_with_masks(annotation) for annotation in truth["annotations"]]
            mask = score(truth | {"annotations": annotations}, results, "segm")
    except Exception:  # whatever it is, every rank raises it
        return traceback.format_exc()
    return box, mask


def _with_masks(annotation: dict[str, Any]) -> dict[str, Any]:
    """Make an object without a mask a crowd region over its box: what is found there does not count."""
    if "segmentation" in annotation:
        return annotation
    x, y, width, height = annotation["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return annotation | {"iscrowd": 1, "segmentation": [corners]}


def scalars(evaluation: Evaluation) -> dict[str, float]:
    """Flatten the summaries for logs: {"box/AP": 0.41, ..., "mask/AP": 0.37, ...}."""
    parts = {"box": evaluation.box, "mask": evaluation.mask}
    return {f"{name}/{key}": value for name, part in parts.items() if part for key, value in part.summary.items()}


def table(evaluation: Evaluation) -> str:
    """Write the report in aligned columns: summaries, then classes, in percent; "-" is undefined."""
    parts = {"box": evaluation.box} | ({"mask": evaluation.mask} if evaluation.mask else {})
    summary = [["", *SUMMARY_COLUMNS]]
    summary += [[name, *(_percent(part.summary[key]) for key in SUMMARY_COLUMNS)] for name, part in parts.items()]
    columns = ("AP", "AP50", "AR")
    classes = [["class", "images", "objects", *(f"{name} {key}" for name in parts for key in columns)]]
    for rows in zip(*(part.per_class for part in parts.values()), strict=True):
        first = rows[0]
        numbers = [_percent(row[key]) for row in rows for key in columns]
        classes.append([first["name"], str(first["num_images"]), str(first["num_objects"]), *numbers])
    return f"{aligned(summary)}\n\n{aligned(classes)}"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def aligned(rows: list[list[str]]) -> str:
    """Pad the columns to their widest cell: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def save_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write COCO results as JSON, to a file beside first: a killed run leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results), encoding="utf-8")
    os.replace(partial, path)
