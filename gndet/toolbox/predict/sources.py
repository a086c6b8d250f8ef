"""Find the inputs of a detector (pictures, folders, patterns and videos), and turn pictures into records.

n pictures.  A folder gives its own pictures, not those of its subfolders; a pattern like 'a/**/*.jpg' goes deeper.
"""

import glob
import os
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from gndet.data.datasets.images import FORMATS, find_pictures, picture_record, read_image
from gndet.data.records import Record
from gndet.errors import DataError

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")  # suffixes; a GIF is a picture

Value = TypeVar("Value")


class Sources(NamedTuple):
    """The files that a user's arguments name, each once, in their order; sorted by name in a folder or pattern."""

    pictures: list[Path]
    videos: list[Path]
    named: frozenset[Path]  # named directly; the others were found in a folder or by a pattern


def find_sources(words: Sequence[str]) -> Sources:
    """Find the pictures and videos that a user's arguments name.

    words: each a picture, a video (a suffix of VIDEOS), a folder or a pattern with *, ? or [...]; an existing file is
    never taken for a pattern.  A folder gives its pictures; a pattern gives pictures and videos, and ** matches any
    folders.  Raises DataError for a missing file, a folder without pictures and a pattern that matches neither kind.
    """
    files: dict[Path, None] = {}
    named = set()
    for word in words:
        path = Path(word)
        if path.is_file():
            found = [path]
            named.add(path)
        elif path.is_dir():
            found = _pictures_in(path)
        elif glob.has_magic(str(word)):
            found = _files_matching(str(word))
        else:
            raise DataError(f"{word}: no such picture, video, folder or pattern")
        files |= dict.fromkeys(found)
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    return Sources([file for file in files if file.suffix.lower() not in VIDEOS], videos, frozenset(named))


def _pictures_in(folder: Path) -> list[Path]:
    """List the pictures of a folder.  Raises DataError if there are none; the error mentions the folder's videos."""
    try:
        return find_pictures([folder])
    except DataError as error:
        videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEOS)
        if not videos:
            raise
        raise DataError(
            f"{error}; it has {len(videos)} video(s), which '{folder}/*{videos[0].suffix}' would name"
        ) from None


def _files_matching(pattern: str) -> list[Path]:
    """List the pictures and videos that a pattern matches, by suffix.  Raises DataError if there are none."""
    Image.init()  # registers the suffixes of all formats
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | set(VIDEOS)
    found = [Path(name) for name in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    files = [file for file in found if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        others = f", but {len(found)} other file(s) or folder(s)" if found else ""
        raise DataError(f"{pattern}: matches no picture and no video{others}; a pattern is like 'folder/**/*.jpg'")
    return files


class Pictures(Sequence[Record]):
    """Picture files as records without objects, made on demand; image ids count from 1."""

    def __init__(self, sizes: dict[Path, tuple[int, int]], max_pixels: int) -> None:
        """sizes: height, width of the n files, as `picture_size` reads them."""
        self.files, self.sizes, self.max_pixels = list(sizes), sizes, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        file = self.files[place]
        size = self.sizes[file]
        return picture_record(place + 1, file, size)._replace(load=partial(read_image, file, size, self.max_pixels))


def measured(
    files: Sequence[Path], named: Container[Path], measure: Callable[[Path], Value]
) -> tuple[dict[Path, Value], dict[Path, str]]:
    """Measure each file.  Returns {file: value} of the readable files, and {file: reason} of the unreadable ones.

    Raises the DataError of an unreadable file that was named.
    """
    values, broken = {}, {}
    for file in files:
        try:
            values[file] = measure(file)
        except DataError as error:
            if file in named:
                raise
            broken[file] = str(error)
    return values, broken
