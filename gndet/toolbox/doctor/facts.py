"""What the doctor says: a fact a line, judged or not, without the names of a user's account."""

import getpass
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

NAME, MARK = 28, 7  # columns of a fact's name and of its mark


class Fact(NamedTuple):
    """A line of the report."""

    name: str
    text: str
    mark: Literal["", "ok", "warning", "wrong"] = ""  # nothing judged; works; works, but; will not work


Facts = Iterator[Fact | str]  # a text: what is being tried now, in case that it ends the process


def line(fact: Fact) -> str:
    """A fact as it is shown."""
    mark = fact.mark if fact.mark in ("", "ok") else fact.mark.upper()
    return f"  {fact.name:<{NAME}}  {mark:<{MARK}}  {fact.text}".rstrip()


def health_verdict(facts: list[Fact]) -> str:
    """Sum up in a line, naming what is wrong and what is warned of."""
    wrong, warned = (
        list(dict.fromkeys(one.name for one in facts if one.mark == mark)) for mark in ("wrong", "warning")
    )
    parts = [f"will not work: {', '.join(wrong)}"] if wrong else ["healthy"]
    parts += [f"{len(warned)} warning{'s' if len(warned) > 1 else ''}: {', '.join(warned)}"] if warned else []
    return "verdict: " + "; ".join(parts)


def without_names(text: str) -> str:
    """Put ~ in place of the home folder and USER in place of the account's name where it is part of a path."""
    with suppress(RuntimeError):  # an account without a home
        home = Path.home()
        for folder in sorted({str(home), str(home.resolve())}, key=len, reverse=True):
            if folder != "/":
                text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    with suppress(KeyError, OSError, ImportError):  # an account that the system does not know
        user = re.escape(getpass.getuser())
        text = re.sub(rf"(?<=/){user}(?![\w.-])", "USER", text)
    return text


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
