"""What a user points a detector at: pictures, folders, patterns and videos; and such pictures as records.

n pictures. A folder gives its own pictures, none of its subfolders; a pattern like 'a/**/*.jpg' goes deeper.
"""

import glob
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import FORMATS, find_pictures, picture_record, picture_size, read_image
from gndet.data.records import Record
from gndet.errors import DataError

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")  # suffixes; a GIF is a picture


class Sources(NamedTuple):
    """The files that a user's words name, each once, in the order of the words, a folder's and a pattern's by name."""

    pictures: list[Path]
    videos: list[Path]
    named: frozenset[Path]  # those named themselves: the others were found in a folder or by a pattern


def find_sources(words: Sequence[str]) -> Sources:
    """Find the pictures and videos that words name.

    words: a picture, a video (by its suffix, of VIDEOS), a folder or a pattern with *, ? or [...]; what exists is no
    pattern.  A folder gives its pictures; a pattern gives pictures and videos, ** standing for any folders.
    Raises DataError for what is not there, a folder without pictures and a pattern that matches none of the two.
    """
    files: dict[Path, None] = {}
    named = set()
    for word in words:
        path = Path(word)
        if path.is_file():
            found = [path]
            named.add(path)
        elif path.is_dir():
            found = _inside(path)
        elif glob.has_magic(str(word)):
            found = _matching(str(word))
        else:
            raise DataError(f"{word}: no such picture, video, folder or pattern")
        files |= dict.fromkeys(found)
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    return Sources([file for file in files if file.suffix.lower() not in VIDEOS], videos, frozenset(named))


def _inside(folder: Path) -> list[Path]:
    """The pictures of a folder.  Raises DataError where it has none, which names the videos that it has."""
    try:
        return find_pictures([folder])
    except DataError as error:
        videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEOS)
        if not videos:
            raise
        raise DataError(
            f"{error}; it has {len(videos)} video(s), to be named like '{folder}/*{videos[0].suffix}'"
        ) from None


def _matching(pattern: str) -> list[Path]:
    """The pictures and videos that a pattern matches, by their suffixes.  Raises DataError where there are none."""
    Image.init()  # of all formats, so that their suffixes are known
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | set(VIDEOS)
    found = [Path(name) for name in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    files = [file for file in found if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        others = f", but {len(found)} other file(s) or folder(s)" if found else ""
        raise DataError(f"{pattern}: matches no picture and no video{others}; a pattern is like 'folder/**/*.jpg'")
    return files


class Pictures(Sequence[Record]):
    """Picture files as records without objects, each made when it is asked for; image ids are counted from 1."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[tuple[int, int]], max_pixels: int) -> None:
        """sizes: height, width of the n files, as `picture_size` reads them."""
        self.files, self.sizes, self.max_pixels = files, sizes, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        file, size = self.files[place], self.sizes[place]
        return picture_record(place + 1, file, size)._replace(load=partial(read_image, file, size, self.max_pixels))


def measure_pictures(sources: Sources, max_pixels: int) -> tuple[Pictures, dict[Path, str]]:
    """Read the sizes of the pictures of sources from their headers.

    Returns the records of those that have one, and {file: why} of those found that have none.  Raises Fault for one
    that was named, and DataError where none of the pictures has one and there is no video either.
    """
    files, sizes, broken = [], [], {}
    for file in sources.pictures:
        try:
            sizes.append(picture_size(file, max_pixels))
            files.append(file)
        except Fault as fault:
            if file in sources.named:
                raise
            broken[file] = str(fault)
    if broken and not files and not sources.videos:
        raise DataError(f"none of {len(broken)} picture(s) can be read; {next(iter(broken.values()))}")
    return Pictures(files, sizes, max_pixels), broken
