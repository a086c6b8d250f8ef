"""BN evaluated with the statistics of a population (evaluation.precise_bn) or of each batch, and its own left alone."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from classes import random_classifier, write_classes
from faults.tiny import CONFIG
from models import make_batch, small_model
from run_files import forget, last, load
from torch import Tensor, nn

from gndet.cli.main import main
from gndet.config.loading import config_from_dict
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.data.batches.stream import train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import Process, spawn
from gndet.errors import ConfigError
from gndet.evaluation.batch_norm import (
    batch_statistics,
    live_layers,
    moment_sums,
    population_statistics,
    set_population,
)
from gndet.modeling.conv_norm import ConvNorm
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.structures import Batch
from gndet.train import train

pytestmark = pytest.mark.usefixtures("thin", "forked_ranks")
BN = NormConfig(kind="bn")
SIZES = [(96, 128), (128, 97), (65, 80)]


def config(**evaluation: Any) -> Config:
    tree = CONFIG | {
        "model": CONFIG["model"] | {"norm": {"kind": "bn"}}, "evaluation": evaluation, "device": "cpu",
        "train": CONFIG["train"] | {"images_per_gpu": 2, "eval_every": 3},
    }  # fmt: skip
    return config_from_dict(tree, "test")


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def inputs_of(model: MaskRCNN, layer: nn.Module, batches: list[Batch]) -> np.ndarray:
    """Return all values that training feeds to a layer, (C, n), with torch's own way of normalizing a batch."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model.train()
    for batch in batches:
        model(batch)
    hook.remove()
    return np.concatenate([x.transpose(0, 1).flatten(1).numpy() for x in seen], axis=1)


@pytest.mark.parametrize("name", ["backbone.stem.norm", "backbone.res4.0.conv2.norm", "box_head.convs.0.norm"])
def test_population_statistics_are_those_of_all_values_of_the_training_forward(name: str) -> None:
    model = small_model(BN).double()
    batches = [make_batch(SIZES[:2]), make_batch(SIZES[2:], first=2), make_batch(SIZES, first=3)]
    before = buffers(model)
    layer = model.get_submodule(name)
    sums = moment_sums(model.eval(), batches, nullcontext)
    assert not model.training and all(torch.equal(tensor, before[key]) for key, tensor in model.named_buffers())
    set_population(live_layers(model), sums)
    values = inputs_of(model, layer, batches)
    # what inputs_of has changed is set again from the same sums
    set_population(live_layers(model), sums)
    np.testing.assert_allclose(layer.running_mean, values.mean(1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.running_var, values.var(1), rtol=1e-9)


def test_frozen_stages_keep_their_statistics() -> None:
    model = small_model(BN)
    model.backbone.freeze(2)
    frozen = {module for part in (model.backbone.stem, model.backbone.res2) for module in part.modules()}
    layers = live_layers(model)
    assert layers and not frozen.intersection(layers)
    assert len(layers) + sum(isinstance(module, nn.BatchNorm2d) for module in frozen) == len(
        live_layers(small_model(BN))
    )


@pytest.mark.parametrize("kind", ["bn", "sync_bn", "brn"])
@pytest.mark.parametrize("grad", [True, False])
def test_batch_statistics_are_those_of_the_maps_and_change_nothing(kind: str, grad: bool) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ConvNorm(3, 8, 3, norm=NormConfig(kind=kind))
            self.backbone.frozen = []

    model: Any = Detector().eval()
    before, x = buffers(model), torch.randn(4, 3, 9, 9)
    with torch.set_grad_enabled(grad), batch_statistics(model):
        found = model.backbone(x)
    expected = F.batch_norm(F.conv2d(x, model.backbone.conv.weight, padding=1), None, None, training=True).relu()
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(model.backbone(x), expected, atol=0.1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.named_buffers())


def states(rank_or_alone: Process, cfg: Config) -> dict[str, Tensor]:
    """Return the statistics of a small model within `population_statistics`; check that they are restored."""
    torch.manual_seed(0)
    model = small_model(BN).double()
    before = buffers(model)
    dataset = read_dataset(cfg.data.train, cfg.data, masks=True)
    with population_statistics(model, lambda: dataset, cfg, rank_or_alone, nullcontext):
        found = buffers(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.named_buffers())
    assert not all(torch.equal(tensor, before[key]) for key, tensor in found.items())
    return found


def save_states(proc: Process, folder: str) -> None:
    torch.save(states(proc, config(precise_bn=8)), f"{folder}/{proc.rank}")


def test_the_images_are_the_first_of_the_training_stream_and_ranks_agree(tmp_path: Path) -> None:
    cfg, alone = config(precise_bn=8), Process(0, 1, torch.device("cpu"))
    found = states(alone, cfg)
    torch.manual_seed(0)
    model = small_model(BN).double()
    loaded = train_batches(
        read_dataset(cfg.data.train, cfg.data, masks=True), cfg.data, seed=cfg.seed, start=0, stop=4, images_per_gpu=2,
        global_batch=2, rank=0, world=1, masks=True, pin_memory=False,
    )  # fmt: skip
    set_population(live_layers(model), moment_sums(model, [part.batch for part in loaded], nullcontext))
    torch.testing.assert_close(found, buffers(model), rtol=1e-12, atol=1e-12)
    spawn(save_states, 2, "cpu", str(tmp_path))
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in found)
    torch.testing.assert_close(ranks[0], found, rtol=1e-9, atol=1e-9)  # batches of two images, whoever computes them


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Iterator[Path]:
    """The folder of two runs of the same training, evaluated with running averages and with a population."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config().model_dump(mode="json", exclude_defaults=True)))
    for name, options in (("average", ()), ("population", ("evaluation.precise_bn=6",))):
        train(load(path, name, *options))
    yield folder


def test_training_is_the_same_and_checkpoints_hold_what_was_evaluated(runs: Path) -> None:
    average, population = last(runs / "average"), last(runs / "population")
    same = {name: torch.equal(tensor, population[name]) for name, tensor in average.items()}
    trained = [name for name in same if name.startswith("model/")]
    assert all(same[name] for name in trained)  # the averaged weights were evaluated, not these
    changed = {name for name in same if not same[name]}
    assert changed == {name for name in same if name.startswith("ema/") and "running" in name}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, ema: float) -> None:
    """Even from a checkpoint after an evaluation, whose running statistics are the population's."""
    cfg = load(runs / "tiny.yaml", f"resumed-{ema}", "evaluation.precise_bn=6", f"train.ema={ema}")
    train(cfg)
    unbroken = last(Path(cfg.out))
    forget(Path(cfg.out), 6)
    train(cfg)
    resumed = last(Path(cfg.out))
    assert unbroken.keys() == resumed.keys()
    assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []


