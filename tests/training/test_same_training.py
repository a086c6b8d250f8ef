"""The same data as COCO JSON, YOLO, VOC, CVAT, LabelMe and VIA: the same training, and the same AP."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import coco_tree
from faults.tiny import CONFIG

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import config_from_dict
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.reading import read_dataset
from gndet.evaluation.coco_metrics import coco_metrics, coco_truths
from gndet.evaluation.results import from_coco
from gndet.train import train
from gndet.training.log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]
NUM = 16  # images
Boxes = list[tuple[str, list[float]]]  # class, [x0, y0, x1, y1]


def images_of(data_root: Path) -> dict[str, Boxes]:
    """Return the boxes of the first images of the blood cells, by file name."""
    tree = coco_tree(data_root / "bccd", "val")
    names = {category["id"]: category["name"] for category in tree["categories"]}
    first = sorted(tree["images"], key=lambda image: image["file_name"])[:NUM]
    found: dict[str, Boxes] = {image["file_name"]: [] for image in first}
    by_id = {image["id"]: image["file_name"] for image in first}
    for item in tree["annotations"]:
        if item["image_id"] in by_id:
            x, y, width, height = item["bbox"]
            found[by_id[item["image_id"]]].append((names[item["category_id"]], [x, y, x + width, y + height]))
    return found


def write_coco(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    sides = {"height": size[0], "width": size[1]}
    entries = [{"id": i, "file_name": name} | sides for i, name in enumerate(images, start=1)]
    rows = [(i, *item) for i, items in enumerate(images.values(), start=1) for item in items]
    annotations = [
        {"id": n, "image_id": i, "category_id": classes.index(name) + 1, "iscrowd": 0,
         "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for n, (i, name, (x0, y0, x1, y1)) in enumerate(rows, start=1)
    ]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    tree = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "result.json").write_text(json.dumps(tree))


def write_yolo(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("\n".join(classes))
    for name, items in images.items():
        rows = []
        for label, (x0, y0, x1, y1) in items:
            numbers = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / np.tile(size[::-1], 2)
            rows.append(f"{classes.index(label)} " + " ".join(f"{number:.17g}" for number in numbers))
        (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(rows))


def write_voc(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    (folder / "Annotations").mkdir()
    for name, items in images.items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
            f"<ymax>{y1}</ymax></bndbox></object>"
            for label, (x0, y0, x1, y1) in items
        )
        sides = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{sides}{objects}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(text)


def write_cvat(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    labels = "".join(f"<label><name>{name}</name></label>" for name in classes)
    text = f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    for i, (name, items) in enumerate(images.items()):
        shapes = "".join(
            f'<box label="{label}" occluded="0" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" z_order="0"/>'
            for label, (x0, y0, x1, y1) in items
        )
        text += f'<image id="{i}" name="{name}" width="{size[1]}" height="{size[0]}">{shapes}</image>'
    (folder / "annotations.xml").write_text(f"{text}</annotations>")


def write_labelme(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    for name, items in images.items():
        shapes = [
            {"label": label, "points": [box[:2], box[2:]], "group_id": None, "shape_type": "rectangle", "flags": {}}
            for label, box in items
        ]
        tree: dict[str, Any] = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"images/{name}"}
        tree |= {"imageData": None, "imageHeight": size[0], "imageWidth": size[1]}
        (folder / name).with_suffix(".json").write_text(json.dumps(tree))


def write_via(folder: Path, images: dict[str, Boxes], classes: list[str], size: tuple[int, int]) -> None:
    def region(label: str, box: list[float]) -> dict[str, Any]:
        x0, y0, x1, y1 = box
        shape = {"name": "rect", "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        return {"shape_attributes": shape, "region_attributes": {"cell": label}}

    tree = {
        f"{name}-1": {"filename": name, "size": -1, "file_attributes": {}, "regions": [region(*item) for item in items]}
        for name, items in images.items()
    }
    (folder / "via_region_data.json").write_text(json.dumps(tree))


WRITERS: dict[str, Callable[..., None]] = {
    "coco": write_coco, "yolo": write_yolo, "voc": write_voc, "cvat": write_cvat, "labelme": write_labelme,
    "via": write_via,
}  # fmt: skip


def export(data_root: Path, folder: Path, kind: str) -> Path:
    """Write an export with its pictures.  Returns its folder."""
    images = images_of(data_root)
    (folder / "data" / "images").mkdir(parents=True)
    for name in images:
        shutil.copy(data_root / "bccd" / "val" / name, folder / "data" / "images")
    classes = sorted({label for items in images.values() for label, _ in items})
    WRITERS[kind](folder / "data", images, classes, (480, 640))
    return folder / "data"


def trained(data_root: Path, folder: Path, kind: str) -> tuple[list[float], dict[str, float]]:
    """Write an export, and train ten updates on it.  Returns the losses and the metrics."""
    root = export(data_root, folder, kind)
    tree = deepcopy(CONFIG)
    tree["model"] |= {"masks": False}
    tree["data"] = {
        "root": str(root), "val": {"share": 0.25}, "shortest_edge": [64], "shortest_edge_test": 64,
        "max_edge": 96, "workers": 0,
    }  # fmt: skip
    tree["train"] |= {"schedule": {"updates": 10, "warmup": 2, "reference_batch": 2}, "log_every": 1}
    tree |= {"out": str(folder / "run")}
    metrics = train(config_from_dict(tree, "test"))
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"], metrics


@pytest.fixture(scope="module")
def truth(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, float]]:
    return trained(data_root, tmp_path_factory.mktemp("coco"), "coco")


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "coco"])
def test_ten_updates_and_the_ap_are_those_of_the_coco_file(
    data_root: Path, tmp_path: Path, truth: tuple[list[float], dict[str, float]], kind: str
) -> None:
    losses, metrics = trained(data_root, tmp_path, kind)
    assert len(losses) == 10 and np.isfinite(losses).all()
    np.testing.assert_allclose(losses, truth[0], rtol=1e-6)
    assert metrics.keys() == truth[1].keys()
    np.testing.assert_allclose([*metrics.values()], [*truth[1].values()], rtol=1e-6)


@pytest.mark.parametrize("kind", WRITERS)
def test_detections_beside_the_objects_have_the_ap_that_they_have_on_the_coco_file(
    data_root: Path, tmp_path: Path, kind: str
) -> None:
    """After ten updates AP is nearly 0, so this takes the boxes of the COCO file, moved and scored at random."""
    sets = [
        read_dataset(
            DatasetConfig(split="train"), DataConfig(root=str(export(data_root, tmp_path / name, name)), cache="")
        )
        for name in dict.fromkeys(("coco", kind))
    ]
    rng = np.random.default_rng(0)
    found = [
        {"image_id": item["image_id"], "category_id": item["category_id"], "score": float(rng.uniform()),
         "bbox": (np.array(item["bbox"]) + rng.normal(0, 0.1, 4) * item["bbox"][2]).tolist()}
        for item in to_coco(sets[0])["annotations"]
    ]  # fmt: skip
    scores = [
        coco_metrics(coco_truths(one, masks=False), from_coco(found), engine="hotcoco", max_detections=100)[
            "bbox"
        ].summary
        for one in sets
    ]
    assert 0.2 < scores[0]["AP"] < 0.8 and scores[0] == pytest.approx(scores[-1], abs=1e-9)
