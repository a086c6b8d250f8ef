"""A run does not go on with other data unseen: what changes the training is refused, what may not is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from faults.tiny import CONFIG
from hostile import Hostile
from PIL import Image

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.config.loading import load_config
from gndet.distributed.process import Process
from gndet.errors import TrainingError
from gndet.training.checkpointing import Saver, restore
from gndet.training.run import Progress, Run
from gndet.training.setup import build_run

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin")]
SIDE = 64


class Data:
    """The sets train and val on the disk, and a run that was saved after an update on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sets = folder, {}
        for name in ("train", "val"):
            data = self.sets[name] = Hostile(folder / name)
            for color in range(3):
                values = np.random.default_rng(color).integers(0, 255, (30, 40, 3), dtype=np.uint8)
                data.image(Image.fromarray(values[: 30 - color]).resize((40, 30)))
            data.write()
        tree = yaml.safe_load(yaml.safe_dump(CONFIG))
        part = {"kind": "coco", "annotations": "file.json", "images": "pictures"}
        tree["data"] |= {
            which: part | {"annotations": f"{which}/file.json", "images": f"{which}/pictures"}
            for which in ("train", "val")
        } | {"root": str(folder), "keep_empty": True}  # fmt: skip
        (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
        Saver(self.run(), 9, print).save(Progress(update=1), at_once=True)

    def run(self) -> Run:
        cfg = load_config(self.folder / "tiny.yaml", [f"out={self.folder / 'run'}"])
        (self.folder / "run").mkdir(exist_ok=True)
        return build_run(cfg, self.folder / "run", Process(0, 1, torch.device("cpu")), None)[0]

    def go_on(self) -> list[str]:
        """Restore the saved run on the data as it is now.  Returns the lines that are said."""
        return restore(self.run(), load_checkpoint(self.folder / "run" / "checkpoints" / "update-0000001"))[1]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def swap_names(data: Hostile) -> None:
    one, other = data.tree["images"][1:3]
    one["file_name"], other["file_name"] = other["file_name"], one["file_name"]


def swap_files(data: Hostile) -> None:
    one, other = (data.pictures / image["file_name"] for image in data.tree["images"][1:3])
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def replace_picture(data: Hostile) -> None:
    Image.new("RGB", (40, 30)).save(data.pictures / data.tree["images"][1]["file_name"])


def change_area(data: Hostile) -> None:
    data.tree["annotations"][1]["area"] = 50


def change_mask(data: Hostile) -> None:
    data.tree["annotations"][1]["segmentation"] = [[2, 2, 12, 2, 12, 12]]


def renumber_categories(data: Hostile) -> None:
    for category in data.tree["categories"]:
        category["id"] += 10
    for annotation in data.tree["annotations"]:
        annotation["category_id"] += 10


def change_box(data: Hostile) -> None:
    data.tree["annotations"][1]["bbox"] = [2, 2, 10, 9]


REFUSED = {swap_names: "of other file names", change_mask: "other images or objects", change_box: "other images"}
SAID = (swap_files, replace_picture)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_other_training_data_is_refused(data: Data, change: Callable[[Hostile], Any]) -> None:
    assert data.go_on() == []
    change(data.sets["train"])
    data.sets["train"].write()
    with pytest.raises(TrainingError, match=f"trained on .*{REFUSED[change]}"):
        data.go_on()


@pytest.mark.parametrize("change", SAID, ids=lambda change: change.__name__)
def test_other_pictures_to_train_on_are_said(data: Data, change: Callable[[Hostile], Any]) -> None:
    """They are not refused: a picture that could not be read may be restored while a run is stopped."""
    change(data.sets["train"])
    (line,) = data.go_on()
    assert "train/file.json: picture files differ from those before" in line


CHANGES = (swap_names, swap_files, replace_picture, change_area, change_mask, renumber_categories, change_box)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_other_validation_data_is_said(data: Data, change: Callable[[Hostile], Any]) -> None:
    change(data.sets["val"])
    data.sets["val"].write()
    (line,) = data.go_on()
    assert "val/file.json: differs from the data of earlier evaluations" in line


def test_what_does_not_matter_is_not_spoken_of(data: Data) -> None:
    change_area(data.sets["train"])  # no loss uses it
    data.sets["train"].write()
    data.sets["val"].tree["info"] = []
    data.sets["val"].write()
    moved = data.folder / "train" / "moved"
    (data.folder / "train" / "pictures").rename(moved)
    (data.folder / "train" / "pictures").symlink_to(moved)
    assert data.go_on() == []


def test_checkpoints_without_these_hashes_are_taken(data: Data) -> None:
    saved = load_checkpoint(data.folder / "run" / "checkpoints" / "update-0000001")
    for key in ("names", "pictures", "val_rest"):
        del saved.meta[key]
    save_checkpoint(saved.path, saved.groups, saved.meta)
    change_area(data.sets["val"])
    data.sets["val"].write()
    swap_names(data.sets["train"])
    data.sets["train"].write()
    assert data.go_on() == []
    change_box(data.sets["val"])
    data.sets["val"].write()
    assert len(data.go_on()) == 1
    assert json.loads((saved.path / "meta.json").read_text())["data"]
