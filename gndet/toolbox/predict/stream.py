"""Batches for the detector, prepared ahead: loader processes read picture files, a thread decodes a video.

B images of a batch.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from gndet.data.batches.batch import collate
from gndet.data.batches.stream import Skipped, test_batches
from gndet.data.batches.transforms import test_sample
from gndet.data.datasets.images import picture_record
from gndet.data.records import Dataset, Record
from gndet.evaluation.detector import Detector
from gndet.structures import Batch
from gndet.toolbox.predict.sources import Pictures
from gndet.toolbox.predict.video import Frame, read_frames

FRAMES_AHEAD = 2  # batches of a video to decode ahead


class Portion(NamedTuple):
    """A batch on its way to the detector."""

    records: list[Record]  # of the B images
    batch: Batch | None  # None if no picture could be read
    broken: tuple[Skipped, ...] = ()  # pictures that could not be read
    frames: tuple[Frame, ...] = ()  # the B frames, of a video


def of_pictures(
    detector: Detector, pictures: Pictures, device: torch.device, notify: Callable[[str], None]
) -> Iterator[Portion]:
    """Yield the pictures in batches of evaluation.images_per_gpu.  notify: as in `test_batches`."""
    dataset = Dataset("pictures", detector.classes, detector.category_ids, pictures)
    batches = test_batches(
        dataset, detector.cfg.data, images_per_gpu=detector.cfg.evaluation.images_per_gpu, rank=0, world=1,
        pin_memory=device.type == "cuda", notify=notify,
    )  # fmt: skip
    with contextlib.closing(batches):
        for indices, batch, _, skipped in batches:
            yield Portion([pictures[index] for index in indices], batch, skipped)


def of_video(detector: Detector, video: Path, every: int, first: int) -> Iterator[Portion]:
    """Yield every `every`th frame of a video in batches of the same size, with image ids from `first` on.

    A record's file_name is like "a.mp4#t=1.240".  Raises DataError as `read_frames` does, after the batches before it.
    """
    decoded = _decoded(detector, video, every, first)
    with ThreadPoolExecutor(1) as thread:  # its exception is raised here, after the batches before it
        pending = deque(thread.submit(next, decoded, None) for _ in range(FRAMES_AHEAD))
        while (portion := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, decoded, None))
            yield portion


def _decoded(detector: Detector, video: Path, every: int, first: int) -> Iterator[Portion]:
    data, frames, num = detector.cfg.data, read_frames(video, every), detector.cfg.evaluation.images_per_gpu
    while taken := tuple(islice(frames, num)):
        records = [_frame_record(first + place, video, frame) for place, frame in enumerate(taken)]
        first += len(taken)
        samples = [test_sample(record, data) for record in records]
        yield Portion(records, collate(samples, data.canvas_multiple, data.exact_canvas), frames=taken)


def _frame_record(image_id: int, video: Path, frame: Frame) -> Record:
    """Make a frame a record without objects, its pixels in memory."""
    height, width = frame.pixels.shape[:2]
    record = picture_record(image_id, Path(f"{video}#t={frame.seconds:.3f}"), (height, width))
    return record._replace(load=lambda: frame.pixels)
