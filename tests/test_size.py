"""The amount of code: files, lines, and what `import gndet.train` loads stay below their limits."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

ROOM = REPOSITORY / "gndet"
FILES = sorted(ROOM.rglob("*.py"))
PATH = REPOSITORY / "docs" / "reading_the_code.md"
LOADED = """
import sys
import gndet.train
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "gndet":
        print(module.__file__)
"""


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def reading_path() -> list[Path]:
    """Return the files of docs/reading_the_code.md in reading order."""
    return [REPOSITORY / name for name in re.findall(r"(?m)^\d+\. \[`(gndet/[^`]+)`\]", PATH.read_text())]


def test_seven_modules_and_py_typed_are_at_the_root() -> None:
    names = {path.name for path in ROOM.iterdir() if path.is_file()}
    modules = {"__init__", "train", "checkpoint", "files", "structures", "text", "errors"}
    assert names == {f"{module}.py" for module in modules} | {"py.typed"}


def test_the_library_has_at_most_37_100_lines() -> None:
    """1,300 of them are the Triton kernels for GPUs, 2,300 the readers of labelling tools' exports, 1,600 are of
    classification, 850 of dense detectors, 350 of cascades, 700 turn networks of timm into backbones, and 2,000 keep
    runs and files from what breaks them: kills, full disks, links, damaged records, strangers' checkpoints."""
    assert lines(FILES) <= 37_100


def test_training_loads_at_most_161_files_of_24_100_lines() -> None:
    """Opening a data set of any format takes 41 of them, 6,100 lines; classification takes 5, 600 lines; dense
    detectors take 5, 600 lines."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    loaded = [Path(line) for line in done.stdout.splitlines()]
    assert len(loaded) <= 161 and lines(loaded) <= 24_100
    assert not [path for path in loaded if "toolbox" in path.parts]


def test_the_trainer_is_read_in_41_files_of_6_250_lines() -> None:
    """170 of them are the recipe of Wightman et al. 2021: stochastic depth, mixed pictures, LAMB."""
    path = reading_path()
    assert path[0] == ROOM / "train.py" and len(path) == len(set(path)) >= 25
    assert all(file.is_file() for file in path)
    assert len(path) <= 41 and lines(path) <= 6_250


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_function_is_longer_than_60_lines_but_train(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_train = path == ROOM / "train.py" and node.name == "train"
            assert is_train or node.end_lineno - node.lineno + 1 <= 60, node.name
