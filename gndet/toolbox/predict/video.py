"""Read and write the frames of a video with PyAV, the optional extra `video`, whose wheels contain FFmpeg.

(h, w) frame.  Pictures are (h, w, 3) uint8 RGB, upright as a player shows them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from gndet.errors import DataError, OutputError
from gndet.files import written_whole

try:
    import av
except ImportError:
    av = None

ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first available is used; the last is FFmpeg's own
CLOCK = 90_000  # ticks per second of written files: MPEG's, a multiple of every usual frame rate
USUAL_RATE = Fraction(25)  # frames per second if a file does not say


class Frame(NamedTuple):
    """A picture of a video."""

    index: int  # in the video, from 0
    seconds: float  # when it is shown, from the video's start
    pixels: np.ndarray  # (h, w, 3) uint8 RGB


def video_rate(path: Path, max_pixels: int) -> Fraction:
    """Read the frames per second of a video.

    Raises DataError without PyAV, for a file that is no video, and for frames over max_pixels.
    """
    with _opened(path) as (_, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        if height * width > max_pixels:
            raise DataError(
                f"{path}: frames of {height} x {width} pixels, over the limit of {max_pixels} (data.max_pixels)"
            )
        return stream.average_rate or stream.guessed_rate or USUAL_RATE


def read_frames(path: Path, every: int) -> Iterator[Frame]:
    """Decode every `every`th frame of a video, from the first on.

    Raises DataError as `video_rate` does and, after the frames before it, for a file that is damaged or has no frame.
    """
    count = 0
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or USUAL_RATE
        for frame in container.decode(stream):
            if count % every == 0:
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                seconds = float(count / rate) if frame.time is None else frame.time
                yield Frame(count, seconds, np.ascontiguousarray(turned))
            count += 1
    if not count:
        raise DataError(f"{path}: cannot be read as a video: it has no frame")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file as PyAV's container and its first video stream.  Raises DataError, also for errors in the context."""
    if av is None:
        raise DataError(f"{path}: videos are read by PyAV, which is not installed: pip install av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: cannot be read as a video: it has no pictures in it")
            yield container, container.streams.video[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a video: {getattr(error, 'strerror', None) or error}") from None


class VideoWriter:
    """An MP4 file written frame by frame, with the times of its source.

    As a context: the file gets its name at the end, or is removed after an error.  Raises OutputError.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        """rate: frames per second that the encoder expects."""
        self.path, self.rate = path, rate
        self.place = ExitStack()
        self.stream: Any = None
        self.start, self.last = 0.0, -1  # seconds of the first frame, ticks of the last one

    def __enter__(self) -> "VideoWriter":
        self.partial = self.place.enter_context(written_whole(self.path))
        with self._told():
            self.container = av.open(str(self.partial), "w", format="mp4")
        return self

    def write(self, pixels: np.ndarray, seconds: float) -> None:
        """Append a picture (h, w, 3), scaled to the size of the first picture; edges are rounded up to even numbers."""
        even = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        with self._told():
            if self.stream is None:
                codec = next(name for name in ENCODERS if name in av.codecs_available)
                self.stream = self.container.add_stream(codec, rate=self.rate)
                self.stream.height, self.stream.width = even.shape[:2]
                self.stream.pix_fmt = "yuv420p"  # what every player shows
                self.stream.codec_context.time_base = Fraction(1, CLOCK)
                self.start = seconds
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame = frame.reformat(self.stream.width, self.stream.height, "yuv420p")
            self.last = max(round((seconds - self.start) * CLOCK), self.last + 1)  # times must increase
            frame.pts, frame.time_base = self.last, Fraction(1, CLOCK)
            self.container.mux(self.stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.place, self._told():
            if kind is None and self.stream is not None:
                self.container.mux(self.stream.encode())
            self.container.close()
            if kind is not None or self.stream is None:
                self.partial.unlink()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise OutputError if FFmpeg cannot write."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from None
