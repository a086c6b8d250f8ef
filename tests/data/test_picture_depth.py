"""Pictures of more than 8 bits per channel: all values are read, told, and mapped as data.pixel_range says."""

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.schema import Config
from gndet.data.datasets.images import Reading, Unusual, picture_record, picture_size, read_image
from gndet.data.datasets.reading import inspect_dataset, read_dataset
from gndet.errors import ConfigError, DataError
from gndet.toolbox.check.check import check

SHAPE = (20, 30)
RANGE = (0.0, 4095.0)
NOISE = np.random.default_rng(0)


def write_png(path: Path, values: np.ndarray) -> None:
    """Write (h, w) or (h, w, 2, 3 or 4) uint16 as a 16-bit PNG; every row but the first is filtered by Sub."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    raw = values.astype(">u2").reshape(height, -1).view(np.uint8)
    sub = raw.copy()
    sub[:, 2 * channels :] -= raw[:, : -2 * channels]
    rows = b"".join(b"\x01" + sub[y].tobytes() if y else b"\x00" + raw[0].tobytes() for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path: Path, values: np.ndarray, order: str, *, deflate: bool) -> None:
    """Write (h, w, 3) uint16 as a TIFF in byte order "<" or ">"."""
    height, width = values.shape[:2]
    strip = values.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if deflate else strip
    tags = {256: width, 257: height, 258: 0, 259: 8 if deflate else 1, 262: 2, 273: 8, 277: 3, 278: height}
    tags[279] = len(strip)
    place = 8 + len(strip) + len(strip) % 2
    bits = place + 2 + 12 * len(tags) + 4
    entries = [
        struct.pack(f"{order}HHII", tag, 3, 3, bits) if tag == 258 else struct.pack(f"{order}HHII", tag, 4, 1, value)
        for tag, value in tags.items()
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, place)
    ifd = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    path.write_bytes(head + strip + bytes(len(strip) % 2) + ifd + struct.pack(f"{order}HHH", 16, 16, 16))


def mapped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map by the definition, one value at a time; (h, w) or (h, w, 3) to (h, w, 3)."""
    flat = [min(max(int((float(v) - low) / (high - low) * 255 + 0.5), 0), 255) for v in values.reshape(-1)]
    gray = np.array(flat, dtype=np.uint8).reshape(values.shape)
    return gray if gray.ndim == 3 else np.repeat(gray[..., None], 3, axis=2)


def values_of(top: int, *channels: int) -> np.ndarray:
    return NOISE.integers(0, top + 1, (*SHAPE, *channels)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tif", "big.tif", "int32.tif", "float.tif", "pgm"])
def test_a_range_maps_gray_pictures_linearly(tmp_path: Path, kind: str) -> None:
    values, path = values_of(4095), tmp_path / f"a.{kind}"
    if kind == "png":
        write_png(path, values)
    elif kind == "pgm":
        path.write_bytes(b"P5 30 20 65535\n" + values.astype(">u2").tobytes())
    elif kind == "big.tif":
        Image.frombytes("I;16B", SHAPE[::-1], values.astype(">u2").tobytes()).save(path)
    else:
        dtype = {"tif": np.uint16, "int32.tif": np.int32, "float.tif": np.float32}[kind]
        Image.fromarray(values.astype(dtype)).save(path)
    assert np.array_equal(read_image(path, SHAPE, Reading(pixel_range=RANGE)), mapped(values, *RANGE))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_range_reads_all_16_bits_of_the_colors_of_a_png(tmp_path: Path, channels: int) -> None:
    values = values_of(4095, channels)
    write_png(tmp_path / "a.png", values)
    colors = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=2)
    assert np.array_equal(read_image(tmp_path / "a.png", SHAPE, Reading(pixel_range=RANGE)), mapped(colors, *RANGE))
    before = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "a.png"), before)  # the upper 8 bits, as ever


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_a_range_reads_all_16_bits_of_the_colors_of_a_tiff(tmp_path: Path, order: str, deflate: bool) -> None:
    values = values_of(1023, 3)
    write_tiff(tmp_path / "a.tif", values, order, deflate=deflate)
    found = read_image(tmp_path / "a.tif", SHAPE, Reading(pixel_range=(0, 1023)))
    assert np.array_equal(found, mapped(values, 0, 1023))
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.asarray(Image.open(tmp_path / "a.tif")))


