"""Read file names that were written on another machine: with backslashes, as URLs, as absolute paths, or leading up."""

import re
from typing import Any

from gndet.data.datasets.faults import Fault

_FOREIGN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]|[/\\]")  # a URL, a drive, an absolute path
_QUOTED = re.compile(r"(?:%[0-9A-Fa-f]{2})+")


def split_name(name: Any) -> tuple[str, str]:
    """Split a file_name into folder and file.  Raises Fault for a name that is not text, is absolute, or leads up."""
    if not isinstance(name, str) or not name:
        raise Fault("file-name", "is not the name of a file in the image folder")
    *parents, leaf = [part for part in name.split("/") if part not in ("", ".")] or [""]
    if name.startswith("/") or ".." in parents or leaf == "..":
        raise Fault("file-escape", "leads out of the image folder")
    return "/".join(parents), leaf


def is_foreign(name: str) -> bool:
    """Return whether a name cannot be that of a file below a folder: it is a URL, is absolute, or leads up."""
    return bool(_FOREIGN.match(name)) or ".." in re.split(r"[/\\]", name)


def readings(name: str) -> list[list[str]]:
    """List what a name may mean on this machine: the parts of a path, of which the last is the file.

    The name as it is comes first, then without what follows ? or #, then the paths in the query of a URL, then all
    unquoted.  Empty for a name that no file can have.
    """
    if "\0" in name or re.search("[\ud800-\udc7f\udd00-\udfff]", name):  # the rest stands for bytes
        return []
    path, query = re.split("[?#]", name)[0], name.partition("?")[2]
    texts = [name, path, *(pair.partition("=")[2] for pair in query.split("&"))]
    texts += list(map(_unquoted, texts))
    split = [re.split(r"[/\\]+", text) for text in dict.fromkeys(texts)]
    found = [[part for part in parts if part not in ("", ".", "..")] for parts in split]
    return [parts for parts in found if parts]


def _unquoted(text: str) -> str:
    """Decode %20 and the like in the text of a URL."""
    return _QUOTED.sub(lambda found: bytes.fromhex(found[0].replace("%", "")).decode("utf-8", "replace"), text)
