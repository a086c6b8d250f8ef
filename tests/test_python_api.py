"""`import gndet`, `gndet.load`, `gndet.train`: quick to import, the same as the command line, clear about mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from faults.tiny import CONFIG
from PIL import Image

import gndet
from gndet.cli.main import main
from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.loading import load_config, override_words
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.shapes import draw_image
from gndet.errors import CheckpointError, ConfigError, DataError, TrainingError

pytestmark = pytest.mark.usefixtures("thin")
LOW = {"box_head": {"score_threshold": 0.01}}  # an untrained detector is sure of nothing


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "tiny.yaml"


def imported(code: str) -> set[str]:
    """Run code in a new interpreter.  Returns the modules that it imports."""
    code = f"import sys; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    return set(done.stdout.split())


# --- the package


def test_importing_gndet_imports_nothing_large() -> None:
    names = imported("import gndet")
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} == {"gndet"}
    assert len(names) < 40


def test_the_command_line_imports_no_torch_for_its_help() -> None:
    names = imported("import gndet.cli.main as m; m.parser().format_help()")
    assert not names & {"torch", "numpy", "pydantic", "yaml", "PIL"}


def test_the_names_of_the_package_are_what_they_say() -> None:
    assert {"load", "train", "Detector", "Prediction", "__version__"} <= set(dir(gndet))
    assert gndet.load.__module__ == "gndet.evaluation.detector" and gndet.Prediction.__name__ == "Prediction"
    with pytest.raises(
        AttributeError, match=r"no attribute 'lod'; it has ClassPrediction, Detector, .*load, load_classifier, train"
    ):
        gndet.lod  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import gndet.train as module; import gndet; assert module is gndet.train and callable(module.train)",
        "from gndet import train as call, load; from gndet.train import train; assert call.train is train",
    ],
)
def test_gndet_train_is_a_module_and_a_call_in_any_order(code: str) -> None:
    assert "torch" in imported(code)


# --- training


def test_training_from_python_is_training_from_the_command_line(config: Path, capfd: pytest.CaptureFixture) -> None:
    run = gndet.train(config, progress=False, out="runs/a", **{"train.schedule.updates": 2}, train={"log_every": 2})
    assert capfd.readouterr() == ("", "")
    assert main(["train", str(config), "out=runs/b", "train.schedule.updates=2", "train.log_every=2"]) == 0
    values = [json.loads(line) for line in Path("runs/b/metrics.jsonl").read_text().splitlines()]
    assert run.folder == Path("runs/a") and run.report is None  # train.report: false
    evaluated = {key: value for key, value in values[-1].items() if key in run.metrics and value is not None}
    assert evaluated == {key: run.metrics[key] for key in evaluated} and "box/AP" in evaluated
    assert run.load().classes == gndet.load("runs/b", "cpu").classes == ("disc", "box", "triangle", "star")
    with pytest.raises(TrainingError, match="finished"):
        gndet.train(config, progress=False, out="runs/a", **{"train.schedule.updates": 2}, train={"log_every": 2})


def test_progress_is_shown_and_a_report_written_unless_declined(config: Path, capfd: pytest.CaptureFixture) -> None:
    run = gndet.train(load_config(config), out="runs/a", train={"schedule": {"updates": 1}, "report": True})
    assert "finished" in capfd.readouterr().out
    assert run.report == Path("runs/a/report.html") and run.report.is_file()


def test_overrides_from_python_are_those_of_the_command_line(config: Path) -> None:
    nested = {"train": {"optimizer": {"lr": 1e-5}, "schedule": {"steps": (3, 4)}}, "data": {"root": Path("a b")}}
    dotted = {"train.optimizer.lr": 1e-5, "train.schedule.steps": [3, 4], "data.root": "a b", "out": "runs/x y: z"}
    one = load_config(config, override_words(nested | {"out": "runs/x y: z"}))
    assert one == load_config(config, override_words(dotted))
    assert one.train.optimizer.lr == 1e-5 and one.out == "runs/x y: z" and one.data.root == "a b"
    assert load_config(config, override_words({"data.classes": None, "deterministic": True})).deterministic
    with pytest.raises(ConfigError, match=r"train\.batch: got .*object.*, expected a value that YAML holds"):
        override_words({"train.batch": object()})
    with pytest.raises(ConfigError, match=r"unknown key train\.shedule; did you mean 'schedule'"):
        gndet.train(config, train={"shedule": {"updates": 3}})
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        gndet.train("quickstar")


# --- a trained detector


def test_a_run_and_its_checkpoints_are_loaded(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained.parent))
    picture = draw_image(seed=3, index=0, size=64)
    expected = gndet.load(trained, model=LOW).predict(picture, 0.0)
    for path in (str(trained), trained / "last", "~/out"):
        detector = gndet.load(path, model=LOW)
        assert detector.classes == ("disc", "box", "triangle", "star") and len(detector.category_ids) == 4
        assert detector.config.model.box_head.score_threshold == 0.01 and not detector.model.training
        assert detector.predict(picture, 0.0).boxes.tolist() == expected.boxes.tolist() != []


def test_what_cannot_be_loaded_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: neither a gndet checkpoint .* nor a run folder.*no such"):
        gndet.load(tmp_path / "nowhere")
    (tmp_path / "a.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"a\.pth: .*it is a file; .*gndet convert"):
        gndet.load(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"meta\.json: .*a file of the checkpoint .*update-\d+; name this folder"):
        gndet.load(next((trained / "checkpoints").iterdir()) / "meta.json")
    with pytest.raises(CheckpointError, match=r"nothing: .*there is no such folder"):
        gndet.load(next((trained / "checkpoints").iterdir()) / "nothing")
    with pytest.raises(ConfigError, match="device: got 'tpu', expected auto, cpu or cuda"):
        gndet.load(trained, "tpu")
    with pytest.raises(ConfigError, match=r"unknown key model\.norms"):
        gndet.load(trained, model={"norms": 1})


def test_evaluation_from_python_is_that_of_the_command_line(
    trained: Path, config: Path, capsys: pytest.CaptureFixture
) -> None:
    detector = gndet.load(trained)
    scores = detector.evaluate()
    assert main(["evaluate", str(trained)]) == 0
    assert str(scores) in capsys.readouterr().out
    assert scores["box/AP"] == scores.evaluation.box.summary["AP"] and "mask/AP" in scores
    assert scores.per_class["disc"]["mask/AP50"] == scores.evaluation.mask.per_class[0]["AP50"]
    other = config.with_name("other.yaml")
    other.write_text("base: tiny.yaml\ndata: {val: {count: 5, seed: 9}, shortest_edge_test: 32}")
    assert main(["evaluate", str(trained), "data.val.count=5", "data.val.seed=9"]) == 0
    assert str(detector.evaluate(other)) == str(detector.evaluate(load_config(other)))
    assert str(detector.evaluate(str(other))) in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot read the config"):
        detector.evaluate("missing.yaml")


@pytest.mark.parametrize("layout", ["_annotations.coco.json", "valid/_annotations.coco.json"])
def test_evaluation_takes_a_folder_of_data_and_an_annotation_file(trained: Path, tmp_path: Path, layout: str) -> None:
    detector, file = gndet.load(trained, model=LOW), tmp_path / layout
    dataset = read_dataset(DatasetConfig(kind="shapes", count=4, size=64, seed=9), DataConfig())
    file.parent.mkdir(exist_ok=True)
    for record in dataset.records:
        Image.fromarray(record.load()).save(file.parent / f"{record.image_id}.png")
    records = [record._replace(file_name=f"{record.image_id}.png") for record in dataset.records]
    file.write_text(json.dumps(to_coco(dataset._replace(records=records))))
    config = load_config("quickstart", override_words({"data": {"val": {"count": 4, "size": 64, "seed": 9}}}))
    expected = detector.evaluate(config)
    assert str(detector.evaluate(tmp_path)) == str(detector.evaluate(str(file))) == str(expected)
    assert expected.evaluation.box.summary["AR"] > 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=str(tmp_path)):
        detector.evaluate(tmp_path / "empty")
    with pytest.raises(DataError, match=r"missing\.json: cannot read the annotation file: No such file"):
        detector.evaluate(tmp_path / "missing.json")
    copy = tmp_path / "empty"
    assert main(["convert-data", str(file), str(copy), "--to", "yolo"]) == 0
    assert str(detector.evaluate(copy / "data.yaml")) == str(detector.evaluate(copy))
