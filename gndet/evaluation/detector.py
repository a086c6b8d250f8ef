"""Load a trained detector and evaluate it on a data set."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.distributed.process import Process, place
from gndet.errors import CheckpointError, DataError
from gndet.evaluation.evaluate import Evaluation, evaluate
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import DetectionModel


class Detector(NamedTuple):
    """A trained model with its config and classes."""

    model: DetectionModel
    config: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager]


def load_detector(path: Path, overrides: Sequence[str], proc: Process) -> Detector:
    """Load the model of a checkpoint or run folder (its best checkpoint), with averaged weights if there are any.

    overrides: `key=value` words that change its config.  Raises CheckpointError, ConfigError.
    """
    folder = resolve(path)
    saved = load_checkpoint(folder)
    source = f"{folder}/meta.json"
    missing = [key for key in ("config", "classes", "category_ids") if key not in saved.meta]
    if missing or "model" not in saved.groups:
        raise CheckpointError(f"{source}: not a checkpoint of a detector, it lacks {', '.join(missing) or 'model'}")
    classes, category_ids = saved.meta["classes"], saved.meta["category_ids"]
    for listed, kind in ((classes, str), (category_ids, int)):
        if not isinstance(listed, list) or any(type(item) is not kind for item in listed):
            raise CheckpointError(f"{source}: classes or category_ids are not lists of names and whole numbers")
    if len(classes) != len(category_ids):
        raise CheckpointError(f"{source}: {len(classes)} classes, but {len(category_ids)} category_ids")
    cfg = with_overrides(config_from_dict(saved.meta["config"], source), overrides, source)
    model, state = build_model(cfg.model, max(len(classes), 1)), saved.groups.get("ema", saved.groups["model"])
    found, needed = (dict.fromkeys(key.partition(".")[0] for key in keys) for keys in (state, model.state_dict()))
    if needed.keys() - found.keys():  # `gndet convert` writes only the parts that its source holds
        raise CheckpointError(f"{folder}: holds only {', '.join(found)}, not a whole detector; use it as train.weights")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its weights do not fit the model of its config: {error}") from None
    model, autocast = place(model.eval(), cfg.train.precision, proc)
    return Detector(model, cfg, tuple(classes), tuple(category_ids), autocast)


def evaluate_checkpoint(detector: Detector, proc: Process) -> tuple[Dataset, Evaluation]:
    """Evaluate a detector on its config's data.val.  Returns the data set and the evaluation.

    Raises DataError if the classes of the data set differ from those of the detector.
    """
    dataset = read_dataset(detector.config.data.val, detector.config.data, known=detector.classes)
    if dataset.classes != detector.classes:
        raise DataError(
            f"{dataset.name}: has the classes {', '.join(dataset.classes)}; the detector knows "
            f"{', '.join(detector.classes)}; data.classes chooses them by name"
        )
    return dataset, evaluate(detector.model, dataset, detector.config, proc, detector.autocast)
