"""A classifier is trained, killed, resumed, spread over ranks, evaluated, exported, and starts a detector."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from classes import CONFIG, write_classes
from faults.launch import finish, start
from faults.tiny import CONFIG as DETECTION
from run_files import assert_same, forget, last, load, losses, wait_for
from torch import nn

from gndet.checkpoint import load_checkpoint
from gndet.cli.main import main
from gndet.config.loading import load_config
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import alone
from gndet.errors import CheckpointError, TrainingError
from gndet.evaluation.classification import UNREAD, Classification, Ranking
from gndet.evaluation.detector import load as load_detector
from gndet.evaluation.picture_classifier import evaluate_classifier, load_picture_classifier
from gndet.modeling.classifier import Classifier
from gndet.modeling.trained import build_trained, read_trained
from gndet.toolbox.report.report import write_report
from gndet.train import train
from gndet.weights.load import initial_model

MIXED = (  # everything that draws
    "data.crop.rand_augment=2", "data.crop.mixup=0.2", "data.crop.cutmix=1", "model.backbone.stochastic_depth=0.3",
    "model.classifier.loss=sigmoid", "model.classifier.target_threshold=0.2", "model.classifier.dropout=0.2",
    "model.classifier.fc_channels=[16]", "train.optimizer.kind=lamb", "train.optimizer.lr=0.005",
)  # fmt: skip
TWO = "evaluation.images_per_gpu=2"  # one picture's last map is one number per channel
pytestmark = pytest.mark.usefixtures("thin", "forked_ranks")


def write_config(folder: Path, counts: dict[str, int] | None = None) -> Path:
    write_classes(folder / "set", counts)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": CONFIG["data"] | {"root": str(folder / "set")}}))
    return path


def overrides(folder: Path) -> tuple[str, ...]:
    """Turn the tiny detector's config, which `start` writes, into that of a classifier."""
    if not (folder / "set").exists():
        write_classes(folder / "set")
    kinds = ("data.train.kind=folders", "data.val.kind=folders", "data.crop.size=32")
    return ("task=classification", f"data.root={folder / 'set'}", *kinds, "train.global_batch=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """The config of a run of 6 updates, `run`, which no test changes."""
    config = write_config(tmp_path_factory.mktemp("trained"))
    train(load(config, "run"))
    return config


def test_it_learns_and_reports(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    recipe = ("train.schedule.updates=40", "train.schedule.steps=[]", "train.eval_every=20", "train.ema=0")
    adamw = ("train.optimizer.kind=adamw", "train.optimizer.lr=0.002")
    assert train(load(config, "run", *recipe, *adamw)) == {"top1": 1.0, "top5": 1.0, "error": 0.0}
    found = losses(tmp_path / "run")
    assert found[0][1] > 0.9 and found[-1][1] < 0.3
    content = json.loads((tmp_path / "run" / "classified.json").read_text())
    assert content["classes"] == ["blue", "green", "red"]
    assert [row[1] for row in content["images"]] == [row[2] for row in content["images"]] == [0, 0, 1, 1, 2, 2]
    page = write_report([tmp_path / "run"], None, (), lambda _: None).read_text()
    assert 'id="confusion"' in page and "could not be made" not in page and 'id="quality"' not in page
    train(load(config, "other", "train.ema=0"))
    both = write_report([tmp_path / "run", tmp_path / "other"], tmp_path / "two.html", (), lambda _: None).read_text()
    assert "top-1 error, percent" in both and "could not be made" not in both


def test_other_verbs_score_it_or_say_what_it_is(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.parent / "run"
    assert main(["evaluate", str(run)]) == 0
    assert "top-1 error" in capsys.readouterr().out
    meta = load_checkpoint(run / "best", ()).meta
    assert meta["best"] == meta["metrics"]["top1"] and set(meta["metrics"]) == {"top1", "top5", "error"}
    assert main(["norms", str(trained)]) == 0 and main(["norms", str(run)]) == 0
    assert main(["check", str(trained), "--images"]) == 0
    with pytest.raises(CheckpointError, match="a classifier, not a detector"):
        load_detector(run)
    pictures = [str(trained.parent / "set" / "val" / "red"), "--out", str(trained.parent / "classes")]
    assert main(["predict", str(run), *pictures]) == 0 and "val-red-0.png: " in capsys.readouterr().out
    assert main(["analyze", str(run)]) == 2 and "its report shows its confusions" in capsys.readouterr().err


def test_gndet_invariance_passes(trained: Path) -> None:
    out = trained.parent / "report.json"
    assert main(["invariance", str(trained), "model.classifier.dropout=0.3", "model.classifier.fc_channels=[16]",
                 "--out", str(out)]) == 0  # fmt: skip
    columns = json.loads(out.read_text())["differences"]["float64"]
    assert {"loss_class", "features P5", "d all / d classifier", "logits"} <= set(columns["beside a wider"])
    assert all(diff["relative"] < 1e-11 for column in columns.values() for diff in column.values())
    assert main(["invariance", str(trained), *MIXED]) == 0
    assert main(["invariance", str(trained), "model.norm.kind=bn", "data.crop.size=64"]) == 1


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    words = (*overrides(tmp_path), *MIXED)
    finish(tmp_path, "unbroken", *words)
    killed = start(tmp_path, "killed", "data.workers=1", *words, faults={"gate": [3]})
    wait_for((killed.out / "last").exists)
    killed.signal(signal.SIGKILL)
    killed.expect(-signal.SIGKILL)
    assert "continuing after update" in finish(tmp_path, "killed", *words)
    assert_same(tmp_path / "unbroken", tmp_path / "killed")
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "killed")


@pytest.mark.parametrize("more", [(), MIXED], ids=["plain", "mixed"])
def test_two_ranks_and_accumulation_learn_what_one_batch_does(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = (*overrides(tmp_path), "train.precision=float64", *more)
    finish(tmp_path, "whole", *words, "train.images_per_gpu=4")
    finish(tmp_path, "single", *words, "train.images_per_gpu=1")
    finish(tmp_path, "ranks", *words, "train.images_per_gpu=2", world=2)
    whole = last(tmp_path / "whole")
    for name in ("single", "ranks"):
        other = last(tmp_path / name)
        moved = [key for key in whole if whole[key].is_floating_point()]
        assert all((other[key] - whole[key]).norm() <= 1e-9 * whole[key].norm() for key in moved)
        assert load_checkpoint(tmp_path / name / "last", ()).meta["metrics"].keys() == {"top1", "top5", "error"}


def test_unreadable_pictures_are_replaced_and_count_as_errors(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    cfg = load(config, "run", "data.max_unreadable=0.5", "train.schedule.updates=4", "train.schedule.steps=[]")
    data = read_dataset(cfg.data.train, cfg.data)
    assert len(data.records) == 15
    for split in ("train", "val"):  # their headers are whole, their pixels are not
        path = tmp_path / "set" / split / "red" / f"{split}-red-1.png"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    assert 0 <= train(cfg)["top1"] <= 5 / 6
    guesses = {row[0]: row[2] for row in json.loads((tmp_path / "run" / "classified.json").read_text())["images"]}
    assert [image for image, guess in guesses.items() if guess == UNREAD] == [6]
    forget(tmp_path / "run", 4)
    with pytest.raises(TrainingError, match=r"max_unreadable"):
        train(load(config, "run", "data.max_unreadable=0", "train.schedule.updates=4", "train.schedule.steps=[]"))


def test_a_detector_starts_from_its_backbone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "detector.yaml").write_text(yaml.safe_dump(DETECTION | {"device": "cpu"}))
    cfg = load(tmp_path / "detector.yaml", "run", f"train.weights={trained.parent / 'run'}")
    start = initial_model(cfg, ("disc", "box"))
    state = read_trained(trained.parent / "run").state
    backbone = {key: value for key, value in start.model.state_dict().items() if key.startswith("backbone.")}
    assert len(backbone) > 50 and all(torch.equal(value, state[key]) for key, value in backbone.items())
    assert {fate.what for fate in start.fates.values()} == {"as in the file"}
    assert any(note.startswith("tensors of the file not used: classifier.logits") for note in start.notes)
    bn = load(tmp_path / "detector.yaml", "run", f"train.weights={trained.parent / 'run'}", "model.norm.kind=bn")
    with pytest.raises(CheckpointError, match="norm_policy"):
        initial_model(bn, ("disc", "box"))


def test_a_classifier_of_other_classes_keeps_the_rows_it_knows(trained: Path) -> None:
    cfg = load(trained, "other", f"train.weights={trained.parent / 'run'}")
    rows = initial_model(cfg, ("red", "yellow")).model.state_dict()["classifier.logits.weight"]
    state = read_trained(trained.parent / "run").state["classifier.logits.weight"]
    assert torch.equal(rows[0], state[2]) and not (rows[1] == state).all(1).any()


def test_torchvision_loads_what_convert_writes(trained: Path, tmp_path: Path) -> None:
    assert main(["convert", str(trained.parent / "run"), str(tmp_path / "tv.pth"), "--to", "torchvision"]) == 0
    tensors = torch.load(tmp_path / "tv.pth", weights_only=True)
    peer = torchvision.models.resnet18(
        num_classes=3, norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels)
    )
    wide = {key: value.shape for key, value in peer.state_dict().items()}
    assert tensors.keys() == wide.keys()  # the test's ResNet is thin; tests/modeling compares logits
    model = read_trained(trained.parent / "run")
    built = build_trained(model, model.config.model)
    assert isinstance(built, Classifier)
    assert torch.equal(tensors["fc.weight"], built.classifier.logits.weight)


def test_metrics_are_those_worked_by_hand() -> None:
    ranked = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 1], [UNREAD] * 5])
    found = Classification(Ranking(np.arange(4), ranked, np.zeros(4)), np.array([0, 0, 0, 5]))
    assert found.scalars() == {"top1": 0.25, "top5": 0.5, "error": 0.75}
    expected = np.zeros((6, 7), dtype=int)
    expected[0, [0, 1, 5]], expected[5, 6] = 1, 1
    assert np.array_equal(found.confusion(6), expected)


def test_bn_is_evaluated_with_the_statistics_asked_for(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    bn = ["model.norm={kind: bn}", "train.schedule.updates=2", f"out={tmp_path / 'run'}"]
    train(load_config(config, bn))
    by_option = {
        option: evaluate_classifier(
            load_picture_classifier(tmp_path / "run", option.split(), alone("cpu")), alone("cpu")
        )[1].ranking.scores
        for option in (
            "seed=0",
            "evaluation.precise_bn=6",
            "evaluation.batch_statistics=true evaluation.images_per_gpu=2",
        )
    }
    running, precise, batch = by_option.values()
    assert not np.allclose(running, precise) and not np.allclose(running, batch) and not np.allclose(precise, batch)
