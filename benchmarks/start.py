"""`python -m benchmarks start`: time opening an annotation file of COCO's size, for the first time and again.

The first time, gndet reads, checks and packs everything, masks included, and stores it in its cache; again, it maps the
cache.  pycocotools and hotcoco index the file and check nothing.  Each turn runs in its own process; the file is in the
system's page cache.
"""

import argparse
import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import hotcoco
import numpy as np
from pycocotools.coco import COCO

from benchmarks.report import machine, table
from benchmarks.turns import Subject, Work, take_turns
from gndet.config.data import DataConfig
from gndet.data.datasets.cache import SETTLED
from gndet.data.datasets.coco import inspect_file
from gndet.data.datasets.faults import refuse
from gndet.errors import ConfigError

SIZE = (480, 640)  # height, width of the images
CLASSES = 80
POINTS = 21.0  # of an outline, on average, as in COCO


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Write the file, or use --annotations, and time all subjects.  Raises ConfigError if that file is missing."""
    with TemporaryDirectory() as folder:
        file = options.annotations
        if file is None:
            file = Path(folder) / "annotations.json"
            write(file, options.images, options.objects)
        elif not file.is_file():
            raise ConfigError(f"--annotations: {file}: no such file, expected COCO's JSON")
        mib = file.stat().st_size / 2**20
        say(f"opening {file.name if options.annotations else 'a synthetic file'}: {mib:.0f} MiB")
        subjects = [
            Subject("gndet, first", gndet_subject, (file.resolve(), Path(folder) / "cache", True)),
            Subject("gndet, again", gndet_subject, (file.resolve(), Path(folder) / "cache", False)),
            Subject("pycocotools", pycocotools_subject, (file.resolve(),)),
            Subject("hotcoco", hotcoco_subject, (file.resolve(),)),
        ]
        turns = take_turns(subjects, options.rounds, threads=options.threads, fresh=True, warmup=0, say=say)
    say(f"\n{machine(options.threads)}\n{table(turns, against='pycocotools', facts=('before MiB',))}")
    say("before MiB: resident after the imports, included in the peak")


def gndet_subject(file: Path, cache: Path, first: bool) -> Work:
    """Return the work of gndet's reader, with an empty cache or with one that knows the file."""
    data = DataConfig(cache=str(cache))
    if first:
        shutil.rmtree(cache, ignore_errors=True)
    else:
        settle(file, data)
    before = resident_mib()

    def work() -> dict[str, float]:
        refuse(inspect_file(file, None, data))
        return {"before MiB": before}

    return work


def settle(file: Path, data: DataConfig) -> None:
    """Open a file and wait until its cache entry is old enough to be trusted, as it would be on the next day."""
    inspect_file(file, None, data)
    newest = max(path.stat().st_mtime_ns for path in Path(data.cache).rglob("*.npy"))
    while time.time_ns() - newest <= SETTLED:
        time.sleep(0.1)
    inspect_file(file, None, data)


def pycocotools_subject(file: Path) -> Work:
    """Return the work of pycocotools' COCO(file)."""
    before = resident_mib()

    def work() -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            COCO(str(file))
        return {"before MiB": before}

    return work


def hotcoco_subject(file: Path) -> Work:
    """Return the work of hotcoco's COCO(file)."""
    before = resident_mib()

    def work() -> dict[str, float]:
        hotcoco.COCO(str(file))
        return {"before MiB": before}

    return work


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def write(file: Path, images: int, objects: int) -> None:
    """Write a synthetic file in COCO's format: outlines around a center, with lengths distributed as in COCO."""
    generator = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as stream:
        size = {"height": SIZE[0], "width": SIZE[1]}
        entries = [{"id": i + 1, "file_name": f"{i:012d}.jpg"} | size for i in range(images)]
        categories = [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)]
        stream.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number in range(objects):
            stream.write((", " if number else "") + json.dumps(draw(generator, number, images)))
        stream.write("]}")


def draw(generator: np.random.Generator, number: int, images: int) -> dict[str, object]:
    """Return one synthetic object."""
    points = int(np.clip(generator.lognormal(np.log(POINTS) - 0.25, 0.7), 3, 400))
    radius = generator.uniform(8, 110)
    center = generator.uniform(radius, np.array(SIZE[::-1]) - radius)
    angle = np.sort(generator.uniform(0, 2 * np.pi, points))
    along = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    outline = (center + radius * generator.uniform(0.6, 1, (points, 1)) * along).round(2)
    (x0, y0), (x1, y1) = outline.min(0).tolist(), outline.max(0).tolist()
    box, (x, y) = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)], outline.T
    twice = x @ np.roll(y, -1) - y @ np.roll(x, -1)  # shoelace
    return {
        "segmentation": [outline.ravel().tolist()], "area": round(abs(float(twice)) / 2, 2), "iscrowd": 0,
        "image_id": int(generator.integers(images)) + 1, "bbox": box,
        "category_id": int(generator.integers(CLASSES)) + 1, "id": number + 1,
    }  # fmt: skip
