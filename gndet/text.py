"""Text from files and data in a form fit to be shown: whole output, a name in a line, a table.

`escaped` guards all that the command line prints, whatever it is; `shown` and what builds on it are for a name or value
in a line, in which a line break would be wrong, too.
"""

import csv
import io
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any

LONGEST = 60  # letters of a name or value in a line
# control characters but line break and tab, what reverses the order of letters, and surrogates, which no encoding has
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """Replace what would steer a terminal by escapes like \\x1b."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(text: str) -> str:
    """Return text in a form fit for a line: what is not printable becomes an escape like \\x1b or \\n."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def printable(text: str) -> str:
    """Return at most LONGEST letters of a text, as `shown` does."""
    return _cut(shown(text[: LONGEST + 1]))


def named_briefly(names: Sequence[str]) -> str:
    """Return the first 10 of many names, and the number of the others."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(printable, names[:10])) + more


def brief(value: Any) -> str:
    """Return a value of any type as text of at most LONGEST letters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits, Python's limit
        text = "a huge integer"
    except RecursionError:
        text = "a deeply nested value"
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def valid_text(text: str) -> str:
    """Replace halves of characters (lone surrogates) by U+FFFD, and join two halves: most libraries take no others."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Pad the columns of rows to their widest cells; the columns with an index in `left` are left-aligned."""
    rows = [list(map(shown, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'<' if column in left else '>'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in rows)


def csv_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, with numbers in full precision and None as an empty cell."""

    def line(row: Sequence[Any]) -> str:
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\r\n").writerow(row)  # quotes cells that hold one of these two
        return file.getvalue().removesuffix("\r\n") + "\n"

    return "".join(map(line, rows))
