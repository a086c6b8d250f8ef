"""Read a JPEG file that lacks its last bytes, if no more than its last rows are missing.

The missing rows begin where two different continuations of the file make a difference.
"""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SHARE, LIMIT = 0.01, 0.25  # of the rows: may be missing; may be missing even if a single row of blocks is more
END = b"\xff\xd9"  # the marker EOI
FILLER = bytes(range(255)) * 16  # other data than the zeros that the decoder takes after END; has no marker
NO_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker that ends the data of a scan


class Layout(NamedTuple):
    """What the markers of a JPEG file tell."""

    block_rows: int  # rows of pixels that are coded together; 0 if no frame was found
    complete: bool  # whether the file has a scan for each bit of each coefficient of each component


def read_short(path: Path) -> tuple[Image.Image, int] | None:
    """Read a JPEG file whose end is missing.

    Returns the picture, decoded, and how many of its last rows are made up; None if too many are.  Raises OSError for
    a file that is broken in another way.
    """
    content = path.read_bytes().rstrip(b"\xff")  # half a marker
    layout = layout_of(content)
    if not layout.complete or not layout.block_rows:
        return None
    picture, other = (_decoded(content + tail) for tail in (END, FILLER + END))
    changed = (np.asarray(picture) != np.asarray(other)).reshape(picture.height, -1).any(axis=1)
    made_up = picture.height - int(np.argmax(changed)) if changed.any() else 0
    last = picture.height - (picture.height - 1) // layout.block_rows * layout.block_rows
    allowed = min(max(last + 1, SHARE * picture.height), LIMIT * picture.height)  # 1: colors are smoothed over blocks
    return (picture, made_up) if made_up <= allowed else None


def _decoded(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content), formats=("JPEG",))
    picture.load()
    return picture


def layout_of(content: bytes) -> Layout:
    """Read the markers of a JPEG file up to the end of the content (ITU-T T.81, annex B)."""
    place, block_rows = 2, 0
    missing: dict[int, dict[int, int]] = {}  # for each component and coefficient: bits that no scan had yet
    while place + 4 <= len(content):
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        segment = content[place + 4 : place + 2 + length]
        place += 2 + length
        if marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended or progressive
            block_rows = 8 * max(sampling & 15 for sampling in segment[7::3])
            missing = {component: dict.fromkeys(range(64), 1) for component in segment[6::3]}
        elif marker == 0xDA:  # a scan
            first, last, low = segment[-3], segment[-2], segment[-1] & 15
            for component in segment[1 : 1 + 2 * segment[0] : 2]:
                missing.setdefault(component, {}).update(dict.fromkeys(range(first, last + 1), low))
            end = NO_DATA.search(content, place)
            place = end.start() if end else len(content)
    complete = bool(missing) and not any(bits for parts in missing.values() for bits in parts.values())
    return Layout(block_rows, complete)
