"""The report's section on the annotations of data.train and data.val: classes, numbers and sizes of objects."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gndet.data.batches.crops import resized
from gndet.data.records import Dataset
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.record import RunRecord

SAMPLED = 5000  # most images of a set to look at, evenly spaced; reading the records of more would take seconds


class Labels(NamedTuple):
    """Annotations of a data set in columns; n objects, N sampled images, K classes."""

    images: int  # in the whole set
    per_image: np.ndarray  # (N,) objects per sampled image
    images_of: np.ndarray  # (K,) images with an object of the class
    labels: np.ndarray  # (n,)
    sizes: np.ndarray  # (n,) square root of the box's area in pixels, after resizing
    aspects: np.ndarray  # (n,) height / width


def read_labels(dataset: Dataset, shortest: int, longest: int) -> Labels:
    """Collect the objects of a data set, without crowds.

    shortest, longest: the edges in pixels that pictures are resized to.
    """
    images = len(dataset.records)
    records = [dataset.records[place] for place in np.linspace(0, images - 1, min(images, SAMPLED)).astype(int)]
    found = [record.labels[~record.crowd] for record in records]
    boxes = np.concatenate([record.boxes[~record.crowd] for record in records])
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(1e-6)
    per_image = np.array([len(labels) for labels in found])
    factors = [resized(record.size, shortest, longest)[0] / record.size[0] for record in records]
    return Labels(
        images=images, per_image=per_image, labels=np.concatenate(found), aspects=sides[:, 1] / sides[:, 0],
        images_of=np.bincount(np.concatenate(list(map(np.unique, found))), minlength=len(dataset.classes)),
        sizes=np.repeat(factors, per_image) * np.sqrt(sides.prod(1)),
    )  # fmt: skip


def section(run: RunRecord) -> Section:
    """Return the section with label statistics of both sets."""
    data = run.cfg.data
    sets = {
        name: read_labels(dataset, data.shortest_edge_test, data.max_edge)
        for name, dataset in (("train", run.train_set), ("val", run.val_set))
        if dataset is not None and len(dataset.records)
    }
    if not sets:
        return blocks.section("data", "Data", blocks.notice("warn", "The data could not be read, or has no image."))
    name, shown = next(iter(sets.items()))
    classes = next(dataset.classes for dataset in (run.train_set, run.val_set) if dataset is not None)
    seen = f"sizes of objects as the network sees them (shortest edge {data.shortest_edge_test})"
    figures = (
        ("per-image", shown.per_image, "objects per image", "images", False, "objects per image"),
        ("sizes", shown.sizes, "square root of a box's area, pixels", "objects", True, seen),
        ("aspects", shown.aspects, "height / width", "objects", True, "shapes of boxes"),
    )
    drawn = [
        charts.histogram(
            f"chart-{id}", values, f"{caption}, data.{name}", x_label=x_label, y_label=y_label, log_x=log_x
        )
        for id, values, x_label, y_label, log_x, caption in figures
    ]
    words = "; ".join(_words(name, labels) for name, labels in sets.items())
    return blocks.section("data", "Data", _class_table(classes, sets), blocks.beside(*drawn), lead=f"{words}.")


def _words(name: str, labels: Labels) -> str:
    sampled = len(labels.per_image)
    part = f" in the {sampled:,} evenly spaced images that are shown here" if sampled < labels.images else ""
    return f"data.{name}: {labels.images:,} images, {len(labels.labels):,} objects{part}"


def _class_table(classes: Sequence[str], sets: dict[str, Labels]) -> str:
    things = [f"{name} {thing}" for name in sets for thing in ("images", "objects")]
    shown, rows = next(iter(sets.values())), []
    for label, name in enumerate(classes):
        counts = [n for labels in sets.values() for n in (labels.images_of[label], (labels.labels == label).sum())]
        sizes = shown.sizes[shown.labels == label]
        middle, small = (np.median(sizes), (sizes < 32).mean()) if len(sizes) else (None, None)
        cells = (blocks.number(int(count), ",") for count in counts)
        rows.append([name, *cells, blocks.number(middle), blocks.percent(small)])
    return blocks.sortable_table(
        "labels", ["class", *things, "median size, px", "small %"], rows,
        "small: under 32 pixels at the network's scale",
    )  # fmt: skip
