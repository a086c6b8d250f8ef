"""Open an export in YOLO's format: a text file of rows per picture, found by a data.yaml, by lists or by its folders.

Read are the exports of Ultralytics, Roboflow (also for Darknet), CVAT (both kinds) and Label Studio.  A picture without
a label file, or with an empty one, is background.  Nothing that a data.yaml names is run or downloaded.
"""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from gndet.data.datasets.exports.engine import Export
from gndet.data.datasets.exports.folders import (
    ALIASES,
    candidates,
    children,
    common_folder,
    entered,
    files_below,
    read_text,
    set_missing,
)
from gndet.data.datasets.exports.yolo_files import Group, Labels, Opened, in_folder, in_list, in_tree, sets_in_folder
from gndet.data.datasets.exports.yolo_rows import Unit, parse_labels, refuse_other_rows
from gndet.data.datasets.faults import Fault, several
from gndet.data.datasets.formats import name_format, sniff
from gndet.text import brief, shown

YAML, DARKNET = (".yaml", ".yml"), ".data"
NAMES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")  # a class name per line
USUAL = ("data", "dataset", "obj")  # names of data.yaml and of Darknet's file
MAX_BYTES = 4_000_000  # of a data.yaml; 13,000 classes take 500 kB, and reading takes 5 s per MB
Tree = dict[str, Any]  # text, lists of text, or mappings of text, by key


def open_yolo(annotations: Path, images: Path | None, split: str) -> Export:
    """Find the pictures, label files and class names of a set ("train", "val", "test"; "" for the whole export).

    annotations: a data.yaml, a Darknet file, a list of pictures, or a folder; images: the folder of the pictures, None
    to find it.
    Raises Fault if there is no such set, picture or label, or if the rows are of another kind.
    """
    return _open(annotations, images, split, outlines=False)


def yolo_sets(annotations: Path) -> list[str]:
    """List the sets of an export by data.yaml, or by its folders and lists; [""] if it is not divided.

    Programs name a test set that they have not written, so it counts only if it is there.
    """
    file, tree = _find_tree(annotations)
    named = dict.fromkeys(ALIASES[key] for key in tree if key in ALIASES and tree[key])
    if file and "test" in named:
        try:
            _find_pictures(annotations, file, tree, None, "test", Opened([], []))
        except Fault:
            del named["test"]
    return list(named) or sets_in_folder(annotations if annotations.is_dir() else annotations.parent)


def open_outlines(annotations: Path, images: Path | None, split: str) -> Export:
    """Open an export as `open_yolo` does, but read rows that may be oriented boxes or keypoints as outlines."""
    return _open(annotations, images, split, outlines=True)


def _open(annotations: Path, images: Path | None, split: str, outlines: bool) -> Export:
    if not annotations.exists():
        raise Fault("json-unreadable", f"{annotations}: no such file or folder")
    annotations = entered(annotations)
    file, tree = _find_tree(annotations)
    folder = annotations if annotations.is_dir() else annotations.parent
    opened = Opened([file] if file else [], [])
    groups = _find_pictures(annotations, file, tree, images, split, opened)
    root = common_folder([place for place, _ in groups])
    matched = Labels(folder)
    units: list[Unit] = []
    for place, names in groups:
        below = os.path.relpath(place, root)
        prefix = "" if below == "." else f"{below}/"
        units += [(prefix + name, label) for name, label in matched.match(place, names)]
    if not any(label for _, label in units):
        units = matched.anywhere(root, [name for name, _ in units])
    home, labels = str(folder), [label for _, label in units if label]
    if not labels:
        words = (
            f"{several(len(units), 'picture')} in {root}, like {brief(units[0][0])}, but no label file of such a name"
        )
        raise Fault("labels-missing", f"{words}; {matched.what_is_there()}")
    refuse_other_rows(home, labels, _num_keypoints(tree), outlines)
    near = [folder, Path(root), Path(home, labels[0]).parent]
    classes = (_names_of(file, tree, opened) if file else {}) or _names_near(near, opened)
    found = matched.strays()
    if not classes:
        found.append(("names-missing", f"{folder}: neither names in a data.yaml nor a classes.txt"))
    files = opened.files + [Path(home, label) for label in labels]
    parse = partial(parse_labels, home, classes)
    return Export(units, parse, tuple(classes.values()) or None, Path(root), files, found, tuple(opened.notes))


def _find_tree(annotations: Path) -> tuple[Path | None, Tree]:
    """Return the data.yaml or Darknet file that is given, or lies in the given folder, and its content."""
    if annotations.is_file():
        is_tree = annotations.suffix.lower() in (*YAML, DARKNET)
        return (annotations, _read_tree(annotations)) if is_tree else (None, {})
    for file in sorted(children(annotations), key=lambda file: file.stem not in USUAL):
        if file.suffix.lower() in (*YAML, DARKNET) and file.is_file():
            try:
                tree = _read_tree(file)
            except Fault:
                if file.stem in USUAL:
                    raise
                continue  # a file of another program
            if "names" in tree or isinstance(tree.get("train"), str | list):
                return file, tree
    return None, {}


