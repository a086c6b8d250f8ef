"""`python -m faults.inject FAULTS train CONFIG ...`: `gndet train ...` with faults in this process.

FAULTS is JSON, {name of a fault: its arguments}; the faults are the functions of FAULTS below.  They replace functions
of gndet only in this process, so that gndet itself contains no test code.
"""

import errno
import json
import math
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faults.tiny import THIN, note
from gndet import checkpoint, train
from gndet.data.datasets import shapes
from gndet.modeling import resnet
from gndet.toolbox.report import report
from gndet.training import checkpointing, work_folder
from gndet.training import update as micro_batch
from gndet.training import validation as run_evaluation


def main(arguments: Sequence[str]) -> None:
    """Install the faults, then run `gndet`, which raises SystemExit with its exit status."""
    for name, values in json.loads(arguments[0]).items():
        FAULTS[name](*values)
    resnet.WIDTH = THIN
    torch.set_num_threads(1)
    sys.argv[1:] = arguments[1:]
    runpy.run_module("gndet.cli", run_name="__main__")


def _before_updates(call: Callable[..., None]) -> None:
    """Call call(run, update) before the gradients of each update; updates are counted from 1."""
    gradients = train.compute_gradients

    def wrapped(run: Any, state: Any, batches: Any, size: int, stop: Any) -> Any:
        call(run, run.proc.watch._update + 1)
        return gradients(run, state, batches, size, stop)

    train.compute_gradients = wrapped


def _after_updates(call: Callable[..., None]) -> None:
    """Call call(run, update) after each update that was applied."""
    read = train.read

    def reading(run: Any, state: Any, progress: Any) -> Any:
        bad = read(run, state, progress)
        if bad is None:
            call(run, progress.update)
        return bad

    train.read = reading


# --- signals and time


def signal_after(number: int, update: int, rank: int = 0) -> None:
    """Send a rank a signal after it has applied an update."""
    _after_updates(lambda run, done: done == update and run.proc.rank == rank and os.kill(os.getpid(), number))


def signal_within(number: int, update: int, part: int) -> None:
    """Send the process a signal when it starts a micro-batch of an update; both are counted from 1."""
    now = {"update": 0, "part": 0}
    _before_updates(lambda run, update: now.update(update=update, part=0))
    to_device = micro_batch.to_device

    def wrapped(*arguments: Any) -> Any:
        now["part"] += 1
        if (now["update"], now["part"]) == (update, part):
            os.kill(os.getpid(), number)
        return to_device(*arguments)

    micro_batch.to_device = wrapped


def lock_wait(seconds: float) -> None:
    """Let a run wait so many seconds for the lock of its folder."""
    work_folder.LOCK_WAIT = seconds


def fresh_for(rank: int) -> None:
    """Let one rank of a run look for it as if it had been given --fresh."""
    set_up = train.set_up
    train.set_up = lambda cfg, out, fresh, proc: set_up(cfg, out, proc.rank == rank, proc)


def gate(*updates: int) -> None:
    """After each of these updates, report it and wait until `launch.Started.open_gate` is called."""

    def wait(run: Any, done: int) -> None:
        if done in updates:
            say(f"gate {done}")
        while done in updates and not os.path.exists(f"gate-{done}"):
            time.sleep(0.02)

    _after_updates(wait)


def say(text: str) -> None:
    """Report in the log that a fault begins: the scenario waits for these words."""
    os.write(1, f"fault: {text}\n".encode())


def slow_pictures(seconds: float, seed: int) -> None:
    """Let reading a picture of the drawn data set with this seed take some seconds."""
    draw_image = shapes.draw_image

    def wrapped(picture_seed: int, index: int, size: int) -> np.ndarray:
        if picture_seed == seed:
            say("slow picture")
            time.sleep(seconds)
        return draw_image(picture_seed, index, size)

    shapes.draw_image = wrapped


def slow_evaluation(seconds: float) -> None:
    """Let the evaluation of each picture take some seconds longer."""
    detect_share = run_evaluation.detect_share

    def wrapped(*arguments: Any, on_image: Callable[[int], None], **options: Any) -> Any:
        def slowly(image_id: int) -> None:
            say("slow evaluation")
            time.sleep(seconds)
            on_image(image_id)

        return detect_share(*arguments, on_image=slowly, **options)

    run_evaluation.detect_share = wrapped


def slow_report(seconds: float, deaf: bool = False) -> None:
    """Let the report at the end of a run take some seconds.  deaf: it swallows the first signal, as a library may."""

    def slowly(*_: Any) -> None:
        try:
            say("slow report")
            time.sleep(seconds)
        except BaseException:
            if not deaf:
                raise
            say("deaf report")
            time.sleep(seconds)

    report.report_on_ending = slowly


def _before_files(call: Callable[[int, int], None]) -> None:
    """Call call(update, file) before each file of a checkpoint is written; file counts from 1."""
    write, files, saving = checkpoint._write, Counter[Path](), _update_being_saved()

    def wrapped(path: Path, data: bytes) -> Any:
        files[path.parent] += 1
        call(saving[0], files[path.parent])
        return write(path, data)

    checkpoint._write = wrapped


def _update_being_saved() -> list[int]:
    """Return a list whose only number is the update of the checkpoint that is being saved."""
    save, saving = checkpointing.save_checkpoint, [0]

    def wrapped(folder: Path, *arguments: Any) -> None:
        saving[0] = int(folder.name.removeprefix("update-"))
        save(folder, *arguments)

    checkpointing.save_checkpoint = wrapped
    return saving


