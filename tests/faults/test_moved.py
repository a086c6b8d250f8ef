"""The folder of a run is renamed, replaced or removed while it trains; its processes disagree about --fresh."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.launch import cleared, finish, start, unbroken
from faults.tiny import check_same, newest_update

pytestmark = [pytest.mark.faults, pytest.mark.slow]
OPTIONS = ("train.schedule.updates=6", "train.eval_every=3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all runs of this file, which share an unbroken one."""
    folder = tmp_path_factory.mktemp("moved")
    with cleared(folder):
        yield folder


@pytest.fixture
def folder(home: Path, request: pytest.FixtureRequest) -> Path:
    made = home / "".join(c if c.isalnum() else "-" for c in request.node.name)
    made.mkdir()
    return made


def moved_by(path: Path, then: Callable[[Path], object] = lambda path: None) -> Path:
    """Move a folder, then put something in its place.  Returns where it is."""
    there = path.with_name("elsewhere")
    path.rename(there)
    then(path)
    return there


def remove(path: Path) -> None:
    """Remove a folder in which another process may be saving, as a repeated `rm -rf` does."""
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


MOVES: dict[str, Callable[[Path], object]] = {
    "renamed": lambda path: None,
    "replaced by an empty folder": Path.mkdir,
    "replaced by a file": Path.touch,
    "replaced by a link to itself": lambda path: path.symlink_to(path),
    "replaced by a copy": lambda path: shutil.copytree(path.with_name("elsewhere"), path, symlinks=True),
}


def listed(path: Path) -> list[str] | str | bytes | None:
    """Return what is at a path, without following a link."""
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return sorted(f"{file.relative_to(path)} {file.lstat().st_mtime_ns}" for file in path.rglob("*"))
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(("what", "world"), [*((what, 1) for what in MOVES), ("replaced by an empty folder", 2)])
def test_a_run_whose_folder_is_moved_saves_there_and_ends(folder: Path, what: str, world: int) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]}, world=world)
    run.wait_for("fault: gate 3")
    there = moved_by(run.out, MOVES[what])
    before = listed(run.out)
    run.open_gate(3)
    run.wait()
    assert run.statuses()[0] == 2 and "Traceback" not in run.text and "finished" not in run.text
    assert f"{run.out}: this folder was moved to {there}" in run.text and f"out={there}" in run.text
    assert listed(run.out) == before and newest_update(there) >= 3
    assert "moved" in (there / "FAILED").read_text()
    finish(folder, "elsewhere", *OPTIONS, world=world)
    check_same(there, unbroken(folder, *OPTIONS, world=world), what)
    assert not (there / "FAILED").exists()


@pytest.mark.parametrize("update", [4, 6])
def test_a_run_that_is_moved_goes_on_when_it_is_moved_back(folder: Path, update: int) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [update]})
    run.wait_for(f"fault: gate {update}")
    there = moved_by(run.out)
    run.open_gate(update)
    assert f"moved to {there}" in run.expect(2) and not run.out.exists()
    there.rename(run.out)
    if newest_update(run.out) < 6 or update == 6:
        finish(folder, "run", *OPTIONS)
    check_same(run.out, unbroken(folder, *OPTIONS), "moved back")


def test_a_link_to_the_moved_folder_is_the_same_folder(folder: Path) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    moved_by(run.out, lambda path: path.symlink_to("elsewhere"))
    run.open_gate(3)
    run.expect(0)
    check_same(run.out, unbroken(folder, *OPTIONS), "behind a link")


def test_a_parent_that_is_renamed_moves_the_run(folder: Path) -> None:
    run = start(folder / "a", "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    run.out.parent.rename(folder / "b")  # with the processes' current folder
    (folder / "b" / "processes" / "run" / "gate-3").touch()
    while None in run.statuses():
        pass
    text = (folder / "b" / "processes" / "run" / "log-1.txt").read_text()
    assert run.statuses() == [2] and f"moved to {folder / 'b' / 'run'}" in text and not (folder / "a").exists()
    finish(folder / "b", "run", *OPTIONS)
    check_same(folder / "b" / "run", unbroken(folder, *OPTIONS), "its parent was renamed")


@pytest.mark.parametrize("world", [1, 2])
def test_a_removed_folder_ends_the_run_and_nothing_is_made_anew(folder: Path, world: int) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]}, world=world)
    run.wait_for("fault: gate 3")
    remove(run.out)
    run.open_gate(3)
    run.wait()
    assert run.statuses()[0] == 2 and not run.out.exists()
    assert f"{run.out}: this folder was removed, or moved to another disk" in run.text and "Traceback" not in run.text
    finish(folder, "run", *OPTIONS, world=world)
    check_same(run.out, unbroken(folder, *OPTIONS, world=world), "begun again")


def test_a_signal_after_the_move_saves_there(folder: Path) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    there = moved_by(run.out)
    run.signal(signal.SIGTERM)
    run.open_gate(3)
    assert f"moved to {there}" in run.expect(2) and newest_update(there) == 3 and not run.out.exists()
    finish(folder, "elsewhere", *OPTIONS)
    check_same(there, unbroken(folder, *OPTIONS), "stopped after the move")


@pytest.mark.parametrize("what", ["removed", "moved", "replaced by a folder", "replaced by a link"])
def test_checkpoints_that_are_gone_in_mid_run_are_made_anew(folder: Path, what: str) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    place = run.out / "checkpoints"
    place.rename(folder / "taken")
    if what == "removed":
        remove(folder / "taken")
    elif what == "replaced by a folder":
        place.mkdir()
    elif what == "replaced by a link":
        (folder / "other disk").mkdir()
        place.symlink_to(folder / "other disk")
    run.open_gate(3)
    run.expect(0)
    check_same(run.out, unbroken(folder, *OPTIONS), what)


def test_a_file_in_the_place_of_the_checkpoints_is_said_and_the_run_does_not_end_as_finished(folder: Path) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    (run.out / "checkpoints").rename(folder / "taken")
    (run.out / "checkpoints").touch()
    run.open_gate(3)
    text = run.expect(2)
    assert "cannot save the checkpoint: File exists" in text and "its last checkpoint is missing" in text


def test_files_that_are_removed_in_mid_run_are_missed(folder: Path) -> None:
    run = start(folder, "run", *OPTIONS, faults={"gate": [3]})
    run.wait_for("fault: gate 3")
    for path in run.out.iterdir():  # rm -rf, which a file that is made meanwhile makes fail
        remove(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    run.open_gate(3)
    text = run.expect(2)
    assert "config.yaml: removed by another program; metrics.jsonl: removed by another program" in text
    assert newest_update(run.out) == 6 and "Traceback" not in text


@pytest.mark.parametrize("fresh", [0, 1])
def test_fresh_for_one_of_two_processes_is_refused_at_once(folder: Path, fresh: int) -> None:
    finish(folder, "run", *OPTIONS, world=2)
    run = start(folder, "run", *OPTIONS, world=2, faults={"fresh_for": [fresh]})
    run.wait()
    assert run.statuses() == [2, 2] and f"--fresh was given to rank {fresh} only" in run.text
    assert not (folder / "run-old-1").exists()
