"""A trained classifier, ready to use from Python: `load_classifier(path)`, then `predict` and `evaluate`.

B images, K classes.
Batch independence: `Classifier` keeps the pictures of a batch apart, which are cropped and computed as in evaluation.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import override_words
from gndet.config.schema import Config
from gndet.data.records import Dataset, Tell
from gndet.distributed.process import Process, alone
from gndet.evaluation.batch_norm import population_statistics
from gndet.evaluation.classification import Classification, classification_table, classify, probabilities
from gndet.evaluation.portions import Portion
from gndet.evaluation.trained_model import AnyPath, Picture, TrainedModel, load_trained
from gndet.modeling.classifier import Classifier
from gndet.text import printable

NO_CLASSIFIER = "a detector, not a classifier; gndet.load loads it"
TOP = 5  # classes to name, as in ImageNet's top-5 error


@dataclass(frozen=True, eq=False, repr=False)
class ClassPrediction:
    """The classes of one picture.  Iteration yields {"score", "label"} per class, the most likely first."""

    size: tuple[int, int]  # height, width of the picture after its EXIF orientation
    classes: tuple[str, ...]  # of the classifier
    path: Path | None  # of the picture or video; None for a picture in memory
    probabilities: np.ndarray  # (K,) float64, in the order of `classes`
    load: Callable[[], np.ndarray]  # returns the picture, (h, w, 3) uint8 RGB
    seconds: float | None = None  # of a video's frame: when it is shown, from the video's start

    @property
    def labels(self) -> np.ndarray:
        """(K,) int64, indices into `classes`, the most likely first; of equal ones, the first of `classes`."""
        return np.argsort(-self.probabilities, kind="stable")

    @property
    def name(self) -> str:
        """The most likely class."""
        return self.classes[self.labels[0]]

    @property
    def score(self) -> float:
        """The probability of the most likely class."""
        return float(self.probabilities.max())

    def top(self, num: int = TOP) -> list[dict[str, Any]]:
        """Return the `num` most likely classes, the best first: {"score": 0.93, "label": "cat"}."""
        labels = self.labels[:num].tolist()
        return [{"score": float(self.probabilities[label]), "label": self.classes[label]} for label in labels]

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.top(len(self)))

    def words(self, num: int = TOP) -> str:
        """Return the `num` most likely classes in a line."""
        return ", ".join(f"{printable(item['label'])} {item['score']:.3f}" for item in self.top(num))

    def __repr__(self) -> str:
        at = "" if self.seconds is None else f" at {self.seconds:.2f} s"
        where = f" of {printable(self.path.name)}{at}" if self.path else ""
        return f"<ClassPrediction{where}: {self.words()}>"


class ClassScores(dict[str, float]):
    """The metrics of an evaluation, {"top1": 0.76, "top5": 0.93, "error": 0.24}; printing them shows a table."""

    def __init__(self, found: Classification, classes: tuple[str, ...]) -> None:
        super().__init__(found.scalars())
        self.classification, self.classes = found, classes

    def __str__(self) -> str:
        return classification_table(self.classification, self.classes)


@dataclass(frozen=True, eq=False)
class PictureClassifier(TrainedModel):
    """A trained classifier with its config and classes."""

    model: Classifier  # in evaluation mode
    kind = "classifier"

    def __repr__(self) -> str:
        backbone, norm = self.config.model.backbone, self.config.model.norm.kind
        network = f"{backbone.kind}-{backbone.depth}, {norm}, {self.model.device}"
        return f"<PictureClassifier of {len(self.classes)} classes, {network}>"

    @overload
    def predict(self, source: Picture, batch: int | None = None, *, every: int = 1) -> ClassPrediction: ...
    @overload
    def predict(
        self, source: list[Any] | tuple[Any, ...], batch: int | None = None, *, every: int = 1
    ) -> list[ClassPrediction]: ...
    @overload
    def predict(self, source: AnyPath, batch: int | None = None, *, every: int = 1) -> Any: ...
    def predict(self, source: Any, batch: int | None = None, *, every: int = 1) -> Any:
        """Classify a picture, several, or the frames of a video; each is resized and cropped as in evaluation.

        source, batch, every, errors: as in `Detector.predict`.  One picture gives one ClassPrediction, a list of
        pictures a list, and a folder, a pattern or a video an iterator.

        Batch independence: the probabilities of a picture do not depend on the other pictures of its list, but for
        rounding (1e-5 in float32), unless config.model.batch_coupling() names a coupling and pictures are smaller than
        data.crop.size; batch=1 pads none.  Several threads may call this.
        """
        return self.predict_source(source, self.batch_size(batch, every), every, self.predict_portion)

    def predict_portion(self, portion: Portion, video: Path | None = None) -> list[ClassPrediction]:
        """Classify the pictures of a portion, or the frames of a video."""
        if portion.batch is None:
            return []
        found = probabilities(self.model, portion.batch, self.model.device, self.autocast).numpy()  # (B, K)
        done = []
        for index, record in enumerate(portion.records):
            path = video or (Path(record.file_name) if record.file_name else None)
            seconds = portion.frames[index].seconds if video else None
            done.append(ClassPrediction(record.size, self.classes, path, found[index], record.load, seconds))
        return done

    def evaluate(self, data: AnyPath | Config | None = None) -> ClassScores:
        """Count the classifier's errors.  Returns {"top1": 0.76, "top5": 0.93, "error": 0.24}; printed, a table.

        data: a folder of pictures per class (its set val, or the folder itself), or a config (a YAML file, a packaged
        name or a Config), whose data.val is used; None for the data.val that it was trained with.
        Raises DataError, also if the classes of the data differ from the classifier's, and ConfigError.
        """
        classifier = PictureClassifier(
            self.model, self.config_for(data), self.classes, self.category_ids, self.autocast
        )
        _, found = evaluate_classifier(classifier, Process(0, 1, self.model.device), self.config.data)
        return ClassScores(found, self.classes)

    def _set_at(self, path: Path) -> tuple[Path, DatasetConfig]:
        return path, DatasetConfig(kind="folders", split="val")


def load_classifier(path: AnyPath, device: str = "auto", **overrides: Any) -> PictureClassifier:
    """Load a trained classifier.  Arguments and errors as in `gndet.load`."""
    return load_picture_classifier(Path(os.path.expanduser(path)), override_words(overrides), alone(str(device)))


def load_picture_classifier(
    path: Path, overrides: Sequence[str], proc: Process, tell: Tell = warnings.warn
) -> PictureClassifier:
    """Load the classifier of a checkpoint or run folder.  Arguments and errors as in `load_detector`."""
    classifier = PictureClassifier(**load_trained(path, overrides, proc, Classifier, NO_CLASSIFIER, tell))
    classifier.model.choose_convolutions(classifier.config.data.smallest_edge)
    return classifier


def evaluate_classifier(
    classifier: PictureClassifier, proc: Process, trained_on: DataConfig | None = None
) -> tuple[Dataset, Classification]:
    """Evaluate a classifier on its config's data.val.  Returns the data set and the outcome.

    trained_on: where data.train lies, if not in the classifier's config; evaluation.precise_bn reads it.
    Raises DataError if the classes of a data set differ from those of the classifier.
    """
    cfg, model = classifier.config, classifier.model
    dataset, data = classifier.read(cfg.data.val, cfg.data), trained_on or cfg.data
    with population_statistics(model, lambda: classifier.read(data.train, data), cfg, proc, classifier.autocast):
        return dataset, classify(model, dataset, cfg, proc, classifier.autocast)
