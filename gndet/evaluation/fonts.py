"""The font of all pictures, and what stands for text that it cannot draw.

DejaVu Sans comes with matplotlib.  It has Latin, Greek, Cyrillic, Hebrew, Arabic and more, but no Chinese, Japanese or
Korean.  The file is found without importing matplotlib, which takes a while.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont, features

from gndet.text import LONGEST

NO_LETTER = "\U0010ffff"  # no font has it
RIGHT_TO_LEFT = ("R", "AL", "AN")  # classes of unicodedata.bidirectional
PROBE = 16  # pixels


@cache
def font(size: int, *, shaping: bool = True) -> ImageFont.FreeTypeFont:
    """Return the font, `size` pixels high.  shaping: let raqm join and order letters, if it is there."""
    engine = None if shaping else ImageFont.Layout.BASIC
    spec = find_spec("matplotlib")
    assert spec is not None and spec.origin is not None  # a dependency
    file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, size, layout_engine=engine)


@cache
def _has(letter: str) -> bool:
    """Return whether the font draws a letter rather than the box of a missing one."""
    if not letter.isprintable() or (unicodedata.bidirectional(letter) in RIGHT_TO_LEFT and not features.check("raqm")):
        return False  # without raqm, Pillow neither joins Arabic letters nor orders them from the right
    mask, missing = (font(PROBE, shaping=False).getmask(text) for text in (letter, NO_LETTER))
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def drawable(text: str) -> str:
    """Escape the letters of a text that the font lacks, as in \\u76d8."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(letter if _has(letter) else ascii(letter)[1:-1] for letter in composed)


def class_name(classes: Sequence[str], label: int) -> str:
    """Return the name of a class to draw, at most LONGEST letters of it.

    Returns `class N`, N its label from 0, if the font lacks a letter of it or there is none to see.
    """
    name = classes[label] if len(classes[label]) <= LONGEST else f"{classes[label][: LONGEST - 1]}…"
    composed = unicodedata.normalize("NFC", name)
    return composed if composed.strip() and all(map(_has, composed)) else f"class {label}"
