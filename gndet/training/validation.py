"""Evaluate a run during training: on all ranks, interrupted by a request to stop, with example pictures."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, cast

import numpy as np

from gndet.data.batches.stream import Loaded
from gndet.data.records import Dataset
from gndet.distributed.collectives import all_gather, broadcast, raise_on_all
from gndet.distributed.signals import Stop, StopSignals
from gndet.errors import DataError, GndetError, TrainingError, in_one_line, out_of_memory
from gndet.evaluation.coco_metrics import RECALLS
from gndet.evaluation.drawing import (
    draw_detections,
    draw_ground_truth,
    draw_objects,
    grid,
    save_picture,
    shrunk,
    side_by_side,
)
from gndet.evaluation.evaluate import Evaluation, detect_share, evaluation_table, scalars, score_shares
from gndet.evaluation.fonts import class_name
from gndet.evaluation.results import paste_masks, save_results
from gndet.modeling.detection_model import DetectionModel
from gndet.training.log import Log
from gndet.training.run import Run
from gndet.training.run_folder import DETECTIONS, PREDICTIONS

T = TypeVar("T")
PICTURE_THRESHOLD = 0.5  # score from which a detection is drawn
PICTURE_SIDE = 1344  # pixels of the longer side of a drawn picture: that of the usual canvas (data.max_edge 1333)
MOST_PICTURES = 8  # pairs of pictures in predictions.png, of 10 MB each in memory; TensorBoard has all of them
STRIPE, SHADES = 16, (150, 120)  # of drawn padding: width of a stripe in pixels, and the gray values


def evaluate_run(run: Run, done: int, log: Log, stop: StopSignals) -> dict[str, float]:
    """Evaluate on the validation set; log numbers, pictures, and the detections as COCO results.

    Returns the metrics, {"box/AP": ...}.  Raises, on all ranks, what `on_all_ranks` raises; pictures that cannot be
    read count as pictures without detections.
    """
    detect = partial(
        detect_share, cast(DetectionModel, run.detector), run.val_set, run.cfg, run.proc, autocast=run.autocast
    )
    share = on_all_ranks(run, done, log, stop, detect, "images without detections")
    evaluation = score_shares(share, run.val_set, run.cfg, run.proc)
    if run.proc.first:
        log.evaluation(done, scalars(evaluation), evaluation_table(evaluation))
        log.attempt(DETECTIONS, partial(save_results, run.out / DETECTIONS, evaluation.results))
        show_examples(run, done, log, evaluation)
        with drawing_may_fail("the curves of precision and recall", log):
            for part, metrics in (("box", evaluation.box), ("mask", evaluation.mask)):
                for name, precision in metrics.curves.items() if metrics else ():
                    log.precision_recall(done, f"val/{part} {name}", precision, RECALLS)
    return scalars(evaluation)


def on_all_ranks(run: Run, done: int, log: Log, stop: StopSignals, work: Callable[..., T], counted_as: str) -> T:
    """Run this rank's share of an evaluation: work(on_image=..., unreadable=..., notify=...), as `detect_share` does.

    counted_as: what pictures that cannot be read count as, for the log.  Returns what `work` returns.
    Raises, on all ranks, Stop if a rank was asked to stop, and TrainingError if memory runs out or if more pictures
    than data.max_unreadable cannot be read.
    """
    proc = run.proc
    num_images, count = len(range(proc.rank, len(run.val_set.records), proc.world)), itertools.count(1)
    unreadable: dict[int, str] = {}

    def on_image(image_id: int) -> None:
        number = next(count)
        stop.poll()
        if proc.watch:
            proc.watch.at(done, f"evaluating image {number} of its {num_images}")
        log.evaluating(number, num_images)

    broadcast(run.detector.buffers(), proc)  # BN's running statistics differ from rank to rank
    failure: BaseException | None = None
    try:
        with stop.at_once():
            share = work(on_image=on_image, unreadable=unreadable.__setitem__, notify=log.message)
    except (Stop, GndetError) as error:
        failure = error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failure = TrainingError(
            f"out of memory while evaluating (rank {proc.rank}: {error}); lower evaluation.images_per_gpu or "
            "data.shortest_edge_test, then repeat the command: the run resumes where it stopped"
        )
    # before the next collective, every rank learns whether all ranks have succeeded
    raise_on_all(failure or (Stop() if stop.asked else None), proc)
    unreadable = {image: reason for part in all_gather([unreadable], proc) for image, reason in part[0].items()}
    refuse_unreadable(run, "validation", run.val_set, unreadable)
    if unreadable:
        first = next(iter(unreadable.values()))
        log.message(f"{len(unreadable)} image(s) cannot be read and count as {counted_as}: {first}")
    return share


def refuse_unreadable(run: Run, role: str, dataset: Dataset, unreadable: dict[int, str]) -> None:
    """Raise TrainingError if more pictures of a data set than data.max_unreadable could not be read."""
    limit, num = run.cfg.data.max_unreadable, len(dataset.records)
    if len(unreadable) > limit * num:
        raise TrainingError(
            f"{dataset.name}: {len(unreadable)} of {num} {role} images cannot be read, more than data.max_unreadable: "
            f"{limit:g} of them; the last: {list(unreadable.values())[-1]}.  Repair the files and repeat the command: "
            "the run resumes where it stopped"
        )


def show_examples(run: Run, done: int, log: Log, evaluation: Evaluation) -> None:
    """Draw the first validation images, ground truth beside detections, to predictions.png and TensorBoard."""
    data, pictures = run.val_set, list[np.ndarray]()
    for number, record in enumerate(data.records[: run.cfg.train.vis_images]):
        with drawing_may_fail(f"image {record.image_id}", log):
            try:
                image = shrunk(record.load(), PICTURE_SIDE)
            except DataError:
                continue  # the evaluation has reported it
            found = evaluation.results.of_image(record.image_id)
            left = draw_ground_truth(image, record, data.classes)
            right = draw_detections(image, found, data.classes, data.category_ids, PICTURE_THRESHOLD, record.size)
            pair = side_by_side(left, right, ("ground truth", "detections"))
            pictures += [pair] if len(pictures) < MOST_PICTURES else []
            log.picture(done, f"val/{number}", pair)
    if pictures:
        with drawing_may_fail(PREDICTIONS, log):
            log.attempt(PREDICTIONS, partial(save_picture, run.out / PREDICTIONS, grid(pictures, columns=2)))


@contextmanager
def drawing_may_fail(what: str, log: Log) -> Iterator[None]:
    """Let a run survive whatever goes wrong while a picture is drawn, lack of memory too; the log says it."""
    try:
        yield
    except Exception as error:  # a picture is never worth a run
        log.message(f"could not draw {what} ({in_one_line(error)}); the run goes on without it")


def draw(loaded: Loaded, place: int, classes: tuple[str, ...]) -> np.ndarray:
    """Draw one image of a batch on its canvas, with stripes in the padding.

    Returns (H', W', 3) uint8, drawn at PICTURE_SIDE if the canvas is larger.
    """
    batch = loaded.batch
    canvas = batch.images.shape[2], batch.images.shape[3]
    image = shrunk(batch.images[place].permute(1, 2, 0).numpy(), PICTURE_SIDE).copy()
    height, width = np.ceil(batch.sizes[place].numpy() * (image.shape[0] / canvas[0])).astype(int)
    diagonal = np.add.outer(*map(np.arange, image.shape[:2]))
    stripes = np.where(diagonal // STRIPE % 2 == 0, *SHADES)[..., None]
    image[height:], image[:, width:] = stripes[height:], stripes[:, width:]
    valid = batch.gt.valid[place]
    boxes = batch.gt.boxes[place][valid].numpy().astype(np.float64)
    labels = batch.gt.labels[place][valid].tolist()
    with_masks = batch.gt.masks.shape[-1] > 0
    masks = paste_masks(batch.gt.masks[place][valid].float().numpy(), boxes, canvas) if with_masks else ()
    return draw_objects(image, boxes, [class_name(classes, label) for label in labels], labels, masks, canvas)
