"""Pictures in a folder per class are read as ImageNet is laid out, and what is wrong is named."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from classes import COLORS, write_classes

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.datasets.reading import inspect_both, inspect_dataset, read_dataset
from gndet.errors import ConfigError, DataError
from gndet.training.task import read_both


def data_of(root: Path, **changes: object) -> DataConfig:
    return Config.model_validate({"task": "classification", "data": {"root": str(root), "cache": "", **changes}}).data


def refused(data: DataConfig, which: str = "val") -> set[str]:
    return {finding.code for finding in inspect_dataset(getattr(data, which), data).findings if finding.severity == "E"}


def test_the_classes_are_the_folders_and_each_picture_has_one(tmp_path: Path) -> None:
    data = data_of(write_classes(tmp_path / "set"))
    train, val = inspect_both(data, masks=False)
    assert train.classes == val.classes == ("blue", "green", "red") and not train.findings
    assert [record.file_name for record in val.records][:2] == ["blue/val-blue-0.png", "blue/val-blue-1.png"]
    for record in train.records:
        (label,) = record.labels
        assert record.boxes.tolist() == [[0, 0, 48, 40]] and record.file_name.startswith(train.classes[label])
        mean = record.load()[:36].reshape(-1, 3).mean(0)  # whole stripes
        assert np.abs(mean - COLORS[train.classes[label]]).max() < 10


def test_a_list_sets_the_order_of_the_classes(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "classes.txt").write_text("red\n\nblue\ngreen\n")
    data = data_of(tmp_path)
    dataset = read_dataset(data.val, data)
    assert dataset.classes == ("red", "blue", "green") and dataset.records[0].labels.tolist() == [1]


LISTS = {  # file, its text, the classes in order, and the classes of the folders blue, green and red
    "folder and name": (
        "classes.txt", "red ripe, really\nblue\tthe sea\n\ngreen\n", ("ripe, really", "the sea", "green"),
        ("the sea", "green", "ripe, really"),
    ),
    "a class without a folder": (
        "classes.txt", "red\nred fox\nblue\ngreen\n", ("red", "red fox", "blue", "green"), ("blue", "green", "red"),
    ),
    "synsets": (
        "LOC_synset_mapping.txt", "n01440764 tench\nred crane, bird\nblue crane\n",
        ("crane (blue)", "green", "crane (red)"), ("crane (blue)", "green", "crane (red)"),
    ),
    "index": (
        "imagenet_class_index.json", '{"0": ["red", "rose"], "1": ["blue", "sky"]}', ("sky", "green", "rose"),
        ("sky", "green", "rose"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "classes", "by_folder"), LISTS.values(), ids=LISTS)
def test_a_list_gives_folders_readable_names(
    tmp_path: Path, name: str, text: str, classes: tuple[str, ...], by_folder: tuple[str, ...]
) -> None:
    folders = dict(zip(("blue", "green", "red"), by_folder, strict=True))
    write_classes(tmp_path, {"train": 2, "val": 1})
    (tmp_path / name).write_text(text)
    data = data_of(tmp_path, cache=str(tmp_path.parent / "cache"))
    for dataset in (*inspect_both(data, masks=False), read_dataset(data.val, data)):
        assert dataset.classes == classes
        found = {record.file_name.partition("/")[0]: dataset.classes[record.labels[0]] for record in dataset.records}
        assert found == folders
    (tmp_path / name).unlink()
    assert read_dataset(data.val, data).classes == ("blue", "green", "red")  # the cache noticed


def test_an_index_of_another_form_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 1})
    (tmp_path / "imagenet_class_index.json").write_text('{"0": "tench"}')
    data = data_of(tmp_path)
    with pytest.raises(DataError, match=r'imagenet_class_index\.json: expected \{"0": \["n01440764", "tench"\]'):
        read_dataset(data.train, data)


def test_a_set_alone_and_a_share_of_train(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 5})
    data = data_of(tmp_path, val={"share": 0.4})
    train, val = inspect_both(data, masks=False)
    assert (len(train.records), len(val.records)) == (9, 6) and train.classes == val.classes
    alone = data_of(tmp_path / "train", train={"kind": "folders"})
    assert len(read_dataset(alone.train, alone).records) == 15


def test_the_cache_notices_a_new_picture(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "set")
    data = data_of(root, cache=str(tmp_path / "cache"))
    assert len(read_dataset(data.train, data).records) == len(read_dataset(data.train, data).records) == 15
    (root / "train" / "red" / "train-red-0.png").rename(root / "train" / "red" / "another.png")
    write_classes(tmp_path / "more", {"train": 1})
    (tmp_path / "more" / "train" / "red" / "train-red-0.png").rename(root / "train" / "red" / "new.png")
    dataset = read_dataset(data.train, data)
    assert len(dataset.records) == 16 and {"red/new.png", "red/another.png"} <= {r.file_name for r in dataset.records}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    root = write_classes(tmp_path)
    (root / "train" / "red").rename(tmp_path / "aside")
    assert refused(data_of(root)) == {"class-unknown"}
    (root / "train" / "red").mkdir()
    assert refused(data_of(root), "train") == {"class-empty"}
    (root / "val" / "blue" / "val-blue-0.png").write_bytes(b"no picture")
    (root / "val" / "blue" / "val-blue-1.png").write_bytes(b"")
    assert refused(data_of(root)) == {"picture-unreadable", "file-empty"}
    with pytest.raises(DataError, match=r"no val \(val or valid or validation\); it has train"):
        (root / "val").rename(tmp_path / "gone")
        read_both(load(root))
    with pytest.raises(DataError, match="holds no folder of a class"):
        empty = data_of(tmp_path / "nowhere")
        read_dataset(empty.train, empty)


def test_a_single_class_is_refused_and_a_level_too_many_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "set", {"train": 3})
    (tmp_path / "root" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train").rename(tmp_path / "root" / "train" / "images")
    data = data_of(tmp_path / "root")
    assert refused(data, "train") == {"class-single"}
    with pytest.raises(DataError, match=r"images, which holds folders: \w+, \w+.*; is data.root one level too high\?"):
        read_dataset(data.train, data)


def load(root: Path) -> Config:
    return Config.model_validate({"task": "classification", "data": {"root": str(root), "cache": ""}})


def test_a_subset_of_the_classes_leaves_the_other_pictures_without_one(tmp_path: Path) -> None:
    data = data_of(write_classes(tmp_path), classes=["red", "blue"])
    dataset = read_dataset(data.val, data)
    assert dataset.classes == ("red", "blue")
    assert sorted(label for record in dataset.records for label in record.labels.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"task": "classification", "model": {"detector": "mask_rcnn"}}, "does not train model.detector: mask_rcnn"),
        ({"task": "classification", "model": {"masks": True}}, "a classifier has no masks"),
        ({"task": "classification", "data": {"crop": None}}, "needs it, and no other task uses it"),
        ({"task": "classification", "data": {"keep_empty": True}}, "data.keep_empty"),
        ({"data": {"crop": {}}}, "needs it, and no other task uses it"),
        ({"task": "classification", "data": {"crop": {"area": [0.5, 0.2]}}}, "the smaller one first"),
        ({"task": "classification", "data": {"crop": {"ratio": [2, 1]}}}, "the smaller one first"),
        ({"model": {"backbone": {"kind": "vgg"}}}, "vgg has depth 16"),
        ({"model": {"backbone": {"kind": "vgg", "depth": 16, "stride_in_1x1": True}}}, "stride_in_1x1 are of resnet"),
        (
            {"model": {"backbone": {"kind": "vgg", "depth": 16, "zero_init_last_gamma": True}}},
            "zero_init_last_gamma: true; vgg has no residual blocks",
        ),
        ({"model": {"backbone": {"depth": 18, "cardinality": 32}}}, "from depth 50 on"),
    ],
)
def test_a_config_that_fits_no_task_is_refused(tmp_path: Path, tree: dict, words: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "config.yaml")


def test_the_edges_follow_the_crop() -> None:
    data = Config.model_validate({"task": "classification", "data": {"crop": {"size": 160}}}).data
    assert data.shortest_edge == (160,) and data.shortest_edge_test == 183
    assert data.train == DatasetConfig(kind="folders", split="train")
