"""Output folders and files: files written whole or not at all, files that grow by whole lines, tables."""

import csv
import errno
import io
import itertools
import mimetypes
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from gndet.errors import OutputError

ENDS = 16_384  # bytes at the start and at the end of a file, in which marks are
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


class Kind(NamedTuple):
    """A kind of output file, and how gndet recognizes one that it wrote itself."""

    words: str  # what such a file is, e.g. "a page of gndet report"
    mark: bytes  # regular expression that gndet's own files match; searched in their first and last 16 kB


# any picture of gndet: options write one with the key Software, runs and studies with the key Source
DRAWN = Kind("a picture of gndet", rb"\A(\x89PNG.*tEXt\w+\x00gndet|\xff\xd8.*\xff\xfe\x00\x07gndet)")
LOOKED_AT = 8  # pictures of a folder, to tell gndet's from the user's


def report_kind(verb: str) -> Kind:
    """Return the kind of the JSON report of a verb, an object whose first key is "gndet"."""
    return Kind(f"a report of gndet {verb}", rb'\A\{\s*"gndet": "%s"' % verb.encode())


def refuse_output(file: Path, option: str, kind: Kind | None, data: Iterable[Path] = ()) -> None:
    """Raise OutputError if the output file that an option names would replace a file of the user; else make its folder.

    An existing file is replaced only if it is empty or has the mark of its kind, that is, if gndet wrote it for such an
    option.  A mark is part of the content: it stays in copies, and nothing is kept beside the output.  The files of a
    run do not have it, so no option replaces them.  kind: None if every existing file stays.
    data: the files and folders that the command reads; an output is none of them, nor does it lie in one of them beside
    pictures of the user: an image folder may be a whole project, with its pictures further down and its runs elsewhere.
    """
    data = list(data)
    refuse_among(file, option, [path for path in data if is_same(file, path)])
    if data and _is_beside_pictures(file):
        refuse_among(file, option, data)
    try:
        if reason := _why_not(file, kind):
            raise OutputError(f"{option} {file}: {reason}")
    except OSError as error:
        raise OutputError(f"{option} {file}: cannot write this file: {error.strerror}") from None
    make_folder(file.parent, option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{option} {file}: cannot write this file: Permission denied")


def refuse_among(output: Path, option: str, data: Iterable[Path]) -> None:
    """Raise OutputError if an output is one of the files and folders that are read, or lies in one, under any name."""
    real = Path(os.path.realpath(output))
    for path in data:
        if any(is_same(place, path) for place in (real, *real.parents)):
            raise OutputError(
                f"{option} {output}: is among your data ({path}); gndet writes nothing there, choose another name"
            )


def _is_beside_pictures(output: Path) -> bool:
    """Return whether the first pictures in the folder of an output, or in the nearest that exists, are the user's."""
    folder = next(place for place in Path(os.path.realpath(output)).parents if place.is_dir())
    with os.scandir(folder) as entries:
        pictures = (Path(entry) for entry in entries if entry.is_file() and _is_picture(entry.name))
        try:
            return not all(is_own(picture, DRAWN) for picture in itertools.islice(pictures, LOOKED_AT))
        except OSError:  # a picture that gndet may not read is not its own
            return True


def _is_picture(name: str) -> bool:
    return (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")


def _why_not(file: Path, kind: Kind | None) -> str:
    """Return why gndet does not replace what has this name; "" if it may, or if nothing has."""
    if file.is_symlink():
        return f"is a link to {os.path.realpath(file)}; name that file itself, or choose another name"
    if file.is_dir():
        return "exists; choose another name" if kind is None else "is a folder, expected the name of a file"
    if file.exists() and not file.is_file():
        return "is a device or a pipe, expected the name of a file"
    if not file.exists() or (kind is not None and (not file.stat().st_size or is_own(file, kind))):
        return ""
    if kind is None:
        return "exists; choose another name"
    replaced = "only files that gndet wrote are replaced"
    return f"exists and is not {kind.words}: {replaced}; choose another name, or remove this file"


def is_own(file: Path, kind: Kind) -> bool:
    """Return whether a file has the mark of a kind.  Raises OSError."""
    with file.open("rb") as opened:
        ends = opened.read(ENDS)
        opened.seek(max(opened.seek(0, os.SEEK_END) - ENDS, len(ends)))
        ends += opened.read()
    return re.search(kind.mark, ends, re.DOTALL) is not None


def is_same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one file, also through links, or would if it existed."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


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
