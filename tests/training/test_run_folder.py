"""A run folder: nothing of a run is lost, whatever became of its checkpoints, its links or the folder itself."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from rich.console import Console
from run_files import forget, load

from gndet.checkpoint import adopt_copies, load_checkpoint, point, prune, resolve, run_checkpoints
from gndet.cli.train import train_run
from gndet.config.schema import Config
from gndet.distributed.process import Process
from gndet.distributed.signals import StopSignals
from gndet.errors import CheckpointError, GndetError, OutputError, RunFinished, TrainingError
from gndet.train import train
from gndet.training import work_folder
from gndet.training.ending import marked
from gndet.training.run_folder import HEAD, find_run, make_run, may_write, move_aside
from gndet.training.work_folder import WorkFolder, locked

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin")]
ALONE = Process(0, 1, torch.device("cpu"))
OPTIONS = ("train.checkpoint_every=1", "train.schedule.updates=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """The config of a run of 3 updates, next to the run folder; each update has a checkpoint, and 3 is the best."""
    config = tmp_path_factory.mktemp("made") / "tiny.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    train(load(config, "run", *OPTIONS))
    return config


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, without its last checkpoint: 2 of 3 updates are left."""
    shutil.copytree(made.parent / "run", tmp_path / "run", symlinks=True)
    shutil.copy(made, tmp_path)
    forget(tmp_path / "run", 3)
    for name in ("last", "best"):
        point(tmp_path / "run", name, tmp_path / "run" / "checkpoints" / "update-0000002")
    return tmp_path / "run"


def config_of(run: Path, *overrides: str) -> Config:
    return load(run.parent / "tiny.yaml", run.name, *OPTIONS, *overrides)


