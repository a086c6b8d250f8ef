"""docs/gndet_quickstart.ipynb runs from its first cell to its last in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from gndet.cli.main import parse

NOTEBOOK = REPOSITORY / "docs" / "gndet_quickstart.ipynb"
SHORT = {"UPDATES": 2, "IMAGES": 8}  # instead of the notebook's numbers
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
INSTALL = [n for n, cell in enumerate(c for c in CONTENT["cells"] if c["cell_type"] == "code") if cell["metadata"]]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip


def run_cell(text: str, names: dict[str, Any], folder: Path) -> str:
    """Run a cell like a notebook: lines with ! in the shell, with {name} filled in, the rest in Python.

    Returns the output of the commands.
    """
    python: list[str] = []
    printed = ""
    for line in [*text.splitlines(), "!"]:
        if not line.startswith("!"):
            python.append(line)
            continue
        exec(compile("\n".join(python), str(NOTEBOOK), "exec"), names)
        python = []
        command = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), line[1:])
        done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    return printed


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which all cells were run, and the output of their commands."""
    folder, before = tmp_path_factory.mktemp("notebook"), Path.cwd()
    patch, names, printed = pytest.MonkeyPatch(), {"__name__": "__main__"}, {}
    patch.setenv("MPLBACKEND", "Agg")
    os.chdir(folder)
    try:
        for number, text in enumerate(CODE):
            if number in INSTALL:
                continue
            for name, value in SHORT.items():
                text = re.sub(rf"(?m)^{name} = \d+$", f"{name} = {value}", text)
            printed[text] = run_cell(text, names, folder)
    finally:
        os.chdir(before)
        patch.undo()
    assert {name: names[name] for name in SHORT} == SHORT
    return folder, printed


@pytest.mark.slow
def test_every_step_leaves_its_files(ran: tuple[Path, dict[str, str]]) -> None:
    folder, _ = ran
    made = (
        "shapes.yaml", "sheet.png", "runs/shapes/config.yaml", "runs/shapes/predictions.png",
        "runs/shapes/metrics.jsonl", "runs/shapes/best/manifest.json", "runs/shapes/report.html", "curves.png",
        "detections.json", "pictures/3.png", "predictions/predictions.json", "predictions/sheet.png",
        "predictions/0.png", "mine.yaml",
    )  # fmt: skip
    assert [name for name in made if not (folder / name).is_file()] == []
    last = json.loads((folder / "runs/shapes/metrics.jsonl").read_text().splitlines()[-1])
    assert last["update"] == SHORT["UPDATES"]


@pytest.mark.slow
def test_commands_print_what_the_text_promises(ran: tuple[Path, dict[str, str]]) -> None:
    printed = {text.removeprefix("!"): words for text, words in ran[1].items()}
    assert "nothing is refused" in printed["gndet check shapes.yaml --sheet sheet.png"]
    assert "AP50" in printed["gndet evaluate runs/shapes --out detections.json"]
    own = next(words for text, words in printed.items() if text.endswith("!gndet config mine.yaml"))
    assert "annotations: annotations/train.json" in own and "kind: coco" in own


def test_every_command_is_one_of_gndet_s() -> None:
    shown = "\n".join("".join(cell["source"]) for cell in CONTENT["cells"])
    commands = re.findall(r"(?m)^!(gndet [^#\n]+)|`(gndet [a-z]+ --[^`]+)`", shown)
    commands = [shlex.split(cell or quoted)[1:] for cell, quoted in commands]
    verbs = {parse(words).verb for words in commands}
    assert verbs >= {"check", "train", "report", "evaluate", "predict", "config", "doctor"}


def test_the_file_is_a_clean_notebook_with_one_cell_that_installs() -> None:
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CONTENT["cells"]}) == len(CONTENT["cells"])
    for cell in CONTENT["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    tagged = [cell for cell in CONTENT["cells"] if "install" in cell["metadata"].get("tags", ())]
    assert len(tagged) == 1 == len(INSTALL) and "pip install" in "".join(tagged[0]["source"])


def test_nbformat_finds_nothing_wrong() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
