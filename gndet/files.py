"""Where results go: folders, files that are written whole or not at all, files that grow by whole lines, tables."""

import csv
import errno
import io
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gndet.errors import OutputError

TEMPORARY = ".tmp-"  # prefix of what is being written; checkpoint.sweep deletes what a killed run left of it


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; rename it to `path` at the end, so that a kill leaves the old file or the new one.

    The path given ends in the same suffix.  The old file stays after an error, or where nothing was written.
    Raises OutputError for an OSError, which is its cause.
    """
    partial = path.with_name(TEMPORARY + path.name)
    try:
        yield partial
        if partial.exists():
            with open(partial, "rb") as file:
                os.fsync(file.fileno())  # a power cut after the rename would leave an empty file
            os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write it: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file whole or not at all; text as UTF-8.  Raises OutputError."""
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(data)


class LineFile:
    """A text file that grows by whole lines and outlives a full disk: lines without room wait until there is some."""

    def __init__(self, path: Path) -> None:
        """Open a file to append to it.  Raises OSError."""
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, line: str) -> None:
        """Write the lines that wait, then this one.  Raises OSError where there is no room now."""
        self._waiting += f"{line}\n".encode()
        self.catch_up()

    def catch_up(self) -> None:
        """Write the lines that wait.  Raises OSError where there is no room now; no part of them is written then."""
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._waiting) < len(self._waiting):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""

    def close(self) -> None:
        """Close the file; lines that still wait are lost."""
        self._file.close()


def make_room_for(file: Path, option: str) -> None:
    """Make the folder of a file that an option names.  Raises OutputError where the file cannot be written."""
    if file.is_dir():
        raise OutputError(f"{option} {file}: is a folder, expected the name of a file")
    make_folder(file.parent, option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{option} {file}: cannot write this file: Permission denied")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names.  Raises OutputError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {folder}: cannot make this folder: {error.strerror}") from None


def text_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Pad the columns of rows to their widest cells; those at the places in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'<' if place in left else '>'}{width}}}" for place, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in rows)


def csv_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, numbers with full precision, None as an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
