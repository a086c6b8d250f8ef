"""Checkpoints are folders that are either whole or absent: `<group>.safetensors`, meta.json, manifest.json.

Nothing is pickled.  A folder is written under a temporary name and synced file by file, its manifest (size and sha256
of every other file) last.  Then it is renamed.  A kill or a power cut at any moment leaves the previous checkpoint.
A run folder holds checkpoints/update-0001200/..., and `last` and `best`, relative links into checkpoints/.  Where links
cannot be made they are files that hold the path; in a copy of a run they may be copied folders, or missing.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from gndet.errors import CheckpointError, OutputError
from gndet.files import create, folder_written_whole, remove, sweep, sync_folder, temporary_name, write_whole
from gndet.text import valid_text

MANIFEST = "manifest.json"
MAX_MANIFEST, MAX_FILES = 1_000_000, 32  # bytes, and files that it may list
MAX_META = 1 << 25  # bytes; in memory its values take a multiple
META = "meta.json"
TENSORS = ".safetensors"  # suffix of a group's file
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"  # inside a run folder: their folder, and links into it
UPDATE = "update-{:07d}"  # name of a checkpoint folder of a run


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
    files: Annotated[dict[str, _File], Field(max_length=MAX_FILES)]


def save_checkpoint(folder: Path, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write a checkpoint so that it is whole or absent after a crash at any moment.

    folder: destination; an existing checkpoint is replaced, and a missing parent is made, but not the parent's parent:
    a run folder may have been moved.  groups: tensors on any device, by group ("model", "ema", "optimizer") and key.
    meta: values that JSON can hold.  Only one process may write at a time.
    Raises CheckpointError with the path and the reason (disk full, no permission); the existing checkpoint stays.
    """
    try:
        folder.parent.mkdir(exist_ok=True)
        with folder_written_whole(folder) as temporary:
            _write_files(temporary, groups, meta)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save the checkpoint: {error.strerror or error}") from error


