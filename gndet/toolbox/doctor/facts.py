"""The lines of the doctor's report: one fact per line, judged or not, without the user's account name."""

import getpass
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

NAME, MARK = 28, 7  # widths of a fact's name and mark


class Fact(NamedTuple):
    """A line of the report."""

    name: str
    text: str
    mark: Literal["", "ok", "warning", "wrong"] = ""  # not judged; works; works with a caveat; will not work


Facts = Iterator[Fact | str]  # str: what is tried next, in case the attempt ends the process


def line(fact: Fact) -> str:
    """Return a fact as it is shown."""
    mark = fact.mark if fact.mark in ("", "ok") else fact.mark.upper()
    return f"  {fact.name:<{NAME}}  {mark:<{MARK}}  {fact.text}".rstrip()


def health_verdict(facts: list[Fact]) -> str:
    """Return one line that names what is wrong and what has warnings."""
    wrong, warned = (
        list(dict.fromkeys(fact.name for fact in facts if fact.mark == mark)) for mark in ("wrong", "warning")
    )
    parts = [f"will not work: {', '.join(wrong)}"] if wrong else ["healthy"]
    parts += [f"{len(warned)} warning{'s' if len(warned) > 1 else ''}: {', '.join(warned)}"] if warned else []
    return "verdict: " + "; ".join(parts)


def without_names(text: str) -> str:
    """Replace the home folder by ~, and the account's name in paths by USER."""
    with suppress(RuntimeError):  # an account without a home
        home = Path.home()
        for folder in sorted({str(home), str(home.resolve())}, key=len, reverse=True):
            if folder != "/":
                text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    with suppress(KeyError, OSError, ImportError):  # an account unknown to the system
        user = re.escape(getpass.getuser())
        text = re.sub(rf"(?<=/){user}(?![\w.-])", "USER", text)
    return text


def reason(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
