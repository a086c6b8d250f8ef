"""T7 and T20: damaged checkpoints, a full disk, a slow one."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faults.launch import POLL, Started, finish, start, unbroken
from faults.tiny import check, check_same, newest_update, read_trace
from gndet.checkpoint import CHECKPOINTS, run_checkpoints
from gndet.training.log import read_metrics

TERM = int(signal.SIGTERM)
SMALL = 1 << 20  # bytes: less than the weights, more than the log
SAVING = ("train.checkpoint_every=1", "train.eval_every=0", "train.schedule.updates=16")


def damaged(folder: Path, first: int | None = None) -> str:
    """T7.  first: how many kinds of damage to try, all by default."""
    options = ("train.eval_every=3",)
    base = start(folder, "base", *options, faults={"signal_after": [TERM, 5]})
    base.expect(0)
    files = sorted(path.name for path in (base.out / "last").iterdir())
    cases = [(name, how) for name in files for how in ("flipped", "cut", "removed")][:first]
    for name, how in cases:
        what = f"{how}-{name}"
        shutil.copytree(base.out, folder / what, symlinks=True)
        damage(folder / what / "last" / name, how)
        text = finish(folder, what, *options)
        check("passed over " in text and "update-0000005" in text, f"{what}: the damage is not reported: {text}")
        check("continuing after update 4 of 6" in text, f"{what}: does not resume after update 4: {text}")
        check_same(folder / what, unbroken(folder, *options), what)
        shutil.rmtree(folder / what)
    for saved in run_checkpoints(base.out):
        damage(saved / "model.safetensors", "flipped")
    text = start(folder, "base", *options).expect(2)
    check("no checkpoint is whole; --fresh starts over" in text, f"all damaged: {text}")
    return f"{len(cases)} of {len(cases)} kinds of damage reported, bit-identical; all damaged: refused, status 2"


def damage(path: Path, how: str) -> None:
    """Change a byte in the middle of a file, cut off its second half, or remove it."""
    data = path.read_bytes()
    half = len(data) // 2
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:half] + (bytes([data[half] ^ 0x10]) + data[half + 1 :] if how == "flipped" else b""))


class Disk:
    """The disk that a run writes to: a small tmpfs, or otherwise a limit on the size of its files."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted

    def fill(self, run: Started) -> None:
        """Fill the disk."""
        if not self.mounted:
            resource.prlimit(run.pids[0], resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))
            return
        with (self.folder / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def clear(self, run: Started) -> None:
        """Make room again."""
        if self.mounted:
            (self.folder / "filler").unlink()
        elif None in run.statuses():
            resource.prlimit(run.pids[0], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Yield a disk that can be filled, in a folder."""
    place = folder / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and _quiet("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(place))
    try:
        yield Disk(place, mounted)
    finally:
        if mounted:
            _quiet("umount", "--lazy", str(place))


def _quiet(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def full(folder: Path) -> str:
    """T20."""
    with disk(folder) as room:
        stays_full(folder, room)
        kind = "a full tmpfs" if room.mounted else "a limit on file sizes"
    return (
        f"{kind}: training continued, the previous checkpoint loads, status 2 with the reason, the same command ended "
        "bit-identical"
    )


def full_for_a_while(folder: Path) -> str:
    """T20, with room again."""
    with disk(folder) as room:
        has_room_again(folder, room)
        has_room_at_the_end(folder)
        stopped_when_full(folder, room)
    return "with room again in time: status 0; stopped on a full disk: status 2; bit-identical"


def fill_after(folder: Path, room: Disk, name: str, updates: list[int]) -> Started:
    """Start a run whose disk is full from update 3 on, also for its checkpoint; it waits after the given updates."""
    run = start(folder, f"disk/{name}", *SAVING, faults={"gate": [3, *updates]})
    run.wait_for("update 2/")
    while not (run.out / CHECKPOINTS / "update-0000002").exists() or list(run.out.glob(".tmp-*")):
        check(None in run.statuses(), run.tail())
        time.sleep(POLL)
    run.wait_for("fault: gate 3")
    room.fill(run)
    run.open_gate(3)
    return run


def stays_full(folder: Path, room: Disk) -> None:
    """The disk is full until the end."""
    run = fill_after(folder, room, "full", [])
    text = run.expect(2)
    check(text.count("training continues without this one") > 10, f"training did not continue: {text}")
    check("the run is finished, but its last checkpoint is missing" in text, f"no clear end: {text}")
    check(newest_update(run.out) == 2, f"saved is update {newest_update(run.out)}, expected 2")
    left = [path.name for path in (run.out / CHECKPOINTS).glob(".*")]
    check(not left, f"half-written checkpoints are left on a full disk: {left}")
    logged = [line["update"] for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "train"]
    check(logged == list(range(1, len(logged) + 1)) and len(logged) >= 2, f"metrics.jsonl has the updates {logged}")
    room.clear(run)
    finish(folder, "disk/full", *SAVING)
    check_same(run.out, unbroken(folder, *SAVING), "after a full disk")


def has_room_again(folder: Path, room: Disk) -> None:
    """The disk has room again before the end."""
    run = fill_after(folder, room, "again", [5])
    run.wait_for("training continues without this one")
    room.clear(run)
    run.open_gate(5)
    run.expect(0)
    check(newest_update(run.out) == 16, f"saved is update {newest_update(run.out)}, expected 16")
    logged = [line["update"] for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "train"]
    check(logged == list(range(1, 17)), f"metrics.jsonl has the updates {logged}, expected 1 to 16")
    shown = [event.step for event in EventAccumulator(str(run.out / "tensorboard")).Reload().Scalars("train/loss")]
    check(shown == sorted(set(shown)) and {1, 2, *range(6, 17)} <= set(shown), f"TensorBoard has the updates {shown}")
    check_same(run.out, unbroken(folder, *SAVING), "with room again")


def has_room_at_the_end(folder: Path) -> None:
    """The disk is full for the last checkpoint, and has room at the second attempt."""
    text = finish(folder, "last", *SAVING, faults={"no_room": [16, 1]})
    check("update-0000016: cannot save the checkpoint: No space left on device" in text, f"not reported: {text}")
    check_same(folder / "last", unbroken(folder, *SAVING), "with room at the end")


def stopped_when_full(folder: Path, room: Disk) -> None:
    """A signal arrives while the disk is full: the run must not claim that its progress is saved."""
    run = fill_after(folder, room, "stopped", [5])
    run.wait_for("training continues without this one")
    run.signal(TERM)
    run.open_gate(5)
    text = run.expect(2)
    check("not saved: " in text and newest_update(run.out) == 2, f"a stop on a full disk: {text}")
    room.clear(run)
    finish(folder, "disk/stopped", *SAVING)
    check_same(run.out, unbroken(folder, *SAVING), "stopped on a full disk")


def beside_training(folder: Path) -> str:
    """A slow disk does not delay the updates between two checkpoints."""
    trace = str(folder / "trace.jsonl")
    options = ("train.checkpoint_every=4", "train.schedule.updates=8")
    finish(folder, "run", *options, faults={"long_save": [4, 7, trace], "trace": [trace]})
    events = [(line["what"], line["update"]) for line in read_trace(Path(trace))]
    begins, ends = events.index(("save begins", 4)), events.index(("save ends", 4))
    between = [update for what, update in events[begins:ends] if what == "update"]
    check(between[:3] == [5, 6, 7], f"updates while a checkpoint was written: {between}, expected 5, 6, 7: {events}")
    check_same(folder / "run", unbroken(folder, *options), "with a slow disk")
    return "updates 5 to 7 were made while the checkpoint of update 4 was written; bit-identical"
