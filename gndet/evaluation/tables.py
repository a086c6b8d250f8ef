"""Tables as text and as CSV."""

import csv
import io
from collections.abc import Container, Iterable, Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Pad the columns of rows to their widest cells; those at the places in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'<' if place in left else '>'}{width}}}" for place, width in enumerate(widths))
    return "\n".join(template.format(*row).rstrip() for row in rows)


def csv_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, numbers with full precision, None as an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
