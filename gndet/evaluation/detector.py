"""A trained detector, ready to use from Python: `load(path)`, then `predict` and `evaluate`."""

import contextlib
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor

from gndet.config.loading import find_config, load_config, override_words, with_overrides
from gndet.config.schema import Config, DataConfig, DatasetConfig
from gndet.data.datasets.formats import is_config
from gndet.data.datasets.images import Reading, picture_size
from gndet.data.datasets.layout import sets_at
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset, Tell
from gndet.distributed.process import Process, alone, place
from gndet.errors import CheckpointError, ConfigError, DataError
from gndet.evaluation.batch_norm import as_saved, population_statistics
from gndet.evaluation.evaluate import (
    CLASS_COLUMNS,
    Evaluation,
    detect,
    evaluate,
    evaluation_table,
    scalars,
    to_results,
)  # fmt: skip
from gndet.evaluation.inputs import FILE, is_one_picture, records_of
from gndet.evaluation.portions import Portion, picture_portions, video_portions
from gndet.evaluation.prediction import Prediction
from gndet.evaluation.sources import Pictures, Sources, find_sources, read_headers
from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.trained import build_trained, read_trained
from gndet.text import named_briefly

Picture = Image.Image | np.ndarray | Tensor
AnyPath = str | os.PathLike[str]
NO_DETECTOR = "a classifier, not a detector; gndet evaluate scores it, and train.weights={} starts a detector from it"
# shortest edge of the pictures, in pixels, from which minimal filtering is faster: at 800 it is, at 128 it is not
LARGE = 600
# of a data set's config, what says how the network sees a picture, not how it is read
SEEN = ("shortest_edge_test", "max_edge", "antialias", "canvas_multiple", "exact_canvas")


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
class Detector:
    """A trained model with its config and classes."""

    model: DetectionModel  # in evaluation mode
    config: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the classes in the data set that it was trained on
    autocast: Callable[[], AbstractContextManager]  # makes the context in which the model runs

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
        threshold: lowest score of an object.  The detector itself drops scores below
        config.model.box_head.score_threshold.  batch: pictures to compute at once, evaluation.images_per_gpu by
        default.  every: use every Nth frame of a video.

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
        num = self._checked(threshold, batch, every)
        if isinstance(source, list | tuple):
            return self._predict_all(source, threshold, num)
        if not isinstance(source, FILE) or is_one_picture(source):
            return self._predict_all([source], threshold, num)[0]
        found = find_sources([os.fspath(source)])
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        return self._predict_found(found, threshold, num, every)

    def _checked(self, threshold: float, batch: int | None, every: int) -> int:
        """Check the options of `predict`.  Returns the number of pictures to compute at once."""
        number, whole = int | float | np.integer | np.floating, int | np.integer
        if not isinstance(threshold, number) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise ConfigError(f"threshold: got {threshold!r}, expected a score from 0 to 1")
        for name, value in (("batch", 1 if batch is None else batch), ("every", every)):
            if not isinstance(value, whole) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number, 1 or more")
        return self.config.evaluation.images_per_gpu if batch is None else int(batch)

    def _predict_all(self, pictures: Sequence[Any], threshold: float, num: int) -> list[Prediction]:
        """Predict the pictures of a list.  Raises the DataError of one that cannot be read."""
        data, are_files = self.config.data, all(isinstance(picture, FILE) for picture in pictures)
        records = records_of(pictures, Reading.of(data))
        if len(records) <= num or not are_files:  # no process for one batch; what is in memory is not sent to one
            data = data.model_copy(update={"workers": 0})
        done = []
        portions = picture_portions(records, data, num, pin_memory=self._on_gpu)
        with contextlib.closing(portions):
            for portion in portions:
                for skipped in portion.broken:
                    raise DataError(skipped.reason)
                done += self._predicted(portion, threshold)
        return done

    def _predict_found(self, found: Sources, threshold: float, num: int, every: int) -> Iterator[Prediction]:
        """Check the headers of files that a path named; predict the pictures, then the videos.

        Raises DataError at once if no file can be read.
        """
        reading = Reading.of(self.config.data)
        readable = read_headers(found, reading, lambda file: picture_size(file, reading))
        _warn(readable.broken.values())
        return self._stream(Pictures(readable.sizes, reading), readable.rates, found.named, threshold, num, every)

    def _stream(
        self, pictures: Pictures, videos: Iterable[Path], named: frozenset[Path], threshold: float, num: int, every: int
    ) -> Generator[Prediction, None, None]:
        """Yield the predictions of pictures, then of the frames of videos, as they are asked for."""
        data = self.config.data
        portions = picture_portions(pictures, data, num, pin_memory=self._on_gpu)
        with contextlib.closing(portions):
            for portion in portions:
                _warn(skipped.reason for skipped in portion.broken)
                yield from self._predicted(portion, threshold)
        for video in videos:
            frames = video_portions(video, data, num, every, 1)
            try:
                with contextlib.closing(frames):
                    for portion in frames:
                        yield from self._predicted(portion, threshold, video)
            except DataError as error:
                if video in named:
                    raise
                _warn([str(error)])

    def _predicted(self, portion: Portion, threshold: float, video: Path | None = None) -> list[Prediction]:
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

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def evaluate(self, data: AnyPath | Config | None = None) -> Scores:
        """Score the detector by COCO's metrics.  Returns {"box/AP": 0.41, ...}; printed, it is a table.

        data: a data folder (its set val, or its only one), an annotation file, or a config (a YAML file, a packaged
        name or a Config), whose data.val is used; None for the data.val that the detector was trained with.  Pictures
        are resized as the detector's config says.
        Raises DataError, also if the classes of the data differ from the detector's, and ConfigError.
        """
        config = self.config if data is None else self.config.model_copy(update={"data": self._data_of(data)})
        detector = Detector(self.model, config, self.classes, self.category_ids, self.autocast)
        _, evaluation = evaluate_checkpoint(detector, Process(0, 1, self.model.device), self.config.data)
        return Scores(evaluation)

    def _data_of(self, data: AnyPath | Config) -> DataConfig:
        """Return the section `data` of a config or for files, with the sizes that the network sees."""
        own = self.config.data
        seen = {name: getattr(own, name) for name in SEEN}
        if isinstance(data, Config):
            return data.data.model_copy(update=seen)
        path = find_config(data)
        if is_config(path):
            return load_config(path).data.model_copy(update=seen)
        sets = sets_at(path)
        root, name = (path, "") if path.is_dir() else (path.parent, path.name)
        only = DatasetConfig(annotations=name, split=next(iter(sets)) if len(sets) == 1 else "val")
        return own.model_copy(update={"root": str(root), "train": only, "val": only})


