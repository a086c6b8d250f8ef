"""Read ids and other numbers as exports write them: as integers, as 5.0, as text, or as names that get a number."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count, filterfalse
from typing import Any, NamedTuple

import numpy as np

NO_ID = -(2**63)  # stands for an id that is missing or is not an integer; no id of a file is read as this
WORDED = ("iscrowd", "ignore", "area", "bbox", "segmentation")  # keys of an annotation whose numbers may be text
_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,3})?\s*", re.ASCII)

Numbers = Mapping[Any, int]  # the number of each id, if some ids are names; empty: ids are numbers themselves
NO_NAMES: Numbers = {}


class Integers(NamedTuple):
    """A column of n ids as numbers."""

    values: np.ndarray  # (n,) int64, NO_ID where wrong
    wrong: np.ndarray  # (n,) bool: not a 64-bit integer, or a name that is not known
    floats: np.ndarray  # (n,) bool: written as 5.0
    texts: np.ndarray  # (n,) bool: written as "5"


def to_integer(value: Any) -> int | None:
    """Return a 64-bit integer, reading 5.0, "5" and "5.0" as 5; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    elif type(value) is str and (digits := _INTEGER.fullmatch(value)):
        value = int(digits[1])
    return value if type(value) is int and NO_ID < value < 2**63 else None


def to_integers(values: list[Any], numbers: Numbers) -> Integers:
    """Read a column of n ids."""
    if not numbers and set(map(type, values)) <= {int}:
        with suppress(OverflowError):
            return Integers(np.array(values, dtype=np.int64), *np.zeros((3, len(values)), dtype=bool))
    found = [number_of(value, numbers) for value in values]
    wrong = np.array([number is None for number in found], dtype=bool)
    floats, texts = (np.array([type(value) is kind for value in values], dtype=bool) for kind in (float, str))
    ids = np.array([NO_ID if number is None else number for number in found], dtype=np.int64)
    return Integers(ids, wrong, floats, np.zeros_like(wrong) if numbers else texts & ~wrong)


def number_of(value: Any, numbers: Numbers) -> int | None:
    """Return the number that an id is, or that a name has; None if it has none."""
    if type(value) in (str, int) and value in numbers:
        return numbers[value]
    number = to_integer(value)
    return numbers.get(number) if numbers else number


def number_names(ids: Sequence[Any]) -> dict[Any, int]:
    """Number the ids of a list in which some are names: texts that are no integers, or integers beyond 64 bits.

    Returns {} if none is.  Other integers stay as they are; the texts and the large integers follow them in the order
    of the list, or take the numbers that are left if nothing fits behind them.
    """
    if not any(_may_be_name(value) and to_integer(value) is None for value in ids):
        return {}
    integers = {number for value in ids if not _may_be_name(value) and (number := to_integer(value)) is not None}
    highest = max(integers, default=0)
    unused = filterfalse(integers.__contains__, count(highest + 1 if highest < 2**62 else 1))
    names = dict.fromkeys(filter(_may_be_name, ids))
    return {number: number for number in integers} | dict(zip(names, unused, strict=False))


def _may_be_name(value: Any) -> bool:
    return bool(value.strip()) if type(value) is str else type(value) is int and value >= 2**63


def without_text(items: Sequence[dict[str, Any]], places: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Read text as numbers in the annotations at these places.  Returns those that change, by place."""
    changed = {}
    for place in places:
        item = items[place]
        new = {key: value for key in WORDED if key in item and (value := _as_numbers(item[key])) != item[key]}
        if new:
            changed[place] = item | new
    return changed


def _as_numbers(value: Any, depth: int = 3) -> Any:
    """Replace the texts in a value that are numbers by these numbers; an RLE keeps its compressed counts.

    depth: how deep to look; the numbers of polygons lie two lists deep.
    """
    if type(value) is list and depth:
        return [_as_numbers(part, depth - 1) for part in value]
    if type(value) is dict and depth:
        return {key: part if type(part) is str else _as_numbers(part, depth - 1) for key, part in value.items()}
    if type(value) is not str or not _NUMBER.fullmatch(value):
        return value
    number = to_integer(value)
    return float(value) if number is None else number
