"""TensorBoard's event file of a run, written record by record.

torch's SummaryWriter writes from a thread that a full disk ends for good; here an event that has no room waits.
"""

import os
import socket
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from gndet.files import RecordFile

HISTOGRAM_BINS = 30  # TensorBoard shows as many; its own 1,500 take ten times as long
_NUMBERS = count()  # a process may open several files within a second


class EventFile:
    """The events of one run, from one process; every method raises OSError where the disk is full."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file in a folder; what older files there say of `first_step` and later is to be forgotten."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.file = RecordFile(folder / f"events.out.tfevents.{name}")
        self._records = RecordWriter(_Appender(self.file))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add numbers by their tags, as one record: all of them wait, or none."""
        self._add(step, Summary(value=[one for tag, x in values.items() for one in summary.scalar(tag, x).value]))

    def picture(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add a picture (H, W, 3) uint8."""
        self._add(step, summary.image(tag, picture, dataformats="HWC"))

    def precision_recall(self, step: int, tag: str, precision: Sequence[float], recall: Sequence[float]) -> None:
        """Add a precision-recall curve, by rising recall; counts, which COCO's has not, are zero."""
        zeros = np.zeros(len(recall))
        falling = (np.array(precision)[::-1], np.array(recall)[::-1])
        self._add(step, summary.pr_curve_raw(tag, zeros, zeros, zeros, zeros, *falling, num_thresholds=len(recall)))

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Add how finite values are spread."""
        self._add(step, summary.histogram(tag, values, HISTOGRAM_BINS))

    def _add(self, step: int, made: Summary) -> None:
        self._write(Event(step=step, summary=made))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class _Appender:
    """What RecordWriter writes to: it hands over each record, with its length and checksums, in one piece."""

    def __init__(self, file: RecordFile) -> None:
        self.write = file.append
