"""Read back what a run logged: metrics.jsonl and norms.jsonl, one JSON object per line.

A run outlives its record: a line that gndet did not write, or that a disk damaged, is left out and reported once.  It
stays in the file.  Lines are read in the order of their updates; of two for one update, the later one counts.
"""

import json
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gndet.errors import DataError
from gndet.files import is_shared, write_whole

LONGEST = 1 << 24  # bytes of a line; 300 norm layers take 200 kB
LARGEST = 1e300  # of a number; beyond, drawing it overflows
KINDS = ("train", "evaluation")

Entry = dict[str, Any]
Tell = Callable[[str], None]
Known = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Number = Known | None
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Three = Annotated[list[Number], Field(min_length=3, max_length=3)]
Five = Annotated[list[Number], Field(min_length=5, max_length=5)]


class _Layer(BaseModel):
    """A norm layer in a line of norms.jsonl, see `norm_statistics.measure`."""

    model_config = ConfigDict(strict=True)
    name: str
    kind: str
    channels: Count
    groups: Count | None
    masked: bool
    eps: Known
    trained: bool
    elements: Count | None
    one_cell: Number
    one_element: Number
    nonfinite: Number
    std: Five | None
    eps_dominated: Number
    similar: Pair
    gamma: Three
    dead: Number
    exploding: Number
    drift: Pair | None
    gap_mean: Pair | None = None
    gap_std: Pair | None = None
    spread_mean: Number = None
    spread_std: Number = None


class _Norms(BaseModel):
    """A line of norms.jsonl."""

    model_config = ConfigDict(strict=True)
    layers: list[_Layer]
    padding: Number


def is_metrics(entry: Entry) -> bool:
    """Return whether an object is a line of metrics.jsonl, with numbers that can be drawn."""
    values = (value for key, value in entry.items() if key not in ("update", "kind") and value is not None)
    return entry.get("kind") in KINDS and all(type(value) in (int, float) and abs(value) < LARGEST for value in values)


def is_norms(entry: Entry) -> bool:
    """Return whether an object is a line of norms.jsonl."""
    try:
        _Norms.model_validate(entry)
    except ValidationError:
        return False
    return True


def read_metrics(
    path: Path, tell: Tell | None = None, last: int | None = None, *, is_ours: Callable[[Entry], bool] = is_metrics
) -> list[Entry]:
    """Read metrics.jsonl: a dict per line with update, kind and the values, None for values that were not finite.

    tell: called with a sentence if lines are left out.  last: the updates of the run, if known.  is_ours: tells the
    lines that gndet wrote.  Returns [] if there is no such file.  Raises DataError for a file that cannot be read.
    """
    entries: dict[tuple[int, str], Entry] = {}
    left_out: list[int] = []
    for number, (_, entry) in enumerate(_lines(path, is_ours), start=1):
        if entry is None or (last is not None and entry["update"] > last):
            left_out.append(number)
            continue
        key = entry["update"], str(entry.get("kind"))
        if key in entries:
            left_out.append(number)
        entries[key] = entry
    _tell(path, left_out, tell)
    return sorted(entries.values(), key=itemgetter("update"))


def truncate(
    path: Path, last_update: int, evaluation_due: bool, tell: Tell, is_ours: Callable[[Entry], bool] = is_metrics
) -> None:
    """Drop the lines of later updates, a half-written line, and that of an evaluation that will be repeated.

    The file is replaced as a whole.  A line without `kind` belongs to an evaluation.  Lines that gndet did not write
    stay; tell: called with a sentence about them.  Raises DataError for a file that cannot be read, and OutputError.
    """

    def is_kept(entry: Entry) -> bool:
        if entry["update"] == last_update and entry.get("kind", "evaluation") == "evaluation":
            return not evaluation_due
        return entry["update"] <= last_update

    lines = list(_lines(path, is_ours))
    if path.exists() or is_shared(path):  # nothing is written through a link
        write_whole(path, b"".join(line for line, entry in lines if entry is None or is_kept(entry)))
        _tell(path, [number for number, (_, entry) in enumerate(lines, start=1) if entry is None], tell)


def _tell(path: Path, left_out: list[int], tell: Tell | None) -> None:
    if left_out and tell is not None:
        count = len(left_out)
        tell(f"{path}:{left_out[0]}: {count} line(s) are left out, which are broken, repeated or not of this run")


def _lines(path: Path, is_ours: Callable[[Entry], bool]) -> Iterator[tuple[bytes, Entry | None]]:
    """Yield each line, ending in a line break, with its object; None if it is not gndet's.

    A last line that a killed run left half-written is passed over.  Nothing is yielded if there is no such file.
    Raises DataError if it cannot be read.
    """
    try:
        if not S_ISREG(path.stat().st_mode):  # opening a pipe would wait
            raise DataError(f"{path}: not a file, expected what the run logged; move it away")
        with path.open("rb") as file:
            for line in file:
                entry = _parsed(line)
                entry = entry if entry is not None and is_ours(entry) else None
                if entry is not None or line.endswith(b"\n"):
                    yield line.rstrip(b"\n") + b"\n", entry
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot read what the run logged: {error.strerror}; move it away") from None


def _parsed(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line.decode("utf-8-sig")) if len(line) < LONGEST else None
    except (ValueError, RecursionError):
        return None
    update = entry.get("update") if isinstance(entry, dict) else None
    return entry if type(update) is int and 0 <= update < 1 << 53 else None
