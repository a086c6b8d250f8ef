"""What is in the data: classes, numbers and sizes of objects, from the annotations of data.train and data.val."""

import numpy as np

from gndet.data.batches.transforms import resized
from gndet.data.records import Dataset
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.record import RunRecord

LOOKED_AT = 5000  # images of a set, evenly spaced: making the records of more takes seconds
FEW = 20  # objects of a class in data.val below which its AP says little


class Labels:
    """Annotations of a data set in columns; n objects, N images, K classes."""

    def __init__(self, dataset: Dataset, shortest: int, longest: int) -> None:
        """shortest, longest: edges in pixels that pictures are resized to; sizes of objects are after resizing."""
        self.images = len(dataset.records)
        places = np.linspace(0, self.images - 1, min(self.images, LOOKED_AT)).astype(int).tolist()
        self.looked_at, classes = len(places), len(dataset.classes)
        self.per_image = np.zeros(self.looked_at, np.int64)
        self.images_of = np.zeros(classes, np.int64)  # images with an object, per class
        labels, sizes, aspects = [np.zeros(0, np.int64)], [np.zeros(0)], [np.zeros(0)]
        for number, place in enumerate(places):
            record = dataset.records[place]
            kept = ~record.crowd
            sides = (record.boxes[kept, 2:] - record.boxes[kept, :2]).clip(1e-6)
            factor = resized(record.size, shortest, longest)[0] / record.size[0]
            labels.append(record.labels[kept])
            sizes.append(factor * np.sqrt(sides.prod(1)))
            aspects.append(sides[:, 1] / sides[:, 0])
            self.per_image[number] = kept.sum()
            self.images_of[np.unique(record.labels[kept])] += 1
        self.labels, self.sizes, self.aspects = map(np.concatenate, (labels, sizes, aspects))  # (n,) each
        self.counts = np.bincount(self.labels, minlength=classes)


def section(run: RunRecord) -> str:
    """Return the section with label statistics of both sets."""
    data = run.cfg.data
    sets = {
        name: Labels(dataset, data.shortest_edge_test, data.max_edge)
        for name, dataset in (("train", run.train_set), ("val", run.val_set))
        if dataset is not None
    }
    if not sets:
        return blocks.section("data", "Data", blocks.notice("warn", "The data could not be read."))
    name, shown = next(iter(sets.items()))
    seen = f"sizes of objects as the network sees them (shortest edge {data.shortest_edge_test})"
    figures = (
        ("per-image", shown.per_image, "objects in an image", "images", False, "objects per image"),
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
    return blocks.section("data", "Data", _class_table(run, sets), blocks.beside(*drawn), lead=f"{words}.")


def _words(name: str, labels: Labels) -> str:
    """Say how many images and objects a set has."""
    text = f"data.{name}: {labels.images:,} images, {len(labels.labels):,} objects"
    if labels.looked_at == labels.images:
        return text
    return f"{text} in {labels.looked_at:,} of them, evenly spaced, which are shown here"


def _class_table(run: RunRecord, sets: dict[str, Labels]) -> str:
    dataset = run.train_set or run.val_set
    assert dataset is not None  # one of them gave the labels
    columns = ["class", *(f"{name} {things}" for name in sets for things in ("images", "objects"))]
    shown, rows = next(iter(sets.values())), []
    for label, name in enumerate(dataset.classes):
        sizes = shown.sizes[shown.labels == label]
        counts = [blocks.count(int(n[label])) for labels in sets.values() for n in (labels.images_of, labels.counts)]
        middle, small = (float(np.median(sizes)), float((sizes < 32).mean())) if len(sizes) else (None, None)
        rows.append([name, *counts, blocks.number(middle), blocks.percent(small)])
    columns += ["median size, px", "small %"]
    return blocks.sortable_table("labels", columns, rows, "small: under 32 pixels at the network's scale")


def few_objects(run: RunRecord) -> list[str]:
    """Return the classes with few objects in data.val."""
    if run.analysis is None:
        return []
    return [row["name"] for row in run.analysis.metrics.per_class if row["num_objects"] < FEW]
