"""A norm study of a classifier compares errors, of which the smallest is the best, and draws the paper's figure."""

from pathlib import Path

import pytest
import yaml
from classes import CONFIG, write_classes
from PIL import Image

from gndet.toolbox.analysis.study_results import CellResult, Study, read_study, study_table, study_verdict
from gndet.toolbox.norm_study.study import study
from gndet.toolbox.report.report import study_page


def made_up(errors: dict[tuple[str, int], list[float]]) -> Study:
    results = [
        CellResult(variant=v, images=size, seed=seed, state="done", metrics={"top1": 1 - error, "error": error})
        for (v, size), found in errors.items()
        for seed, error in enumerate(found)
    ]
    return Study(config="c.yaml", overrides=[], settings={}, batch="scaled", rule="", updates=100,
                 reference_batch=32, results=results)  # fmt: skip


def test_the_smallest_error_is_the_best() -> None:
    found = made_up({
        ("bn", 2): [0.347, 0.349, 0.345], ("bn", 32): [0.236, 0.237, 0.235],
        ("gn", 2): [0.241, 0.242, 0.240], ("gn", 32): [0.241, 0.240, 0.242],
    })  # fmt: skip
    said = study_verdict(found)
    assert said[0].startswith("At 2 images per GPU gn is best: validation error 24.1")
    assert said[1] == "That is clearly below bn (-10.6 [-11.0, -10.2])."
    assert any(words.startswith("bn rises from 32 to 2 images per GPU: +11.1") for words in said)
    assert "validation error in percent by images per GPU" in study_table(found, "error")


@pytest.mark.slow
def test_a_study_trains_classifiers_and_draws_the_curve(tmp_path: Path) -> None:
    write_classes(tmp_path / "set")
    data = CONFIG["data"] | {"root": str(tmp_path / "set")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))
    grid = {"norms": ("gn", "bn"), "groups": None, "images_per_gpu": (2, 4), "seeds": 1, "batch": "scaled"}
    said: list[str] = []
    words = ("train.schedule.updates=2", "train.ema=0")
    assert study(str(tmp_path / "tiny.yaml"), words, said.append, **grid, budget=None, jobs=None, out=tmp_path / "out")
    assert {cell.state for cell in read_study(tmp_path / "out").results} == {"done"}
    assert "validation error" in "\n".join(said) and Image.open(tmp_path / "out" / "curve.png").width > 300
    assert "validation error" in study_page(tmp_path / "out", said.append)
