"""`gndet convert` from end to end: its output can be evaluated, trained from and read back; errors write nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from lived_in import BN, CLASSES, GN, config, features, lived_in, norm_names, pictures, save
from PIL import Image
from torch import nn

from gndet.checkpoint import load_checkpoint
from gndet.cli.main import main
from gndet.config.training import SourceConfig
from gndet.distributed.process import Process
from gndet.evaluation.detector import load_detector
from gndet.modeling.build import build_model
from gndet.modeling.norms.layers import FrozenBatchNorm
from gndet.train import train
from gndet.weights.convert import convert_batch_norm
from gndet.weights.load import initial_model
from gndet.weights.read import read_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of a BN detector, a torchvision ResNet-18 with running statistics, and three pictures."""
    folder = tmp_path_factory.mktemp("convert")
    start = save(folder / "start", config(BN), lived_in(config(BN)).state_dict())
    schedule = {"updates": 1, "warmup": 0, "steps": [], "reference_batch": 2}
    options = {"weights": start, "ema": 0.0, "schedule": schedule, "images_per_gpu": 2}
    train(config(BN, train=options).model_copy(update={"out": str(folder / "run")}))
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    (folder / "pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    return folder


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.resnet18().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))
    return net.eval()


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "tensorboard"}


# --- output


