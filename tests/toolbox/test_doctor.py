"""`gndet doctor` reports what works and names what does not; it survives whatever is broken."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import REPOSITORY
from models import NUM_CLASSES, small_config
from packaging.specifiers import SpecifierSet
from torch import Tensor

from gndet.checkpoint import save_checkpoint
from gndet.cli.main import main
from gndet.config.loading import load_config
from gndet.config.training import OptimizerConfig, TrainConfig
from gndet.errors import ConfigError, OutputError
from gndet.modeling.build import build_model
from gndet.modeling.norms import group_norm
from gndet.ops import conv3x3, matching_kernels, nms_kernels, roi_align, roi_align_kernels
from gndet.ops.conv3x3 import Product, Winograd
from gndet.toolbox.doctor import devices, inside, kernels, loading, packages, room
from gndet.toolbox.doctor import doctor as package
from gndet.toolbox.doctor.doctor import doctor, follow
from gndet.toolbox.doctor.facts import Fact, health_verdict, line, without_names
from gndet.training.batch_size import checkpoint_bytes
from gndet.training.optim import make_optimizer, optimizer_tensors

QUICKSTART = str(REPOSITORY / "configs/quickstart.yaml")
CPU = torch.device("cpu")
MIB = 2**20
Usage = namedtuple("Usage", "total used free")


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_the_report_is_whole_says_the_same_as_json_and_names_no_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path.home())  # the report shows the free disk space of the current folder
    monkeypatch.setattr(sys, "argv", ["gndet"])
    status, text = shown(["--json", str(tmp_path / "report.json")], capsys)
    report = json.loads((tmp_path / "report.json").read_text())
    facts = [Fact(**fact) for section in report["sections"] for fact in section["facts"]]
    assert status == 0 and report["healthy"] is True, text
    assert text.rstrip().endswith(report["verdict"]) and report["verdict"].startswith("verdict: healthy")
    lines = [*(section["title"] for section in report["sections"]), *map(line, facts), report["verdict"]]
    assert sorted(filter(None, text.splitlines())) == sorted(lines)
    titles = [section["title"] for section in report["sections"]]
    assert titles == ["gndet doctor", "packages", "devices", "kernels", "data loader", "disk"]
    names = {fact.name for fact in facts}
    assert names >= {
        "gndet", "Python", "system", "C library", "torch", "torchvision", "numpy", "pycocotools", "hotcoco",
        "tensorboard", "pydantic", "matplotlib", "onnxruntime", "av", "torch with torchvision", "processor", "cores",
        "memory", "group norm float32, cpu", "group norm bfloat16, cpu", "Winograd, cpu", "NMS, cpu",
        "RoIAlign float32, cpu", "metrics, cpu", "one process", "loader processes", "data wait", "open files",
        "this folder", "data cache",
    }  # fmt: skip
    assert str(Path.home()) not in text and "~: " in text


# --- packages that cannot be imported, crash or hang


def test_a_torchvision_whose_operators_are_missing_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    done = in_a_process(tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "cannot be imported: RuntimeError: operator torchvision::nms does not exist" in done.stdout
    assert "\ndevices\n  processor" in done.stdout  # facts that need only torch are still reported
    last = done.stdout.splitlines()[-1]
    assert last.startswith("verdict: will not work: torchvision, kernels")


def test_a_package_that_kills_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "hotcoco.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    done = in_a_process(tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "importing hotcoco ended the process with signal 11 (Segmentation fault)" in done.stdout
    assert "  pycocotools  " in done.stdout  # the facts found before the crash
    assert done.stdout.splitlines()[-1] == "verdict: will not work: packages"


def in_a_process(first: Path) -> subprocess.CompletedProcess[str]:
    """Run the doctor with a folder that shadows the installed packages."""
    environment = os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "gndet.cli", "doctor"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def test_files_of_this_folder_do_not_pass_for_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('mine')\n")
    monkeypatch.chdir(tmp_path)
    found = package.examine([])
    assert next(fact for fact in found if isinstance(fact, Fact) and fact.name == "numpy").mark == "ok"
    found.close()


def test_what_hangs_is_ended_and_named() -> None:
    code = """if True:
        import time
        from gndet.toolbox.doctor import inside

        def rows():
            yield {"title": "devices"}
            yield {"trying": "asking for GPUs"}
            time.sleep(600)

        inside.PATIENCE = 1
        inside.write(rows())
    """
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process,
    ):
        found = list(follow(process, stderr))
    assert found[-1].mark == "wrong" and found[-1].text.startswith("asking for GPUs did not finish within")


# --- planted faults


def off(function: Callable) -> Callable:
    """Return the function with its first result made 1 % too large."""

    def wrong(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    return wrong


FLOAT, BF16 = (partial(kernels.group_norm, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
PADDED = {"plain padded", "channels last padded"}


@pytest.mark.parametrize(
    "where, name, compare, named",
    [
        (torch, "group_norm", FLOAT, {"plain", "channels last"}),
        (torch, "group_norm", BF16, {"plain", "channels last"}),
        (group_norm, "gradients", FLOAT, PADDED),
        (group_norm, "_normalize_crops", FLOAT, PADDED),
        (conv3x3, "convolve", partial(kernels.convolution, Winograd), {"result", "gradient"}),
        (conv3x3, "weight_from_transformed", partial(kernels.convolution, Winograd), {"gradient of the weight"}),
        (Product, "_sum", partial(kernels.convolution, Product), {"gradient"}),
        (Product, "_patches", partial(kernels.convolution, Product), {"result", "gradient of the weight"}),
        (roi_align, "_pool_bags", partial(kernels.roi_align, CPU, torch.float32), {"regions", "gradient"}),
    ],
)
def test_a_kernel_that_is_off_by_one_percent_is_found(
    where: object, name: str, compare: Callable, named: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = max(kernels.TOLERANCES.values())
    assert kernels.judged("it", tolerance, compare).mark == "ok"
    monkeypatch.setattr(where, name, off(getattr(where, name)))
    tolerance = 9e-3  # above bfloat16's unit in the last place, 0.4 %, and below the planted 1 %
    fact = kernels.judged("it", tolerance, compare)
    assert fact.mark == "wrong"
    assert {case for case, error in compare().items() if error > tolerance} == named
    assert all(f"{case} is off by 0.0" in fact.text for case in named)


def test_every_kernel_is_tried_with_a_tolerance_that_finds_a_percent() -> None:
    names = {name: tolerance for name, tolerance, _ in kernels.comparisons(CPU)}
    assert set(names) == {
        "group norm float32", "group norm bfloat16", "Winograd", "small convolutions", "metrics", "NMS",
        "RoIAlign float32",
    }  # fmt: skip
    assert all(tolerance < 1e-2 for name, tolerance in names.items() if "bfloat16" not in name)
    on_gpu = {name for name, *_ in kernels.comparisons(torch.device("cuda", 0))}
    assert {"group norm float16", "RoIAlign float16", "RoIAlign bfloat16"} < on_gpu


def test_the_norm_is_compared_with_what_torch_computes_in_float64() -> None:
    x, gamma, beta = (kernels.noise(shape, seed).double() for seed, shape in enumerate((kernels.MAP, (64,), (64,))))
    found = kernels.exact_group_norm(x, gamma, beta, (kernels.MAP[2:],) * 2)
    torch.testing.assert_close(found, F.group_norm(x, kernels.GROUPS, gamma, beta, 1e-5))


def test_a_box_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "nms_keep", lambda boxes, scores, groups, valid, threshold: valid)
    fact = kernels.judged("NMS", 0.0, partial(kernels.nms, CPU))
    assert fact.mark == "wrong" and fact.text.startswith("boxes kept is off by 0.")


def test_an_operator_that_fails_or_gives_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.judged("it", 1e-3, lambda: {"result": float("nan")}).mark == "wrong"
    assert kernels.relative_error(torch.full((2,), torch.nan), torch.ones(2)) == float("inf")

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(torchvision.ops, "roi_align", fail)
    fact = kernels.judged("RoIAlign", 1e-4, partial(kernels.roi_align, CPU, torch.float32))
    assert fact == Fact("RoIAlign", "fails: RuntimeError: operator torchvision::roi_align does not exist", "wrong")


def test_the_smallest_difference_of_metrics_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    true = kernels.coco_metrics

    def wrong(truths: object, results: object, *, engine: str, max_detections: int) -> dict:
        found = true(truths, results, engine=engine, max_detections=max_detections)
        if engine == "hotcoco":
            found["bbox"].summary["AP75"] += 1e-9
        return found

    monkeypatch.setattr(kernels, "coco_metrics", wrong)
    fact = kernels.judged("metrics", 0.0, kernels.metrics)
    assert fact.mark == "wrong" and "hotcoco's bbox is off by 1e-09" in fact.text and "segm" not in fact.text


def test_triton_kernels_in_trouble_are_a_warning_with_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "trouble", lambda device: "the gradient is wrong")
    monkeypatch.setattr(nms_kernels, "trouble", lambda device: "3 of 300 boxes are wrong")
    monkeypatch.setattr(roi_align_kernels, "trouble", lambda device: "the result of stride 4 is wrong")
    monkeypatch.setattr(matching_kernels, "trouble", lambda device: "random ranks are wrong")
    fact = kernels.triton_kernels(torch.device("cuda", 0))
    words = "the gradient is wrong; 3 of 300 boxes are wrong; the result of stride 4 is wrong; random ranks are wrong"
    assert fact.mark == "warning" and fact.text.startswith(f"{words}: torch's slower operators are used")


def test_a_chain_of_boxes_that_suppress_each_other_is_followed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
        suppresses = (torch.stack([torchvision.ops.box_iou(image, image) for image in boxes]) > threshold).triu(1)
        suppresses, keep = suppresses & (groups[:, :, None] == groups[:, None]), valid
        for _ in range(32):
            keep = valid & ~(suppresses & keep[:, :, None]).any(1)
        return keep

    monkeypatch.setattr(kernels, "nms_keep", rounds)
    assert kernels.judged("NMS", 0.0, partial(kernels.nms, CPU)).mark == "wrong"


def test_a_gpu_whose_memory_is_taken_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(kernels, "trouble", full)
    fact = kernels.triton_kernels(torch.device("cuda", 1))
    assert fact.mark == "warning" and fact.text.startswith("could not be tested: OutOfMemoryError: CUDA out of memory")


# --- limits and versions


def test_limits_of_files_memory_and_disk_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert loading.open_files(32, 256).mark == "warning" and "ulimit -n" in loading.open_files(32, 256).text
    assert loading.open_files(2, 1024).mark == "ok"
    assert devices.memory(32 << 30, 20 << 30, None).mark == ""
    assert devices.memory(32 << 30, 20 << 30, (4 << 30, 3 << 30)).mark == "warning"  # a container's limit counts
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))
    assert room.disk("run folder", tmp_path / "a" / "b", 240_000_000, 4).mark == "ok"
    assert room.disk("run folder", tmp_path, 260_000_000, 4).mark == "wrong"
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")
def test_a_driver_whose_gpu_torch_does_not_find_is_a_warning() -> None:
    assert devices.no_gpu("", "built without CUDA").mark == ""
    fact = devices.no_gpu("550.54.14", "built without CUDA")
    assert fact.mark == "warning" and "550.54.14 is loaded" in fact.text


def test_a_checkpoint_is_as_large_as_predicted(tmp_path: Path) -> None:
    model = build_model(small_config(), NUM_CLASSES)
    cfg = TrainConfig(optimizer=OptimizerConfig(kind="adamw"))
    optimizer = make_optimizer(cfg.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    groups = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    save_checkpoint(tmp_path / "one", groups, {})
    written = sum(file.stat().st_size for file in (tmp_path / "one").iterdir())
    assert checkpoint_bytes(model, cfg) == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(
    "torch_version, vision, asks, mark",
    [
        ("2.14.1", "0.29.1", "==2.14.1", "ok"),
        ("2.13.0", "0.29.1", "==2.14.1", "wrong"),
        ("2.14.1+cu130", "0.29.1+cu130", "==2.14.1", "ok"),
        ("2.14.1+cu130", "0.29.1+cpu", "==2.14.1", "wrong"),
        ("2.14.1", "0.29.1", "", "ok"),
    ],
)
def test_torch_and_torchvision_of_two_releases_are_found(torch_version: str, vision: str, asks: str, mark: str) -> None:
    assert packages.judge_pairing(torch_version, vision, SpecifierSet(asks)).mark == mark


def test_versions_are_compared_by_their_numbers() -> None:
    judge, any_version = packages.judge_package, SpecifierSet()
    assert judge("numpy", "numpy", SpecifierSet(">=1.9,<99"), "").mark == "ok"
    assert judge("numpy", "numpy", SpecifierSet(">=99"), "").mark == "warning"
    assert judge("no-such-package", "numpy", any_version, "").mark == "wrong"
    assert judge("no-such-package", "numpy", any_version, "videos").mark == ""
    assert packages.requirements("tensorboard")["numpy"].contains("1.26")


# --- with a config


def test_a_bad_config_or_json_file_is_refused_before_anything_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"unknown key model\.norm\.knid"):
        doctor(said.append, QUICKSTART, ["model.norm.knid=gn"], None)
    with pytest.raises(ConfigError, match="nowhere"):
        doctor(said.append, str(tmp_path / "nowhere.yaml"), [], None)
    (tmp_path / "mine.json").write_text('{"images": []}')
    with pytest.raises(OutputError, match="is not a report of gndet doctor"):
        doctor(said.append, None, [], tmp_path / "mine.json")
    with pytest.raises(OutputError, match="expected the name of a file"):
        doctor(said.append, None, [], tmp_path)
    with pytest.raises(ConfigError, match=r"override 'seed=1': has no effect without --config"):
        doctor(said.append, None, ["seed=1"], None)
    assert said == [] and (tmp_path / "mine.json").read_text() == '{"images": []}'


def test_the_disk_of_the_home_is_the_one_that_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fact = next(fact for fact in room.facts(load_config(QUICKSTART, ["out=~/runs"])) if isinstance(fact, Fact))
    assert fact.text.startswith(f"{tmp_path}/runs: ")


def test_data_that_is_refused_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "STEPS", {"loading": "data loader", "room": "disk"})
    said = list(inside.rows([str(REPOSITORY / "configs/bccd_r18_gn_scratch.yaml"), f"data.root={tmp_path}"]))
    wrong = [row for row in said if row.get("mark") == "wrong"]
    assert [row["name"] for row in wrong] == ["data loader"] and f"{tmp_path}: is empty" in wrong[0]["text"]
    assert {"run folder"} <= {row.get("name") for row in said}  # the steps after it still run


def test_a_config_s_data_is_loaded_as_the_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SECONDS", 0.1)
    cfg = load_config(QUICKSTART, ["data.train.count=5", "data.workers=1"])
    used = loading.few_pictures(cfg)
    assert used.data.train.count == 5 and loading.images_per_batch(used) == 2 and used.model.masks
    found = {fact.name: fact for fact in loading.facts(cfg) if isinstance(fact, Fact)}
    assert found["loader processes"].mark == "ok" and "data.workers=1" in found["loader processes"].text
    assert "none if training on 2 images takes" in found["data wait"].text


# --- wording


def test_the_verdict_names_what_is_wrong_and_what_is_warned_of() -> None:
    facts = [Fact("torch", "2", "ok"), Fact("NMS", "off", "wrong"), Fact("disk", "full", "warning"), Fact("cpu", "x")]
    assert health_verdict(facts) == "verdict: will not work: NMS; 1 warning: disk"
    assert health_verdict(facts[::3]) == "verdict: healthy"


def test_names_of_the_account_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "alice")
    assert without_names("/home/alice/runs and /data/alice/x, /home/alice2, malice") == (
        "~/runs and /data/USER/x, /home/alice2, malice"
    )
    monkeypatch.setenv("HOME", "/")
    assert without_names("/tmp/a") == "/tmp/a"
