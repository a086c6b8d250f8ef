"""Choose the images to compare, and a size of them that fits into the memory of a GPU."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from gndet.config.schema import Config
from gndet.data.batches.transforms import Sample, mixed_sample, train_sample
from gndet.data.records import MASK_SIDE, Dataset, Record
from gndet.errors import ConfigError, DataError
from gndet.modeling.image_model import ImageModel
from gndet.ops.noise import hash_ints
from gndet.toolbox.invariance.leaks import find_leaks
from gndet.toolbox.invariance.measure import batch_of, compare, measure
from gndet.training.memory import TensorBytes, release

MATE_OBJECTS = 20  # of the synthetic wider image, so that its batch has more ground-truth slots
SIDES = (64, 128)  # pixels of the pictures on which memory is measured
USABLE = 0.8  # fraction of the free memory to plan with: the estimate knows neither fragments nor the second rank
SCALES = tuple(1 - step / 20 for step in range(19))  # of the edges, tried from the largest
SMALLEST = 32  # pixels of a shorter edge


def choose_samples(dataset: Dataset, cfg: Config, num: int) -> list[Sample]:
    """Return num training images, from the tallest to the widest, augmented as in the first epoch."""
    usable = [record for record in dataset.records if len(record.labels) and not record.crowd.all()]
    if len(usable) < num:
        raise DataError(f"{dataset.name}: {len(usable)} images with objects, gndet invariance takes {num} (--images)")
    by_shape = sorted(usable, key=lambda record: (record.size[1] / record.size[0], record.image_id))
    chosen: list[Record] = [by_shape[round(i * (len(usable) - 1) / (num - 1))] for i in range(num)]
    keys = [hash_ints(cfg.seed, 0, record.image_id) for record in chosen]
    samples = [train_sample(record, cfg.data, key, cfg.model.masks) for record, key in zip(chosen, keys, strict=True)]
    crop = cfg.data.crop
    if crop is None or not crop.mixes:
        return samples
    return [mixed_sample(sample, samples[i - 1], crop) for i, sample in enumerate(samples)]


def wider_mate(samples: list[Sample], masks: bool) -> Sample:
    """Return an image of noise with MATE_OBJECTS objects, 1.5 times as tall and as wide as the largest sample."""
    height, width = (max(sample.image.shape[d] for sample in samples) * 3 // 2 for d in (1, 2))
    return noise_sample(height, width, masks)


def noise_sample(height: int, width: int, masks: bool) -> Sample:
    """Return an image of noise with MATE_OBJECTS objects."""
    rng = np.random.Generator(np.random.PCG64(0))
    corners = rng.uniform(0, 0.8, (MATE_OBJECTS, 2)) * (width, height)
    boxes = np.concatenate([corners, corners + 0.15 * np.array([width, height])], axis=1)
    side = MASK_SIDE if masks else 0
    return Sample(
        torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)),
        torch.from_numpy(boxes.astype(np.float32)),
        torch.zeros(MATE_OBJECTS, dtype=torch.int64),
        torch.ones(MATE_OBJECTS, side, side, dtype=torch.bool),
        key=1,
    )


def within_memory(
    model: ImageModel, dataset: Dataset, cfg: Config, num: int, free: int, show: Callable[[str], None]
) -> Config:
    """Return the config with images small enough for the comparison of num of them in `free` bytes, and say so.

    A smaller image proves the same: how images could influence each other does not depend on their size.
    Raises ConfigError if not even images of a few cells fit.
    """
    samples = choose_samples(dataset, cfg, num)
    height, width = (max(sample.image.shape[d] for sample in samples) for d in (1, 2))
    needed = needed_bytes(model.to(torch.float64), num, cfg)
    fitting = [scale for scale in SCALES if needed(height * width * scale**2) <= USABLE * free]
    if fitting and fitting[0] == 1:
        return cfg
    text = (
        f"{num} images of up to {height} x {width} need about {needed(height * width) / 2**30:.1f} GiB in float64, "
        f"{free / 2**30:.1f} GiB of GPU memory are free"
    )
    if not fitting:
        raise ConfigError(f"{text}, too few even for small images; lower --images, or end other programs on the GPU")
    shortest = tuple(sorted({max(round(edge * fitting[0]), SMALLEST) for edge in cfg.data.shortest_edge}))
    longest = round(cfg.data.max_edge * fitting[0])
    show(f"{text}: made smaller, data.shortest_edge={list(shortest)} data.max_edge={longest}")
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"shortest_edge": shortest, "max_edge": longest})})


def needed_bytes(model: ImageModel, num: int, cfg: Config) -> Callable[[float], float]:
    """Estimate the memory that the comparison of num images takes, as a function of the pixels of the largest.

    model: in float64.  It grows linearly with the number of images and with their pixels, so four measurements at small
    sizes tell: of 1 and of 2 images, at two sizes; for the arrangements and for the search for leaks.
    """
    areas = [side**2 for side in SIDES]
    lines = []
    for task in (_arrange, _search):
        single, pair = ([_peak(task, model, count, side, cfg) for side in SIDES] for count in (1, 2))
        many = [a + (num - 1) * (b - a) for a, b in zip(single, pair, strict=True)]  # at the two sizes
        slope = max(many[1] - many[0], 0) / (areas[1] - areas[0])
        lines.append((max(many[0] - slope * areas[0], 0), slope))
    return lambda pixels: max(fixed + slope * pixels for fixed, slope in lines)


def _peak(
    task: Callable[[ImageModel, list[Sample], Config], None],
    model: ImageModel,
    count: int,
    side: int,
    cfg: Config,
) -> float:
    """Return the largest number of bytes that a task holds at once with `count` square pictures."""
    samples = [noise_sample(side, side, cfg.model.masks)] * count
    if model.device.type == "cpu":
        with TensorBytes(2**62) as counted:
            task(model, samples, cfg)
        return counted.peak
    release(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    task(model, samples, cfg)
    return torch.cuda.max_memory_allocated(model.device) - before


def _arrange(model: ImageModel, samples: list[Sample], cfg: Config) -> None:
    """Compare images alone with all of them beside a wider one."""
    everyone, images = [*samples, wider_mate(samples, cfg.model.masks)], list(range(len(samples)))
    alone = measure(model, everyone, [[i] for i in images], cfg, nullcontext)
    compare(measure(model, everyone, [[*images, len(samples)]], cfg, nullcontext), alone)


def _search(model: ImageModel, samples: list[Sample], cfg: Config) -> None:
    """Search for leaks among images and a wider one."""
    everyone = [*samples, wider_mate(samples, cfg.model.masks)]
    find_leaks(model, [batch_of([sample], model, cfg) for sample in everyone], batch_of(everyone, model, cfg))
