"""The report's sections on mistakes and on validation pictures: ground truth beside detections, by kind of mistake."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from gndet.config.model import ModelConfig
from gndet.data.records import Dataset, Record
from gndet.errors import in_one_line
from gndet.evaluation.drawing import draw_ground_truth, draw_objects, shrunk, side_by_side
from gndet.evaluation.fonts import class_name
from gndet.evaluation.results import Results
from gndet.text import printable
from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.errors import KINDS, TITLES
from gndet.toolbox.analysis.tables import error_table, image_table, suspect_table
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import GalleryPicture, Section
from gndet.toolbox.report.quality import shown_table
from gndet.toolbox.report.record import RunRecord

Tags = dict[int, set[str]]  # of the pictures to show, by index in the data set

BEST, WORST, RANDOM, EACH = 6, 12, 6, 3  # pictures; EACH is per class and per kind of mistake
MOST, MOST_FILTERS = 48, 60  # pictures in total, and buttons; a click on a row of the tables selects other classes
SIDE = 480  # pixels of a picture's longer side
WIDE = 980  # pixels of two pictures side by side
LISTED = 50  # rows
ADVICE = {
    "Cls": "Classes are confused: look at the confusion matrix, merge or relabel classes that look alike, or add "
    "images of rare classes.",
    "Loc": "Boxes are loose: try a longer schedule, larger pictures, or tighter annotations.",
    "Both": "Detections near objects have the wrong class and a poor box: usually too little training or too few "
    "examples.",
    "Dupe": "Objects are found twice: lower model.{head}.nms_threshold.",
    "Bkg": "Detections lie where nothing is annotated: look for objects that were not annotated, and also train on "
    "images without objects (data.keep_empty).",
    "Miss": "Objects are missed: small or crowded objects need larger pictures (data.shortest_edge) or smaller "
    "model.{anchors}.anchor_sizes.",
}  # fmt: skip


def advice(kind: str, model: ModelConfig) -> str:
    """Return what helps against the mistakes of a kind, with the names of the model's options."""
    return ADVICE[kind].format(head=model.final_head, anchors=model.anchored)


def section(run: RunRecord) -> Section | None:
    """Return the section with kinds of mistakes, the worst images, and annotations that may be wrong.

    Returns None if detections or data are missing.
    """
    found, dataset = run.analysis, run.val_set
    if found is None or dataset is None:
        return None
    tags = chosen_pictures(found, run.cfg.seed)

    def picks(images: Iterable[int]) -> list[str]:
        return [f"image:{image}" if image in tags else "" for image in images]

    table, suspects = error_table(found), suspect_table(found, dataset, LISTED)
    bars = charts.bars(
        "chart-errors", [row[0] for row in table.rows], [100 * (row[3] or 0) for row in table.rows],
        "kinds of mistakes (TIDE, Bolya et al. 2020), computed by hotcoco",
        x_label="AP50 that fixing all of one kind would gain, points",
    )  # fmt: skip
    kind, _, count, gained = table.rows[0]
    lost = f"{count:,} mistakes, {100 * (gained or 0):.1f} points of AP50"
    return blocks.section(
        "errors", "Mistakes", bars,
        shown_table(table, picks=[f"error:{row[0]}" for row in table.rows], note="; click a row for its pictures"),
        shown_table(image_table(found, dataset, LISTED), picks=picks(found.worst(LISTED))),
        shown_table(suspects, picks=picks(suspect.image for suspect in found.suspects[:LISTED]))
        if suspects.rows else blocks.paragraph("No annotation is contradicted by a confident detection."),
        lead=f"The costliest kind is {TITLES[kind]}: {lost}. {advice(kind, run.cfg.model)}"
        if gained else "No mistake costs AP50.",
    )  # fmt: skip


