"""Read a picture file of any common kind as (height, width, 3) uint8 RGB, upright; find the pictures in folders."""

import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gndet.errors import DataError
from gndet.structures import Record

MAX_PIXELS = 100_000_000  # a larger picture is a mistake or a decompression bomb
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it runs Ghostscript
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # suffixes of those looked for in a folder
DECODER_ERRORS = (  # what Pillow's decoders raise on broken files
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def read_image(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Read a picture and turn it as its EXIF orientation says.

    size: height, width that the annotation file states, None where nothing is known.
    Returns (height, width, 3) uint8 RGB: grey, palette, CMYK and 1-bit converted, 16 bit scaled to 8, alpha
    dropped, of an animation the first frame.  Raises DataError for a file that is missing, broken, over
    MAX_PIXELS, or of another size.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            stored = image.size[::-1]  # height, width
            if stored[0] * stored[1] > MAX_PIXELS:
                raise DataError(f"{path}: {stored[0]} x {stored[1]} pixels, over the limit of {MAX_PIXELS}")
            pixels = np.array(_to_rgb(ImageOps.exif_transpose(image)))  # (h, w, 3), a copy
    except DECODER_ERRORS as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from None
    if size is not None and pixels.shape[:2] != size:
        message = f"{path}: height, width are {pixels.shape[:2]}, the annotation file says {size}"
        if stored == size:
            message += "; it fits only before the EXIF rotation: the annotations are of the unrotated picture"
        raise DataError(message)
    return pixels


def open_picture(path: Path) -> np.ndarray:
    """Read a picture of unknown size as (height, width, 3) uint8 RGB; raises as `read_image` does."""
    return read_image(path, None)


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The pictures among files and in folders, in order of name.  Raises DataError where there are none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            visible = (file for file in path.iterdir() if not file.name.startswith("."))
            inside = sorted(file for file in visible if file.suffix.lower() in PICTURES)
            if not inside:
                raise DataError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such picture or folder")
    return files


def picture_record(image_id: int, file: Path, size: tuple[int, int]) -> Record:
    """A picture of (height, width) as a record without objects."""
    none = np.zeros(0)
    return Record(
        image_id, str(file), size, partial(open_picture, file), np.zeros((0, 4)), none.astype(np.int64),
        none.astype(bool), none, none.astype(np.int64), [],
    )  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16-bit values are divided by 257, where Pillow would clip them at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()}, expected 8 or 16 bits a channel")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")
