"""Guess which folder holds the pictures of an annotation file."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gndet.data.datasets.file_names import is_foreign, readings
from gndet.data.datasets.json_parts import as_utf8

NAMES_TRIED = 100  # file names of an annotation file to look for
APART = re.compile(r".*annot.*|anns?|labels?|jsons?|gt", re.IGNORECASE)  # names of folders that hold no pictures
_NAME = rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")'


def guess_folder(path: Path) -> Path | None:
    """Find the folder, beside a JSON file or its folder, that has most of its first pictures or is named after it.

    For annotations/instances_train2017.json, try train2017, images/train2017 and images first, then all others; of
    folders that have equally many pictures, the first is taken.  What lies beside the folder of the file is another
    data set, unless that folder is named after annotations.
    """
    stem = path.stem.split("_", 1)[-1]
    best, most = None, (0, 0)
    with suppress(OSError):  # the reader reports what it cannot read
        names = _first_names(path)
        bases = path.absolute().parents[:2] if names else ()
        for folder in _candidates(bases, stem, path.stem):
            hits = _count_hits(folder, names)
            if hits > most:
                best, most = folder, hits
            if most[1] == len(names):
                break
        if best is None:
            named = [folder for base in bases for folder in (base / stem, base / "images" / stem)]
            return next(filter(Path.is_dir, named), None)
    return best


def _candidates(bases: Sequence[Path], stem: str, whole: str) -> Iterator[Path]:
    for base in bases:
        yield from (base / stem, base / "images" / stem, base / "images", base / whole, base)
        if base == bases[0] or APART.fullmatch(bases[0].name):
            yield from sorted(entry for entry in base.iterdir() if entry.is_dir())


def _count_hits(folder: Path, names: list[str]) -> tuple[int, int]:
    """Count the names whose picture is in the folder: by any end of the name, and by the whole name."""
    whole = [name for name in names if not is_foreign(name) and _has(folder, name, name.replace("\\", "/"))]
    return len(whole) + sum(_has_end(folder, name) for name in set(names) - set(whole)), len(whole)


def _has_end(folder: Path, name: str) -> bool:
    return _has(folder, *("/".join(parts[start:]) for parts in readings(name) for start in range(len(parts))))


def _has(folder: Path, *names: str) -> bool:
    return any(os.path.isfile(folder / name) for name in names)


def _first_names(path: Path) -> list[str]:
    """List the first pictures that a JSON file names, each once; LVIS gives only their URLs."""
    text = as_utf8(path.read_bytes()) if path.is_file() else b""
    for key in (b"file_name", b"coco_url"):
        names: dict[str, None] = {}
        for found in re.finditer(_NAME % key, text):
            with suppress(ValueError):
                name = json.loads(found[1]).encode("utf-8", "replace").decode()
                names |= {name: None} if name and "\0" not in name else {}
            if len(names) == NAMES_TRIED:
                break
        if names:
            return list(names)
    return []
