"""Find the files of an image folder by name, never outside it; each subfolder is listed once."""

import difflib
import errno
import hashlib
import json
import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.segmentation import brief

HEAD = 512  # first bytes of a file, enough to tell its kind
ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")  # zip .. rar
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")  # JPEG .. JPEG 2000
EMPTY, XML, PICTURE, FILE = "an empty file", "an XML file", "a picture", "a file"
ABSENT = (errno.ENOENT, errno.ENOTDIR)  # the folder does not exist, which needs no further reason
MAX_COMPARED = 20_000  # names compared to find the nearest; more would take seconds


class File(NamedTuple):
    """An entry of a folder."""

    name: str  # on disk
    size: int  # bytes
    mtime: int  # ns
    fault: str  # why it cannot be used: a code of FAULTS, or ""
    why: str = ""  # the same in words


class ImageFolder:
    """An image folder, whose subfolders are listed as names are looked up."""

    def __init__(self, home: Path) -> None:
        """home: the folder.  Raises Fault if it cannot be listed."""
        try:
            with os.scandir(home):
                pass
        except (OSError, ValueError) as error:
            kind = what_is(read_head(home)) if os.path.isfile(home) else getattr(error, "strerror", None) or str(error)
            raise Fault("folder-missing", f"{home}: {kind}, expected a folder of pictures") from None
        self.home = home
        self._home = os.path.realpath(home)
        self._listings: dict[str, dict[str, File]] = {}
        self._troubles: dict[str, str] = {}  # why a subfolder cannot be listed

    def find(self, name: Any, suggest: bool) -> tuple[str, int]:
        """Find the picture with a file_name, in either Unicode form.

        Returns its path below the folder, spelled as on disk, and its size in bytes.
        suggest: if it is missing, name the nearest file.  Raises Fault for a picture that cannot be used.
        """
        parent, leaf = split_name(name)
        folder = self._stored(parent)
        found = _get(self._listing(folder), leaf)
        if found is None:
            if folder in self._troubles:
                trouble = f"{self.home / parent}, which cannot be listed: {self._troubles[folder]}"
                raise Fault("file-missing", f"is in {trouble}")
            raise Fault("file-missing", f"is not in {self.home / parent}{self._hint(parent, leaf) if suggest else ''}")
        if found.fault:
            raise Fault(found.fault, found.why)
        return f"{folder}/{found.name}" if folder else found.name, found.size

    def _stored(self, parent: str) -> str:
        """Return a subfolder spelled as on disk, its parts in either Unicode form; parent itself if it is missing."""
        if not parent or parent in self._listings or self._listing(parent):
            return parent
        stored = ""
        for part in parent.split("/"):
            entry = _get(self._listing(stored), part)
            if entry is None:
                return parent
            stored = f"{stored}/{entry.name}" if stored else entry.name
        return stored

    def _hint(self, parent: str, leaf: str) -> str:
        """Suggest what a missing name may have meant: a file further up, another folder, or another file."""
        parts = parent.split("/") if parent else []
        for start in range(1, len(parts) + 1):
            folder = "/".join(parts[start:])
            if _get(self._listing(folder), leaf) is not None:
                return f"; it is in {self.home / folder}: file_name is relative to the image folder"
        for end, part in enumerate(parts):
            listing = self._listing("/".join(parts[:end]))
            if _get(listing, part) is None:
                return _nearest(part, listing)
        return _nearest(leaf, self._listing(parent))

    def subfolders(self) -> list[str]:
        """Return the folders listed so far, relative to home."""
        return sorted(self._listings)

    def digest(self, subfolders: list[str]) -> str:
        """Hash the names, sizes, times and faults of the files in these subfolders."""
        hashed = hashlib.sha256()
        for folder in subfolders:
            lines = ["\0".join([key, *map(str, file)]) for key, file in sorted(self._listing(folder).items())]
            hashed.update("\n".join([f"\n{folder}", *lines]).encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()

    def _listing(self, parent: str) -> dict[str, File]:
        if parent not in self._listings:
            try:
                self._listings[parent] = _list(self.home / parent, self._home)
            except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
                self._listings[parent] = {}
                if isinstance(error, OSError) and error.errno not in ABSENT:
                    self._troubles[parent] = str(error.strerror)
        return self._listings[parent]


def split_name(name: Any) -> tuple[str, str]:
    """Split a file_name into folder and file.  Raises Fault for a name that is not text, is absolute, or leads up."""
    if not isinstance(name, str) or not name:
        raise Fault("file-name", "is not the name of a file in the image folder")
    *parents, leaf = [part for part in name.split("/") if part not in ("", ".")] or [""]
    if name.startswith("/") or ".." in parents or leaf == "..":
        raise Fault("file-escape", "leads out of the image folder")
    return "/".join(parents), leaf


def _list(folder: Path, home: str) -> dict[str, File]:
    """List the files of a folder by name and by NFC name; links out of home and entries that are not files get a fault.

    Raises OSError or ValueError if the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        inside = _is_inside(folder, home)
        files = [_look(entry, inside, home) for entry in entries]
    return {unicodedata.normalize("NFC", file.name): file for file in files} | {file.name: file for file in files}


def _look(entry: os.DirEntry, inside: bool, home: str) -> File:
    """Describe an entry; an entry that cannot be accessed does not hide the others."""
    try:
        if not inside or (entry.is_symlink() and not _is_inside(entry.path, home)):
            why = "is reached by a link that leads out of the image folder"
            return File(entry.name, 0, 0, "file-escape", why)
        if not entry.is_file():
            return File(entry.name, 0, 0, "file-missing", "is a broken link, a folder or a device")
        stat = entry.stat()
    except OSError as error:
        return File(entry.name, 0, 0, "file-missing", f"cannot be accessed: {error.strerror}")
    return File(entry.name, stat.st_size, stat.st_mtime_ns, "")


def _is_inside(path: str | Path, home: str) -> bool:
    """Return whether a path leads into home, already resolved.  (`Path.resolve` would raise for circular links.)"""
    return Path(os.path.realpath(path)).is_relative_to(home)


def _get(listing: dict[str, File], name: str) -> File | None:
    return listing.get(name) or listing.get(unicodedata.normalize("NFC", name))


def _nearest(name: str, listing: dict[str, File]) -> str:
    """Suggest which file was meant: the name in another case, or the closest name."""
    same = [known for known in listing if known.casefold() == name.casefold()]
    close = same or difflib.get_close_matches(name, list(listing)[:MAX_COMPARED], n=1)
    return f"; the nearest name there is {brief(close[0])}" if close else ""


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file, or b"" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def what_is(head: bytes) -> str:
    """Name the kind of a file by its first bytes."""
    if not head:
        return EMPTY
    if head.startswith(ARCHIVES) or head[257:262] == b"ustar":
        return "an archive, which is not opened"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith((b"<?xml", b"<annotation")):
        return XML
    if head.startswith(PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return PICTURE
    return FILE


NAMES_TRIED = 100


def guess_folder(path: Path) -> Path | None:
    """Find a folder, beside a JSON file or its folder, that has one of its pictures or is named after it.

    For annotations/instances_train2017.json, try train2017, images/train2017 and images first, then all others.
    """
    stem = path.stem.split("_", 1)[-1]
    with suppress(OSError):  # the reader reports what it cannot read
        names, named = _first_names(path), []
        for base in path.absolute().parents[:2] if names else ():
            alike = [base / stem, base / "images" / stem]
            named += alike
            for folder in [*alike, base / "images", base / path.stem, base, *sorted(base.iterdir())]:
                if any(os.path.isfile(folder / name) for name in names):
                    return folder
        return next(filter(Path.is_dir, named), None)
    return None


def _first_names(path: Path) -> list[str]:
    """List the first pictures that a JSON file names, except names that cannot be in a folder beside it."""
    text, names = path.read_bytes() if path.is_file() else b"", []
    for found in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text):
        try:
            name = json.loads(found[1])
        except ValueError:
            continue
        if name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts:
            names.append(name.encode("utf-8", "replace").decode())
        if len(names) == NAMES_TRIED:
            break
    return names
