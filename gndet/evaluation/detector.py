"""A trained detector, ready to use from Python: `load(path)`, then `predict` and `evaluate`."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from gndet.config.data import DataConfig
from gndet.config.loading import override_words
from gndet.config.schema import Config
from gndet.data.records import Dataset, Tell
from gndet.distributed.process import Process, alone
from gndet.errors import ConfigError
from gndet.evaluation.batch_norm import population_statistics
from gndet.evaluation.evaluate import (
    CLASS_COLUMNS,
    Evaluation,
    detect,
    evaluate,
    evaluation_table,
    scalars,
    to_results,
)  # fmt: skip
from gndet.evaluation.portions import Portion
from gndet.evaluation.prediction import Prediction
from gndet.evaluation.trained_model import AnyPath, Picture, TrainedModel, load_trained
from gndet.modeling.detection_model import DetectionModel

NO_DETECTOR = "a classifier, not a detector; gndet.load_classifier loads it, train.weights={} starts a detector from it"
# shortest edge of the pictures, in pixels, from which minimal filtering is faster: at 800 it is, at 128 it is not
LARGE = 600


class Scores(dict[str, float]):
    """The metrics of an evaluation, {"box/AP": 0.41, ..., "mask/AP": 0.37, ...}; printing them shows a table."""

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__(scalars(evaluation))
        self.evaluation = evaluation

    def __str__(self) -> str:
        return evaluation_table(self.evaluation)

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """The metrics of each class: {"cell": {"box/AP": 0.41, "box/AP50": ..., "box/AR": ..., "mask/AP": ...}}."""
        classes: dict[str, dict[str, float]] = {}
        for part, metrics in (("box", self.evaluation.box), ("mask", self.evaluation.mask)):
            for row in metrics.per_class if metrics else ():
                classes.setdefault(row["name"], {}).update({f"{part}/{key}": row[key] for key in CLASS_COLUMNS})
        return classes


@dataclass(frozen=True, eq=False)
class Detector(TrainedModel):
    """A trained detector with its config and classes."""

    model: DetectionModel  # in evaluation mode
    kind = "detector"

    def __repr__(self) -> str:
        norm = self.config.model.norm.kind
        return f"<Detector of {len(self.classes)} classes, {self.config.model.detector}, {norm}, {self.model.device}>"

    @overload
    def predict(
        self, source: Picture, threshold: float = 0.5, batch: int | None = None, *, every: int = 1
    ) -> Prediction: ...
    @overload
    def predict(
        self, source: list[Any] | tuple[Any, ...], threshold: float = 0.5, batch: int | None = None, *, every: int = 1
    ) -> list[Prediction]: ...
    @overload
    def predict(self, source: AnyPath, threshold: float = 0.5, batch: int | None = None, *, every: int = 1) -> Any: ...
    def predict(self, source: Any, threshold: float = 0.5, batch: int | None = None, *, every: int = 1) -> Any:
        """Detect objects in a picture, in several, or in a video.

        source: one picture gives one Prediction: its path, a PIL image, or a (height, width, 3) uint8 RGB array or
        tensor (OpenCV reads blue, green, red: give it as x[..., ::-1]).  A list of these, even of one, gives a list.
        A folder, a pattern like "a/**/*.jpg" or a video gives an iterator, which holds a few batches at a time.  The
        EXIF orientation turns files and PIL images upright.
        threshold: lowest score of an object.  The detector itself drops scores below score_threshold of
        config.model.box_head, or of config.model.dense for fcos and retinanet.  batch: pictures to compute at once,
        evaluation.images_per_gpu by default.  every: use every Nth frame of a video.

        Batch independence: what is found in a picture does not depend on the other pictures of its list: to the last
        bit where the shapes of canvas and batch agree, otherwise within 1e-5 (scores; boxes, as a share of the
        picture's longer side), by rounding in float32; bf16, the default on a GPU, rounds more.  If
        config.model.batch_coupling() names a coupling (BN, padding: plain), a picture's numbers depend on how much
        padding the batch gives it; batch=1 gives every picture none.  The numbers
        are those of `gndet predict` and of evaluation with the same batches.
        Several threads may call this.  Neither the model nor the pixels of an array change.

        Raises DataError for a picture that cannot be used, with the remedy, and ConfigError for the other arguments.
        In a folder or a pattern, a picture that cannot be read is left out with a warning.
        """
        number = int | float | np.integer | np.floating
        if not isinstance(threshold, number) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise ConfigError(f"threshold: got {threshold!r}, expected a score from 0 to 1")
        num = self.batch_size(batch, every)
        return self.predict_source(source, num, every, partial(self._predicted, threshold=threshold))

    def _predicted(self, portion: Portion, video: Path | None, *, threshold: float) -> list[Prediction]:
        """Run the model on a portion.  Returns the predictions of its pictures, or of the frames of a video."""
        if portion.batch is None:
            return []
        detections = detect(self.model, portion.batch, self.model.device, self.autocast)
        dataset = Dataset("pictures", self.classes, self.category_ids, portion.records)
        indices, model = list(range(len(portion.records))), self.config.model
        results = to_results(detections, indices, portion.batch.sizes, dataset, model.mask_paste, threshold)
        done = []
        for index, record in enumerate(portion.records):
            found = results.of_image(record.image_id)
            if not len(found):  # whether there are masks is not known from no detection
                found.codes = [] if model.masks else None
            path = video or (Path(record.file_name) if record.file_name else None)
            seconds = portion.frames[index].seconds if video else None
            done.append(Prediction(record.size, self.classes, self.category_ids, path, found, record.load, seconds))
        return done

    def evaluate(self, data: AnyPath | Config | None = None) -> Scores:
        """Score the detector by COCO's metrics.  Returns {"box/AP": 0.41, ...}; printed, it is a table.

        data: a data folder (its set val, or its only one), an annotation file, or a config (a YAML file, a packaged
        name or a Config), whose data.val is used; None for the data.val that the detector was trained with.  Pictures
        are resized as the detector's config says.
        Raises DataError, also if the classes of the data differ from the detector's, and ConfigError.
        """
        config = self.config_for(data)
        detector = Detector(self.model, config, self.classes, self.category_ids, self.autocast)
        _, evaluation = evaluate_checkpoint(detector, Process(0, 1, self.model.device), self.config.data)
        return Scores(evaluation)


def load(path: AnyPath, device: str = "auto", **overrides: Any) -> Detector:
    """Load a trained detector.

    path: a run folder (its best checkpoint), a checkpoint folder, or a folder that `gndet convert` wrote.  Averaged
    weights are taken if there are any.  device: auto, cpu or cuda.  overrides: changes to its config, as in
    `gndet.train`, e.g. model={"box_head": {"score_threshold": 0.01}}; fcos and retinanet have it in "dense".
    Nothing is downloaded, and no code of the file is run.  Raises CheckpointError, ConfigError.
    """
    return load_detector(Path(os.path.expanduser(path)), override_words(overrides), alone(str(device)))


def load_detector(path: Path, overrides: Sequence[str], proc: Process, tell: Tell = warnings.warn) -> Detector:
    """Load the model of a checkpoint or run folder (its best checkpoint), with averaged weights if there are any.

    overrides: `key=value` words that change its config.  tell: called with a line about weights that are not finite.
    Raises CheckpointError, ConfigError.
    """
    detector = Detector(**load_trained(path, overrides, proc, DetectionModel, NO_DETECTOR, tell))
    data = detector.config.data
    if data.shortest_edge_test >= LARGE:
        detector.model.choose_convolutions(data.smallest_edge)
    return detector


def evaluate_checkpoint(
    detector: Detector, proc: Process, trained_on: DataConfig | None = None
) -> tuple[Dataset, Evaluation]:
    """Evaluate a detector on its config's data.val.  Returns the data set and the evaluation.

    trained_on: where data.train lies, if not in the detector's config; evaluation.precise_bn reads it.
    Raises DataError if the classes of a data set differ from those of the detector.
    """
    cfg, model = detector.config, detector.model
    dataset = detector.read(cfg.data.val, cfg.data)
    data = trained_on or cfg.data

    def training_images() -> Dataset:
        return detector.read(data.train, data, masks=cfg.model.masks)

    with population_statistics(model, training_images, cfg, proc, detector.autocast):
        return dataset, evaluate(model, dataset, cfg, proc, detector.autocast)
