"""The log of a run: what it writes, what survives a kill, and what it shows."""

import io
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gndet.files import LineFile, write_whole
from gndet.training.log import Log, read_metrics

VALUES = {
    "loss": 1.234,
    "loss_rpn_cls": 0.21,
    "loss_mask": 0.6,
    "lr": 0.01,
    "images_per_s": 5.3,
    "data_wait": 0.03,
    "memory_mib": 812.0,
    "eta_s": 200.0,
}


def log_updates(out: Path, first: int, updates: range) -> None:
    with Log(out, total_updates=100, first_update=first) as log:
        for update in updates:
            log.train(update, {"loss": float(update)})


def board(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_what_is_logged_reads_back(tmp_path: Path) -> None:
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    with Log(tmp_path, total_updates=100) as log:
        log.train(20, VALUES)
        log.evaluation(20, {"box/AP": 0.25, "mask/APs": float("nan")}, "a table")
        log.picture(20, "val/first", picture)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2  # flushed line by line
    train, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert train == {"update": 20, "kind": "train", **VALUES}
    assert evaluation == {"update": 20, "kind": "evaluation", "box/AP": 0.25, "mask/APs": None}
    events = board(tmp_path)
    assert events.Scalars("train/loss")[0].value == pytest.approx(1.234)
    assert (events.Scalars("val/box/AP")[0].step, events.Scalars("val/box/AP")[0].value) == (20, 0.25)
    assert math.isnan(events.Scalars("val/mask/APs")[0].value)
    assert (events.Images("val/first")[0].height, events.Images("val/first")[0].width) == (6, 8)


def test_not_finite_values_are_legal_json(tmp_path: Path) -> None:
    with Log(tmp_path, total_updates=1) as log:
        log.train(1, {"loss": math.inf, "eta_s": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log_updates(tmp_path, 0, range(10, 60, 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 60, "ki')  # killed while writing
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    log_updates(tmp_path, 30, range(40, 60, 10))
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40, 50]
    assert [event.step for event in board(tmp_path).Scalars("train/loss")] == [10, 20, 30, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_starting_afresh_forgets_everything(tmp_path: Path) -> None:
    log_updates(tmp_path, 0, range(0, 30, 10))
    log_updates(tmp_path, 0, range(10, 20, 10))
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]
    assert [event.step for event in board(tmp_path).Scalars("train/loss")] == [10]


def test_without_a_terminal_plain_lines_are_shown(tmp_path: Path, capsys) -> None:
    text = io.StringIO()
    console = Console(file=text, width=80)
    with Log(tmp_path, total_updates=1200, first_update=0, console=console) as log:
        log.train(40, VALUES)
        log.train(60, {"loss": math.nan, "eta_s": math.nan})
        log.evaluation(60, {"box/AP": 0.25}, "class  AP\n[red]   1")
        log.message("done")
    assert text.getvalue().splitlines() == [
        "update 40/1200  loss 1.234 (rpn_cls 0.21 mask 0.6)  lr 0.01  5.3 images/s  data wait 3 %  812 MiB"
        "  eta 0:03:20",
        "update 60/1200  loss nan  eta ?",
        "evaluation after update 60/1200",
        "class  AP",
        "[red]   1",
        "done",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_progress_with_the_scores_so_far(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=200, color_system=None)
    with Log(tmp_path, total_updates=1200, first_update=600, console=console) as log:
        log.evaluation(600, {"box/AP": 0.25, "box/AP50": 0.5}, "the table")
        log.train(900, VALUES)
        log.evaluating(20, 40)
        log.message("a remark")
    shown = text.getvalue()
    assert "evaluating: 20 of 40 images" in shown
    assert "600/1200" in shown and "900/1200" in shown and "75 %" in shown
    assert "5.3 images/s" in shown and "box/AP 25.0" in shown and "box/AP50" not in shown
    assert "the table" in shown and "a remark" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_without_a_console_nothing_is_shown(tmp_path: Path, capsys) -> None:
    with Log(tmp_path, total_updates=10) as log:
        log.train(5, VALUES)
        log.message("unseen")
    assert capsys.readouterr() == ("", "")


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Limit the size of files, like a full disk: the write that reaches the limit is cut, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_without_room_leaves_no_half_and_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = LineFile(path)
    file.append("first")
    with no_file_beyond(10):
        for line in ("second", "third"):
            with pytest.raises(OSError):
                file.append(line)
            assert path.read_bytes() == b"first\n"
    file.append("fourth")
    file.close()
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"


def test_a_full_disk_loses_no_line_of_the_log_when_there_is_room_again(tmp_path: Path) -> None:
    said = io.StringIO()
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with Log(tmp_path, total_updates=5, console=Console(file=said)) as log:
        log.train(1, VALUES)
        with no_file_beyond(0):
            log.train(2, VALUES)
            log.picture(2, "val/0", picture)
            log.attempt("beside.txt", lambda: write_whole(tmp_path / "beside.txt", "all of it"))
            log.append("more.jsonl", {"update": 2})
            assert "metrics.jsonl: File too large" in log.lost()
        log.train(3, VALUES)
        assert log.lost() == ""
        log.picture(3, "val/0", picture)
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    events = board(tmp_path)
    for name, value in VALUES.items():
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert logged == [(step, pytest.approx(value)) for step in (1, 3)], name
    assert [event.step for event in events.Images("val/0")] == [3]
    assert (tmp_path / "beside.txt").read_text() == "all of it"
    assert json.loads((tmp_path / "more.jsonl").read_text()) == {"update": 2}
    words = said.getvalue()
    assert words.count("could not write metrics.jsonl (File too large); training continues and will retry") == 1
    assert "metrics.jsonl: written again, nothing is missing" in words
    assert "tensorboard: written again, what was logged in between is missing" in words


def test_tensorboard_goes_on_after_its_writer_ran_out_of_room_and_hides_what_a_killed_run_logged(
    tmp_path: Path,
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    log_updates(tmp_path, 0, range(1, 6))
    said = io.StringIO()
    with Log(tmp_path, total_updates=9, first_update=3, console=Console(file=said)) as log:
        with no_file_beyond(10_000):  # room for a line, not for a picture
            log.picture(3, "val/0", picture)
        assert "could not write tensorboard (No space left on device)" in said.getvalue() and log.lost() == ""
        for update in (4, 5):
            log.train(update, {"loss": float(10 * update)})
    events = board(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]


def test_what_is_never_written_is_reported(tmp_path: Path) -> None:
    with Log(tmp_path, total_updates=5) as log, no_file_beyond(0):
        log.train(1, VALUES)
        lost = log.lost()
        log.train(2, VALUES)
    assert lost == "metrics.jsonl: File too large; tensorboard: File too large"
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]  # tried once more at the end


def test_a_log_that_is_not_enabled_writes_and_shows_nothing(tmp_path: Path, capsys) -> None:
    with Log(tmp_path / "run", total_updates=5, console=Console(), enabled=False) as log:
        log.train(1, VALUES)
        log.evaluation(1, {"box/AP": 0.25}, "a table")
        log.picture(1, "val/0", np.zeros((6, 8, 3), dtype=np.uint8))
        log.histogram(1, "norm/gamma", np.ones(3))
        log.attempt("beside.txt", lambda: write_whole(tmp_path / "beside.txt", "text"))
        log.evaluating(1, 1)
        log.message("unseen")
        assert log.lost() == ""
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_two_logs_of_one_process_have_files_of_their_own(tmp_path: Path) -> None:
    log_updates(tmp_path, 0, range(1, 4))
    log_updates(tmp_path, 2, range(3, 5))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [event.step for event in board(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]
