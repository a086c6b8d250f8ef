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
TURNS = range(2, 9)  # its values for pictures that are not stored upright
SIDEWAYS = range(5, 9)  # those that swap height and width
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it runs Ghostscript
PICTURES = (  # suffixes to look for in a folder, those of FORMATS
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2", ".j2k",
    ".jpx", ".pbm", ".pgm", ".ppm", ".pnm",
)  # fmt: skip
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
    Returns (height, width, 3) uint8 RGB: gray, palette, CMYK and 1-bit converted, 16 bit scaled to 8, alpha
    dropped, the first frame of an animation.  Raises Fault for a file that is missing, broken, over
    max_pixels, or of another size, and MachineError if there are too many open files or too little memory.
    """
    with _opened(path, max_pixels) as image:
        stored = image.size[::-1]
        image.load()  # this rotates a TIFF
        # exif_transpose would copy a picture that is upright already
        upright = ImageOps.exif_transpose(image) if _orientation(image) in TURNS else image
        pixels = np.array(_to_rgb(upright))  # (h, w, 3), a copy
        unusual = [] if note is None else _unusual(image)
    if size is not None and pixels.shape[:2] != size:
        message = f"{path}: height, width are {pixels.shape[:2]}, the annotation file says {size}"
        if stored == size:
            message += "; it matches only before the EXIF rotation: the unrotated picture was annotated"
        raise Fault("picture-unrotated" if stored == size else "picture-size", message)
    if note is not None:
        for code, words in unusual:
            note(code, words)
    return pixels


def picture_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the height and width of a picture as `read_image` would return it, without decoding it.

    Raises as `read_image` does for what the header tells; decoding may still find the picture broken.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow already gives the rotated size
            return height, width
        if image.format == "PNG" and not _has_late_metadata(path):
            sideways = Image.Image.getexif(image).get(ORIENTATION, 1) in SIDEWAYS  # PNG's getexif decodes the picture
        else:
            sideways = _orientation(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def _has_late_metadata(path: Path) -> bool:
    """Return whether a PNG has text or EXIF, and so perhaps its orientation, after its pixels."""
    content = path.read_bytes()
    late = content[content.rfind(b"IDAT") :]
    return any(kind in late for kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"))


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture without decoding it; raise what `read_image` raises, also for errors in the `with` block."""
    try:
        with without_pillow_limit(), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if height * width > max_pixels:
                limit = f"over the limit of {max_pixels} (data.max_pixels)"
                raise Fault("picture-pixels", f"{path}: {height} x {width} pixels, {limit}")
            yield image
    except UnidentifiedImageError:
        kind = what_is(read_head(path))
        code = "file-empty" if kind == EMPTY else "picture-unreadable"
        kind = f"not of a supported kind ({', '.join(FORMATS)})" if kind == FILE else kind
        kind = "damaged, or of an unsupported kind" if kind == PICTURE else kind
        raise Fault(code, f"{path}: cannot be read as a picture: it is {kind}") from None
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise MachineError(f"{path}: {error.strerror}: a limit of this machine, not of the picture") from None
        raise Fault("picture-unreadable", f"{path}: cannot be read as a picture: {error}") from None


def _unusual(image: Image.Image) -> list[tuple[str, str]]:
    """List the properties of a picture that are fixed in memory or noted: codes of FAULTS with words."""
    found = []
    if image.mode.startswith("I"):
        found.append(("picture-16bit", f"16 bits per channel (mode {image.mode})"))
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
def without_pillow_limit() -> Iterator[None]:
    """Switch off Pillow's limit in favor of max_pixels: it warns from 89 million pixels on, whatever the file.

    Pillow's limit is global: a process that reads in several threads must hold this context around all of them.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """List a folder without hidden entries.  Returns its pictures, by suffix, and all other entries, both by name."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    pictures = [entry for entry in visible if is_picture(entry)]
    return pictures, [entry for entry in visible if not is_picture(entry)]


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its suffix."""
    return path.suffix.lower() in PICTURES


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """List the given files, and the pictures of the given folders by name.  Raises DataError if a path has none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            pictures, _ = list_folder(path)
            if not pictures:
                raise DataError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
            files += pictures
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such picture or folder")
    return files


def picture_record(image_id: int, file: Path, size: tuple[int, int]) -> Record:
    """Return a picture of (height, width) as a record without objects."""
    empty = np.zeros(0)
    return Record(
        image_id, str(file), size, partial(read_image, file), np.zeros((0, 4)), empty.astype(np.int64),
        empty.astype(bool), empty, empty.astype(np.int64), [],
    )  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16-bit values are divided by 257, because Pillow would clip them at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()}, expected 8 or 16 bits per channel")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
