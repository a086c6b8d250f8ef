"""The benchmarks: subjects take turns, the table reports them, and both training steps do equal work."""

import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from models import NUM_CLASSES, make_batch, small_model
from subjects import computing, failing, hanging, holding, noting, timing_itself

from benchmarks.detectors import ROWS, row_config
from benchmarks.loader import draw
from benchmarks.options import DETECTORS, NAMES
from benchmarks.parts import memory_by_part
from benchmarks.predicting import SIZES, decoded, peer_model, same_weights, settings
from benchmarks.report import machine, table
from benchmarks.scene import CLASSES, NEAR, PROPOSALS, make_scenes
from benchmarks.step import guide, near_objects, to_batch
from benchmarks.step import peer_model as step_peer
from benchmarks.turns import Limits, Subject, Turn, take_turns
from benchmarks.typed import subject as command
from gndet.config.schema import Config
from gndet.config.training import TrainConfig
from gndet.distributed.process import alone
from gndet.errors import ConfigError, MachineError
from gndet.evaluation.detector import load_detector
from gndet.modeling.build import build_model
from gndet.structures import Proposals
from gndet.training.log import read_metrics
from gndet.training.memory import MIB, TensorBytes
from gndet.training.update import backward


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()]


# --- turns


def test_subjects_take_turns_each_in_its_process(tmp_path: Path) -> None:
    said: list[str] = []
    subjects = [Subject(name, noting, (tmp_path / "log", name)) for name in ("A", "B")]
    turns = take_turns(subjects, 2, threads=2, say=said.append)
    noted = lines(tmp_path / "log")
    assert [line[:2] for line in noted if line[1] == "turn"] == [["A", "turn"], ["B", "turn"]] * 3  # a warm-up
    assert {name: len({line[2] for line in noted if line[0] == name}) for name in "AB"} == {"A": 1, "B": 1}
    assert len({line[2] for line in noted}) == 2 and str(os.getpid()) not in {line[2] for line in noted}
    assert {line[3] for line in noted} == {"2"}
    assert [len(turns[name]) for name in ("A", "B")] == [2, 2] and turns["A"][0].facts == {"notes": 3.0}
    assert [line.split()[2] for line in said[2:]] == ["A", "B", "A", "B"] and len(said) == 6


def test_a_fresh_turn_has_a_process_of_its_own(tmp_path: Path) -> None:
    take_turns([Subject("A", noting, (tmp_path / "log", "A"))], 2, threads=1, fresh=True)
    noted = lines(tmp_path / "log")
    assert [line[1] for line in noted] == ["build", "turn"] * 3 and len({line[2] for line in noted}) == 3


def test_memory_and_time_of_processes_that_a_subject_starts_count(capfd: pytest.CaptureFixture[str]) -> None:
    subjects = [Subject(name, holding, (200, name == "child")) for name in ("own", "child")]
    own, child = (turns[0].peak_mib for turns in take_turns(subjects, 1, threads=1, warmup=0).values())
    assert own > 200 and child > 200 and abs(own - child) < 100
    (turn,) = take_turns([Subject("child", computing, (0.3,))], 1, threads=1, warmup=0)["child"]
    assert turn.cpu_s > 0.25
    assert "what a library prints" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dies", r"^bad: its process died: exit status -9"),
        ("raises", r"(?s)^bad failed:.*ValueError: no such thing"),
        ("cannot be built", r"(?s)^bad failed:.*ValueError: no such thing"),
    ],
)
def test_a_subject_that_fails_is_reported(tmp_path: Path, how: str, told: str) -> None:
    subjects = [Subject("good", noting, (tmp_path / "log", "good")), Subject("bad", failing, (how,))]
    with pytest.raises(MachineError, match=told):
        take_turns(subjects, 1, threads=1)
    for pid in {int(line[2]) for line in lines(tmp_path / "log")}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # the other process has been ended


