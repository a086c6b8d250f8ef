"""Tables as text and as CSV."""

import csv
import io
from collections.abc import Container, Iterable, Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Pad the columns of rows to their widest cells; those at the places in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in enumerate(cells)]
        for cells in (zip(row, widths, strict=True) for row in rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def csv_table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, numbers with full precision, None as an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
