"""What a run logged is read back although lines are broken; nothing is lost, and what is left out is said once."""

import json
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_batch, small_model
from rich.console import Console
from safetensors.torch import save

from gndet.errors import DataError
from gndet.evaluation.norm_statistics import measure
from gndet.training.log import Log, read_metrics
from gndet.training.logged import is_norms, truncate
from gndet.training.norms import read_start

GOOD = [{"update": u, "kind": "train", "loss": 1 / u, "lr": 0.1} for u in range(1, 40)] + [
    {"update": 39, "kind": "evaluation", "box/AP": 0.5, "box/APs": None}
]
LAYER = {
    "name": "fpn.0", "kind": "gn", "channels": 32, "groups": 2, "masked": True, "eps": 1e-5, "trained": True,
    "elements": 64, "one_cell": 0.0, "one_element": 0.0, "nonfinite": 0.0, "std": [0.1, 0.2, 0.3, 0.4, 0.5],
    "eps_dominated": 0.0, "similar": [0.1, None], "gamma": [1, 1.0, 1.0], "dead": 0.0, "exploding": 0.0, "drift": None,
}  # fmt: skip
BROKEN: dict[str, bytes] = {
    "torn": b'{"update": 3, "ki',
    "two in one line": b'{"update": 3, "kind": "train"}{"update": 4, "kind": "train"}',
    "empty": b"",
    "NUL bytes": b"\0" * 5000,
    "not UTF-8": b'{"update": 3, "kind": "train", "loss\xff": 1}',
    "UTF-16": '{"update": 3, "kind": "train"}'.encode("utf-16"),
    "not JSON": b"Traceback (most recent call last):",
    "not an object": b"[1, 2]",
    "a number": b"17",
    "null": b"null",
    "nested a million times": b"[" * 1_000_000,
    "an integer of a million digits": b'{"update": 3, "kind": "train", "loss": ' + b"9" * 1_000_000 + b"}",
    "twenty MB": b'{"update": 3, "kind": "train", "loss": "' + b"x" * 20_000_000 + b'"}',
    "without an update": b'{"kind": "train", "loss": 1.0}',
    "without a kind": b'{"update": 3, "loss": 1.0}',
    "of another kind": b'{"update": 3, "kind": "test", "loss": 1.0}',
    "a list as kind": b'{"update": 3, "kind": [], "loss": 1.0}',
    "update as text": b'{"update": "3", "kind": "train", "loss": 1.0}',
    "update 3.5": b'{"update": 3.5, "kind": "train", "loss": 1.0}',
    "update true": b'{"update": true, "kind": "train", "loss": 1.0}',
    "update below 0": b'{"update": -1, "kind": "train", "loss": 1.0}',
    "update of 30 digits": b'{"update": %d, "kind": "train"}' % 10**30,
    "update after the end": b'{"update": 41, "kind": "train", "loss": 1.0}',
    "loss as text": b'{"update": 3, "kind": "train", "loss": "1.0"}',
    "loss as a list": b'{"update": 3, "kind": "train", "loss": [1]}',
    "loss true": b'{"update": 3, "kind": "train", "loss": true}',
    "loss NaN": b'{"update": 3, "kind": "train", "loss": NaN}',
    "loss 1e999": b'{"update": 3, "kind": "train", "loss": 1e999}',
    "loss of 400 digits": b'{"update": 3, "kind": "train", "loss": %d}' % 10**400,
}


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def good(entries: list[dict[str, Any]] = GOOD) -> list[bytes]:
    return [json.dumps(entry).encode() for entry in entries]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_left_out_and_said_and_stays_in_the_file(tmp_path: Path, kind: str) -> None:
    lines = good()
    lines[20:20], lines[30:30] = [BROKEN[kind]], [BROKEN[kind]]
    path, said = written(tmp_path / "metrics.jsonl", lines), list[str]()
    assert read_metrics(path, said.append, last=40) == GOOD
    (line,) = said
    assert line.startswith(f"{path}:21: 2 line(s)")
    said.clear()
    if kind != "update after the end":
        with Log(tmp_path, total_updates=40, first_update=25):
            pass
        left = path.read_bytes()
        assert left == b"".join(line + b"\n" for line in [*lines[:26], lines[30]])
        assert read_metrics(path) == GOOD[:25]


