"""Resize pictures; cut out the part that a classifier sees, change its colors, and mix it with another picture.

All randomness is a function of the image's key.  Letters: (h, w) picture.
"""

import math
import platform
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gndet.config.data import CropConfig
from gndet.ops.noise import Stream, hash_ints, uniform
from gndet.ops.torchvision_ops import transforms

ATTEMPTS = 10  # to draw a part that lies inside the picture (Szegedy et al. 2015; torchvision, fb.resnet.torch)
FILL = [124, 116, 104]  # ImageNet's mean color, where RandAugment moves a picture away, as in timm
GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue in the brightness (ITU-R BT.601)
# principal components of ImageNet's colors: standard deviations and directions, of RGB in [0, 1] (Krizhevsky et al.
# 2012; the numbers are fb.resnet.torch's)
VALUES = (0.2175, 0.0188, 0.0045)
VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def resized(size: tuple[int, int], shortest_edge: int, max_edge: int) -> tuple[int, int]:
    """Compute the (height, width) whose shorter edge is shortest_edge, or whose longer edge is max_edge if smaller."""
    scale = min(shortest_edge / min(size), max_edge / max(size))
    height, width = (max(1, int(edge * scale + 0.5)) for edge in size)
    return height, width


def resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Resize (3, H, W) uint8 bilinearly, as torchvision.transforms.v2 does, whose import takes seconds."""
    if image.shape[1:] == size:
        return image
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    batch = image[None]
    if batch.is_contiguous(memory_format=torch.channels_last):  # torch would not see it by the stride of a batch of 1
        batch = batch.as_strided(batch.shape, (image.numel(), *image.stride()))
    resize = partial(F.interpolate, size=list(size), mode="bilinear", align_corners=False, antialias=antialias)
    return resize(batch)[0] if native else resize(batch.float())[0].round_().byte()


def random_crop(image: Tensor, crop: CropConfig, key: int, flips: tuple[float, float], antialias: bool) -> Tensor:
    """Cut out a random part of a picture, resize it to a square, flip it, augment it and change its colors.

    image (3, h, w) uint8; flips: probabilities of a left-right and an upside-down flip; key: the only source of
    randomness.  Returns (3, size, size) uint8.  Source: Szegedy et al. 2015, section 6; fb.resnet.torch.
    """
    top, left, height, width = crop_window((image.shape[1], image.shape[2]), crop, key)
    image = resize(image[:, top : top + height, left : left + width], (crop.size, crop.size), antialias)
    across, down = uniform(key, Stream.FLIP) < flips[0], uniform(key, Stream.FLIP_VERTICAL) < flips[1]
    image = image.flip([axis for axis, flipped in ((-1, across), (-2, down)) if flipped])
    return change_colors(rand_augment(image, crop, key), crop, key)


def rand_augment(image: Tensor, crop: CropConfig, key: int) -> Tensor:
    """Apply crop.rand_augment random operations to a picture (3, h, w) uint8, by torchvision's RandAugment.

    Source: Cubuk et al. 2020.  It draws from the global generator, which is seeded by the key, and restored.
    """
    if not crop.rand_augment:
        return image
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_ints(key, Stream.AUGMENT))
        augmented: Tensor = _rand_augment(crop.rand_augment, crop.magnitude)(image)
    return augmented


@cache
def _rand_augment(number: int, magnitude: int) -> Any:
    bilinear = transforms().InterpolationMode.BILINEAR
    return transforms().RandAugment(number, magnitude, interpolation=bilinear, fill=FILL)


def crop_window(size: tuple[int, int], crop: CropConfig, key: int) -> tuple[int, int, int, int]:
    """Draw a part of a picture of size (h, w): top, left, height, width in pixels.

    Its area and the logarithm of its width / height are uniform.  If no attempt lies inside the picture, it is the
    largest part in the middle whose ratio is allowed, as in torchvision's RandomResizedCrop.
    """
    height, width = size
    for attempt in range(ATTEMPTS):
        draw = [uniform(key, Stream.CROP, attempt, number) for number in range(4)]
        area = height * width * (crop.area[0] + draw[0] * (crop.area[1] - crop.area[0]))
        low, high = map(math.log, crop.ratio)
        ratio = math.exp(low + draw[1] * (high - low))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1)), h, w
    ratio = min(max(width / height, crop.ratio[0]), crop.ratio[1])
    h, w = min(height, max(round(width / ratio), 1)), min(width, max(round(height * ratio), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def mix(image: Tensor, other: Tensor, crop: CropConfig, key: int) -> tuple[Tensor, float]:
    """Blend a picture with another one (mixup, Zhang et al. 2018), or paste a box of that (CutMix, Yun et al. 2019).

    image, other (3, h, w) uint8; key: the only source of randomness.  With both, each is as likely, as in timm.
    Returns (3, h, w) uint8 and the share of the first picture in it; a box is cut off at the edges, which adds to it.
    """
    draws = np.random.Generator(np.random.PCG64(hash_ints(key, Stream.MIX)))
    cuts = crop.cutmix > 0 and (not crop.mixup or draws.random() < 0.5)
    alpha = crop.cutmix if cuts else crop.mixup
    share = float(draws.beta(alpha, alpha))
    if not cuts:
        return (share * image.float() + (1 - share) * other.float()).round_().byte(), share
    bounds = []
    for side in image.shape[1:]:
        middle, half = draws.uniform(0, side), side * math.sqrt(1 - share) / 2
        bounds.append(slice(round(max(middle - half, 0)), round(min(middle + half, side))))
    mixed = image.clone()
    mixed[:, bounds[0], bounds[1]] = other[:, bounds[0], bounds[1]]
    return mixed, 1 - math.prod(bound.stop - bound.start for bound in bounds) / image[0].numel()


def center_crop(image: Tensor, size: int) -> Tensor:
    """Return the middle of a picture (3, h, w), at most size x size pixels, as torchvision's CenterCrop does."""
    height, width = image.shape[1:]
    top, left = max(round((height - size) / 2), 0), max(round((width - size) / 2), 0)
    return image[:, top : top + size, left : left + size]


