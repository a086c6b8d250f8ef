"""Find the files of an image folder by name, never outside it; each subfolder is listed once.

A name that was written on another machine (`file_names`) is found by its end, if only one file fits.
"""

import difflib
import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.file_names import is_foreign, readings, split_name
from gndet.text import brief

HEAD = 512  # first bytes of a file, enough to tell its kind
ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")  # zip .. rar
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")  # JPEG .. JPEG 2000
EMPTY, XML, PICTURE, FILE = "an empty file", "an XML file", "a picture", "a file"
ABSENT = (errno.ENOENT, errno.ENOTDIR)  # the folder does not exist, which needs no further reason
NO_FILE = "is a broken link, a folder or a device"
LINKED = "is reached by a link that leads out of the image folder"
ANNOTATIONS = (".json", ".xml", ".txt", ".csv", ".yaml")  # what no missing picture may mean
MAX_COMPARED = 20_000  # names compared to find the nearest; more would take seconds


class File(NamedTuple):
    """An entry of a folder."""

    name: str  # on disk
    size: int = 0  # bytes
    mtime: int = 0  # ns; a copy may keep it
    ctime: int = 0  # ns, when the file or its name was last changed
    inode: int = 0  # another file has another
    fault: str = ""  # why it cannot be used: a code of FAULTS
    why: str = ""  # the same in words


class Found(NamedTuple):
    """A picture that was found by its name."""

    path: str  # below the folder, spelled as on disk
    size: int  # bytes
    code: str = ""  # of FAULTS, if the name had to be read in another way


class ImageFolder:
    """An image folder, whose subfolders are listed as names are looked up."""

    def __init__(self, home: Path, follow_links: bool = False) -> None:
        """home: the folder; follow_links: use files behind links that lead out of it.

        Raises Fault if it cannot be listed.
        """
        try:
            with os.scandir(home):
                pass
        except (OSError, ValueError) as error:
            kind = what_is(read_head(home)) if os.path.isfile(home) else getattr(error, "strerror", None) or str(error)
            raise Fault("folder-missing", f"{home}: {kind}, expected a folder of pictures") from None
        self.home, self.follow_links = home, follow_links
        self._home = os.path.realpath(home)
        self._listings: dict[str, dict[str, File]] = {}
        self._troubles: dict[str, str] = {}  # why a subfolder cannot be listed
        self._leaves: dict[str, list[tuple[str, File]]] = {}  # all files with their paths, by NFC name

    def find(self, name: Any, suggest: bool) -> Found:
        """Find the picture with a file_name, in either Unicode form; read a name of another machine by its end.

        suggest: if it is missing, name the nearest file.  Raises Fault for a picture that cannot be used.
        """
        try:
            parent, leaf = split_name(name)
        except Fault as fault:
            if fault.code == "file-name":
                raise
            absent = fault
        else:
            entry = self._entry(parent, leaf)
            if entry is not None:
                return _usable(*entry)
            trouble = f", which cannot be listed: {self._troubles[parent]}" if parent in self._troubles else ""
            absent = Fault("file-missing", f"is {'' if trouble else 'not '}in {self.home / parent}{trouble}")
        otherwise = self._find_otherwise(name)
        if otherwise is None:
            raise Fault(absent.code, f"{absent}{self._hint(name) if suggest else ''}")
        return otherwise

    def _entry(self, parent: str, leaf: str) -> tuple[str, File] | None:
        """Return a file of a subfolder with its path, both spelled as on disk; None if it is not there."""
        folder = self._stored(parent)
        found = _get(self._listing(folder), leaf)
        return (f"{folder}/{found.name}" if folder else found.name, found) if found else None

    def _find_otherwise(self, name: str) -> Found | None:
        """Find a picture by a name with backslashes, or by the longest end of its name that is a path in the folder.

        Raises Fault if several files fit the name equally well.
        """
        if "\\" in name and not is_foreign(name):
            entry = self._entry(*split_name(name.replace("\\", "/")))
            if entry is not None:
                return _usable(*entry, code="file-backslash")
        for parts in readings(name):
            candidates = self._same_leaf(parts[-1])
            common = [_common_end(path.split("/"), parts) for path, _ in candidates]
            best = [candidate for candidate, num in zip(candidates, common, strict=True) if num == max(common)]
            if len(best) > 1:
                paths = " and ".join(path for path, _ in sorted(best)[:2])
                raise Fault("file-unclear", f"is not in {self.home}; both {paths} end like it")
            if best and len(best[0][0].split("/")) == max(common):
                return _usable(*best[0], code="file-by-end")
        return None

    def _same_leaf(self, leaf: str) -> list[tuple[str, File]]:
        """List the files of this name in the folder and all folders below it, except hidden and linked ones."""
        pending = [] if self._leaves else [""]
        while pending:
            folder = pending.pop()
            for file in {file.name: file for file in self._listing(folder).values()}.values():
                path = f"{folder}/{file.name}" if folder else file.name
                place = self.home / path
                if file.why == NO_FILE and os.path.isdir(place) and not os.path.islink(place):
                    pending += [] if file.name.startswith(".") else [path]
                else:
                    self._leaves.setdefault(_nfc(file.name), []).append((path, file))
        return self._leaves.get(_nfc(leaf), [])

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

    def _hint(self, name: str) -> str:
        """Suggest what a missing name may have meant: a file in another folder, or one with another name."""
        for parts in readings(name):
            if elsewhere := sorted(self._same_leaf(parts[-1])):
                path = self.home / elsewhere[0][0]
                return f"; {path.name} is in {path.parent}: file_name is relative to the image folder"
        parts = [] if is_foreign(name) or "\\" in name else [part for part in name.split("/") if part not in ("", ".")]
        for end, part in enumerate(parts):
            listing = self._listing("/".join(parts[:end]))
            if _get(listing, part) is None:
                return _nearest(part, listing)
        return _nearest(readings(name)[-1][-1], self._listing("")) if readings(name) else ""

    def length(self, path: str) -> int:
        """Return the length in bytes of a file that was found."""
        parent, _, leaf = path.rpartition("/")
        return self._listing(parent)[leaf].size

    def subfolders(self) -> list[str]:
        """Return the folders listed so far, relative to home."""
        return sorted(self._listings)

    def look_into(self, subfolders: Iterable[str]) -> None:
        """List subfolders in which another process has looked for pictures."""
        for folder in subfolders:
            self._listing(folder)

    def digest(self, subfolders: list[str]) -> str:
        """Hash the names, sizes, times, inodes and faults of the files in these subfolders."""
        hashed = hashlib.sha256()
        for folder in subfolders:
            listing = self._listing(folder)  # with 118,000 files, sorting the keys alone takes half the time
            lines = ["\0".join([key, *map(str, listing[key])]) for key in sorted(listing)]
            hashed.update("\n".join([f"\n{folder}", *lines]).encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()

    def _listing(self, parent: str) -> dict[str, File]:
        if parent not in self._listings:
            try:
                self._listings[parent] = _list(self.home / parent, self._home, self.follow_links)
            except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
                self._listings[parent] = {}
                if isinstance(error, OSError) and error.errno not in ABSENT:
                    self._troubles[parent] = str(error.strerror)
        return self._listings[parent]


def _usable(path: str, file: File, code: str = "") -> Found:
    """Return a file that was found.  Raises Fault if it cannot be used."""
    if file.fault:
        raise Fault(file.fault, file.why)
    return Found(path, file.size, code)


def _common_end(path: list[str], other: list[str]) -> int:
    """Count the last parts that two paths have in common, in either Unicode form."""
    pairs = zip(reversed(path), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: _nfc(pair[0]) == _nfc(pair[1]), pairs))


