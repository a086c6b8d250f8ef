"""The layout rules: layers, what the toolbox may import, and no import inside a function."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPOSITORY

FLOORS = (
    ("errors", "text", "structures", "ops"),
    ("files",),
    ("config", "distributed", "checkpoint"),
    ("modeling", "data"),
    ("weights", "evaluation"),
    ("training",),
    ("train", "toolbox"),
    ("cli",),
)  # from the lowest to the highest
ROOM = REPOSITORY / "gndet"
FILES = sorted(ROOM.rglob("*.py"))


class Place(NamedTuple):
    """The location of a module: gndet/FOLDER/... or gndet/FILE.py, and in the toolbox its tool."""

    part: str  # the folder or the file at the root of gndet
    folder: str  # "" for a file at the root
    tool: str  # in the toolbox, else ""

    @staticmethod
    def of(module: str) -> "Place":
        """Return the place of a module from its dotted name without `gndet.`."""
        names = module.split(".")
        is_folder = (ROOM / names[0]).is_dir()
        return Place(names[0], names[0] if is_folder else "", names[1] if names[0] == "toolbox" and names[1:] else "")


def floor(place: Place) -> int:
    return next(i for i, parts in enumerate(FLOORS) if place.part in parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of gndet that a file imports, dotted, without `gndet.`."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gndet":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("gndet.") and name != "gndet.__version__":
                yield name.removeprefix("gndet.")


def offence(here: Place, there: Place) -> str | None:
    """Return what is wrong with an import, or None; a module may import lower floors and its own folder."""
    if {here.part, there.part} == {"modeling", "data"}:
        return "modeling and data never meet"
    if here.part == there.part == "toolbox":
        return None if there.tool in (here.tool, "analysis") else f"the tool {here.tool} imports the tool {there.tool}"
    if floor(there) < floor(here) or here == there:
        return None
    if here.folder == there.folder and floor(there) == floor(here):
        return None
    return f"{here.part} imports {there.part}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_imports_lower_floors_and_its_own_folder(path: Path) -> None:
    if path == ROOM / "__init__.py":
        return  # the names of the Python API, imported when they are used
    here = Place.of(".".join(path.relative_to(ROOM).with_suffix("").parts).removesuffix(".__init__"))
    for module in imports(ast.parse(path.read_text())):
        assert offence(here, Place.of(module)) is None, f"{module}: {offence(here, Place.of(module))}"


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("training.update", "modeling.rpn", True),
        ("modeling.rpn", "training.update", False),
        ("modeling.rpn", "data.records", False),
        ("data.records", "modeling.rpn", False),
        ("weights.load", "evaluation.detector", False),
        ("training.update", "training.run", True),
        ("train", "toolbox.report.report", False),
        ("toolbox.report.page", "toolbox.analysis.read", True),
        ("toolbox.report.page", "toolbox.doctor.facts", False),
        ("toolbox.analysis.read", "toolbox.report.page", False),
        ("cli.train", "toolbox.report.report", True),
        ("training.ending", "cli.train", False),
        ("checkpoint", "files", True),
        ("errors", "files", False),
        ("config.training", "distributed.process", False),
    ],
)
def test_the_rule_itself(here: str, there: str, allowed: bool) -> None:
    assert (offence(Place.of(here), Place.of(there)) is None) == allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_import_inside_a_function(path: Path) -> None:
    if path.parent == ROOM / "cli" or path == ROOM / "__init__.py":
        return  # --help and `import gndet` must answer before torch is imported
    # only fine-tuning from another toolkit's file loads the readers of seven toolkits; timm and supervision are extras
    allowed = {
        ROOM / "weights" / "read.py": "_read", ROOM / "evaluation" / "prediction.py": "to_supervision",
        ROOM / "modeling" / "build.py": "_timm", ROOM / "weights" / "policy.py": "mismatched",
    }.get(path)  # fmt: skip
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != allowed:
            assert not any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node)), node.name


@pytest.mark.parametrize("path", sorted(ROOM.rglob("__init__.py")), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_an_init_holds_no_code(path: Path) -> None:
    """It may hold a docstring, the version and names handed on; at the root, lazily."""
    for node in ast.parse(path.read_text()).body:
        lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        at_root = path.parent == ROOM and (isinstance(node, ast.Assign) or lazy or typed)
        assert isinstance(node, ast.Expr | ast.ImportFrom) or at_root


class Spread(NamedTuple):
    """Where the code of a kind of detector or backbone is, relative to gndet/."""

    words: str  # pattern of the names and short texts that it alone uses
    own: tuple[str, ...]  # files for it alone
    others: tuple[str, ...]  # files that also know it


KINDS = {
    "C4 and DC5": Spread(
        r"(?i)'(c4|dc5|owner|dilated)'|^c4|one_?level|res5=|^res5",
        ("config/one_level.py", "modeling/one_level.py", "weights/foreign/one_level.py"),
        ("config/model.py", "modeling/build.py", "modeling/resnet.py", "weights/foreign/formats.py",
         "weights/foreign/resnet.py"),
    ),
    "cascade": Spread(
        r"(?i)cascade(?!_rcnn_stage)|^'\\\.stages",
        ("config/cascade.py", "modeling/cascade.py"),
        ("config/model.py", "modeling/build.py", "weights/foreign/two_stage.py", "weights/read.py"),
    ),
    "dense detectors": Spread(
        r"(?i)^[.'](is_)?dense\b|dense(head|detector|config)|^'fcos|^'retinanet'|atss|RETINANET",
        ("config/dense.py", "modeling/dense.py", "modeling/dense_head.py", "ops/assigning.py", "weights/positives.py",
         "weights/foreign/dense.py"),
        ("config/model.py", "modeling/build.py", "weights/foreign/formats.py", "weights/foreign/neck.py",
         "weights/read.py"),
    ),
    "networks of timm": Spread(
        r"^'timm['_:]|timm_backbone|timm_files|^TIMM|TimmB",
        ("modeling/timm_backbone.py", "weights/foreign/timm_files.py"),
        ("config/parts.py", "config/training.py", "modeling/build.py", "weights/policy.py",
         "weights/foreign/source.py"),
    ),
}  # fmt: skip


def words_of(tree: ast.AST) -> Iterator[str]:
    """Yield the names in a file, attributes with a point before them, and its texts without spaces, in quotes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield f"'{node.value}'"
        elif isinstance(node, ast.Attribute):
            yield f".{node.attr}"
        else:
            names = (getattr(node, field, None) for field in ("id", "arg", "name", "module"))
            yield from (name for name in names if isinstance(name, str))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_detector_or_backbone_is_known_to_five_files_beside_its_own(kind: str) -> None:
    spread = KINDS[kind]
    found = {
        str(path.relative_to(ROOM))
        for path in FILES
        if path.parts[len(ROOM.parts)] not in ("toolbox", "cli")
        and any(re.search(spread.words, word) for word in words_of(ast.parse(path.read_text())))
    }
    assert found == {*spread.own, *spread.others} and len(spread.others) <= 5
