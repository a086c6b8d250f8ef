"""T5 and T6: a process is killed at any moment of a save; its earlier saves stay whole, and saving resumes.

The tensors are small, so that the protocol takes the time; Saver, save_checkpoint, point and prune are the real ones.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from faults.launch import call
from faults.tiny import check, write_config
from gndet import checkpoint
from gndet.checkpoint import CHECKPOINTS, load_checkpoint, newest_checkpoint, run_checkpoints, sweep_run
from gndet.config.loading import load_config
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import Process
from gndet.training.averaging import WeightAverage
from gndet.training.checkpointing import Saver
from gndet.training.optim import make_optimizer
from gndet.training.run import Best, Progress, Run
from gndet.training.work_folder import WorkFolder

KILLS = 30
STEPS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync")  # of the protocol, in os


def killed_at_random(folder: Path) -> str:
    """T5."""
    out, moments, swept, done = folder / "run", random.Random(5), 0, 0
    for number in range(KILLS):
        saving = call(folder, f"{__name__}:save_forever", str(out))
        saving.wait_for("saved ")
        time.sleep(moments.uniform(0, 0.2))
        saving.signal(signal.SIGKILL)
        saving.expect(-signal.SIGKILL)
        lines = [line for line in saving.text.splitlines() if line.startswith("saved ")]
        before, done = done, int(lines[-1].split()[1])
        check(done > before, f"kill {number + 1}: restarted at {done}, had saved {before}")
        swept += check_whole(out, done, done + 1)
    return f"{KILLS} of {KILLS} loaded, the last or the one being written of {done} saves; {swept} temporaries swept"


def killed_at_every_step(folder: Path) -> str:
    """T6."""
    walk = call(folder, f"{__name__}:walk", str(folder))
    return walk.expect(0).splitlines()[-1]


def best_is_kept(folder: Path) -> str:
    """The newest few, the best one of any age, and the last are kept."""
    run, saver = small_run(folder / "run", keep_last=2)
    for update in range(1, 8):
        save(run, saver, update, best=1)
        kept = sorted(int(path.name[7:]) for path in run_checkpoints(run.out))
        expected = sorted({1, update, max(update - 1, 1)})
        check(kept == expected, f"after update {update} there are {kept}, expected {expected}")
        for name, is_at in (("best", 1), ("last", update)):
            found = load_checkpoint(run.out / name).meta["update"]
            check(found == is_at, f"{name} is of update {found}, expected {is_at}")
    saver.wait()
    return "with keep_last: 2, after 7 saves: 6, 7 and the best, 1"


# --- in the processes that are killed


def small_run(out: Path, keep_last: int) -> tuple[Run, Saver]:
    """Return a run of two small layers, and its Saver."""
    out.mkdir(parents=True, exist_ok=True)
    cfg = load_config(write_config(out), [f"out={out}", f"train.keep_last={keep_last}"])
    train_set, val_set = read_dataset(cfg.data.train, cfg.data), read_dataset(cfg.data.val, cfg.data)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    optimizer = make_optimizer(cfg.train.optimizer, model)
    model(torch.zeros(1, 32)).sum().backward()
    optimizer.step()
    proc = Process(0, 1, torch.device("cpu"))
    average = WeightAverage(model, 0.9)
    run = Run(
        cfg,
        cfg,
        WorkFolder(out),
        proc,
        train_set,
        val_set,
        model,
        average,
        optimizer,
        nullcontext,
        {},
        None,
        model,
        None,
    )
    return run, Saver(run, 10**6, print)


def save(run: Run, saver: Saver, update: int, best: int, value: int | None = None) -> None:
    """Save a state in which every number is `value` (default: the update); best: the best update."""
    with torch.no_grad():
        for tensor in (*run.model.parameters(), *run.average.module.parameters()):
            tensor.fill_(update if value is None else value)
        for state in run.optimizer.state.values():
            state["momentum_buffer"].fill_(update if value is None else value)
    saver.save(Progress(update=update, values={"box/AP": 0.5}, best=Best(0.5, best)), at_once=True)
    check(saver.failed is None, f"update {update} was not saved: {saver.failed}")


def save_forever(out: str) -> int:
    """Save update after update, each as the best, starting after the newest one, until killed."""
    run, saver = small_run(Path(out), keep_last=2)
    newest, _ = newest_checkpoint(run.out)
    update = newest.meta["update"] if newest else 0
    while True:
        update += 1
        save(run, saver, update, best=update)
        print("saved", update, flush=True)


def check_whole(out: Path, *values: int) -> int:
    """Check a run folder after a kill: the newest checkpoint holds one of these values, and nothing is damaged.

    Returns how many temporary files had to be swept.
    """
    swept = len([*out.glob(".tmp-*"), *(out / CHECKPOINTS).glob(".tmp-*"), *(out / CHECKPOINTS).glob(".old-*")])
    sweep_run(out)
    newest, damaged = newest_checkpoint(out)
    check(newest is not None and not damaged, f"{out}: damage after a kill: {damaged}")
    numbers = {float(x) for tensors in newest.groups.values() for tensor in tensors.values() for x in tensor.unique()}
    check(len(numbers) == 1 and numbers <= set(values), f"{newest.path}: holds {numbers}, expected one of {values}")
    for name in ("last", "best"):
        if (out / name).is_symlink():
            load_checkpoint(out / name)
    left = [path.name for path in (*out.glob(".*"), *(out / CHECKPOINTS).glob(".*")) if path.name != ".lock"]
    check(not left, f"{out}: not swept: {left}")
    return swept


def walk(folder: str) -> int:
    """Kill a process at every step of saving a new checkpoint, and of replacing one; check what is left."""
    base, points, swept = Path(folder) / "base", 0, 0
    run, saver = small_run(base, keep_last=1)
    for update in (1, 2):
        save(run, saver, update, best=1)
    saver.wait()
    for update in (3, 2):  # a new one, and an existing one, as a resumed run may save
        point = 0
        while True:
            point += 1
            out = Path(folder) / "run"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(base, out, symlinks=True)
            if not killed_at(run._replace(out=WorkFolder(out)), update, point):
                break
            swept += check_whole(out, 2, 30)
            fresh = Saver(run._replace(out=WorkFolder(out)), 10**6, print)
            save(run._replace(out=WorkFolder(out)), fresh, 4, best=4)
            fresh.wait()
            kept = [path.name for path in run_checkpoints(out)]
            check(kept == ["update-0000004"], f"after a kill at point {point} and another save there are {kept}")
        points += point - 1
    print(f"killed at {points} of {points} points, before, after and within each write; {swept} temporaries swept")
    return 0


def killed_at(run: Run, update: int, point: int) -> bool:
    """Save in a process that is killed at a point of the protocol.  Returns whether it was killed."""
    pid = os.fork()
    if not pid:
        die_at(point)
        saver = Saver(run, 10**6, print)
        save(run, saver, update, best=update, value=30)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    check(status in (0, -signal.SIGKILL), f"saving update {update}, to be killed at point {point}, ended with {status}")
    return status != 0


def die_at(point: int) -> None:
    """Kill this process at the given point; points lie before and after each step, and in the middle of each write."""
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            step()
            result = call(*arguments, **options)
            step()
            return result

        return wrapped

    @contextmanager
    def half_open(path: Path, mode: str) -> Iterator[Any]:
        with open(path, mode) as file:

            def write(data: bytes) -> None:
                file.write(data[: len(data) // 2])
                file.flush()
                step()
                file.write(data[len(data) // 2 :])

            yield SimpleNamespace(write=write, flush=file.flush, fileno=file.fileno)

    for name in STEPS:
        setattr(os, name, around(getattr(os, name)))
    checkpoint.open = half_open  # instead of the built-in one
