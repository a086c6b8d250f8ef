"""Annotations in JSON text: only the values that are checked become Python objects, and coordinates go into one array.

Letters: n segmentations, P polygons.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import simdjson

OPENS, COMMA = b"[,"
Raw = msgspec.Raw  # the JSON text of a value; msgspec has checked its grammar, but not its UTF-8
Item = dict[str, Any]  # an annotation as the file has it
CATEGORY, PLACE = "\0category", "\0place"  # keys of an export's annotation that no file has: its class, where it is


# what is checked, or occurs in messages
_KEYS = ("id", "image_id", "category_id", "iscrowd", "ignore", "area", "bbox", "attributes")
_Row: Any = msgspec.defstruct(
    "_Row", [*((key, Any, msgspec.UNSET) for key in _KEYS), ("segmentation", Raw, Raw(b"null"))], gc=False
)


class JsonItems(Sequence[Item]):
    """The annotations of a JSON list of objects; an object is made of one that is asked for."""

    def __init__(self, text: bytes) -> None:
        """Parse a list.  Raises msgspec.DecodeError, RecursionError and ValueError."""
        text.decode()  # msgspec does not decode what it skips
        self.rows = msgspec.json.decode(text, type=list[_Row])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        values = {key: getattr(self.rows[place], key) for key in _Row.__struct_fields__}
        return {key: decoded(value) for key, value in values.items() if value is not msgspec.UNSET}


def column(items: Sequence[Item], key: str) -> list[Any]:  # None where it is missing; segmentations may be Raw
    if not isinstance(items, JsonItems):
        return [item.get(key) for item in items]
    return [None if (value := getattr(row, key)) is msgspec.UNSET else value for row in items.rows]


def decoded(value: Any) -> Any:  # raises msgspec.DecodeError for a number that is too large for a float
    return msgspec.json.decode(value) if type(value) is Raw else value


def parse_outlines(raws: Sequence[Raw]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Parse those of n segmentations that are lists, and not empty.

    Returns, of their P polygons, the index of the segmentation (P,), ascending, and how many numbers it has (P,), and
    all numbers, float64, end to end; None if one is not a list of lists of numbers, or a list is empty.
    """
    places, (text, ends) = np.arange(len(raws)), _joined(raws)
    is_list = np.frombuffer(text, np.uint8)[np.concatenate(([1], ends[:-1]))] == OPENS
    is_list &= np.diff(ends, prepend=1) > len(b"[],")
    if not is_list.all():
        places = places[is_list]
        text, ends = _joined([raws[place] for place in places.tolist()])
    try:
        points = np.frombuffer(simdjson.Parser().parse(text).as_buffer(of_type="d"))  # type: ignore[union-attr]
    except (ValueError, TypeError, RuntimeError):  # a number beyond 64 bits or float64; a value that is no number
        return None
    letters = np.frombuffer(text, dtype=np.uint8)  # of numbers and lists
    brackets, commas = np.flatnonzero(letters & 0xF9 == OPENS & 0xF9), np.flatnonzero(letters == COMMA)
    opens = letters[brackets] == OPENS
    depth = np.where(opens, 1, -1).cumsum()  # behind each bracket
    first, last = brackets[opens & (depth == 3)], brackets[~opens & (depth == 2)]
    lengths = np.searchsorted(commas, last) - np.searchsorted(commas, first) + 1
    if depth.max() > 3 or len(commas) + 1 != lengths.sum() or len(points) != lengths.sum():
        return None  # a number beside the inner lists adds a comma, an empty list a length
    return places[np.searchsorted(ends, first, side="right")], lengths, points


def _joined(raws: Sequence[Raw]) -> tuple[bytes, np.ndarray]:  # a JSON list, and where what follows each begins
    return b"[" + b",".join(raws) + b"]", np.cumsum([len(raw) + 1 for raw in raws], dtype=np.int64) + 1
