"""The report of a run: written however the run ends, complete, self-contained; it names missing parts."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.tiny import CONFIG
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from gndet.cli.main import main
from gndet.config.loading import load_config, with_overrides
from gndet.config.model import ModelConfig
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.reading import read_dataset
from gndet.errors import DataError
from gndet.toolbox.analysis.errors import TITLES
from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.mistakes import ADVICE, advice
from gndet.toolbox.report.overview import run_verdict
from gndet.toolbox.report.record import _read, read_run
from gndet.toolbox.report.report import write_report
from gndet.toolbox.report.setup import next_commands
from gndet.train import train
from gndet.training.run_folder import HEAD

pytestmark = pytest.mark.usefixtures("thin")
SECTIONS = ("summary", "training", "quality", "errors", "pictures", "norms", "data", "batches", "setup")
FIGURES = (
    "chart-loss", "chart-ap", "chart-lr", "chart-speed", "chart-wait", "chart-memory", "chart-pr", "chart-f1",
    "chart-confusion", "chart-errors", "chart-per-image", "chart-sizes", "chart-aspects",
)  # fmt: skip


class Page(HTMLParser):
    """The content of a page: its ids, the addresses it refers to, its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += [" ".join(data.split())] if data.strip() else []


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    path = tmp_path_factory.mktemp("report") / "tiny.yaml"
    tree = CONFIG | {"train": CONFIG["train"] | {"report": True, "eval_every": 2, "vis_images": 1}, "device": "cpu"}
    tree["model"] = tree["model"] | {"box_head": tree["model"]["box_head"] | {"score_threshold": 0.0}}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """Train a run of six updates, which learns little."""
    assert main(["train", str(config), f"out={config.parent / 'run'}"]) == 0
    return config.parent / "run"


