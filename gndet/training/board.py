"""TensorBoard's file of a run, written by the thread that logs.

The writer of TensorBoard is a thread, which prints its traceback when the disk is full and loses what it has not
written, and whose locks a forked loader process would inherit.
"""

import errno
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gndet.files import open_to_append

VERSION = "brain.Event:2"  # of TensorBoard's event files


class Board:
    """An event file that grows by whole events."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Start a new file in a folder.

        first_step: TensorBoard hides the entries of other files from this step on.  Raises OSError.
        """
        if folder.is_symlink():
            folder.unlink()  # it would lead out of the run folder
        folder.mkdir(exist_ok=True)
        number = len(os.listdir(folder))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{number}"
        self._file = open_to_append(folder / name)
        self._records = RecordWriter(self)
        self._add(Event(step=first_step, file_version=VERSION))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int) -> None:
        """Write a summary of torch.utils.tensorboard.summary.  Raises OSError; then nothing of it is written."""
        self._add(Event(step=step, summary=summary))

    def write(self, data: bytes) -> None:
        """Append the bytes of a record; RecordWriter calls this."""
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(data) < len(data):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def is_removed(self) -> bool:
        """Whether another program has removed the file."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
