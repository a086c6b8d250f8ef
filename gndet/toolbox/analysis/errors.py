"""Classify each mistake after TIDE (Bolya et al., ECCV 2020, section 2.2), with the AP that fixing it would gain.

A test checks that the counts and the gains are hotcoco's.  n detections, m objects, p pairs that overlap, K classes.
"""

from typing import NamedTuple

import numpy as np

from gndet.toolbox.analysis.bootstrap import average_precision
from gndet.toolbox.analysis.matches import Matches, false_positives, true_positives
from gndet.toolbox.analysis.overlaps import Overlaps, best_objects, take_objects, turns

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


def sort_errors(matches: Matches, overlaps: Overlaps, crowd: np.ndarray) -> Errors:
    """Sort the mistakes by kind; crowd (m,): crowd regions."""
    false = false_positives(matches)
    pairs = overlaps.take(false[overlaps.detection])
    same = matches.label[pairs.detection] == matches.object_label[pairs.object]
    own, own_object = best_objects(pairs.take(same), len(false))
    other, other_object = best_objects(pairs.take(~same & ~crowd[pairs.object]), len(false))
    found = np.append(matches.object_index[:, 0] >= 0, False)[own_object]
    cases = {  # the first that holds
        "": ~false,
        "Loc": (own >= BACKGROUND) & (own <= FOREGROUND),
        "Cls": other >= FOREGROUND,
        "Dupe": (own >= FOREGROUND) & found,
        "Bkg": np.maximum(own, other) <= BACKGROUND,
    }
    kind = np.select(list(cases.values()), [np.array(name, dtype="<U4") for name in cases], "Both")
    target = np.select([kind == "Loc", kind == "Cls"], [own_object, other_object], -1)  # found if the mistake is fixed
    missed = ~matches.object_ignored & (matches.object_index[:, 0] < 0)
    missed[target[target >= 0]] = False
    counts = {name: int((kind == name).sum()) for name in KINDS} | {"Miss": int(missed.sum())}
    return Errors(_gains(matches, kind, target, missed), counts, kind, missed)


def _gains(matches: Matches, kind: np.ndarray, target: np.ndarray, missed: np.ndarray) -> dict[str, float]:
    """Return how much AP50 is gained, as the mean over classes, if all mistakes of a kind are fixed.

    To fix Cls or Loc, the best detection of each missed object, target (n,), becomes true and takes its class.  All
    other false detections of the kind disappear.  To fix Miss, missed objects are not counted.
    """
    hit, scores = true_positives(matches), matches.scores
    lost = ~matches.object_ignored & (matches.object_index[:, 0] < 0)
    num, num_missed, num_lost = (
        np.bincount(matches.object_label[which], minlength=len(matches.classes))
        for which in (~matches.object_ignored, missed, lost)
    )
    best = np.flatnonzero(np.append(lost, False)[target])
    best = best[np.lexsort((matches.index[best], -scores[best], target[best]))]
    best = best[turns(target[best]) == 0]
    moved = matches.label.copy()
    moved[best] = matches.object_label[target[best]]
    rows = np.flatnonzero(hit | (kind != ""))  # those on crowd regions do not count
    rows = rows[np.lexsort((-scores[rows], matches.label[rows]))]
    label, right = matches.label[rows], hit[rows]
    before = _class_ap(label, right, num)
    after = {
        "FP": _class_ap(label[right], right[right], num),
        "FN": _class_ap(label, right, num - num_lost),
        "Miss": _class_ap(label, right, num - num_missed),
    }
    for name in sorted(KINDS.keys() - after):
        becomes = np.zeros(len(kind), dtype=bool)
        becomes[best] = kind[best] == name
        left = rows[((kind != name) | becomes)[rows]]
        label = np.where(becomes, moved, matches.label)[left]
        if name == "Cls":  # of equal scores, those that were of the class come first
            order = np.lexsort((label != matches.label[left], -scores[left], label))
            left, label = left[order], label[order]
        after[name] = _class_ap(label, (hit | becomes)[left], num)
    return {name: float((ap - before)[num > 0].mean()) if num.any() else 0.0 for name, ap in after.items()}


def _class_ap(label: np.ndarray, hit: np.ndarray, num: np.ndarray) -> np.ndarray:
    """Return AP50 per class, (K,); 0 without objects.

    label, hit (n,): detections by class and then by descending score; num (K,): objects of each class.
    """
    ap, stops = np.zeros(len(num)), np.searchsorted(label, np.arange(len(num) + 1))
    for k in np.flatnonzero(num):
        found = hit[stops[k] : stops[k + 1], None]  # (n_k, 1)
        ap[k] = average_precision(found, ~found, np.ones((1, len(found))), num[k : k + 1].astype(np.float64))[0, 0]
    return ap


def confusion(matches: Matches, overlaps: Overlaps, crowd: np.ndarray, limit: int, threshold: float) -> np.ndarray:
    """Count the pairs of classes that match at IoU 0.5 if classes do not matter, (K + 1, K + 1) int64.

    Rows are annotated classes, columns detected ones; the last row and column mean nothing.  limit: the number of
    detections that count per image.  threshold: least score of a detection.
    """
    rows = np.flatnonzero(matches.scores >= threshold)
    rows = rows[np.lexsort((-matches.scores[rows], matches.image_ids[matches.image[rows]]))]
    rows = rows[turns(matches.image[rows]) < limit]
    place = np.full(len(matches.index), -1)
    place[rows] = np.arange(len(rows))
    pairs = overlaps._replace(detection=place[overlaps.detection])
    pairs = pairs.take((pairs.detection >= 0) & (pairs.iou >= FOREGROUND) & ~crowd[pairs.object])
    taken = take_objects(pairs, matches.image[rows], crowd, crowd, np.array([FOREGROUND]))[:, 0]
    labels, nothing = np.append(matches.object_label, len(matches.classes)), len(matches.classes)
    unfound = ~crowd
    unfound[taken[taken >= 0]] = False
    annotated = np.concatenate([labels[taken], matches.object_label[unfound]])
    detected = np.concatenate([matches.label[rows], np.full(unfound.sum(), nothing)])
    size = nothing + 1
    return np.bincount(annotated * size + detected, minlength=size * size).reshape(size, size)
