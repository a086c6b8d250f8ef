"""Where results go: folders made, files that are written whole or not at all, files that grow by whole records."""

import errno
import os
from collections import deque
from pathlib import Path

from gndet.errors import OutputError


class RecordFile:
    """A file that grows by whole records, and outlives a full disk.

    A record that has no room leaves no half of itself and is kept, up to `most_waiting` bytes of them; it is written
    before the next one, in the order in which they came.
    """

    def __init__(self, path: Path, most_waiting: int = 64 << 20) -> None:
        """Open a file to append to it.  Raises OSError."""
        self.dropped = False  # so many had to wait that some are lost
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._room = most_waiting

    def append(self, record: bytes) -> None:
        """Write what waits and then a record.  Raises OSError where that cannot be done now."""
        self._waiting.append(record)
        self._room -= len(record)
        try:
            self.catch_up()
        finally:  # where all is written there is room
            while self._room < 0:
                self._room += len(self._waiting.popleft())
                self.dropped = True

    def catch_up(self) -> None:
        """Write what waits.  Raises OSError where that cannot be done now."""
        while self._waiting:
            record = self._waiting[0]
            end = os.fstat(self._file.fileno()).st_size
            if self._file.write(record) < len(record):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._room += len(self._waiting.popleft())

    def close(self) -> None:
        """Close the file; what waits is lost."""
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file beside first and rename it: a kill leaves the old file or the new one.  Raises OutputError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write it: {error.strerror or error}") from None


def make_room_for(file: Path, option: str) -> None:
    """Make the folder of a file that an option names.

    Raises OutputError where that cannot be done, or the file is a folder.
    """
    if file.is_dir():
        raise OutputError(f"{option} {file}: is a folder, expected the name of a file")
    make_folder(file.parent, option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{option} {file}: cannot write this file: Permission denied")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names.  Raises OutputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {folder}: cannot make this folder: {error.strerror}") from None
