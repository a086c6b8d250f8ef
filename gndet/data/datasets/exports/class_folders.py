"""Open a folder of pictures per class, as ImageNet is laid out: ROOT/train/CLASS/a.jpg, ROOT/val/CLASS/b.jpg.

A picture's class is an object that covers it, so every check, limit and share of other data sets holds here, too.  The
classes are the folders of train, sorted by name, or the lines of ROOT/classes.txt.  A list beside the sets may give
folders readable names: classes.txt, or ImageNet's.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gndet.data.datasets.exports.engine import Export, Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import (
    SPLITS,
    children,
    files_below,
    read_json,
    read_text,
    set_missing,
    set_named,
)
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES
from gndet.text import shown

LIST = "classes.txt"  # in ROOT: a class per line, in the order of the labels: its folder, then a name if it has another
SYNSETS = "LOC_synset_mapping.txt"  # of ImageNet at Kaggle: "n01440764 tench, Tinca tinca"; the first name is taken
INDEX = "imagenet_class_index.json"  # of Keras: {"0": ["n01440764", "tench"], ...}


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
    listed = [annotations / name for name in (LIST, SYNSETS, INDEX) if (annotations / name).is_file()][:1]
    found: Found = []
    units: list[str] = []
    train = sets.get("train", home)
    names = _names(train, listed)
    if len(names) == 1:
        inner = [path.name for path in children(folders[0]) if path.is_dir()]
        within = f", which holds folders: {', '.join(map(shown, inner[:3]))}; is data.root one level too high?"
        found.append(("class-single", shown(str(folders[0])) + (within if inner else "")))
    for folder in folders:
        if folder.name not in names:
            known = listed[0] if listed and listed[0].name == LIST else train
            found.append(("class-unknown", f"{shown(str(folder))}: {shown(str(known))} has no such class"))
            continue
        pictures = files_below(folder, PICTURES)
        if not pictures:
            found.append(("class-empty", shown(str(folder))))
        units += [f"{folder.name}/{name}" for name in pictures]
    return Export(units, partial(_parse, names), tuple(names.values()), home, [*listed, *folders], found)


def _names(train: Path, listed: Iterable[Path]) -> dict[str, str]:
    """Return the class of each folder, in the order of the labels.

    train: the folder of the training set; listed: the file that names the classes, if there is one.
    Two folders of one name (ImageNet's cranes) get it with the folder's name behind.
    """
    folders = {path.name: path.name for path in children(train) if path.is_dir()}
    names = folders
    for path in listed:
        if path.name == LIST:
            names = _pairs(read_text(path), folders)
        else:
            known = _indexed(path) if path.name == INDEX else _pairs(read_text(path), folders)
            names = {folder: known.get(folder, folder).partition(",")[0] for folder in folders}
    counts = Counter(names.values())
    return {folder: name if counts[name] == 1 else f"{name} ({folder})" for folder, name in names.items()}


def _pairs(text: str, folders: Collection[str]) -> dict[str, str]:
    """Read lines like `FOLDER` and `FOLDER NAME`; what begins with no folder's name is a class without a folder."""
    lines = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    names = dict[str, str]()
    for line in lines:
        folder, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
        is_pair = line not in folders and folder in folders and folder not in lines and name.strip()
        names.update({folder: name.strip()} if is_pair else {line: line})
    return names


def _indexed(path: Path) -> dict[str, str]:
    """Read INDEX.  Raises Fault unless each value is a folder and a name."""
    content = read_json(path)
    pairs: list[Any] = list(content.values()) if isinstance(content, dict) else [None]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise Fault("json-broken", f'{path}: expected {{"0": ["n01440764", "tench"], ...}}')
    return dict(pairs)


def _parse(names: dict[str, str], unit: str, size_of: SizeOf) -> list[Picture]:
    """Return the picture of a unit FOLDER/NAME, with its class as an object that covers it."""
    height, width = size_of(unit)
    thing = {"category": names[unit.partition("/")[0]], "place": unit, "bbox": [0, 0, width, height]}
    return [Picture(unit, (height, width), [thing])]