def _list(folder: Path, home: str, follow_links: bool) -> dict[str, File]:
    """List the files of a folder by name and by NFC name; links out of home and entries that are not files get a fault.

    Raises OSError or ValueError if the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        inside = _is_inside(folder, home)
        files = {entry.name: _look(entry, inside, home, follow_links) for entry in entries}
    return {_nfc(name): file for name, file in files.items() if not name.isascii()} | files


def _look(entry: os.DirEntry, inside: bool, home: str, follow_links: bool) -> File:
    """Describe an entry; an entry that cannot be accessed does not hide the others."""
    try:
        if not inside:
            return File(entry.name, fault="file-escape", why=LINKED)
        if entry.is_symlink() and not _is_inside(entry.path, home) and not (follow_links and entry.is_file()):
            why = f"{LINKED}; data.follow_links=true follows links to files"
            return File(entry.name, fault="file-escape", why=why)
        if not entry.is_file():
            return File(entry.name, fault="file-missing", why=NO_FILE)
        stat = entry.stat()
    except OSError as error:
        return File(entry.name, fault="file-missing", why=f"cannot be accessed: {error.strerror}")
    return File(entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _is_inside(path: str | Path, home: str) -> bool:
    """Return whether a path leads into home, already resolved.  (`Path.resolve` would raise for circular links.)"""
    return Path(os.path.realpath(path)).is_relative_to(home)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _get(listing: dict[str, File], name: str) -> File | None:
    return listing.get(name) or listing.get(_nfc(name))


def _nearest(name: str, listing: dict[str, File]) -> str:
    """Suggest which file was meant: the name in another case, or the closest name."""
    others = [known for known in listing if not known.lower().endswith(ANNOTATIONS)]
    same = [known for known in others if known.casefold() == name.casefold()]
    close = same or difflib.get_close_matches(name, others[:MAX_COMPARED], n=1)
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
    if re.fullmatch(rb"(\.\./)+[^\0\n]+", head):
        return "a link written as text (git does so where links are off)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith((b"<?xml", b"<annotation")):
        return XML
    if head.startswith(PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return PICTURE
    return FILE
