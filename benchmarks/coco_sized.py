"""Make a data set of COCO's size, and time `gndet check` on it: cold, and again from the cache.

python -m benchmarks.coco_sized FOLDER [--images 118000] [--objects 860000]

Polygons are as long as COCO's (a median of 18 points, a long tail); one object in 80 is a crowd region in RLE. The
pictures are hard links to a few JPEGs.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

LINKS = 30_000  # hard links to one file: some file systems allow no more than 32,000 or 65,000
SIZE = (480, 640)


def make(folder: Path, images: int, objects: int) -> None:
    """Write FOLDER/train.json and FOLDER/train/, unless they exist."""
    if (folder / "train.json").exists():
        return
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "train.json.partial").open("w", encoding="utf-8") as file:
        entries = [{"id": 9 + 3 * i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(images)]
        categories = [{"id": i + 1 + i // 8, "name": f"class {i}"} for i in range(80)]
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number in range(objects):
            annotation = draw(rng, number, int(9 + 3 * rng.integers(images)), categories)
            file.write((", " if number else "") + json.dumps(annotation))
        file.write("]}")
    for i in range(images):
        path = folder / "train" / f"{i:012d}.jpg"
        if i % LINKS == 0:
            first = path
            Image.effect_noise((SIZE[1], SIZE[0]), 40).convert("RGB").save(path)
        elif not path.exists():
            os.link(first, path)
    (folder / "train.json.partial").rename(folder / "train.json")


def draw(rng: np.random.Generator, number: int, image_id: int, categories: list[dict]) -> dict:
    """Return one object: an outline around a center, or a crowd region."""
    points = int(np.clip(rng.lognormal(2.9, 0.7), 3, 400))
    radius = rng.uniform(8, 110)
    angle = (np.arange(points) + rng.uniform(0.2, 0.8, points)) * (2 * np.pi / points)  # all around: never a line
    center = rng.uniform(radius, np.array(SIZE[::-1]) - radius)
    outline = center + radius * rng.uniform(0.6, 1, (points, 1)) * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    (x0, y0), (x1, y1) = outline.min(0), outline.max(0)
    crowd = int(number % 80 == 0)
    segmentation: object = [outline.round(2).ravel().tolist()]
    if crowd:
        packed = coco_mask.merge(coco_mask.frPyObjects(segmentation, *SIZE))
        flat = coco_mask.decode(packed).ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        segmentation = {"size": list(SIZE), "counts": np.diff([0, *edges, flat.size]).tolist()}
    return {
        "id": 100 + number,
        "image_id": image_id,
        "category_id": int(categories[int(80 * rng.random() ** 3)]["id"]),
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(float((x1 - x0) * (y1 - y0) * 0.6), 2),
        "iscrowd": crowd,
        "segmentation": segmentation,
    }


def check(options: argparse.Namespace, cache: Path) -> None:
    """Run `gndet check` in its own process; print how long it took and its peak memory."""
    words = ["gndet", "check", options.folder / "train.json", f"data.cache={cache}", "--image-folder"]
    began, load = time.monotonic(), os.getloadavg()[0]
    process = subprocess.Popen([*map(str, words), str(options.folder / "train")], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.monotonic() - began
    assert status == 0, status
    print(
        f"{took:.1f} s ({usage.ru_utime + usage.ru_stime:.1f} s of CPU, load {load:.1f} before), "
        f"at most {usage.ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    given = parser.parse_args()
    make(given.folder, given.images, given.objects)
    print(f"{(given.folder / 'train.json').stat().st_size / 2**20:.0f} MiB of JSON")
    with tempfile.TemporaryDirectory() as cold:
        check(given, Path(cold))
        check(given, Path(cold))
