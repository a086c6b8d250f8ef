"""Evaluate a classifier: run it over a data set, rank the classes of each picture, count errors and confusions.

n pictures, K classes.  The ranks of a run share the pictures; rank 0 gets all of them.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gndet.config.schema import Config
from gndet.data.records import Dataset
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process
from gndet.errors import DataError
from gndet.evaluation.batch_norm import statistics_of_evaluation
from gndet.evaluation.evaluate import compute_share, evaluating
from gndet.files import write_whole
from gndet.modeling.classifier import Classifier
from gndet.structures import Batch
from gndet.text import text_table

RANKED = 5  # classes of a picture that are kept, the most likely first
UNREAD = -1  # in place of a class: the picture could not be read, which counts as an error
SHOWN = 40  # classes in the table


class Ranking(NamedTuple):
    """The most likely classes of n pictures of a data set."""

    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index; (n,) int64 in dataset.records
    classes: np.ndarray  # (n, RANKED) int64, the most likely first; UNREAD where there is none
    scores: np.ndarray  # (n,) float64: probability of the first


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
    index = np.arange(proc.rank, len(dataset.records), proc.world)
    ranking = Ranking(index, np.full((len(index), RANKED), UNREAD), np.zeros(len(index)))

    def compute(indices: list[int], batch: Batch) -> None:
        found = probabilities(model, batch, proc.device, autocast)
        best = found.topk(min(RANKED, found.shape[1]))
        rows = (np.array(indices) - proc.rank) // proc.world
        ranking.classes[rows, : best.indices.shape[1]] = best.indices.numpy()
        ranking.scores[rows] = best.values[:, 0].numpy()

    with evaluating(model), statistics_of_evaluation(model, cfg):
        compute_share(compute, dataset, cfg, proc, on_image=on_image, unreadable=unreadable, notify=notify)
    return ranking


def probabilities(
    model: Classifier, batch: Batch, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Tensor:
    """Return the probability of each class for each image of a batch, (B, K) float64 on the CPU.

    Arguments as in `evaluate.detect`.
    """
    images, sizes = (part.to(device, non_blocking=True) for part in (batch.images, batch.sizes))
    with evaluating(model), torch.inference_mode(), autocast():
        logits = model.classify(images, sizes, batch.padded)
    return model.classifier.probabilities(logits.double()).cpu()


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
