"""The folder in which a run or a study works: locked, and known even if it is moved meanwhile.

The files of a run in it, and whether a run may begin there, are in run_folder.py.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gndet.checkpoint import CHECKPOINTS
from gndet.distributed.collectives import all_gather
from gndet.distributed.process import Process
from gndet.errors import GndetError, TrainingError
from gndet.files import CONFIG, lock_file, sweep

LOCK = ".lock"
HELD = "/proc/self/fd"  # where Linux shows open folders by number
LOCK_WAIT = 10.0  # seconds that a killed run's process may take to end


class WorkFolder:
    """A folder known by device and inode once it is open, so that what is written goes to it wherever it is moved."""

    def __init__(self, named: Path) -> None:
        """named: the path that the user gave."""
        self.named = named
        self._descriptor: int | None = None

    @property
    def path(self) -> Path:
        """Where the folder is now; if it was removed, a path at which nothing can be made."""
        if self._descriptor is None or not self.is_moved:
            return self.named
        held = Path(f"{HELD}/{self._descriptor}")
        with suppress(OSError):
            place = Path(os.readlink(held))
            if os.path.samestat(os.stat(place), os.fstat(self._descriptor)):
                return place
        return held

    @property
    def is_moved(self) -> bool:
        """Whether the named path no longer leads to this folder; not because a disk does not answer."""
        if self._descriptor is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.named), os.fstat(self._descriptor))
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

    @property
    def is_removed(self) -> bool:
        """Whether the folder was removed."""
        return self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0

    def error(self, when: str, unsaved: GndetError | None = None) -> TrainingError:
        """Return the error that ends a run whose folder was moved.

        when: what was done, e.g. "after update 7".  unsaved: why it could not be saved where the folder is now.
        """
        if self.is_removed:
            return TrainingError(
                f"{self.named}: this folder was removed, or moved to another disk, while it was in use, {when}, "
                "and nothing more could be saved"
            )
        there, done = self.path, f"not saved: {unsaved}" if unsaved else "saved there"
        where = f"moved to {there}" if there.parent != Path(HELD) else "moved, or another is mounted over it"
        return TrainingError(
            f"{self.named}: this folder was {where} while it was in use, {when}, and {done}; move it back, or go on "
            f"with out={there}"
        )

    def open(self) -> None:
        """Open the folder, if that is possible."""
        self.close()
        with suppress(OSError):
            self._descriptor = os.open(self.named, os.O_RDONLY | os.O_DIRECTORY)

    def lock(self) -> None:
        """Lock the folder until it is closed, whatever is removed from it.  Raises BlockingIOError."""
        if self._descriptor is not None:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # e.g. NFS locks no folders; the lock file remains
                pass

    def close(self) -> None:
        """Close the folder, and unlock it also for forked processes."""
        if self._descriptor is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)


@contextmanager
def locked(out: Path, proc: Process, is_own: Callable[[Path], bool]) -> Iterator[WorkFolder]:
    """Prevent two runs from training into the same folder while the context lasts; create a missing folder.

    A folder of the user's, for which is_own is false, gets no lock file: nothing is written into it.
    Raises TrainingError on every rank if another run holds the lock.  A lock ends with its process.  A folder that
    cannot be opened, or on a file system without locks, is not locked.
    Folders that were created here and hold no record at the end are removed.
    """
    refusal, folder = list[str](), WorkFolder(out)
    made = [path for path in (out, *out.parents) if not os.path.exists(path)] if proc.first else []
    with ExitStack() as stack:
        stack.callback(folder.close)
        if proc.first:
            stack.callback(_remove_empty, folder, made)
            try:
                _open_and_lock(folder)
                if is_own(out):
                    stack.callback(lock_file(out / LOCK, LOCK_WAIT).close)
                    sweep(out)
            except BlockingIOError:
                made.clear()
                refusal = [f"{out}: another process trains into this folder: {_owner(out)}; choose another out=FOLDER"]
            except OSError:
                pass
        for text in all_gather(refusal, proc)[0]:
            raise TrainingError(text)
        if not proc.first:
            folder.open()
        yield folder


def _open_and_lock(folder: WorkFolder) -> None:
    """Create, open and lock a folder within LOCK_WAIT seconds.  Raises BlockingIOError, or OSError if it cannot be."""
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        folder.named.mkdir(parents=True, exist_ok=True)
        folder.open()
        with suppress(BlockingIOError):
            folder.lock()
            if not folder.is_moved:  # --fresh of another process may have moved it aside in the meantime
                return
        if time.monotonic() > deadline:
            raise BlockingIOError
        time.sleep(0.2)


def _owner(out: Path) -> str:
    """Return the process that a lock file names."""
    with suppress(OSError):
        descriptor = os.open(out / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(200).decode(errors="replace").strip()
    return "unknown"


def _remove_empty(folder: WorkFolder, made: list[Path]) -> None:
    """Remove the folders that were made for a run that recorded nothing, e.g. on a full disk."""
    out = folder.named
    with suppress(OSError):
        if made and not folder.is_moved and {path.name for path in out.iterdir()} <= {LOCK, CONFIG, CHECKPOINTS}:
            if any((out / CHECKPOINTS).glob("*")):
                return
            (out / CONFIG).unlink(missing_ok=True)  # first: with it alone, the run seems to have lost its checkpoints
            if (out / CHECKPOINTS).exists():
                (out / CHECKPOINTS).rmdir()
            (out / LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
