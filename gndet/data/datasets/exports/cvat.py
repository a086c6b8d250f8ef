"""Read CVAT's XML 1.1, for images and for video.

A file is parsed once to find its labels and pictures; then processes parse the pictures.  A file that declares a
document type is refused, so nothing is fetched or expanded.
"""

import io
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

from gndet.data.datasets.columns import Item, Size
from gndet.data.datasets.exports.cvat_shapes import Attributes, Shape, add_object, to_integer, to_size
from gndet.data.datasets.exports.engine import Export, Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import SPLITS, find_images, set_missing, set_named
from gndet.data.datasets.exports.geometry import join_groups
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.image_folder import read_head
from gndet.data.datasets.images import PICTURES
from gndet.text import brief, printable

FOLDERS = ("images", "images/default", "", "data", "../images")  # where the pictures may lie, from the XML file
OUTLINED = (None, "any", "rectangle", "polygon", "mask", "ellipse")  # types of labels whose shapes are objects
_FRAME = re.compile(r"frame_(\d+)\.\w+")  # CVAT's names for the pictures of a video
_BOMS = {b"\xff\xfe": "UTF-16LE", b"\xfe\xff": "UTF-16BE"}

Start = Callable[[int, str, Attributes, int], None]  # depth (1 is the outermost), name, attributes, line


class Unit(NamedTuple):
    """The element of a picture."""

    start: int  # bytes
    end: int
    line: int


class Index(NamedTuple):
    """What a file holds."""

    labels: dict[str, str | None]  # types by name
    frame: tuple[str | None, str | None]  # height, width of a video
    images: list[Unit]
    names: list[tuple[str, str | None]]  # of the images, with their subsets
    tracks: int
    encoding: str | None


def open_cvat(annotations: Path, images: Path | None, split: str) -> Export:
    """Open an XML file; the labels that it declares are the classes, in their order.

    images: the image folder; None: it is found near the file.  split: train, val or test, to read only that subset of a
    project that has subsets of these names.
    Raises Fault if the file is not CVAT's XML, has no such subset, or describes a video whose frames are not there.
    """
    index = _read_index(annotations)
    if not index.images and not index.tracks:
        raise Fault("data-unknown", f"{annotations}: holds no picture")
    notes = []
    if others := [name for name, kind in index.labels.items() if kind not in OUTLINED]:
        notes.append(f"labels of points, lines or tags are no classes: {', '.join(map(printable, others))}")
    if index.images and index.tracks:
        notes.append(f"{index.tracks} tracks beside the images are left out")
    classes = tuple(name for name, kind in index.labels.items() if kind in OUTLINED) or None
    units: Sequence[Any]
    parse: Callable[[Any, SizeOf], list[Picture]]
    if index.tracks and not index.images:
        near = [annotations.parent / name for name in FOLDERS]
        folder = images or next((folder for folder in near if _frames(folder)), near[0])
        if not _frames(folder):
            where = f"{folder} has no pictures named frame_000000.jpg or the like"
            raise Fault("frames-missing", f"{annotations}: is CVAT's XML for video, and {where}")
        units, parse = [annotations], partial(_parse_video, folder, to_size(*index.frame))
    else:
        chosen = _in_split(annotations, [subset for _, subset in index.names], split)
        names = ("/".join(filter(None, (subset, name))) for name, subset in index.names)
        folder = images or find_images(annotations.parent, FOLDERS, list(names))
        units = [index.images[i] for i in chosen]
        parse = partial(_parse_image, annotations, folder, index.encoding)
    return Export(units, parse, classes, folder, [annotations], notes=tuple(notes))


def cvat_sets(path: Path) -> list[str]:
    """Return which of train, val and test a project's file has as subsets, [] if none.  Raises Fault and OSError."""
    subsets = {_set_of(subset) for _, subset in _read_index(path).names}
    return [name for name in SPLITS if name in subsets]


def _set_of(subset: str | None) -> str | None:
    return set_named(subset or "") or None


