"""Classify each mistake after TIDE (Bolya et al., ECCV 2020, section 2.2), with the AP that fixing it would gain.

hotcoco computes how much AP each kind of mistake costs, but does not say which detection is of which kind.  This module
does, so that the report can show them; a test checks that the counts agree.  n detections, m objects.
"""

from itertools import groupby
from typing import Any, NamedTuple

import hotcoco
import numpy as np
from hotcoco import mask as hotcoco_mask

from gndet.data.datasets.segmentation import to_rle
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.matches import Matches, false_positives

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object counts as found; IoU up to which a detection hits nothing
KINDS = {
    "Cls": "classification: right place, wrong class",
    "Loc": "localization: right class, IoU too low",
    "Both": "both: wrong class and IoU too low",
    "Dupe": "duplicate: a better detection already found this object",
    "Bkg": "background: no object there",
    "Miss": "missed: no detection found this object",
}
TITLES = {kind: words.partition(":")[0] for kind, words in KINDS.items()}


class Errors(NamedTuple):
    """The mistakes of a detector at IoU 0.5."""

    delta_ap: dict[str, float]  # AP50 gained by fixing all mistakes of a kind; FP and FN: all false, all missed
    counts: dict[str, int]  # per kind of KINDS
    kind: np.ndarray  # (n,) str of KINDS; "" for correct detections
    missed: np.ndarray  # (m,) bool: an object that counts and that no fixed Cls or Loc would find: kind Miss


def sort_errors(
    scorer: hotcoco.COCOeval, matches: Matches, results: Results, truth: dict[str, Any], segm: bool
) -> Errors:
    """Sort the mistakes by kind.

    truth: the data set as `coco_truths` returns it.  segm: compare masks instead of boxes.
    """
    tide = scorer.tide_errors(FOREGROUND, BACKGROUND)
    kind = np.full(len(matches.index), "", dtype="<U4")
    decided_by = np.zeros(len(kind), dtype=np.int64)  # annotation id of the object that decided the kind; 0: none
    used = set(matches.matched[:, 0].tolist())
    classes = dict(zip(matches.object_ids.tolist(), matches.object_label.tolist(), strict=True))
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    rows = np.flatnonzero(false_positives(matches))
    rows = rows[np.argsort(matches.image[rows], kind="stable")]
    for image, group in groupby(rows.tolist(), key=lambda row: matches.image[row]):
        wrong = list(group)
        annotations = objects[int(matches.image_ids[image])]
        found = results.take(matches.index[wrong])
        crowd = np.array([annotation["iscrowd"] for annotation in annotations], dtype=bool)
        if segm:
            size = (truth["images"][image]["height"], truth["images"][image]["width"])
            shapes: Any = found.masks()
            drawn = [to_rle(row["segmentation"], size) for row in annotations]
        else:
            shapes = found.boxes.tolist()
            drawn = [row["bbox"] for row in annotations]
        # (rows, objects); for a crowd, the share of the detection that lies on it
        ious = np.asarray(hotcoco_mask.iou(shapes, drawn, crowd.tolist())).reshape(len(wrong), len(annotations))
        labels = np.array([classes[annotation["id"]] for annotation in annotations], dtype=np.int64)
        taken = np.array([annotation["id"] in used for annotation in annotations], dtype=bool)
        for row, iou in zip(wrong, ious, strict=True):
            same = labels == matches.label[row]
            kind[row], index = _kind(np.where(crowd & ~same, -1.0, iou), same, taken)  # ignore other classes' crowds
            if index >= 0:
                decided_by[row] = annotations[index]["id"]
    nearly = decided_by[np.isin(kind, ("Cls", "Loc"))]  # objects that these detections would find if fixed
    missed = ~matches.object_ignored & (matches.object_index[:, 0] < 0) & ~np.isin(matches.object_ids, nearly)
    return Errors(dict(tide["delta_ap"]), dict(tide["counts"]), kind, missed)


def _kind(iou: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[str, int]:
    """Return the kind of a false detection and the index of the object that decides it, or -1.

    iou: with each object of the image.  same: which objects are of the detection's class.  taken: which were found.
    """
    own, others = np.where(same, iou, -1.0), np.where(same, -1.0, iou)
    best_own, best_other = (int(overlap.argmax()) if len(overlap) else -1 for overlap in (own, others))
    top_own, top_other = (float(overlap.max(initial=-1.0)) for overlap in (own, others))
    if BACKGROUND <= top_own < FOREGROUND:
        return "Loc", best_own
    if top_other >= FOREGROUND:
        return "Cls", best_other
    if top_own >= FOREGROUND and taken[best_own]:
        return "Dupe", best_own
    if max(top_own, top_other) <= BACKGROUND:
        return "Bkg", -1
    return "Both", best_other if top_other > top_own else best_own
