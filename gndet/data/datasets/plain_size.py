"""Read the size of a plain JPEG or PNG file from its header, ten times as fast as a library that reads all formats.

An export without sizes, as YOLO's, needs the header of every picture.
"""

import struct
from pathlib import Path
from typing import BinaryIO

HEAD = 4096  # bytes in which the header of a plain picture ends
TAIL = 1 << 16  # bytes in which the last pixels of a plain PNG file begin
PNG = b"\x89PNG\r\n\x1a\n"
METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # PNG's chunks that may hold an orientation
FRAMES, SCAN, EXIF = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1  # JPEG's markers: baseline to progressive; data; EXIF or XMP
TABLES = {0xC4, 0xDB, 0xDD, 0xFE} | set(range(0xE0, 0xF0)) - {EXIF}  # its markers that do not matter here


def plain_size(path: Path) -> tuple[int, int] | None:
    """Return the height and width of a picture; None if anything in it asks for a closer look, or it cannot be read.

    Any metadata that could turn the picture, an unusual coding and a long header do.
    """
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(HEAD)
            if head.startswith(b"\xff\xd8"):
                return _jpeg_size(head)
            return _png_size(head, file) if head.startswith(PNG) else None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Walk the markers up to the first scan (ITU-T T.81, annex B)."""
    place, size = 2, None
    while place + 10 <= len(head):
        mark, marker, length = struct.unpack_from(">BBH", head, place)
        if mark != 0xFF or length < 2:
            return None
        if marker == SCAN:
            return size
        if marker in FRAMES and size is None:
            bits, height, width, components = struct.unpack_from(">BHHB", head, place + 4)
            if bits != 8 or components not in (1, 3, 4) or not height or not width:
                return None
            size = (height, width)
        elif marker not in TABLES:
            return None
        place += 2 + length
    return None


def _png_size(head: bytes, file: BinaryIO) -> tuple[int, int] | None:
    """Read the first chunk, and look for metadata before and after the pixels."""
    start = head.find(b"IDAT")
    if start < 0 or head[12:16] != b"IHDR" or any(kind in head[:start] for kind in METADATA):
        return None
    width, height = struct.unpack_from(">II", head, 16)
    if len(head) == HEAD:
        file.seek(-min(TAIL, file.seek(0, 2)), 2)
        head = file.read(TAIL)
    last = head.rfind(b"IDAT")
    is_plain = last >= 0 and not any(kind in head[last:] for kind in METADATA)
    return (height, width) if is_plain and height and width else None
