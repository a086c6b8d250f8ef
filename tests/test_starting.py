"""What a start imports: the files of each verb are counted, and slow packages wait until something needs them.

Importing torchvision's package takes as long as importing torch; torch._dynamo, with sympy, takes longer.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SLOW = ("torchvision", "torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "matplotlib", "scipy", "pandas")
LISTED = "import json, sys; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
TORCH = 1_250  # modules that `import torch` loads (1,200 with torch 2.14)


def modules(code: str) -> list[str]:
    """Return the modules that a new process has loaded after some code."""
    command = [sys.executable, "-W", "ignore", "-c", f"{code}\n{LISTED}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import gndet.cli.main", 150),
        ("import gndet.data.datasets.reading", 520),
        ("import gndet.evaluation.detector", TORCH + 500),
        ("import gndet.toolbox.predict.predict", TORCH + 550),
        ("import gndet.train", TORCH + 620),
    ],
)
def test_a_start_imports_few_modules_and_no_slow_one(code: str, most: int) -> None:
    loaded = modules(code)
    assert not set(SLOW) & set(loaded) and len(loaded) <= most
    assert "torch" in loaded or most < TORCH


def test_a_training_needs_no_slow_package_until_its_report(tmp_path: Path) -> None:
    words = [
        "train", "configs/quickstart.yaml", f"out={tmp_path / 'run'}", "data.train.count=4", "data.val.count=2",
        "data.workers=0", "train.schedule.updates=2", "train.report=false", "train.vis_images=0",
    ]  # fmt: skip
    loaded = modules(f"from gndet.cli.main import main\nassert main({words!r}) == 0")
    assert not {"torchvision", "torch._dynamo", "sympy", "matplotlib"} & set(loaded)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_torchvision_can_be_imported_behind_its_operators() -> None:
    code = """
import torch
from gndet.ops.torchvision_ops import operators, roi_align
boxes = torch.tensor([[0, 0, 9, 9], [1, 0, 9, 9], [20, 0, 29, 9.0]])
scores, rois = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([[0, 1, 1, 5, 6.5]])
features = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
own = operators().nms(boxes, scores, 0.5), roi_align(features, rois.double(), 3, 0.5, 0, aligned=True)
own[1].sum().backward()
mine, features.grad = features.grad, None
import torchvision
theirs = torchvision.ops.nms(boxes, scores, 0.5), torchvision.ops.roi_align(features, rois.double(), 3, 0.5, 0, True)
theirs[1].sum().backward()
assert all(map(torch.equal, own, theirs)) and torch.equal(mine, features.grad)
assert torchvision.extension._has_ops() and torchvision.models.resnet18().fc.out_features == 1000
"""
    assert "torchvision.models" in modules(code)
