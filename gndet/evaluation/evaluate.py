"""COCO evaluation: run a detector over a data set, write its detections as COCO results, score them.

B images, n detections of one picture, (h, w) original picture, S mask side.  Boxes in `Detections` are xyxy pixels of
the canvas; boxes in results are xywh pixels of the original picture, as in the file format.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gndet.config.schema import Config
from gndet.data.batches.stream import test_batches
from gndet.data.records import Dataset
from gndet.distributed.collectives import all_gather, gather_to_first
from gndet.distributed.process import Process
from gndet.errors import DataError, GndetError, out_of_memory
from gndet.evaluation.batch_norm import statistics_of_evaluation
from gndet.evaluation.behind import Behind
from gndet.evaluation.coco_metrics import SUMMARY_COLUMNS, Metrics, coco_metrics, coco_truths
from gndet.evaluation.results import Paste, Results, from_coco, join, mask_areas, paste_masks
from gndet.modeling.detection_model import DetectionModel
from gndet.structures import Batch, Detections
from gndet.text import text_table

CLASS_COLUMNS = ("AP", "AP50", "AR")


class Share(NamedTuple):
    """The detections of one rank."""

    results: Results
    image_ids: list[int]  # of all images of its share, also of those without detections


class Evaluation(NamedTuple):
    """The outcome of `evaluate`."""

    box: Metrics
    mask: Metrics | None  # None for a detector or a data set without masks
    results: Results  # images in the data set's order; only on rank 0, empty on other ranks


def to_results(
    detections: Detections, indices: list[int], sizes: Tensor, dataset: Dataset, paste: Paste = "exact",
    threshold: float = 0.0,
) -> Results:  # fmt: skip
    """Turn a batch of detections into COCO results in the pixels of the original pictures.

    indices: of the B images in dataset.records; sizes (B, 2) height, width of the resized pictures; paste: how to paste
    masks into the original pictures; threshold: lowest score to keep.
    Returns the valid detections with boxes clipped to the picture, and run-length codes if there are masks.
    """
    # NumPy has no bfloat16
    all_boxes, scores, labels, all_masks, valids = (part.float().cpu().numpy() for part in detections)
    category_ids, found = np.array(dataset.category_ids, dtype=np.int64), []
    for image, index in enumerate(indices):
        record = dataset.records[index]
        valid = (valids[image] > 0) & (scores[image].astype(np.float64) >= threshold)
        height, width = record.size
        scale = np.array([width, height]) / sizes[image].cpu().numpy()[::-1]
        boxes = all_boxes[image][valid].astype(np.float64) * np.tile(scale, 2)  # (n, 4)
        clipped = np.clip(boxes, 0, [width, height, width, height])
        clipped[:, 2:] -= clipped[:, :2]
        with_masks = detections.masks.shape[-1] > 0
        masks = paste_masks(all_masks[image][valid], boxes, record.size, paste) if with_masks else []
        found.append(Results(
            image_ids=np.full(len(boxes), record.image_id),
            category_ids=category_ids[labels[image][valid].astype(np.int64)],
            boxes=clipped,
            scores=scores[image][valid].astype(np.float64),
            sizes=np.tile(record.size, (len(boxes), 1)),
            areas=mask_areas(masks) if with_masks else np.zeros(len(boxes)),
            codes=[mask["counts"] for mask in masks] if with_masks else None,
        ))  # fmt: skip
    return join(found)


def detect(
    model: DetectionModel, batch: Batch, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Detections:
    """Detect objects in a batch with a model that is on `device`; boxes in canvas pixels.

    autocast: makes the context in which the model runs.  Draws no random numbers, and leaves the model as it was; a
    model in evaluation mode may be used by several threads.
    """
    images, sizes = (part.to(device, non_blocking=True) for part in (batch.images, batch.sizes))
    with evaluating(model), torch.inference_mode(), autocast():
        return model.detect(images, sizes, batch.padded)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode; then each module has its own mode again."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True


def compute_share(
    compute: Callable[[list[int], Batch], None],
    dataset: Dataset,
    cfg: Config,
    proc: Process,
    *,
    on_image: Callable[[int], None] = lambda image_id: None,
    unreadable: Callable[[int, str], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> None:
    """Call compute(indices in dataset.records, batch) with each test batch of this rank's share of a data set.

    on_image: called with the id of each image after its batch; an error that it raises ends the work.  unreadable:
    called with the image id and the reason if a picture cannot be read; its batch lacks it.  notify: called with a
    message if a loader process was killed and replaced.
    Without `unreadable`, raises DataError for a picture that cannot be read.
    """
    batches = test_batches(
        dataset, cfg.data, images_per_gpu=cfg.evaluation.images_per_gpu, rank=proc.rank, world=proc.world,
        pin_memory=proc.device.type == "cuda", notify=notify,
    )  # fmt: skip
    with contextlib.closing(batches):
        for indices, batch, image_ids, skipped in batches:
            for image_id, reason in skipped:
                if unreadable is None:
                    raise DataError(reason)
                unreadable(image_id, reason)
            if batch is not None:
                compute(indices, batch)
            for image_id in image_ids:
                on_image(image_id)


def detect_share(
    model: DetectionModel,
    dataset: Dataset,
    cfg: Config,
    proc: Process,
    *,
    autocast: Callable[[], AbstractContextManager],
    on_image: Callable[[int], None] = lambda image_id: None,
    unreadable: Callable[[int, str], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Share:
    """Detect objects in this rank's share of the data set.

    autocast: makes the context in which the model runs.  The other arguments, and what is raised, as in
    `compute_share`; a picture that cannot be read has no detections.
    """
    behind, seen = Behind(proc.device), list[int]()

    def compute(indices: list[int], batch: Batch) -> None:
        make = partial(to_results, indices=indices, sizes=batch.sizes, dataset=dataset, paste=cfg.model.mask_paste)
        behind.add(detect(model, batch, proc.device, autocast), make)

    def done(image_id: int) -> None:
        seen.append(image_id)
        on_image(image_id)

    def replaced(message: str) -> None:
        behind.finish()  # the next thing is a fork
        if notify:
            notify(message)

    with behind, statistics_of_evaluation(model, cfg):
        compute_share(compute, dataset, cfg, proc, on_image=done, unreadable=unreadable, notify=replaced)
        behind.finish()
    return Share(join(behind.results), seen)


def evaluate(
    model: DetectionModel, dataset: Dataset, cfg: Config, proc: Process, autocast: Callable[[], AbstractContextManager]
) -> Evaluation:
    """Detect on all ranks and score on rank 0; every rank gets the same metrics.

    autocast: makes the context in which the model runs.
    Raises, on every rank: DataError if any rank cannot go on, and what `score_shares` raises.
    """
    share, failure = Share(from_coco([]), []), None
    try:
        share = detect_share(model, dataset, cfg, proc, autocast=autocast)
    except GndetError as error:  # the other ranks would wait for this one
        failure = error
    if refusals := [text for (text,) in all_gather([str(failure or "")], proc) if text]:
        raise failure or DataError("\n".join(refusals))
    return score_shares(share, dataset, cfg, proc)


def score_shares(share: Share, dataset: Dataset, cfg: Config, proc: Process) -> Evaluation:
    """Gather the shares of all ranks on rank 0, score them there, and send every rank the metrics.

    Raises, on every rank: RuntimeError if scoring fails, AssertionError unless each image was seen exactly once.
    """
    order = [record.image_id for record in dataset.records]
    seen = [image_id for image_ids in all_gather(share.image_ids, proc) for image_id in image_ids]
    assert sorted(seen) == sorted(order), f"{len(seen)} images seen, not each of {len(order)} once"
    results = join(part for (part,) in gather_to_first([share.results], proc)).in_order_of(order)
    outcome = all_gather([_score(dataset, results, cfg)] if proc.first else [], proc)[0][0]
    if isinstance(outcome, Exception):
        raise outcome
    box, mask = outcome
    return Evaluation(box, mask, results)


def _score(dataset: Dataset, results: Results, cfg: Config) -> tuple[Metrics, Metrics | None] | Exception:
    """Score boxes and masks.  Returns the error if that fails, because the other ranks wait for an answer."""
    try:
        metrics = coco_metrics(
            coco_truths(dataset, masks=cfg.model.masks), results, engine=cfg.evaluation.engine,
            max_detections=cfg.evaluation.max_detections,
        )  # fmt: skip
    except Exception as error:  # every rank raises it
        if isinstance(error, GndetError) or out_of_memory(error):
            return error
        return RuntimeError(f"rank 0 could not score the detections:\n{traceback.format_exc()}")
    return metrics["bbox"], metrics.get("segm")


def scalars(evaluation: Evaluation) -> dict[str, float]:
    """Flatten the summaries for logs: {"box/AP": 0.41, ..., "mask/AP": 0.37, ...}."""
    parts = {"box": evaluation.box, "mask": evaluation.mask}
    return {f"{name}/{key}": value for name, part in parts.items() if part for key, value in part.summary.items()}


def evaluation_table(evaluation: Evaluation) -> str:
    """Return a table in percent: the summaries, then the classes; "-" means undefined."""
    parts = {"box": evaluation.box} | ({"mask": evaluation.mask} if evaluation.mask else {})
    summary = [["", *SUMMARY_COLUMNS]]
    summary += [[name, *(_percent(part.summary[key]) for key in SUMMARY_COLUMNS)] for name, part in parts.items()]
    classes = [["class", "images", "objects", *(f"{name} {key}" for name in parts for key in CLASS_COLUMNS)]]
    for rows in zip(*(part.per_class for part in parts.values()), strict=True):
        first = rows[0]
        numbers = [_percent(row[key]) for row in rows for key in CLASS_COLUMNS]
        classes.append([first["name"], str(first["num_images"]), str(first["num_objects"]), *numbers])
    return f"{text_table(summary)}\n\n{text_table(classes)}"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"
