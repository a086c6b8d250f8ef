"""What a detector gets right and wrong on a data set, from the detections alone, without torch.

`analyse` puts together what the modules of this package find; `gndet analyze` and the report show it.
"""

from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.coco_metrics import Kind, Metrics, coco_metrics, coco_truths, evaluated
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.bootstrap import Intervals, ap_intervals
from gndet.toolbox.analysis.curves import Curves, best_thresholds, score_curves
from gndet.toolbox.analysis.errors import Errors, sort_errors
from gndet.toolbox.analysis.matches import Matches, read_matches, true_positives

USUAL_THRESHOLD = 0.5  # where nothing was found, so that no threshold is best


class Suspect(NamedTuple):
    """An annotation that may be wrong, or an object that may lack an annotation."""

    image: int  # place in the data set
    kind: str  # hotcoco's name: wrong_label, missing_annotation ...
    score: float  # of the detection that contradicts the annotation
    found: str  # class of the detection
    annotated: str  # class of the object; "" for none
    annotation_id: int  # 0: none


class Analysis(NamedTuple):
    """The analysis of a detector's boxes or masks.  K classes, N images."""

    kind: str  # box or mask
    metrics: Metrics
    precision: np.ndarray  # (10, 101, K) COCO's precision at IoU thresholds and recalls; -1 where undefined
    matches: Matches
    curves: Curves
    best: np.ndarray  # (K + 1, 4) threshold, precision, recall, F1: per class, then of all; nan where nothing was found
    intervals: Intervals
    errors: Errors
    confusion: np.ndarray  # (K + 1, K + 1) annotated by found; the last row and column: nothing
    counts: np.ndarray  # (N, 3) found, false and missed per image, at `threshold`
    f1: np.ndarray  # (N,) per image; 1 where there is nothing and nothing was found
    suspects: list[Suspect]
    threshold: float  # the score from which detections count when single images are judged

    def worst(self, count: int) -> list[int]:
        """Return the places of the worst images: by F1, then by the number of mistakes."""
        mistakes = self.counts[:, 1:].sum(1)
        order = np.lexsort((np.arange(len(self.f1)), -mistakes, self.f1))
        return [int(place) for place in order[:count] if mistakes[place]]

    def finest(self, count: int) -> list[int]:
        """Return the places of the best images with objects: by F1, then by the number of objects found."""
        busy = self.counts[:, 0] + self.counts[:, 2] > 0
        order = np.lexsort((np.arange(len(self.f1)), -self.counts[:, 0], -self.f1))
        return [int(place) for place in order if busy[place]][:count]


def chosen_kind(dataset: Dataset, results: Results, kind: str | None = None) -> str:
    """Return `kind`, or mask where detections and objects have masks, else box.

    Raises DataError for masks where there are none.
    """
    drawn = any(mask is not None for record in dataset.records for mask in record.segmentations)
    possible = drawn and results.codes is not None
    if kind == "mask" and not possible:
        lacking = "detections" if drawn else "objects of the data set"
        raise DataError(f"--kind mask: the {lacking} have no masks; expected box")
    return kind or ("mask" if possible else "box")


def analyse(dataset: Dataset, results: Results, *, kind: str, max_detections: int) -> Analysis:
    """Analyse detections by their boxes or masks.

    kind: "box" or "mask", which objects and detections must have; max_detections: per image and class.
    """
    scored: Kind = "segm" if kind == "mask" else "bbox"
    truth = coco_truths(dataset, masks=kind == "mask")[scored]
    metrics = coco_metrics({scored: truth}, results, engine="hotcoco", max_detections=max_detections)[scored]
    scorer = evaluated(truth, results, scored, max_detections)
    matches = read_matches(scorer, dataset)
    curves = score_curves(matches)
    best = best_thresholds(curves)
    threshold = USUAL_THRESHOLD if np.isnan(best[-1, 0]) else float(best[-1, 0])
    counts = image_counts(matches, threshold)
    with np.errstate(invalid="ignore"):
        f1 = np.where(counts.any(1), 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]), 1.0)
    return Analysis(
        kind=kind, metrics=metrics, precision=scorer.eval["precision"][:, :, :, 0, -1], matches=matches,
        curves=curves, best=best, intervals=ap_intervals(matches),
        errors=sort_errors(scorer, matches, results, truth, segm=kind == "mask"),
        confusion=scorer.confusion_matrix(0.5, max_detections, threshold)["matrix"].astype(np.int64),
        counts=counts, f1=f1, suspects=_suspects(scorer, matches, threshold), threshold=threshold,
    )  # fmt: skip


def image_counts(matches: Matches, threshold: float) -> np.ndarray:
    """Count objects found, false detections and objects missed per image at IoU 0.5 and a score threshold, (N, 3)."""
    images = len(matches.image_ids)
    shown = (matches.scores >= threshold) & ~matches.ignored[:, 0]
    hit = true_positives(matches)
    tp, fp = (np.bincount(matches.image[rows], minlength=images) for rows in (shown & hit, shown & ~hit))
    objects = np.bincount(matches.object_image[~matches.object_ignored], minlength=images)
    return np.stack([tp, fp, objects - tp], axis=1)


def _suspects(scorer: Any, matches: Matches, threshold: float) -> list[Suspect]:
    """Return annotations contradicted by a confident detection, the most confident first."""
    place = {id: index for index, id in enumerate(matches.image_ids.tolist())}
    suspects = [
        Suspect(
            place[row["image_id"]], row["type"], row["dt_score"], row["dt_category"] or "",
            row.get("gt_category") or "", row.get("gt_id") or 0,
        )
        for row in sorted(scorer.image_diagnostics(0.5, threshold)["label_errors"], key=itemgetter("dt_id"))
    ]  # fmt: skip
    return sorted(suspects, key=lambda suspect: (-suspect.score, suspect.image))
