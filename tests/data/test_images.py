"""Every kind of picture file becomes upright 8-bit RGB or raises a DataError that names the file."""

import contextlib
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gndet.data.datasets.images import Reading, read_image
from gndet.errors import DataError, MachineError


@pytest.fixture
def colors() -> np.ndarray:
    """A 20 x 30 picture, left half red, right half blue, the upper left corner white."""
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :15], pixels[:, 15:], pixels[:5, :5] = (255, 0, 0), (0, 0, 255), 255
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P"])
def test_color_modes_keep_their_colors(tmp_path: Path, colors: np.ndarray, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(colors).convert(mode).save(path)
    assert np.array_equal(read_image(path, (20, 30)), colors)


def test_alpha_is_dropped_not_blended(tmp_path: Path, colors: np.ndarray) -> None:
    transparent = np.concatenate((colors, np.zeros_like(colors[..., :1])), axis=2)
    Image.fromarray(transparent).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), colors)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_modes_repeat_their_value(tmp_path: Path, mode: str) -> None:
    gray = np.repeat(np.array([[0, 255]], dtype=np.uint8), 8, axis=0)
    Image.fromarray(gray).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name)[..., 0], np.arange(256).reshape(16, 16))


def test_float_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*expected 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, colors: np.ndarray, orientation: int, name: str) -> None:
    undo = {  # what turns the stored picture upright, by EXIF 2.3, tag 0x0112
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(colors).save(tmp_path / name, exif=exif)
    assert np.array_equal(read_image(tmp_path / name), undo[orientation](colors))


def test_an_orientation_after_the_pixels_of_a_png_counts(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(colors).save(tmp_path / "a.png", exif=exif)
    whole = (tmp_path / "a.png").read_bytes()
    start = whole.index(b"eXIf") - 4  # a chunk is its length in 4 bytes, its name, that many bytes, and a checksum
    stop = start + 12 + int.from_bytes(whole[start : start + 4])
    assert stop < whole.index(b"IDAT")
    end = whole.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(whole[:start] + whole[stop:end] + whole[start:stop] + whole[end:])
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(colors, 2))


def test_first_frame_of_an_animation_is_taken(tmp_path: Path, colors: np.ndarray) -> None:
    frames = [Image.fromarray(colors), Image.fromarray(255 - colors)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(tmp_path / "a.gif"), colors)


def test_another_size_names_file_and_both_sizes(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*\(20, 30\).*\(30, 20\)$"):
        read_image(tmp_path / "a.png", (30, 20))


def test_a_size_that_fits_before_exif_rotation_only_says_so(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colors).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", (30, 20)).shape == (30, 20, 3)
    with pytest.raises(DataError, match="only before the EXIF rotation"):
        read_image(tmp_path / "a.jpg", (20, 30))


@pytest.mark.parametrize("fault", ["missing", "empty", "html", "truncated", "garbled", "eps"])
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_broken_files_are_named(tmp_path: Path, fault: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "truncated": whole[: len(whole) // 3],
        "garbled": whole[:8] + bytes(len(whole) - 8),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    }
    path.unlink()
    if fault != "missing":
        path.write_bytes(content[fault])
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        read_image(path)


@pytest.mark.parametrize("kind", ["eps", "ico", "pcx", "tga"])
def test_unsupported_kinds_are_refused(tmp_path: Path, colors: np.ndarray, kind: str) -> None:
    Image.fromarray(colors).save(tmp_path / f"a.{kind}")
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        read_image(tmp_path / f"a.{kind}")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_a_good_picture(tmp_path: Path, colors: np.ndarray) -> None:
    for damage in (b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        Image.fromarray(colors).save(tmp_path / "a.jpg", exif=damage)
        assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


def test_a_decompression_bomb_is_refused_undecoded(tmp_path: Path) -> None:
    for side in (10_001, 20_000):  # Pillow itself would warn about the first, and refuse the second
        Image.new("1", (side, 10_000)).save(tmp_path / "bomb.png")
        with warnings.catch_warnings(action="error"), pytest.raises(DataError, match=r"bomb\.png.*100000000"):
            read_image(tmp_path / "bomb.png")


def test_the_limit_of_pixels_can_be_set_either_way(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (20, 30), Reading(600)).shape == (20, 30, 3)
    with pytest.raises(DataError, match=r"20 x 30 pixels, over the limit of 599 \(data\.max_pixels\)"):
        read_image(tmp_path / "a.png", (20, 30), Reading(599))
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 100  # Pillow's own limit: ignored, and left as it is
    try:
        assert read_image(tmp_path / "a.png", (20, 30), Reading(600)).shape == (20, 30, 3)
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jpg", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("a.png", b"PK\x03\x04" + bytes(30), "an archive, which is not opened"),
        ("a.png", bytes(257) + b"ustar\x00" + bytes(300), "an archive, which is not opened"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.jpg", b"", "an empty file"),
        ("a.jpg", b"\0\0\0\x1cftypavif" + bytes(30), r"not of a supported kind \(BMP, GIF, JPEG"),
        ("a.jpg", b"some text", r"not of a supported kind \(BMP, GIF, JPEG"),
        ("a.jpg", b"\xff\xd8\xff" + bytes(30), "damaged, or of an unsupported kind"),
    ],
)
def test_a_file_that_is_no_picture_is_named_by_its_kind(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot be read as a picture: it is {words}"):
        read_image(tmp_path / name)


def test_the_picture_may_be_written_to(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").flags.writeable


def test_too_many_open_files_is_no_fault_of_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(tmp_path / "a.png", os.O_RDONLY))
        with pytest.raises(MachineError, match=r"a\.png: Too many open files: a limit of this machine"):
            read_image(tmp_path / "a.png", (8, 8))
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
