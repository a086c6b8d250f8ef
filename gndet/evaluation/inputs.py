"""Check the pictures that a program hands to a detector: files, Pillow's pictures, arrays and tensors of pixels."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from gndet.data.datasets.images import Reading, picture_record, picture_size, pixels_of
from gndet.data.records import Record
from gndet.errors import DataError
from gndet.evaluation.sources import VIDEOS, refuse_address

FILE = (str, os.PathLike)
PIXELS = (Image.Image, np.ndarray, Tensor)
TAKEN = "the path of a picture, a PIL image, a (height, width, 3) uint8 RGB array or tensor, or a list of these"


def is_one_picture(source: object) -> bool:
    """Return whether a source is one picture: pixels, or a file that is no video."""
    if not isinstance(source, FILE):
        return isinstance(source, PIXELS)
    path = os.path.expanduser(source)
    return os.path.isfile(path) and not path.lower().endswith(VIDEOS)


def records_of(pictures: Sequence[Any], reading: Reading) -> list[Record]:
    """Return the pictures of a list as records without objects; image ids count from 1.

    The pixels of an array are not changed, and copied only if they must be.  Raises DataError that tells the place in
    the list for a picture that cannot be used, with the remedy.
    """
    records = []
    for place, picture in enumerate(pictures):
        try:
            records.append(_record(picture, place + 1, reading))
        except DataError as error:
            raise error if len(pictures) == 1 else DataError(f"picture {place} of the list: {error}") from None
    return records


def _record(picture: Any, image_id: int, reading: Reading) -> Record:
    if isinstance(picture, FILE):
        path = Path(os.path.expanduser(picture))
        if not is_one_picture(path):
            refuse_address(os.fspath(picture))
            what = "a folder or a video" if os.path.exists(path) else "no such picture"
            raise DataError(f"{path}: {what}; a list holds single pictures, a pattern or a folder stands alone")
        return picture_record(image_id, path, picture_size(path, reading), reading)
    if isinstance(picture, Image.Image):
        pixels = _checked(pixels_of(picture, reading))
    elif isinstance(picture, Tensor | np.ndarray):
        pixels = _checked(picture)
    else:
        raise DataError(f"got {type(picture).__qualname__}, expected {TAKEN}")
    return picture_record(image_id, Path(), pixels.shape[:2])._replace(file_name="", load=partial(np.asarray, pixels))


def _checked(array: np.ndarray | Tensor) -> np.ndarray:
    """Return the pixels of an array as torch takes them: a copy only if they are read-only or not contiguous.

    Raises DataError that names the remedy for pixels that are not (h, w, 3) uint8.
    """
    kind, shape = "tensor" if isinstance(array, Tensor) else "array", tuple(array.shape)
    dtype = str(array.dtype).removeprefix("torch.")
    if remedy := _wrong_shape(shape, kind) or _wrong_type(dtype, kind):
        raise DataError(f"got {'an' if kind == 'array' else 'a'} {kind} of shape {shape} and type {dtype}; {remedy}")
    try:
        pixels = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    except (NotImplementedError, TypeError) as error:  # what torch raises for meta and for sparse tensors
        raise DataError(f"got a tensor without an array of pixels: {error}") from None
    return np.require(pixels, requirements=("C", "W"))


def _wrong_shape(shape: tuple[int, ...], kind: str) -> str:
    """Return the remedy for pixels whose shape is not (h, w, 3); "" for these."""
    move = "permute" if kind == "tensor" else "transpose"
    match shape:
        case _ if 0 in shape:
            return "expected a picture of at least one pixel, (height, width, 3)"
        case (_, _, 3):
            return ""
        case (3, _, _):
            return f"expected (height, width, 3): give x.{move}(1, 2, 0)"
        case (_, _, 4):
            return "expected (height, width, 3): give x[..., :3], without the alpha channel"
        case (_, _):
            repeat = "x[..., None].repeat(1, 1, 3)" if kind == "tensor" else "np.stack([x] * 3, axis=-1)"
            return f"expected (height, width, 3): give a gray picture as {repeat}"
        case (_, _, 1):
            repeat = "x.repeat(1, 1, 3)" if kind == "tensor" else "np.repeat(x, 3, axis=-1)"
            return f"expected (height, width, 3): give a gray picture as {repeat}"
        case (1, height, width):
            return f"expected (height, width, 3): give a gray picture as x[0] repeated to ({height}, {width}, 3)"
        case (_, _, _, 3):
            return "expected (height, width, 3): give the pictures of a batch as list(x)"
        case (_, 3, _, _):
            return f"expected (height, width, 3): give the pictures of a batch as list(x.{move}(0, 2, 3, 1))"
    return "expected (height, width, 3): rows, columns, and red, green, blue"


def _wrong_type(dtype: str, kind: str) -> str:
    """Return the remedy for numbers whose type is not uint8; "" for these."""
    to_uint8 = "byte()" if kind == "tensor" else "astype(np.uint8)"
    if dtype == "uint8":
        return ""
    if "float" in dtype:
        return (
            f"expected uint8 values from 0 to 255: give (255 * x).round().{to_uint8} if they lie in 0 to 1, "
            f"x.round().{to_uint8} if in 0 to 255; a normalized picture must be given as it was before"
        )
    if dtype == "uint16":
        return f"expected uint8 values from 0 to 255: give (x // 257).{to_uint8} if they fill 16 bits"
    if dtype == "bool":
        return f"expected uint8 values from 0 to 255: give 255 * x.{to_uint8}"
    return f"expected uint8 values from 0 to 255: give x.{to_uint8} if they lie in it"
