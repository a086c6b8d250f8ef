"""What is done with a trained detector: evaluate it on a data set, predict on pictures."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config import Config
from gndet.config_file import config_from_dict, with_overrides
from gndet.data import read_dataset
from gndet.data.images import find_pictures, open_picture, picture_record
from gndet.dataset import Dataset
from gndet.distributed import Process, collect, gather, place
from gndet.errors import CheckpointError, DataError, OutputError
from gndet.evaluation import Evaluation, detect_dataset, evaluate
from gndet.modeling.mask_rcnn import MaskRCNN, build_model
from gndet.results import save_results
from gndet.visualize import draw_detections, save_picture


class Detector(NamedTuple):
    """A trained model with what it was trained for."""

    model: MaskRCNN
    cfg: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager]


def load_detector(path: Path, overrides: Sequence[str], proc: Process) -> Detector:
    """Build the model of a checkpoint or run folder (its best) with its weights, the averaged ones if there are any.

    overrides: `key=value` over the config it was trained with.  Raises CheckpointError, ConfigError.
    """
    folder = resolve(path)
    saved = load_checkpoint(folder)
    source = f"{folder}/meta.json"
    missing = [key for key in ("config", "classes", "category_ids") if key not in saved.meta]
    if missing or "model" not in saved.groups:
        raise CheckpointError(f"{source}: not a checkpoint of a detector, it lacks {', '.join(missing) or 'model'}")
    classes, category_ids = saved.meta["classes"], saved.meta["category_ids"]
    parts = saved.meta.get("parts", ["box_head"])  # `gndet convert` writes what its source holds
    lists = ((classes, str), (category_ids, int), (parts, str))
    if not all(isinstance(of, list) and all(type(one) is kind for one in of) for of, kind in lists) or (
        len(classes) != len(category_ids)
    ):
        raise CheckpointError(f"{source}: classes, category_ids or parts are not lists of names and whole numbers")
    if "box_head" not in parts:
        raise CheckpointError(f"{folder}: holds {', '.join(parts)}, which is no whole detector; train.weights takes it")
    cfg = with_overrides(config_from_dict(saved.meta["config"], source), overrides, source)
    model = build_model(cfg.model, len(classes))
    try:
        model.load_state_dict(saved.groups.get("ema", saved.groups["model"]))
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its weights do not fit the model of its config: {error}") from None
    model, autocast = place(model.eval(), cfg.train.precision, proc)
    return Detector(model, cfg, tuple(classes), tuple(category_ids), autocast)


def evaluate_checkpoint(detector: Detector, proc: Process) -> tuple[Dataset, Evaluation]:
    """Evaluate on data.val of the detector's config.

    Raises DataError where the data set's classes are not those the detector was trained for.
    """
    dataset = read_dataset(detector.cfg.data.val, detector.cfg.data)
    if dataset.classes != detector.classes:
        raise DataError(
            f"{dataset.name}: has the classes {', '.join(dataset.classes)}; the detector knows "
            f"{', '.join(detector.classes)}; data.classes chooses them by name"
        )
    evaluation = evaluate(
        detector.model, dataset, detector.cfg, device=proc.device, autocast=detector.autocast, rank=proc.rank,
        world=proc.world, gather=partial(gather, proc=proc), collect=partial(collect, proc=proc),
    )  # fmt: skip
    return dataset, evaluation


def predict(
    detector: Detector, paths: Sequence[Path], out: Path, threshold: float, device: torch.device,
    show: Callable[[str], None],
) -> None:  # fmt: skip
    """Detect in pictures and folders of pictures; write each with its detections, and all as COCO results.

    out: folder, made where missing: NAME.png for each picture, predictions.json (results, images and categories).
    threshold: score from which a detection is drawn; the JSON holds all of them.  show: called with a line a picture.
    Raises DataError for a path that is missing, no picture, or damaged, and OutputError for a folder that cannot be
    made or whose pictures would be overwritten, before anything is written.
    """
    files = find_pictures(paths)
    records = []
    for number, file in enumerate(files, start=1):
        size = open_picture(file).shape[:2]
        records.append(picture_record(number, file, (int(size[0]), int(size[1]))))
    dataset = Dataset(str(out), detector.classes, detector.category_ids, records)
    names = unique_names(files)
    if taken := {(out / name).resolve() for name in names} & {file.resolve() for file in files}:
        raise OutputError(f"--out {out}: would overwrite the picture {min(taken)}; choose another folder")
    make_folder(out)
    results = detect_dataset(detector.model, dataset, detector.cfg, device=device, autocast=detector.autocast)
    for record, name in zip(records, names, strict=True):
        found = results.of_image(record.image_id)
        picture = draw_detections(record.load(), found, detector.classes, detector.category_ids, threshold)
        save_picture(out / name, picture)
        drawn = sum(one["score"] >= threshold for one in found)
        show(f"{record.file_name}: {drawn} objects with a score of {threshold} or more -> {out / name}")
    images = [{"id": r.image_id, "file_name": r.file_name, "height": r.size[0], "width": r.size[1]} for r in records]
    categories = [{"id": id, "name": name} for id, name in zip(detector.category_ids, detector.classes, strict=True)]
    save_results(out / "predictions.json", results)
    (out / "images.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    show(f"{len(results)} detections -> {out / 'predictions.json'} (COCO results; image ids in images.json)")


def make_room_for(file: Path) -> None:
    """Make the folder of a results file.  Raises OutputError where that cannot be done, or the file is a folder."""
    if file.is_dir():
        raise OutputError(f"--out {file}: is a folder, expected the name of a file")
    make_folder(file.parent)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"--out {file}: cannot write this file: Permission denied")


def make_folder(folder: Path) -> None:
    """Make a folder for results.  Raises OutputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {folder}: cannot make this folder: {error.strerror}") from None


def unique_names(files: Sequence[Path]) -> list[str]:
    """A PNG name for each file, numbered where two would share one."""
    names: list[str] = []
    taken: set[str] = set()
    for number, file in enumerate(files, start=1):
        name = f"{file.stem}.png"
        while name in taken:
            name = f"{name.removesuffix('.png')}-{number}.png"
        taken.add(name)
        names.append(name)
    return names
