"""Find annotations that may be wrong: those that a confident detection contradicts.  n detections, m objects."""

from typing import NamedTuple

import numpy as np

from gndet.toolbox.analysis.matches import Matches, false_positives
from gndet.toolbox.analysis.overlaps import Overlaps, best_objects

SAME_PLACE, EMPTY_PLACE = 0.5, 0.1  # IoU of boxes from which an object is meant; IoU below which none is near


class Suspect(NamedTuple):
    """An annotation that may be wrong, or an object that may lack an annotation."""

    image: int  # index in the data set
    kind: str  # wrong_label or missing_annotation
    score: float  # of the detection that contradicts the annotation
    found: str  # the detection's class
    annotated: str  # the object's class; "" without an object
    annotation_id: int  # 0 without an annotation


def find_suspects(matches: Matches, boxes: Overlaps, threshold: float) -> list[Suspect]:
    """Return the annotations that a false detection contradicts, the most confident first.

    A label may be wrong if a detection of another class lies on an object that was missed.  An annotation may be
    missing where a detection is far from all objects.  boxes: overlaps of boxes.  threshold: least score.
    """
    false = false_positives(matches) & (matches.scores >= threshold)
    pairs = boxes.take(false[boxes.detection] & ~matches.object_ignored[boxes.object])
    missed = matches.object_index[pairs.object, 0] < 0
    other = matches.label[pairs.detection] != matches.object_label[pairs.object]
    overlap, object = best_objects(pairs.take(missed & other), len(false))
    nearest, _ = best_objects(pairs, len(false))
    wrong = overlap >= SAME_PLACE
    rows = np.flatnonzero(false & (wrong | (nearest < EMPTY_PLACE)))
    rows = rows[np.lexsort((matches.index[rows], matches.image[rows], -matches.scores[rows]))]
    suspects = []
    for row in rows.tolist():
        image, score, found = int(matches.image[row]), float(matches.scores[row]), matches.classes[matches.label[row]]
        if wrong[row]:
            label, id = matches.object_label[object[row]], int(matches.object_ids[object[row]])
            suspects.append(Suspect(image, "wrong_label", score, found, matches.classes[label], id))
        else:
            suspects.append(Suspect(image, "missing_annotation", score, found, "", 0))
    return suspects
