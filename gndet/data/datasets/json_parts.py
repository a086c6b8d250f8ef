"""Read a large annotation file in parts: the list of annotations, cut between annotations, and what surrounds it.

The cuts are guessed from the text.  A wrong guess cannot pass: a part that begins or ends inside an object, a list or a
string does not parse as a list of objects, or the rest of the file not as an object; then the file is read as a whole.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import msgspec

from gndet.data.datasets.columns import Columns, Known, end_to_end, read_columns
from gndet.data.datasets.faults import Findings
from gndet.data.datasets.json_items import JsonItems
from gndet.data.workers import read_in_processes
from gndet.errors import GndetError

PART = 2 << 20  # bytes of a part: what it takes to read it fits into a core's cache
LEAST = 4 << 20  # a smaller file is read as a whole: processes would cost more than they save
SHORT = 1 << 20  # the most bytes that "info" and "licenses" take if they follow the list
_LIST = re.compile(rb'"annotations"\s*:\s*\[')
_CUT = re.compile(rb"\}\s*(,)\s*\{")

Cut = tuple[int, int]  # where in the file a part begins and ends


class NotInParts(GndetError):
    """The file was cut in a wrong place, changed meanwhile, or holds something that the fast parser rejects."""


def take_apart(path: Path) -> list[Cut]:
    """Cut the list of annotations.  Returns [] if the file is small, or not laid out like COCO's.  Raises OSError."""
    if path.stat().st_size <= LEAST:
        return []
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        opening = _LIST.search(text)
        if opening is None:
            return []
        start = opening.end()
        after = len(text)  # where the next list begins
        for keys, reach in (((b'"images"', b'"categories"'), after), ((b'"info"', b'"licenses"'), SHORT)):
            following = [key for key in keys if text.find(key, 0, start) < 0]
            places = [text.rfind(key, max(after - reach, start), after) for key in following]
            after = min((place for place in places if place >= 0), default=after)
        return list(cut_between_objects(text, start, text.rfind(b"]", start, after), PART))


def cut_between_objects(text: mmap, start: int, end: int, size: int) -> Iterator[Cut]:
    """Cut [start, end) between objects, `size` bytes at a time."""
    while start < end:
        comma = _CUT.search(text, start + size, end)
        stop = comma.start(1) if comma else end
        yield start, stop
        start = stop + 1


def read_around(path: Path, cuts: list[Cut]) -> bytes:
    """Return the file with an empty list of annotations.  Raises NotInParts for a second list, and OSError."""
    with path.open("rb") as file:
        text = file.read(cuts[0][0])
        file.seek(cuts[-1][1])
        text += file.read()
    if text.count(b'"annotations"') > 1:
        raise NotInParts("annotations occurs twice")
    return text


def as_utf8(text: bytes) -> bytes:
    """Convert JSON text from UTF-16 or UTF-32 to UTF-8; leave any other text as it is."""
    encoding = json.detect_encoding(text)
    if encoding.startswith("utf-8"):
        return text
    try:
        return text.decode(encoding).encode()
    except UnicodeError:
        return text


def read_parts(path: Path, cuts: list[Cut], known: Known, found: Findings) -> Columns:
    """Read and check the annotations in worker processes.  Raises NotInParts, and MachineError if one is killed."""

    def parts() -> Iterator[Columns]:
        before = 0
        for columns, noted in read_in_processes(partial(_read_part, path, known), cuts, path):
            found.take(noted.listed(), before)
            before += len(columns.all_ids)
            yield columns

    return end_to_end(parts())


def _read_part(path: Path, known: Known, cut: Cut) -> tuple[Columns, Findings]:
    """Read and check the annotations of one part.  Raises NotInParts."""
    found = Findings()
    try:
        with path.open("rb") as file:
            file.seek(cut[0])
            items = JsonItems(b"[" + file.read(cut[1] - cut[0]) + b"]")
        columns = read_columns(items, known, found)
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise NotInParts(str(error)) from None
    if not items:
        raise NotInParts("not a list of objects")
    return columns, found
