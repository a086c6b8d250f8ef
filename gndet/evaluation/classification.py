"""Evaluate a classifier: run it over a data set, rank the classes of each picture, count errors and confusions.

n pictures, K classes.  The ranks of a run share the pictures; rank 0 gets all of them.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from gndet.config.loading import with_overrides
from gndet.config.schema import Config, DatasetConfig
from gndet.data.batches.stream import test_batches
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process, place
from gndet.errors import DataError
from gndet.evaluation.batch_norm import as_saved, population_statistics, statistics_of_evaluation
from gndet.files import write_whole
from gndet.modeling.classifier import Classifier
from gndet.modeling.trained import build_trained, read_trained
from gndet.text import named_briefly, text_table

RANKED = 5  # classes of a picture that are kept, the most likely first
UNREAD = -1  # in place of a class: the picture could not be read, which counts as an error
SHOWN = 40  # classes in the table


class Ranking(NamedTuple):
    """The most likely classes of n pictures of a data set."""

    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index; (n,) int64 in dataset.records
    classes: np.ndarray  # (n, RANKED) int64, the most likely first; UNREAD where there is none
    scores: np.ndarray  # (n,) float64: probability of the first, by softmax


class Classification(NamedTuple):
    """The outcome of an evaluation."""

    ranking: Ranking  # of all pictures of a class, in the order of the data set
    labels: np.ndarray  # (n,) int64

    @property
    def hits(self) -> np.ndarray:
        """Return at which rank each picture has its class, (n, RANKED) bool."""
        return self.ranking.classes == self.labels[:, None]

    def scalars(self) -> dict[str, float]:
        """Return the metrics: shares of pictures whose class is the first, or among the first 5; and top-1 error."""
        top1, top5 = float(self.hits[:, 0].mean()), float(self.hits.any(1).mean())
        return {"top1": top1, "top5": top5, "error": 1 - top1}

    def confusion(self, num_classes: int) -> np.ndarray:
        """Count pictures by class and by predicted class, (K, K + 1) int64; the last column: not read."""
        counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        np.add.at(counts, (self.labels, self.ranking.classes[:, 0]), 1)  # UNREAD is the last column
        return counts


def classify_share(
    model: Classifier,
    dataset: Dataset,
    cfg: Config,
    proc: Process,
    *,
    autocast: Callable[[], AbstractContextManager],
    on_image: Callable[[int], None] = lambda image_id: None,
    unreadable: Callable[[int, str], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Ranking:
    """Rank the classes of this rank's share of the pictures.  Arguments and errors as in `evaluate.detect_share`."""
    batches = test_batches(
        dataset, cfg.data, images_per_gpu=cfg.evaluation.images_per_gpu, rank=proc.rank, world=proc.world,
        pin_memory=proc.device.type == "cuda", notify=notify,
    )  # fmt: skip
    share = len(range(proc.rank, len(dataset.records), proc.world))
    ranking = Ranking(
        np.arange(proc.rank, len(dataset.records), proc.world), np.full((share, RANKED), UNREAD), np.zeros(share)
    )
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with contextlib.closing(batches), statistics_of_evaluation(model, cfg):
            for indices, batch, image_ids, skipped in batches:
                for image_id, reason in skipped:
                    if unreadable is None:
                        raise DataError(reason)
                    unreadable(image_id, reason)
                if batch is not None:
                    images, sizes = (part.to(proc.device, non_blocking=True) for part in (batch.images, batch.sizes))
                    with torch.inference_mode(), autocast():
                        scores = model.classify(images, sizes, batch.padded).double().softmax(1)  # (B, K)
                    best = scores.topk(min(RANKED, scores.shape[1]))
                    rows = (np.array(indices) - proc.rank) // proc.world
                    ranking.classes[rows, : best.indices.shape[1]] = best.indices.cpu().numpy()
                    ranking.scores[rows] = best.values[:, 0].cpu().numpy()
                for image_id in image_ids:
                    on_image(image_id)
    finally:
        for module in in_training:
            module.training = True
    return ranking


