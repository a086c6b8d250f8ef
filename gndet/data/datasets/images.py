"""Read a picture file of any common kind as (height, width, 3) uint8 RGB, upright; find the pictures in folders."""

import errno
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from gndet.config.data import DataConfig
from gndet.data.datasets.deep_pictures import Depth, all_values, depth_of, judge, to_8_bits
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.image_folder import EMPTY, FILE, PICTURE, read_head, what_is
from gndet.data.datasets.pillow_limit import without_pillow_limit
from gndet.data.datasets.short_jpeg import read_short
from gndet.data.records import Record
from gndet.errors import DataError, MachineError

MAX_PIXELS = 100_000_000  # data.max_pixels: a larger picture is a mistake or a decompression bomb
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # its values for pictures that are not stored upright, with what turns them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNDONE = TURNS | {6: TURNS[8], 8: TURNS[6]}
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


class Reading(NamedTuple):
    """The options of `data` that say how picture files are read."""

    max_pixels: int = MAX_PIXELS
    exif: str = "turn"  # or stored
    pixel_range: tuple[float, float] | None = None

    @classmethod
    def of(cls, data: DataConfig) -> "Reading":
        """Take the options of a config."""
        return cls(data.max_pixels, data.exif, data.pixel_range)


DEFAULT = Reading()


