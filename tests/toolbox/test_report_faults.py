"""Reports of strange runs: whatever names and numbers a run has, its page is written, and says what is not on it."""

import html
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from faults.tiny import CONFIG

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.cli.main import main
from gndet.data.records import Dataset
from gndet.toolbox.analysis.study_results import CellResult, Study, metrics_of, write_study
from gndet.toolbox.norm_study.curve import draw_curve
from gndet.toolbox.report import blocks, charts, norms, quality
from gndet.toolbox.report.record import read_run, training_time
from gndet.toolbox.report.report import SECTIONS, made, write_report

NAMES = (
    "$_$", "$", "\\frac{1}{2}$", "_hidden", "_", "", " ", "two\nlines", "\x1b[31mred\0", "x" * 5000, "שלום\u202eabc",
    "中文", "<b>&amp;", 'id="abc"', "#010203 url(#abc)", "%s {0}", "--", "\ud83d",
)  # fmt: skip
VALUES = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 1e-320, 0.0, -1.0, 3.0)


def texts(svg: str, figure: str = "f") -> list[str]:
    """Return the texts of a figure, as a browser shows them."""
    part = svg[svg.index(f'id="{figure}"') :].partition("</figure>")[0]
    return [html.unescape(text).strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", part, re.DOTALL)]


def shown(name: str) -> str:
    """Return a name as a chart shows it."""
    plain = {"two\nlines": "two lines", "\x1b[31mred\0": r"\x1b[31mred\x00", "שלום\u202eabc": r"שלום\u202eabc"}
    plain |= {"": "(no name)", " ": "(no name)", "\ud83d": "?", "x" * 5000: f"{'x' * 58}…"}
    return plain.get(name, name)


def test_names_are_text_on_charts() -> None:
    for first in range(0, len(NAMES), 6):
        names = NAMES[first : first + 6]
        series = [charts.Series(name, [1, 2], [1.0, 2.0]) for name in names]
        drawn = charts.lines("f", series, "", x_label="x", y_label="y")
        assert set(map(shown, names)) <= set(texts(drawn))
        drawn = charts.bars("f", names, np.ones(len(names)), "", x_label="x")
        assert len(set(map(shown, names)) - set(texts(drawn))) <= ("x" * 5000 in names)  # shorter there
        drawn = charts.heat("f", np.eye(len(names)), names, "", x_label="x", y_label="y")
        assert texts(drawn).count("1") >= len(names)


def test_names_are_text_on_the_page() -> None:
    table = blocks.sortable_table("t", ["name"], [[name] for name in NAMES], "")
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", table, re.DOTALL)]
    assert len(cells) == len(NAMES) and max(map(len, cells)) == blocks.MOST_LETTERS + 1
    assert not re.search("[\0\x1b\u202e\ud83d]", table) and table.count("<b>") == 0


def test_no_value_of_a_curve_stops_a_chart() -> None:
    rng = np.random.default_rng(0)
    for trial in range(8):
        values = [rng.choice(VALUES, 4).tolist() for _ in range(4)]
        if trial % 3 == 0:
            values = [[values[0][0]] * 4 for _ in values]
        a = charts.Series("a", [1, 2, 3, 4], values[0], *([values[1], values[2]] if trial % 2 else []))
        series = [a, charts.Series("b", [1, 2, 3, 4], values[3])]
        drawn = charts.lines("f", series, "", x_label="x", y_label="y", log_y=bool(trial % 2))
        assert bool(drawn) == any((np.abs(line.y) <= charts.LARGEST).any() for line in series)
        charts.bars("f", list("abcd"), values[0], "", x_label="x", low=values[1], high=values[2])
        charts.histogram("f", values[0], "", x_label="x", y_label="y", log_x=bool(trial % 2))
    for log in (False, True):
        assert charts.lines("f", [charts.Series("a", [], [])], "", x_label="x", y_label="y", log_y=log) == ""
        assert charts.histogram("f", [], "", x_label="x", y_label="y", log_x=log) == ""


def test_hours_count_on_after_a_day() -> None:
    def took(*speeds: float | None) -> str:
        train = [{"update": update, "images_per_s": speed} for update, speed in enumerate(speeds, start=1)]
        cfg = SimpleNamespace(train=SimpleNamespace(global_batch=2))
        return training_time(SimpleNamespace(train=train, cfg=cfg))  # type: ignore[arg-type]

    day = 2 / (24 * 3600)
    assert took(2 / (30 * 3600)) == "30:00 h" and took(day, day, day, 2 / 90) == "72:01 h"
    assert took(2 / 59.9) == "0:59 min" and took(2 / 3599.9) == "59:59 min" and took(2 / 3600) == "1:00 h"
    assert took() == took(None, 0.0) == took(-1.0) == "" and took(1e-300) != ""


def test_a_section_that_fails_is_told_and_the_others_stand() -> None:
    told: list[str] = []

    def fails(error: Exception) -> Any:
        def make(run: object) -> blocks.Section:
            raise error

        return make

    fine = blocks.section("c", "C", "text")
    kinds = {
        "a": ("A", fails(MemoryError())), "b": ("B", fails(ValueError("two\nlines $"))), "c": ("C", lambda run: fine),
        "d": ("D", lambda run: None), "e": ("E", fails(KeyError("<key>"))),
    }  # fmt: skip
    sections = made(kinds, object(), told.append)
    assert [(section.id, section.title) for section in sections] == [("a", "A"), ("b", "B"), ("c", "C"), ("e", "E")]
    assert sections[2] == fine and "MemoryError" in sections[0].html and "&lt;key&gt;" in sections[3].html
    assert told == [
        "report: the section A could not be made: MemoryError",
        "report: the section B could not be made: ValueError: two",
        "report: the section E could not be made: KeyError: '<key>'",
    ]


def layer(**changed: Any) -> dict[str, Any]:
    return {
        "name": "backbone.stem.norm", "kind": "gn", "channels": 8, "groups": 2, "masked": True, "eps": 1e-5,
        "trained": True, "elements": 64, "one_cell": 0.0, "one_element": 0.0, "nonfinite": 0.0, "std": [1.0] * 5,
        "eps_dominated": 0.0, "similar": [0.1, 0.1], "gamma": [1.0] * 3, "dead": 0.0, "exploding": 0.0,
        "drift": [0.0, 0.0], "gap_mean": None, "gap_std": None, "spread_mean": None, "spread_std": None,
    } | changed  # fmt: skip


@pytest.mark.parametrize("kind", ["gn", "bn"])
def test_norms_after_a_divergence_are_shown(tmp_path: Path, kind: str) -> None:
    none = {
        "std": [None] * 5,
        "similar": [None, None],
        "gamma": [None] * 3,
        "drift": [None, None],
        "eps_dominated": None,
    }
    huge = {"std": [1e299] * 5, "gamma": [-1e299] * 3, "drift": [1e299, 0.0], "nonfinite": 1.0, "dead": None}
    for lines in ([none], [none, none], [huge, none], [none | {"std": None, "drift": None}, huge]):
        entries = [{"update": update, "layers": [layer(kind=kind, **changed)] * 3, "padding": None}
                   for update, changed in enumerate(lines)]  # fmt: skip
        (tmp_path / "norms.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
        section = norms.section(tmp_path)
        assert "norm-layers" in section.html and "left out" not in section.html
        assert f"after update {len(lines) - 1}" in section.html


def study(states: Sequence[str], variants: Sequence[str] = ("gn", "bn"), sizes: Sequence[int] = (1, 8)) -> Study:
    """Make up a study whose cells have these states in turn; those that are done have a metric."""
    cells = [CellResult(variant=variant, images=size, seed=0) for variant in variants for size in sizes]
    for number, cell in enumerate(cells):
        cell.state = states[number % len(states)]  # type: ignore[assignment]
        cell.metrics = {"box/AP": (0.3, None)[number % 3 == 1]} if cell.state == "done" else {}
        cell.reason = "" if cell.state == "done" else "<loss> $x_1$\nis not finite"
    return Study(
        config="c.yaml", overrides=[], settings={}, batch="scaled", rule="scaled", updates=10, reference_batch=16,
        results=cells,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("states", "variants", "sizes"),
    [
        (("pending",), ("gn",), (1, 8)), (("failed",), ("gn", "bn"), (1,)), (("refused", "running"), ("gn",), (1, 8)),
        (("failed", "done"), ("$_$", "_b"), (1,)), (("failed", "done"), ("groups-1", "groups-$"), (1, 8)),
        (("done",), ("_b", "$_$"), (1, 8)), (("copied", "done"), ("groups-1", "groups-channels"), (1,)),
    ],
)  # fmt: skip
def test_studies_are_shown_whatever_became_of_their_cells(
    tmp_path: Path, states: Sequence[str], variants: Sequence[str], sizes: Sequence[int]
) -> None:
    made_up = study(states, variants, sizes)
    write_study(tmp_path, made_up)
    told: list[str] = []
    page = write_report([tmp_path], None, (), told.append).read_text()
    assert len(told) == 1 and "could not be made" not in page and "study-cells" in page
    if metrics_of(made_up):
        draw_curve(made_up, tmp_path / "curve.png")


def test_a_page_stays_small_with_thousands_of_classes() -> None:
    rows: list[list[blocks.Cell]] = [[f"class {number}", (number, str(number))] for number in range(5001)]
    table = blocks.sortable_table("t", ["class", "n"], rows, "AP", picks=[f"class:{number}" for number in range(5000)])
    assert table.count("<tr") == 1 + blocks.MOST_ROWS and "class 5000" in table and "AP; 1,500 of 5,001 rows" in table
    confusion = np.eye(3001, dtype=np.int64)
    confusion[7] += 9
    found: Any = SimpleNamespace(
        matches=SimpleNamespace(classes=list(map(str, range(3000)))), confusion=confusion, threshold=0.5
    )
    drawn = quality._confusion(found)
    names = texts(drawn, "chart-confusion")
    assert names.count("7") == 2 and len(names) == 2 * quality.MOST_CONFUSED + 2
    assert "the 40 classes that occur most" in drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """Train a run of two updates."""
    path = tmp_path_factory.mktemp("strange") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"device": "cpu"}))
    options = [f"out={path.parent / 'run'}", "train.schedule.updates=2", "train.vis_images=0", "train.report=false"]
    assert main(["train", str(path), *options]) == 0
    return path.parent / "run"


