"""Read a large annotation file in parts: the list of annotations, cut between annotations, and what surrounds it.

The cuts are guessed from the text.  A wrong guess shows: a part that begins or ends inside an object, a list or a
string is no list of objects, and the rest of the file is no object; then the file is read as a whole.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gndet.data.datasets.columns import Columns, Known, Together, read_columns
from gndet.data.datasets.faults import Findings
from gndet.data.workers import Death, Failure, map_ahead
from gndet.errors import GndetError, MachineError

PART = 8 << 20  # bytes of a part; its objects as Python's take ten times that
WINDOW = 1 << 20  # bytes that a cut is looked for in
LEAST = 4 << 20  # a smaller file is read as a whole: processes would cost more than they save
_LIST = re.compile(rb'"annotations"\s*:\s*\[')
_CUT = re.compile(rb"\}\s*(,)\s*\{")
_OTHERS = (b'"images"', b'"categories"', b'"info"', b'"licenses"')  # keys that may follow the list


class Parts(NamedTuple):
    """A file, cut."""

    path: Path
    around: bytes  # the file with an empty list of annotations
    cuts: list[tuple[int, int]]  # where in the file each part begins and ends


class NotInParts(GndetError):
    """The file was cut in a wrong place, changed meanwhile, or holds what the fast parser rejects."""


def take_apart(path: Path) -> Parts | None:
    """Cut a file.  Returns None if it is small, or not laid out like COCO's.  Raises OSError."""
    size = path.stat().st_size
    if size < LEAST:
        return None
    with path.open("rb") as file:
        key = _find(file, _LIST.pattern[:13], 0, size)
        opening = None if key is None else _LIST.match(_read(file, key, key + WINDOW))
        if opening is None:
            return None
        start = key + opening.end()
        before = _read(file, 0, start)
        places = [_find_last(file, other, start, size) for other in _OTHERS if other not in before]
        after = min((place for place in places if place is not None), default=size)
        closing = _read(file, max(after - WINDOW, start), after).rfind(b"]")
        if closing < 0:
            return None
        end = max(after - WINDOW, start) + closing
        cuts = list(_cuts(file, start, end))
        return Parts(path, before + _read(file, end, size), cuts) if cuts else None


def read_parts(parts: Parts, known: Known, workers: int, found: Findings) -> Columns:
    """Read and check the annotations in worker processes.

    Raises NotInParts, with found unchanged, and MachineError if a process is killed.
    """

    def give_up(cut: tuple[int, int], death: Death, _: int) -> None:
        raise MachineError(f"{parts.path}: a process that read it was killed: out of memory?")

    together, notes = Together(), []
    read = partial(_read_part, parts.path, known)
    for _, result in map_ahead(read, parts.cuts, workers=min(workers, len(parts.cuts)), on_death=give_up):
        if isinstance(result, Failure):
            raise MachineError(f"{parts.path}: a process that read it failed:\n{result.text}")
        columns, noted = result
        together.add(columns)
        notes.append(noted)
    for noted in notes:
        found.take(noted)
    return together.columns()


def _read_part(path: Path, known: Known, cut: tuple[int, int]) -> tuple[Columns, Findings]:
    """Read and check the annotations of one part.  Raises NotInParts."""
    try:
        with path.open("rb") as file:
            text = b"[" + _read(file, *cut) + b"]"
        items = orjson.loads(text)
    except (OSError, ValueError) as error:
        raise NotInParts(str(error)) from None
    if set(map(type, items)) != {dict}:
        raise NotInParts("not a list of objects")
    found = Findings()
    columns, odd = read_columns(items, known, found)
    if any(_is_huge(items[place]) for place in odd):  # the exact parser takes integers of any size
        found = Findings()
        columns, _ = read_columns(json.loads(text), known, found)
    return columns, found


def _is_huge(value: Any) -> bool:
    """Whether a value holds a number beyond 64 bits: the fast parser turns such an integer into a float."""
    if isinstance(value, dict):
        return any(map(_is_huge, value.values()))
    if isinstance(value, list):
        return any(map(_is_huge, value))
    return type(value) is float and abs(value) >= 2.0**63


def _find(file: Any, words: bytes, start: int, size: int) -> int | None:
    """Find the first place of words at or after start."""
    for first in range(start, size, WINDOW * 16):
        place = _read(file, first, min(first + WINDOW * 16 + len(words), size)).find(words)
        if place >= 0:
            return first + place
    return None


def _find_last(file: Any, words: bytes, start: int, size: int) -> int | None:
    """Find the last place of words after start, from the end: the list is long, and what follows it is short."""
    for end in range(size, start, -WINDOW * 16):
        first = max(end - WINDOW * 16, start)
        place = _read(file, first, min(end + len(words), size)).rfind(words)
        if place >= 0:
            return first + place
    return None


def _cuts(file: Any, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) between objects, PART bytes at a time."""
    while start < end:
        stop = min(start + PART, end)
        cut = None
        while stop < end and cut is None:
            cut = _CUT.search(_read(file, stop, min(stop + WINDOW, end)))
            stop = stop + cut.start(1) if cut else stop + WINDOW // 2
        yield start, min(stop, end)
        start = min(stop, end) + 1  # after the comma


def _read(file: Any, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
