"""Decode every picture of a data set, in processes that a damaged file may crash or hang."""

import hashlib
import signal
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import read_image
from gndet.data.workers import Death, Failure, map_ahead

TIME_LIMIT = 120.0  # seconds for one picture; 100 million pixels take a while


class PictureFile(NamedTuple):
    """A picture to decode."""

    path: Path
    size: tuple[int, int] | None  # height, width as the annotation file says
    max_pixels: int


class Decoded(NamedTuple):
    """What decoding a picture showed."""

    faults: list[tuple[str, str]]  # code of FAULTS, and words that name the file
    digest: str  # SHA-256 of the file, "" where it cannot be read


def decode(picture: PictureFile) -> Decoded:
    """Decode a picture.  Returns its faults and its file's hash."""
    faults: list[tuple[str, str]] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # what is unusual in a picture becomes a fault
            read_image(*picture, note=lambda code, words: faults.append((code, f"{picture.path}: {words}")))
    except Fault as fault:
        faults.append((fault.code, str(fault)))
    try:
        with picture.path.open("rb") as file:
            return Decoded(faults, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError:
        return Decoded(faults, "")


def decode_all(
    pictures: Sequence[PictureFile],
    processes: int,
    decoder: Callable[[PictureFile], Decoded] = decode,
    time_limit: float = TIME_LIMIT,
) -> Generator[Decoded, None, None]:
    """Decode pictures in parallel.  Yields what each showed, in order.

    time_limit: seconds for one picture.  A picture whose process dies, or is killed for exceeding the limit, is a
    picture-crash.  Raises MachineError when no process can be started.
    """

    def crashed(picture: PictureFile, death: Death, _: int) -> Decoded:
        return _crash(picture, _end_in_words(death.status, time_limit))

    results = map_ahead(decoder, pictures, workers=processes, on_death=crashed, time_limit=time_limit)
    with closing(results):
        for picture, result in results:
            yield _crash(picture, result.text.splitlines()[-1]) if isinstance(result, Failure) else result


def _crash(picture: PictureFile, words: str) -> Decoded:
    return Decoded([("picture-crash", f"{picture.path}: {words}")], "")


def _end_in_words(status: int | None, time_limit: float) -> str:
    """Say how the process of a picture ended, from multiprocessing's exitcode; None: killed after the time limit."""
    if status is None:
        return f"took over {time_limit:.0f} s to decode"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return f"ended the process that decoded it {how}"
