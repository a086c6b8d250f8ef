"""Compare data.train with data.val: their classes, and images that are in both."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from gndet.data.datasets.classes import with_nearest
from gndet.data.datasets.faults import Findings
from gndet.data.datasets.packed import PackedRecords
from gndet.data.records import Dataset, Finding
from gndet.text import brief

_File = tuple[int, str, str]  # image id, file_name, path


def between(train: Dataset, val: Dataset) -> tuple[Finding, ...]:
    """Find conflicts between two sets: different classes, or images in both, by name, by file or by content.

    Content is compared only if `gndet check --images` has decoded both sets.
    """
    found = Findings()
    if train.classes and val.classes and train.classes != val.classes:
        found.add("classes-differ", _differences(train.classes, val.classes))
    if not isinstance(train.records, PackedRecords) or not isinstance(val.records, PackedRecords):
        return found.listed()
    home, val_home = os.path.realpath(train.records.folder), os.path.realpath(val.records.folder)
    names, places, seen = {}, {}, {}
    for image_id, name, path, digest in train.records.files():
        place = os.path.normpath(f"{home}/{path}")
        names[name] = places[place] = image_id, name, place
        if digest:
            seen[digest] = places[place]
    for image_id, name, path, digest in val.records.files():
        place = os.path.normpath(f"{val_home}/{path}")
        if twin := places.get(place) or names.get(name):
            _note_twin(found, "file-in-both", twin, (image_id, name, place))
        if digest in seen and seen[digest][2] != place:
            _note_twin(found, "picture-in-both", seen[digest], (image_id, name, place))
    return found.listed()


def _note_twin(found: Findings, code: str, train: _File, val: _File) -> None:
    text, ids = "", f"image {train[0]} of train, {val[0]} of val"
    if code == "picture-in-both":
        text = f"{ids}: {val[2]} is equal to {train[2]}"
    elif found.wants_example(code):  # comparing takes a while
        names = ", ".join(map(brief, dict.fromkeys((train[1], val[1]))))
        text = f"{names}: {ids}; {_compare_files(Path(train[2]), Path(val[2]))}"
    found.add(code, text, val[0])


def _differences(train: Sequence[str], val: Sequence[str]) -> str:
    only_train, only_val = ([name for name in a if name not in b] for a, b in ((train, val), (val, train)))
    if not only_train and not only_val:
        pairs = enumerate(zip_longest(train, val, fillvalue="nothing"))  # a name may occur twice, refused elsewhere
        label, (name, other) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        return f"the same names in another order: label {label} is {brief(name)} in train, {brief(other)} in val"
    parts = ((only_train, "train", val), (only_val, "val", train))
    return "; ".join(f"only {which} has {with_nearest(names, others)}" for names, which, others in parts if names)


def _compare_files(path: Path, other: Path) -> str:
    try:
        if path.resolve() == other.resolve():
            return "one file"
        equal = path.stat().st_size == other.stat().st_size
    except (OSError, RuntimeError):  # RuntimeError: circular links
        return "not compared"
    return "two files of the same size" if equal else "two files of that name"
