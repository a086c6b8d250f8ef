"""Cache data sets, read and checked, in a folder of the user's cache; later starts map them into memory.

An entry holds arrays as .npy files, and facts as JSON sealed by a hash; nothing in it is executed.  It is used only if
the annotation file's content (of an export: its files' sizes, times, inodes), the listing of the image folder and the
reader's code are unchanged and every file of the entry matches its hash; otherwise the data is read again.  As in git,
a file whose size, times and inode are unchanged is not hashed again, so a start does not look at every byte.
"""

import datetime
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from gndet.data.datasets.image_folder import ImageFolder
from gndet.data.datasets.images import Reading
from gndet.data.datasets.packed import Packed, PackedRecords
from gndet.data.records import Dataset, Finding, Record, Tell
from gndet.errors import ConfigError, DataError, OutputError
from gndet.files import create, folder_written_whole, lock_file, remove, sweep, write_whole

FACTS, PICTURES = "facts.json", "pictures.json"
SETTLED = 2_000_000_000  # ns after which a file system's clock has surely advanced


def cached(
    cache: str, path: Path, files: ImageFolder | None, reading: Reading, read: Callable[[], Dataset],
    tell: Tell | None = None, sources: Sequence[Path] = (), way: tuple[str, ...] = (), units: str = "",
) -> Dataset:  # fmt: skip
    """Return the data set of annotations and their image folder from the cache; if missing, read and cache it.

    cache: data.cache, "" for none.  Processes that want the same data set take turns; tell: called with a line if this
    one has to wait.  path: the annotation file; or what names an export of many files, which are the sources.  way: the
    format and set, if it is not a COCO file; units: a hash of what the export consists of.
    Raises ConfigError for a cache in the image folder, OSError for an unreadable annotation file, and what read raises.
    """
    if not cache:
        return read()
    try:
        home = _home(Path(os.path.expanduser(cache)), path, files, reading, way)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        trouble = _unwritable(getattr(error, "filename", None) or cache, error)
        return read()._replace(notes=(trouble,))
    with _turn(home.with_name(f"{home.name}.lock"), path, tell):
        entry = _Entry(home, path, files, reading, sources, units)
        if (dataset := entry.load()) is not None:
            return dataset
        digest = entry.digest()  # before reading: a change meanwhile must not be cached as the new file's content
        return entry.save(read(), digest)


@contextmanager
def _turn(lock: Path, path: Path, tell: Tell | None) -> Iterator[None]:
    """Wait until no other process reads the data set at a path."""
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: at worst two processes read the data
            try:
                stack.enter_context(lock_file(lock, wait=0))
            except BlockingIOError:
                if tell is not None:
                    tell(f"{path}: waiting for another process that is reading it ({lock})")
                stack.enter_context(lock_file(lock, wait=math.inf))
        yield


def _home(root: Path, path: Path, files: ImageFolder | None, reading: Reading, way: tuple[str, ...]) -> Path:
    """Return the folder of an entry in root, and make root.  Raises ConfigError for a root in the image folder."""
    folder = (files.home if files else path.parent).absolute()
    if files and root.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"data.cache: {root} lies in the image folder {folder}; gndet writes nothing there")
    root.mkdir(parents=True, exist_ok=True)
    links = files is not None and files.follow_links
    parts = (path.absolute(), folder, files is not None, links, *reading, *way)
    name = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"))
    return root / f"{path.stem[:40]}-{name.hexdigest()[:16]}"


class _Entry(NamedTuple):
    """The place of one data set in the cache."""

    home: Path
    path: Path  # the annotation file, or what names the export
    files: ImageFolder | None
    reading: Reading
    sources: Sequence[Path]  # the annotation files of an export
    units: str

    def load(self) -> Dataset | None:
        """Return the saved data set, with what `gndet check --images` found; None if no entry can be trusted."""
        facts = _read_sealed(self.home / FACTS)
        if facts is None or facts["inputs"] != self._inputs(facts["subfolders"]):
            return None
        trusted = dict(facts["trusted"])
        if self.sources:
            same = self.digest() == facts["annotations"]
        else:
            same = _is_same(self.path, facts["annotations"], trusted)
        return self._open(facts, trusted) if same else None

    def digest(self) -> str:
        """Hash the annotation file; of an export, the names, sizes and times of its files.  Raises OSError."""
        if not self.sources:
            return _hash(self.path)
        hashed = hashlib.sha256()
        for source in self.sources:
            hashed.update(f"{source}\0{_stat(source)}\n".encode("utf-8", "surrogateescape"))
        return hashed.hexdigest()

    def _open(self, facts: dict[str, Any], trusted: dict[str, list[int]]) -> Dataset | None:
        packed = _mapped(self.home, facts["files"], trusted)
        if packed is None:
            return None
        if trusted != facts["trusted"]:
            with suppress(OutputError):
                _write_sealed(self.home / FACTS, facts | {"trusted": trusted})
        again = functools.partial(map_again, self.home, facts["files"], trusted)
        findings = tuple(_finding(fields) for fields in facts["findings"])
        num, digests = len(packed.image_ids), None
        notes: tuple[str, ...] = ()
        pictures = _read_sealed(self.home / PICTURES)
        if pictures is not None and pictures["decoder"] == PIL.__version__ and pictures["facts"] == facts["files"]:
            findings += tuple(_finding(fields) for fields in pictures["findings"])
            decoded = f"all {num} pictures were" if num > 1 else "the picture was"
            notes = (f"{decoded} decoded by gndet check on {pictures['date']}, unchanged since",)
            digests = np.frombuffer(bytes.fromhex(pictures["digests"]), dtype="<u8")
        folder = self.files.home if self.files else self.path.parent
        records = PackedRecords(packed, folder, self.reading, range(num), again, digests)
        classes, category_ids = tuple(facts["classes"]), tuple(facts["category_ids"])
        left_out = tuple((number, name) for number, name in facts["left_out"])
        declared = facts["declared"]
        return Dataset(str(self.path), classes, category_ids, records, findings, notes, declared, left_out)

    def save(self, dataset: Dataset, digest: str) -> Dataset:
        """Save a data set that was read from a file with this digest.  Returns the saved one.

        If it cannot be saved, returns the data set as it is, with a note that says why.
        """
        subfolders = self.files.subfolders() if self.files else []
        try:
            sweep(self.home.parent)
            remove(self.home)
            with folder_written_whole(self.home) as partial:
                records: Any = dataset.records  # packed
                arrays = records.packed._asdict()
                with ThreadPoolExecutor(2, "save") as threads:
                    written = threads.map(functools.partial(_save, partial), arrays, arrays.values())
                    hashes = dict(zip(arrays, written, strict=True))
                facts = {
                    "inputs": self._inputs(subfolders), "subfolders": subfolders, "annotations": digest,
                    "files": hashes, "trusted": {}, "classes": dataset.classes, "category_ids": dataset.category_ids,
                    "findings": dataset.findings, "declared": dataset.declared, "left_out": dataset.left_out,
                }  # fmt: skip
                _write_sealed(partial / FACTS, facts)
        except (OSError, OutputError) as error:
            reason: Any = error.__cause__ or error  # the cause of an OutputError is the OSError
            place = reason.filename2 or reason.filename or self.home.parent
            return dataset._replace(notes=(_unwritable(place, reason),))
        just_written = {f"{name}.npy": _stat(self.home / f"{name}.npy") for name in hashes}
        return self._open(facts | {"trusted": just_written}, just_written) or dataset

    def _inputs(self, subfolders: list[str]) -> dict[str, str]:
        """Return what else must be unchanged, besides the annotation file and what the entry's name encodes."""
        listing = self.files.digest(subfolders) if self.files else ""
        return {"reader": _reader(), "listing": listing, "units": self.units}