class Unusual:
    """What is unusual about pictures that were read: fixed in memory, or noted."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []  # code of FAULTS, and words
        self.depth = 8  # bits per channel
        self.values: tuple[float, float] | None = None  # least and largest of a picture of more than 8 bits per channel


def read_image(
    path: Path, size: tuple[int, int] | None = None, reading: Reading = DEFAULT, unusual: Unusual | None = None
) -> np.ndarray:
    """Read a picture and turn it as its EXIF orientation says, unless reading.exif is stored.

    size: height, width that the annotation file states, None if unknown.  unusual: takes each unusual property.
    Returns (height, width, 3) uint8 RGB: gray, palette, CMYK and 1-bit converted, more than 8 bits per channel scaled
    to 8 (see reading.pixel_range), alpha dropped, the first frame of an animation.
    Raises Fault for a file that is missing, broken, over reading.max_pixels, of another size, or of 32 bits per channel
    without a pixel_range; raises MachineError if there are too many open files or too little memory.
    """
    with _opened(path, reading.max_pixels) as image:
        pixels, orientation = _pixels(image, path, reading, unusual)
    if size is not None and pixels.shape[:2] != size:
        _refuse_size(path, pixels.shape[:2], size, orientation in SIDEWAYS, reading.exif)
    return pixels


def pixels_of(image: Image.Image, reading: Reading) -> np.ndarray:
    """Return a copy of the pixels of a PIL image, converted as `read_image` converts a file.

    Raises DataError.
    """
    name = getattr(image, "filename", "") or f"a PIL image of mode {image.mode}"
    try:
        return _pixels(image, Path(name), reading, None)[0]
    except DECODER_ERRORS as error:
        raise DataError(f"{name}: cannot be read as a picture: {error}") from None


def _pixels(opened: Image.Image, path: Path, reading: Reading, unusual: Unusual | None) -> tuple[np.ndarray, Any]:
    """Decode a picture.  Returns (height, width, 3) uint8 RGB, turned as reading.exif says, and its orientation."""
    image, depth, orientation = _decoded(opened, path, unusual)
    rgb = _to_rgb(image, depth, path, reading.pixel_range, unusual)
    turned = image.format == "TIFF"  # by Pillow, while it loads
    if orientation in TURNS and turned != (reading.exif == "turn"):
        rgb = rgb.transpose((UNDONE if turned else TURNS)[orientation])
    if unusual is not None:
        turn = reading.exif == "turn" and orientation in TURNS
        unusual.found += [_turn(orientation, rgb.size)] if turn else []
        unusual.found += _animation(image)
    return np.array(rgb), orientation


def _decoded(image: Image.Image, path: Path, unusual: Unusual | None) -> tuple[Image.Image, Depth, Any]:
    """Decode an opened picture.  Returns it, or what can be read of a JPEG file, with its depth and orientation."""
    depth = depth_of(image)
    if image.format == "TIFF":
        orientation, file = _orientation(image), cast(Any, image)  # Pillow forgets it when it turns the picture
        if orientation in SIDEWAYS:
            file.filename = ""  # else Pillow maps an uncompressed file into memory in its turned size, and garbles it
        image.load()
        return image, depth, orientation
    try:
        image.load()
    except OSError as error:
        is_short = error.errno not in MACHINE_ERRORS and image.format == "JPEG" and path.is_file()
        found = read_short(path) if is_short else None
        if found is None:
            raise
        image, made_up = found
        if unusual is not None:
            rows = f"the last {made_up} of {image.height} rows are made up"
            unusual.found.append(("picture-truncated", rows if made_up else "only its end mark is missing"))
    return image, depth, _orientation(image)


def _refuse_size(path: Path, found: tuple[int, ...], size: tuple[int, int], sideways: bool, exif: str) -> NoReturn:
    """Raise Fault for a picture of another size; say if the other setting of data.exif would give this size."""
    message = f"{path}: height, width are {found}, the annotation file says {size}"
    if not sideways or found[::-1] != size:
        raise Fault("picture-size", message)
    if exif == "turn":
        reason = "it matches only before the EXIF rotation: the unrotated picture was annotated"
        raise Fault("picture-unrotated", f"{message}; {reason} (data.exif=stored reads it so)")
    raise Fault(
        "picture-size", f"{message}; it matches only after the EXIF rotation, which data.exif=stored leaves out"
    )


def picture_size(path: Path, reading: Reading = DEFAULT, unusual: Unusual | None = None) -> tuple[int, int]:
    """Return the height and width of a picture as `read_image` would return it, without decoding it.

    unusual: takes what the header tells of animations and of the depth.
    Raises as `read_image` does for what the header tells; decoding may still find the picture broken.
    """
    with _opened(path, reading.max_pixels) as image:
        width, height = image.size
        depth = depth_of(image)
        if unusual is not None:
            unusual.depth = depth.bits
            unusual.found += _animation(image)
        if image.format == "PNG" and not _has_late_metadata(path):
            sideways = Image.Image.getexif(image).get(ORIENTATION, 1) in SIDEWAYS  # PNG's getexif decodes the picture
        else:
            sideways = _orientation(image) in SIDEWAYS
        turned = image.format == "TIFF"  # Pillow already gives the rotated size
    return (width, height) if sideways and turned != (reading.exif == "turn") else (height, width)


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


def _turn(orientation: Any, size: tuple[int, int]) -> tuple[str, str]:
    either = orientation not in SIDEWAYS or size[0] == size[1]
    return "picture-turned", f"EXIF orientation {orientation}{', the size fits either way' if either else ''}"


def _animation(image: Image.Image) -> list[tuple[str, str]]:
    kind = "pages" if image.format == "TIFF" else "frames"
    several = getattr(image, "is_animated", False)
    return [("picture-animated", f"{getattr(image, 'n_frames', 1)} {kind}")] if several else []


def _orientation(image: Image.Image) -> Any:
    """Return EXIF's orientation: 1 is upright; a damaged value may be anything."""
    return image.getexif().get(ORIENTATION, 1)


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its suffix."""
    return path.suffix.lower() in PICTURES


def picture_record(image_id: int, file: Path, size: tuple[int, int], reading: Reading = DEFAULT) -> Record:
    """Return a picture of (height, width) as a record without objects."""
    empty = np.zeros(0)
    return Record(
        image_id, str(file), size, partial(read_image, file, size, reading), np.zeros((0, 4)), empty.astype(np.int64),
        empty.astype(bool), empty, empty.astype(np.int64), [],
    )  # fmt: skip


def _to_rgb(
    image: Image.Image, depth: Depth, path: Path, pixel_range: tuple[float, float] | None, unusual: Unusual | None
) -> Image.Image:
    """Convert a decoded picture of any mode to RGB."""
    if depth.bits > 8:
        image = _less_deep(image, depth, path, pixel_range, unusual)
    elif image.mode != "RGB" and unusual is not None:
        unusual.found.append(("picture-mode", f"mode {image.mode}"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _less_deep(
    image: Image.Image, depth: Depth, path: Path, pixel_range: tuple[float, float] | None, unusual: Unusual | None
) -> Image.Image:
    """Scale a picture of more than 8 bits per channel to 8; without a pixel_range, 0 to 65535 become 0 to 255.

    Raises Fault for values that need a pixel_range and have none, and ValueError for values without a brightness.
    """
    if depth.raw_mode and pixel_range is None and unusual is None:
        return image  # the upper 8 bits
    values = all_values(image, depth, path)
    if unusual is not None:
        unusual.values = values.min().item(), values.max().item()
        code, words = judge(values, pixel_range)
        kind = "picture-16bit" if depth.bits == 16 else "picture-mode"
        unusual.found += [(kind, f"{depth.words}, {words}"), *([(code, words)] if code else [])]
    if pixel_range is not None:
        return Image.fromarray(to_8_bits(values, *pixel_range))
    if depth.bits > 16 or (values.dtype != np.uint16 and (values.min() < 0 or values.max() > 65535)):
        words = f"{depth.words}, values {values.min():g} to {values.max():g}"
        remedy = "data.pixel_range=[LOW,HIGH] says which of them are black and white"
        raise Fault("picture-range", f"{path}: {words}, expected 8 or 16 bits per channel; {remedy}")
    return image if depth.raw_mode else Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
