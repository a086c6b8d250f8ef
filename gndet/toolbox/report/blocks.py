"""Build the parts of a report's page: sections, tables, galleries.  Each function turns values into HTML.

Text from data (names of classes and files, messages) is escaped here and nowhere else.
"""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gndet.errors import in_one_line

MAX_SIDE = 720  # pixels of a picture's longer side
QUALITY = 82  # of the JPEGs
MOST_ROWS, MOST_LETTERS = 1500, 1000  # of a table, of a cell: what data may hold is unlimited, a page is not
# control characters, and those that reorder the text around them
HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
Cell = str | tuple[float, str]  # text; or a number to sort by, and its text


def escape(words: object) -> str:
    """Return text escaped for HTML, and visible: see `visible`."""
    return html.escape(visible(str(words)))


def visible(text: str) -> str:
    """Return text with control characters as escapes; lone surrogates of a file name become question marks."""
    plain = text.encode("utf-8", "replace").decode("utf-8")
    return HIDDEN.sub(lambda found: ascii(found[0])[1:-1], plain)


class Section(NamedTuple):
    """A section of the page, to which the contents at the top link."""

    id: str
    title: str
    html: str


def section(id: str, title: str, *blocks: str, lead: str = "") -> Section:
    """Return a section with its heading."""
    parts = [f'<section id="{escape(id)}">', f"<h2>{escape(title)}</h2>"]
    parts += [f'<p class="lead">{escape(lead)}</p>'] if lead else []
    return Section(id, title, "\n".join([*parts, *filter(None, blocks), "</section>"]))


def failed(id: str, title: str, error: Exception) -> Section:
    """Return the section that stands where one could not be made."""
    return section(id, title, notice("bad", f"This section could not be made: {in_one_line(error)}"))


def heading(words: str) -> str:
    """Return a heading within a section."""
    return f"<h3>{escape(words)}</h3>"


def paragraph(words: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(words)}</p>"


def notice(kind: str, words: str) -> str:
    """Return a framed sentence; kind: "good", "warn", "bad" or "plain"."""
    return f'<p class="notice {escape(kind)}">{escape(words)}</p>'


def beside(*blocks: str) -> str:
    """Return blocks side by side if the page is wide enough; empty blocks are left out."""
    return f'<div class="beside">{"".join(blocks)}</div>'


def sortable_table(
    id: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, *, picks: Sequence[str] = ()
) -> str:
    """Return a table that is sorted by clicking a column's head; tables of 9 or more rows get a search field.

    picks: for each row the tag of the pictures that a click on the row shows, or "".  Of more than MOST_ROWS rows, the
    first ones and the last one are shown.
    """
    if len(rows) > MOST_ROWS:
        caption, first = f"{caption}; {MOST_ROWS:,} of {len(rows):,} rows", slice(MOST_ROWS - 1)
        rows, picks = [*rows[first], rows[-1]], picks[first]  # the last row has the totals, and no pictures
    parts = [f'<div class="table" id="{escape(id)}"><p class="caption">{escape(caption)}</p>']
    if len(rows) > 8:
        parts.append(f'<input type="search" class="filter" placeholder="filter {len(rows)} rows" aria-label="filter">')
    head = "".join(f'<th aria-sort="none"><button type="button">{escape(name)}</button></th>' for name in columns)
    parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>')
    for row, tag in zip_longest(rows, picks):
        pick = f' class="pick" tabindex="0" data-pick="{_tag(tag)}"' if tag else ""
        parts.append(f"<tr{pick}>{''.join(map(_cell, row))}</tr>")
    return "".join([*parts, "</tbody></table></div></div>"])


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        text = cell if len(cell) <= MOST_LETTERS else f"{cell[:MOST_LETTERS]}…"
        return f"<td>{escape(text)}</td>"
    value = cell[0] if math.isfinite(cell[0]) else -1e300  # undefined values are the smallest
    return f'<td class="number" data-value="{value:.10g}">{escape(cell[1])}</td>'


def number(value: float | None, form: str = ".3g") -> Cell:
    """Return a cell with a number; "-" if it is undefined."""
    return (math.nan, "-") if value is None or not math.isfinite(value) else (value, format(value, form))


def percent(value: float | None) -> Cell:
    """Return a cell with a fraction in percent; "-" if it is undefined."""
    return number(None if value is None else 100 * value, ".1f")


def details(summary: str, *blocks: str) -> str:
    """Return blocks that are folded away until a click on the summary."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>"


def preformatted(words: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(words)}</pre>"


class GalleryPicture(NamedTuple):
    """A picture (H, W, 3) uint8 of a gallery; tags: what it shows, e.g. "class:cat" or "error:Loc"."""

    image: np.ndarray
    caption: str
    tags: Sequence[str] = ()


def gallery(
    id: str, pictures: Sequence[GalleryPicture], *, filters: Sequence[tuple[str, str]] = (), side: int = MAX_SIDE
) -> str:
    """Return pictures in a grid; a click enlarges a picture.

    filters: tag and name of each button that selects pictures; with filters, table rows with a tag select them too.
    """
    parts = [f'<div class="gallery{" picked" if filters else ""}" id="{escape(id)}">']
    if filters:
        buttons = "".join(
            f'<button type="button" data-tag="{_tag(tag)}">{escape(name)}</button>' for tag, name in filters
        )
        parts.append(f'<div class="filters"><button type="button" data-tag="" class="on">all</button>{buttons}</div>')
    parts.append('<div class="pictures">')
    for picture in pictures:
        tags, name = " ".join(map(_tag, picture.tags)), escape(picture.caption)
        parts.append(
            f'<figure data-tags="{tags}"><img alt="{name}" src="{data_uri(picture.image, side)}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return "".join([*parts, '<p class="none" hidden>no pictures of this kind</p></div></div>'])


def _tag(words: str) -> str:
    """Return a tag with its spaces replaced, because spaces separate tags."""
    return escape("_".join(words.split()))


def data_uri(image: np.ndarray, side: int) -> str:
    """Return a picture (H, W, 3) uint8 as a data: URI of a JPEG whose longer side has at most `side` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def headline(pairs: Sequence[tuple[str, Any]]) -> str:
    """Return names and values in large type."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'