def slow_save(seconds: float, from_update: int) -> None:
    """Let each file of a checkpoint take some seconds to write, from an update on."""

    def slowly(update: int, file: int) -> None:
        if update >= from_update:
            say("slow save")
            time.sleep(seconds)

    _before_files(slowly)


def kill_while_saving(update: int) -> None:
    """Kill the process between the first and the second file of the checkpoint of an update."""
    _before_files(lambda saved, file: (saved, file) == (update, 2) and os.kill(os.getpid(), signal.SIGKILL))


def long_save(update: int, until: int, trace: str) -> None:
    """Let the save of an update last until a later update is done, at most a minute; note when saves begin and end."""
    made = threading.Event()
    _after_updates(lambda run, done: made.set() if done == until else None)
    _before_files(lambda saved, file: made.wait(60) if (saved, file) == (update, 1) else None)
    save_checkpoint = train.Saver._write

    def noted(self: Any, groups: Any, meta: Any, is_best: bool) -> Any:
        note(trace, what="save begins", update=meta["update"])
        result = save_checkpoint(self, groups, meta, is_best)
        note(trace, what="save ends", update=meta["update"])
        return result

    train.Saver._write = noted


# --- numbers


def not_finite(where: str, updates: list[int], rank: int) -> None:
    """Let the first picture of a rank in these updates produce NaN (where: image, gradient) or inf (where: loss)."""
    state: dict[str, Any] = {"armed": False, "key": None, "hit": False}

    def arm(run: Any, update: int) -> None:
        if not state.setdefault("hooked", False):
            state["hooked"] = True
            run.model.register_forward_pre_hook(look)
            run.model.register_forward_hook(spoil_loss)
            run.model.backbone.register_forward_pre_hook(spoil_image)
            run.model.fpn.register_forward_hook(spoil_gradient)
        state.update(armed=update in updates and run.proc.rank == rank, key=None)

    def look(module: Any, arguments: tuple[Any, ...]) -> None:
        keys = arguments[0].keys.tolist()
        if state["armed"] and state["key"] is None:
            state["key"] = keys[0]
        state["hit"] = state["armed"] and state["key"] in keys

    def spoil_loss(module: Any, arguments: tuple[Any, ...], losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses | {"loss_cls": losses["loss_cls"] + math.inf} if state["hit"] and where == "loss" else losses

    def spoil_image(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (arguments[0] * math.nan, *arguments[1:]) if state["hit"] and where == "image" else None

    def spoil_gradient(module: Any, arguments: tuple[Any, ...], levels: list[Tensor]) -> None:
        if state["hit"] and where == "gradient":
            levels[0].register_hook(lambda gradient: gradient * math.nan)

    _before_updates(arm)


def watch_rng() -> None:
    """Raise RuntimeError if training draws from a global random number generator."""
    first: list[Any] = []

    def compare(run: Any, update: int) -> None:
        states = (torch.get_rng_state().tolist(), repr(random.getstate()), repr(np.random.get_state()))
        first[:] = first or [states]
        if states != first[0]:
            raise RuntimeError(f"a global random number generator was used before update {update}")

    _before_updates(compare)


# --- files and processes


def no_room(update: int, times: int) -> None:
    """Let the disk be full for the first attempts to save an update: half of the first file is written."""
    write, left, saving = checkpoint._write, [times], _update_being_saved()

    def wrapped(path: Path, data: bytes) -> Any:
        if left[0] and saving[0] == update:
            left[0] -= 1
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    checkpoint._write = wrapped


def spoil_picture(path: str, size: int) -> None:
    """Cut a picture file to `size` bytes, or remove it if size is -1, after the data has been checked."""
    make_run = train.make_run

    def wrapped(*arguments: Any) -> None:
        make_run(*arguments)
        if size < 0:
            Path(path).unlink(missing_ok=True)
        else:
            os.truncate(path, size)

    train.make_run = wrapped


def deadly_picture(index: int, seed: int) -> None:
    """Let a picture of the drawn data set with this seed kill the loader process that reads it."""
    main_process, draw_image = os.getpid(), shapes.draw_image

    def wrapped(picture_seed: int, picture_index: int, size: int) -> np.ndarray:
        if (picture_seed, picture_index) == (seed, index) and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw_image(picture_seed, picture_index, size)

    shapes.draw_image = wrapped


def trace(path: str) -> None:
    """Log each update of a process with the ids of its images."""
    gradients = train.compute_gradients
    taken: list[int] = []

    def wrapped(run: Any, state: Any, batches: Any, size: int, stop: Any) -> Any:
        share = gradients(run, state, batches, size, stop)
        taken[:] = [image for loaded in batches.taken for image in loaded.image_ids]
        return share

    train.compute_gradients = wrapped
    _after_updates(lambda run, done: note(path, what="update", update=done, rank=run.proc.rank, images=taken))


def count_resources(path: str, every: int) -> None:
    """Log memory, file descriptors and threads of the process every `every` updates."""

    def count(run: Any, done: int) -> None:
        if done % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            note(path, update=done, mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files=files, threads=threads)

    _after_updates(count)


FAULTS: dict[str, Callable[..., None]] = {
    fault.__name__: fault
    for fault in (
        signal_after, signal_within, lock_wait, fresh_for, gate, slow_pictures, slow_evaluation, slow_save,
        kill_while_saving, long_save, not_finite, watch_rng, no_room, spoil_picture, deadly_picture, trace,
        count_resources, slow_report,
    )
}  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