def _warn(reasons: Iterable[str]) -> None:
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=4)


def load(path: AnyPath, device: str = "auto", **overrides: Any) -> Detector:
    """Load a trained detector.

    path: a run folder (its best checkpoint), a checkpoint folder, or a folder that `gndet convert` wrote.  Averaged
    weights are taken if there are any.  device: auto, cpu or cuda.  overrides: changes to its config, as in
    `gndet.train`, e.g. model={"box_head": {"score_threshold": 0.01}}.
    Nothing is downloaded, and no code of the file is run.  Raises CheckpointError, ConfigError.
    """
    return load_detector(Path(os.path.expanduser(path)), override_words(overrides), alone(str(device)))


def load_detector(path: Path, overrides: Sequence[str], proc: Process, tell: Tell = warnings.warn) -> Detector:
    """Load the model of a checkpoint or run folder (its best checkpoint), with averaged weights if there are any.

    overrides: `key=value` words that change its config.  tell: called with a line about weights that are not finite.
    Raises CheckpointError, ConfigError.
    """
    trained = read_trained(path)
    if len(trained.classes) != len(trained.category_ids):
        counts = f"{len(trained.classes)} classes, but {len(trained.category_ids)} category_ids"
        raise CheckpointError(f"{trained.path}/meta.json: {counts}")
    cfg = with_overrides(as_saved(trained.config), overrides, f"{trained.path}/meta.json")
    built = build_trained(trained, cfg.model)
    if not isinstance(built, DetectionModel):
        raise CheckpointError(f"{trained.path}: {NO_DETECTOR.format(trained.path)}")
    if trained.nonfinite:
        tell(f"warning: {trained.fault}")
    model, autocast = place(built.eval(), cfg.train.precision, proc)
    if cfg.data.shortest_edge_test >= LARGE:
        model.choose_convolutions(min(cfg.data.shortest_edge))
    return Detector(model, cfg, trained.classes, trained.category_ids, autocast)


def evaluate_checkpoint(
    detector: Detector, proc: Process, trained_on: DataConfig | None = None
) -> tuple[Dataset, Evaluation]:
    """Evaluate a detector on its config's data.val.  Returns the data set and the evaluation.

    trained_on: where data.train lies, if not in the detector's config; evaluation.precise_bn reads it.
    Raises DataError if the classes of a data set differ from those of the detector.
    """
    cfg, model = detector.config, detector.model
    dataset = _known_to(detector, cfg.data.val, cfg.data)
    data = trained_on or cfg.data

    def training_images() -> Dataset:
        return _known_to(detector, data.train, data, masks=cfg.model.masks)

    with population_statistics(model, training_images, cfg, proc, detector.autocast):
        return dataset, evaluate(model, dataset, cfg, proc, detector.autocast)


def _known_to(detector: Detector, cfg: DatasetConfig, data: DataConfig, masks: bool = False) -> Dataset:
    """Read a data set.  Raises DataError if its classes differ from those of the detector."""
    dataset = read_dataset(cfg, data, masks=masks, known=detector.classes)
    if dataset.classes != detector.classes:
        raise DataError(
            f"{dataset.name}: has the classes {named_briefly(dataset.classes)}; the detector knows "
            f"{named_briefly(detector.classes)}; data.classes chooses them by name"
        )
    return dataset