def test_a_bn_run_becomes_a_gn_checkpoint_that_says_what_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gn"
    assert main(["convert", str(folder / "run"), str(out), "--to", "gn", "--channels-per-group", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"gndet checkpoint -> {out}"
    assert "backbone: 20 norm layers converted from bn, damp 1; expected error 0." in printed
    assert sum("converted from bn, damp 1" in line for line in printed.splitlines()) == 30 + 4  # layers, parts

    run, saved = load_checkpoint(folder / "run" / "last"), load_checkpoint(out)
    for key in ("classes", "category_ids"):
        assert saved.meta[key] == run.meta[key]
    assert saved.meta["config"]["data"] == run.meta["config"]["data"]
    state, model = saved.groups["model"], build_model(config({**GN, "channels_per_group": 8}).model, len(CLASSES))
    model.load_state_dict(state)
    assert saved.meta["norms"].keys() == set(norm_names(model))
    for name in norm_names(model):
        numbers = [run.groups["model"][f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]
        groups = model.get_submodule(name).groups
        new = convert_batch_norm(*numbers, bn_eps=1e-5, groups=groups, eps=1e-5, damp=1)
        assert torch.equal(state[f"{name}.weight"], new.gamma) and torch.equal(state[f"{name}.bias"], new.beta)
        assert groups == len(new.gamma) // 8 and state[f"{name}.eps"].item() == new.eps
    rest = [key for key in state if ".norm." not in key]
    assert len(rest) > 40 and all(torch.equal(state[key], run.groups["model"][key]) for key in rest)


def test_it_is_evaluated_audited_and_trained_from_without_a_policy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gn"
    assert main(["convert", str(folder / "run"), str(out), "--to", "gn"]) == 0
    assert main(["evaluate", str(out)]) == 0 and "3 images" in capsys.readouterr().out
    assert main(["norms", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("converted from bn, damp 1") == 30 + 4 and "warning" not in printed
    model, _, notes, fates = initial_model(config(train={"weights": str(out)}), CLASSES)
    saved = load_checkpoint(out).groups["model"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert {fate.what for fate in fates.values()} == {"as in the file"} and not any("warn" in note for note in notes)


def test_a_torchvision_backbone_becomes_a_backbone_to_start_from(folder: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "gn", tmp_path / "bn"
    assert main(["convert", str(folder / "resnet18.pth"), str(out), "--to", "gn"]) == 0
    assert main(["convert", str(folder / "resnet18.pth"), str(plain)]) == 0
    saved = load_checkpoint(out)
    assert {key.partition(".")[0] for key in saved.groups["model"]} == {"backbone"} == set(saved.meta["parts"])
    assert saved.meta["classes"] == saved.meta["category_ids"] == []

    model, _, notes, fates = initial_model(config(train={"weights": str(out)}), CLASSES)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.groups["model"].items())
    assert set(fates) == {name for name in norm_names(model) if name.startswith("backbone.")}
    assert any(note.startswith("newly initialized tensors: fpn.") for note in notes)

    cfg = config(BN, train={"weights": str(plain)})
    batch = pictures(cfg)
    mean, std = (torch.tensor(x)[:, None, None] for x in (cfg.model.pixel_mean, cfg.model.pixel_std))
    got, net = features(initial_model(cfg, CLASSES).model, batch), resnet18()
    with torch.no_grad():
        x = net.maxpool(net.relu(net.bn1(net.conv1((batch.images - mean) / std))))
        for level, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
            x = stage(x)
            torch.testing.assert_close(got[f"C{level}"], x, rtol=1e-4, atol=1e-4)


def test_a_backbone_alone_is_no_detector_and_evaluation_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(folder / "resnet18.pth"), str(tmp_path / "a"), "--to", "gn"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a")]) == 2
    message = f"{tmp_path / 'a'}: holds only backbone, not a whole detector; use it as train.weights"
    assert message in capsys.readouterr().err


def test_calibration_fits_on_a_folder_of_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {}
    for policy in ("convert", "calibrate"):
        words = ["convert", str(folder / "run"), str(tmp_path / policy), "--to", "gn", "--policy", policy]
        assert main([*words, "--images", str(folder / "pictures"), "data.shortest_edge_test=64"]) == 0
        printed = capsys.readouterr().out
        assert "relative error on 3 images: C2 " in printed
        table = [line.split() for line in printed.splitlines() if line.startswith(("backbone.", "fpn.", "box_head."))]
        errors[policy] = [float(cells[2]) for cells in table]
    assert all(a <= b for a, b in zip(errors["calibrate"], errors["convert"], strict=True))
    assert max(errors["calibrate"]) < max(errors["convert"])
    norms = load_checkpoint(tmp_path / "calibrate").meta["norms"]
    assert set(norms.values()) == {"converted from bn, damp 1, fitted on 3 images"}


def test_count_limits_the_pictures_that_are_fitted_on(folder: Path, tmp_path: Path) -> None:
    words = ["convert", str(folder / "run"), str(tmp_path / "a"), "--to", "gn", "--policy", "calibrate", "--count", "2"]
    assert main([*words, "--images", str(folder / "pictures"), "data.shortest_edge_test=64"]) == 0
    assert set(load_checkpoint(tmp_path / "a").meta["norms"].values()) == {
        "converted from bn, damp 1, fitted on 2 images"
    }


def test_hybrid_writes_the_bn_frozen(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folder / "run"), str(tmp_path / "a"), "--to", "gn", "--policy", "hybrid"]) == 0
    model = load_detector(tmp_path / "a", [], Process(0, 1, torch.device("cpu"))).model
    assert all(isinstance(model.get_submodule(name), FrozenBatchNorm) for name in norm_names(model))


def test_what_is_written_for_torchvision_reads_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "torchvision.pth"
    assert main(["convert", str(folder / "run"), str(out), "--to", "torchvision"]) == 0
    assert "num_classes 5" in capsys.readouterr().out
    source = read_source(str(out), SourceConfig(classes=CLASSES))
    run = load_checkpoint(folder / "run" / "last").groups["model"]
    assert source.format == "torchvision" and source.num_classes == 4
    assert source.state.keys() == run.keys()
    wrong = [key for key, value in source.state.items() if not torch.equal(value, run[key])]
    assert wrong == []


# --- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/run", "{out}", "--to", "gn", "--channels-per-group", "24"],
         "model.backbone: norm channels_per_group: 24 does not divide 64 channels; these do: 1, 2, 4, 8, 16, 32, 64"),
        (["{folder}/run", "{out}", "--to", "gn", "--policy", "calibrate"],
         "--policy calibrate needs pictures to fit on: name files or folders with --images"),
        (["{folder}/run", "{out}", "--to", "gn", "--policy", "calibrate", "--images", "{out}"],
         "{out}: no such picture, video, folder or pattern"),
        (["{folder}/pictures/0.png", "{out}", "--to", "gn"], "{folder}/pictures/0.png: "),
        (["{folder}/pictures", "{out}", "--to", "gn"], "{folder}/pictures: "),
        (["{folder}/nothing.pth", "{out}"], "{folder}/nothing.pth: there is no such file or folder"),
        (["{folder}/run", "{out}", "model.norm.knid=gn"], "unknown key model.norm.knid; did you mean 'kind'?"),
        (["{folder}/run", "{out}", "train.source.bgr=maybe"], "train.source.bgr"),
        (["{folder}/run", "{folder}/start", "--to", "gn"], "{folder}/start: exists; choose another name"),
        (["{folder}/run", "{folder}/resnet18.pth", "--to", "torchvision"], "{folder}/resnet18.pth: exists; choose"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"folder": folder, "out": tmp_path / "out"}
    before = written(folder)
    assert main(["convert", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gndet convert: ") and message.format(**places) in error
    assert written(folder) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--channels-per-group", "0"), ("--count", "0"), ("--damp", "-1"), ("--damp", "nan")]
)
def test_numbers_out_of_range_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(folder / "run"), str(tmp_path / "out"), "--to", "gn", f"{option}={value}"])
    assert f"argument {option}: {value}: expected a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["convert", "norms"])
def test_help_does_not_import_torch(verb: str) -> None:
    code = f"import sys; from gndet.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: gndet {verb}" in done.stdout