def test_a_run_with_absurd_records_has_its_page(finished: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "$_$ <b>", list[str]()
    shutil.copytree(finished, out, symlinks=True)
    strange = [
        {"update": 1, "kind": "train", "loss": 1e299, "images_per_s": -5.0, "memory_mib": -1.0, "data_wait": 1e299},
        {"update": 2, "kind": "train", "loss": None, "images_per_s": 1e-299, "lr": -1e-299},
        {"update": 1, "kind": "train", "loss": "text"}, {"update": -1, "kind": "train"}, {"update": 1e300}, [], None,
        {"update": 2, "kind": "evaluation", "box/AP": 1e299, "mask/AP": -1e299, "box/AP50": None},
    ]  # fmt: skip
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in strange))
    saved = load_checkpoint((out / "last").resolve(), ())
    save_checkpoint(saved.path, {}, saved.meta | {"update": "x", "versions": [1], "nonfinite": {}})
    write_report([out], None, (), told.append)
    page = (out / "report.html").read_text()
    assert [id for id in SECTIONS if f'<section id="{id}"' not in page] == ["confusion"]  # which classifiers have
    assert "5 line(s) are left out" in page and "does not say how far the run had come" in page
    assert "chart-lr" in page and "could not be made" not in page and len(told) == 1


def test_a_run_with_an_empty_validation_set_has_its_page(finished: Path, tmp_path: Path) -> None:
    run = read_run(finished)
    assert run.val_set is not None
    empty = Dataset("none", run.val_set.classes, run.val_set.category_ids, [])
    told: list[str] = []
    sections = made(SECTIONS, run._replace(val_set=empty, results=None, analysis=None), told.append)
    assert not told and {"summary", "data", "batches"} <= {section.id for section in sections}