def test_with_limits_a_subject_that_fails_or_hangs_is_given_up_alone(tmp_path: Path) -> None:
    subjects = [
        Subject("good", noting, (tmp_path / "log", "good")), Subject("unbuilt", failing, ("cannot be built",)),
        Subject("dead", failing, ("dies",)),
    ]  # fmt: skip
    limits = Limits(math.inf, math.inf, {})
    turns = take_turns(subjects, 2, threads=1, limits=limits)
    assert {name: len(own) for name, own in turns.items()} == {"good": 2, "unbuilt": 0, "dead": 0}
    assert limits.lost["unbuilt"].endswith("ValueError: no such thing\n") and "exit status -9" in limits.lost["dead"]
    limits = Limits(math.inf, time.monotonic() + 2, {})
    assert take_turns([Subject("hangs", hanging)], 1, threads=1, limits=limits) == {"hangs": []}
    assert limits.lost == {"hangs": "hangs: out of time"}


def test_work_that_times_itself_states_its_seconds() -> None:
    (turn,) = take_turns([Subject("A", timing_itself, (2.5,))], 1, threads=1)["A"]
    assert turn.wall_s == 2.5 and turn.facts == {"notes": 1.0}


def test_two_subjects_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two subjects of one name: A, A"):
        take_turns([Subject("A", failing, ("dies",))] * 2, 1, threads=1)


# --- the report


def test_a_table_holds_medians_and_ratios() -> None:
    turns = [Turn(wall, cpu, 100 + wall, {"kept MiB": 7.0}) for wall, cpu in ((1.0, 4.0), (9.0, 2.0), (2.0, 3.0))]
    other = [Turn(4.0, 6.0, 10.0, {})] * 3
    head, first, second, note = table({"A": turns, "B": other}, against="B", per=2, facts=["kept MiB"]).splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        "median s", "least s", "CPU s", "peak MiB", "kept MiB", "x wall", "x CPU",
    ]  # fmt: skip
    assert first.split() == ["A", "1", "0.5", "1.5", "109", "7", "0.50", "0.50"]
    assert second.split() == ["B", "2", "2", "3", "10", "-", "1.00", "1.00"]
    assert note == "x: ratio to B; medians of 3 turns"
    assert table({"A": turns}, against="A", unit="ms").splitlines()[1].split()[1:3] == ["2,000", "1,000"]
    with pytest.raises(ConfigError, match="no subject 'C' to compare with, there are A, B"):
        table({"A": turns, "B": other}, against="C")
    assert f"torch {torch.__version__}" in machine() and "3 thread(s) each" in machine(3)


# --- prediction


@pytest.mark.parametrize("masks", [True, False])
def test_prediction_finds_what_torchvision_finds(tmp_path: Path, masks: bool) -> None:
    _, pictures = draw(tmp_path, 2, SIZES["quickstart"])
    files = sorted(pictures.iterdir())
    weights, checkpoint = same_weights(tmp_path, "quickstart", masks, files)
    peer = peer_model("quickstart", masks).eval()
    peer.load_state_dict(torch.load(weights, weights_only=True))
    detector = load_detector(checkpoint, settings("quickstart"), alone("cpu"))
    for file, found in zip(files, detector.predict(list(map(str, files)), threshold=0), strict=True):
        with torch.inference_mode():
            expected = peer([decoded(file)])[0]
        assert len(found) == len(expected["scores"]) == 100 and (found.masks is not None) == masks
        torch.testing.assert_close(torch.from_numpy(found.scores), expected["scores"], rtol=1e-4, atol=1e-6)


# --- the training step


def test_scenes_are_a_function_of_the_seed_and_inside_the_picture() -> None:
    first, same, different = (make_scenes((96, 160), 2, seed) for seed in (1, 1, 2))
    assert torch.equal(first[1].near, same[1].near) and torch.equal(first[1].image, same[1].image)
    assert not torch.equal(first[0].image, different[0].image) and not torch.equal(first[0].image, first[1].image)
    for scene in first:
        assert scene.near.shape == (PROPOSALS, 4) and scene.image.shape == (3, 96, 160)
        for boxes in (scene.boxes, scene.near):
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([160, 96])).all()
            assert (boxes[:, 2:] >= boxes[:, :2]).all()
        drawn = scene.bitmaps().bool()
        for mask, box in zip(drawn, scene.boxes, strict=True):
            y, x = mask.nonzero().T
            extent = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (extent - box).abs().max() <= 1


def test_boxes_near_objects_come_first_and_random_ones_last() -> None:
    own = Proposals(torch.full((1, 6, 4), 1.0), torch.arange(10, 16)[None], torch.arange(6)[None] < 4)
    near = torch.arange(6.0)[None, :, None].expand(1, 6, 4) + 100
    mixed = near_objects(own, near, 2)
    assert mixed.boxes[0, :, 0].tolist() == [100, 101, 1, 1, 104, 105] and mixed.valid.all()


