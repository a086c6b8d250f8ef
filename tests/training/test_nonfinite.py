"""A loss or gradient that is not finite is found, located and recorded; the run does not change."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from faults.tiny import CONFIG
from run_files import last, load
from torch import Tensor, nn

from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.data.batches.stream import Loaded, train_batches
from gndet.distributed.process import Process
from gndet.errors import ConfigError, TrainingError
from gndet.structures import Batch, GroundTruth
from gndet.train import train
from gndet.training.nonfinite import describe, examine, refuse, summed
from gndet.training.run import Run
from gndet.training.setup import build_run

ALONE = Process(0, 1, torch.device("cpu"))
pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin")]


def make_run(folder: Path, **train: Any) -> Run:
    tree = CONFIG | {"train": CONFIG["train"] | {"global_batch": 4, "images_per_gpu": 2} | train, "out": str(folder)}
    torch.manual_seed(0)
    return build_run(config_from_dict(tree, "test"), folder, ALONE, None)[0]


def first_update(run: Run) -> list[Loaded]:
    with closing(batches(run.cfg, run)) as stream:
        return [next(stream), next(stream)]


def batches(cfg: Config, run: Run) -> Iterator[Loaded]:
    return train_batches(
        run.train_set, cfg.data, seed=0, start=0, stop=1, images_per_gpu=2, global_batch=4, rank=0, world=1, masks=True,
        pin_memory=False,
    )  # fmt: skip


class Poison(nn.Module):
    """Replaces part of a module's output if the batch holds a certain picture."""

    def __init__(self, inner: nn.Module, value: float, where: str) -> None:
        super().__init__()
        self.inner, self.value, self.where, self.hit = inner, value, where, False

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        y = self.inner(x, *more)
        if not self.hit:
            return y
        if self.where == "output":
            return torch.where(torch.arange(y.numel()).view(y.shape) == 0, self.value, y)
        y = y.clone()
        y.register_hook(lambda gradient: gradient * self.value)
        return y


def poisoned(run: Run, module: str, key: int, value: float, where: str) -> None:
    """Let a module fail only for the picture with this key."""
    parent, _, name = module.rpartition(".")
    poison = Poison(run.model.get_submodule(module), value, where)
    setattr(run.model.get_submodule(parent), name, poison)
    run.model.register_forward_pre_hook(lambda m, args: setattr(poison, "hit", bool((args[0].keys == key).any())))


def test_a_sound_update_is_found_to_be_sound(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = examine(run, first_update(run))
    assert [image["first"] for image in found] == [""] * 4
    assert len({image["image_id"] for image in found}) == 4 and all(image["losses"]["loss_mask"] > 0 for image in found)


@pytest.mark.parametrize(
    ("module", "value", "where", "words"),
    [
        (
            "backbone.res3.0.conv1",
            math.nan,
            "output",
            r"the output of backbone\.res3\.0\.conv1(\.inner)? is not",
        ),
        ("fpn.output3", math.inf, "output", r"the output of fpn\.output3 is not finite"),
        (
            "backbone.res4.1.conv2",
            math.nan,
            "gradient",
            r"the gradient of the output of backbone\.res4\.1\.\w+.*",
        ),
    ],
)
def test_the_first_module_and_the_image_are_named(
    tmp_path: Path, module: str, value: float, where: str, words: str
) -> None:
    run = make_run(tmp_path)
    taken = first_update(run)
    culprit = taken[1].image_ids[0]
    poisoned(run, module, int(taken[1].batch.keys[0]), value, where)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    text = describe(run, 7, taken, {"loss_cls": torch.tensor(math.nan)}, torch.tensor(math.nan))
    report = json.loads((tmp_path / "nonfinite" / "update-0000008-process0" / "report.json").read_text())
    assert [image["image_id"] for image in report["images"] if image["first"]] == [culprit]
    assert f"image {culprit}: " in text and "at update 8" in text
    (first,) = [image["first"] for image in report["images"] if image["first"]]
    assert re.search(words, first), first
    assert report["losses"] == {"loss_cls": "nan"} and report["update"] == 7
    assert config_from_dict(report["config"], "report") == run.cfg
    after = run.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def read_batch(path: Path) -> Batch:
    tensors = safetensors.torch.load_file(path)
    gt = GroundTruth(*(tensors[f"gt.{name}"] for name in GroundTruth._fields))
    return Batch(tensors["images"], tensors["sizes"], tensors["keys"], gt, bool(tensors["padded"]))


def test_the_batch_that_was_written_gives_the_same_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    taken = first_update(run)
    describe(run, 0, taken, {"loss_cls": torch.tensor(1.0)}, torch.tensor(math.inf))
    folder = tmp_path / "nonfinite" / "update-0000001-process0"
    for number, loaded in enumerate(taken):
        again = run.model(read_batch(folder / f"batch-{number}.safetensors"))
        assert all(torch.equal(loss, again[name]) for name, loss in run.model(loaded.batch).items())


@pytest.mark.parametrize(
    ("losses", "norm", "finite"),
    [
        ((1.0, 2.0), 3.0, True),
        ((1.0, math.nan), 3.0, False),
        ((math.inf, -math.inf), 3.0, False),
        ((1.0,), math.inf, False),
    ],
)
def test_a_loss_or_the_gradient_alone_is_enough(losses: tuple[float, ...], norm: float, finite: bool) -> None:
    parts = {str(i): torch.tensor(value) for i, value in enumerate(losses)}
    sums, found = summed(parts, torch.tensor(norm), ALONE)
    assert found == finite and (not finite or list(sums.values()) == list(losses))


def test_only_the_allowed_number_of_updates_is_skipped(tmp_path: Path) -> None:
    run = make_run(tmp_path, on_nonfinite="skip:2")
    refuse(run, "text", 2)
    with pytest.raises(TrainingError, match=r"(?s)text.*2 have been skipped before"):
        refuse(run, "text", 3)
    with pytest.raises(TrainingError, match=r"train\.on_nonfinite=skip:N"):
        refuse(make_run(tmp_path), "text", 1)


@pytest.mark.parametrize("policy", ["skip", "skip:0", "skip:-1", "go", "skip:two", ""])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.on_nonfinite: got"):
        config_from_dict({"train": {"on_nonfinite": policy}}, "test")


def test_with_bn_the_running_statistics_of_a_bad_update_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(CONFIG))
    options = ("model.norm.kind=bn", "train.images_per_gpu=2", "train.optimizer.lr=1e30", "train.schedule.warmup=0")
    with pytest.raises(TrainingError, match="is not finite at update"):
        train(load(path, "run", *options, "train.checkpoint_every=1"))
    state = last(path.parent / "run")
    assert any("running_mean" in name for name in state)
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
