"""The trained model of a checkpoint, which may come from a stranger: what it says is checked before it takes memory.

Of its config, the model, how pictures are seen, the evaluation and where the data lies are used; where to write is not.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gndet.checkpoint import load_checkpoint, resolve
from gndet.config.data import DataConfig
from gndet.config.loading import config_from_dict
from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.errors import CheckpointError
from gndet.modeling.build import build_model
from gndet.modeling.image_model import ImageModel

MAX_NAMED = 5  # tensors or keys that a message names
EPS, COUNTER = ".norm.eps", "num_batches_tracked"  # ends of the names of tensors that a norm layer may lack


class Trained(NamedTuple):
    """A checkpoint of a model: its description, and its averaged weights if it has any, else its weights."""

    path: Path  # of the checkpoint folder
    meta: dict[str, Any]
    config: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # () if it has none
    group: str  # ema or model
    state: dict[str, Tensor]
    nonfinite: str  # the tensors with NaN or infinite values; "" if there is none

    @property
    def fault(self) -> str:
        """Say that weights are not finite."""
        return f"{self.path}: NaN or infinite values in {self.nonfinite}; did the training diverge?"


class _Unfilled(TorchFunctionMode):  # without random values: on the meta device they import torch._dynamo
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        skip = getattr(func, "__name__", "") in ("normal_", "uniform_")
        return (args or [kwargs["tensor"]])[0] if skip else func(*args, **(kwargs or {}))


def read_trained(path: Path) -> Trained:
    """Read the model of a run folder (its best checkpoint) or a checkpoint folder.  Raises CheckpointError."""
    saved = load_checkpoint(resolve(path))
    meta, source = saved.meta, f"{saved.path}/meta.json"
    if missing := [key for key in ("classes", "config") if key not in meta]:
        raise CheckpointError(f"{saved.path}: its meta.json has no {missing[0]}; was it saved by gndet?")
    classes, ids = meta["classes"], meta.get("category_ids", [])
    if not (_are_all(classes, str) and _are_all(ids, int)):
        raise CheckpointError(f"{source}: classes or category_ids are not lists of names and whole numbers")
    if wrong := [number for number in ids if not 0 <= number < 2**63]:
        raise CheckpointError(f"{source}: category_ids: got {wrong[0]}, expected numbers from 0 to 2**63 - 1")
    group = "ema" if "ema" in saved.groups else "model"
    if group not in saved.groups:
        raise CheckpointError(f"{saved.path}: no group ema or model; it has {', '.join(saved.groups)}")
    state, config = saved.groups[group], without_cache(config_from_dict(meta["config"], source))
    return Trained(saved.path, meta, config, tuple(classes), tuple(ids), group, state, nonfinite(state))


def is_classifier(path: Path) -> bool:
    """Return whether a run or checkpoint folder holds a classifier.  Raises CheckpointError if it is no checkpoint."""
    config = load_checkpoint(resolve(path), ()).meta.get("config")
    return isinstance(config, dict) and config.get("task") == "classification"


def _are_all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def without_cache(cfg: Config) -> Config:
    """Let the config of a stranger keep data in the user's own cache, or nowhere: only data.cache names where to write.

    (`out` is used by training alone.)
    """
    cache = cfg.data.cache and DataConfig().cache
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"cache": cache})})


def nonfinite(tensors: dict[str, Tensor]) -> str:
    """Name the tensors with NaN or infinite values, with their counts; "" if there is none."""
    wrong = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            least, most = tensor.aminmax()  # NaN if there is one; faster than a look at each value
            if not (math.isfinite(least) and math.isfinite(most)):
                wrong.append(f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()})")
    if len(wrong) > MAX_NAMED:
        return f"{len(wrong)} tensors: {', '.join(wrong[:MAX_NAMED])}, ..."
    return ", ".join(wrong)


def first_few(lines: Sequence[str]) -> list[str]:
    """Return the first MAX_NAMED lines, and a line that says how many more there are."""
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return [*lines[:MAX_NAMED], *more]


def model_without_memory(trained: Trained, cfg: ModelConfig) -> ImageModel:
    """Build a model whose tensors have shapes alone (the meta device), and compare it with the weights.

    cfg: of the model; it may differ from trained.config.model.  Parts that the checkpoint lacks are not compared.
    Raises CheckpointError that names the tensors that do not fit, and ConfigError.
    """
    try:
        with torch.device("meta"), _Unfilled():
            model = build_model(cfg, max(len(trained.classes), 1))
    except RuntimeError as error:  # more values than 64 bits count
        raise CheckpointError(f"{trained.path}: no such model can be built: {error}") from None
    held = {key.partition(".")[0] for key in trained.state}
    expected = {key: list(like.shape) for key, like in model.state_dict().items() if key.partition(".")[0] in held}
    found = {key: list(tensor.shape) for key, tensor in trained.state.items()}
    wrong = [
        f"{key}: {found[key]} in the file, expected {expected.get(key, 'none')}" if key in found
        else f"{key}: absent from the file, {expected[key]} here"
        for key in expected | found if found.get(key) != expected.get(key) and not key.endswith((EPS, COUNTER))
    ]  # fmt: skip
    if wrong:
        lines = "\n  ".join(first_few(wrong))
        raise CheckpointError(f"{trained.path}: {len(wrong)} tensors do not fit this model\n  {lines}")
    return model


def build_trained(trained: Trained, cfg: ModelConfig, *, whole: bool = True) -> ImageModel:
    """Build the model of a checkpoint on the CPU and load its weights; nothing is initialized that it holds.

    whole: refuse a checkpoint that lacks parts, as `gndet convert` writes it; otherwise initialize these parts.
    Raises CheckpointError and ConfigError.
    """
    model = model_without_memory(trained, cfg)
    shapes = model.state_dict()
    held, needed = (dict.fromkeys(key.partition(".")[0] for key in keys) for keys in (trained.state, shapes))
    rest: dict[str, Tensor] = {}
    if needed.keys() - held.keys():
        if whole:
            holds = f"holds only {', '.join(held)}, not a whole detector"
            raise CheckpointError(f"{trained.path}: {holds}; use it as train.weights")
        rest = build_model(cfg, max(len(trained.classes), 1)).state_dict()
    counters = {key: torch.zeros(()) for key in shapes if key.endswith(COUNTER)}  # evaluation does not use them
    weights = counters | rest | trained.state
    try:
        state = {key: torch.empty(like.shape, dtype=like.dtype).copy_(weights[key]) for key, like in shapes.items()}
        eps = {key: tensor for key, tensor in trained.state.items() if key.endswith(EPS)}
        model.load_state_dict(state | eps, assign=True)
    except (RuntimeError, ValueError) as error:  # an eps that is not one number, or of a layer that has none
        raise CheckpointError(f"{trained.path}: its weights do not fit the model of its config: {error}") from None
    return model
