"""Watch which files this process opens for writing, and how."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gndet.files import TEMPORARY

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

_watched: list[tuple[str, list[str], set[str]]] = []  # folder, wrong calls, names that were written


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file below a watched folder that is opened for writing otherwise than by gndet.files."""
    if not _watched or event not in ("open", "os.rename"):
        return
    folder, wrong, written = _watched[-1]
    if event == "os.rename":
        if os.path.abspath(os.fsdecode(arguments[1])).startswith(folder):
            written.add(Path(os.fsdecode(arguments[1])).name)
        return
    name, mode, flags = arguments
    path = Path(os.path.abspath(os.fsdecode(name))) if isinstance(name, str | bytes | os.PathLike) else None
    if path is None or not str(path).startswith(folder) or not flags & WRITES:
        return
    is_temporary = any(TEMPORARY.fullmatch(part) for part in path.parts)
    is_new = is_temporary and flags & NEW == NEW
    is_grown = flags & os.O_APPEND and flags & os.O_NOFOLLOW  # lines of a log
    is_lock = path.name.endswith(".lock") and flags & os.O_NOFOLLOW and not flags & os.O_TRUNC
    written.add(path.name)
    if not (is_new or is_grown or is_lock):
        wrong.append(f"{path} was opened with mode {mode!r}, flags {flags:o}")


sys.addaudithook(_look)  # for good: Python cannot remove it


@contextmanager
def only_by_the_writer(folder: Path) -> Iterator[set[str]]:
    """Yield the names that are written below a folder; assert that gndet.files opened every file written there."""
    wrong, written = list[str](), set[str]()
    _watched.append((str(folder), wrong, written))
    try:
        yield written
    finally:
        _watched.pop()
    assert wrong == []