def test_evaluate_estimates_them_if_asked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def table(run: str, *words: str) -> str:
        assert main(["evaluate", str(runs / run / "last"), "device=cpu", *words]) == 0
        return capsys.readouterr().out

    first, _, rest = table("average", "evaluation.precise_bn=6").partition("\n")
    assert first.endswith("BN with the statistics of 6 training images") and "AP" in rest
    assert table("population").partition("\n")[2] == rest
    said = table("average", "evaluation.batch_statistics=true", "evaluation.images_per_gpu=2")
    assert "BN with the statistics of each batch" in said


def test_a_picture_too_small_for_its_own_statistics_is_refused_by_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "set")  # their last map, of a crop of 32 x 32 pixels, is one value per channel
    checkpoint = random_classifier(tmp_path, "model.norm={kind: bn}")
    words = ["evaluate", str(checkpoint), "evaluation.batch_statistics=true"]
    assert main(words) == 2 and main([*words, "evaluation.images_per_gpu=2"]) == 0
    assert "evaluation.images_per_gpu: 1 with such a small picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("norm", "evaluation", "said"),
    [
        ("gn", {"precise_bn": 8}, r"precise_bn: 8 changes nothing.*got gn"),
        ("frozen_bn", {"batch_statistics": True}, r"batch_statistics: true changes nothing.*got frozen_bn"),
        ("brn", {"precise_bn": 8}, "precise_bn: 8 is not available for brn"),
        ("bn", {"precise_bn": 8, "batch_statistics": True}, "choose one"),
    ],
)
def test_what_has_no_effect_is_refused(norm: str, evaluation: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"model": {"norm": {"kind": norm}}, "evaluation": evaluation}, "test")
