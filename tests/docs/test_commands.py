"""The commands of README and docs are ones that gndet takes; those that take seconds are run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from pages import PAGES, blocks, commands, name_of

from gndet.cli.main import main, parse
from gndet.config.loading import load_config
from gndet.train import train

PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")  # PATH, RUN: the reader fills it in
SHORT = ("train.schedule.updates=2", "train.log_every=1", "data.train.count=4", "data.val.count=4")
QUICK = ("analyze", "check", "config", "evaluate", "norms", "predict", "report")
LEARNING = "configs/quickstart.yaml"  # the only config whose data needs no download


def calls(page: Path) -> list[list[str]]:
    """Return the words of every call of a verb: `gndet VERB ...`, or its script in tools/."""
    found = []
    for line in commands(page):
        for command in re.split(r"\s&&\s|;\s|\s\|\s", line):
            words = shlex.split(command, comments=True)
            script = next((i for i, word in enumerate(words) if re.fullmatch(r"tools/[a-z-]+\.py", word)), None)
            if words and words[0] == "gndet":
                found.append(words[1:])
            elif script is not None and words[script] != "tools/benchmark.py":
                found.append([Path(words[script]).stem, *words[script + 1 :]])
    return found


EVERY = [(page, call) for page in PAGES for call in calls(page)]
KNOWN = sorted({tuple(call) for _, call in EVERY if not PLACEHOLDER.search(" ".join(call))})


def test_the_pages_hold_commands() -> None:
    assert len(EVERY) > 50 and len(KNOWN) > 20


@pytest.mark.parametrize(("page", "call"), EVERY, ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_the_command_line_takes_it(page: Path, call: list[str]) -> None:
    if call[-1:] not in (["--help"], ["--version"]) and call != ["VERB", "--help"]:
        parse(call)


@pytest.mark.parametrize("call", KNOWN, ids=" ".join)
def test_its_config_and_overrides_exist(call: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    overrides = [word for word in call if re.match(r"[a-z_][a-z0-9_.]*=", word)]
    for config in (word for word in call if word.endswith(".yaml") and word.startswith("configs/")):
        load_config(config, overrides)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout with a finished run of the quickstart, of two updates, and a picture."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "tools"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "pictures").mkdir()
    shutil.copy(REPOSITORY / "docs" / "quickstart.png", folder / "pictures")
    train(load_config(folder / LEARNING, [*SHORT, f"out={folder / 'runs' / 'quickstart'}"]))
    return folder


def is_quick(call: tuple[str, ...]) -> bool:
    """Whether a command takes seconds and needs nothing but a checkout and the run of the quickstart."""
    paths = [word for word in call[1:] if "/" in word and "=" not in word]
    known, folders = (LEARNING, "runs/quickstart"), ("docs/", "runs/quickstart/")
    return call[0] in QUICK and all(word in known or word.startswith(folders) for word in paths)


@pytest.mark.parametrize("call", [call for call in KNOWN if is_quick(call)], ids=" ".join)
def test_it_runs(call: tuple[str, ...], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    small = SHORT if call[0] in ("check", "norms") and LEARNING in call else ()
    assert main([*call, *small]) == 0


@pytest.mark.slow
def test_the_blocks_of_the_python_page_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    code = "\n".join(blocks(REPOSITORY / "docs" / "python_api.md", "python"))
    exec(compile(code, "docs/python_api.md", "exec"), {"__name__": "python_api"})
