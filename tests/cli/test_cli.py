"""The command line as a user sees it, in separate processes."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gndet.cli.main import main
from gndet.config.loading import load_config
from gndet.errors import ConfigError


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gndet.cli", *words], capture_output=True, text=True)


def test_help_config_and_check_do_not_import_torch() -> None:
    code = "import sys; from gndet.cli.main import main\ntry: main({})\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    quickstart = str(REPOSITORY / "configs/quickstart.yaml")
    for words in (["--help"], ["train", "--help"], ["config", quickstart], ["check", quickstart]):
        done = subprocess.run([sys.executable, "-c", code.format(words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_help_answers_at_once() -> None:
    """The promise is 0.5 s.  CPU time does not depend on other work; an import of torch takes over 2 s."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("verb", ["check", "train", "evaluate", "predict", "invariance", "config"])
def test_tools_are_the_same_verbs(verb: str) -> None:
    tool = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / f"{verb}.py"), "--help"], capture_output=True, text=True
    )
    assert tool.returncode == 0 and tool.stdout == run(verb, "--help").stdout


def test_a_mistake_is_shown_without_a_traceback() -> None:
    done = run("config", str(REPOSITORY / "configs/quickstart.yaml"), "model.norm.knid=gn")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == (
        "gndet config: override 'model.norm.knid=gn': unknown key model.norm.knid; did you mean 'kind'?"
    )


@pytest.mark.parametrize("words", [("Train.global_batch=8",), ("train.global_batch", "8")])
def test_words_that_are_no_override_are_refused(words: tuple[str, ...]) -> None:
    done = run("config", str(REPOSITORY / "configs/quickstart.yaml"), *words)
    assert done.returncode == 2 and f"{' '.join(words)}: expected key=value" in done.stderr


def test_an_empty_override_is_an_empty_text_where_one_is_meant() -> None:
    path = REPOSITORY / "configs/quickstart.yaml"
    assert load_config(path, ["data.cache="]).data.cache == "" == load_config(path, ["data.cache=''"]).data.cache
    assert load_config(path, ["data.classes="]).data.classes is None
    with pytest.raises(ConfigError, match=r"seed: got None"):
        load_config(path, ["seed="])


def test_a_reader_that_closes_the_pipe_is_no_mistake() -> None:
    words = [sys.executable, "-m", "gndet.cli", "check", str(REPOSITORY / "configs/quickstart.yaml")]
    process = subprocess.Popen([*words, "data.train.count=2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_config_prints_what_reads_back(tmp_path: Path) -> None:
    path = REPOSITORY / "configs/quickstart.yaml"
    done = run("config", str(path), "seed=7")
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "resolved.yaml") == load_config(path, ["seed=7"])


def test_evaluate_prints_the_table_and_writes_results(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = trained / "results.json"
    assert (
        main(["evaluate", str(trained), "data.val.count=4", "--out", str(results), "evaluation.engine=pycocotools"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "AP50" in printed and "triangle" in printed and "4 images" in printed
    assert all(
        {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(result)
        for result in json.loads(results.read_text())
    )


def test_evaluate_refuses_other_classes_and_what_is_no_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "data.classes=[disc,box]"]) == 2
    assert "has the classes disc, box; the detector knows disc, box, triangle, star" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_results_that_cannot_be_written_are_reported_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--out", "/proc/nowhere/results.json"]) == 2
    assert "--out /proc/nowhere: cannot make this folder" in capsys.readouterr().err
