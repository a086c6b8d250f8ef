"""A JPEG file that lacks its last bytes is read if no more than its last rows are missing, and refused otherwise."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gndet.data.datasets.images import DEFAULT, Unusual, picture_size, read_image
from gndet.errors import DataError

KINDS: list[dict[str, Any]] = [
    {}, {"progressive": True}, {"subsampling": 0}, {"quality": 95, "subsampling": 2}, {"restart_marker_rows": 1},
    {"restart_marker_blocks": 3, "progressive": True}, {"optimize": True, "quality": 30},
]  # fmt: skip
SIZES = [(72, 96), (480, 640), (333, 211)]


def jpeg(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG file of a picture with waves and noise; height, width."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.stack([128 + 90 * np.sin(x / 9 + y / 7), 128 + 90 * np.cos(x / 5), y % 256], 2)
    noisy = waves + np.random.default_rng(0).normal(0, 8, waves.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def truth(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [1, 2])
def test_only_the_end_mark_is_missing_and_all_pixels_are_right(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], cut: int
) -> None:
    whole, unusual = jpeg(size, **options), Unusual()
    (tmp_path / "a.jpg").write_bytes(whole[:-cut])
    assert np.array_equal(read_image(tmp_path / "a.jpg", size, DEFAULT, unusual), truth(whole))
    assert unusual.found == [("picture-truncated", "only its end mark is missing")]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [3, 5, 8, 13, 21])
def test_all_rows_but_the_last_that_are_told_are_right(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], cut: int
) -> None:
    whole, unusual = jpeg(size, **options), Unusual()
    (tmp_path / "a.jpg").write_bytes(whole[:-cut])
    found = read_image(tmp_path / "a.jpg", size, DEFAULT, unusual)
    ((code, words),) = unusual.found
    made_up = int(words.split()[2]) if words.startswith("the last") else 1  # a few last bits may change nothing
    assert code == "picture-truncated" and made_up <= max(17, 0.01 * size[0])
    right = size[0] - max(made_up, 17 if made_up == 1 else 0)
    assert np.array_equal(found[:right], truth(whole)[:right])
    assert np.array_equal(read_image(tmp_path / "a.jpg", size), found)  # the same each time
    assert picture_size(tmp_path / "a.jpg") == size


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_are_read_too(tmp_path: Path, mode: str) -> None:
    whole = jpeg((72, 96), mode)
    (tmp_path / "a.jpg").write_bytes(whole[:-4])
    assert np.array_equal(read_image(tmp_path / "a.jpg")[:63], truth(whole)[:63])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kept", [0.1, 0.4, 0.5, 0.7, 0.8])
def test_a_file_that_lacks_more_is_refused(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], kept: float
) -> None:
    whole = jpeg(size, **options)
    (tmp_path / "a.jpg").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as a picture: "):
        read_image(tmp_path / "a.jpg")


def test_a_progressive_file_that_lacks_a_whole_scan_is_refused(tmp_path: Path) -> None:
    whole = jpeg((480, 640), progressive=True)
    last = whole.rindex(b"\xff\xda")  # the last scan refines all blocks
    last = whole.rindex(b"\xff\xc4", 0, last) if b"\xff\xc4" in whole[last - 400 : last] else last
    (tmp_path / "a.jpg").write_bytes(whole[:last])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "a.jpg")


def test_half_of_a_picture_of_one_row_of_blocks_is_refused(tmp_path: Path) -> None:
    whole = jpeg((16, 640))
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "a.jpg")


def test_an_embedded_thumbnail_is_not_taken_for_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x"
    whole, small = jpeg((72, 96)), jpeg((16, 16), progressive=True)
    segment = b"Exif\0\0" + exif.tobytes()[6:] + small  # as cameras do: a JPEG file in the first segment
    whole = whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + whole[2:]
    (tmp_path / "a.jpg").write_bytes(whole[:-2])
    assert np.array_equal(read_image(tmp_path / "a.jpg"), truth(whole))
    (tmp_path / "a.jpg").write_bytes(whole[: -len(whole) // 4])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "a.jpg")
