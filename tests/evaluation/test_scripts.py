"""Names in any script: what the font has is drawn, what it lacks becomes `class N` or an escape, and nothing warns."""

import unicodedata
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import features

from gndet.data.datasets.images import picture_record
from gndet.evaluation.drawing import captioned, draw_detections, draw_ground_truth, placard
from gndet.evaluation.fonts import class_name, drawable, font
from gndet.toolbox.report import charts

GRAY = np.full((700, 900, 3), 120, dtype=np.uint8)
DRAWN = ["cup", "größe", "чашка", "φλιτζάνι", "Łódź", "naïve café", "№ 1", "ảnh"]
LACKING = ["盘子", "コップ", "컵", "चाय", "ถ้วย", "cup 盘", "a\nb", "\ud800", "a\0"]


def has_glyphs(text: str) -> bool:
    """What the font's own table of characters says, read by matplotlib."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return all(ord(letter) in FT2Font(str(file)).get_charmap() for letter in text)


@pytest.mark.parametrize("name", DRAWN)
def test_a_name_that_the_font_has_is_drawn_as_it_is(name: str) -> None:
    assert has_glyphs(name) and class_name([name], 0) == name and drawable(name) == name
    composed = unicodedata.normalize("NFD", name)  # as macOS writes file names
    assert class_name([composed], 0) == name and drawable(composed) == name


@pytest.mark.parametrize("name", LACKING)
def test_a_name_that_the_font_lacks_becomes_its_label(name: str) -> None:
    assert class_name(["cup", name, "plate"], 1) == "class 1"


def test_letters_that_the_font_lacks_are_escaped_in_file_names() -> None:
    assert drawable("盘子 größe.jpg") == "\\u76d8\\u5b50 größe.jpg"
    assert drawable("a\nb\udcff.jpg") == "a\\nb\\udcff.jpg"
    assert has_glyphs(drawable("".join(LACKING)))


@pytest.mark.parametrize("block", [(0x20, 0x7F), (0xA1, 0x250), (0x370, 0x400), (0x400, 0x530), (0x4E00, 0x4E80)])
def test_a_letter_is_found_missing_exactly_if_the_font_lacks_it(block: tuple[int, int]) -> None:
    letters = [chr(code) for code in range(*block) if chr(code).isprintable()]
    letters = [letter for letter in letters if unicodedata.normalize("NFC", letter) == letter]
    assert [drawable(letter) == letter for letter in letters] == [has_glyphs(letter) for letter in letters]


@pytest.mark.parametrize("raqm", [True, False])
def test_letters_from_the_right_are_drawn_only_if_they_can_be_ordered(
    monkeypatch: pytest.MonkeyPatch, raqm: bool
) -> None:
    from gndet.evaluation import fonts

    if raqm and not features.check("raqm"):
        pytest.skip("Pillow has no raqm here")
    monkeypatch.setattr(fonts.features, "check", lambda _: raqm)
    fonts._has.cache_clear()
    names = ["كأس", "כוס"]
    try:
        assert [class_name(names, label) for label in (0, 1)] == (names if raqm else ["class 0", "class 1"])
    finally:
        fonts._has.cache_clear()


def test_labels_of_any_script_are_drawn_in_pictures(tmp_path: Path) -> None:
    record = picture_record(1, tmp_path / "a.png", GRAY.shape[:2])
    boxes = np.array([[100.0, 200.0, 300.0, 400.0]])
    record = record._replace(boxes=boxes, labels=np.array([1]), crowd=np.array([False]), segmentations=[None])
    results = [{"category_id": 7, "bbox": [100, 200, 200, 200], "score": 0.9}]
    for draw in (
        lambda classes: draw_ground_truth(GRAY, record, classes),
        lambda classes: draw_detections(GRAY, results, classes, [3, 7], 0.5),
    ):
        drawn = {name: draw(["cup", name]) for name in ("größe", "grö", "盘子", "子盘", "class 1")}
        assert (drawn["盘子"] == drawn["class 1"]).all() and (drawn["子盘"] == drawn["class 1"]).all()
        assert (drawn["größe"] != drawn["grö"]).any()


def test_captions_and_placards_draw_escapes_rather_than_boxes() -> None:
    image = np.zeros((40, 400, 3), dtype=np.uint8)
    assert np.array_equal(captioned(image, "盘.png"), captioned(image, "\\u76d8.png"))
    assert np.array_equal(placard("盘.png: missing", 640), placard("\\u76d8.png: missing", 640))
    assert not np.array_equal(captioned(image, "ö.png"), captioned(image, "ß.png"))


def test_the_font_is_found_without_importing_matplotlib() -> None:
    assert Path(font(12).path) == Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    assert font(12) is font(12)  # read once


def test_charts_keep_true_names_and_warn_of_nothing() -> None:
    names = ["盘子", "größe", "чашка", "_background_", "$\\frac{a$b", "كأس 😀", "<b>"]
    x = [0.0, 1.0]
    with warnings.catch_warnings(action="error"):
        html = charts.lines("a", [charts.Series(name, x, x) for name in names], "x", x_label="盘子", y_label="y")
        html += charts.bars("b", names, list(range(len(names))), "x", x_label="x")
        html += charts.heat("c", np.eye(len(names)), names, "x", x_label="x", y_label="y")
    for name in (*names[:-1], "&lt;b&gt;"):
        assert html.count(name) >= 4, name