def test_lines_out_of_order_are_put_in_order_and_the_later_of_two_counts(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(GOOD, len(GOOD))
    old = [entry | {"loss": 99.0} for entry in GOOD[3:5]]
    path, said = written(tmp_path / "metrics.jsonl", good(old + shuffled)), list[str]()
    assert read_metrics(path, said.append) == sorted(shuffled, key=lambda entry: entry["update"])
    assert len(said) == 1 and " 2 line(s) " in said[0]


def test_editors_marks_and_line_ends_do_no_harm(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(good()))  # no line break at the end
    assert read_metrics(path, said.append) == GOOD
    truncate(path, 40, True, said.append)
    with Log(tmp_path, total_updates=50, first_update=40) as log:
        log.train(41, {"loss": 1.0})
    assert [entry["update"] for entry in read_metrics(path, said.append)] == [*range(1, 40), 39, 41] and not said


@pytest.mark.parametrize("end", [b'{"update": 40, "kin', b"\0" * 100, b"\xff"], ids=["cut", "NUL", "not UTF-8"])
def test_a_last_line_that_a_kill_cut_is_passed_over_without_a_word(tmp_path: Path, end: bytes) -> None:
    path, said = written(tmp_path / "metrics.jsonl", good()), list[str]()
    path.write_bytes(path.read_bytes() + end)
    assert read_metrics(path, said.append) == GOOD and not said


def test_a_line_cut_before_any_other_is_dropped_and_the_next_one_is_not_appended_to_it(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_bytes(b'{"update": 1, "kin')
    with Log(tmp_path, total_updates=50) as log:
        log.train(1, {"loss": 1.0})
    assert [entry["loss"] for entry in read_metrics(path, said.append)] == [1.0] and not said


def test_what_is_not_a_file_is_said_and_a_link_is_not_written_through(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.mkdir(parents=True)
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        path.rmdir()
        make()
        with pytest.raises(DataError, match="not a file, expected what the run logged; move it away"):
            read_metrics(path)
        with pytest.raises(DataError, match="not a file"):
            Log(path.parent, total_updates=9)
    path.unlink()
    other = written(tmp_path / "elsewhere", good())
    before = other.read_bytes()
    path.symlink_to(other)
    assert read_metrics(path) == GOOD
    with Log(path.parent, total_updates=50, first_update=40) as log:
        log.train(50, {"loss": 1.0})
    assert other.read_bytes() == before and len(read_metrics(path)) == len(GOOD) + 1
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with Log(path.parent, total_updates=50) as log:
        log.train(1, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists() and len(read_metrics(path)) == 1


def test_a_file_with_another_name_is_not_written_to(tmp_path: Path) -> None:
    mine, path = tmp_path / "mine", tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    mine.touch()
    os.link(mine, path)
    with Log(path.parent, total_updates=50) as log:
        log.train(1, {"loss": 1.0})
    assert not mine.read_bytes() and len(read_metrics(path)) == 1


def test_a_log_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "metrics.jsonl", [*good()[:5], b"\0", *good()[5:]])
    with Log(tmp_path, total_updates=50, first_update=40, console=Console(width=1000)):
        pass
    assert capsys.readouterr().out.count("metrics.jsonl:6: 1 line(s) are left out") == 1


def test_lines_of_norms_are_told_from_foreign_ones() -> None:
    line = {"update": 1, "layers": [LAYER], "padding": 0.1}
    assert is_norms(line) and is_norms(line | {"padding": None, "layers": []})
    pairs = {"gap_mean": [0.1, 0.2], "gap_std": None, "spread_mean": 0.5, "spread_std": None}
    assert is_norms(line | {"layers": [LAYER, LAYER | pairs]})
    for key in LAYER:
        assert not is_norms(line | {"layers": [{k: v for k, v in LAYER.items() if k != key}]}), key
        for value in ("x", {}, [1], [None] * 9, 10**400, float("nan"), float("inf")):
            if not (key in ("name", "kind") and value == "x"):
                assert not is_norms(line | {"layers": [LAYER | {key: value}]}), (key, value)
    assert not is_norms(line | {"padding": "x"}) and not is_norms(line | {"layers": None})
    assert not is_norms({"update": 1, "layers": [17], "padding": 0})


STEM = "backbone.stem.norm"
HEAD = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
STARTS: dict[str, Any] = {
    "empty": b"",
    "not safetensors": b"\xff" * 100,
    "a type that torch lacks": len(HEAD).to_bytes(8, "little") + HEAD + b"\0",
    "weight alone": save({f"{STEM}.weight": torch.ones(64)}),
    "bias alone": save({f"{STEM}.bias": torch.ones(64)}),
    "bias of another size": save({f"{STEM}.weight": torch.ones(64), f"{STEM}.bias": torch.ones(5)}),
    "another model": save({f"{STEM}.weight": torch.ones(2), f"{STEM}.bias": torch.ones(2)}),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


def test_a_foreign_file_of_the_start_leaves_the_drift_unknown(tmp_path: Path) -> None:
    model = small_model()
    for name, content in STARTS.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "norms-start.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        layers = measure(model, [make_batch([(64, 64)])], nullcontext, read_start(tmp_path / name))
        assert {layer.numbers["name"]: layer.numbers["drift"] for layer in layers}[STEM] is None, name
