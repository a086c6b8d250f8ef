"""`python -m benchmarks loader`: time the input pipeline, from files to training samples, in one process.

gndet makes batches of one image: the picture as uint8 and each mask in the frame of its box.  torchvision uses its v2
transforms on a COCO data set, as in its reference scripts: the picture as float, masks drawn and resized at its size.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from benchmarks.report import machine, table
from benchmarks.scene import CATEGORIES, make_scenes
from benchmarks.turns import Subject, Work, take_turns
from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.batches.batch import collate
from gndet.data.batches.transforms import train_sample
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import ConfigError

SIZE = (480, 640)  # height, width of drawn pictures
QUALITY = 90  # of their JPEG files


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time both on a COCO data set, or on drawn pictures.

    Raises ConfigError if only half of a data set is given, and DataError if the data set is refused.
    """
    if (options.annotations is None) != (options.pictures is None):
        raise ConfigError("--annotations and --pictures go together")
    with TemporaryDirectory() as folder:
        if options.annotations:
            annotations, pictures = options.annotations.resolve(), options.pictures.resolve()
        else:
            annotations, pictures = draw(Path(folder), options.num)
        num = len(read(annotations, pictures, DataConfig(root="/", cache="")).records)
        say(f"input pipeline: {num} pictures to {options.edge}, at most {options.max_edge}, one process")
        edges = (options.edge, options.max_edge)
        subjects = [
            Subject("gndet", gndet_subject, (annotations, pictures, *edges)),
            Subject("torchvision", torchvision_subject, (annotations, pictures, *edges)),
        ]
        turns = take_turns(subjects, options.rounds, threads=options.threads, say=say)
    say(f"\n{machine(options.threads)}\n{table(turns, against='torchvision', unit='ms', per=num)}\nms: per picture")


def draw(folder: Path, num: int, size: tuple[int, int] = SIZE) -> tuple[Path, Path]:
    """Write a COCO data set of num synthetic pictures; return its annotation file and its folder of pictures."""
    pictures = folder / "pictures"
    pictures.mkdir()
    images, annotations = [], []
    for number, scene in enumerate(make_scenes(size, num, 0), start=1):
        name = f"{number:06d}.jpg"
        Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(pictures / name, quality=QUALITY)
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        annotations += scene.annotations(number, len(annotations) + 1)
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return file, pictures


def read(annotations: Path, pictures: Path, data: DataConfig) -> Dataset:
    """Read a data set with gndet.  Raises DataError if it is refused."""
    return read_dataset(DatasetConfig(annotations=str(annotations), images=str(pictures)), data, masks=True)


def gndet_subject(annotations: Path, pictures: Path, edge: int, max_edge: int) -> Work:
    """Return gndet's work: every sample as a batch of one."""
    data = DataConfig(root="/", shortest_edge=(edge,), max_edge=max(edge, max_edge), cache="")
    records = read(annotations, pictures, data).records

    def work() -> dict[str, float]:
        for key, record in enumerate(records):
            collate([train_sample(record, data, key, True)], data.canvas_multiple)
        return {}

    return work


def torchvision_subject(annotations: Path, pictures: Path, edge: int, max_edge: int) -> Work:
    """Return torchvision's work: every sample."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reads the file, and prints
        dataset = CocoDetection(str(pictures), str(annotations))
    dataset.transforms = v2.Compose([
        v2.ToImage(), v2.Resize(edge, max_size=max(edge + 1, max_edge), antialias=True), v2.RandomHorizontalFlip(0.5),
        v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(),
    ])  # fmt: skip
    samples = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "masks"))

    def work() -> dict[str, float]:
        torch.manual_seed(0)
        for index in range(len(samples)):
            samples[index]
        return {}

    return work
