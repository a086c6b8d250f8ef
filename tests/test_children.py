"""Nothing of the current folder is imported, by any verb or any interpreter that one starts."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from faults.tiny import CONFIG, THIN
from PIL import Image

from gndet.cli.main import VERBS
from gndet.config.loading import load_config
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.shapes import read_shapes
from gndet.distributed.children import SAFE_PATH, python_command, safe_children

MODULES = (
    "numpy", "torch", "PIL", "json", "pickle", "tensorboard", "matplotlib", "multiprocessing", "subprocess", "yaml",
    "pydantic", "runpy", "socket", "onnx", "rich", "sitecustomize", "hotcoco", "pycocotools", "triton", "random",
)  # fmt: skip
CANARY = "open({!r}, 'a').write({!r})\nraise ImportError('from the current folder')\n"
# several command lines in one process, with thin layers, also in the ranks that import this file again
SCRIPT = f"""
import sys
from gndet.cli.main import main
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import spawn
from gndet.modeling import resnet
resnet.WIDTH = {THIN}
def meet(proc):
    all_gather([proc.rank], proc)  # a rank that leaves at once may hang up while the other still connects
    if proc.first:
        print("the ranks have met", flush=True)
if __name__ == "__main__":
    spawn(meet, 2, "cpu")
    for words in sys.argv[1:]:
        status = main(words.split())
        assert status in (0, 1), words  # 1: doctor has a finding
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `work`, whose files are named after packages, and beside it, as in bin/, a script `gndet`."""
    folder = tmp_path_factory.mktemp("hostile")
    home = folder / "work"
    (home / "gndet").mkdir(parents=True)
    for name in (*MODULES, "gndet/__init__", "gndet/toolbox", "gndet/cli"):
        (home / f"{name}.py").write_text(CANARY.format(str(folder / "CANARY"), f"{name}\n"))
    (folder / "gndet").write_text(SCRIPT)
    (home / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}))
    cfg = load_config(home / "tiny.yaml")
    dataset = read_shapes(cfg.data.val)
    (home / "ann.json").write_text(json.dumps(to_coco(dataset)))
    (home / "images").mkdir()
    for record in dataset.records:
        Image.fromarray(record.load()).save(home / "images" / record.file_name)
    return folder


def run(hostile: Path, command: list[str]) -> str:
    """Run a command in the hostile folder, without the repository as its current folder.  Returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(hostile)}
    environment.pop(SAFE_PATH, None)
    done = subprocess.run(command, cwd=hostile / "work", env=environment, capture_output=True, text=True)
    ran = hostile / "CANARY"
    assert not ran.exists(), f"{command} imported {ran.read_text()}"
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def gndet(hostile: Path, *lines: str) -> str:
    """Run command lines as the installed script does, whose folder comes first on the path."""
    return run(hostile, [sys.executable, str(hostile / "gndet"), *lines])


STEPS = [
    "config tiny.yaml", "check ann.json --images --sheet sheet.png --json check.json", "norms tiny.yaml",
    "train tiny.yaml out=run train.schedule.updates=2 data.workers=1 train.report=true",
    "evaluate run data.workers=1 --out found.json", "predict run images data.workers=1 --out drawn",
    "analyze run --csv tables --json analysis.json", "report run --out page.html", "convert run out --to torchvision",
    "export run --onnx run.onnx --size 64x64", "convert-data ann.json copy --to yolo",
]  # fmt: skip
STARTING = [
    "doctor --json doctor.json", "invariance tiny.yaml --out invariance.json",
    "norm-study tiny.yaml --norms gn --images-per-gpu 1 --seeds 1 --out study train.schedule.updates=2",
]  # fmt: skip


def test_verbs_and_spawned_ranks_run_nothing_of_the_current_folder(hostile: Path) -> None:
    assert "the ranks have met" in gndet(hostile, *STEPS)


@pytest.mark.slow
def test_verbs_that_start_interpreters_run_nothing_of_the_current_folder(hostile: Path) -> None:
    assert {words.split()[0] for words in STEPS + STARTING} == VERBS.keys()
    said = gndet(hostile, *STARTING)
    assert "passed: an image trains the same" in said and "verdict: " in said and "curve ->" in said


def test_a_module_run_by_name_runs_nothing_of_the_current_folder_but_a_package_gndet(hostile: Path) -> None:
    """`python -m gndet.cli` finds a folder gndet before any code of ours can run, but no other name."""
    (hostile / "work" / "gndet").rename(hostile / "work" / "aside")
    try:
        run(hostile, [sys.executable, "-m", "gndet.cli", "check", "ann.json", "--images"])
        run(hostile, [sys.executable, "-m", "gndet.cli", "norms", "tiny.yaml"])
    finally:
        (hostile / "work" / "aside").rename(hostile / "work" / "gndet")


PROBE = "import json, os, sys; print(json.dumps([sys.path, sys.flags.safe_path]))"


def test_children_of_children_are_safe_and_the_environment_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for before in (None, "", "1"):
        monkeypatch.delenv(SAFE_PATH, raising=False) if before is None else monkeypatch.setenv(SAFE_PATH, before)
        with safe_children():
            again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROBE!r}])"
            said = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True).stdout
        path, safe = json.loads(said)
        assert safe and "" not in path and str(tmp_path) not in path
        assert os.environ.get(SAFE_PATH) == before


def test_a_command_finds_gndet_without_an_installation(tmp_path: Path) -> None:
    command = [*python_command("gndet.cli", "config", str(REPOSITORY / "configs/quickstart.yaml"))]
    command[1:1] = ["-S", "-E"]  # no site-packages, no PYTHONPATH: only gndet's own folder is left
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'gndet'" not in done.stderr and "No module named" in done.stderr  # a package it needs


def test_every_interpreter_is_started_with_a_safe_path() -> None:
    """sys.executable is followed by -P wherever it stands."""
    for path in [file for folder in ("gndet", "benchmarks", "tools") for file in (REPOSITORY / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        safe = [
            node.elts[0] for node in ast.walk(tree) if isinstance(node, ast.List) and len(node.elts) > 1
            and isinstance(node.elts[1], ast.Constant) and node.elts[1].value == "-P"
        ]  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable":
                assert any(node is first for first in safe), f"{path}:{node.lineno}"
