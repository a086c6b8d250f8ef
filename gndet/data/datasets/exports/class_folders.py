"""Open a folder of pictures per class, as ImageNet is laid out: ROOT/train/CLASS/a.jpg, ROOT/val/CLASS/b.jpg.

A picture's class is an object that covers it, so every check, limit and share of other data sets holds here, too.  The
classes are the folders of train, sorted by name, or the lines of ROOT/classes.txt.
"""

from functools import partial
from pathlib import Path

from gndet.data.datasets.exports.folders import SPLITS, children, files_below, read_text, set_missing, set_named
from gndet.data.datasets.exports.pictures import Export, Found, Picture, SizeOf
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES
from gndet.text import shown

LIST = "classes.txt"  # in ROOT: a class per line, in the order of the labels


def open_class_folders(annotations: Path, images: Path | None, split: str) -> Export:
    """Find the pictures of each class of a set ("train", "val", "test").

    annotations: ROOT, which holds a folder per set; without such folders it is the set itself.  images: the folder of
    the set, None to find it.  Raises Fault if there is no such folder, or none of a class in it.
    """
    sets = {set_named(path.name): path for path in children(annotations) if path.is_dir() and set_named(path.name)}
    if images is None and sets and split not in sets:
        raise set_missing(annotations, split, [name for name in SPLITS if name in sets])
    home = images or sets.get(split, annotations)
    folders = [path for path in children(home) if path.is_dir()]
    if not folders:
        raise Fault("folder-missing", f"{home}: holds no folder of a class")
    listed = annotations / LIST
    found: Found = []
    units: list[str] = []
    classes = _classes(listed, sets.get("train", home))
    for folder in folders:
        if folder.name not in classes:
            known = listed if listed.is_file() else sets.get("train", home)
            found.append(("class-unknown", f"{shown(str(folder))}: {shown(str(known))} has no such class"))
            continue
        names = files_below(folder, PICTURES)
        if not names:
            found.append(("class-empty", shown(str(folder))))
        units += [f"{folder.name}/{name}" for name in names]
    files = [*([listed] if listed.is_file() else []), *folders]
    return Export(units, partial(_parse, str(home)), classes, home, files, found)


def _classes(listed: Path, train: Path) -> tuple[str, ...]:
    """Return the classes that a file lists, or else the names of the folders of train, sorted."""
    if listed.is_file():
        lines = [line.strip() for line in read_text(listed).splitlines()]
        return tuple(dict.fromkeys(line for line in lines if line))
    return tuple(path.name for path in children(train) if path.is_dir())


def _parse(home: str, unit: str, size_of: SizeOf) -> list[Picture]:
    """Return the picture of a unit CLASS/NAME, with its class as an object that covers it."""
    height, width = size_of(unit)
    thing = {"category": unit.partition("/")[0], "place": unit, "bbox": [0, 0, width, height]}
    return [Picture(unit, (height, width), [thing])]
