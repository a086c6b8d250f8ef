"""What a detector gets right and wrong on a data set, from its detections alone.  Without torch.

`analyse` puts together what the modules of this package find; `gndet analyze` and the report show it.
"""

from typing import Any, NamedTuple

import numpy as np

from gndet.data.records import Dataset
from gndet.evaluation.coco_metrics import Kind, Metrics, coco_metrics, coco_truths, evaluated
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.bootstrap import Intervals, ap_intervals
from gndet.toolbox.analysis.curves import BestThreshold, Curves, best_thresholds, score_curves
from gndet.toolbox.analysis.errors import Errors, errors
from gndet.toolbox.analysis.matches import Matches, matches, true_positives

USUAL_THRESHOLD = 0.5  # where no threshold is best: nothing was found


class Suspect(NamedTuple):
    """An annotation that may be wrong, or an object that may lack one."""

    image: int  # place in the data set
    kind: str  # what hotcoco calls it: wrong_label, missing_annotation ...
    score: float  # of the detection that says so
    found: str  # class of the detection
    annotated: str  # class of the object; "" for none
    annotation_id: int  # 0: none
    index: int  # place of the detection in the results


class Analysis(NamedTuple):
    """The analysis of detections of one kind.  K classes, N images."""

    kind: str  # box or mask
    metrics: Metrics
    precision: np.ndarray  # (10, 101, K) COCO's precision at IoU thresholds and recalls; -1 where undefined
    matches: Matches
    curves: Curves
    best: list[BestThreshold | None]  # of each class, then of all
    intervals: Intervals
    errors: Errors
    confusion: np.ndarray  # (K + 1, K + 1) annotated by found, the last: nothing
    counts: np.ndarray  # (N, 3) found, false and missed in each image, at the best threshold of all
    f1: np.ndarray  # (N,) of each image; 1 where nothing is and nothing was found
    suspects: list[Suspect]

    @property
    def threshold(self) -> float:
        """The score from which detections count where single images are judged."""
        return self.best[-1].threshold if self.best[-1] else USUAL_THRESHOLD

    def worst(self, count: int) -> list[int]:
        """Places of the images with most wrong with them: by F1, then by the number of mistakes."""
        mistakes = self.counts[:, 1:].sum(1)
        order = np.lexsort((np.arange(len(self.f1)), -mistakes, self.f1))
        return [int(place) for place in order[:count] if mistakes[place]]

    def finest(self, count: int) -> list[int]:
        """Places of the images with objects of which most was found, and least else."""
        busy = self.counts[:, 0] + self.counts[:, 2] > 0
        order = np.lexsort((np.arange(len(self.f1)), -self.counts[:, 0], -self.f1))
        return [int(place) for place in order if busy[place]][:count]


def draws_masks(dataset: Dataset) -> bool:
    """Whether objects of a data set have masks."""
    return any(one is not None for record in dataset.records for one in record.segmentations)


def analyse(dataset: Dataset, results: Results, *, kind: str, max_detections: int, seed: int = 0) -> Analysis:
    """Analyse detections by their boxes or masks.

    kind: "box" or "mask", for which objects and detections have masks; max_detections: an image and class; seed: of the
    intervals.
    """
    scored: Kind = "segm" if kind == "mask" else "bbox"
    truth = coco_truths(dataset, masks=kind == "mask")[scored]
    image_ids = [record.image_id for record in dataset.records]
    metrics = coco_metrics({scored: truth}, results, engine="hotcoco", max_detections=max_detections)[scored]
    scorer = evaluated(truth, results, scored, max_detections)
    found = matches(scorer, dataset.classes, dataset.category_ids, image_ids)
    curves = score_curves(found)
    best = best_thresholds(curves)
    threshold = best[-1].threshold if best[-1] else USUAL_THRESHOLD
    counts = image_counts(found, threshold)
    with np.errstate(invalid="ignore"):
        f1 = np.where(counts.any(1), 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]), 1.0)
    return Analysis(
        kind=kind, metrics=metrics, precision=scorer.eval["precision"][:, :, :, 0, -1], matches=found, curves=curves,
        best=best, intervals=ap_intervals(found, seed=seed),
        errors=errors(scorer, found, results, truth, segm=kind == "mask"),
        confusion=scorer.confusion_matrix(0.5, max_detections, threshold)["matrix"].astype(np.int64),
        counts=counts, f1=f1, suspects=_suspects(scorer, found, threshold),
    )  # fmt: skip


def image_counts(found: Matches, threshold: float) -> np.ndarray:
    """Objects found, false detections and objects missed in each image at IoU 0.5, from a score on, (N, 3)."""
    images = len(found.image_ids)
    shown = (found.scores >= threshold) & ~found.ignored[:, 0]
    hit = true_positives(found)
    tp, fp = (np.bincount(found.image[of], minlength=images) for of in (shown & hit, shown & ~hit))
    objects = np.bincount(found.object_image[~found.object_ignored], minlength=images)
    return np.stack([tp, fp, objects - tp], axis=1)


def _suspects(scorer: Any, found: Matches, threshold: float) -> list[Suspect]:
    """Annotations that a sure detection speaks against, the surest first."""
    place = {id: index for index, id in enumerate(found.image_ids.tolist())}
    listed = scorer.image_diagnostics(0.5, threshold)["label_errors"]
    some = [
        Suspect(
            place[one["image_id"]], one["type"], one["dt_score"], one["dt_category"] or "",
            one.get("gt_category") or "", one.get("gt_id") or 0, one["dt_id"] - 1,
        )
        for one in listed
    ]  # fmt: skip
    return sorted(some, key=lambda one: (-one.score, one.image, one.index))
