"""Annotations in JSON text: only the values that are checked become Python objects, and coordinates go into one array.

As Python objects, the coordinates of COCO's outlines take five times as long to read, and ten times the memory.
Letters: n segmentations, P polygons.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import simdjson

OPENS, COMMA = b"[,"
UNSET = msgspec.UNSET

Raw = msgspec.Raw  # the JSON text of a value; msgspec has checked its grammar, but not its UTF-8
Item = dict[str, Any]  # an annotation as the file has it


# the values of an annotation that are checked, or occur in messages
_KEYS = ("id", "image_id", "category_id", "iscrowd", "ignore", "area", "bbox", "attributes", "category", "place")
_Row: Any = msgspec.defstruct(
    "_Row", [*((key, Any, UNSET) for key in _KEYS), ("segmentation", Raw, Raw(b"null"))], gc=False
)


class JsonItems(Sequence[Item]):
    """The annotations of a JSON list of objects; an object is made of one that is asked for."""

    def __init__(self, text: bytes) -> None:
        """Parse a list.  Raises msgspec.DecodeError, RecursionError and ValueError."""
        text.decode()  # msgspec does not decode what it skips
        self._rows = msgspec.json.decode(text, type=list[_Row])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        values = {key: getattr(self._rows[place], key) for key in _Row.__struct_fields__}
        return {key: decoded(value) for key, value in values.items() if value is not UNSET}

    def column(self, key: str) -> list[Any]:
        """Return the values of a key of `_Row`, None where it is missing; segmentations as JSON text."""
        return [None if (value := getattr(row, key)) is UNSET else value for row in self._rows]


def column(items: Sequence[Item], key: str) -> list[Any]:
    """Return the values of a key, None where it is missing; segmentations may be Raw."""
    return items.column(key) if isinstance(items, JsonItems) else [item.get(key) for item in items]


def decoded(value: Any) -> Any:
    """Return a value as Python objects.  Raises msgspec.DecodeError for a number that is too large for a float."""
    return msgspec.json.decode(value) if type(value) is Raw else value


def parse_outlines(raws: Sequence[Raw]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Parse those of n segmentations (at least 1) that are lists, and not empty.

    Returns, of their P polygons, the index of the segmentation (P,), ascending, and how many numbers it has (P,), and
    all numbers, float64, end to end; None if one is not a list of lists of numbers, or one of these lists is empty.
    """
    places, (text, ends) = np.arange(len(raws)), _joined(raws)
    is_list = np.frombuffer(text, np.uint8)[np.concatenate(([1], ends[:-1]))] == OPENS
    is_list &= np.diff(ends, prepend=1) > len(b"[],")
    if not is_list.any():
        return places[:0], places[:0], np.zeros(0)
    if not is_list.all():
        places = places[is_list]
        text, ends = _joined([raws[place] for place in places.tolist()])
    try:
        parsed: Any = simdjson.Parser().parse(text)
        points = np.frombuffer(parsed.as_buffer(of_type="d"))  # of lists at any depth
    except (ValueError, TypeError, RuntimeError):  # a number beyond 64 bits or float64; a value that is no number
        return None
    letters = np.frombuffer(text, dtype=np.uint8)  # of numbers and lists
    brackets, commas = np.flatnonzero(letters & 0xF9 == OPENS & 0xF9), np.flatnonzero(letters == COMMA)
    opens = letters[brackets] == OPENS
    depth = np.where(opens, 1, -1).cumsum()  # behind each bracket
    first, last = brackets[opens & (depth == 3)], brackets[~opens & (depth == 2)]
    lengths = np.searchsorted(commas, last) - np.searchsorted(commas, first) + 1
    # a number beside the inner lists adds a comma, an empty list a length
    if depth.max() > 3 or len(commas) + 1 != lengths.sum() or len(points) != lengths.sum():
        return None
    return places[np.searchsorted(ends, first, side="right")], lengths, points


def _joined(raws: Sequence[Raw]) -> tuple[bytes, np.ndarray]:
    """Join n texts to a JSON list.  Returns it, and where the text behind each begins, (n,)."""
    return b"[" + b",".join(raws) + b"]", np.cumsum([len(raw) + 1 for raw in raws], dtype=np.int64) + 1
