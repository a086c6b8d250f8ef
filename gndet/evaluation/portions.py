"""Read pictures and videos in batches on their way to a detector.

B images.  Pictures are resized as in evaluation: the same functions make the batches.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gndet.config.data import DataConfig
from gndet.data.batches.batch import collate
from gndet.data.batches.stream import Skipped, test_batches
from gndet.data.batches.transforms import test_sample
from gndet.data.datasets.images import picture_record
from gndet.data.records import Dataset, Record, Tell
from gndet.evaluation.video import Frame, read_frames
from gndet.structures import Batch

FRAMES_AHEAD = 2  # batches of a video to decode ahead


class Portion(NamedTuple):
    """A batch on its way to the detector."""

    records: list[Record]  # of the B images
    batch: Batch | None  # None if no picture could be read
    broken: tuple[Skipped, ...] = ()  # pictures that could not be read
    frames: tuple[Frame, ...] = ()  # the B frames, of a video


def picture_portions(
    records: Sequence[Record], data: DataConfig, num: int, *, pin_memory: bool, notify: Tell | None = None
) -> Generator[Portion, None, None]:
    """Yield pictures in batches of `num`, read ahead by data.workers processes.  notify: as in `test_batches`."""
    dataset = Dataset("pictures", (), (), records)
    batches = test_batches(
        dataset, data, images_per_gpu=num, rank=0, world=1, pin_memory=pin_memory, notify=notify
    )  # fmt: skip
    with contextlib.closing(batches):
        for indices, batch, _, skipped in batches:
            yield Portion([records[index] for index in indices], batch, skipped)


def video_portions(video: Path, data: DataConfig, num: int, every: int, first: int) -> Generator[Portion, None, None]:
    """Yield every `every`th frame of a video in batches of `num`, with image ids starting at `first`.

    A record's file_name is like "a.mp4#t=1.240".  Raises DataError as `read_frames` does, after all earlier batches.
    """
    decoded = _decoded(video, data, num, every, first)
    with ThreadPoolExecutor(1) as thread:  # its exception is raised here, after all earlier batches
        pending = deque(thread.submit(next, decoded, None) for _ in range(FRAMES_AHEAD))
        while (portion := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, decoded, None))
            yield portion


def _decoded(video: Path, data: DataConfig, num: int, every: int, first: int) -> Iterator[Portion]:
    frames = read_frames(video, every)
    while taken := tuple(islice(frames, num)):
        records = [_frame_record(first + place, video, frame) for place, frame in enumerate(taken)]
        first += len(taken)
        samples = [test_sample(record, data) for record in records]
        yield Portion(records, collate(samples, data.canvas_multiple, data.exact_canvas), frames=taken)


def _frame_record(image_id: int, video: Path, frame: Frame) -> Record:
    height, width = frame.pixels.shape[:2]
    record = picture_record(image_id, Path(f"{video}#t={frame.seconds:.3f}"), (height, width))
    return record._replace(load=partial(np.asarray, frame.pixels))  # can be pickled
