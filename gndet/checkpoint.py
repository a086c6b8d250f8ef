"""Checkpoints are folders that are either whole or absent: `<group>.safetensors`, meta.json, manifest.json.

Nothing is pickled.  A folder is written under a temporary name and synced file by file, its manifest (size and sha256
of every other file) last.  Then it is renamed.  A kill or a power cut at any moment leaves the previous checkpoint.
A run folder holds checkpoints/update-0001200/..., and `last` and `best`, relative links into checkpoints/.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from gndet.errors import CheckpointError
from gndet.files import create, folder_written_whole, remove, sweep, sync_folder, temporary_name, valid_text

MANIFEST = "manifest.json"
MAX_MANIFEST = 1_000_000  # bytes; it lists a handful of files
META = "meta.json"
TENSORS = ".safetensors"  # suffix of a group's file
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"  # inside a run folder: their folder, and links into it


class Checkpoint(NamedTuple):
    """A checkpoint that has been read and verified; its tensors are on the CPU."""

    path: Path
    groups: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


class _File(BaseModel, extra="forbid"):
    """The manifest's entry for one file."""

    bytes: int
    sha256: str


class _Manifest(BaseModel, extra="forbid"):
    """The content of manifest.json."""

    format: Literal[1]
    files: dict[str, _File]


