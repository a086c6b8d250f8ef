"""What the detector gets wrong, and pictures of it: ground truth beside detections, by class and kind of mistake."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.segmentation import printable, to_rle
from gndet.data.records import Dataset, Record
from gndet.errors import DataError
from gndet.evaluation.drawing import draw_ground_truth, draw_objects, shrunk, side_by_side
from gndet.evaluation.results import Results
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.errors import KINDS
from gndet.toolbox.analysis.tables import error_table, image_table, suspect_table
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import GalleryPicture
from gndet.toolbox.report.quality import shown_table
from gndet.toolbox.report.record import RunRecord

BEST, WORST, RANDOM, EACH = 6, 12, 6, 3  # pictures; EACH: of a class, and of a kind of mistake
MOST = 48  # pictures in all
SIDE = 480  # pixels of the longer side of one of the two
WIDE = 980  # of both side by side
LISTED = 50  # rows
ADVICE = {
    "Cls": "Classes are confused: look at the confusion matrix, merge or relabel classes that look alike, or give the "
    "rare ones more images.",
    "Loc": "Boxes are loose: a longer schedule, larger pictures, or annotations drawn more tightly.",
    "Both": "Detections near objects fit neither class nor box: usually too little training or too few examples.",
    "Dupe": "Objects are found twice: a lower model.box_head.nms_threshold.",
    "Bkg": "Things are found where nothing is annotated: look for objects that were not annotated, and train on images "
    "without objects too (data.keep_empty).",
    "Miss": "Objects are missed: small or crowded ones need larger pictures (data.shortest_edge) or smaller "
    "model.rpn.anchor_sizes.",
}  # fmt: skip


def section(run: RunRecord) -> str:
    """Kinds of mistakes, the worst images, annotations that may be wrong."""
    found, dataset = run.analysis, run.val_set
    if found is None or dataset is None:
        return ""
    table = error_table(found)
    bars = charts.bars("errors", [row[0] for row in table.rows], [100 * (row[3] or 0) for row in table.rows],
                       x_label="AP50 that mending all of a kind would give, points")  # fmt: skip
    kind, _, count, gained = table.rows[0]
    lost = f"{count:,} detections or objects, {100 * (gained or 0):.1f} points of AP50"
    lead = f"Most is lost by {KINDS[kind].split(':')[0]}: {lost}. {ADVICE[kind]}"
    return blocks.section(
        "errors", "Mistakes",
        blocks.figure(bars, "kinds of mistakes (TIDE, Bolya et al. 2020), by hotcoco", "chart-errors"),
        shown_table(table, picks=[f"error:{row[0]}" for row in table.rows], note="; click one for its pictures"),
        shown_table(image_table(found, dataset, LISTED), picks=_shown(found, run.cfg.seed, found.worst(LISTED))),
        _suspects(found, dataset, run.cfg.seed),
        lead=lead if gained else "No mistakes that cost AP50.",
    )  # fmt: skip


def _suspects(found: Analysis, dataset: Dataset, seed: int) -> str:
    table = suspect_table(found, dataset, LISTED)
    if not table.rows:
        return blocks.paragraph("No annotation is contradicted by a sure detection.")
    return shown_table(table, picks=_shown(found, seed, [one.image for one in found.suspects[:LISTED]]))


def _shown(found: Analysis, seed: int, places: list[int]) -> list[str]:
    """The tag of each image's picture, "" where it is not among those shown."""
    pictures = chosen_pictures(found, seed)
    return [f"image:{place}" if place in pictures else "" for place in places]


def pictures(run: RunRecord) -> str:
    """Validation pictures: best, worst, random, and some of each class and kind of mistake."""
    found, dataset, results = run.analysis, run.val_set, run.results
    if found is None or dataset is None or results is None:
        return ""
    tags = chosen_pictures(found, run.cfg.seed)
    drawn, unreadable = [], 0
    for place, some in tags.items():
        record = dataset.records[place]
        try:
            image = draw_pair(record, found, place, results, dataset)
        except DataError:
            unreadable += 1
            continue
        hit, wrong, missed = found.counts[place]
        told = f"{hit} found, {wrong} false, {missed} missed, F1 {100 * found.f1[place]:.0f}"
        caption = f"{printable(record.file_name)}: {told}"
        drawn.append(GalleryPicture(image, caption, sorted(some)))
    present = {tag for some in tags.values() for tag in some}
    filters = [(tag, tag) for tag in ("worst", "best", "random", "suspect") if tag in present]
    filters += [(f"error:{kind}", KINDS[kind].split(":")[0]) for kind in KINDS if f"error:{kind}" in present]
    filters += [(f"class:{name}", name) for name in found.matches.classes if f"class:{name}" in present]
    lead = (
        f"Ground truth beside detections with a score from {found.threshold:.2f} on, the best threshold of all "
        "classes. A false detection bears the kind of its mistake; a missed object is marked in the ground truth."
    )
    notes = [blocks.notice("warn", f"{unreadable} picture(s) could not be read")] if unreadable else []
    gallery = blocks.gallery("val-pictures", drawn, filters=filters, side=WIDE, picked=True)
    return blocks.section("pictures", "Validation pictures", *notes, gallery, lead=lead)


