"""data.exif says whether pictures are turned as their EXIF orientation says, wherever pictures are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gndet.config.loading import with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.images import DEFAULT, Reading, Unusual, picture_size, read_image
from gndet.errors import DataError

STORED = Reading(exif="stored")


@pytest.fixture
def colors() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_are_read_as_they_are_in_the_file(
    tmp_path: Path, colors: np.ndarray, orientation: int, name: str
) -> None:
    path = save(tmp_path / name, colors, orientation)
    assert np.array_equal(read_image(path, (20, 30), STORED), colors)
    assert picture_size(path, STORED) == (20, 30)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_without_decoding_is_the_size_that_is_read(
    tmp_path: Path, colors: np.ndarray, orientation: int, name: str
) -> None:
    path = save(tmp_path / name, colors, orientation)
    for reading in (DEFAULT, STORED):
        assert picture_size(path, reading) == read_image(path, None, reading).shape[:2]


@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_tiff_of_any_mode_is_turned(tmp_path: Path, colors: np.ndarray, mode: str, compression: str | None) -> None:
    exif, picture = Image.Exif(), Image.fromarray(colors).convert(mode)
    exif[0x0112] = 6
    picture.save(tmp_path / "a.tif", exif=exif, compression=compression)
    assert np.array_equal(read_image(tmp_path / "a.tif", (30, 20)), np.rot90(np.asarray(picture.convert("RGB")), -1))


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_16_bits_are_turned_like_8(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    path = save(tmp_path / name, values, 6)
    assert np.array_equal(read_image(path, (20, 30), STORED), np.rot90(read_image(path, (30, 20))))


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_a_picture_annotated_as_stored_is_refused_with_the_option_that_reads_it(
    tmp_path: Path, colors: np.ndarray, name: str
) -> None:
    path = save(tmp_path / name, colors, 6)
    with pytest.raises(DataError, match=r"the unrotated picture was annotated \(data\.exif=stored reads it so\)"):
        read_image(path, (20, 30))
    cfg = with_overrides(Config(), ["data.exif=stored"], "a test")
    assert read_image(path, (20, 30), Reading.of(cfg.data)).shape == (20, 30, 3)
    with pytest.raises(DataError, match=r"only after the EXIF rotation, which data\.exif=stored leaves out"):
        read_image(path, (30, 20), STORED)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_a_turn_that_the_size_cannot_tell_is_told(tmp_path: Path, colors: np.ndarray, name: str) -> None:
    told = []
    for orientation, pixels in ((3, colors), (6, colors), (6, colors[:, :20]), (1, colors)):
        unusual = Unusual()
        read_image(save(tmp_path / name, pixels, orientation), None, DEFAULT, unusual)
        told.append(unusual.found)
    either = "EXIF orientation {}, the size fits either way"
    assert told[0] == [("picture-turned", either.format(3))] and told[1] == [("picture-turned", "EXIF orientation 6")]
    assert told[2] == [("picture-turned", either.format(6))] and told[3] == []
    unusual = Unusual()
    read_image(save(tmp_path / name, colors, 3), None, STORED, unusual)
    assert unusual.found == []