def test_the_range_of_16_bits_equals_the_default_for_gray(tmp_path: Path) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(
        read_image(tmp_path / "a.png"), read_image(tmp_path / "a.png", None, Reading(pixel_range=(0, 65535)))
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK"])
def test_a_range_leaves_pictures_of_8_bits_as_they_are(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(NOISE.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)).convert(mode).save(path)
    assert np.array_equal(read_image(path, SHAPE, Reading(pixel_range=RANGE)), read_image(path, SHAPE))


def test_a_range_may_start_below_zero_and_clips(tmp_path: Path) -> None:
    values = np.array([[-1200, -1000, 0, 1000, 3000]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "ct.tif")
    found = read_image(tmp_path / "ct.tif", None, Reading(pixel_range=(-1000, 1000)))
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full(SHAPE, 156, np.int32), "32 bits per channel, values 156 to 156"),
        (np.linspace(0, 1, 600, dtype=np.float32).reshape(SHAPE), "32 bits per channel, values 0 to 1"),
        (np.full(SHAPE, 70000, np.int32), "32 bits per channel, values 70000 to 70000"),
    ],
)
def test_32_bits_are_refused_without_a_range_by_their_name_and_values(
    tmp_path: Path, values: np.ndarray, words: str
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: {words}, expected 8 or 16 .*data\.pixel_range=\[LOW,HIGH\]"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_without_a_brightness_are_refused_by_name_with_any_range(tmp_path: Path, bad: float) -> None:
    values = np.ones(SHAPE, dtype=np.float32)
    values[3, 4:6] = bad
    Image.fromarray(values).save(tmp_path / "a.tif")
    for reading in (Reading(), Reading(pixel_range=(0, 1))):
        with pytest.raises(DataError, match=r"a\.tif: cannot be read .* 2 of 600 values are NaN or infinite"):
            read_image(tmp_path / "a.tif", None, reading)


def data_set(folder: Path, pictures: dict[str, np.ndarray]) -> Path:
    """Write gray pictures and an annotation file for them, with one object each."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, values) in enumerate(pictures.items(), start=1):
        if values.ndim == 3:
            write_png(folder / "images" / name, values)
        else:
            Image.fromarray(values).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": values.shape[1], "height": values.shape[0]})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [2, 2, 9, 9], "iscrowd": 0})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "ann.json").write_text(json.dumps(tree))
    return folder / "ann.json"


def report_of(tmp_path: Path, path: Path, *overrides: str) -> tuple[bool, dict[str, Any], str]:
    lines: list[str] = []
    passed = check(str(path), overrides, lines.append, images=True, out=tmp_path / "report.json")
    (part,) = json.loads((tmp_path / "report.json").read_text())["sets"]
    return passed, {found["code"]: found for found in part["findings"]}, "\n".join(lines)


def test_check_tells_the_values_and_the_range_that_suits_the_set(tmp_path: Path) -> None:
    pictures = {"8.png": values_of(230), "12.png": values_of(4000), "12 color.png": values_of(3000, 3)}
    path = data_set(tmp_path / "data", pictures)
    passed, found, text = report_of(tmp_path, path)
    most = max(values.max() for values in pictures.values())
    assert passed and found["picture-16bit"]["count"] == 3 and found["picture-dim"]["count"] == 3
    assert f"8.png: values 0 to {pictures['8.png'].max()} of 65535" in text
    assert f"their values go from 0 to {most}: data.pixel_range=[0,4095] maps them to 0 to 255" in text


def test_check_tells_of_values_that_the_range_clips(tmp_path: Path) -> None:
    path = data_set(tmp_path / "data", {"a.png": values_of(65535), "b.png": values_of(4095)})
    passed, found, text = report_of(tmp_path, path, "data.pixel_range=[0,4095]")
    assert passed and found["picture-clipped"]["count"] == 1 and "picture-dim" not in found
    assert re.search(r", 9\d % of them outside 0 to 4095", text) and "data.pixel_range=[0,65535] maps them" in text


def test_a_set_that_uses_its_16_bits_is_not_noted(tmp_path: Path) -> None:
    passed, found, _ = report_of(tmp_path, data_set(tmp_path / "data", {"a.png": values_of(60000)}))
    assert passed and set(found) == {"picture-16bit", "area-missing", "mask-missing"}


def test_32_bits_are_refused_with_the_range_that_goes_on(tmp_path: Path) -> None:
    pictures = {"a.png": values_of(2496), "b.tif": values_of(200).astype(np.int32)}
    path = data_set(tmp_path / "data", pictures)
    passed, found, _ = report_of(tmp_path, path)
    assert not passed and found["picture-range"]["count"] == 1 and found["picture-16bit"]["count"] == 1
    option = "data.pixel_range=[0,4095]"
    assert option in found["picture-range"]["remedy"]
    passed, found, text = report_of(tmp_path, path, option)
    assert passed and found["picture-mode"]["count"] == 1 and "32 bits per channel" in text


def test_the_range_reaches_the_records_of_training_and_prediction(tmp_path: Path) -> None:
    values = values_of(4095)
    path = data_set(tmp_path / "data", {"a.png": values})
    cfg = with_overrides(Config(), ["data.pixel_range=[0,4095]", f"data.cache={tmp_path / 'cache'}"], "a test")
    part = DatasetConfig(annotations=str(path), images=str(tmp_path / "data" / "images"))
    for _ in range(2):  # read, then from the cache
        (record,) = read_dataset(part, cfg.data).records
        assert np.array_equal(record.load(), mapped(values, *RANGE))
    (plain,) = read_dataset(part, DataConfig(cache=str(tmp_path / "cache"), train=part)).records
    assert np.array_equal(plain.load(), mapped(values, 0, 65535))  # another entry of the cache
    saved = config_from_dict(json.loads(cfg.model_dump_json()), "a checkpoint")
    file = tmp_path / "data" / "images" / "a.png"
    record = picture_record(1, file, SHAPE, Reading.of(saved.data))
    assert np.array_equal(record.load(), mapped(values, *RANGE))


def test_a_header_tells_the_depth(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", values_of(4095, 3))
    unusual = Unusual()
    assert picture_size(tmp_path / "a.png", Reading(), unusual) == SHAPE
    assert unusual.depth == 16


@pytest.mark.parametrize("text", ["[4095,0]", "[5,5]", "[0]", "[0,.inf]"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.pixel_range"):
        with_overrides(Config(), [f"data.pixel_range={text}"], "a test")


def test_training_and_check_tell_the_range_of_the_first_pictures_without_decoding_all(tmp_path: Path) -> None:
    pictures = {f"{i}.png": values_of(4000) for i in range(2)} | {"8.png": values_of(200).astype(np.uint8)}
    path = data_set(tmp_path / "data", pictures)
    part = DatasetConfig(annotations=str(path), images=str(tmp_path / "data" / "images"))
    dataset = inspect_dataset(part, DataConfig(cache="", train=part))
    most = max(values.max() for values in pictures.values())
    words = "2 of the first 2 pictures of more than 8 bits per channel hardly fit their range"
    advice = f"their values go from 0 to {most}: data.pixel_range=[0,4095] maps them to 0 to 255"
    assert dataset.notes == (f"{words}; {advice}",)
    assert inspect_dataset(part, DataConfig(cache="", train=part, pixel_range=RANGE)).notes == ()
    _, _, text = report_of(tmp_path, path)
    assert "hardly fit" not in text and text.count(advice) == 1  # said by the finding


def test_training_on_32_bits_is_refused_before_it_starts(tmp_path: Path) -> None:
    path = data_set(tmp_path / "data", {"a.tif": values_of(200).astype(np.float32)})
    part = DatasetConfig(annotations=str(path), images=str(tmp_path / "data" / "images"))
    with pytest.raises(DataError, match=r"picture-range \(1\).*(?s:.*)data\.pixel_range=\[0,255\] maps them"):
        read_dataset(part, DataConfig(cache="", train=part))
    assert len(read_dataset(part, DataConfig(cache="", train=part, pixel_range=(0, 255))).records) == 1