def pictures_section(run: RunRecord) -> Section | None:
    """Return the section of validation pictures: best, worst, random, and a few per class and kind of mistake.

    Returns None if detections or data are missing.
    """
    found, dataset, results = run.analysis, run.val_set, run.results
    if found is None or dataset is None or results is None:
        return None
    tags = chosen_pictures(found, run.cfg.seed)
    drawn, undrawn = [], []
    for index, names in tags.items():
        record = dataset.records[index]
        try:
            image = draw_pair(record, found, index, results, dataset)
        except Exception as error:  # the other pictures stand
            undrawn.append(in_one_line(error))
            continue
        hit, wrong, missed = found.counts[index]
        counts = f"{hit} found, {wrong} false, {missed} missed, F1 {100 * found.f1[index]:.0f}"
        drawn.append(GalleryPicture(image, f"{printable(record.file_name)}: {counts}", sorted(names)))
    filters = {tag: tag for tag in ("worst", "best", "random", "suspect")}
    filters |= {f"error:{kind}": title for kind, title in TITLES.items()}
    filters |= {f"class:{label}": printable(name) for label, name in enumerate(found.matches.classes)}
    present = set().union(*tags.values())
    lead = (
        f"Ground truth beside the detections that score at least {found.threshold:.2f}, the best threshold over all "
        "classes. A false detection is labeled with its kind of mistake. An object that no detection matches, "
        "whatever its score, has a red frame in the ground truth."
    )
    undrawn_words = f"{len(undrawn)} picture(s) could not be drawn; the first: {undrawn[0]}" if undrawn else ""
    notes = [blocks.notice("warn", undrawn_words)] if undrawn else []
    shown = [(tag, name) for tag, name in filters.items() if tag in present]
    gallery = blocks.gallery("val-pictures", drawn, filters=shown[:MOST_FILTERS], side=WIDE)
    return blocks.section("pictures", "Validation pictures", *notes, gallery, lead=lead)


def chosen_pictures(found: Analysis, seed: int) -> Tags:
    """Return the indices of at most MOST images to show, with their tags, the worst first."""
    matches, errors = found.matches, found.errors
    by_score = np.argsort(-matches.scores, kind="stable")
    wanted: list[tuple[str, int, Iterable[int]]] = [
        ("worst", WORST, found.worst(WORST)),
        ("best", BEST, found.finest(BEST)),
        ("random", RANDOM, np.random.default_rng(seed).permutation(len(found.f1))),
        ("suspect", WORST, [suspect.image for suspect in found.suspects]),
    ]
    wanted += [(f"error:{kind}", EACH, matches.image[by_score[errors.kind[by_score] == kind]]) for kind in KINDS]
    wanted.append(("error:Miss", EACH, matches.object_image[errors.missed]))
    for label in np.unique(matches.object_label).tolist():
        objects = (matches.object_label == label) & ~matches.object_ignored
        wanted.append((f"class:{label}", EACH, matches.object_image[objects]))
    tags: Tags = {}
    for tag, limit, images in wanted:
        for image in list(dict.fromkeys(map(int, images)))[:limit]:
            if image in tags or len(tags) < MOST:
                tags.setdefault(image, set()).add(tag)
    shown = matches.scores >= found.threshold
    for image, names in tags.items():  # add tags for everything else that the image shows
        names.add(f"image:{image}")
        names |= {f"class:{label}" for label in matches.object_label[matches.object_image == image]}
        names |= {f"error:{kind}" for kind in errors.kind[(matches.image == image) & shown] if kind}
    return tags


def draw_pair(record: Record, found: Analysis, index: int, results: Results, dataset: Dataset) -> np.ndarray:
    """Draw an image's ground truth beside its detections.  Raises DataError if the picture cannot be read."""
    small = shrunk(record.load(), SIDE)
    matches = found.matches
    lost = set(matches.object_ids[(matches.object_image == index) & (matches.object_index[:, 0] < 0)].tolist())
    unfound = np.array([id in lost for id in record.annotation_ids.tolist()], dtype=bool) & ~record.crowd
    names = tuple(printable(name) for name in dataset.classes)
    left = draw_ground_truth(small, record, names)
    if unfound.any():
        left = _marked(left, record, unfound)
    rows = np.flatnonzero((matches.image == index) & (matches.scores >= found.threshold))
    rows = rows[np.argsort(matches.scores[rows], kind="stable")]  # the best on top
    taken = results.take(matches.index[rows])
    boxes = taken.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    labels = [
        f"{class_name(names, label)} {score:.2f}{f' {kind}' if kind else ''}"
        for label, score, kind in zip(matches.label[rows], taken.scores, found.errors.kind[rows], strict=True)
    ]
    codes = (taken.masks() or ()) if found.kind == "mask" else ()
    right = draw_objects(small, boxes, labels, matches.label[rows].tolist(), codes, record.size)
    return side_by_side(left, right, ("ground truth", f"detections, score >= {found.threshold:.2f}"))


def _marked(picture: np.ndarray, record: Record, which: np.ndarray) -> np.ndarray:
    """Draw a red frame around objects.  The picture may be smaller or larger than the record's."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for box in record.boxes[which]:
        left, top, right, bottom = (round(float(side) * picture.shape[0] / record.size[0]) for side in box)
        draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), outline=(255, 0, 0), width=3)
    return np.asarray(image)