def _in_split(path: Path, subsets: list[str | None], split: str) -> list[int]:
    """Return the indices of the pictures to read; all, unless subsets are named after train, val or test."""
    sets = [_set_of(subset) for subset in subsets]
    if not split or not any(sets):
        return list(range(len(sets)))
    chosen = [i for i, name in enumerate(sets) if name == split]
    if not chosen:
        raise set_missing(path, split, sorted({printable(subset) for subset in subsets if subset}))
    return chosen


def _read_index(path: Path) -> Index:
    """Parse a whole file.  Raises Fault if it is not CVAT's XML, and OSError."""
    parser = _parser(path, None)
    around: list[str] = []
    fields: dict[str, Attributes] = {"label": {}, "original_size": {}}  # of the last of these elements
    labels: dict[str, str | None] = {}
    images: list[Unit] = []
    names: list[tuple[str, str | None]] = []
    tracks, encoding = 0, _BOMS.get(read_head(path)[:2])

    def declare(version: str, declared: str | None, standalone: int) -> None:
        nonlocal encoding
        encoding = encoding or declared

    def start(name: str, attributes: Attributes) -> None:
        nonlocal tracks
        around.append(name)
        if len(around) == 1 and name != "annotations":
            raise Fault("data-unknown", f"{path}: its outermost element is {brief(name)}, CVAT's is 'annotations'")
        if len(around) == 2:
            close()
        if len(around) == 2 and name == "image":
            images.append(Unit(parser.CurrentByteIndex, 0, parser.CurrentLineNumber))
            names.append((attributes.get("name", ""), attributes.get("subset")))
        elif len(around) == 2 and name == "track":
            tracks += 1
        elif name == "label":
            fields[name] = {}

    def close() -> None:
        if images and not images[-1].end:  # until whatever follows it
            images[-1] = images[-1]._replace(end=parser.CurrentByteIndex)

    def finish(name: str) -> None:
        around.pop()
        if not around:
            close()
        label = fields["label"]
        if name == "label" and "parent" not in label and label.get("name"):  # not a point of a skeleton
            labels[label["name"]] = label.get("type")

    def text(words: str) -> None:
        if len(around) > 3 and around[1] == "meta" and around[-2] in fields:
            field = fields[around[-2]]
            field[around[-1]] = field.get(around[-1], "") + words

    parser.XmlDeclHandler, parser.CharacterDataHandler = declare, text
    parser.StartElementHandler, parser.EndElementHandler = start, finish
    with path.open("rb") as file:
        _feed(parser, path, 1, file)
    frame = fields["original_size"]
    return Index(labels, (frame.get("height"), frame.get("width")), images, names, tracks, encoding)


def _parser(path: Path, encoding: str | None) -> expat.XMLParserType:
    """Return a parser of a file that refuses a document type."""
    parser = expat.ParserCreate(encoding)
    parser.buffer_text = True

    def refuse(*_: Any) -> None:
        raise Fault("xml-broken", f"{path}: declares a document type, as CVAT does not; remove its <!DOCTYPE ...>")

    parser.StartDoctypeDeclHandler = refuse
    return parser


def _feed(parser: expat.XMLParserType, path: Path, line: int, file: BinaryIO) -> None:
    """Parse a document that begins in a line of a file.  Raises Fault if it is broken, and what the handlers raise."""
    try:
        parser.ParseFile(file)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        if error.code == expat.errors.codes[expat.errors.XML_ERROR_INVALID_TOKEN] and not _is_utf8(path):
            reason += "; its text is not in UTF-8, and it declares no other encoding"
        raise Fault("xml-broken", f"{path}, line {line - 1 + error.lineno}: not well-formed XML: {reason}") from None
    except (LookupError, ValueError) as error:  # an encoding that is unknown, or has several bytes per letter
        raise Fault("xml-broken", f"{path}: {error}; save it in UTF-8") from None


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_elements(path: Path, file: BinaryIO, line: int, encoding: str | None, handle: Start) -> None:
    """Call handle for each element of a document that begins in a line of a file."""
    parser, depth = _parser(path, encoding), 0

    def start(name: str, attributes: Attributes) -> None:
        nonlocal depth
        depth += 1
        handle(depth, name, attributes, line - 1 + parser.CurrentLineNumber)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartElementHandler, parser.EndElementHandler = start, end
    _feed(parser, path, line, file)