def keep_pictures(records: Sequence[Record], findings: Sequence[Finding]) -> None:
    """Save what decoding all pictures showed; it holds until a picture or the annotation file changes.

    Saves nothing for a part of a data set, without a cache, or without an image folder whose listing shows changes.
    """
    if not isinstance(records, PackedRecords) or records.again is None or records.digests is None:
        return
    home, hashes, _ = records.again.args
    facts = _read_sealed(home / FACTS)
    if facts is not None and facts["inputs"]["listing"] and len(records) == len(records.packed.image_ids):
        date = datetime.date.today().isoformat()
        with suppress(OutputError):
            body = {
                "date": date, "decoder": PIL.__version__, "facts": hashes, "findings": findings,
                "digests": records.digests.astype("<u8").tobytes().hex(),
            }  # fmt: skip
            _write_sealed(home / PICTURES, body)


def map_again(home: Path, hashes: dict[str, str], trusted: dict[str, list[int]]) -> Packed:
    """Map the arrays of an entry in another process of the same run.  Raises DataError if they have changed."""
    packed = _mapped(home, hashes, dict(trusted))
    if packed is None:
        raise DataError(f"{home}: the cache was changed while it was in use; start again, or set data.cache=''")
    return packed


def _mapped(home: Path, hashes: dict[str, str], trusted: dict[str, list[int]]) -> Packed | None:
    """Map the arrays; return None if one is missing or damaged.  trusted: as in `_is_same`."""
    arrays = {}
    for name in Packed._fields:
        path = home / f"{name}.npy"
        try:
            if name not in hashes or not _is_same(path, hashes[name], trusted):
                return None
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # slicing memmap is slow
        except (OSError, ValueError):
            return None
    return Packed(**arrays)


def _is_same(path: Path, digest: str, trusted: dict[str, list[int]]) -> bool:
    """Return whether a file still has the digest, without hashing it if its stat is trusted.  Raises OSError.

    trusted: {file name: stat} of files that had the right digest at that stat; updated in place.  A stat with very
    recent times is not trusted: it would not show a change within the same tick of the clock.
    """
    stat = _stat(path)
    if trusted.get(path.name) == stat:
        return True
    if _hash(path) != digest:
        return False
    if time.time_ns() - max(stat[1:3]) > SETTLED:
        trusted[path.name] = stat
    return True


def _stat(path: Path) -> list[int]:
    """Return a file's size, times of change, inode and device; no other file shares them."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(folder: Path, name: str, values: np.ndarray) -> str:
    """Write an array to a new file.  Returns the file's hash."""
    with create(folder / f"{name}.npy") as file:
        np.save(file, values, allow_pickle=False)
    return _hash(folder / f"{name}.npy")


def _reader() -> str:
    """Hash the reader's code: another version of it cannot use what this one saved."""
    hashed = hashlib.sha256()
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        hashed.update(module.read_bytes())
    return hashed.hexdigest()


def _write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write JSON with its hash, whole or not at all.  Raises OutputError."""
    text = json.dumps(body)
    sweep(path.parent)
    write_whole(path, hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def _read_sealed(path: Path) -> Any:
    """Read what `_write_sealed` wrote; return None if it is missing or damaged."""
    try:
        seal, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == seal else None
    except (OSError, ValueError):
        return None


def _finding(fields: list[Any]) -> Finding:
    finding = Finding(*fields)
    return finding._replace(examples=tuple(finding.examples), image_ids=tuple(finding.image_ids))


def _unwritable(path: str | Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"data.cache: {path} cannot be written ({reason}): the data is read again at every start"