def save_checkpoint(folder: Path, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write a checkpoint so that it is whole or absent after a crash at any moment.

    folder: destination; an existing checkpoint is replaced.  groups: tensors on any device, by group ("model", "ema",
    "optimizer") and key.  meta: values that JSON can hold.  Only one process may write at a time.
    Raises CheckpointError with the path and the reason (disk full, no permission); the existing checkpoint stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_written_whole(folder) as temporary:
            _write_files(temporary, groups, meta)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save the checkpoint: {error.strerror or error}") from error


def load_checkpoint(folder: Path, groups: Sequence[str] | None = None) -> Checkpoint:
    """Read a checkpoint and verify every file against the manifest.

    groups: names of the groups to return (default: all).
    Raises CheckpointError that names the file and its fault, or lists the groups that the checkpoint has.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: not a gndet checkpoint: {_describe(folder)}")
    try:
        manifest = _Manifest.model_validate_json(_read(folder / MANIFEST, at_most=MAX_MANIFEST))
    except ValidationError as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged: {error.errors()[0]['msg']}") from None
    known = [name.removesuffix(TENSORS) for name in manifest.files if name.endswith(TENSORS)]
    wanted = known if groups is None else groups
    if missing := [name for name in wanted if name not in known]:
        raise CheckpointError(f"{folder}: no group {', '.join(missing)}; it has {', '.join(known)}")
    meta: dict[str, Any] | None = None
    tensors = {}
    for name, entry in manifest.files.items():
        data = _verified(folder, name, entry)
        try:
            if name == META:
                meta = _parsed(data)
            elif name.removesuffix(TENSORS) in wanted:
                tensors[name.removesuffix(TENSORS)] = safetensors.torch.load(data)
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:  # a nest, a type torch lacks
            expected = "a JSON object" if name == META else "a safetensors file"
            raise CheckpointError(f"{folder / name}: not {expected}: {error}") from None
    if meta is None:
        raise CheckpointError(f"{folder / MANIFEST}: damaged: it does not list {META}")
    return Checkpoint(folder, tensors, meta)


def run_checkpoints(run: Path) -> list[Path]:
    """List the checkpoint folders of a run, the newest update first, without opening them."""
    found = [path for path in (run / CHECKPOINTS).glob("update-*") if re.fullmatch(r"update-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update-")), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint of a run that passes verification.

    Returns it, or None if there is none, and one line for each newer, damaged checkpoint that was passed over.
    """
    passed_over: list[str] = []
    for folder in run_checkpoints(run):
        try:
            return load_checkpoint(folder), passed_over
        except CheckpointError as error:
            passed_over.append(f"passed over {error}")
    return None, passed_over


def point(run: Path, name: str, folder: Path) -> None:
    """Make run/name (LAST, BEST) a relative link to a checkpoint folder, atomically.

    Raises CheckpointError if the link cannot be written.
    """
    temporary = temporary_name(run / name)
    try:
        os.symlink(os.path.relpath(folder, run), temporary)
        os.replace(temporary, run / name)
        sync_folder(run)
    except OSError as error:
        remove(temporary)
        raise CheckpointError(f"{run / name}: cannot point it at {folder.name}: {error.strerror}") from error


def prune(run: Path, keep_last: int) -> None:
    """Remove the checkpoints of a run except the newest keep_last and those that `last` and `best` point at.

    keep_last: at least 1.  Raises CheckpointError if a checkpoint cannot be removed.
    """
    linked = {(run / name).resolve() for name in (LAST, BEST)}
    for folder in run_checkpoints(run)[keep_last:]:
        if folder.resolve() in linked:
            continue
        temporary = temporary_name(folder)
        try:
            os.rename(folder, temporary)  # a kill during removal must not leave a damaged checkpoint
            shutil.rmtree(temporary)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot remove the checkpoint: {error.strerror}") from error


def sweep_run(run: Path) -> None:
    """Remove what a killed process left in a run folder, as `sweep` does."""
    sweep(run / CHECKPOINTS)
    sweep(run)


def resolve(path: Path) -> Path:
    """Find the checkpoint that a path refers to.

    path: a checkpoint folder, or a run folder, whose best checkpoint is taken, else its last, else its newest.
    Returns the checkpoint folder with links resolved; it is not verified.
    Raises CheckpointError that says what was expected and what the path holds.
    """
    for folder in (path, path / BEST, path / LAST, *run_checkpoints(path)):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    raise CheckpointError(
        f"{path}: neither a gndet checkpoint (a folder with {MANIFEST}) nor a run folder "
        f"(with {BEST}, {LAST} or {CHECKPOINTS}/update-...): {_describe(path)}"
    )


def _write_files(folder: Path, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write and flush all files of a checkpoint, the manifest last."""
    files = {}
    for group, tensors in groups.items():
        copies = {  # copies: safetensors refuses tensors that share memory
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        files[group + TENSORS] = _write(folder / (group + TENSORS), safetensors.torch.save(copies))
    files[META] = _write(folder / META, json.dumps(meta, indent=1).encode())
    _write(folder / MANIFEST, _Manifest(format=1, files=files).model_dump_json(indent=1).encode())


def _write(path: Path, data: bytes) -> _File:
    """Write one file through to the disk; return its entry in the manifest."""
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _File(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read(path: Path, *, at_most: int | None = None, exactly: int | None = None) -> bytes:
    """Check the size of a regular file and read it; refuse links, which may lead anywhere, and pipes."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: damaged: not a regular file")
        if exactly is not None and status.st_size != exactly:
            raise CheckpointError(f"{path}: damaged: {status.st_size} bytes, expected {exactly}")
        if at_most is not None and status.st_size > at_most:
            raise CheckpointError(f"{path}: damaged: {status.st_size} bytes, expected at most {at_most}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None


def _parsed(text: bytes) -> dict[str, Any]:
    """Parse meta.json, which may hold whatever `json.dumps` writes; class names become valid Unicode.

    Raises ValueError or RecursionError.
    """
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError(f"a JSON {type(meta).__name__}")
    if isinstance(meta.get("classes"), list):
        meta["classes"] = [valid_text(name) if isinstance(name, str) else name for name in meta["classes"]]
    return meta


def _verified(folder: Path, name: str, entry: _File) -> bytes:
    """Read one file of a checkpoint and compare it with its entry in the manifest."""
    if Path(name).name != name or "\0" in name:
        raise CheckpointError(f"{folder / MANIFEST}: lists {name!r}, which is outside the checkpoint")
    data = _read(folder / name, exactly=entry.bytes)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{folder / name}: damaged: its sha256 differs from the manifest's")
    return data


def _describe(path: Path) -> str:
    """Describe what is at a path that is not a checkpoint."""
    if (path.parent / MANIFEST).is_file():
        return f"it is a file of the checkpoint {path.parent}; name this folder"
    if path.is_file():
        return "it is a file; train.weights and gndet convert read files of other toolkits"
    if not path.is_dir():
        return "there is no such folder"
    names = sorted(child.name for child in path.iterdir())
    return f"the folder holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
