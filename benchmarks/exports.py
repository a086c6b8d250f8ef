"""Time opening exports of labelling tools of COCO's size: YOLO's text files, and Pascal VOC's XML.

    python -m benchmarks.exports [--images 118000] [--objects 860000] [--folder FOLDER]

The pictures are JPEG headers with the size of a picture, and nothing behind them: opening reads no more.  Each opening
runs in a new process, the files lie in the system's page cache, and the peak is that of the largest process.
"""

import argparse
import io
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset

SIZE = (480, 640)  # height, width
CLASSES = 80
FORMATS = ("yolo", "voc")


def main() -> None:
    """Write the exports, and time a first and a second opening of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--folder", type=Path, help="keep the exports here")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return open_export(*options.child)
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for kind in FORMATS:
            root, cache = folder / kind, Path(temporary) / "cache"
            if not root.exists():
                write(root, kind, options.images, options.objects)
            for turn in ("first", "again", "again"):
                words = [sys.executable, "-P", "-m", "benchmarks.exports", "--child", str(root), str(cache)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                print(f"{kind}, {turn}: {done.stdout.strip()}", flush=True)
            shutil.rmtree(cache)
    return None


def open_export(root: str, cache: str) -> None:
    """Open an export, and print seconds and the peak memory of this process and the largest of its children."""
    began = time.perf_counter()
    dataset = read_dataset(DatasetConfig(split="train"), DataConfig(root=root, cache=cache))
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    objects = int(dataset.records.packed.objects_first[-1])  # type: ignore[attr-defined]
    print(f"{len(dataset.records)} images, {objects} objects, {seconds:.1f} s, {peaks[0]:.0f} + {peaks[1]:.0f} MiB")


def write(root: Path, kind: str, images: int, objects: int) -> None:
    """Write an export of boxes; each picture has some objects, or none."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(file, "JPEG")
    header = file.getvalue()
    header = header[: header.index(b"\xff\xda") + 16]  # up to the pixels
    owner = np.sort(rng.integers(images, size=objects))
    first = np.searchsorted(owner, np.arange(images + 1))
    sides = rng.uniform(8, 220, (objects, 2)).round()
    corners = (rng.uniform(0, 1, (objects, 2)) * (np.array(SIZE[::-1]) - sides)).round()
    labels = rng.integers(CLASSES, size=objects)
    pictures, texts = ("images/train", "labels/train") if kind == "yolo" else ("JPEGImages", "Annotations")
    for name in (pictures, texts):
        (root / name).mkdir(parents=True)
    for index in range(images):
        (root / pictures / f"{index:012d}.jpg").write_bytes(header)
        rows = range(first[index], first[index + 1])
        boxes = [(int(labels[row]), corners[row], corners[row] + sides[row]) for row in rows]
        if kind == "yolo":
            text = "".join(_yolo_row(*box) for box in boxes)
            (root / texts / f"{index:012d}.txt").write_text(text)
        else:
            (root / texts / f"{index:012d}.xml").write_text(_voc_file(f"{index:012d}.jpg", boxes))
    if kind == "yolo":
        names = ", ".join(f"class {label}" for label in range(CLASSES))
        (root / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames: [{names}]\n")


def _yolo_row(label: int, start: np.ndarray, end: np.ndarray) -> str:
    center, side = (start + end) / 2 / SIZE[::-1], (end - start) / SIZE[::-1]
    return f"{label} {center[0]:.6f} {center[1]:.6f} {side[0]:.6f} {side[1]:.6f}\n"


def _voc_file(name: str, boxes: list[tuple[int, np.ndarray, np.ndarray]]) -> str:
    objects = "".join(
        f"<object><name>class {label}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{start[0] + 1:.0f}</xmin><ymin>{start[1] + 1:.0f}</ymin><xmax>{end[0]:.0f}</xmax>"
        f"<ymax>{end[1]:.0f}</ymax></bndbox></object>"
        for label, start, end in boxes
    )
    height, width = SIZE
    return (
        f"<annotation><folder>set</folder><filename>{name}</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


if __name__ == "__main__":
    main()
