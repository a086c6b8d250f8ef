"""docs/troubleshooting.md quotes what gndet says, and names options and commands that exist."""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY

from gndet.cli.main import VERBS, parse
from gndet.config.loading import load_config
from gndet.training.run_folder import flat

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEAD = "| it says | it means | do |"  # of the tables that quote messages
NOT_OURS = 7  # the first messages of the section Installing come from the shell, Python, pip and torch
HOLE = "\0"  # what an f-string fills in


def rows() -> list[tuple[str, str, str]]:
    """Return the cells of all rows of the tables that quote messages."""
    tables = [part.split("\n\n")[0] for part in PAGE.split(HEAD)[1:]]
    lines = [line.strip().strip("|").split("|") for table in tables for line in table.splitlines()[2:]]
    assert all(len(cells) == 3 for cells in lines), [cells for cells in lines if len(cells) != 3]
    return [tuple(cell.strip() for cell in cells) for cells in lines]


def literals() -> Iterator[str]:
    """Yield every text in the source except docstrings, with HOLE for what an f-string fills in."""
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
    """Return whether a quotation, with … for what is filled in, is part of a text of the source."""
    pattern = f"{HOLE}+".join(map(re.escape, quoted.split("…")))
    return re.search(pattern, texts) is not None


@pytest.fixture(scope="module")
def texts() -> str:
    return "\n".join(literals())


def test_every_quoted_message_is_one_that_gndet_prints(texts: str) -> None:
    quoted = [re.fullmatch(r"`([^`]+)`", first) for first, *_ in rows()]
    assert len(quoted) >= 60 and all(quoted)
    ours = [match[1] for match in quoted[NOT_OURS:]]
    assert [text for text in ours if not is_said(text, texts)] == []


def test_a_message_that_was_reworded_is_found(texts: str) -> None:
    assert is_said("unknown key …; …", texts)
    assert not is_said("unknown keys …; …", texts) and not is_said("unknown key; …", texts)


def test_every_option_named_is_one() -> None:
    known = set(flat(load_config(REPOSITORY / "configs" / "quickstart.yaml")))
    parts = {key.rsplit(".", depth)[0] for key in known for depth in range(3)}
    named = {match[1] for match in re.finditer(r"`'?((?:data|model|train|evaluation)\.[a-z0-9_.]+)", PAGE)}
    assert len(named) > 20
    assert sorted(named - known - parts) == []


def test_every_command_named_is_one() -> None:
    commands = [words for words in re.findall(r"`gndet ([^`…]+)`", PAGE) if " needs " not in words]  # a message
    assert len(commands) > 5
    for words in commands:
        if words not in VERBS:  # the verb alone
            parse(words.split())
