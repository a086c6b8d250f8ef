"""The config of a run, and what its sections must agree on. `loading.py` reads it from YAML.

Every option stands in the file of its section, with its type, default, unit and source: `model.py`, `norm.py`,
`parts.py`, `dense.py` and `cascade.py` for `model`, `data.py` for `data`, `training.py` for `train` and `evaluation`.
"""

from typing import Literal

from pydantic import Field, model_validator

from gndet.config.data import DataConfig
from gndet.config.model import ModelConfig
from gndet.config.presets import beneath
from gndet.config.section import FileName, Section
from gndet.config.training import EvaluationConfig, TrainConfig

CLASSIFICATION = {  # defaults of task: classification
    "model": {"detector": "classifier", "masks": False},
    "data": {"crop": {}, "train": {"kind": "folders"}, "val": {"kind": "folders"}},
}


class Config(Section):
    """The config of a run."""

    task: Literal["detection", "classification"] = "detection"  # what to train
    out: FileName = ""  # run folder; empty: runs/NAME for NAME.yaml
    seed: int = Field(0, ge=0, lt=1 << 63)  # seed of weights, order, augmentation and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    deterministic: bool = False  # use deterministic GPU algorithms; a CPU is always deterministic
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _classification_has_its_defaults(cls, values: object) -> object:
        is_one = isinstance(values, dict) and values.get("task") == "classification"
        return beneath(CLASSIFICATION, values) if is_one and isinstance(values, dict) else values

    @model_validator(mode="after")
    def _model_fits_the_task(self) -> "Config":
        is_classifier, crop = self.model.detector == "classifier", self.data.crop
        if (self.task == "classification") != is_classifier:
            raise ValueError(f"task: {self.task} does not train model.detector: {self.model.detector}")
        if is_classifier != (crop is not None):
            raise ValueError("data.crop: task: classification needs it, and no other task uses it")
        if is_classifier and self.model.masks:
            raise ValueError("model.masks: a classifier has no masks; expected false")
        if is_classifier and self.data.keep_empty:
            raise ValueError("data.keep_empty: a classifier trains on pictures of a class only; expected false")
        return self

    @model_validator(mode="after")
    def _canvases_hold_all(self) -> "Config":
        longest = self.data.crop.size if self.data.crop else self.data.max_edge
        shorter = min(max(self.data.shortest_edge), longest)
        needed = dict.fromkeys([(shorter, longest), (longest, shorter)])  # a picture; one portrait and one landscape:
        needed |= {} if self.train.images_per_gpu == 1 else {(longest, longest): None}
        canvases = self.data.canvases
        if self.train.compile != "none" and not canvases:
            edges = [[-(-edge // 32) * 32 for edge in canvas] for canvas in needed]
            raise ValueError(
                f"train.compile: {self.train.compile} compiles one graph per canvas, so data.canvases must list the "
                f"canvases, like data.canvases={str(edges).replace(' ', '')}"
            )
        for height, width in needed if canvases else ():
            if not any(height <= canvas[0] and width <= canvas[1] for canvas in canvases):
                raise ValueError(
                    f"data.canvases: none of {', '.join(f'{h} x {w}' for h, w in canvases)} holds {height} x {width}, "
                    "the largest batch that data.shortest_edge, data.max_edge and train.images_per_gpu allow"
                )
        return self

    @model_validator(mode="after")
    def _norms_have_the_statistics(self) -> "Config":
        evaluation, norms = self.evaluation, [self.model.part_norms()[part] for part in self.model.normed_parts]
        asked = f"evaluation.precise_bn: {evaluation.precise_bn}" if evaluation.precise_bn else ""
        if asked and evaluation.batch_statistics:
            raise ValueError(f"{asked} and evaluation.batch_statistics: true are two ways to evaluate; choose one")
        if evaluation.batch_statistics:
            asked = "evaluation.batch_statistics: true"
        if asked and not any(norm.mixes_images for norm in norms):
            kinds = ", ".join(sorted({norm.kind for norm in norms}))
            raise ValueError(
                f"{asked} changes nothing: no norm of the model mixes images (bn, sync_bn, brn); got {kinds}"
            )
        if evaluation.precise_bn and any(norm.trains_with_running_statistics for norm in norms):
            raise ValueError(f"{asked} is not available for brn, which trains with its running averages")
        return self

    @model_validator(mode="after")
    def _batch_splits(self) -> "Config":
        if mistake := self.split_mistake(world=1):
            raise ValueError(mistake)
        return self

    def split_mistake(self, world: int) -> str | None:
        """Return why `world` ranks cannot split an update as train.images_per_gpu asks; None if they can."""
        whole, size, coupling = self.train.global_batch, self.train.images_per_gpu, self.model.batch_coupling()
        if whole < world:
            return f"train.global_batch: {whole} is less than the number of ranks, {world}"
        if size == "auto":
            return coupling and f"train.images_per_gpu: auto would change what is learned: {coupling}; give a number"
        if size > (share := -(-whole // world)):
            return f"train.images_per_gpu: {size} is more than {share} images per rank of train.global_batch: {whole}"
        if coupling and whole % (size * world):
            part = f"{size} x {world} ranks" if world > 1 else size
            return f"train.global_batch: {whole} is not a multiple of train.images_per_gpu: {part}, and {coupling}"
        return None
