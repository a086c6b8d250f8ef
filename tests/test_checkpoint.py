"""Checkpoints load bit for bit, damage is found, and no crash loses the previous checkpoint."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gndet.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    point,
    prune,
    resolve,
    run_checkpoints,
    save_checkpoint,
    sweep_run,
)
from gndet.errors import CheckpointError


class Crash(BaseException):
    """A simulated kill: no handler of the library may catch it."""


def folder_of(run: Path, update: int) -> Path:
    return run / "checkpoints" / f"update-{update:07d}"


def groups_of(update: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((64, 3), float(update))},
        "optimizer": {"step": torch.tensor(update)},
    }


def save(run: Path, update: int, mark: int = 0) -> None:
    run.mkdir(exist_ok=True)
    save_checkpoint(folder_of(run, update), groups_of(update), {"update": update, "mark": mark})


def leftovers(run: Path) -> list[str]:
    return [path.name for path in (*run.rglob(".tmp-*"), *run.rglob(".old-*"))]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_and_meta_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "float": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
        "bf16": torch.randn(5, 3).bfloat16(),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "base": base,
        "view of base": base.t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    meta = {"best": 0.1 + 0.2, "never": math.nan, "huge": 2**70, "classes": ["rød", "b"], "none": None}
    save_checkpoint(tmp_path / "a", {"model": tensors, "ema": {}}, meta)
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.groups.keys() == {"model", "ema"} and loaded.groups["ema"] == {}
    assert loaded.groups["model"].keys() == tensors.keys()
    for key, tensor in tensors.items():
        got = loaded.groups["model"][key]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), key
        assert bits(got) == bits(tensor), key
    assert math.isnan(loaded.meta.pop("never")) and math.isnan(meta.pop("never"))
    assert loaded.meta == meta


def test_only_the_groups_asked_for_are_returned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", groups_of(1), {})
    assert load_checkpoint(tmp_path / "a", ["model"]).groups.keys() == {"model"}
    with pytest.raises(CheckpointError, match="no group ema; it has model, optimizer"):
        load_checkpoint(tmp_path / "a", ["ema"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "flipped byte": (lambda f: flip(f / "model.safetensors"), "model.safetensors: damaged: its sha256"),
    "flipped meta": (lambda f: flip(f / "meta.json"), "meta.json: damaged: its sha256"),
    "truncated": (lambda f: os.truncate(f / "optimizer.safetensors", 9), "optimizer.safetensors: damaged: 9"),
    "file missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot read it"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "the folder holds meta.json"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 20), "manifest.json: damaged"),
    "later format": (lambda f: edit_manifest(f, lambda m: m.update(format=2)), "manifest.json: damaged"),
    "no meta": (lambda f: edit_manifest(f, lambda m: m["files"].pop("meta.json")), "does not list meta.json"),
    "link": (
        lambda f: ((f / "model.safetensors").rename(f.parent / "x"), (f / "model.safetensors").symlink_to("../x")),
        "model.safetensors: damaged: not a regular file",
    ),
    "pipe": (
        lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
        "model.safetensors: damaged: not a regular file",
    ),
    "endless file": (lambda f: os.truncate(f / "model.safetensors", 1 << 40), "damaged: 1099511627776 bytes, expected"),
    "endless manifest": (lambda f: os.truncate(f / "manifest.json", 1 << 40), "manifest.json: damaged: 1099511627776"),
    "zero byte in a name": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({"a\0": m["files"]["meta.json"]})),
        "outside the checkpoint",
    ),
    "path outside": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({"../a": m["files"]["meta.json"]})),
        "outside the checkpoint",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage, message = DAMAGE[kind]
    damage(folder_of(tmp_path, 2))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder_of(tmp_path, 2))
    newest, passed_over = newest_checkpoint(tmp_path)
    assert newest is not None and newest.meta["update"] == 1
    assert len(passed_over) == 1 and str(folder_of(tmp_path, 2)) in passed_over[0]


@pytest.mark.parametrize(("name", "content"), [("meta.json", b"[]"), ("model.safetensors", b"\x80\x04pickle")])
def test_a_file_of_another_kind_is_refused_even_if_the_manifest_vouches_for_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    save_checkpoint(tmp_path / "a", groups_of(1), {})
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(tmp_path / "a", lambda manifest: manifest["files"].update({name: entry}))
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: not a"):
        load_checkpoint(tmp_path / "a")


STEPS = ("fsync", "rename", "replace", "symlink")  # functions of os that the protocol calls


class FailAt:
    """Let the k-th call of some functions of os fail, before or after it takes effect."""

    def __init__(
        self, patch: pytest.MonkeyPatch, names: Sequence[str], k: int, after: bool, error: BaseException
    ) -> None:
        self.calls, self.k, self.after, self.error = 0, k, after, error
        for name in names:
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls != self.k:
                return call(*args, **kwargs)
            if self.after:
                call(*args, **kwargs)
            raise self.error

        return counted


def save_replace_and_point(run: Path) -> None:
    save(run, 2, mark=1)
    save(run, 2, mark=2)
    point(run, "last", folder_of(run, 2))


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_every_step_leaves_a_whole_checkpoint(tmp_path: Path, after: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counter = FailAt(patch, (*STEPS, "rmdir"), 0, after, Crash())
        save_replace_and_point(tmp_path / "count")
    assert counter.calls == 2 * 7 + 2 + 3  # saves (4 files, folder, rename, parent), move and remove the old one, link
    for k in range(1, counter.calls + 1):
        run = tmp_path / str(k)
        save(run, 1)
        point(run, "last", folder_of(run, 1))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            FailAt(patch, (*STEPS, "rmdir"), k, after, Crash())
            save_replace_and_point(run)
        load_checkpoint(resolve(run))
        sweep_run(run)
        newest, passed_over = newest_checkpoint(run)
        assert newest is not None and not passed_over and not leftovers(run)
        assert torch.equal(newest.groups["optimizer"]["step"], torch.tensor(newest.meta["update"]))


def test_a_checkpoint_being_replaced_survives_a_crash_between_the_renames(tmp_path: Path) -> None:
    save(tmp_path, 1, mark=1)
    real = os.rename
    with pytest.MonkeyPatch.context() as patch:

        def crash_on_arrival(source: Path, target: Path) -> None:
            if target == folder_of(tmp_path, 1):
                raise Crash
            real(source, target)

        patch.setattr(os, "rename", crash_on_arrival)
        with pytest.raises(Crash):
            save(tmp_path, 1, mark=2)
    assert not folder_of(tmp_path, 1).exists()
    sweep_run(tmp_path)
    assert load_checkpoint(folder_of(tmp_path, 1)).meta["mark"] == 1


def test_a_full_disk_at_any_step_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, mark=1)
    with pytest.MonkeyPatch.context() as patch:
        counter = FailAt(patch, STEPS, 0, False, Crash())
        save(tmp_path, 1, mark=1)
    for k in range(1, counter.calls + 1):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.MonkeyPatch.context() as patch:
            FailAt(patch, STEPS, k, False, error)
            with pytest.raises(CheckpointError, match="0000001: cannot save the checkpoint: No space"):
                save(tmp_path, 1, mark=2)
        assert not list(tmp_path.rglob(".tmp-*"))
        assert load_checkpoint(folder_of(tmp_path, 1)).meta["mark"] == (1 if k < counter.calls else 2)


def test_a_file_size_limit_of_the_system_is_reported(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from gndet.checkpoint import load_checkpoint, save_checkpoint\n"
        "from gndet.errors import CheckpointError\n"
        "folder = Path(sys.argv[1])\n"
        "save_checkpoint(folder, {'model': {'w': torch.zeros(10)}}, {'mark': 1})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save_checkpoint(folder, {'model': {'w': torch.zeros(100_000)}}, {'mark': 2})\n"
        "except CheckpointError as error:\n"
        "    print(error, load_checkpoint(folder).meta, [p.name for p in folder.parent.iterdir()])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (f"{tmp_path / 'a'}: cannot save the checkpoint: File too large {{'mark': 1}} ['a']")


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint: (File exists|Not a directory)"):
        save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="last: cannot let it lead to a checkpoint: No such file"):
        point(tmp_path / "absent", "last", folder_of(tmp_path, 1))


def test_the_newest_checkpoint_loads_after_a_kill_at_any_time(tmp_path: Path) -> None:
    script = (
        "import os, random, signal, sys, time, torch\n"
        "from pathlib import Path\n"
        "from gndet.checkpoint import save_checkpoint\n"
        "for life in range(6):\n"
        "    run = Path(sys.argv[1]) / str(life)\n"
        "    run.mkdir(parents=True)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        for update in range(1, 1_000_000):\n"
        "            groups = {'model': {'w': torch.full((50_000,), float(update))}}\n"
        "            save_checkpoint(run / 'checkpoints' / f'update-{update}', groups, {'update': update})\n"
        "            (run / 'done').write_text(str(update))\n"
        "    while not (run / 'done').exists():\n"
        "        time.sleep(0.001)\n"
        "    time.sleep(random.Random(life).uniform(0.02, 0.12))\n"
        "    os.kill(child, signal.SIGKILL)\n"
        "    os.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, timeout=600)
    for life in range(6):
        run = tmp_path / str(life)
        newest, passed_over = newest_checkpoint(run)
        assert newest is not None and not passed_over
        acknowledged = int((run / "done").read_text() or newest.meta["update"])
        assert newest.meta["update"] in (acknowledged, acknowledged + 1)
        assert torch.equal(newest.groups["model"]["w"], torch.full((50_000,), float(newest.meta["update"])))
        sweep_run(run)
        assert not leftovers(run)


def test_checkpoints_are_ordered_by_update_not_by_text_or_age(tmp_path: Path) -> None:
    for update in (10_000_000, 9_999_999, 5):
        save(tmp_path, update)
    (tmp_path / "checkpoints" / "update-copy").mkdir()
    assert [int(path.name[7:]) for path in run_checkpoints(tmp_path)] == [10_000_000, 9_999_999, 5]
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_prune_keeps_the_newest_and_what_last_and_best_point_at(tmp_path: Path) -> None:
    for update in range(1, 7):
        save(tmp_path, update)
    point(tmp_path, "best", folder_of(tmp_path, 2))
    point(tmp_path, "last", folder_of(tmp_path, 6))
    point(tmp_path, "last", folder_of(tmp_path, 4))
    prune(tmp_path, keep_last=2)
    assert [int(path.name[7:]) for path in run_checkpoints(tmp_path)] == [6, 5, 4, 2]
    assert not leftovers(tmp_path)


def test_links_are_relative_so_that_a_run_may_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    point(tmp_path / "a", "best", folder_of(tmp_path / "a", 3))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b" / "best").meta["update"] == 3


def test_a_run_means_its_best_then_last_then_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3)
    point(tmp_path, "last", folder_of(tmp_path, 3))
    assert resolve(tmp_path) == folder_of(tmp_path, 3).resolve()
    point(tmp_path, "best", folder_of(tmp_path, 1))
    assert resolve(tmp_path) == resolve(tmp_path / "best") == folder_of(tmp_path, 1).resolve()
    assert resolve(folder_of(tmp_path, 3)) == folder_of(tmp_path, 3).resolve()


def test_what_is_no_checkpoint_is_refused_and_described(tmp_path: Path) -> None:
    (tmp_path / "r50.pth").write_bytes(pickle.dumps({"w": 1}))
    for read in (resolve, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"r50\.pth: .*a file; train\.weights and gndet convert read"):
            read(tmp_path / "r50.pth")
        with pytest.raises(CheckpointError, match=r"absent: .*there is no such folder"):
            read(tmp_path / "absent")
        with pytest.raises(CheckpointError, match=r"the folder holds r50\.pth"):
            read(tmp_path)