def chosen_pictures(found: Analysis, seed: int) -> dict[int, set[str]]:
    """Places of the images that are shown, with what for: at most MOST, the worst first."""
    tags: dict[int, set[str]] = {}

    def take(places: Any, tag: str, limit: int) -> None:
        for place in list(dict.fromkeys(int(one) for one in places))[:limit]:
            if place in tags or len(tags) < MOST:
                tags.setdefault(place, set()).add(tag)

    matches, shown = found.matches, found.matches.scores >= found.threshold
    take(found.worst(WORST), "worst", WORST)
    take(found.finest(BEST), "best", BEST)
    order = np.random.default_rng(seed).permutation(len(found.f1))
    take(order, "random", RANDOM)
    take([one.image for one in found.suspects], "suspect", WORST)
    by_score = np.argsort(-matches.scores, kind="stable")
    for kind in KINDS:
        if kind == "Miss":
            take(matches.object_image[found.errors.missed], "error:Miss", EACH)
        else:
            take(matches.image[by_score[(found.errors.kind == kind)[by_score]]], f"error:{kind}", EACH)
    for label, name in enumerate(matches.classes):
        take(matches.object_image[(matches.object_label == label) & ~matches.object_ignored], f"class:{name}", EACH)
    for place, some in tags.items():  # what else they show
        some.add(f"image:{place}")
        some |= {f"class:{matches.classes[k]}" for k in matches.object_label[matches.object_image == place]}
        some |= {f"error:{kind}" for kind in found.errors.kind[(matches.image == place) & shown] if kind}
    return tags


def draw_pair(record: Record, found: Analysis, place: int, results: Results, dataset: Dataset) -> np.ndarray:
    """An image's ground truth beside its detections.  Raises DataError where the picture cannot be read."""
    small, scaled = shrunk(record.load(), record, SIDE)
    matches = found.matches
    lost = set(matches.object_ids[(matches.object_image == place) & (matches.object_index[:, 0] < 0)].tolist())
    unfound = np.array([id in lost for id in record.annotation_ids.tolist()], dtype=bool) & ~record.crowd
    names = tuple(printable(name) for name in dataset.classes)
    left = draw_ground_truth(small, scaled, names)
    if unfound.any():
        left = _marked(left, scaled, unfound, small.shape)
    rows = np.flatnonzero((matches.image == place) & (matches.scores >= found.threshold))
    rows = rows[np.argsort(matches.scores[rows], kind="stable")]  # the best on top
    some = results.take(matches.index[rows])
    boxes = some.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.tile(np.array(small.shape[1::-1]) / np.array(record.size[::-1]), 2)
    labels = [
        f"{names[label]} {score:.2f}{f' {kind}' if kind else ''}"
        for label, score, kind in zip(matches.label[rows], some.scores, found.errors.kind[rows], strict=True)
    ]
    masks = [coco_mask.decode(to_rle(one, record.size)).astype(bool) for one in some.masks() or []] or None
    right = draw_objects(small, boxes, labels, matches.label[rows].tolist(), masks if found.kind == "mask" else None)
    return side_by_side(left, right, ("ground truth", f"detections from {found.threshold:.2f}"))


def _marked(picture: np.ndarray, record: Record, which: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Put a red frame around objects; record: scaled to `size`, of which the picture may be an enlargement."""
    picture, factor = picture.copy(), picture.shape[0] / size[0]
    for box in record.boxes[which]:
        left, top, right, bottom = (round(float(side) * factor) for side in box)
        for out in (2, 3, 4):
            rows = slice(max(top - out, 0), bottom + out + 1)
            columns = slice(max(left - out, 0), right + out + 1)
            for place in (top - out, bottom + out):
                if 0 <= place < picture.shape[0]:
                    picture[place, columns] = (255, 0, 0)
            for place in (left - out, right + out):
                if 0 <= place < picture.shape[1]:
                    picture[rows, place] = (255, 0, 0)
    return picture
