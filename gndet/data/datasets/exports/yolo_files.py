"""Find the pictures of a split of a YOLO export, and the label file of each."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gndet.data.datasets.exports.engine import Found
from gndet.data.datasets.exports.folders import (
    ALIASES,
    Listings,
    by_set,
    candidates,
    children,
    files_below,
    of_set,
    read_text,
    set_named,
    stem_of,
    swapped,
)
from gndet.data.datasets.exports.yolo_rows import Unit
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES
from gndet.text import brief, shown

NOT_LABELS = ("classes", "predefined_classes", "trainval", "notes", *ALIASES)  # names of other .txt files
IMAGES = ("images", "jpegimages", "image", "imgs", "img")  # folders whose labels lie in a folder beside them
SHOWN = 4  # folders that were looked in
TRIED = 3  # pictures of a list that are looked for to find its folder

Group = tuple[str, list[str]]  # a folder, and the pictures in it, relative to it


class Opened(NamedTuple):
    """What was read on the way to the pictures and names of an export."""

    files: list[Path]
    notes: list[str]  # lines to show


def in_folder(folder: Path, split: str, is_given: bool, opened: Opened) -> list[Group]:
    """Find the pictures of a set by folders, or lists, named train, val, test.

    A folder of labels stands for the folder of pictures beside it.  is_given: as in `folders.of_set`, which raises
    Fault if there is no such set.
    """
    pictures = files_below(folder, PICTURES)
    for other in swapped(str(folder), ("labels",), ("images", "Images", "JPEGImages")):
        if not pictures and os.path.isdir(other):
            folder, pictures = Path(other), files_below(other, PICTURES)
    lists = _lists(folder)
    if split and split in lists:
        return in_list(lists[split], [folder], opened)
    return [(str(folder), of_set(folder, pictures, split, is_given))]


def sets_in_folder(folder: Path) -> list[str]:
    """List the sets of a folder by its lists and folders of pictures; [""] if it is not divided."""
    return list(_lists(folder)) or list(by_set(files_below(folder, PICTURES))) or [""]


def _lists(folder: Path) -> dict[str, Path]:
    """Return the lists of pictures that are named after sets, by set."""
    texts = [path for path in children(folder) if set_named(path.stem) and path.suffix.lower() == ".txt"]
    return {set_named(path.stem): path for path in texts if _is_list(path)}


def _is_list(path: Path) -> bool:
    """Return whether the first line of a text file is the path of a picture."""
    with suppress(OSError), path.open("rb") as file:
        return file.readline(4096).strip().lower().endswith(tuple(map(str.encode, PICTURES)))
    return False


def in_tree(text: str, bases: Sequence[Path], key: str, near: Sequence[Path], opened: Opened) -> list[Group]:
    """Find the pictures of a value of data.yaml: a folder, or a list of pictures, which may lie in the folders `near`.

    Raises Fault if it is not there.
    """
    path = next((place for place in candidates(text, bases) if place.exists()), None)
    if path is None:
        places = ", ".join(dict.fromkeys(shown(str(place)) for place in candidates(text, bases)))
        code = "folder-missing" if key.endswith(": train") else "set-missing"
        raise Fault(code, f"{key} {text!r}: not found; tried {places}")
    path = Path(os.path.normpath(path))
    if path != Path(os.path.normpath(bases[0] / text)):
        opened.notes.append(f"{key} {shown(text)} is taken for {shown(str(path))}")
    if not path.is_file():
        return [(str(path), files_below(path, PICTURES))]
    return in_list(path, [*near, path.parent, *bases], opened)


def in_list(path: Path, bases: Sequence[Path], opened: Opened) -> list[Group]:
    """Find the pictures that a text file lists, a path per line, perhaps as they were on another machine."""
    opened.files.append(path)
    folders: dict[str, list[str]] = {}
    for line in read_text(path).splitlines():
        parent, _, name = line.strip().replace("\\", "/").rpartition("/")
        if name:
            folders.setdefault(parent, []).append(name)
    if not folders:
        raise Fault("folder-missing", f"{path}: lists no picture")
    return [(str(_holder(parent, names, bases)), names) for parent, names in folders.items()]


def _holder(parent: str, names: list[str], bases: Sequence[Path]) -> Path:
    """Return the folder that holds the first of these pictures; the most literal one if none does."""
    places = [Path(os.path.normpath(place)) for place in (*candidates(parent or ".", bases, least=0), bases[0])]
    return next((place for place in places if any((place / name).is_file() for name in names[:TRIED])), places[0])


class Labels:
    """The label files beside pictures, in a folder `labels` beside the folder `images`, or in any other folder."""

    def __init__(self, home: Path) -> None:
        """home: the folder of the annotations; label files in it are named relative to it."""
        self.home = str(home)
        self.listings = Listings((".txt",))
        self._beside: dict[str, set[str]] = {}  # folders of labels: folders of their pictures

    def match(self, folder: str, names: list[str]) -> Iterator[tuple[str, str]]:
        """Yield each picture with its label file, "" if it has none; names: of pictures, relative to folder."""
        below: dict[str, list[tuple[str, str]]] = {}  # by subfolder: names, with the stems of their last parts
        for name in names:
            parent, _, leaf = name.rpartition("/")
            below.setdefault(parent, []).append((name, stem_of(leaf)))
        for parent, pictures in below.items():
            place = self._choose(folder, parent, {stem for _, stem in pictures})
            listing = self.listings.of(place)
            is_inside = f"{place}/".startswith(f"{self.home}/")
            place = place[len(self.home) + 1 :] if is_inside else os.path.abspath(place)
            for name, stem in pictures:
                yield name, os.path.join(place, listing[stem][0]) if stem in listing else ""

    def _choose(self, folder: str, parent: str, stems: set[str]) -> str:
        """Return the folder with most of the labels of these pictures."""
        pictures = os.path.join(folder, parent) if parent else folder
        above, name = os.path.split(pictures)
        direct = [*swapped(pictures, IMAGES, ("labels", "Labels")), pictures]
        others = [
            *([f"{self.home}/{parent}"] if parent else []),
            self.home,
            f"{pictures}/labels",
            f"{above}/labels/{name}",
        ]
        best = self.listings.fullest([*direct, *others], stems)
        if best in direct:
            self._beside.setdefault(best, set()).add(pictures)
        return best

    def anywhere(self, root: str, names: list[str]) -> list[Unit]:
        """Match pictures that have no label file in a usual folder with text files anywhere below home, by name.

        A folder of another set than the picture's is left out.  names: relative to root.  Raises Fault if a picture has
        two label files, or two pictures have one.
        """
        texts: dict[str, list[tuple[str, str]]] = {}  # by stem: files relative to home, with the sets of their folders
        for text in files_below(self.home, (".txt",)):
            if _may_be_label(stem := stem_of(os.path.basename(text))):
                texts.setdefault(stem, []).append((text, _set_of(text)))
        units, owners = [], dict[str, str]()
        for name in names:
            mine = _set_of(os.path.relpath(os.path.join(root, name), self.home))
            near = texts.get(stem_of(os.path.basename(name)), [])
            found = [text for text, other in near if not (mine and other) or mine == other]
            if len(found) > 1:
                raise _unclear(name, found)
            if found and owners.setdefault(found[0], name) != name:
                raise _unclear(found[0], [owners[found[0]], name])
            units.append((name, found[0] if found else ""))
        return units

    def what_is_there(self) -> str:
        """Say which label file the folders hold that were looked in, or which folders these are."""
        for folder, listing in self.listings.known.items():
            if names := [names[0] for stem, names in listing.items() if _may_be_label(stem)]:
                return f"{shown(folder)} has {brief(names[0])}"
        return f"looked in {', '.join(map(shown, list(self.listings.known)[:SHOWN]))}"

    def strays(self) -> Found:
        """Return the label files for which there is no picture."""
        found: Found = []
        pictures = Listings(PICTURES)
        for folder, places in self._beside.items():
            stems = {stem for place in places for stem in pictures.of(place)}
            for stem, (name, *_) in self.listings.of(folder).items():
                if stem not in stems and _may_be_label(stem):
                    found.append(("label-stray", f"{shown(os.path.join(folder, name))}: no picture of this name"))
        return found


def _unclear(file: str, others: Sequence[str]) -> Fault:
    return Fault("file-unclear", f"{shown(file)}: both {shown(others[0])} and {shown(others[1])} have its name")


def _set_of(file: str) -> str:
    """Return the set of the first folder of a path that is named after one, "" if none is."""
    return next(filter(None, map(set_named, os.path.dirname(file).split(os.sep))), "")


def _may_be_label(stem: str) -> bool:
    return stem.lower() not in NOT_LABELS and not stem.lower().startswith("readme")
