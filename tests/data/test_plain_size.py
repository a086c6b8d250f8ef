"""The size read from a plain header is the one that Pillow reads; where a header is not plain, Pillow is asked."""

import io
from pathlib import Path
from typing import Any

import pytest
from hostile import BAD_PICTURES, Hostile, make_bad_pictures
from PIL import Image, PngImagePlugin

from gndet.data.datasets import images
from gndet.data.datasets.images import picture_size, read_image
from gndet.data.datasets.pillow_limit import without_pillow_limit
from gndet.data.datasets.plain_size import plain_size
from gndet.errors import DataError


def test_real_pictures_have_the_size_that_pillow_reads(data_root: Path) -> None:
    paths = [path for name in ("bccd/val", "coco-tiny/val2017", "nuclei/val") for path in (data_root / name).iterdir()]
    sizes = {path: plain_size(path) for path in paths}
    for path, size in sizes.items():
        with Image.open(path) as image:
            assert size in (None, image.size[::-1]), path
    assert sum(size is not None for size in sizes.values()) > 0.9 * len(sizes)


EXIF = Image.Exif()
EXIF[0x0112] = 6
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("Raw profile type exif", "x")
SAVED: dict[str, tuple[str, str, dict[str, Any], bool]] = {  # mode, format, options, whether the header is plain
    "JPEG": ("RGB", "JPEG", {}, True),
    "gray JPEG": ("L", "JPEG", {}, True),
    "CMYK JPEG": ("CMYK", "JPEG", {}, True),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}, True),
    "JPEG with a comment": ("RGB", "JPEG", {"comment": "x"}, True),
    "turned JPEG": ("RGB", "JPEG", {"exif": EXIF}, False),
    "JPEG with a long profile": ("RGB", "JPEG", {"icc_profile": b"x" * 9000}, False),
    "PNG": ("RGB", "PNG", {}, True),
    "palette PNG": ("P", "PNG", {}, True),
    "turned PNG": ("RGB", "PNG", {"exif": EXIF}, False),
    "PNG with text": ("RGB", "PNG", {"pnginfo": TEXT}, False),
    "TIFF": ("RGB", "TIFF", {}, False),
    "WebP": ("RGB", "WEBP", {}, False),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_header_that_may_turn_the_picture_is_not_plain(tmp_path: Path, kind: str) -> None:
    mode, name, options, is_plain = SAVED[kind]
    path = tmp_path / "picture"
    Image.effect_noise((123, 77), 90).convert(mode).save(path, name, **options)
    assert plain_size(path) == ((77, 123) if is_plain else None)
    assert picture_size(path) == read_image(path).shape[:2] == ((123, 77) if "turned" in kind else (77, 123))


def test_an_orientation_after_the_pixels_of_a_png_is_seen(tmp_path: Path) -> None:
    for side in (9, 300):  # the file ends within the first bytes that are read, and far beyond
        stream = io.BytesIO()
        Image.effect_noise((side, side + 1), 90).save(stream, "PNG", exif=EXIF)
        content = stream.getvalue()
        start = content.index(b"eXIf") - 4
        chunk = content[start : start + 12 + int.from_bytes(content[start : start + 4])]
        late = content.replace(chunk, b"")
        (tmp_path / "late.png").write_bytes(late[:-12] + chunk + late[-12:])
        (tmp_path / "none.png").write_bytes(late)
        assert plain_size(tmp_path / "late.png") is None and picture_size(tmp_path / "late.png") == (side, side + 1)
        assert plain_size(tmp_path / "none.png") == picture_size(tmp_path / "none.png") == (side + 1, side)


def test_a_picture_over_the_limit_is_refused_whatever_its_header(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="over the limit"):
        picture_size(tmp_path / "a.png", images.Reading(max_pixels=1199))


def test_bad_pictures_have_the_size_that_pillow_reads_or_none(tmp_path: Path) -> None:
    data = Hostile(tmp_path)
    make_bad_pictures(data)
    assert BAD_PICTURES
    for path in data.pictures.iterdir():
        size = plain_size(path) if path.is_file() else None
        if size is not None:
            with without_pillow_limit(), Image.open(path) as image:
                assert size == image.size[::-1], path


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_a_file_cut_anywhere_in_its_header_is_left_to_pillow(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    Image.new("RGB", (40, 30)).save(path, name)
    content = path.read_bytes()
    for end in range(0, len(content), 3):
        path.write_bytes(content[:end])
        assert plain_size(path) in (None, (30, 40))