def test_both_sides_sample_as_many_regions_for_their_heads() -> None:
    """The step is timed with 128 positive regions out of 512 per picture."""
    scenes = make_scenes((128, 160), 1, 0)
    model = small_model(masks=False)
    model.box_head.cfg = model.box_head.cfg.model_copy(update={"regions_per_image": 512})
    model.rpn.cfg = model.rpn.cfg.model_copy(update={"post_nms_train": PROPOSALS, "pre_nms_train": 2000})
    guide(model, torch.stack([scenes[0].near]), NEAR)
    batch = to_batch(scenes)
    batch = batch._replace(gt=batch.gt._replace(labels=batch.gt.labels % NUM_CLASSES))
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    regions = model.step(features, areas, batch).regions
    peer = step_peer("gn", (128, 160)).roi_heads
    target = {"boxes": scenes[0].boxes, "labels": scenes[0].labels + 1, "masks": scenes[0].bitmaps()}
    *_, labels, _ = peer.select_training_samples([scenes[0].near], [target])
    assert regions.valid.sum() == len(labels[0]) == 512
    assert regions.positive.sum() == (labels[0] > 0).sum() == 128


def test_the_memory_of_a_step_is_shared_out_to_its_parts() -> None:
    model, batch = small_model(), make_batch([(96, 128)])
    cfg = Config(train=TrainConfig(global_batch=1, images_per_gpu=1))
    *rows, last = memory_by_part(model, lambda: backward(model, nullcontext, [batch], 1, cfg)).splitlines()[1:]
    table = {name: [float(figure) for figure in figures] for name, *figures in map(str.split, rows)}
    assert list(table) == ["backbone", "fpn", "rpn", "box_head", "mask_head", "rest"]
    kept, peak, state = map(int, re.findall(r"\d+", last))
    assert abs(state - 3 * sum(p.nbytes for p in model.parameters()) / MIB) < 1
    assert abs(kept - sum(figures[0] for figures in table.values())) < len(table)
    assert peak == max(figure for figures in table.values() for figure in figures[1:]) >= state + kept
    model.zero_grad()
    with TensorBytes(1 << 40) as counted:
        losses = model(batch)
        live = counted.live
    assert losses and abs(kept - live / MIB) < 1  # what lives after a forward pass
    assert "forward" not in vars(model.backbone) and "loss" not in vars(model.box_head)  # the model is as it was


# --- the command


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_compared_with_models_of_as_many_parameters(name: str) -> None:
    with torch.device("cpu" if name == "timm" else "meta"):  # torchvision computes RegNet's widths with tensors
        models = build_model(row_config(name, (480, 640), 2).model, CLASSES), ROWS[name].peer((480, 640))
    own, peer = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    features = {"fcos": 0, "atss": 0, "retinanet": 0, "c4": 2048}.get(name, 1024)
    background = 4 * (features + 1) + 256 + 1 if features else 0  # torchvision predicts its box and mask, too
    assert own + background == peer or (name == "cascade" and own > peer)


def test_every_benchmark_has_options_and_help() -> None:
    for name in NAMES:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "tools/benchmark.py"), name, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "--rounds" in done.stdout and "--threads" in done.stdout


@pytest.mark.slow
def test_commands_of_two_checkouts_are_timed() -> None:
    words = ["commands", "--only", "help", "analyze", "--num", "4", "--rounds", "1", "--beside", str(REPOSITORY)]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/benchmark.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "help: gndet train --help\n" in done.stdout and "analyze: gndet analyze" in done.stdout
    shown = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("beside ", "here "))]
    assert shown == ["beside", "here"] * 2


def test_a_command_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"(?s)gndet analyze nothing: exit status 2.*no such file"):
        command(REPOSITORY, ["analyze", "nothing"], str(tmp_path))()


def test_a_training_ends_once_it_has_logged_an_update(tmp_path: Path) -> None:
    endless = ["train.schedule.updates=100000", "data.train.count=4", "data.val.count=1", "train.log_every=1"]
    command(REPOSITORY, ["train", "quickstart", f"out={tmp_path / 'run'}", *endless], str(tmp_path))()
    assert any(line["kind"] == "train" for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
