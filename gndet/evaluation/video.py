"""Read and write the frames of a video with PyAV, the optional extra `video`, whose wheels contain FFmpeg.

(h, w) frame.  Pictures are (h, w, 3) uint8 RGB, upright as a player shows them.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.errors import DataError, OutputError
from gndet.files import Kind, written_whole

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]  # the extra `video` is not installed

MARK = b"\0\0\0\x0dfreegndet"  # a box that players skip: its length in 4 bytes, its type, its content
VIDEO = Kind("a video that gndet drew", re.escape(MARK) + rb"\Z")
ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first available is used; the last is FFmpeg's own
CLOCK = 90_000  # ticks per second of written files: MPEG's, a multiple of every usual frame rate
USUAL_RATE = Fraction(25)  # frames per second if a file does not state them


class Frame(NamedTuple):
    """A picture of a video."""

    index: int  # type: ignore[assignment]  # hides tuple.index; in the video, from 0
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
    """Decode every `every`th frame of a video, starting with the first.

    Raises DataError without PyAV, for no video and, after all earlier frames, for one that is damaged or has no frame.
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
                raise DataError(f"{path}: cannot be read as a video: it has no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a video: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def video_writer(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray, float], None]]:
    """Write an MP4 file; yield a function that appends a picture (h, w, 3), to be shown from a time in seconds on.

    rate: frames per second that the encoder expects.  Pictures are scaled to the size of the first one, whose edges are
    rounded up to even numbers.  After an error, or without pictures, no file is left.  Raises OutputError.
    """
    container: Any = None
    stream: Any = None
    start, last = 0.0, -1  # start: seconds of the first picture; last: ticks of the last
    try:
        with ExitStack() as stack:

            def write(pixels: np.ndarray, seconds: float) -> None:
                nonlocal container, stream, start, last
                even = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
                if container is None:
                    file = stack.enter_context(written_whole(path))
                    stack.callback(lambda: file.write(MARK))
                    container = stack.enter_context(av.open(file, "w", format="mp4"))
                    stream, start = _add_stream(container, rate, even.shape[:2]), seconds
                frame = av.VideoFrame.from_ndarray(even, format="rgb24")
                frame = frame.reformat(stream.width, stream.height, "yuv420p")
                last = max(round((seconds - start) * CLOCK), last + 1)  # times must increase
                frame.pts, frame.time_base = last, Fraction(1, CLOCK)
                container.mux(stream.encode(frame))

            yield write
            if container is not None:
                container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _add_stream(container: Any, rate: Fraction, size: tuple[int, int]) -> Any:
    stream = container.add_stream(next(name for name in ENCODERS if name in av.codecs_available), rate=rate)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"  # what every player shows
    stream.codec_context.time_base = Fraction(1, CLOCK)
    return stream