def load_checkpoint(folder: Path, groups: Sequence[str] | None = None) -> Checkpoint:
    """Read a checkpoint and verify every file against the manifest.

    groups: names of the groups to return (default: all).
    Raises CheckpointError that names the file and its fault, or lists the groups that the checkpoint has.
    """
    if not os.path.isfile(folder / MANIFEST):
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
    """List the checkpoint folders of a run, the newest update first, without opening them.

    Returns [] if the run has no folder of checkpoints.  Raises CheckpointError if it has one that cannot be read.
    """
    folder = run / CHECKPOINTS
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if re.fullmatch(r"update-[0-9]{1,18}", entry.name)]
    except OSError as error:
        if not os.path.lexists(folder):
            return []
        leads = f"it is a link to {os.readlink(folder)}: " if folder.is_symlink() else ""
        raise CheckpointError(f"{folder}: cannot read the checkpoints: {leads}{error.strerror}") from None
    return [folder / name for name in sorted(names, key=lambda name: int(name.removeprefix("update-")), reverse=True)]


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint of a run that passes verification.

    Returns it, or None if there is none, and one line for each newer, damaged checkpoint that was passed over.  Raises
    CheckpointError if the folder of checkpoints cannot be read.
    """
    passed_over: list[str] = []
    for folder in run_checkpoints(run):
        try:
            return load_checkpoint(folder), passed_over
        except CheckpointError as error:
            passed_over.append(f"passed over {error}")
    return None, passed_over


def point(run: Path, name: str, folder: Path) -> None:
    """Let run/name (LAST, BEST) lead to a checkpoint folder, atomically: a relative link, or a file with its path.

    Raises CheckpointError if neither can be written.
    """
    temporary, target = temporary_name(run / name), os.path.relpath(folder, run)
    try:
        try:
            os.symlink(target, temporary)
        except OSError:  # exFAT, SMB and some cloud mounts have no links
            write_whole(run / name, f"{target}\n")
        else:
            os.replace(temporary, run / name)
        sync_folder(run)
    except (OSError, OutputError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise CheckpointError(f"{run / name}: cannot let it lead to a checkpoint: {reason}") from error
    finally:
        remove(temporary)


def led_to(path: Path) -> Path:
    """Return the checkpoint folder that a path stands for: of a file `last` or `best`, the one that it names."""
    if os.path.isfile(path):
        with suppress(CheckpointError):
            text = _read(path, at_most=200).decode(errors="replace").strip()
            if re.fullmatch(rf"{CHECKPOINTS}/update-[0-9]+", text):
                return path.parent / text
    return path


def mend_links(run: Path, newest: Checkpoint) -> list[str]:
    """Let `last` and `best` lead to the newest and the best checkpoint.  Returns a line for each that cannot."""
    problems = []
    for name, folder in ((LAST, newest.path), (BEST, best_checkpoint(newest.path, newest.meta))):
        if folder is not None and os.path.isdir(folder) and not _is_same(led_to(run / name), folder):
            try:
                point(run, name, folder)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def adopt_copies(run: Path) -> None:
    """Make links of `last` and `best` if they are copies of checkpoints: some tools copy what links lead to.

    A copy replaces a checkpoint that is missing or damaged, and is removed beside a whole one.  A damaged copy stays.
    """
    for copy in (run / LAST, run / BEST):
        if copy.is_symlink() or not os.path.isfile(copy / MANIFEST):
            continue
        with suppress(CheckpointError, OSError):
            update = load_checkpoint(copy, ()).meta.get("update")
            if type(update) is int:
                folder = run / CHECKPOINTS / UPDATE.format(update)
                _adopt(copy, folder)
                point(run, copy.name, folder)


def _adopt(copy: Path, folder: Path) -> None:
    """Move a whole copy of a checkpoint to its place, or remove it if its place holds a whole one.  Raises OSError."""
    folder.parent.mkdir(exist_ok=True)
    discarded = temporary_name(folder)  # sweep() removes it after a kill
    try:
        load_checkpoint(folder, ())
        os.rename(copy, discarded)
    except CheckpointError:
        if os.path.lexists(folder):
            os.rename(folder, discarded)
        os.rename(copy, folder)
        sync_folder(folder.parent)
    remove(discarded)


def prune(run: Path, keep_last: int, best: Path | None = None) -> None:
    """Remove the checkpoints of a run except the newest keep_last, the best, and those that `last` and `best` lead to.

    keep_last: at least 1.  Raises CheckpointError if a checkpoint cannot be removed.
    """
    kept = [os.path.realpath(path) for path in (led_to(run / LAST), led_to(run / BEST), best) if path is not None]
    for folder in run_checkpoints(run)[keep_last:]:
        if os.path.realpath(folder) in kept:
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
    for folder in _places(path):
        if os.path.isfile(folder / MANIFEST):
            return Path(os.path.realpath(folder))
    raise CheckpointError(
        f"{path}: neither a gndet checkpoint (a folder with {MANIFEST}) nor a run folder "
        f"(with {BEST}, {LAST} or {CHECKPOINTS}/update-...): {_describe(path)}"
    )


def _places(path: Path) -> Iterator[Path]:
    """Yield where the checkpoint that a path refers to may be, the most likely place first."""
    yield led_to(path)
    best, last = led_to(path / BEST), led_to(path / LAST)
    try:
        folders = run_checkpoints(path)
    except CheckpointError:
        yield from (best, last)  # they may be copies
        raise
    if folders and not _is_same(last, folders[0]):  # there are no links, or a kill came before they were changed
        for folder in folders:
            with suppress(CheckpointError):
                known = best_checkpoint(folder, load_checkpoint(folder, ()).meta)
                yield known or (best if best.is_symlink() else folder)
                yield folder
                break
    yield from (best, last, *folders)


def best_checkpoint(newest: Path, meta: dict[str, Any]) -> Path | None:
    """Return the folder of the best checkpoint of a run by the meta of its newest; None if there is none yet."""
    update = meta.get("best_update")
    return newest.with_name(UPDATE.format(update)) if type(update) is int and update > 0 else None


def _is_same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _write_files(folder: Path, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write and flush all files of a checkpoint, the manifest last."""
    files = {}
    for group, tensors in groups.items():
        copies = {  # copies: safetensors refuses tensors that share memory
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        files[group + TENSORS] = _write(folder / (group + TENSORS), safetensors.torch.save(copies))
    text = json.dumps(meta, indent=1).encode()
    if len(text) > MAX_META:  # it could not be read again
        raise CheckpointError(f"{folder / META}: {len(text)} bytes, expected at most {MAX_META}")
    files[META] = _write(folder / META, text)
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
    data = _read(folder / name, exactly=entry.bytes, at_most=MAX_META if name == META else None)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{folder / name}: damaged: its sha256 differs from the manifest's")
    return data


def _describe(path: Path) -> str:
    """Describe what is at a path that is not a checkpoint."""
    if os.path.lexists(path) and os.path.isfile(path.parent / MANIFEST):
        return f"it is a file of the checkpoint {path.parent}; name this folder"
    if os.path.isfile(path):
        return "it is a file; train.weights and gndet convert read files of other toolkits"
    if not os.path.isdir(path):
        return "there is no such folder"
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return f"the folder cannot be read: {error.strerror}"
    return f"the folder holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
