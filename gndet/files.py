"""The one way to write a file, and the checks of outputs that options name.

Every file of gndet gets a new name that nobody can guess, is written whole and flushed, and is then renamed.  So a kill
or a full disk leaves the old file or the new one, and no link that somebody planted in a folder is written through.
The writer holds a lock on its temporary file; `sweep` removes those that nobody holds, which a kill has left.
"""

import errno
import fcntl
import itertools
import mimetypes
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gndet.errors import OutputError

ENDS = 16_384  # bytes at the start and at the end of a file, in which marks are
LONGEST = 200  # bytes of a name made from a user's text: file systems take 255, with a number, a suffix and the like
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; NAME_MAX and PATH_MAX of Linux <limits.h>
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")  # names of files and folders that are being written
CONFIG, DETECTIONS = "config.yaml", "detections.json"  # of a run: its config, and COCO results of its last evaluation
CLASSIFIED = "classified.json"  # of a classifier's run: the class of each picture in its last evaluation
ASIDE = ".old-"  # prefix of a folder that is being replaced


def create(path: Path) -> BinaryIO:
    """Create a file to write and read, locked until it is closed.  Raises OSError if anything has its name."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    _try_lock(descriptor)
    return os.fdopen(descriptor, "w+b")


@contextmanager
def written_whole(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file to write to, which takes the name `path` at the end.

    A kill leaves the old file or the new one; after an error the old file stays.  A link of this name is replaced, not
    followed.  sync: flush the file to the disk first; without that, a power cut may leave it empty.  Raises
    OutputError from an OSError.
    """
    partial = temporary_name(path)
    try:
        with create(partial) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write it: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_whole(path: Path, content: str | bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file as `written_whole` does; text as UTF-8.  Raises OutputError."""
    with written_whole(path, sync=sync) as file:
        file.write(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to `create` files in, which takes the name `folder` at the end and is flushed.

    A folder of this name is moved aside, replaced, then removed; after an error it stays.  A kill leaves one of the
    two, though perhaps aside, from where `sweep` restores it.  Raises OSError.
    """
    temporary, aside = temporary_name(folder), folder.with_name(ASIDE + folder.name)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield temporary
        os.fsync(descriptor)
        if os.path.lexists(folder):
            remove(aside)
            os.rename(folder, aside)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        with suppress(OSError):
            _put_back(aside)
        remove(temporary)
        raise
    finally:
        os.close(descriptor)
    remove(aside)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to append to, unbuffered; a missing file is created.  Raises OSError for a link, a pipe, a folder."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait
    return os.fdopen(_regular(path, flags), "ab", buffering=0)


def lock_file(path: Path, wait: float) -> BinaryIO:
    """Lock a file until it is closed or the process ends; processes that are forked do not inherit the lock.

    A missing file is created.  wait: seconds to try.  Raises BlockingIOError, whose text names the owner, if another
    process holds the lock, and OSError for a folder that is not writable or a file system without locks.
    """
    deadline = time.monotonic() + wait
    while True:
        if is_shared(path):
            path.unlink()
        file = os.fdopen(_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same_as_open(path, file):  # it may have been removed in the meantime
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.truncate()
                file.flush()
                return file
        except (BlockingIOError, PermissionError):  # locked by another process
            if time.monotonic() > deadline:
                owner = file.read().decode(errors="replace").strip()
                file.close()
                raise BlockingIOError(errno.EAGAIN, owner) from None
            time.sleep(0.2)
        except BaseException:
            file.close()
            raise
        file.close()


def is_shared(path: Path) -> bool:
    """Return whether a path is a link, or a file with another name, which may lie in a copy that consists of links."""
    return path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1)


def is_same_as_open(path: Path, file: BinaryIO | int) -> bool:
    """Return whether a path, without following a link, leads to an open file or folder."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file if isinstance(file, int) else file.fileno()))
    except OSError:
        return False


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder; what a live process is writing stays.  Errors are ignored.

    A folder that was moved aside is restored if its successor is missing.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            path = folder / name
            if name.startswith(ASIDE):
                with suppress(OSError):
                    _put_back(path)
                remove(path)
            elif TEMPORARY.fullmatch(name) and not _is_being_written(path):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it is there; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries; otherwise a power cut may undo a rename.  Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a new name beside a path, which nobody can guess and `sweep` knows."""
    return path.with_name(f".tmp-{secrets.token_hex(16)}")


def _regular(path: Path, flags: int) -> int:
    """Open a regular file.  Raises OSError."""
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def _try_lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_being_written(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)


def _put_back(aside: Path) -> None:
    """Restore a folder that was moved aside if its successor is missing.  Raises OSError."""
    folder = aside.with_name(aside.name.removeprefix(ASIDE))
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)


class LineFile:
    """A text file that grows by whole lines and survives a full disk: pending lines are written once there is room."""

    def __init__(self, path: Path) -> None:
        """Open a file for appending, as `open_to_append` does.  Raises OSError."""
        self._file = open_to_append(path)
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
    """Raise OutputError as `refuse_file` does; else make the file's folder, and sweep it."""
    refuse_file(file, option, kind, data)
    sweep(file.parent)


def refuse_file(file: Path, option: str, kind: Kind | None, data: Iterable[Path] = ()) -> None:
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


def path_fault(path: str | Path) -> str:
    """Return why no file can have this path, whatever the folder; "" if one can."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return "no file can have this name: it holds a character that UTF-8 cannot encode"
    if b"\0" in name:
        return "no file can have this name: it holds a NUL character"
    if len(name) >= LONGEST_PATH or any(len(part) > LONGEST_NAME for part in name.split(b"/")):
        return f"no file can have this name: it has more than {LONGEST_NAME} bytes, or its path {LONGEST_PATH}"
    return ""


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


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that was made in this context and that an error left empty."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if is_new:
                folder.rmdir()
        raise


def cut_name(name: str) -> str:
    """Cut a name to LONGEST bytes, between letters."""
    while len(os.fsencode(name)) > LONGEST:
        name = name[:-1]
    return name
