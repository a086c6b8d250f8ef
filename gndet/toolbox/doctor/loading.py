"""Measure how fast pictures become batches; check the limit of open files for loader processes."""

import contextlib
import resource
import time

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.schema import Config
from gndet.data.batches.stream import train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.data.workers import usable_cores
from gndet.toolbox.doctor.facts import Fact, Facts

PICTURES = 64  # most pictures to load
SECONDS = 2.0  # about the length of each of the two measurements
SIZE = 480  # side in pixels of the pictures drawn without a config
OTHER_FILES = 200  # open files of a run besides its loader processes: libraries, logs, data
FILES = 3  # per loader process: its pipe, what tells its end, a batch on its way


def facts(cfg: Config | None) -> Facts:
    """Measure the loader without and with worker processes, and what these need.  Raises DataError for refused data."""
    yield "reading the data"
    before = time.perf_counter()
    used = few_pictures(cfg)
    dataset = read_dataset(used.data.train, used.data, masks=used.model.masks)
    name = dataset.name if cfg else f"drawn shapes of {SIZE} x {SIZE} pixels (--config measures your data)"
    yield Fact("data", f"{name}; opened in {time.perf_counter() - before:.1f} s")
    yield "loading in this process"
    speed, _ = rate(dataset, used, 0)
    yield Fact("one process", f"{1000 / speed:.1f} ms per image, {speed:.0f} images/s")
    workers = used.data.workers
    if workers:
        yield f"loading in {workers} processes"
        speed, deaths = rate(dataset, used, workers)
        text = f"{speed:.0f} images/s with data.workers={workers}"
        if deaths:
            yield Fact("loader processes", f"{text}; {'; '.join(deaths)}", "wrong")
        elif workers > usable_cores():
            yield Fact("loader processes", f"{text}, which is more than the {usable_cores()} cores", "warning")
        else:
            yield Fact("loader processes", text, "ok")
        speed = max(speed, 1e-9)
    images = images_per_batch(used)
    yield Fact("data wait", f"none if training on {images} images takes {1000 * images / speed:.0f} ms or more")
    yield open_files(workers, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def few_pictures(cfg: Config | None) -> Config:
    """Limit a config to the first pictures of its training data; for None, return a config of drawn pictures."""
    if cfg is None:
        shapes = DatasetConfig(kind="shapes", count=PICTURES, size=SIZE)
        return Config(data=DataConfig(train=shapes, val=shapes, shortest_edge=(SIZE,), max_edge=SIZE))
    limit = min(cfg.data.train.limit or PICTURES, PICTURES)
    train = cfg.data.train.model_copy(update={"limit": limit})
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"train": train})})


def images_per_batch(cfg: Config) -> int:
    """Return train.images_per_gpu, or 2 if it is auto."""
    return cfg.train.images_per_gpu if isinstance(cfg.train.images_per_gpu, int) else 2


def rate(dataset: Dataset, cfg: Config, workers: int) -> tuple[float, list[str]]:
    """Return the images per second over about SECONDS, worker start-up included, and reports of dead workers."""
    deaths: list[str] = []
    data, images, count = cfg.data.model_copy(update={"workers": workers}), images_per_batch(cfg), 0
    before = time.perf_counter()
    batches = train_batches(
        dataset, data, seed=0, start=0, stop=-(-PICTURES // images), images_per_gpu=images, global_batch=images,
        rank=0, world=1, masks=cfg.model.masks, pin_memory=False, notify=deaths.append,
    )  # fmt: skip
    with contextlib.closing(batches):
        for loaded in batches:
            count += len(loaded.image_ids)
            if time.perf_counter() - before > SECONDS:
                break
    return count / (time.perf_counter() - before), deaths


def open_files(workers: int, limit: int) -> Fact:
    """Judge the limit of open files."""
    if limit == resource.RLIM_INFINITY:
        return Fact("open files", "no limit", "ok")
    needed = workers * FILES + OTHER_FILES
    text = f"at most {limit}; a run with {workers} loader processes needs up to {needed}"
    if limit < needed:
        text += f": raise the limit (ulimit -n {max(4096, needed)}) or lower data.workers"
        return Fact("open files", text, "warning")
    return Fact("open files", text, "ok")