def change_colors(image: Tensor, crop: CropConfig, key: int) -> Tensor:
    """Change brightness, contrast and saturation of a picture in a random order, then the lighting.

    image (3, h, w) uint8.  Each change blends the picture with black, with its mean gray, or with its gray version
    (fb.resnet.torch); the result is rounded to uint8, which fb.resnet.torch does not do.  Returns (3, h, w) uint8.
    """
    changes = [name for name in ("brightness", "contrast", "saturation") if getattr(crop, name)]
    if not changes and not crop.lighting:
        return image
    x = image.float()
    changes.sort(key=lambda name: hash_ints(key, Stream.COLOR, _number(name), 0))
    for name in changes:
        share = 1 + getattr(crop, name) * (2 * uniform(key, Stream.COLOR, _number(name), 1) - 1)
        x = share * x + (1 - share) * _blended_with(x, name)
    if crop.lighting:
        x = x + 255 * _lighting(crop.lighting, key)[:, None, None]
    return x.round_().clamp_(0, 255).byte()


def _number(name: str) -> int:
    return ("brightness", "contrast", "saturation").index(name)


def _blended_with(x: Tensor, name: str) -> Tensor:
    """Return what a change blends a picture x (3, h, w) with."""
    if name == "brightness":
        return torch.zeros_like(x)
    gray = (x * torch.tensor(GRAY)[:, None, None]).sum(0, keepdim=True)  # (1, h, w)
    # in float64, because a float32 sum depends on the threads that share it
    return gray.mean(dtype=torch.float64).to(x.dtype) if name == "contrast" else gray


def _lighting(deviation: float, key: int) -> Tensor:
    """Draw the shift (3,) of RGB in [0, 1] along ImageNet's principal components."""
    draws = []
    for number in range(3):  # normal numbers by Box and Muller (1958)
        radius = math.sqrt(-2 * math.log(1 - uniform(key, Stream.COLOR, 3 + number, 0)))
        draws.append(deviation * radius * math.cos(2 * math.pi * uniform(key, Stream.COLOR, 3 + number, 1)))
    return torch.tensor(VECTORS) @ (torch.tensor(draws) * torch.tensor(VALUES))
