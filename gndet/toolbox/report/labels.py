"""What is in the data: classes, numbers and sizes of objects, by the annotations of data.train and data.val."""

import numpy as np

from gndet.data.batches.transforms import resized
from gndet.data.records import Dataset
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.record import RunRecord

LOOKED_AT = 5000  # images of a set, evenly spread: making the records of more takes seconds
FEW = 20  # objects of a class in data.val below which its AP says little


class Labels:
    """Annotations of a data set in columns; n objects, N images."""

    def __init__(self, dataset: Dataset, shortest: int, longest: int) -> None:
        """shortest, longest: edges that pictures are resized to, pixels; sizes of objects are given after it."""
        total = len(dataset.records)
        places = range(total) if total <= LOOKED_AT else np.linspace(0, total - 1, LOOKED_AT).astype(int).tolist()
        labels, sizes, aspects, per_image, classes_of = [], [], [], [], []
        for place in places:
            record = dataset.records[place]
            kept = ~record.crowd
            boxes = record.boxes[kept]
            sides = (boxes[:, 2:] - boxes[:, :2]).clip(1e-6)
            factor = resized(record.size, shortest, longest)[0] / record.size[0]
            labels.append(record.labels[kept])
            sizes.append(factor * np.sqrt(sides.prod(1)))
            aspects.append(sides[:, 1] / sides[:, 0])
            per_image.append(int(kept.sum()))
            classes_of.append(np.unique(record.labels[kept]))
        none = [np.zeros(0)]
        self.looked_at, self.images = len(per_image), total
        self.labels = np.concatenate([*labels, np.zeros(0, np.int64)])
        self.sizes, self.aspects = np.concatenate(sizes + none), np.concatenate(aspects + none)
        self.per_image = np.array(per_image)
        self.counts = np.bincount(self.labels, minlength=len(dataset.classes))
        self.images_of = np.bincount(
            np.concatenate([*classes_of, np.zeros(0, np.int64)]), minlength=len(dataset.classes)
        )


def section(run: RunRecord) -> str:
    """Label statistics of both sets."""
    data = run.cfg.data
    sets = {
        name: Labels(dataset, data.shortest_edge_test, data.max_edge)
        for name, dataset in (("train", run.train_set), ("val", run.val_set))
        if dataset is not None
    }
    if not sets:
        return blocks.section("data", "Data", blocks.notice("warn", "The data could not be read."))
    main = "train" if "train" in sets else "val"
    words = "; ".join(
        f"data.{name}: {one.images:,} images, {len(one.labels):,} objects"
        + (
            f" in {one.looked_at:,} of them, evenly spread, which is what is shown here"
            if one.looked_at < one.images
            else ""
        )
        for name, one in sets.items()
    )
    shown = sets[main]
    figures = [
        blocks.figure(
            charts.histogram("per-image", shown.per_image, x_label="objects in an image", y_label="images"),
            f"objects an image, data.{main}",
            "chart-per-image",
        ),
        blocks.figure(
            charts.histogram(
                "sizes", shown.sizes, x_label="square root of a box's area, pixels", y_label="objects", log_x=True
            ),
            f"sizes of objects as the network sees them (shortest edge {data.shortest_edge_test}), data.{main}",
            "chart-sizes",
        ),
        blocks.figure(
            charts.histogram("aspects", shown.aspects, x_label="height / width", y_label="objects", log_x=True),
            f"shapes of boxes, data.{main}",
            "chart-aspects",
        ),
    ]
    return blocks.section("data", "Data", _class_table(run, sets), blocks.beside(*figures), lead=f"{words}.")


def _class_table(run: RunRecord, sets: dict[str, Labels]) -> str:
    dataset = run.train_set or run.val_set
    assert dataset is not None  # one of them gave the labels
    columns, rows = ["class"], []
    for name in sets:
        columns += [f"{name} images", f"{name} objects"]
    columns += ["median size, px", "small %"]
    merged = next(iter(sets.values()))
    for label, name in enumerate(dataset.classes):
        sizes = merged.sizes[merged.labels == label]
        row = [name]
        for one in sets.values():
            row += [blocks.count(int(one.images_of[label])), blocks.count(int(one.counts[label]))]
        middle = float(np.median(sizes)) if len(sizes) else None
        rows.append([*row, blocks.number(middle), blocks.percent(float((sizes < 32).mean()) if len(sizes) else None)])
    return blocks.sortable_table("labels", columns, rows, "small: under 32 pixels at the network's scale")


def few_objects(run: RunRecord) -> list[str]:
    """Classes whose AP rests on few objects of data.val."""
    if run.analysis is None:
        return []
    return [row["name"] for row in run.analysis.metrics.per_class if row["num_objects"] < FEW]
