"""Output folders and files: files written whole or not at all, files that grow by whole lines, tables."""

import csv
import errno
import io
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gndet.errors import OutputError

TEMPORARY = ".tmp-"  # prefix of files being written; checkpoint.sweep deletes those that a killed run left


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename it to `path`; a kill leaves either the old file or the new one.

    The temporary path has the same suffix.  The old file stays after an error, or if nothing was written.
    Raises OutputError from an OSError.
    """
    partial = path.with_name(TEMPORARY + path.name)
    try:
        yield partial
        if partial.exists():
            with open(partial, "rb") as file:
                os.fsync(file.fileno())  # otherwise a power cut after the rename could leave an empty file
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
    """A text file that grows by whole lines and survives a full disk: pending lines are written once there is room."""

    def __init__(self, path: Path) -> None:
        """Open a file for appending.  Raises OSError."""
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def append(self, line: str) -> None:
        """Write the pending lines, then this one.  Raises OSError if there is no room now."""
        self._pending += f"{line}\n".encode()
        self.catch_up()

    def catch_up(self) -> None:
        """Write the pending lines.  Raises OSError if there is no room for all of them; then none is written."""
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._pending) < len(self._pending):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending = b""

    def close(self) -> None:
        """Close the file; pending lines are lost."""
        self._file.close()


def make_room_for(file: Path, option: str) -> None:
    """Make the folder for an output file that an option names.  Raises OutputError if the file cannot be written."""
    if file.is_dir():
        raise OutputError(f"{option} {file}: is a folder, expected the name of a file")
    make_folder(file.parent, option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{option} {file}: cannot write this file: Permission denied")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names.  Raises OutputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {folder}: cannot make this folder: {error.strerror}") from None


def text_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Pad the columns of rows to their widest cells; the columns with an index in `left` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'<' if column in left else '>'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in rows)


def csv_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, with numbers in full precision and None as an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
