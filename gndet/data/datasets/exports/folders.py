"""Find and read the files of an export, and tell which of its folders and lists are the sets train, val and test."""

import json
import os
import re
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_NUMBER = re.compile(r"[-_ ]?\d+$")
ALIASES = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
TRIED = 100  # names looked for in each folder


def set_named(name: str) -> str:
    """Return which set a folder or list is named after, as in `valid` or `train2017`; "" if none."""
    return ALIASES.get(_NUMBER.sub("", name.lower()), "")


def files_below(folder: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """List the files below a folder that have one of the suffixes, in any case; hidden ones are left out.

    Returns their paths relative to the folder, sorted.  Links are followed; a folder is listed once.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        below = "" if place == str(folder) else os.path.relpath(place, folder) + "/"
        found += [below + name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
    return sorted(found)


class Listings:
    """The files of folders by stem, in Unicode's composed form: a disk may hold either.  Each folder is listed once."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        self.suffixes = suffixes
        self.known: dict[str, dict[str, list[str]]] = {}  # by folder; those that do not exist, too

    def of(self, folder: str) -> dict[str, list[str]]:
        """Return the names in a folder by stem, sorted; {} if it cannot be listed."""
        if folder not in self.known:
            listing: dict[str, list[str]] = {}
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            for name in names:
                if name.lower().endswith(self.suffixes) and name[0] != ".":
                    listing.setdefault(stem_of(name), []).append(name)
            self.known[folder] = listing
        return self.known[folder]

    def fullest(self, folders: Iterable[str], stems: Collection[str]) -> str:
        """Return the folder that has most of the stems, the first of equal ones."""
        best, most = "", -1
        for folder in dict.fromkeys(folders):
            listing = self.of(folder)
            hits = sum(stem in listing for stem in stems)
            best, most = (folder, hits) if hits > most else (best, most)
            if most == len(stems):
                break
        return best


def stem_of(name: str) -> str:
    """Return the name of a file without its suffix, in Unicode's composed form."""
    stem = name.rpartition(".")[0]
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)


def swapped(folder: str, words: Collection[str], others: Sequence[str]) -> list[str]:
    """Replace the last part of a path that is one of the words by each of the others; [] if there is none."""
    parts = Path(folder).parts
    places = [place for place, part in enumerate(parts) if part.lower() in words]
    return [str(Path(*parts[: places[-1]], other, *parts[places[-1] + 1 :])) for other in others] if places else []


def common_folder(folders: Sequence[str]) -> str:
    """Return the folder that holds all of these; a single one as it is."""
    return folders[0] if len(set(folders)) == 1 else os.path.commonpath(list(map(os.path.abspath, folders)))


def children(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted, without hidden names; [] if it is none."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def entered(folder: Path) -> Path:
    """Follow folders that hold nothing but one folder, as an unpacked archive does."""
    while len(inside := children(folder)) == 1 and inside[0].is_dir() and not inside[0].name.startswith("__"):
        folder = inside[0]
    return folder


def by_set(files: Sequence[str]) -> dict[str, list[str]]:
    """Divide files by the folders named train, val, ... that they lie in; those in none are the set "".

    If there are other sets, but no training set, it is those in none.  files: paths with forward slashes.
    """
    found: dict[str, list[str]] = {}
    known: dict[str, str] = {}  # by folder
    for file in files:
        parent = file.rpartition("/")[0]
        if parent not in known:
            known[parent] = next(filter(None, map(set_named, parent.split("/"))), "")
        found.setdefault(known[parent], []).append(file)
    if "" in found and len(found) > 1 and "train" not in found:
        found["train"] = found.pop("")
    return found


def of_set(folder: Path, files: Sequence[str], split: str, is_given: bool) -> list[str]:
    """Return the files of a set, relative to folder; split "" means all.

    Files in no folder of a set are the training set, or any set if the name of the folder says so, or if it is_given
    for that set.  Raises Fault if there is no such set.
    """
    found = by_set(files)
    if not split or not files:
        return list(files)
    is_named = split in map(set_named, folder.parts[-2:])
    if list(found) == [""] and (split == "train" or is_given or is_named):
        return found[""]
    if split not in found:
        raise set_missing(folder, split, sorted(filter(None, found)))
    return found[split]


def set_missing(where: Path, split: str, known: Sequence[str]) -> Fault:
    """Return the fault of an export that lacks a set; known: those it has, in its own words."""
    has = f"it has {', '.join(known)}" if known else "it is not divided into sets"
    return Fault("set-missing", f"{where}: no {split} ({' or '.join(SPLITS[split])}); {has}")


def candidates(text: str, bases: Sequence[Path], least: int = 1) -> Iterator[Path]:
    """Yield the places that a path written on another machine may mean here, the most literal first.

    text: as a file has it, perhaps absolute, with ~, .. or back-slashes; bases: folders it may be relative to.
    Then follow its last parts, at least `least` of them, and never fewer than from the name of a set on:
    /content/set/valid/images may be valid/images, but not images.
    """
    text = os.path.expanduser(text.strip().replace("\\", "/"))
    yield from (base / text for base in bases)
    parts = [part for part in text.split("/") if part not in ("", ".", "..") and not part.endswith(":")]
    sets = [place for place, part in enumerate(parts) if part.lower() in ALIASES]
    last = min(sets[-1] if sets else len(parts), len(parts) - least)
    yield from (base.joinpath(*parts[start:]) for start in range(last + 1) for base in bases)


def read_text(path: str | Path) -> str:
    """Return a text file in UTF-8, or, with a mark at its beginning, UTF-16.  Raises Fault."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except OSError as error:
        raise Fault("json-unreadable", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Fault("text-encoding", f"{path}: {error.reason} at byte {error.start}, expected UTF-8") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32.  Raises Fault, and OSError."""
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise Fault("text-encoding", f"{path}: {error.reason} at byte {error.start}, expected UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Fault("json-broken", f"{path}: not a JSON file: {error}") from None


def find_images(home: Path, folders: Sequence[str], names: Sequence[str]) -> Path:
    """Return the folder that holds most of the first pictures, the first of those that hold equally many.

    home: the folder of the annotations; folders: relative to home; names: of the pictures, with or without a suffix,
    perhaps with folders of another machine.  Returns home if no folder holds any of them.
    """
    found = {folder: _hits(home / folder, names[:TRIED]) for folder in folders if (home / folder).is_dir()}
    best = max(found, key=lambda folder: found[folder], default="")
    return home / best if found.get(best) else home


def _hits(folder: Path, names: Sequence[str]) -> int:
    """Count the names that are in a folder: as given, by their last part, or with the suffix of a picture added."""
    found = 0
    for name in names:
        name = name.replace("\\", "/")
        suffixes = ("",) if name.lower().endswith(PICTURES) else ("", *PICTURES, ".PNG")
        tried = (f"{start}{suffix}" for start in dict.fromkeys((name, name.rpartition("/")[2])) for suffix in suffixes)
        found += any((folder / path).is_file() for path in tried if path)
    return found