def test_a_run_ends_with_a_whole_report(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert [id for id in page.ids if id in SECTIONS] == list(SECTIONS)
    assert set(FIGURES) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "Finished: 6 updates" in page.text and "Missing here" not in page.text


def test_a_report_refers_to_nothing_outside_itself(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert {address.partition(":")[0] for address in page.addresses if not address.startswith("#")} == {"data"}
    targets = {address[1:] for address in page.addresses if address.startswith("#")}
    assert targets <= set(page.ids)
    text = (finished / "report.html").read_text()
    assert "default-src 'none'" in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(page.ids)


def test_the_same_folder_gives_the_same_page(finished: Path, tmp_path: Path) -> None:
    first, second = (write_report([finished], tmp_path / name, [], str).read_text() for name in ("a.html", "b.html"))
    assert first == second


def test_names_from_data_are_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    html = blocks.sortable_table("t", [evil], [[evil]], evil, picks=[f"class:{evil}"]) + blocks.notice("warn", evil)
    html += blocks.gallery(
        "g", [blocks.GalleryPicture(np.zeros((4, 4, 3), np.uint8), evil, (evil,))], filters=[(evil, evil)]
    )
    html += (
        charts.bars("b", [evil], [1.0], evil, x_label=evil)
        + blocks.preformatted(evil)
        + blocks.headline([(evil, evil)])
    )
    assert "<img src=x" not in html and "alert(1)>" not in html
    assert blocks.escape("\udcff") == "?"


def test_a_failed_run_says_why_until_it_goes_on(config: Path) -> None:
    out = config.parent / "failed"
    options = [f"out={out}", "train.optimizer.lr=1e30", "train.schedule.warmup=0", "train.checkpoint_every=1"]
    assert main(["train", str(config), *options]) == 2
    text = Page(out / "report.html").text
    assert "Failed after" in text and "not finite" in text and "continues the run" in text
    assert read_run(out).ending[0] == "failed"
    page = (out / "report.html").read_bytes()
    assert main(["train", str(config), *options, "train.report=false"]) == 2
    assert (out / "FAILED").is_file() and (out / "report.html").read_bytes() == page


def test_a_report_that_cannot_be_made_does_not_hide_how_the_run_ended(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)  # cannot be written to
    (out / "checkpoints").mkdir()
    (out / "config.yaml").write_text(HEAD)  # a run that was stopped before its first checkpoint
    assert main(["train", str(config), f"out={out}", "train.schedule.updates=1"]) == 0
    assert "no report was written" in capsys.readouterr().out
    assert (out / "last").exists() and not (out / "FAILED").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model_final.pth").write_bytes(b"")
    for name, words in (("empty", "it is empty"), ("foreign", "it holds model_final.pth"), ("none", "no such folder")):
        assert main(["report", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "foreign", "model_final.pth"]


def test_an_unfinished_run_is_reported_with_what_it_has(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "config.yaml", out)
    page = Page(write_report([out], None, [], str))
    assert "Unfinished, after 0 of 6 updates" in page.text
    for words in ("curves: nothing was logged", "detections: the run was not evaluated yet", "checkpoints: there"):
        assert f"Missing here: {words}" in page.text
    assert {"summary", "data", "batches", "setup"} <= set(page.ids)


def test_detections_of_other_data_are_reported_and_not_analyzed(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "detections.json").write_text('[{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]')
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"update": 6, "kind"')
    (out / "norms.jsonl").write_text("{broken\n{}\n")
    page = Page(write_report([out], None, [], str))
    assert "norms.jsonl:1: 2 line(s) are left out" in page.text
    assert "1 of 1 detections do not belong to" in page.text and "image_id 5" in page.text
    assert "chart-pr" not in page.ids and "chart-loss" in page.ids


def test_data_that_has_moved_is_found_by_an_override(config: Path, tmp_path: Path) -> None:
    cfg = load_config(config)
    drawn = read_dataset(cfg.data.val, cfg.data)
    (tmp_path / "old" / "pictures").mkdir(parents=True)
    truth = to_coco(drawn)
    for image, record in zip(truth["images"], drawn.records, strict=True):
        Image.fromarray(record.load()).save(tmp_path / "old" / "pictures" / image["file_name"])
    (tmp_path / "old" / "truth.json").write_text(json.dumps(truth, default=float))
    keys = ("kind=coco", "annotations=truth.json", "images=pictures")
    data = [f"data.{which}.{key}" for which in ("train", "val") for key in keys]
    out = tmp_path / "run"
    train(load_config(config, [f"out={out}", f"data.root={tmp_path / 'old'}", "train.schedule.updates=1", *data]))
    (tmp_path / "old").rename(tmp_path / "new")
    page = Page(write_report([out], None, [], str))
    assert "if the data has moved, set data.root=PATH" in page.text and "chart-pr" not in page.ids
    page = Page(write_report([out], None, [f"data.root={tmp_path / 'new'}"], str))
    assert "Missing here" not in page.text and "chart-pr" in page.ids


def test_runs_are_compared_with_intervals(finished: Path, config: Path, tmp_path: Path) -> None:
    other = config.parent / "other"
    train(load_config(config, [f"out={other}", "seed=5", "train.report=false"]))
    page = Page(write_report([finished, other], tmp_path / "both.html", [], str))
    assert {"runs", "chart-loss", "chart-box-ap", "table-classes", "differences"} <= set(page.ids)
    assert "seed" in page.text and re.search(
        r"do not differ by more than these images can tell|is better than", page.text
    )
    with pytest.raises(DataError, match="not a run folder"):
        write_report([finished, tmp_path], None, [], str)


def test_the_verdict_says_what_the_numbers_show(finished: Path) -> None:
    run = read_run(finished)
    lines = [
        {"update": 2, "kind": "evaluation", "box/AP": 0.3}, {"update": 4, "kind": "evaluation", "box/AP": 0.5},
        {"update": 6, "kind": "evaluation", "box/AP": 0.4},
    ]  # fmt: skip
    waiting = [{"update": u, "kind": "train", "data_wait": 0.5} for u in (1, 2, 3)]

    def said(**changes: object) -> str:
        return " ".join(words for _, words in run_verdict(run._replace(**changes)))

    assert "was best after 4 updates (50.0) and has fallen to 40.0" in said(evaluations=lines)
    assert "was still rising at the end, from 30.0 to 50.0" in said(evaluations=lines[:2])
    assert "Data-bound: waiting for data took 50 %" in said(train=waiting) and "Data-bound" not in said(train=[])
    bn = with_overrides(run.cfg, ["model.norm.kind=bn"], "test")
    assert "bn takes its statistics over 1 image(s) at once" in said(cfg=bn)
    ranks = {"images_at_once": 2, "processes": 8}
    synced = with_overrides(run.cfg, ["model.norm.kind=sync_bn"], "test")
    assert "bn takes its statistics over 2 image(s) at once" in said(cfg=bn, meta=run.meta | ranks)
    assert "takes its statistics" not in said(cfg=synced, meta=run.meta | ranks)
    only_masks = with_overrides(run.cfg, ["model.mask_head.norm.kind=bn", "model.masks=false"], "test")
    assert "takes its statistics" not in said(cfg=only_masks)  # a part that the model lacks


def test_the_commands_are_typed_as_they_stand(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "my run", symlinks=True)
    again, evaluate, *_ = next_commands(read_run(folder))
    words = shlex.split(again, comments=True)
    assert words == ["gndet", "train", str(folder / "config.yaml"), f"out={folder}-again"]
    assert shlex.split(evaluate) == ["gndet", "evaluate", str(folder)]


@pytest.mark.parametrize(
    ("detector", "head", "anchors"), [("mask_rcnn", "box_head", "rpn"), ("fcos", "dense", "dense")]
)
def test_advice_names_the_options_of_the_model(detector: str, head: str, anchors: str) -> None:
    model = ModelConfig.model_validate({"detector": detector, "masks": False})
    words = {kind: advice(kind, model) for kind in ADVICE}
    assert f"lower model.{head}.nms_threshold" in words["Dupe"] and f"model.{anchors}.anchor_sizes" in words["Miss"]
    assert not any("{" in text for text in words.values())


def test_the_verdict_names_the_option_against_the_costliest_mistake(finished: Path) -> None:
    run = read_run(finished)
    assert run.analysis is not None
    errors = run.analysis.errors._replace(delta_ap={kind: 0.5 * (kind == "Dupe") for kind in TITLES})
    words = " ".join(text for _, text in run_verdict(run._replace(analysis=run.analysis._replace(errors=errors))))
    assert "lower model.box_head.nms_threshold" in words and "{" not in words


def test_tensorboard_shows_the_same_pictures_and_curves(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/0", "val/0"} <= set(tags["images"])
    assert {"train/loss", "val/box/AP"} <= set(tags["scalars"])
    run = read_run(finished)
    assert run.analysis is not None and run.analysis.kind == "mask"
    name = run.analysis.matches.classes[0]
    curve = events.Tensors(f"val/mask {name}")[-1]
    rows = make_ndarray(curve.tensor_proto)  # (6, 101): counts, precision, recall
    np.testing.assert_allclose(rows[4][::-1], run.analysis.metrics.precision[0, :, 0], rtol=1e-6)
    np.testing.assert_allclose(rows[5][::-1], np.linspace(0, 1, 101), rtol=1e-6, atol=1e-7)
    assert curve.step == 6


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> object:
    playwright = pytest.importorskip("playwright.sync_api")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_all_of_it(browser: object, finished: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong, requests = [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    address = f"file://{finished / 'report.html'}"
    page.set_default_timeout(300_000)  # milliseconds
    page.goto(address)
    page.wait_for_function("[...document.images].every((image) => !image.src || image.complete)")
    assert wrong == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    sizes = page.eval_on_selector_all("figure.chart svg", "all => all.map((svg) => svg.getBoundingClientRect().height)")
    assert len(sizes) >= len(FIGURES) and min(sizes) > 60
    shown = page.eval_on_selector_all(".pictures img", "all => all.map((image) => image.naturalWidth)")
    assert len(shown) >= 4 and min(shown) > 0
    ink = page.evaluate("getComputedStyle(document.querySelector('figure.chart svg text')).fill")
    assert ink == ("rgb(28, 35, 48)" if scheme == "light" else "rgb(230, 233, 238)")
    page.close()


def test_tables_sort_and_filter_and_rows_show_their_pictures(browser: object, finished: Path) -> None:
    page = browser.new_page()
    page.goto(f"file://{finished / 'report.html'}")

    def column(number: int) -> list[str]:
        return page.eval_on_selector_all(
            f"#table-classes tbody td:nth-child({number})", "all => all.map((c) => c.textContent)"
        )

    head = page.locator("#table-classes th button")
    head.nth(0).click()
    assert column(1) == sorted(column(1))
    head.nth(2).click()
    counts = [int(text.replace(",", "")) for text in column(3)]
    assert counts == sorted(counts, reverse=True)
    head.nth(2).click()
    assert [int(text.replace(",", "")) for text in column(3)] == counts[::-1]

    field = page.locator("#norms input.filter").first
    field.fill("backbone.stem")
    rows = page.locator("#norms tbody tr").filter(visible=True)
    assert rows.count() >= 1 and all("backbone.stem" in text for text in rows.all_inner_texts())

    page.locator("#table-classes tr.pick").first.click()
    tag = page.locator("#table-classes tr.pick").first.get_attribute("data-pick")
    figures = page.locator("#val-pictures figure")
    seen = [
        figures.nth(i).get_attribute("data-tags").split() for i in range(figures.count()) if figures.nth(i).is_visible()
    ]
    assert all(tag in tags for tags in seen)
    page.locator("#val-pictures .filters button").first.click()
    assert page.locator("#val-pictures figure").filter(visible=True).count() == figures.count()
    page.locator("#val-pictures img").first.click()
    assert page.locator("dialog[open] img").get_attribute("src").startswith("data:image/jpeg")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.close()


def test_a_file_that_cannot_be_read_is_noted_as_missing(tmp_path: Path) -> None:
    missing: list[str] = []
    assert _read("curves", missing, Path.read_text, tmp_path) is None
    assert len(missing) == 1 and missing[0].startswith("curves: ") and str(tmp_path) in missing[0]
