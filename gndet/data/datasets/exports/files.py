"""Read JSON files of an export, and find its pictures if it does not say where they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES

TRIED = 100  # names looked for in each folder


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