def join_rankings(share: Ranking, dataset: Dataset, proc: Process) -> Classification:
    """Gather the shares of all ranks on every rank.  Pictures without a class (data.classes) are left out.

    Raises DataError if no picture has a class.
    """
    parts = [part[0] for part in all_gather([share], proc)]
    whole = Ranking(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    whole = Ranking(*(field[whole.index.argsort()] for field in whole))
    labels = np.array([next(iter(record.labels.tolist()), UNREAD) for record in dataset.records], dtype=np.int64)
    known = labels != UNREAD
    if not known.any():
        raise DataError(f"{dataset.name}: no picture has one of the classes")
    return Classification(Ranking(*(field[known] for field in whole)), labels[known])


def classify(
    model: Classifier, dataset: Dataset, cfg: Config, proc: Process, autocast: Callable[[], AbstractContextManager]
) -> Classification:
    """Evaluate a classifier; every rank gets the result.  Raises DataError for a picture that cannot be read."""
    return join_rankings(classify_share(model, dataset, cfg, proc, autocast=autocast), dataset, proc)


def evaluate_classifier(
    path: Path, overrides: Sequence[str], proc: Process, tell: Callable[[str], None]
) -> tuple[Dataset, Classification]:
    """Evaluate the classifier of a run or checkpoint folder on its config's data.val.

    overrides: `key=value` words that change its config.  tell: called with a line about weights that are not finite.
    Returns the data set and the outcome.  Raises CheckpointError, ConfigError and DataError, also if the classes of the
    data set are not the classifier's.
    """
    trained = read_trained(path)
    cfg = with_overrides(as_saved(trained.config), overrides, f"{trained.path}/meta.json")
    if trained.nonfinite:
        tell(f"warning: {trained.fault}")
    model, autocast = place(build_trained(trained, cfg.model).eval(), cfg.train.precision, proc)
    model.choose_convolutions(min(cfg.data.shortest_edge))

    def read(which: DatasetConfig) -> Dataset:
        dataset = read_dataset(which, cfg.data, known=trained.classes)
        if dataset.classes != trained.classes:
            raise DataError(
                f"{dataset.name}: has the classes {named_briefly(dataset.classes)}; the classifier knows "
                f"{named_briefly(trained.classes)}; data.classes chooses them by name"
            )
        return dataset

    dataset = read(cfg.data.val)
    with population_statistics(model, lambda: read(cfg.data.train), cfg, proc, autocast):
        return dataset, classify(cast(Classifier, model), dataset, cfg, proc, autocast)


def classification_table(found: Classification, classes: tuple[str, ...]) -> str:
    """Return a table in percent: the errors, then the classes with the most errors and what they are taken for."""
    values = found.scalars()
    head = [["", "top-1 error", "top-5 error", "images"]]
    head.append(["", f"{100 * values['error']:.1f}", f"{100 * (1 - values['top5']):.1f}", str(len(found.labels))])
    counts = found.confusion(len(classes))
    names, total = (*classes, "(not read)"), counts.sum(1)
    wrong = total - counts.diagonal()
    rows = [["class", "images", "error", "most often taken for"]]
    for label in (-wrong / np.maximum(total, 1)).argsort(kind="stable").tolist()[:SHOWN]:
        others = counts[label].copy()
        others[label] = 0
        most = int(others.argmax())
        taken = f"{names[most]} ({others[most]})" if others[most] else "-"
        error = f"{100 * wrong[label] / total[label]:.1f}" if total[label] else "-"
        rows.append([classes[label], str(total[label]), error, taken])
    left = f"\n({len(classes) - SHOWN} classes with fewer errors are not shown)" if len(classes) > SHOWN else ""
    return f"{text_table(head)}\n\n{text_table(rows, left=(0, 3))}{left}"


def save_classification(path: Path, found: Classification, dataset: Dataset) -> None:
    """Write the classes of each picture: {"classes": [...], "images": [[id, class, predicted class, score], ...]}."""
    ids = (dataset.records[index].image_id for index in found.ranking.index.tolist())
    columns = (ids, found.labels.tolist(), found.ranking.classes[:, 0].tolist(), found.ranking.scores.tolist())
    rows = [[image, label, guess, round(score, 5)] for image, label, guess, score in zip(*columns, strict=True)]
    content: dict[str, Any] = {"gndet": "classification", "classes": list(dataset.classes), "images": rows}
    write_whole(path, json.dumps(content, ensure_ascii=False))
