"""Draw a data set: discs, boxes, triangles and stars that overlap.

Image i is a pure function of (seed, i, size). Outlines and colors have separate random streams, so that
reading the data set draws no picture. Letters: n objects, V outline points, s image side in pixels.
"""

import colorsys
import functools

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from gndet.config.data import DatasetConfig
from gndet.data.records import Dataset, Record
from gndet.errors import DataError
from gndet.ops.noise import Stream, hash_ints

CLASSES = ("disc", "box", "triangle", "star")
MAX_COUNT = 1_000_000  # images per seed: image ids start at seed * MAX_COUNT + 1
MAX_SEED = 2**32
MIN_VISIBLE = 0.5  # share of an object's area; with less in view it would be a meaningless fragment
MAX_TILT = np.pi / 8  # objects are nearly upright; arbitrary rotations take several times as long to learn
OUTLINE, COLOR = 0, 1  # the random streams of an image


def read_shapes(cfg: DatasetConfig) -> Dataset:
    """Lay out cfg.count images of cfg.size x cfg.size pixels; `Record.load` draws them.

    Boxes and masks are those of the visible part.  Raises DataError for a seed or count out of range.
    """
    if not 0 <= cfg.seed <= MAX_SEED or cfg.count > MAX_COUNT:
        expected = f"a seed from 0 to {MAX_SEED} and a count from 1 to {MAX_COUNT}"
        raise DataError(f"shapes: seed {cfg.seed}, count {cfg.count}, expected {expected}")
    records: list[Record] = []
    first_id = 1
    for index in range(cfg.count):
        records.append(_to_record(cfg, index, first_id))
        first_id += len(records[-1].labels)
    return Dataset(
        name=f"shapes: {cfg.count} images of {cfg.size} x {cfg.size} pixels, seed {cfg.seed}",
        classes=CLASSES,
        category_ids=tuple(range(1, len(CLASSES) + 1)),
        records=records,
    )


def draw_image(seed: int, index: int, size: int) -> np.ndarray:
    """Draw image `index` of a seed.  Returns (size, size, 3) uint8 RGB."""
    rng = _generator(seed, index, COLOR)
    y, x = np.mgrid[0:size, 0:size] / size  # (s, s) each, in [0, 1)
    angle, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(2, 12), rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    start, end = rng.uniform(30, 130, (2, 3))  # dull colors; the objects are bright
    picture = start + (end - start) * x[..., None]
    picture += rng.uniform(0, 20) * np.sin(2 * np.pi * frequency * along + phase)[..., None]
    for mask in _layout(seed, index, size)[1]:
        hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.5, 1), rng.uniform(0.6, 1)
        picture[mask] = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    picture += rng.normal(0, rng.uniform(2, 12), (size, size, 3))
    return picture.clip(0, 255).astype(np.uint8)


def _to_record(cfg: DatasetConfig, index: int, first_id: int) -> Record:
    """Lay out image `index`; its annotations are numbered from first_id."""
    labels, visible = _layout(cfg.seed, index, cfg.size)
    rles = coco_mask.encode(np.asfortranarray(visible.transpose(1, 2, 0), dtype=np.uint8))
    boxes = coco_mask.toBbox(rles)  # (n, 4) xywh
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        image_id=cfg.seed * MAX_COUNT + 1 + index,
        file_name=f"shapes-{cfg.seed}-{index:06d}.png",
        size=(cfg.size, cfg.size),
        load=functools.partial(draw_image, cfg.seed, index, cfg.size),
        boxes=boxes,
        labels=labels,
        crowd=np.zeros(len(labels), dtype=bool),
        area=visible.sum((1, 2)).astype(np.float64),
        annotation_ids=np.arange(first_id, first_id + len(labels)),
        segmentations=[{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles],
    )


def _layout(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Place 2 to 5 objects, later ones over earlier ones.

    Returns labels (n,) int64 and visible masks (n, s, s) bool.  A place that would leave less than MIN_VISIBLE of an
    earlier object's area visible is drawn again.
    """
    rng = _generator(seed, index, OUTLINE)
    labels: list[int] = []
    visible = np.zeros((0, size, size), dtype=bool)
    whole = np.zeros(0)  # (n,) area of each object if nothing covered it
    for _ in range(rng.integers(2, 6)):
        while True:
            label = int(rng.integers(len(CLASSES)))
            mask = _draw_mask(_outline(rng, label, size), size)
            left = visible & ~mask
            if (left.sum((1, 2)) >= MIN_VISIBLE * whole).all():
                break
        labels.append(label)
        visible = np.concatenate((left, mask[None]))
        whole = np.append(whole, mask.sum())
    return np.array(labels, dtype=np.int64), visible


def _outline(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Draw the outline of an object that lies inside the image.  Returns (V, 2) x, y in pixels."""
    radius = rng.uniform(1 / 10, 1 / 4) * size
    if CLASSES[label] == "box":
        half = np.arctan(rng.uniform(0.4, 1))  # half the angle between two corners: the ratio of the sides
        angles: np.ndarray = np.array([-half, half, np.pi - half, np.pi + half]) + rng.integers(2) * np.pi / 2
        radii = np.ones(4)
    else:
        points = {"disc": 48, "triangle": 3, "star": 10}[CLASSES[label]]
        angles = np.arange(points) * (2 * np.pi / points) - np.pi / 2  # a corner on top
        radii = np.where(np.arange(points) % 2, 0.45, 1.0) if CLASSES[label] == "star" else np.ones(points)
    angles = angles + rng.uniform(-MAX_TILT, MAX_TILT)
    center = rng.uniform(radius, size - radius, 2)
    return center + radius * radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)


def _draw_mask(outline: np.ndarray, size: int) -> np.ndarray:
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in outline.tolist()], fill=1)
    return np.asarray(canvas, dtype=bool)


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(hash_ints(seed, Stream.DRAW, index, stream)))