def content(folder: Path) -> dict[str, bytes | str]:
    """Return what a folder holds: files by their bytes, links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != ".lock"
    }


def replace(path: Path, by: Callable[[Path], object]) -> None:
    shutil.rmtree(path)
    by(path)


OUT_OF_REACH: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (lambda c: shutil.rmtree(c), "is not there"),
    "moved": (lambda c: c.rename(c.parent.parent / "elsewhere"), "is not there"),
    "a link to nothing": (lambda c: replace(c, lambda c: c.symlink_to("/not/mounted")), "a link to /not/mounted"),
    "a link to itself": (lambda c: replace(c, lambda c: c.symlink_to(c)), "symbolic links"),
    "a file": (lambda c: replace(c, Path.touch), "Not a directory"),
    "empty": (lambda c: replace(c, Path.mkdir), "holds no checkpoint"),
    "empty, links too": (
        lambda c: [replace(c, Path.mkdir), (c.parent / "last").unlink(), (c.parent / "best").unlink()],
        "3 updates are logged",
    ),
    "removed, the log too": (
        lambda c: [shutil.rmtree(c), (c.parent / "metrics.jsonl").unlink(), (c.parent / "norms.jsonl").unlink()],
        "`last` led to a checkpoint",
    ),
    "removed, the log and links too": (
        lambda c: (
            [shutil.rmtree(c)]
            + [(c.parent / name).unlink() for name in ("metrics.jsonl", "norms.jsonl", "last", "best")]
        ),
        "0 updates are logged, but .*checkpoints is not there",
    ),
    "damaged": (lambda c: [os.truncate(path, 9) for path in c.rglob("meta.json")], "no checkpoint is whole"),
}


@pytest.mark.parametrize("what", OUT_OF_REACH)
def test_a_run_whose_checkpoints_are_out_of_reach_is_refused_and_its_record_stays(run: Path, what: str) -> None:
    spoil, words = OUT_OF_REACH[what]
    spoil(run / "checkpoints")
    before = content(run)
    with pytest.raises(TrainingError, match=rf"(?s){words}.*--fresh"):
        train(config_of(run))
    assert content(run) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_disk_that_does_not_answer_is_not_an_empty_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, before = os.scandir, content(run)

    def scandir(path: object = ".") -> object:
        if str(path).endswith("checkpoints"):
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(TrainingError, match=f"cannot read the checkpoints: {os.strerror(number)}; put it back, or"):
        train(config_of(run))
    monkeypatch.undo()
    assert content(run) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_folder_that_may_not_be_read_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    real = os.listdir, os.scandir, os.stat

    def refusing(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(path: object = ".", **options: object) -> object:
            inside = run in Path(str(path)).parents
            if inside or (path == run and call is not real[2]):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, **options)

        return wrapped

    for name, call in zip(("listdir", "scandir", "stat"), real, strict=True):
        monkeypatch.setattr(os, name, refusing(call))
    with pytest.raises(TrainingError, match=r"run\S*: cannot read the run folder: Permission denied$"):
        find_run(config_of(run), run, fresh, ALONE)


def begun(folder: Path, updates: int) -> None:
    """Write what a run holds that was killed before its first checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"{HEAD}train:\n  checkpoint_every: 2\n  eval_every: 5\n")
    lines = [f'{{"update": {update}, "kind": "train", "loss": 1.0}}\n' for update in range(1, updates + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_run_killed_before_its_first_checkpoint_begins_again_until_two_were_due(made: Path, tmp_path: Path) -> None:
    for updates in (0, 1, 3, 4):
        begun(tmp_path / str(updates), updates)
        assert find_run(load(made, "run"), tmp_path / str(updates), False, ALONE) == (None, [])
    begun(tmp_path / "5", 5)  # the save after update 2 was on the disk before the one after update 4 began
    with pytest.raises(TrainingError, match=r"5 updates are logged, but .*checkpoints holds no checkpoint: .*; put"):
        find_run(load(made, "run"), tmp_path / "5", False, ALONE)


LEFT: dict[str, Callable[[Path], object]] = {
    ".lock": Path.touch,
    ".tmp-0123456789abcdef0123456789abcdef": lambda path: path.write_text("half of a con"),
    "checkpoints": Path.mkdir,
    "PREEMPTED": Path.touch,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_a_kill_or_a_full_disk_left_at_the_start_does_not_hinder_the_same_command(
    made: Path, tmp_path: Path, name: str
) -> None:
    out, cfg = tmp_path / "out", load(made, "run")
    out.mkdir()
    LEFT[name](out / name)
    with locked(out, ALONE, may_write) as folder:
        assert find_run(cfg, out, False, ALONE) == (None, [])
        make_run(cfg, folder, ALONE)
    assert sorted(os.listdir(out)) == [".lock", "checkpoints", "config.yaml"]


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_start_on_a_full_disk_is_one_line_and_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def full(path: object, *rest: object, **options: object) -> object:
        makes = call == "mkdir" or bool(rest and int(str(rest[0])) & os.O_CREAT)
        if makes and tmp_path in Path(str(path)).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, call, full)
    out = tmp_path / "runs" / "new"
    with pytest.raises(OutputError, match=r"(?s)new.*No space left") as caught, locked(out, ALONE, may_write) as folder:
        make_run(load(made, "run"), folder, ALONE)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_link_that_a_disk_refuses_once_leaves_the_old_link(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    newest, older = (run / "checkpoints" / f"update-{update:07d}" for update in (2, 1))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="last: cannot let it lead to a checkpoint: Input/output error"):
        point(run, "last", older)
    monkeypatch.undo()
    assert (run / "last").is_symlink() and (run / "last").resolve() == newest.resolve()
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["FAILED", "PREEMPTED"])
def test_a_folder_in_the_place_of_a_marker_is_named(run: Path, name: str) -> None:
    (run / name).mkdir()
    with pytest.raises(OutputError, match=f"out: {run / name}: cannot write the run folder: Is a directory"):
        train(config_of(run))


def test_links_that_are_missing_or_wrong_are_put_right_also_in_a_finished_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent / "run", tmp_path / "run", symlinks=True)
    shutil.copy(made, tmp_path)
    out = tmp_path / "run"
    before = content(out)
    spoilers: list[Callable[[Path], object]] = [
        Path.unlink, lambda p: point(out, p.name, out / "checkpoints/update-0000001"),
        lambda p: [p.unlink(), p.symlink_to(p)], lambda p: [p.unlink(), p.symlink_to("/nowhere")],
        lambda p: [p.unlink(), p.write_text("half a pa")],
    ]  # fmt: skip
    for spoil in spoilers:
        for name in ("last", "best"):
            spoil(out / name)
        assert resolve(out).name == Path(before["best"]).name
        with pytest.raises(TrainingError, match="this run is finished"):
            train(config_of(out))
        assert content(out) == before


