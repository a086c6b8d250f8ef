"""What a reader of an export hands to the engine: pictures with their objects, as the export has them, unchecked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Found = list[tuple[str, str]]  # what is wrong: codes of FAULTS, and words that begin with the place
SizeOf = Callable[[str], tuple[int, int]]  # file_name -> height, width of the picture, upright; raises Fault


class Picture(NamedTuple):
    """A picture with its objects; the engine checks all of it by the rules of COCO's format.

    An object is a dict with COCO's keys (bbox [x, y, width, height] in pixels, segmentation, iscrowd, area), "category"
    (the name of its class) and "place" (where it is, like "labels/a.txt, line 3").
    """

    file_name: str  # relative to the image folder
    size: tuple[Any, Any] | None  # height, width as the export states them; None: read from the picture's header
    objects: list[dict[str, Any]]
    findings: Sequence[tuple[str, str]] = ()  # as in Found


class Export(NamedTuple):
    """An export that was opened: its units, parsed in parallel, and the classes that it declares."""

    units: Sequence[Any]  # picklable, in a fixed order: a unit per annotation file, or per picture
    parse: Callable[[Any, SizeOf], list[Picture]]  # picklable; runs in worker processes.  Raises Fault
    classes: tuple[str, ...] | None  # in label order; None: the names that occur, sorted
    images: Path  # the folder that file_name is relative to
    files: Sequence[Path]  # every annotation file, for the key of the cache
    findings: Sequence[tuple[str, str]] = ()  # as in Found
    notes: tuple[str, ...] = ()  # lines to show
