"""Read a picture file of any common kind as (height, width, 3) uint8 RGB, upright; find the pictures in folders."""

import errno
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.image_folder import EMPTY, FILE, PICTURE, read_head, what_is
from gndet.data.records import Record
from gndet.errors import DataError, MachineError

MAX_PIXELS = 100_000_000  # data.max_pixels: a larger picture is a mistake or a decompression bomb
ORIENTATION = 0x0112  # EXIF's tag
TURNS = range(2, 9)  # its values with which a picture is not stored upright
SIDEWAYS = range(5, 9)  # those that swap height and width
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
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the picture is not at fault
Note = Callable[[str, str], None]


def read_image(
    path: Path, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS, note: Note | None = None
) -> np.ndarray:
    """Read a picture and turn it as its EXIF orientation says.

    size: height, width that the annotation file states, None if unknown.  max_pixels: the limit for the size in the
    header.  note: called with the code (of FAULTS) and words for each unusual property.
    Returns (height, width, 3) uint8 RGB: grey, palette, CMYK and 1-bit converted, 16 bit scaled to 8, alpha
    dropped, the first frame of an animation.  Raises Fault for a file that is missing, broken, over
    max_pixels, or of another size, and MachineError where there are too many open files or too little memory.
    """
    with _opened(path, max_pixels) as image:
        stored = image.size[::-1]
        image.load()  # which turns a TIFF
        # without a turn exif_transpose would copy the picture
        upright = ImageOps.exif_transpose(image) if _orientation(image) in TURNS else image
        pixels = np.array(_to_rgb(upright))  # (h, w, 3), a copy
        unusual = [] if note is None else _unusual(image)
    if size is not None and pixels.shape[:2] != size:
        message = f"{path}: height, width are {pixels.shape[:2]}, the annotation file says {size}"
        if stored == size:
            message += "; it fits only before the EXIF rotation: the annotations are of the unrotated picture"
        raise Fault("picture-unrotated" if stored == size else "picture-size", message)
    if note is not None:
        for code, words in unusual:
            note(code, words)
    return pixels


def picture_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the height and width that `read_image` gives a picture, without decoding it.

    Raises as `read_image` does for what the header tells; decoding may still find the picture broken.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow gives the size that it has when it is turned
            return height, width
        if image.format == "PNG" and not _tells_late(path):
            sideways = Image.Image.getexif(image).get(ORIENTATION, 1) in SIDEWAYS  # PNG's own would decode the picture
        else:
            sideways = _orientation(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def _tells_late(path: Path) -> bool:
    """Return whether a PNG holds text or EXIF, and so perhaps its orientation, after its pixels."""
    content = path.read_bytes()
    late = content[content.rfind(b"IDAT") :]
    return any(kind in late for kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"))


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture, not yet decoded; raise as `read_image` does, here and in the body."""
    try:
        with no_limit_of_pillows(), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if height * width > max_pixels:
                limit = f"over the limit of {max_pixels} (data.max_pixels)"
                raise Fault("picture-pixels", f"{path}: {height} x {width} pixels, {limit}")
            yield image
    except UnidentifiedImageError:
        kind = what_is(read_head(path))
        code = "file-empty" if kind == EMPTY else "picture-unreadable"
        kind = f"not of a kind that is read ({', '.join(FORMATS)})" if kind == FILE else kind
        kind = "damaged, or of a kind that is not read" if kind == PICTURE else kind
        raise Fault(code, f"{path}: cannot be read as a picture: it is {kind}") from None
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise MachineError(f"{path}: {error.strerror}: a limit of this machine, not of the picture") from None
        raise Fault("picture-unreadable", f"{path}: cannot be read as a picture: {error}") from None


def _unusual(image: Image.Image) -> list[tuple[str, str]]:
    """List what a picture has that is mended in memory: codes of FAULTS with words."""
    found = []
    if image.mode.startswith("I"):
        found.append(("picture-16bit", f"16 bits a channel (mode {image.mode})"))
    elif image.mode != "RGB":
        found.append(("picture-mode", f"mode {image.mode}"))
    if _orientation(image) in TURNS:
        found.append(("picture-turned", f"EXIF orientation {_orientation(image)}"))
    if getattr(image, "is_animated", False):
        found.append(("picture-animated", f"{getattr(image, 'n_frames', 1)} frames"))
    return found


def _orientation(image: Image.Image) -> Any:
    """Return EXIF's orientation: 1 is upright; a damaged value may be anything."""
    return image.getexif().get(ORIENTATION, 1)


@contextmanager
def no_limit_of_pillows() -> Iterator[None]:
    """Leave the limit to max_pixels: Pillow's own warns from 89 million pixels on and cannot be set for one file.

    The limit is global: a process that reads in several threads holds this around all of them.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """List the pictures among files and in folders, by name.  Raises DataError where there are none."""
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
    """Return a picture of (height, width) as a record without objects."""
    none = np.zeros(0)
    return Record(
        image_id, str(file), size, partial(read_image, file), np.zeros((0, 4)), none.astype(np.int64),
        none.astype(bool), none, none.astype(np.int64), [],
    )  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16-bit values are divided by 257, where Pillow would clip them at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()}, expected 8 or 16 bits a channel")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