def _parse_image(path: Path, folder: Path, encoding: str | None, unit: Unit, size_of: SizeOf) -> list[Picture]:
    """Parse the element of a picture."""
    with path.open("rb") as file:
        file.seek(unit.start)
        content = file.read(unit.end - unit.start)
    name, size = "", None
    items: list[tuple[Any, Item]] = []
    findings: Found = []

    def handle(depth: int, element: str, attributes: Attributes, line: int) -> None:
        nonlocal name, size
        if depth == 1:
            name, size = _file_name(folder, attributes), to_size(attributes.get("height"), attributes.get("width"))
        elif depth == 2:
            shape = Shape(element, attributes, attributes.get("label"), f"{path.name}, line {line}")
            add_object(shape, lambda: size or size_of(name), items, findings)

    _read_elements(path, io.BytesIO(content), unit.line, encoding, handle)
    objects = join_groups(items, lambda: size or size_of(name), findings)
    return [Picture(name, size, objects, findings)]


def _file_name(folder: Path, attributes: Attributes) -> str:
    """Return the file of a picture, which may lie in a folder for its subset; names in a video have no suffix."""
    name, subset = attributes.get("name", ""), attributes.get("subset")
    names = [f"{subset}/{name}", name] if subset else [name]
    if not name.lower().endswith(PICTURES):
        names += [known + suffix for known in names for suffix in (*PICTURES, ".PNG")]
    return next((known for known in names if (folder / known).is_file()), name) if len(names) > 1 else name


def _parse_video(folder: Path, size: Size | None, path: Path, size_of: SizeOf) -> list[Picture]:
    """Parse the tracks of a file.  Returns a picture per frame, also of those without an object."""
    frames = _frames(folder)
    order = sorted(frames)
    items: dict[int, list[tuple[Any, Item]]] = {number: [] for number in order}
    findings: dict[int, Found] = {number: [] for number in order}
    track: Attributes = {}
    last: int | None = None  # the frame of the track's last shape, if it is inside the picture
    tasks = set()

    def name_of(frame: int) -> str:
        return frames.get(frame, f"frame_{frame:06d}.jpg")

    def size_in(frame: int) -> Callable[[], Size]:
        return lambda: size or size_of(name_of(frame))

    def handle(depth: int, element: str, attributes: Attributes, line: int) -> None:
        nonlocal track, last
        if depth == 2:
            track, last = attributes if element == "track" else {}, None
            tasks.add(attributes.get("task_id"))
        if depth != 3 or not track:
            return
        frame, place = to_integer(attributes.get("frame")), f"{path.name}, line {line}"
        if frame is None:
            findings[order[0]].append(("shape-malformed", f"{place}: frame {brief(attributes.get('frame'))}"))
            return
        found = findings.setdefault(frame, [])
        if last is not None and bisect_left(order, frame) - bisect_left(order, last) > 1:
            found.append(("frames-skipped", f"{place}: the track has no shape between the frames {last} and {frame}"))
        outside = attributes.get("outside") == "1"
        last = None if outside else frame
        if not outside:
            shape = Shape(element, attributes | {"group_id": track.get("group_id", "")}, track.get("label"), place)
            add_object(shape, size_in(frame), items.setdefault(frame, []), found)

    with path.open("rb") as file:
        _read_elements(path, file, 1, None, handle)
    tasks.discard(None)
    if len(tasks) > 1:
        raise Fault("frames-missing", f"{path}: holds {len(tasks)} tasks, whose frames have the same numbers")
    pictures = []
    for number in sorted(findings):
        objects = join_groups(items.get(number, []), size_in(number), findings[number])
        pictures.append(Picture(name_of(number), size, objects, findings[number]))
    return pictures


def _frames(folder: Path) -> dict[int, str]:
    """Return the pictures of a video by the number of their frame, {} if the folder has none or cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    found = ((_FRAME.fullmatch(name), name) for name in names if name.lower().endswith(PICTURES))
    return {int(match[1]): name for match, name in found if match}
