"""Turn a record into what the model sees: load, flip and resize a picture together with its objects.

All randomness is a function of the image's key.  Letters: n objects, S mask side, (h, w) picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gndet.config.data import CropConfig, DataConfig
from gndet.data.batches.crops import center_crop, mix, random_crop, resize, resized
from gndet.data.datasets.segmentation import box_frame_masks
from gndet.data.records import MASK_SIDE, Record
from gndet.errors import DataError
from gndet.ops.noise import Stream, uniform

MIN_SIDE = 1e-3  # picture pixels; a clipped box with a shorter side is empty except for rounding


class UnreadablePicture(DataError):
    """A record's picture is missing, broken or of the wrong size: one file is at fault, not the data set."""


class Sample(NamedTuple):
    """One picture with its objects."""

    image: Tensor  # (3, h, w) uint8 RGB, channels last in memory
    boxes: Tensor  # (n, 4) float32 xyxy in picture pixels, inside the picture
    labels: Tensor  # (n,) int64
    masks: Tensor  # (n, S, S) bool, each in the frame of its box; (n, 0, 0) if masks are off
    key: int  # the only source of randomness for this image; 0 in evaluation
    shares: Tensor | None = None  # (n,) float32, of a mixed picture: each object's share of the class


def train_sample(record: Record, data: DataConfig, key: int, masks: bool) -> Sample:
    """Load a record for training: resized to one of data.shortest_edge, flipped, without crowd regions.

    Boxes are clipped to the picture, and dropped if empty.  With data.crop, the picture is a random part, and its
    object, the class of the picture, covers it.  Raises UnreadablePicture and, with masks, DataError for an object
    without a mask.
    """
    if data.crop is not None:
        image = random_crop(_loaded(record), data.crop, key, (data.flip, data.flip_vertical), data.antialias)
        return _classified(image, torch.from_numpy(record.labels.copy()), key)
    edge = data.shortest_edge[int(uniform(key, Stream.RESIZE) * len(data.shortest_edge))]
    across, down = uniform(key, Stream.FLIP) < data.flip, uniform(key, Stream.FLIP_VERTICAL) < data.flip_vertical
    flips = [axis for axis, flipped in ((-1, across), (-2, down)) if flipped]
    image, scale = _load_resized(record, edge, data, flips)
    height, width = image.shape[1:]
    limits = np.tile(record.size[::-1], 2)  # (4,) original width, height, width, height
    boxes = record.boxes.clip(0, limits)  # (all objects, 4)
    moved = boxes * np.tile(scale[::-1], 2)
    keep = np.flatnonzero(~record.crowd & (moved[:, 2:] - moved[:, :2] >= MIN_SIDE).all(axis=1))  # (n,)
    moved, frames = moved[keep], torch.zeros(len(keep), 0, 0, dtype=torch.bool)
    if masks:
        segmentations = [record.segmentations[k] for k in keep.tolist()]
        if None in segmentations:
            number = record.annotation_ids[keep[segmentations.index(None)]]
            raise DataError(
                f"{record.file_name}: annotation {number} has no usable segmentation (a polygon needs 3 points, an RLE "
                "its image's size); fix it, or set model.masks=false to train on boxes only"
            )
        frames = torch.from_numpy(box_frame_masks(segmentations, boxes[keep], record.size, MASK_SIDE))
        frames = frames.flip(flips) if flips else frames
    if across:
        moved[:, [0, 2]] = width - moved[:, [2, 0]]
    if down:
        moved[:, [1, 3]] = height - moved[:, [3, 1]]
    boxes_out = torch.from_numpy(moved.astype(np.float32))
    return Sample(image, boxes_out, torch.from_numpy(record.labels[keep]), frames, key)


def mixed_sample(sample: Sample, other: Sample, crop: CropConfig) -> Sample:
    """Mix a classifier's sample with another one of its size, by its own key; each class has its share."""
    image, share = mix(sample.image, other.image, crop, sample.key)
    boxes, labels, masks = map(torch.cat, zip(sample[1:4], other[1:4], strict=True))
    return Sample(image, boxes, labels, masks, sample.key, torch.tensor([share, 1 - share]))


def test_sample(record: Record, data: DataConfig) -> Sample:
    """Load a record for evaluation: data.shortest_edge_test, with data.crop its middle; no objects (n = 0).

    Raises UnreadablePicture.
    """
    image, _ = _load_resized(record, data.shortest_edge_test, data)
    image = image if data.crop is None else center_crop(image, data.crop.tested)
    no_masks = torch.zeros(0, 0, 0, dtype=torch.bool)
    return Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), no_masks, 0)


def _classified(image: Tensor, labels: Tensor, key: int) -> Sample:
    """Return a picture (3, h, w) with one object of its class, labels (1,), that covers it."""
    height, width = image.shape[1:]
    box = torch.tensor([[0.0, 0.0, width, height]])
    return Sample(image, box, labels, torch.zeros(1, 0, 0, dtype=torch.bool), key)


def _load_resized(
    record: Record, shortest_edge: int, data: DataConfig, flips: Sequence[int] = ()
) -> tuple[Tensor, tuple[float, float]]:
    """Load a picture, flip it along axes, and resize it.

    Returns (3, h, w) uint8, channels last in memory, and the (y, x) scale.  Raises UnreadablePicture.
    """
    height, width = resized(record.size, shortest_edge, data.max_edge)
    image = _loaded(record)
    if flips:
        image = image.flip(list(flips))  # while it is small; resizing is symmetric, so the order does not matter
    image = resize(image, (height, width), data.antialias)
    return image, (height / record.size[0], width / record.size[1])


def _loaded(record: Record) -> Tensor:
    """Load a picture as (3, h, w) uint8, channels last, which is twice as fast to resize.  Raises UnreadablePicture."""
    try:
        return torch.from_numpy(record.load()).permute(2, 0, 1)
    except DataError as error:
        raise UnreadablePicture(str(error)) from None
