"""Parts of the day that need no quiet machine: what it is, and whether gndet is right on it."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor

from benchmarks.gpu_day.notes import CPU, DATA, DEVICE, ROOT, WORK, Notes, gndet, run
from benchmarks.timing import host_s, median_s
from gndet.checkpoint import load_checkpoint
from gndet.config.loading import config_from_dict, with_overrides
from gndet.modeling import resnet
from gndet.modeling.norms.triton_kernels import trouble
from gndet.train import train

PACKAGES = ("triton", "numpy", "pycocotools", "hotcoco", "pydantic", "msgspec", "safetensors", "tensorboard")
CARD = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,power.limit,ecc.mode.current"
KERNEL_TESTS = ("test_gpu*.py", "test_*kernel*.py")


def facts(note: Notes) -> None:
    """Note versions, the card, its rates for copies and matrix products, and what the host needs per operator."""
    prepared = (DATA / "commit").read_text() if (DATA / "commit").is_file() else "unknown"
    note("commit", commit() or prepared)
    note("commit that was prepared", prepared)
    note("python", platform.python_version())
    note("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, torchvision {torchvision.__version__}")
    note("packages", {name: version(name) for name in PACKAGES})
    note("cores", os.cpu_count())
    note("compiler", shutil.which("gcc") or shutil.which("cc") or "none: Triton and train.compile need one")
    note("Python.h", (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())
    note("float32 by TF32", {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32})
    with note.attempt("card"):
        note(
            "nvidia-smi",
            run(["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"], 20)[1].strip() if not CPU else "",
        )
        note("card", "CPU" if CPU else torch.cuda.get_device_name(0))
        note("kernels of norms", "not usable" if CPU else trouble(torch.device("cuda", 0)) or "in use")
    with note.attempt("rates"):
        source = torch.empty(2**20 if CPU else 2**30, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        note("copy GB/s", round(2 * source.numel() / median_s(lambda: target.copy_(source), DEVICE) / 1e9, 1))
        side = 256 if CPU else 8192
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        note("bf16 TFLOP/s", round(2 * side**3 / median_s(lambda: a @ b, DEVICE) / 1e12, 2))
        small = torch.zeros(8, device=DEVICE)
        note("host us per operator", round(host_s(lambda: small.add_(1), DEVICE) * 1e6, 2))


def commit() -> str:
    """Return the commit of the checkout, "" if it is not a repository here."""
    status, text, _ = run(["git", "describe", "--always", "--dirty"], 10) if shutil.which("git") else (1, "", 0.0)
    return "" if status else text.strip()


def version(name: str) -> str:
    """Return the version of a package, or "none"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def doctor(note: Notes) -> None:
    """Run `gndet doctor`."""
    file = WORK / "doctor.json"
    status, _, seconds = run(gndet("doctor", "--json", str(file)), note.left)
    note("status", status)
    note("seconds", round(seconds, 1))
    report = json.loads(file.read_text())
    note("verdict", report["verdict"])
    shown = [fact for section in report["sections"] for fact in section["facts"]]
    note("not good", [f"{fact['name']}: {fact['text']}" for fact in shown if fact["mark"] in ("warning", "wrong")])


def tests(note: Notes) -> None:
    """Run the tests that need a GPU, and those of the kernels, which elsewhere run by Triton's interpreter."""
    files = sorted({str(path.relative_to(ROOT)) for kind in KERNEL_TESTS for path in (ROOT / "tests").rglob(kind)})
    note("files", files)
    workers = ["-n", "0"] if CPU else ["-n", "5", "--dist", "load"]
    only = ["-k", "test_gpu or limit"] if CPU else []
    options = ["-q", "-p", "no:cacheprovider", "-rfE", "--tb=short", "--maxfail=20"]
    command = [sys.executable, "-P", "-m", "pytest", *options]
    status, text, seconds = run([*command, *workers, *only, *files], note.left)
    note("status", status)
    note("seconds", round(seconds, 1))
    note("summary", (text.strip().splitlines() or ["nothing"])[-1])
    note("failures", [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))][:30])
    if status not in (0, 5):  # 5: nothing to run
        raise RuntimeError(f"pytest ended with {status}: {text[-2000:]}")


def deterministic(note: Notes) -> None:
    """Do as `resume` does with deterministic: true; in a process of its own, because cuBLAS reads its setting once."""
    runs_twice(note, "deterministic=true")


def resume(note: Notes) -> None:
    """Find whether a run is the same twice, and the same when it is broken off and resumed."""
    runs_twice(note)


def runs_twice(note: Notes, *overrides: str) -> None:
    """Train a tiny detector, train it again, remove the newest checkpoints of that run, and resume it."""
    from run_files import forget

    whole, again = (WORK / f"{'-'.join(['run', *overrides])}-{name}" for name in ("whole", "again"))
    train_tiny(whole, *overrides)
    train_tiny(again, *overrides)
    note("the same command twice", difference(whole, again))
    forget(again, 4, 6)
    train_tiny(again, *overrides)
    note("broken off after 2 of 6 updates and resumed", difference(whole, again))


def train_tiny(folder: Path, *overrides: str) -> None:
    """Train the tiny detector of the tests, or resume its run."""
    cfg = config_from_dict(tiny_config(), "the day")
    train(with_overrides(cfg, [f"out={folder}", "train.norm_images=0", *overrides], "the day"))


def tiny_config() -> dict[str, Any]:
    """Return the config of the tests' tiny detector; on a CPU its ResNet becomes as thin as there."""
    from faults.tiny import CONFIG, THIN

    if CPU:
        resnet.WIDTH = THIN
    return CONFIG | {"device": DEVICE}


def difference(one: Path, other: Path) -> dict[str, object]:
    """Return how many tensors of the last checkpoints differ, and by how much relative to their norm."""
    first, second = tensors_of(one), tensors_of(other)
    off = {
        name: float((value.double() - second[name].double()).norm() / second[name].double().norm().clamp(min=1e-30))
        for name, value in first.items()
        if not torch.equal(value, second[name])
    }
    return {"tensors": len(first), "differ": len(off), "largest": max(off.values(), default=0.0)}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a run's last checkpoint."""
    groups = load_checkpoint(folder / "last").groups
    return {f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()}


def invariance(note: Notes) -> None:
    """Run `gndet invariance`, in float32 and float64, on real pictures where there are any."""
    file, words = WORK / "invariance.json", ["configs/quickstart.yaml", "data.train.count=40"]
    if CPU:
        (WORK / "tiny.yaml").write_text(yaml.safe_dump(tiny_config()))
        words = [str(WORK / "tiny.yaml")]
    elif (DATA / "bccd").is_dir():
        words = ["configs/bccd_r18_gn_scratch.yaml", f"data.root={DATA / 'bccd'}"]
    command = gndet("invariance", *words, "data.cache=", f"device={DEVICE}", "--out", str(file))
    status, text, seconds = run(command, note.left)
    note("status", status)
    note("seconds", round(seconds, 1))
    note("words", text.strip().splitlines()[-12:])
    report = json.loads(file.read_text())
    note("passed", report["passed"])
    note("worst", {dtype: worst(columns) for dtype, columns in report["differences"].items()})
    note("leaks", report["leaks"])


def worst(columns: dict[str, dict[str, dict[str, float | None]]]) -> tuple[float, str, str]:
    """Return the largest relative difference of a report on invariance, and where it is."""
    found = [(one["relative"] or 0.0, name, what) for name, column in columns.items() for what, one in column.items()]
    return max(found, default=(0.0, "", ""))
