"""The part of a picture that a classifier sees: drawn by the image's key, and as torchvision resizes and crops it."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from gndet.config.data import CropConfig
from gndet.data.batches import crops
from gndet.ops.noise import Stream, uniform

SIZES = [(300, 400), (400, 300), (64, 64), (31, 500)]


def picture(height: int = 60, width: int = 80, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_a_window_lies_inside_and_keeps_its_ranges(size: tuple[int, int]) -> None:
    height, width = size
    for key in range(300):
        top, left, h, w = crops.crop_window(size, CropConfig(), key)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        assert 3 / 4 - 2 / h <= w / h <= 4 / 3 + 2 / h
        assert h * w <= height * width and (size == (31, 500) or h * w >= 0.08 * height * width - h - w)


def test_area_and_logarithm_of_the_ratio_are_uniform() -> None:
    windows = np.array([crops.crop_window((1000, 1000), CropConfig(area=(0.1, 0.5)), key) for key in range(4000)])
    areas, ratios = windows[:, 2] * windows[:, 3] / 1e6, np.log(windows[:, 3] / windows[:, 2])
    assert np.quantile(areas, (0.25, 0.5, 0.75)) == pytest.approx([0.2, 0.3, 0.4], abs=0.02)
    assert np.quantile(ratios, (0.25, 0.5, 0.75)) == pytest.approx([-0.144, 0, 0.144], abs=0.02)
    free = 1000 - windows[:, 2]
    assert np.quantile(windows[:, 0] / free, (0.25, 0.5, 0.75)) == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_a_picture_too_long_for_any_window_gives_its_middle() -> None:
    crop = CropConfig(area=(0.9, 1.0))
    assert crops.crop_window((10, 1000), crop, 5) == (0, 493, 10, 13)  # width 10 * 4/3, from (1000 - 13) // 2
    assert crops.crop_window((1000, 10), crop, 5) == (493, 0, 13, 10)


def test_the_crop_is_torchvisions_resized_crop() -> None:
    image, crop, flips = picture(), CropConfig(size=32), Counter()
    for key in range(8):
        top, left, h, w = crops.crop_window((60, 80), crop, key)
        expected = functional.resized_crop(image, top, left, h, w, [32, 32], antialias=True)
        flipped = uniform(key, Stream.FLIP) < 0.5
        expected = expected.flip(-1) if flipped else expected
        found = crops.random_crop(image, crop, key, (0.5, 0.0), True)
        assert (found.int() - expected.int()).abs().max() <= 1
        flips[flipped] += 1
    assert len(flips) == 2


def test_pictures_are_turned_upside_down_by_their_own_draw() -> None:
    image, crop = picture(), CropConfig(size=32)
    for key in range(6):
        plain, down = (crops.random_crop(image, crop, key, (0.0, share), True) for share in (0.0, 0.5))
        flipped = uniform(key, Stream.FLIP_VERTICAL) < 0.5
        assert torch.equal(down, plain.flip(-2) if flipped else plain)
    assert torch.equal(
        crops.random_crop(image, crop, 3, (1.0, 1.0), True),
        crops.random_crop(image, crop, 3, (0.0, 0.0), True).flip(-1, -2),
    )


@pytest.mark.parametrize("size", [(60, 80), (81, 64), (32, 33), (20, 50)])
def test_the_middle_is_torchvisions_center_crop(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = crops.center_crop(image, 32)
    if min(size) >= 32:
        assert torch.equal(found, functional.center_crop(image, [32, 32]))
    else:
        assert found.shape == (3, 20, 32)  # torchvision would add a black border, which a masked norm need not see


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_change_of_colors_is_torchvisions(name: str) -> None:
    image = picture()
    factors = []
    for key in range(6):
        found = crops.change_colors(image, CropConfig(**{name: 0.4}), key)
        number = ("brightness", "contrast", "saturation").index(name)
        factor = 0.6 + 0.8 * uniform(key, Stream.COLOR, number, 1)
        expected = getattr(functional, f"adjust_{name}")(image.float() / 255, factor) * 255
        assert (found.float() - expected).abs().max() <= 0.75
        factors.append(factor)
    assert min(factors) < 0.85 and max(factors) > 1.15


def test_the_lighting_is_normal_along_the_components_of_imagenet() -> None:
    shifts = torch.stack([crops._lighting(0.1, key) for key in range(4000)]).double()  # (n, 3)
    vectors = torch.tensor(crops.VECTORS, dtype=torch.float64)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3, dtype=torch.float64), atol=2e-3)
    along = shifts @ vectors
    assert along.std(0).tolist() == pytest.approx([0.1 * value for value in crops.VALUES], rel=0.05)
    assert along.mean(0).abs().max() < 0.1 * crops.VALUES[0] * 4 / math.sqrt(4000)
    gray = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    found = crops.change_colors(gray, CropConfig(lighting=0.1), 7)
    assert torch.equal(found[:, 0, 0].float(), (128 + 255 * crops._lighting(0.1, 7)).round())


def test_nothing_changes_without_an_option_and_all_depends_on_the_key() -> None:
    image, crop = picture(), CropConfig(size=32, brightness=0.4, contrast=0.4, saturation=0.4, lighting=0.1)
    assert crops.change_colors(image, CropConfig(), 3) is image
    found = [crops.random_crop(image, crop, key, (0.5, 0.0), True) for key in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
