"""Where results go: folders made, files that are written whole or not at all."""

import os
from pathlib import Path

from gndet.errors import OutputError


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
