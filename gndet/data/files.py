"""The files of an image folder: found by name, never outside it, each subfolder listed once."""

import difflib
import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from gndet.data.faults import Fault
from gndet.data.segmentation import brief

HEAD = 512  # bytes that tell what a file is
ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")  # zip .. rar
EMPTY = "an empty file"
MAX_COMPARED = 20_000  # names that the nearest one is looked for among: more would take seconds


class File(NamedTuple):
    """An entry of a folder."""

    name: str  # on disk
    size: int  # bytes
    mtime: int  # ns
    fault: str  # why it cannot be taken: a code of FAULTS, or ""


class ImageFolder:
    """An image folder; it lists itself as far as names are looked up."""

    def __init__(self, home: Path) -> None:
        """home: the folder.  Raises Fault where it cannot be listed."""
        try:
            with os.scandir(home):
                pass
        except (OSError, ValueError) as error:
            kind = what_is(read_head(home)) if os.path.isfile(home) else getattr(error, "strerror", None) or str(error)
            raise Fault("folder-missing", f"{home}: {kind}, expected a folder of pictures") from None
        self.home = home
        self._home = home.resolve()
        self._listings: dict[str, dict[str, File]] = {}

    def find(self, name: Any, suggest: bool) -> str:
        """The path of a picture below the folder, as it is on disk, for a file_name; either Unicode form is found.

        suggest: look for the nearest name where there is none.  Raises Fault for one that cannot be taken.
        """
        parent, leaf = split_name(name)
        listing = self._listing(parent)
        found = listing.get(leaf) or listing.get(unicodedata.normalize("NFC", leaf))
        if found is None:
            near = _nearest(leaf, listing) if suggest else ""
            raise Fault("file-missing", f"is not in {self.home / parent}{near}")
        if found.fault == "file-escape":
            raise Fault("file-escape", "is reached by a link that leads out of the image folder")
        if found.fault == "file-missing":
            raise Fault("file-missing", "is no file, but a folder or a device")
        return f"{parent}/{found.name}" if parent else found.name

    def is_empty(self, path: str) -> bool:
        """Whether a file that was found has no bytes."""
        parent, leaf = split_name(path)
        return self._listing(parent)[leaf].size == 0

    def subfolders(self) -> list[str]:
        """The folders listed so far, relative to home."""
        return sorted(self._listings)

    def digest(self, subfolders: list[str]) -> str:
        """A hash of the names, sizes, times and faults of the files in these subfolders."""
        hashed = hashlib.sha256()
        for folder in subfolders:
            files = self._listing(folder)
            lines = [f"{key}\0{one.name}\0{one.size}\0{one.mtime}\0{one.fault}" for key, one in sorted(files.items())]
            hashed.update("\n".join([f"\n{folder}", *lines]).encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()

    def _listing(self, parent: str) -> dict[str, File]:
        if parent not in self._listings:
            self._listings[parent] = _list(self.home / parent, self._home)
        return self._listings[parent]


def split_name(name: Any) -> tuple[str, str]:
    """The folder and the file that a file_name names.  Raises Fault for one that is no text, absolute, or leads up."""
    if not isinstance(name, str) or not name:
        raise Fault("file-name", "is not the name of a file in the image folder")
    *parents, leaf = [part for part in name.split("/") if part not in ("", ".")] or [""]
    if name.startswith("/") or ".." in parents or leaf == "..":
        raise Fault("file-escape", "leads out of the image folder")
    return "/".join(parents), leaf


def _list(folder: Path, home: Path) -> dict[str, File]:
    """List a folder by name, and by its composed form; a link out of home has a fault, and so has what is no file."""
    try:
        inside = folder.resolve().is_relative_to(home)
        with os.scandir(folder) as entries:
            files = [_look(entry, inside, home) for entry in entries]
    except (OSError, ValueError):  # no such folder, or a name that no folder can have
        return {}
    return {unicodedata.normalize("NFC", one.name): one for one in files} | {one.name: one for one in files}


def _look(entry: os.DirEntry, inside: bool, home: Path) -> File:
    """What an entry is."""
    if not inside or (entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(home)):
        return File(entry.name, 0, 0, "file-escape")
    if not entry.is_file():
        return File(entry.name, 0, 0, "file-missing")
    stat = entry.stat()
    return File(entry.name, stat.st_size, stat.st_mtime_ns, "")


def _nearest(name: str, listing: dict[str, File]) -> str:
    """Suggest the file meant: another spelling of upper and lower case, or the closest name."""
    same = [known for known in listing if known.casefold() == name.casefold()]
    close = same or difflib.get_close_matches(name, list(listing)[:MAX_COMPARED], n=1)
    return f"; the nearest name there is {brief(close[0])}" if close else ""


def read_head(path: Path) -> bytes:
    """The first bytes of a file, none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def what_is(head: bytes) -> str:
    """Say what a file is that should be something else, by its first bytes."""
    if not head:
        return EMPTY
    if head.startswith(ARCHIVES) or head[257:262] == b"ustar":
        return "an archive, which is not opened"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file)"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return "a file"
