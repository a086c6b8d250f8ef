"""Which statistics BN evaluates with: running averages, those of a population (PreciseBN), or those of each batch.

Running averages follow the weights with a lag, and every batch moves them.  PreciseBN (Wu & Johnson 2021, "Rethinking
'Batch' in BatchNorm", section 3) takes the final weights through many training batches, normalized by their own
statistics as in training, and uses the mean and variance of the whole: with n_b values of a channel in batch b, and
N = sum n_b, mu = sum n_b mu_b / N and var = sum n_b (var_b + mu_b^2) / N - mu^2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.schema import Config
from gndet.data.batches.stream import train_batches
from gndet.data.records import Dataset
from gndet.distributed.collectives import all_reduce_sum, raise_on_all
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop
from gndet.errors import GndetError
from gndet.modeling.image_model import ImageModel
from gndet.modeling.recompute import keeping_all
from gndet.structures import Batch


def live_layers(model: ImageModel) -> list[Any]:
    """Return the BN, SyncBN and BRN layers of a model that train; those of frozen stages keep their statistics."""
    frozen = {id(module) for part in model.backbone.frozen for module in part.modules()}
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and id(layer) not in frozen]


@contextmanager
def batch_statistics(model: ImageModel) -> Iterator[list[Any]]:
    """Within this context BN normalizes by what it is given, on this rank; running statistics are untouched.

    SyncBN and BRN are plain BN.  Yields the layers.
    """
    layers = live_layers(model)
    kept = [(layer, layer.running_mean, layer.running_var, layer.training) for layer in layers]
    try:
        for layer in layers:  # without running statistics, torch's BN takes the batch's even in evaluation
            layer.running_mean = layer.running_var = None
            layer.training = False
        yield layers
    finally:
        for layer, mean, var, training in kept:
            layer.running_mean, layer.running_var, layer.training = mean, var, training


def statistics_of_evaluation(model: ImageModel, cfg: Config) -> AbstractContextManager[Any]:
    """Return the context in which `cfg` wants a model evaluated: with evaluation.batch_statistics, or nothing else."""
    return batch_statistics(model) if cfg.evaluation.batch_statistics else nullcontext()


def as_saved(config: Config) -> Config:
    """Return the config to evaluate a checkpoint of a run: its layers have the statistics of PreciseBN already."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"precise_bn": 0})})


@contextmanager
def population_statistics(
    model: ImageModel,
    dataset: Callable[[], Dataset],
    cfg: Config,
    proc: Process,
    autocast: Callable[[], AbstractContextManager],
    working: Callable[[], AbstractContextManager] = nullcontext,
    notify: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Within this context BN has the statistics of the first evaluation.precise_bn images of the training stream.

    The images are augmented, split among the ranks and computed in batches of train.images_per_gpu as in training.  All
    ranks get the same statistics.  At the end the layers have their own again, to the last bit.  Nothing happens if the
    option is 0.
    dataset: reads data.train.  working: context in which images are computed.  notify: as in `train_batches`.
    Raises, on every rank, what stopped one of them: DataError, or Stop within `working`.
    """
    if not cfg.evaluation.precise_bn:
        yield
        return
    sums, failure = None, None
    try:
        with working():
            sums = _sums_of_share(model, dataset(), cfg, proc, autocast, notify)
    except (Stop, GndetError) as error:
        failure = error
    raise_on_all(failure, proc)
    assert sums is not None
    layers = live_layers(model)
    kept = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    set_population(layers, all_reduce_sum(sums, proc))
    try:
        yield
    finally:
        for layer, (mean, var) in zip(layers, kept, strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)


def _sums_of_share(
    model: ImageModel, dataset: Dataset, cfg: Config, proc: Process,
    autocast: Callable[[], AbstractContextManager], notify: Callable[[str], None] | None,
) -> Tensor:  # fmt: skip
    """Return `moment_sums` of this rank's share of the images."""
    size = cfg.train.images_per_gpu
    assert isinstance(size, int)  # the config refuses `auto` for norms that mix images
    loaded = train_batches(
        dataset, cfg.data, seed=cfg.seed, start=0, stop=1, images_per_gpu=size, global_batch=cfg.evaluation.precise_bn,
        rank=proc.rank, world=proc.world, masks=cfg.model.masks, pin_memory=proc.device.type == "cuda", notify=notify,
    )  # fmt: skip
    with closing(loaded):
        return moment_sums(model, (part.batch for part in loaded), autocast)


def moment_sums(model: ImageModel, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager]) -> Tensor:
    """Run the training forward pass on batches; the model stays as it was.

    Returns (2 C + 1,) float64 for each layer of `live_layers`, joined: the sums of its input's values and of their
    squares per channel, and the number of values.
    """
    in_training = {module: module.training for module in model.modules()}
    try:
        model.train()  # proposals are as in training
        with keeping_all(model), batch_statistics(model) as layers, torch.no_grad():
            sums = [torch.zeros(2 * len(layer.weight) + 1, dtype=torch.float64) for layer in layers]
            sums = [total.to(model.device) for total in sums]
            hooks = [
                layer.register_forward_pre_hook(partial(_add_moments, total))
                for layer, total in zip(layers, sums, strict=True)
            ]
            try:
                for batch in batches:
                    with autocast():
                        model(Batch._make(_to(part, model.device) for part in batch))
            finally:
                for hook in hooks:
                    hook.remove()
        return torch.cat(sums)
    finally:
        for module, training in in_training.items():
            module.training = training


def _to(part: Any, device: torch.device) -> Any:
    """Copy a field of a batch to a device."""
    if isinstance(part, tuple):
        return type(part)(*(_to(inner, device) for inner in part))
    return part.to(device) if isinstance(part, Tensor) else part


def _add_moments(total: Tensor, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0]
    with torch.autocast(x.device.type, enabled=False):
        var, mean = torch.var_mean(x.to(layer.weight.dtype), (0, *range(2, x.dim())), correction=0)  # (C,)
    count = x.numel() // x.shape[1]
    mean, var = mean.double(), var.double()
    total += torch.cat([count * mean, count * (var + mean.square()), mean.new_full((1,), count)])


def set_population(layers: Iterable[Any], sums: Tensor) -> None:
    """Set the running statistics of layers to those of a population; sums: of `moment_sums`, over all ranks."""
    for layer, part in zip(layers, sums.split([2 * len(layer.weight) + 1 for layer in layers]), strict=True):
        mean, square = (part[:-1] / part[-1]).chunk(2)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean.square()).clamp(min=0))
