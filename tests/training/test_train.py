"""Training runs on a tiny detector: killed, resumed, spread over processes, refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from faults.launch import finish, start
from faults.tiny import CONFIG
from rich.console import Console
from run_files import assert_same, forget, last, load, losses, wait_for

from gndet.checkpoint import load_checkpoint
from gndet.config.loading import load_config
from gndet.data.datasets import shapes
from gndet.errors import ConfigError, DataError, GndetError, OutputError, TrainingError
from gndet.train import train
from gndet.training.ending import closing_words
from gndet.training.run import Progress
from gndet.training.setup import float32_notes

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """The folder of a config and of its run of 6 updates, which no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    train(load(folder / "tiny.yaml", "run"))
    return folder


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """The config of a finished run of 6 updates, a copy for each test."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy" / "tiny.yaml"


@pytest.mark.parametrize("overrides", [(), ("train.optimizer.kind=adamw", "train.optimizer.clip_grad_norm=1")])
def test_a_run_killed_mid_epoch_and_resumed_is_bit_identical(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    finish(tmp_path, "unbroken", *overrides)
    killed = start(tmp_path, "killed", "data.workers=2", *overrides, faults={"gate": [3]})
    wait_for((killed.out / "last").exists)
    killed.signal(signal.SIGKILL)
    killed.expect(-signal.SIGKILL)
    assert "continuing after update" in finish(tmp_path, "killed", "data.workers=1", *overrides)
    assert_same(tmp_path / "unbroken", tmp_path / "killed")
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "killed")


def test_ctrl_c_saves_and_the_same_command_goes_on(trained: Path, config: Path) -> None:
    stopped = start(config.parent, "run", "train.checkpoint_every=0", faults={"gate": [2]})
    stopped.wait_for("fault: gate 2")
    stopped.signal(signal.SIGINT)
    stopped.open_gate(2)
    stopped.expect(130)
    assert 1 <= load_checkpoint(stopped.out / "last").meta["update"] < 6
    train(load(config, "run"))
    assert_same(trained / "run", stopped.out)


def test_a_run_leaves_what_users_look_for(config: Path) -> None:
    out, options = config.parent / "run", ("train.eval_every=3", "train.vis_images=1")
    with (config.parent / "log").open("w") as file:
        values = train(load(config, "run", *options), console=Console(file=file))
    assert set(values) >= {"box/AP", "box/AP50", "mask/AP", "mask/AP50", "box/AR"}
    assert load_config(out / "config.yaml") == load(config, "run", *options)
    assert {"last", "best", "metrics.jsonl", "tensorboard", "predictions.png", "detections.json"} <= set(
        os.listdir(out)
    )
    meta = load_checkpoint(out / "best").meta
    assert meta["classes"] == ["disc", "box", "triangle", "star"] and meta["update"] in (3, 6)
    text = (config.parent / "log").read_text()
    assert "update 6/6" in text and "finished. best checkpoint" in text
    assert sorted(update for update, _ in losses(out)) == [1, 2, 3, 4, 5, 6]
    assert safetensors.torch.load_file(out / "last" / "model.safetensors")


def test_a_run_outlives_its_console(config: Path) -> None:
    """As in `gndet train ... | head`, and with a log file on a disk that is full."""
    words = [sys.executable, "-m", "gndet.cli", "train", str(config)]
    piped = subprocess.Popen([*words, f"out={config.parent / 'piped'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout and piped.stdout.readline()
    piped.stdout.close()
    with open("/dev/full", "w") as full:
        logged = subprocess.Popen([*words, f"out={config.parent / 'full'}"], stdout=full, stderr=subprocess.PIPE)
    for process, name in ((piped, "piped"), (logged, "full")):
        assert process.wait() == 0, process.stderr.read()
        assert load_checkpoint(config.parent / name / "last").meta["update"] == 6
        assert not (config.parent / name / "FAILED").exists()


@pytest.mark.parametrize(("task", "file"), [("detection", "predictions.png"), ("classification", "classified.json")])
def test_the_last_words_name_only_what_was_written_and_how_to_predict(tmp_path: Path, task: str, file: str) -> None:
    assert file not in closing_words(tmp_path, Progress(), task)  # train.vis_images=0
    (tmp_path / file).touch()
    text = closing_words(tmp_path, Progress(), task)
    assert str(tmp_path / file) in text and f"gndet predict {tmp_path / 'best'} IMAGE_OR_FOLDER" in text


def test_a_finished_or_different_run_in_the_folder_is_refused_with_what_to_do(finished: Path) -> None:
    with pytest.raises(TrainingError, match=r"this run is finished \(6 updates\).*out=FOLDER.*--fresh"):
        train(load(finished, "run"))
    with pytest.raises(TrainingError, match=r"another config.*\n  train\.optimizer\.lr: 0\.02 there, 0\.01 now"):
        train(load(finished, "run", "train.optimizer.lr=0.01"))
    train(load(finished, "run", "train.schedule.updates=1"), fresh=True)
    assert load_checkpoint(finished.parent / "run-old-1" / "last").meta["update"] == 6  # nothing is deleted


def test_resuming_between_evaluations_keeps_undefined_metrics_and_the_best(config: Path) -> None:
    options = ("train.eval_every=2", "train.checkpoint_every=1")
    train(load(config, "unbroken", *options))
    shutil.copytree(config.parent / "unbroken", config.parent / "run", symlinks=True)
    forget(config.parent / "run", 4, 5, 6)  # APl is undefined: no drawing is that large
    train(load(config, "run", *options))
    assert_same(config.parent / "unbroken", config.parent / "run")
    best = [os.readlink(config.parent / name / "best") for name in ("unbroken", "run")]
    assert best[0] == best[1]


def test_a_part_s_norm_is_not_changed_by_resuming_without_it(config: Path) -> None:
    train(load(config, "run", "model.backbone.norm.kind=ln"))
    forget(config.parent / "run", 6)
    with pytest.raises(TrainingError, match=r"model\.backbone\.norm\.kind: 'ln' there, 'not set' now"):
        train(load(config, "run"))


def test_resuming_on_other_data_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(finished.parent / "run", 6)
    monkeypatch.setattr(shapes, "MAX_TILT", 0.1)  # the same numbers of images and objects at other positions
    with pytest.raises(TrainingError, match=r"update-0000004: trained on other images or objects than shapes"):
        train(load(finished, "run"))


def test_a_mistake_with_fresh_leaves_the_old_run_where_it_is(finished: Path) -> None:
    with pytest.raises(DataError):
        train(load(finished, "run", "data.train.kind=coco", "data.train.annotations=none.json"), fresh=True)
    assert load_checkpoint(finished.parent / "run" / "last").meta["update"] == 6
    assert not (finished.parent / "run-old-1").exists()


def test_options_that_change_nothing_learned_may_change_on_resume(finished: Path) -> None:
    folder = finished.parent / "run"
    with pytest.raises(TrainingError, match="finished"):  # instead of "another config"
        train(load(finished, "run", "train.log_every=5", "data.workers=1", "device=cpu"))
    assert (folder / "last").exists()


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["model.backbone.freeze_at=2"], ConfigError, r"freeze_at: 2 would freeze random weights"),
        (["model.norm.channels_per_group=24"], ConfigError, r"model\.backbone: norm channels_per_group: 24 does not"),
        (["data.train.kind=coco", "data.train.annotations=none.json"], DataError, r"none\.json"),
        (["train.weights=nowhere"], GndetError, r"nowhere"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    config: Path, overrides: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(load(config, "run", *overrides))
    assert not (config.parent / "run").exists()


def test_folders_that_are_no_run_or_cannot_be_written_are_refused(config: Path) -> None:
    (config.parent / "mine").mkdir()
    (config.parent / "mine" / "thesis.tex").touch()
    with pytest.raises(TrainingError, match=r"mine: holds files but no run"):
        train(load(config, "mine"))
    (config.parent / "file").touch()
    with pytest.raises(TrainingError, match=r"file is a file"):
        train(load(config, "file"))
    with pytest.raises(OutputError, match=r"cannot write the run folder"):
        train(load_config(config, ["out=/proc/nowhere/run"]))


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_untouched(config: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite at update \d+, (.|\n)*train\.optimizer\.lr"):
        train(load(config, "run", "train.optimizer.lr=1e30", "train.schedule.warmup=0", "train.checkpoint_every=1"))
    assert all(value.isfinite().all() for value in last(config.parent / "run").values())


def test_fine_tuning_carries_class_rows_over_by_name(trained: Path, config: Path) -> None:
    lines = config.parent / "log"
    with lines.open("w") as file:
        cfg = load(
            config, "second", f"train.weights={trained / 'run'}", "data.classes=[star,disc]",
            "train.schedule.updates=1", "model.backbone.freeze_at=2",
        )  # fmt: skip
        train(cfg, console=Console(file=file))
    assert "star" in lines.read_text()
    assert load_checkpoint(config.parent / "second" / "last").meta["classes"] == ["star", "disc"]
    frozen = "model/backbone.res2.0.conv1.conv.weight"
    source = load_checkpoint(trained / "run" / "best").groups["ema"]
    assert torch.equal(last(config.parent / "second")[frozen], source[frozen.removeprefix("model/")])


@pytest.mark.parametrize("kind", ["bn", "frozen_bn", "sync_bn", "brn", "in", "ln", "frn", "evonorm_s0"])
def test_the_norm_is_changed_from_the_command_line_alone(config: Path, kind: str) -> None:
    values = train(load(config, kind, f"model.norm.kind={kind}", "train.schedule.updates=1", "train.images_per_gpu=2"))
    assert 0 <= values["box/AP"] <= 1


def test_tf32_is_said_where_float32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    (emulated,) = float32_notes("auto", gpu)  # no GPU here has bf16
    assert emulated.startswith("float32, because this GPU only emulates bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    (line,) = float32_notes("float32", gpu)
    assert "convolutions use TF32" in line
    assert (
        float32_notes("bf16", gpu)
        == float32_notes("auto", gpu)
        == float32_notes("float64", gpu)
        == float32_notes("float32", cpu)
        == []
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert float32_notes("float32", gpu) == []
