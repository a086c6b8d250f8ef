"""What a detector and a classifier share once they are trained: how they are loaded, and how they take pictures.

Batch independence: pictures are resized and computed in batches as in evaluation, and nothing here joins two pictures.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import find_config, load_config, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.formats import is_config
from gndet.data.datasets.images import Reading, picture_size
from gndet.data.datasets.layout import sets_at
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset, Tell
from gndet.distributed.process import Process, place
from gndet.errors import CheckpointError, ConfigError, DataError
from gndet.evaluation.batch_norm import as_saved
from gndet.evaluation.inputs import FILE, is_one_picture, records_of
from gndet.evaluation.portions import Portion, picture_portions, video_portions
from gndet.evaluation.sources import Pictures, Sources, find_sources, read_headers
from gndet.modeling.image_model import ImageModel
from gndet.modeling.trained import build_trained, read_trained
from gndet.text import named_briefly

Picture = Image.Image | np.ndarray | Tensor
AnyPath = str | os.PathLike[str]
Result = TypeVar("Result")  # what is found in a picture
Predict = Callable[[Portion, Path | None], list[Result]]  # the results of a portion's pictures, or of a video's frames
# of a data set's config, what says how the network sees a picture, not how it is read
SEEN = ("shortest_edge_test", "max_edge", "antialias", "canvas_multiple", "exact_canvas", "crop")


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model with its config and classes."""

    model: ImageModel  # in evaluation mode
    config: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the classes in the data set that it was trained on
    autocast: Callable[[], AbstractContextManager]  # makes the context in which the model runs
    kind: ClassVar[str] = "model"

    @property
    def on_gpu(self) -> bool:
        """Whether the model runs on a GPU."""
        return self.model.device.type == "cuda"

    def batch_size(self, batch: int | None, every: int) -> int:
        """Check the options of `predict`.  Returns the number of pictures to compute at once."""
        whole = int | np.integer
        for name, value in (("batch", 1 if batch is None else batch), ("every", every)):
            if not isinstance(value, whole) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number, 1 or more")
        return self.config.evaluation.images_per_gpu if batch is None else int(batch)

    def predict_source(self, source: Any, num: int, every: int, predict: Predict[Result]) -> Any:
        """Predict in one picture, in several, or in a video.

        source: as `Detector.predict` takes it; num: pictures at once; every: use every Nth frame of a video.
        Returns a Result for one picture, a list for a list, and an iterator for a folder, a pattern or a video.
        Raises DataError for a picture that cannot be used.
        """
        if isinstance(source, list | tuple):
            return self._predict_all(source, num, predict)
        if not isinstance(source, FILE) or is_one_picture(source):
            return self._predict_all([source], num, predict)[0]
        found = find_sources([os.fspath(source)])
        for note in found.notes:
            warnings.warn(note, stacklevel=3)
        return self._predict_found(found, num, every, predict)

    def _predict_all(self, pictures: Sequence[Any], num: int, predict: Predict[Result]) -> list[Result]:
        """Predict the pictures of a list.  Raises the DataError of one that cannot be read."""
        data, are_files = self.config.data, all(isinstance(picture, FILE) for picture in pictures)
        records = records_of(pictures, Reading.of(data))
        if len(records) <= num or not are_files:  # no process for one batch; what is in memory is not sent to one
            data = data.model_copy(update={"workers": 0})
        done = list[Result]()
        portions = picture_portions(records, data, num, pin_memory=self.on_gpu)
        with contextlib.closing(portions):
            for portion in portions:
                for skipped in portion.broken:
                    raise DataError(skipped.reason)
                done += predict(portion, None)
        return done

    def _predict_found(self, found: Sources, num: int, every: int, predict: Predict[Result]) -> Iterator[Result]:
        """Check the headers of files that a path named; predict the pictures, then the videos.

        Raises DataError at once if no file can be read.
        """
        reading = Reading.of(self.config.data)
        readable = read_headers(found, reading, lambda file: picture_size(file, reading))
        _warn(readable.broken.values())
        return self._stream(Pictures(readable.sizes, reading), readable.rates, found.named, num, every, predict)

    def _stream(
        self, pictures: Pictures, videos: Iterable[Path], named: frozenset[Path], num: int, every: int,
        predict: Predict[Result],
    ) -> Generator[Result, None, None]:  # fmt: skip
        """Yield the predictions of pictures, then of the frames of videos, as they are asked for."""
        data = self.config.data
        portions = picture_portions(pictures, data, num, pin_memory=self.on_gpu)
        with contextlib.closing(portions):
            for portion in portions:
                _warn(skipped.reason for skipped in portion.broken)
                yield from predict(portion, None)
        for video in videos:
            frames = video_portions(video, data, num, every, 1)
            try:
                with contextlib.closing(frames):
                    for portion in frames:
                        yield from predict(portion, video)
            except DataError as error:
                if video in named:
                    raise
                _warn([str(error)])

    def config_for(self, data: AnyPath | Config | None) -> Config:
        """Return the config to evaluate on a data set, with the sizes that the network sees.

        data: a data folder (its set val, or its only one), an annotation file, or a config (a YAML file, a packaged
        name or a Config), whose data.val is used; None for the data.val that the model was trained with.
        """
        return self.config if data is None else self.config.model_copy(update={"data": self._data_of(data)})

    def _data_of(self, data: AnyPath | Config) -> DataConfig:
        own = self.config.data
        seen = {name: getattr(own, name) for name in SEEN}
        if isinstance(data, Config):
            return data.data.model_copy(update=seen)
        path = find_config(data)
        if is_config(path):
            return load_config(path).data.model_copy(update=seen)
        root, only = self._set_at(path)
        return own.model_copy(update={"root": str(root), "train": only, "val": only})

    def _set_at(self, path: Path) -> tuple[Path, DatasetConfig]:
        """Return the root of a data set that lies at a path, and the set to evaluate on."""
        sets = sets_at(path)
        root, name = (path, "") if path.is_dir() else (path.parent, path.name)
        return root, DatasetConfig(annotations=name, split=next(iter(sets)) if len(sets) == 1 else "val")

    def read(self, cfg: DatasetConfig, data: DataConfig, masks: bool = False) -> Dataset:
        """Read a data set.  Raises DataError if its classes differ from those of the model."""
        dataset = read_dataset(cfg, data, masks=masks, known=self.classes)
        if dataset.classes != self.classes:
            raise DataError(
                f"{dataset.name}: has the classes {named_briefly(dataset.classes)}; the {self.kind} knows "
                f"{named_briefly(self.classes)}; data.classes chooses them by name"
            )
        return dataset


