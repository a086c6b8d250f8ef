"""What kind of mistake each detection is, after TIDE (Bolya et al., ECCV 2020, section 2.2), and what mending it gives.

How much AP each kind costs is hotcoco's; which detection is of which kind is found here, so that it can be shown, and
the counts are equal (tested).  n detections, m objects.
"""

from typing import Any, NamedTuple

import hotcoco
import numpy as np
from hotcoco import mask as hotcoco_mask

from gndet.data.datasets.segmentation import to_rle
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.matches import Matches, false_positives

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object is found; up to which there is nothing
KINDS = {
    "Cls": "classification: on an object of another class",
    "Loc": "localisation: on an object, not well enough",
    "Both": "both: another class, and not well enough",
    "Dupe": "duplicate: of an object that a better one has found",
    "Bkg": "background: where no object is",
    "Miss": "missed: an object that nothing found",
}


class Errors(NamedTuple):
    """The mistakes of a detector at IoU 0.5."""

    delta_ap: dict[str, float]  # what AP50 would gain if all mistakes of a kind were mended; FP, FN: all of them
    counts: dict[str, int]  # by KINDS
    kind: np.ndarray  # (n,) str of KINDS; "" for detections that are none
    overlap: np.ndarray  # (n,) float64: IoU with the object that decides the kind
    other: np.ndarray  # (n,) int64 its annotation id; 0: none
    missed: np.ndarray  # (m,) bool: an object that counts, and that no mended Cls or Loc would find: kind Miss


def errors(scorer: hotcoco.COCOeval, found: Matches, results: Results, truth: dict[str, Any], segm: bool) -> Errors:
    """Sort the mistakes.  truth: the data set as `coco_truths` gives it; segm: by masks."""
    tide = scorer.tide_errors(FOREGROUND, BACKGROUND)
    kind = np.full(len(found.index), "", dtype="<U4")
    overlap, other = np.zeros(len(kind)), np.zeros(len(kind), dtype=np.int64)
    wrong, used = false_positives(found), set(found.matched[:, 0].tolist())
    objects = _by_image(truth, segm)
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(found.image[rows], kind="stable")]
    classes = dict(zip(found.object_ids.tolist(), found.object_label.tolist(), strict=True))
    for image, of_image in _grouped(rows, found.image[rows]):
        there = objects.get(int(found.image_ids[image]), [])
        shapes = _shapes(results, found.index[of_image], segm)
        ious = _ious(shapes, [one.shape for one in there], [one.crowd for one in there])  # (rows, objects)
        ids = np.array([one.id for one in there], dtype=np.int64)
        labels = np.array([classes[id] for id in ids.tolist()], dtype=np.int64)
        taken = np.array([id in used for id in ids.tolist()], dtype=bool)
        crowd = np.array([one.crowd for one in there], dtype=bool)
        for row, iou in zip(of_image, ious, strict=True):
            same = labels == found.label[row]
            kind[row], place = _kind(
                np.where(crowd & ~same, -1.0, iou), same, taken
            )  # others' crowds count for nothing
            if place >= 0:
                overlap[row], other[row] = iou[place], ids[place]
    nearly = other[np.isin(kind, ("Cls", "Loc"))]  # mended, these would find their object
    missed = ~found.object_ignored & (found.object_index[:, 0] < 0) & ~np.isin(found.object_ids, nearly)
    return Errors(dict(tide["delta_ap"]), dict(tide["counts"]), kind, overlap, other, missed)


def _kind(iou: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[str, int]:
    """The kind of a false detection and the place of the object that decides it, or -1.

    iou: with the objects of its image; same: those of its class; taken: those that were found.
    """
    own, others = np.where(same, iou, -1.0), np.where(same, -1.0, iou)
    best_own, best_other = (int(of.argmax()) if len(of) else -1 for of in (own, others))
    top_own, top_other = (float(of.max()) if len(of) else -1.0 for of in (own, others))
    if BACKGROUND <= top_own < FOREGROUND:
        return "Loc", best_own
    if top_other >= FOREGROUND:
        return "Cls", best_other
    if top_own >= FOREGROUND and taken[best_own]:
        return "Dupe", best_own
    if max(top_own, top_other) <= BACKGROUND:
        return "Bkg", -1
    return "Both", best_other if top_other > top_own else best_own


class _Object(NamedTuple):
    """An annotation as detections are compared with it."""

    id: int
    shape: Any  # box xywh, or the code of a mask
    crowd: bool  # then the overlap is the share of the detection that lies on it


def _by_image(truth: dict[str, Any], segm: bool) -> dict[int, list[_Object]]:
    """The annotations of each image."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    objects: dict[int, list[_Object]] = {}
    for one in truth["annotations"]:
        shape = _mask(one["segmentation"], sizes[one["image_id"]]) if segm else one["bbox"]
        objects.setdefault(one["image_id"], []).append(_Object(one["id"], shape, bool(one.get("iscrowd", 0))))
    return objects


def _shapes(results: Results, index: np.ndarray, segm: bool) -> list[Any]:
    """Boxes, or masks, of the detections at places (n,)."""
    if not segm:
        return results.boxes[index].tolist()
    masks = results.take(index).masks()
    assert masks is not None  # by masks: the results have some
    return masks


def _ious(found: list[Any], objects: list[Any], crowd: list[bool]) -> np.ndarray:
    """IoU of every detection with every object, (n, m), as COCO takes it."""
    if not found or not objects:
        return np.zeros((len(found), len(objects)))
    return np.asarray(hotcoco_mask.iou(found, objects, crowd)).reshape(len(found), len(objects))


def _mask(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The compressed code of a mask, as hotcoco compares it."""
    rle = to_rle(segmentation, size)
    counts = rle["counts"]
    return {"size": list(size), "counts": counts if isinstance(counts, bytes) else counts.encode("ascii")}


def _grouped(rows: np.ndarray, keys: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The rows of each key, which stand together."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(keys)) + 1
    return [
        (int(part_keys[0]), part) for part, part_keys in zip(np.split(rows, cuts), np.split(keys, cuts), strict=True)
    ]
