"""The one way to write a file: whole or not at all, through no link, with nothing left after a kill."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gndet.errors import OutputError
from gndet.files import LineFile, create, folder_written_whole, lock_file, sweep, write_whole, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_is_replaced_and_what_it_leads_to_is_unchanged(tmp_path: Path) -> None:
    for kind in ("soft", "hard", "dangling"):
        mine, planted = tmp_path / f"mine-{kind}", tmp_path / f"report-{kind}.html"
        if kind != "dangling":
            mine.write_text("mine")
        os.link(mine, planted) if kind == "hard" else planted.symlink_to(mine)
        write_whole(planted, "page")
        assert planted.read_text() == "page" and not planted.is_symlink()
        assert mine.exists() == (kind != "dangling") and (kind == "dangling" or mine.read_text() == "mine")


def test_the_name_of_a_file_that_is_being_written_is_new_each_time(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with written_whole(tmp_path / "a.json") as file:
            file.write(b"{}")
            seen |= {name for name in names(tmp_path) if name != "a.json"}
    assert len(seen) == 3 and names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a") as file:
        file.write(b"new")
        raise ZeroDivisionError
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot write it: Is a directory"):
        write_whole(tmp_path / "folder", "text")
    assert names(tmp_path) == ["a", "folder"] and (tmp_path / "a").read_text() == "old"


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), "text")
    assert names(tmp_path) == ["n" * 255]


def test_a_file_is_created_only_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            create(tmp_path / name)


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_lines_are_appended_to_regular_files_only(tmp_path: Path, what: str) -> None:
    path = tmp_path / "metrics.jsonl"
    {"link": lambda: path.symlink_to(tmp_path / "mine"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[what]()
    with pytest.raises(OSError):
        LineFile(path)
    assert names(tmp_path) == ["metrics.jsonl"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with folder_written_whole(tmp_path / "entry") as folder, create(folder / f"{text}.txt") as file:
            file.write(text.encode())
    with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "entry"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["entry"] and names(tmp_path / "entry") == ["new.txt"]


def test_a_folder_replaces_whatever_has_its_name(tmp_path: Path) -> None:
    entry, mine = tmp_path / "run" / "entry", tmp_path / "mine"
    entry.parent.mkdir()
    mine.mkdir()
    for make in (entry.touch, lambda: os.mkfifo(entry), lambda: entry.symlink_to("nowhere"),
                 lambda: entry.symlink_to(entry), lambda: entry.symlink_to(mine)):  # fmt: skip
        make()
        with folder_written_whole(entry) as folder:
            create(folder / "new.txt").close()
        assert names(entry.parent) == ["entry"] and names(entry) == ["new.txt"] and not names(mine)
        shutil.rmtree(entry)


WRITER = """
import os, sys
from pathlib import Path
from gndet.files import create, folder_written_whole, written_whole
with written_whole(Path("a")) as file, folder_written_whole(Path("b")) as folder:
    file.write(b"half")
    create(folder / "part").close()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_sweeping_spares_what_is_being_written_and_removes_what_a_kill_left(tmp_path: Path) -> None:
    for mine in (".tmp-mine", ".old", "a.txt"):
        (tmp_path / mine).write_text("mine")
    command = [sys.executable, "-c", WRITER]
    writer = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    sweep(tmp_path)
    assert len(names(tmp_path)) == 5
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (tmp_path / f".tmp-{'0' * 32}").symlink_to(tmp_path / "a.txt")
    sweep(tmp_path)
    assert names(tmp_path) == [".old", ".tmp-mine", "a.txt"] and (tmp_path / "a.txt").read_text() == "mine"


def test_a_folder_that_was_moved_aside_is_restored_if_its_successor_is_missing(tmp_path: Path) -> None:
    (tmp_path / ".old-entry" / "inner").mkdir(parents=True)
    sweep(tmp_path)
    assert names(tmp_path) == ["entry"] and names(tmp_path / "entry") == ["inner"]
    (tmp_path / ".old-entry").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["entry"] and names(tmp_path / "entry") == ["inner"]


HOLDER = """
import sys
from pathlib import Path
from gndet.files import lock_file
file = lock_file(Path(".lock"), 0)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_that_of_the_file_which_is_there(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on "):
        lock_file(tmp_path / ".lock", 0.3)
    holder.communicate()
    lock_file(tmp_path / ".lock", 0).close()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_lock_is_not_written_through_a_link(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine, and longer than the name of a process")
    (tmp_path / ".lock").symlink_to(mine) if kind == "soft" else os.link(mine, tmp_path / ".lock")
    lock_file(tmp_path / ".lock", 0).close()
    assert mine.read_text() == "mine, and longer than the name of a process"
    assert not (tmp_path / ".lock").is_symlink() and (tmp_path / ".lock").read_text() == mine_lock()


def mine_lock() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}\n"