def load_trained(
    path: Path, overrides: Sequence[str], proc: Process, kind: type, refusal: str, tell: Tell
) -> dict[str, Any]:
    """Load the model of a checkpoint or run folder (its best checkpoint), with averaged weights if there are any.

    overrides: `key=value` words that change its config.  kind: the class of its model; refusal: what is said of
    another, with {} for the path.  tell: called with a line about weights that are not finite.
    Returns the fields of a TrainedModel.  Raises CheckpointError, ConfigError.
    """
    trained = read_trained(path)
    if len(trained.classes) != len(trained.category_ids):
        counts = f"{len(trained.classes)} classes, but {len(trained.category_ids)} category_ids"
        raise CheckpointError(f"{trained.path}/meta.json: {counts}")
    cfg = with_overrides(as_saved(trained.config), overrides, f"{trained.path}/meta.json")
    built = build_trained(trained, cfg.model)
    if not isinstance(built, kind):
        raise CheckpointError(f"{trained.path}: {refusal.format(trained.path)}")
    if trained.nonfinite:
        tell(f"warning: {trained.fault}")
    model, autocast = place(built.eval(), cfg.train.precision, proc)
    names = ("model", "config", "classes", "category_ids", "autocast")
    return dict(zip(names, (model, cfg, trained.classes, trained.category_ids, autocast), strict=True))


def _warn(reasons: Iterable[str]) -> None:
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=5)
