"""The rules of the house: floors, and no import inside a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

FLOORS = [
    {"errors", "compat", "config", "config_file", "dataset", "structures", "garbage", "writing", ""},
    {"ops"},
    {"modeling", "data"},
    {
        "weights",
        "evaluation",
        "optim",
        "checkpoint",
        "metrics",
        "event_file",
        "distributed",
        "visualize",
        "contact_sheet",
        "check_pictures",
        "check_report",
        "paste",
        "results",
        "scoring",
        "run_folder",
        "run",
        "memory",
        "micro_batch",
        "buckets",
        "compiling",
        "leaks",
        "measure",
        "signals",
        "watch",
        "progress",
        "fingerprint",
        "saving",
        "resume",
        "nonfinite",
        "run_evaluation",
        "set_up",
        "onnx_model",
        "inference",
        "analysis",
        "norm_statistics",
        "norm_watch",
        "study_results",
        "report",
    },
    {
        "train",
        "prediction",
        "onnx_export",
        "doctor",
        "analyze",
        "invariance",
        "conversion",
        "audit",
        "check",
    },
    {"selftest", "benchmark", "norm_study"},
    {"options"},
    {"cli"},
]
FILES = sorted((REPOSITORY / "gndet").rglob("*.py"))


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """The parts of gndet that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "gndet":
            yield from (alias.name if alias.name != "__version__" else "" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gndet."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_imports_lower_floors_only(path: Path) -> None:
    part = path.relative_to(REPOSITORY / "gndet").parts[0].removesuffix(".py").replace("__init__", "")
    tree = ast.parse(path.read_text())
    for other in imports(tree):
        same = other == part or (floor(part) in (0, 3) and floor(other) == floor(part))
        assert floor(other) < floor(part) or same, f"{part} imports {other}"
        assert {part, other} != {"modeling", "data"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_import_inside_a_function(path: Path) -> None:
    if path.name == "cli.py":
        return  # --help must answer before torch is imported
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert not any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node)), node.name
