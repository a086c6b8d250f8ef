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
from faults.tiny import CONFIG, check_same, different_tensors
from run_files import last, load
from torch import Tensor, nn

import gndet.train as training
from gndet.checkpoint import load_checkpoint
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.schema import Config
from gndet.data.batches.stream import Loaded, train_batches
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop
from gndet.errors import ConfigError, Preempted, TrainingError
from gndet.structures import Batch, GroundTruth
from gndet.train import train
from gndet.training.nonfinite import describe, examine, refuse
from gndet.training.optim import optimizer_tensors
from gndet.training.run import Progress, Run
from gndet.training.setup import build_run
from gndet.training.update import Nonfinite, Share, UpdateState, make_update, read, reads_late

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
    text = describe(run, 7, taken, Nonfinite({"loss_cls": math.nan}, math.nan, False))
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.norm.padding=masked", "each image alone is finite"),
        ("model.norm.padding=plain", "each batch is finite when it is computed again"),
        ("model.norm.kind=sync_bn", "images not examined, because ranks wait for each other in SyncBN"),
    ],
)
def test_the_text_claims_only_what_was_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    run = make_run(tmp_path)
    run = run._replace(cfg=with_overrides(run.cfg, [override], "test"))
    monkeypatch.setattr("gndet.training.nonfinite.breakable", lambda cfg, proc: "sync_bn" not in override)
    assert f"; {words}; " in describe(run, 0, first_update(run), Nonfinite({"loss_cls": math.nan}, math.nan, False))


def read_batch(path: Path) -> Batch:
    tensors = safetensors.torch.load_file(path)
    gt = GroundTruth(*(tensors[f"gt.{name}"] for name in GroundTruth._fields))
    return Batch(tensors["images"], tensors["sizes"], tensors["keys"], gt, bool(tensors["padded"]))


def test_the_batch_that_was_written_gives_the_same_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    taken = first_update(run)
    describe(run, 0, taken, Nonfinite({"loss_cls": 1.0}, math.inf, False))
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
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_loss_or_the_gradient_alone_leaves_everything_as_it_was(
    tmp_path: Path, kind: str, losses: tuple[float, ...], norm: float, finite: bool
) -> None:
    run, state, progress = make_run(tmp_path, optimizer={"kind": kind}), UpdateState(), Progress()
    assert run.average is not None
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    parts = {str(i): torch.tensor(value) for i, value in enumerate(losses)}
    tensors = [run.model.state_dict(), run.average.module.state_dict(), optimizer_tensors(run.optimizer, run.model)]
    before = [{name: tensor.clone() for name, tensor in part.items()} for part in tensors]
    make_update(run, state, parts, torch.tensor(norm), True)
    make_update(run, state, {name: torch.tensor(1.0) for name in parts}, torch.tensor(1.0), False)
    bad = read(run, state, progress)
    kept = all(
        torch.equal(part[name], value) for part, old in zip(tensors, before, strict=True) for name, value in old.items()
    )
    assert (bad is None) == finite and kept != finite
    if finite:
        assert (progress.update, progress.evaluation_due, progress.sums) == (2, False, {"0": 2.0, "1": 3.0})
    else:
        assert (progress.update, progress.sums, bad.evaluation_due) == (0, {}, True)
        assert repr(bad.norm) == repr(norm) and repr(list(bad.losses.values())) == repr(list(losses))


def spoil(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Let the losses of these updates (1, 2, ...) be NaN."""
    gradients = training.compute_gradients

    def wrapped(run: Run, *more: Any) -> Share:
        share = gradients(run, *more)
        assert run.proc.watch is not None
        if run.proc.watch._update + 1 not in updates:
            return share
        return share._replace(losses={name: loss * math.nan for name, loss in share.losses.items()})

    monkeypatch.setattr(training, "compute_gradients", wrapped)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


RARELY = ("train.log_every=5", "train.checkpoint_every=0")


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb"])
def test_losses_that_are_read_once_per_log_line_skip_the_same_updates(
    config: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = (*RARELY, "train.on_nonfinite=skip:3", f"train.optimizer.kind={kind}", "train.optimizer.lr=0.001")
    spoil(monkeypatch, 2, 3, 6)
    train(load(config, "each", *options))
    reads, whole = [], training.read
    monkeypatch.setattr(
        training, "read", lambda run, state, progress: reads.append(len(state.unread)) or whole(run, state, progress)
    )
    monkeypatch.setattr(training, "reads_late", lambda run: True)
    train(load(config, "late", *options))
    assert reads == [5, 3, 2, 1]  # 1-5, bad 2: 3-5, bad 3: 4-5, then 6, which is bad
    check_same(config.parent / "late", config.parent / "each", "read late")
    assert load_checkpoint(config.parent / "late" / "last").meta["nonfinite"] == 3


def test_a_late_reading_ends_the_run_with_the_weights_before_the_bad_update(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3)
    monkeypatch.setattr(training, "reads_late", lambda run: True)
    with pytest.raises(TrainingError, match="not finite at update 3, which was not applied"):
        train(load(config, "late", *RARELY))
    monkeypatch.undo()
    train(load(config, "whole", "train.checkpoint_every=1"))
    saved = load_checkpoint(config.parent / "late" / "last")
    before = load_checkpoint(config.parent / "whole" / "checkpoints" / "update-0000002")
    assert saved.meta["update"] == 2 and list(different_tensors(saved, before)) == []
    report = json.loads((config.parent / "late" / "nonfinite" / "update-0000003-process0" / "report.json").read_text())
    assert len(report["images"]) == 2  # the batches were loaded again


@pytest.mark.parametrize("failure", [Stop, MemoryError])
def test_updates_that_have_not_been_read_are_saved_when_a_run_ends_early(
    config: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    gradients = training.compute_gradients

    def wrapped(run: Run, *more: Any) -> Share:
        assert run.proc.watch is not None
        if run.proc.watch._update == 4:
            raise failure
        return gradients(run, *more)

    monkeypatch.setattr(training, "reads_late", lambda run: True)
    with monkeypatch.context() as patch, pytest.raises((Preempted, MemoryError)):
        patch.setattr(training, "compute_gradients", wrapped)
        train(load(config, "late", *RARELY))
    saved = load_checkpoint(config.parent / "late" / "last")
    assert saved.meta["update"] == saved.meta["summed"] == 4
    train(load(config, "late", *RARELY))
    train(load(config, "whole", *RARELY))
    check_same(config.parent / "late", config.parent / "whole", "resumed")


def test_updates_that_cannot_be_read_stay_unread_and_nothing_is_saved_for_them(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of update 0 with the weights of a later update would repeat updates when the run resumes."""

    def broken(tensors: list[Tensor], *more: Any, **options: Any) -> Tensor:
        if tensors[0].dtype == torch.float64 and tensors[0].dim() == 2:  # the rows of unread updates
            raise torch.OutOfMemoryError("out of memory")
        return stack(tensors, *more, **options)

    stack = torch.stack
    monkeypatch.setattr(training, "reads_late", lambda run: True)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "stack", broken)
        train(load(config, "late", *RARELY))
    assert not (config.parent / "late" / "last").exists()


def test_with_a_norm_that_mixes_images_every_update_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    gpu = run._replace(proc=run.proc._replace(device=torch.device("cuda", 0)))
    mixing = gpu.cfg.model.model_copy(update={"norm": gpu.cfg.model.norm.model_copy(update={"kind": "bn"})})
    assert reads_late(gpu) and not reads_late(run)
    assert not reads_late(gpu._replace(cfg=gpu.cfg.model_copy(update={"model": mixing})))


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