def _find_pictures(
    annotations: Path, file: Path | None, tree: Tree, images: Path | None, split: str, opened: Opened
) -> list[Group]:
    """Return the pictures of a split by folder.  Raises Fault if there is no such split, or no picture in it."""
    keys = [key for key in tree if key in ALIASES and tree[key]]
    if annotations.is_file() and file is None:
        if sniff(annotations) == "yolo":
            raise Fault("data-unknown", f"{annotations}: {name_format(annotations)}")
        groups = in_list(annotations, [*([images] if images else []), annotations.parent], opened)
    elif file is None or not keys:
        groups = in_folder(images or (file.parent if file else annotations), split, images is not None, opened)
    else:
        chosen = [key for key in keys if split in ("", ALIASES[key])]
        if not chosen:
            raise set_missing(file, split, keys)
        bases = [file.parent / os.path.expanduser(str(tree.get("path") or "")).replace("\\", "/"), file.parent]
        texts = [(key, str(value)) for key in chosen for value in _as_list(tree[key])]
        near = [images] if images else []
        if images and not all(text.endswith(".txt") for _, text in texts):  # lists tell the sets of a single folder
            groups = in_folder(images, split, True, opened)
        else:
            found = (in_tree(text, bases, f"{file}: {key}", near, opened) for key, text in texts)
            groups = list(chain.from_iterable(found))
    if not any(names for _, names in groups):
        labels = files_below(groups[0][0], (".txt",))
        words = f", but {several(len(labels), 'text file')}, like {brief(labels[-1])}" if labels else ""
        raise Fault("folder-missing", f"{groups[0][0]}: no pictures there{words}; `images` names their folder")
    return [_inmost(*group) for group in groups if group[1]]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _inmost(folder: str, names: list[str]) -> Group:
    """Name pictures relative to the folder that holds all of them, often `images`."""
    below = names[0].rpartition("/")[0]
    while below and not all(name.startswith(f"{below}/") for name in names):
        below = below.rpartition("/")[0]
    return (f"{folder}/{below}", [name[len(below) + 1 :] for name in names]) if below else (folder, names)


def _read_tree(file: Path) -> Tree:
    """Read a data.yaml, or a Darknet file of `key = value` lines, as text.  Raises Fault."""
    if file.stat().st_size > MAX_BYTES:
        raise Fault("yaml-broken", f"{file}: over {MAX_BYTES:,} bytes, expected names and folders")
    text = read_text(file)
    if file.suffix.lower() == DARKNET:
        pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line]
        return {key.strip(): value.strip() for key, value in pairs}
    try:
        tree = _plain(yaml.compose(text, yaml.SafeLoader), depth=2)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Fault("yaml-broken", f"{file}, line {line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Fault("yaml-broken", f"{file}: not valid YAML: {brief(str(error))}") from None
    return tree if isinstance(tree, dict) else {}


def _plain(node: yaml.Node | None, depth: int) -> Any:
    """Return a node as text, lists and dicts, so that a class named `no` stays one; nothing deeper than depth."""
    if isinstance(node, yaml.ScalarNode):
        return "" if node.tag.endswith(":null") else node.value
    if depth and isinstance(node, yaml.SequenceNode):
        return [_plain(value, depth - 1) for value in node.value]
    if depth and isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value, depth - 1) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    return None


def _names_near(folders: Sequence[Path], opened: Opened) -> dict[int, str]:
    """Return the classes that a file in one of these folders, or in the two above each, names; {} if there is none."""
    places = [folders[0], *(place for start in folders for place in (start, *start.absolute().parents[:2]))]
    for place in dict.fromkeys(places):
        for path in (place / name for name in NAMES):
            if path.is_file():
                opened.notes.append(f"class names from {shown(str(path))}")
                return _unique(dict(enumerate(_lines(path, opened))), path)
        file, tree = _find_tree(place)
        if file and (classes := _names_of(file, tree, opened)):
            opened.notes.append(f"class names from {shown(str(file))}")
            opened.files.append(file)
            return classes
    return {}


def _lines(path: Path, opened: Opened) -> list[str]:
    opened.files.append(path)
    return read_text(path).rstrip().splitlines()


def _names_of(file: Path, tree: Tree, opened: Opened) -> dict[int, str]:
    """Return the class names of a data.yaml: a list, a map by number, a file, or by their count."""
    names, count = tree.get("names"), str(tree.get("nc", tree.get("classes")) or "")
    if isinstance(names, str) and names:
        listed = next((place for place in candidates(names, [file.parent]) if place.is_file()), None)
        if listed is None:
            raise Fault("yaml-broken", f"{file}: names: {brief(names)}, expected a list, or a file of names")
        names = _lines(listed, opened)
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not names:
        return {number: str(number) for number in range(int(count))} if count.isdecimal() and len(count) < 5 else {}
    try:
        classes = dict(sorted((int(number), name) for number, name in names.items()))
    except (TypeError, ValueError):
        classes = {-1: ""}
    if min(classes) < 0 or not all(isinstance(name, str) for name in classes.values()):
        raise Fault("yaml-broken", f"{file}: names: {brief(tree['names'])}, expected a name for each class number")
    if count and count != str(len(classes)):
        opened.notes.append(f"{file}: nc is {brief(count)}, but there are {len(classes)} names, which are used")
    return _unique(classes, file)


def _unique(names: dict[int, str], file: Path) -> dict[int, str]:
    """Return the names stripped, without empty ones.  Raises Fault if one occurs twice."""
    classes = {number: name.strip() for number, name in names.items() if name.strip()}
    counts = Counter(classes.values())
    if twice := [name for name in counts if counts[name] > 1]:
        raise Fault("category-name-twice", f"{file}: name {brief(twice[0])} occurs twice, expected unique names")
    return classes


def _num_keypoints(tree: Tree) -> int:
    """Return how many numbers the keypoints of a row take, by kpt_shape; 0 if it has none."""
    shape = tree.get("kpt_shape")
    sides = shape if isinstance(shape, list) else []
    return int(sides[0]) * int(sides[1]) if len(sides) == 2 and all(str(side).isdecimal() for side in sides) else 0
