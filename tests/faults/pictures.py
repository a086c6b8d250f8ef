"""T19 and T22: pictures that go bad after the check, and data sets with hardly anything to learn."""

import json
import math
import signal
from pathlib import Path
from typing import Any

from PIL import Image

from faults.launch import finish, start
from faults.tiny import check, check_same, newest_update
from gndet.checkpoint import load_checkpoint
from gndet.config.data import DatasetConfig
from gndet.data.datasets.shapes import read_shapes
from gndet.training.log import read_metrics


def write_coco(folder: Path, name: str, count: int, classes: int = 4) -> tuple[str, ...]:
    """Write a data set of drawn pictures in COCO's format.  Returns the overrides that train and evaluate on it.

    classes: how many of the 4 classes are kept; 0: one class without any objects.
    """
    drawn = read_shapes(DatasetConfig(kind="shapes", count=count, size=64, seed=1))
    home = folder / name
    (home / "pictures").mkdir(parents=True)
    tree: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    for label in range(max(classes, 1)):
        tree["categories"].append({"id": label + 1, "name": drawn.classes[label]})
    for record in drawn.records:
        Image.fromarray(record.load()).save(home / "pictures" / record.file_name)
        height, width = record.size
        tree["images"].append({"id": record.image_id, "file_name": record.file_name, "height": height, "width": width})
        for i, label in enumerate(record.labels):
            x0, y0, x1, y1 = map(float, record.boxes[i])
            if label < classes:
                tree["annotations"].append({
                    "id": int(record.annotation_ids[i]), "image_id": record.image_id, "category_id": int(label) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(record.area[i]), "iscrowd": 0,
                    "segmentation": record.segmentations[i],
                })  # fmt: skip
    (home / "file.json").write_text(json.dumps(tree), encoding="utf-8")
    sets = [f"data.{which}.{key}" for which in ("train", "val") for key in ("kind=coco", "annotations=file.json")]
    pictures = [f"data.{which}.images=pictures" for which in ("train", "val")]
    return (f"data.root={home}", *sets, *pictures)


def gone_bad(folder: Path) -> str:
    """T19."""
    words = [word for word in write_coco(folder, "set", 8) if not word.startswith("data.val.")]
    options = (*words, "train.schedule.updates=10")
    picture = folder / "set" / "pictures" / "shapes-1-000005.png"
    whole = picture.read_bytes()
    allowed = (*options, "data.max_unreadable=0.2")
    for name, size, workers in (("cut", 100, 0), ("cut-workers", 100, 2), ("removed", -1, 2), ("stopped", 100, 0)):
        picture.write_bytes(whole)
        faults: dict[str, list[Any]] = {"spoil_picture": [str(picture), size]}
        words = (*allowed, f"data.workers={workers}")
        if name == "stopped":
            start(folder, name, *words, faults=faults | {"signal_after": [int(signal.SIGTERM), 6]}).expect(0)
            faults = {}
        text = finish(folder, name, *words, faults=faults)
        count = text.count("image 1000006 cannot be read, another takes its place")
        check(count == 1 or name == "stopped", f"{name}: reported {count} times, expected once: {text}")
        check("left out: 1 training image(s) that cannot be read" in text, f"{name}: not reported at the end: {text}")
        unreadable = load_checkpoint(folder / name / "last").meta["unreadable"]
        check(list(unreadable) == ["1000006"], f"{name}: counted were {unreadable}")
        if name in ("cut-workers", "stopped"):
            check_same(folder / name, folder / "cut", name)
    picture.write_bytes(whole)
    run = start(folder, "strict", *options, faults={"spoil_picture": [str(picture), 100]})
    text = run.expect(2)
    check("1 of 8 training images cannot be read, more than data.max_unreadable: 0.01" in text, f"not reported: {text}")
    saved = newest_update(run.out)
    picture.write_bytes(whole)
    check("continuing after update" in finish(folder, "strict", *options), "does not resume after the file is repaired")
    return (
        "cut short or removed in mid-run: another took its place, counted, status 0, the same with 0 and 2 loader "
        f"processes and after a stop; over data.max_unreadable: status 2, saved at update {saved}, repaired, resumed"
    )


def hardly_anything(folder: Path) -> str:
    """T22."""
    cases = {
        "all-negative": (6, 0, ("data.keep_empty=true",)),
        "one-class": (6, 1, ()),
        "one-image": (1, 4, ()),
        "fewer-than-a-batch": (3, 4, ("train.global_batch=4", "train.schedule.reference_batch=4")),
    }
    for name, (count, classes, more) in cases.items():
        options = (*write_coco(folder, f"{name}-set", count, classes), *more, "train.eval_every=3")
        finish(folder, name, *options)
        lines = read_metrics(folder / name / "metrics.jsonl")
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        check(len(losses) == 6 and None not in losses, f"{name}: losses {losses}")
        evaluations = [line["box/AP"] for line in lines if line["kind"] == "evaluation"]
        check(len(evaluations) == 2, f"{name}: evaluations {evaluations}")
        check(
            (None in evaluations) == (classes == 0),
            f"{name}: AP {evaluations}, expected undefined if there are no objects",
        )
        for link in ("best", "last"):
            meta = load_checkpoint(folder / name / link).meta
            check(math.isfinite(meta["best"]), f"{name}/{link}: best {meta['best']}")
    return f"{', '.join(cases)}: trained and evaluated, losses finite, best and last exist"
