"""The README's table of troubleshooting quotes what gndet says, and names options and files that there are."""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY

from gndet.cli.main import parse
from gndet.config.loading import load_config
from gndet.training.run_folder import flat

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
HOLE = "\0"  # what an f-string fills in


def section() -> str:
    """The text from the heading `## Troubleshooting` to the next."""
    found = re.search(r"(?ms)^## Troubleshooting\n(.*?)(?=^## |\Z)", README)
    assert found, "README.md has no section `## Troubleshooting`"
    return found[1]


def rows() -> list[tuple[str, str, str]]:
    """The cells of the table's rows."""
    lines = [line.strip().strip("|").split("|") for line in section().splitlines() if line.startswith("|")]
    assert all(len(cells) == 3 for cells in lines)
    return [tuple(cell.strip() for cell in cells) for cells in lines[2:]]


def literals() -> Iterator[str]:
    """Every text in the source, an f-string's holes as HOLE, but docstrings."""
    for path in (REPOSITORY / "gndet").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value


def is_said(quoted: str, texts: str) -> bool:
    """Whether a quotation, … where something is filled in, is part of a text of the source."""
    pattern = f"{HOLE}+".join(map(re.escape, quoted.split("…")))
    return re.search(pattern, texts) is not None


@pytest.fixture(scope="module")
def texts() -> str:
    return "\n".join(literals())


def test_every_quoted_message_is_one_that_gndet_prints(texts: str) -> None:
    quoted = [re.match(r"`([^`]+)`", first) for first, *_ in rows()]
    assert len(quoted) >= 25 and all(quoted)
    assert [match[1] for match in quoted if not is_said(match[1], texts)] == []


def test_a_message_that_was_reworded_is_found(texts: str) -> None:
    assert is_said("unknown key …; …", texts)
    assert not is_said("unknown keys …; …", texts) and not is_said("unknown key; …", texts)


def test_every_option_named_is_one() -> None:
    known = set(flat(load_config(REPOSITORY / "configs" / "quickstart.yaml")))
    parts = {key.rsplit(".", depth)[0] for key in known for depth in range(3)}
    named = {match[1] for match in re.finditer(r"`((?:data|model|train|evaluation)\.[a-z0-9_.]+)", section())}
    assert len(named) > 10
    assert sorted(named - known - parts) == []


def test_every_command_named_is_one() -> None:
    commands = re.findall(r"`gndet ([^`]+)`", section())
    assert commands
    for words in commands:
        parse(words.split())


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"(?m)^##+ (.*)$", README)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", section())) <= anchors
