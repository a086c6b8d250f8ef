"""A difference on resume is refused or reported in a line: the rule of `gndet.training.checkpointing`."""

import os
import shutil
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from rich.console import Console
from run_files import assert_same, forget, load, losses, wait_for
from torch.overrides import TorchFunctionMode

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.data.datasets import shapes
from gndet.distributed.process import Process
from gndet.errors import TrainingError
from gndet.train import train
from gndet.training.checkpointing import Saver, drift
from gndet.training.run import Best, Progress
from gndet.training.setup import build_run

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin")]
OPTIONS = ("train.checkpoint_every=2", "train.global_batch=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """The config of a run of 6 updates, next to the run folder."""
    path = tmp_path_factory.mktemp("finished") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    train(load(path, "run", *OPTIONS))
    return path


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run, stopped after 4 of the 6 updates."""
    shutil.copytree(finished.parent, tmp_path / "copy", symlinks=True)
    forget(tmp_path / "copy" / "run", 6)
    return tmp_path / "copy" / "tiny.yaml"


def go_on(config: Path, *overrides: str) -> str:
    said = StringIO()
    train(load(config, "run", *OPTIONS, *overrides), console=Console(file=said))
    return said.getvalue()


def test_an_unchanged_resume_reports_nothing_and_is_bit_identical(stopped: Path, finished: Path) -> None:
    text = go_on(stopped)
    assert "continuing after update 4 of 6" in text and "not bit-exact" not in text
    assert_same(finished.parent / "run", stopped.parent / "run")


def test_what_changes_rounding_only_is_said_in_one_line(stopped: Path) -> None:
    try:
        torch.set_num_threads(2)
        text = go_on(stopped, "train.images_per_gpu=2", "data.workers=1")
    finally:
        torch.set_num_threads(1)
    (line,) = [line for line in text.splitlines() if "not bit-exact" in line]
    assert "the same images, order and recipe" in line
    assert "threads 1 -> 2" in line and "train.images_per_gpu 1 -> 2" in line and "torch 2" not in line


@pytest.mark.parametrize(("device", "deterministic"), [("cuda", False), ("cuda", True), ("cpu", False)])
def test_a_resume_promises_the_same_bits_on_a_gpu_only_if_deterministic(
    stopped: Path, tmp_path: Path, device: str, deterministic: bool
) -> None:
    run, _ = build_run(load(stopped, "run", *OPTIONS), tmp_path, Process(0, 1, torch.device("cpu")), None)
    saved = load_checkpoint(stopped.parent / "run" / "checkpoints" / "update-0000004")
    saved = saved._replace(meta=saved.meta | {"device": device})
    cfg = run.cfg.model_copy(update={"deterministic": deterministic})
    lines = drift(run._replace(cfg=cfg, proc=Process(0, 1, torch.device(device))), saved)
    if device == "cuda" and not deterministic:
        (line,) = lines
        assert line.startswith("not bit-exact from here on, but with the same images, order and recipe: determin")
    else:
        assert lines == []


def test_other_canvases_change_rounding(stopped: Path, tmp_path: Path) -> None:
    run, _ = build_run(load(stopped, "run", *OPTIONS), tmp_path, Process(0, 1, torch.device("cpu")), None)
    saved = load_checkpoint(stopped.parent / "run" / "checkpoints" / "update-0000004")
    assert drift(run, saved) == []
    saved.meta["asked"]["data"]["canvases"] = [[64, 96]]
    (line,) = drift(run, saved)
    assert line.endswith("data.canvases [[64, 96]] -> []")


def test_other_validation_data_is_said_and_not_refused(stopped: Path) -> None:
    assert "differs from the data of earlier evaluations" not in go_on(stopped)
    forget(stopped.parent / "run", 6)
    with pytest.raises(TrainingError, match=r"data\.val\.seed: 2 there, 3 now"):  # the config has changed: refused
        go_on(stopped, "data.val.seed=3")


def test_the_same_options_with_other_validation_data(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shapes._layout
    monkeypatch.setattr(shapes, "_layout", lambda seed, i, size: real(9 if seed == 2 else seed, i, size))
    assert "differs from the data of earlier evaluations" in go_on(stopped)


def test_other_masks_over_the_same_boxes_are_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shapes._to_record

    def other(*args: object) -> object:
        record = real(*args)
        turned = [{"size": code["size"], "counts": code["counts"][:-1] + "1"} for code in record.segmentations]
        return record._replace(segmentations=turned) if record.image_id < 2 * shapes.MAX_COUNT else record

    monkeypatch.setattr(shapes, "_to_record", other)
    with pytest.raises(TrainingError, match="trained on other images or objects"):
        go_on(stopped)


def test_other_classes_are_refused(stopped: Path) -> None:
    saved = load_checkpoint((stopped.parent / "run" / "last").resolve().with_name("update-0000004"))
    save_checkpoint(saved.path, saved.groups, saved.meta | {"classes": ["disc", "box", "triangle", "comet"]})
    with pytest.raises(TrainingError, match=r"trained for the classes disc, .*comet, the data now has .*star"):
        go_on(stopped)


def test_an_interrupted_evaluation_is_repeated_on_resume(stopped: Path) -> None:
    run = stopped.parent / "run"
    train(load(stopped, "run", *OPTIONS))
    saved = load_checkpoint((run / "last").resolve())
    assert saved.meta["update"] == 6 and not saved.meta["evaluation_due"]
    save_checkpoint(saved.path, saved.groups, saved.meta | {"evaluation_due": True, "best": None, "best_update": None})
    assert "evaluation after update 6/6" in go_on(stopped)
    assert load_checkpoint(run / "last").meta["metrics"] == saved.meta["metrics"]
    with pytest.raises(TrainingError, match="this run is finished"):
        go_on(stopped)


def test_progress_comes_back_from_a_checkpoint_s_meta() -> None:
    progress = Progress(
        7, True, {"box/AP": 0.5, "box/APl": float("nan")}, Best(0.5, 6), {"loss_cls": 0.1 + 0.2}, 3, 4, 2, {17: "gone"}
    )
    again = Progress.from_meta(progress.to_meta())
    assert str(again) == str(progress)  # nan is not equal to itself
    assert Progress.from_meta(Progress().to_meta()) == Progress()


def test_a_run_s_best_is_kept_until_a_better_one() -> None:
    progress = Progress(update=1)
    progress.evaluated({"box/AP": float("nan")})
    assert progress.best == Best(0.0, 1) and progress.is_best
    progress.update = 2
    progress.evaluated({"box/AP": 0.0})
    assert progress.best == Best(0.0, 1) and not progress.is_best
    progress.evaluated({"box/AP": 0.9, "mask/AP": 0.1})
    assert progress.best == Best(0.1, 2) and progress.is_best


def test_the_mean_losses_of_a_log_line_are_those_of_the_unbroken_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "copy" / "run")
    config = tmp_path / "copy" / "tiny.yaml"
    for name in ("unbroken", "run"):
        train(load(config, name, *OPTIONS, "train.log_every=5"))
    forget(config.parent / "run", 6)
    go_on(config, "train.log_every=5")
    assert losses(config.parent / "run") == losses(config.parent / "unbroken")
    assert [update for update, _ in losses(config.parent / "run")] == [5, 6]


def test_a_best_that_could_not_be_written_is_none(finished: Path, tmp_path: Path) -> None:
    """The next evaluation becomes the best, although it is worse."""
    run, _ = build_run(load(finished, "unused"), tmp_path, Process(0, 1, torch.device("cpu")), None)
    said: list[str] = []
    saver, progress = Saver(run, 9, said.append), Progress(update=1)
    for update, score, in_the_way in ((1, 0.5, False), (2, 0.9, True), (3, 0.6, False), (4, 0.4, False)):
        progress.update = update
        progress.evaluated({"box/AP": score})
        blocked = tmp_path / "checkpoints" / ".tmp-update-0000002"
        with pytest.MonkeyPatch.context() as patch:
            if in_the_way:
                patch.setattr(
                    os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
                )
            saver.save(progress, at_once=True)
        assert not blocked.exists() and (saver.failed is not None) == in_the_way
    saver.wait()
    assert "No space left" in said[0]
    assert (tmp_path / "best").resolve().name == "update-0000003" and progress.best == Best(0.6, 3)


def test_no_thread_outlives_a_save(finished: Path, tmp_path: Path) -> None:
    """A living thread with an OpenMP team stops libgomp from spinning: all later updates would take a third longer."""
    run, _ = build_run(load(finished, "unused"), tmp_path, Process(0, 1, torch.device("cpu")), None)
    before = threading.active_count()
    saver = Saver(run, 9, print)
    for update in (1, 2):
        saver.save(Progress(update=update), at_once=True)
        wait_for(lambda: threading.active_count() <= before)
        assert threading.active_count() == before
    saver.wait()


def test_after_any_error_of_the_writing_thread_the_next_save_is_tried(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = build_run(load(finished, "unused"), tmp_path, Process(0, 1, torch.device("cpu")), None)
    said: list[str] = []
    saver = Saver(run, 9, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(MemoryError("none left")))
        saver.save(Progress(update=1), at_once=True)
    assert "none left" in said[0] and saver.failed and not saver.holds(Progress(update=1))
    saver.save(Progress(update=2), at_once=True)
    assert saver.holds(Progress(update=2)) and load_checkpoint(tmp_path / "last").meta["update"] == 2
    saver.wait()


def test_a_checkpoint_of_a_gpu_waits_once_after_all_copies(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to:
                done.append("ahead" if (kwargs or {}).get("non_blocking") else "blocking")
            return func(*args, **kwargs or {})

    class Stream:
        def synchronize(self) -> None:
            done.append("wait")

    done: list[str] = []
    run, _ = build_run(load(finished, "unused"), tmp_path, Process(0, 1, torch.device("cpu")), None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    saver = Saver(run._replace(proc=Process(0, 1, torch.device("cuda", 0))), 9, print)
    with Functions():
        groups = saver._groups()
    count = sum(map(len, groups.values()))
    assert count > 300 and done == ["ahead"] * count + ["wait"]
    assert set(groups) == {"model", "optimizer", "ema"}
    for name, value in run.model.state_dict().items():
        assert torch.equal(groups["model"][name], value) and groups["model"][name].data_ptr() != value.data_ptr()