def test_the_same_command_writes_the_report_that_a_kill_prevented(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent / "run", tmp_path / "run", symlinks=True)
    shutil.copy(made, tmp_path)
    cfg = config_of(tmp_path / "run", "train.report=true")
    with pytest.raises(RunFinished, match="this run is finished"):
        train_run(cfg, progress=False)
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")


def without_links(patch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    patch.setattr(os, "symlink", refuse)


def test_last_and_best_are_files_where_links_cannot_be_made(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = os.path.basename(os.readlink(run / "best"))
    without_links(monkeypatch)
    for name, folder in (("last", "update-0000002"), ("best", "update-0000001")):
        (run / name).unlink()
        point(run, name, run / "checkpoints" / folder)
        assert (run / name).read_text() == f"checkpoints/{folder}\n"
        assert resolve(run / name) == (run / "checkpoints" / folder).resolve()
    assert resolve(run) == (run / "checkpoints" / "update-0000001").resolve()
    prune(run, 1)
    assert [path.name for path in run_checkpoints(run)] == ["update-0000002", "update-0000001"]
    assert train(config_of(run)) and (run / "best").is_file()  # it goes on, and ends without an error
    assert resolve(run / "last").name == "update-0000003" and best


def test_a_checkpoint_counts_as_saved_where_neither_links_nor_files_can_lead_to_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last", "best"):
        (run / name).unlink()
        (run / name / "of the user").mkdir(parents=True)
    assert train(config_of(run, "train.keep_last=1"))
    assert run_checkpoints(run)[0].name == "update-0000003" and len(run_checkpoints(run)) <= 2
    assert resolve(run).parent == run / "checkpoints" and (run / "last" / "of the user").is_dir()


def test_prune_keeps_the_best_that_no_link_leads_to(run: Path) -> None:
    for name in ("last", "best"):
        (run / name).unlink()
    prune(run, 1, run / "checkpoints" / "update-0000001")
    assert [path.name for path in run_checkpoints(run)] == ["update-0000002", "update-0000001"]


def copied(run: Path) -> Path:
    """Copy a run as tools do that follow links."""
    shutil.copytree(run, run.parent / "copy")
    return run.parent / "copy"


def test_a_copy_whose_links_became_folders_is_evaluated_and_goes_on_without_losing_anything(run: Path) -> None:
    copy, before = copied(run), content(run)
    assert not (copy / "last").is_symlink() and resolve(copy) == copy / "checkpoints" / resolve(run).name
    find_run(config_of(run), copy, False, ALONE)
    assert content(copy) == before


@pytest.mark.parametrize("kind", ["missing", "damaged", "no folder"])
def test_a_copied_folder_takes_the_place_of_its_checkpoint_if_that_is_not_whole(run: Path, kind: str) -> None:
    copy, before = copied(run), content(run)
    original = copy / "checkpoints" / "update-0000002"
    if kind == "damaged":
        os.truncate(original / "model.safetensors", 100)
    else:
        shutil.rmtree(original if kind == "missing" else original.parent)
    saved, _ = find_run(config_of(run), copy, False, ALONE)
    assert saved is not None and saved.meta["update"] == 2 and load_checkpoint(original)
    if kind != "no folder":
        assert content(copy) == before


def test_a_damaged_copy_and_a_folder_of_the_user_stay(run: Path) -> None:
    copy = copied(run)
    os.truncate(copy / "last" / "meta.json", 5)
    shutil.rmtree(copy / "best")
    (copy / "best").mkdir()
    (copy / "best" / "notes.txt").write_text("mine")
    adopt_copies(copy)
    assert (copy / "last" / "model.safetensors").is_file() and (copy / "best" / "notes.txt").read_text() == "mine"
    assert resolve(copy).parent == copy / "checkpoints"


def test_a_lock_holds_though_its_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_folder, "LOCK_WAIT", 0.3)
    with locked(tmp_path / "run", ALONE, may_write):
        (tmp_path / "run" / ".lock").unlink()
        with (
            pytest.raises(TrainingError, match="another process trains into this folder"),
            locked(tmp_path / "run", ALONE, may_write),
        ):
            pass
        assert (tmp_path / "run").is_dir()
    with locked(tmp_path / "run", ALONE, may_write):  # released
        pass
    assert not (tmp_path / "run").exists()  # nothing was written


def test_a_lock_is_that_of_the_folder_which_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for a folder which --fresh then moves aside locks the new one."""
    out, real = tmp_path / "run", WorkFolder.lock

    def lock(folder: WorkFolder) -> None:
        monkeypatch.setattr(WorkFolder, "lock", real)
        out.rename(tmp_path / "run-old-1")
        real(folder)

    monkeypatch.setattr(WorkFolder, "lock", lock)
    with locked(out, ALONE, may_write) as folder:
        assert not folder.is_moved and folder.path == out and out.is_dir()


def test_a_folder_is_known_wherever_it_is_moved(tmp_path: Path) -> None:
    named = tmp_path / "parent" / "run"
    with locked(named, ALONE, may_write) as folder:
        (named / "mine").touch()
        assert not folder.is_moved and folder.path == named
        named.rename(tmp_path / "parent" / "other")
        assert folder.is_moved and folder.path == tmp_path / "parent" / "other" and not folder.is_removed
        named.mkdir()  # replaced by another folder
        assert folder.is_moved and (folder / "mine").exists()
        named.rmdir()
        named.write_text("a file")
        assert folder.is_moved and (folder / "mine").exists()
        named.unlink()
        named.symlink_to(named)
        assert folder.is_moved and (folder / "mine").exists()
        named.unlink()
        named.symlink_to("other")  # a link to where it is now: the same folder
        assert not folder.is_moved and folder.path == named
        (tmp_path / "parent").rename(tmp_path / "new parent")
        assert folder.is_moved and folder.path == tmp_path / "new parent" / "other"
        assert str(tmp_path / "new parent" / "other") in str(folder.error("after update 7"))
        shutil.rmtree(tmp_path / "new parent")
        assert folder.is_moved and folder.is_removed and "was removed" in str(folder.error("after update 7"))
        with pytest.raises(OSError):
            (folder / "anew").mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_answer_has_not_moved_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "run", ALONE, may_write) as folder:
        real = os.stat

        def stat(path: object, **options: object) -> os.stat_result:
            if path == folder.named:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat)
            assert not folder.is_moved and folder.path == folder.named


def users_folder(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")


def test_fresh_moves_only_runs_aside(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users_folder(tmp_path / "mine")
    cases = {
        "holds files but no run": (tmp_path / "mine", config_of(run)),
        "with the current folder in it": (run, config_of(run)),
        "with your home in it": (run, config_of(run)),
        "with another run in it": (run, config_of(run)),
        "with your data in it": (run, config_of(run, f"data.root={run}", "data.train.annotations=a.json")),
    }
    for words, (out, cfg) in cases.items():
        with monkeypatch.context() as patch:
            if "current" in words:
                (run / "inside").mkdir()
                patch.chdir(run / "inside")
            if "home" in words:
                patch.setenv("HOME", str(run / "inside"))
            if "another" in words:
                begun(run / "inside" / ".." / "nested", 1)
            with pytest.raises(GndetError, match=words):
                find_run(cfg, out, True, ALONE)
        shutil.rmtree(run / "nested", ignore_errors=True)
        assert out.is_dir() and not list(tmp_path.glob("*-old-*"))


def test_fresh_leaves_a_link_to_a_run_folder_in_place(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("run")
    before = content(run)
    find_run(config_of(run), tmp_path / "link", True, ALONE)
    move_aside(tmp_path / "link", ALONE)
    assert (tmp_path / "link").resolve() == run and not list(run.iterdir())
    assert content(tmp_path / "run-old-1") == before


def test_an_out_that_leads_nowhere_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("/not/mounted/run")
    with pytest.raises(TrainingError, match="a link to /not/mounted/run, which is not there"):
        find_run(load(made, "run"), tmp_path / "run", False, ALONE)


@pytest.mark.parametrize("report", [True, False])
def test_a_signal_at_the_end_names_the_report_only_if_one_was_to_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: bool
) -> None:
    stop = StopSignals()
    with marked(WorkFolder(tmp_path), (lambda out: None) if report else None, stop, Console()):
        stop.number = signal.SIGTERM
    assert ("no report was written, because a signal came" in capsys.readouterr().out) == report
