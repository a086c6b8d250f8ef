"""Read pictures of more than 8 bits per channel: all their values, and which of them become black and white.

Values are (h, w) gray or (h, w, 3) RGB: uint16, or int32, float32 for pictures of 32 bits per channel.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

TOPS = (1, 255, 1023, 4095, 16383, 65535)  # the largest values of common cameras and files: 8, 10, 12, 14, 16 bits
USED = 0.25  # of the range: a picture that uses less is dark, or was made with fewer bits
CLIPPED = 0.01  # share of values outside the range that is worth telling
# Pillow keeps the upper byte of 16-bit colors; these raw modes give the lower one ("N": as in this machine's memory)
LOWER = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX") for order, other in ("BL", "LB")}
LOWER |= {f"{mode};16N": f"{mode};16B" for mode in ("RGB", "RGBA", "RGBX")}
GRAY_ALPHA = "LA;16B"  # its 4 bytes per pixel can be read as an RGBA pixel


class Depth(NamedTuple):
    """How a picture stores its values; known from its header."""

    bits: int  # per channel
    raw_mode: str  # Pillow's name of the layout; "" if Pillow keeps all bits itself

    @property
    def words(self) -> str:
        """Say it in a message."""
        return f"{self.bits} bits per channel"


def depth_of(image: Image.Image) -> Depth:
    """Return the depth of an opened picture that is not decoded yet."""
    if image.mode == "F" or image.mode.startswith("I"):
        stored: Any = getattr(image, "tag_v2", {}).get(258)  # TIFF's BitsPerSample
        unknown = image.mode == "F" or (image.mode == "I" and image.format is None)  # of a picture made in memory
        return Depth(int(stored[0]) if stored else 32 if unknown else 16, "")
    tile: Any = getattr(image, "tile", None)
    layout = tile[0].args if tile else ""
    layout = layout[0] if isinstance(layout, tuple) and layout else layout
    return Depth(16, layout) if layout in LOWER or layout == GRAY_ALPHA else Depth(8, "")


def all_values(image: Image.Image, depth: Depth, path: Path) -> np.ndarray:
    """Return all values of a decoded picture whose depth is over 8 bits; decode a color picture again.

    Raises ValueError for values that are not finite, and what Pillow raises.
    """
    if not depth.raw_mode:
        values = np.asarray(image)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise ValueError(f"{bad} of {values.size} values are NaN or infinite, which is no brightness")
        return values
    with Image.open(path, formats=(str(image.format),)) as again:
        raw_mode = LOWER.get(depth.raw_mode, "RGBA")
        tiles: Any = again
        tiles.tile = [tile._replace(args=_with_raw_mode(tile.args, raw_mode)) for tile in tiles.tile]
        again.load()
        lower = np.asarray(again)
    if depth.raw_mode == GRAY_ALPHA:
        return lower[..., 0].astype(np.uint16) << 8 | lower[..., 1]
    return np.asarray(image)[..., :3].astype(np.uint16) << 8 | lower[..., :3]


def _with_raw_mode(args: Any, raw_mode: str) -> Any:
    return raw_mode if isinstance(args, str) else (raw_mode, *args[1:])


def to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low to 0 and high to 255 linearly, rounded, with values outside clipped.  Returns uint8 of the same shape."""
    if values.dtype == np.uint16:
        return to_8_bits(np.arange(1 << 16), low, high)[values]
    return (np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def judge(values: np.ndarray, pixel_range: tuple[float, float] | None) -> tuple[str, str]:
    """Return what is unusual about the values: a code of FAULTS, or "", and the values in words.

    pixel_range: data.pixel_range; None stands for 0 to 65535.
    """
    least, most = values.min().item(), values.max().item()
    low, high = pixel_range or (0, 65535)
    words = f"values {least:g} to {most:g} of {high:g}" if low == 0 else f"values {least:g} to {most:g}"
    outside = np.count_nonzero((values < low) | (values > high)) / values.size
    if outside > CLIPPED:
        return (
            "picture-clipped",
            f"values {least:g} to {most:g}, {100 * outside:.0f} % of them outside {low:g} to {high:g}",
        )
    if least < most and most - low < USED * (high - low):
        return "picture-dim", words
    return "", words


def suited_range(least: float, most: float) -> tuple[float, float]:
    """Return the data.pixel_range that suits pictures with values from least to most."""
    return min(0, math.floor(least)), next((top for top in TOPS if most <= top), math.ceil(most))
