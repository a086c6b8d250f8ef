"""Find the inputs of a detector (pictures, folders, patterns and videos), and turn pictures into records.

n pictures.  A folder gives its own pictures, not those of its subfolders; a pattern like 'a/**/*.jpg' goes deeper.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from gndet.data.datasets.faults import several
from gndet.data.datasets.images import PICTURES, Reading, is_picture, picture_record
from gndet.data.records import Record
from gndet.errors import DataError
from gndet.evaluation.video import video_rate

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")  # suffixes; a GIF is a picture
SUFFIXES = 5  # kinds of files to list among those passed over


class Sources(NamedTuple):
    """The files that a user's arguments name, each once, in their order; sorted by name in a folder or pattern."""

    pictures: list[Path]
    videos: list[Path]
    named: frozenset[Path]  # named directly; the others were found in a folder or by a pattern
    notes: list[str]  # one line per folder or pattern with entries that were passed over


def find_sources(words: Sequence[str]) -> Sources:
    """Find the pictures and videos that a user's arguments name.

    words: each a picture, a video (a suffix of VIDEOS), a folder or a pattern with *, ? or [...]; an existing file is
    never taken for a pattern.  A folder gives its pictures; a pattern gives pictures and videos, and ** matches any
    folders.  Raises DataError for a missing file, a folder without pictures and a pattern that matches neither kind.
    """
    files: dict[Path, None] = {}
    named, notes = set(), list[str]()
    for word in words:
        name, others = os.path.expanduser(word), list[Path]()
        path = Path(name)
        if os.path.isfile(name):
            found = [path]
            named.add(path)
        elif os.path.isdir(name):
            found, others = _files_in(path)
            if not found:
                raise DataError(f"{path}: no pictures in this folder ({', '.join(PICTURES)}){_elsewhere(path, others)}")
        else:
            refuse_address(word)
            if not glob.has_magic(name):
                what = (
                    "is neither a file nor a folder"
                    if os.path.exists(name)
                    else "no such picture, video, folder or pattern"
                )
                raise DataError(f"{word or repr(word)}: {what}")
            found, others = _files_matching(name)
        files |= dict.fromkeys(found)
        notes += [f"{word}: {_passed_over(path, others)}"] if others else []
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    pictures = [file for file in files if file.suffix.lower() not in VIDEOS]
    return Sources(pictures, videos, frozenset(named), notes)


def refuse_address(word: str) -> None:
    """Raise DataError for an address, like https://..."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", word):
        raise DataError(f"{word}: is an address; gndet downloads nothing, so save the file and name it")


def _elsewhere(folder: Path, others: Sequence[Path]) -> str:
    """Name the patterns that find the videos of a folder, and the pictures below it."""
    videos, place = [file for file in others if file.suffix.lower() in VIDEOS], glob.escape(str(folder))
    text = f"; it has {several(len(videos), 'video')}, which '{place}/*{videos[0].suffix}' would name" if videos else ""
    below = sum(is_picture(Path(name)) for _, _, names in os.walk(folder) for name in names if name[0] != ".")
    return text + (f"; {several(below, 'picture')} below it, which '{place}/**/*' would name" if below else "")


def _passed_over(path: Path, others: Sequence[Path]) -> str:
    """Count the entries that are neither pictures nor videos, by suffix; name the pattern that goes into folders."""
    folders = sum(other.is_dir() for other in others)
    suffixes = Counter(_kind(other) for other in others if not other.is_dir())
    parts = [f"{num} {suffix}" for suffix, num in suffixes.most_common(SUFFIXES)]
    left = suffixes.total() - sum(num for _, num in suffixes.most_common(SUFFIXES))
    parts += [f"{left} of other kinds"] if left else []
    if folders:
        parts.append(f"{several(folders, 'folder')}, which '{glob.escape(str(path))}/**/*' would search")
    return f"passed over {', '.join(parts)}"


def _kind(other: Path) -> str:
    suffix = other.suffix.lower()
    is_meant = (is_picture(other) or suffix in VIDEOS) and not other.is_file()
    return f"{other.name!r} that is no file" if is_meant else suffix or "without suffix"


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """List a folder without hidden entries.  Returns its pictures, by suffix, and all other entries, both by name."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    pictures = [entry for entry in visible if is_picture(entry) and entry.is_file()]
    return pictures, sorted(set(visible).difference(pictures))


def _files_matching(pattern: str) -> tuple[list[Path], list[Path]]:
    """List the pictures and videos that a pattern matches, by suffix, and the other files.

    Raises DataError if it matches no picture and no video.
    """
    found = sorted(set(map(Path, _matches(pattern))))
    files = [file for file in found if (is_picture(file) or file.suffix.lower() in VIDEOS) and file.is_file()]
    if not files:
        others = f", but {len(found)} other file(s) or folder(s)" if found else ""
        raise DataError(f"{pattern}: matches no picture and no video{others}; a pattern is like 'folder/**/*.jpg'")
    taken = set(files)
    return files, [file for file in found if file not in taken and not file.is_dir()]


def _matches(pattern: str) -> Iterator[str]:
    """Yield what a pattern matches as `glob` does, but enter no folder twice: links that lead back would never end."""
    several_folders = re.search(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern)
    if several_folders is None:
        yield from glob.glob(pattern)
        return
    start, rest = pattern[: several_folders.start()], pattern[several_folders.end() :] or "*"
    for base in glob.glob(start) if start else ["."]:
        for folder in _folders_below(base):
            yield from _matches(os.path.join(glob.escape(folder), rest))


def _folders_below(base: str) -> Iterator[str]:
    """Yield a folder and all below it, without hidden ones; those behind links come last, and none comes twice."""
    waiting, seen = [base], set()
    while waiting:
        for folder, names, _ in os.walk(waiting.pop(0)):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                names.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            names[:] = sorted(name for name in names if not name.startswith("."))
            waiting += [link for name in names if os.path.islink(link := os.path.join(folder, name))]
            yield folder


class Pictures(Sequence[Record]):
    """Picture files as records without objects, made on demand; image ids count from 1."""

    def __init__(self, sizes: dict[Path, tuple[int, int]], reading: Reading) -> None:
        """sizes: height, width of the n files, as `picture_size` reads them."""
        self.files, self.sizes, self.reading = list(sizes), sizes, reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        file = self.files[place]
        return picture_record(place + 1, file, self.sizes[file], self.reading)


class Readable(NamedTuple):
    """The files of sources whose headers can be read."""

    sizes: dict[Path, tuple[int, int]]  # height, width of the pictures
    rates: dict[Path, Fraction]  # frames per second of the videos
    broken: dict[Path, str]  # the reasons of the others


def read_headers(found: Sources, reading: Reading, size_of: Callable[[Path], tuple[int, int]]) -> Readable:
    """Read the header of each picture with size_of, and of each video.

    Raises the DataError of an unreadable file that was named, and DataError if no file can be read.
    """
    readable = Readable({}, {}, {})
    reads: list[tuple[list[Path], dict, Callable[[Path], Any]]] = [
        (found.pictures, readable.sizes, size_of),
        (found.videos, readable.rates, lambda file: video_rate(file, reading.max_pixels)),
    ]
    for files, values, read in reads:
        for file in files:
            try:
                values[file] = read(file)
            except DataError as error:
                if file in found.named:
                    raise
                readable.broken[file] = str(error)
    if readable.broken and not readable.sizes and not readable.rates:
        first = next(iter(readable.broken.values()))
        raise DataError(f"none of {len(readable.broken)} file(s) can be read; {first}")
    return readable
