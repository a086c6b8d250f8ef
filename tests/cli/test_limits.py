"""A command that reaches a limit of the machine ends with one line that names it and the remedy, and no traceback.

Limits are real, and set in a process of their own.
"""

import resource
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from limits import Ended, gndet, limit, little_memory
from PIL import Image

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 1500 x 2000 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png"):
        coarse = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((2000, 1500)).save(folder / name)
    return folder


def assert_one_line(ended: Ended, verb: str, *words: str) -> None:
    """Check that a command failed with a line that holds all the words."""
    assert ended.status == 2 and "Traceback" not in ended.text, ended.text
    assert ended.last.startswith(f"gndet {verb}: ") and all(word in ended.last for word in words), ended.text


ENGINE = "evaluation.engine=pycocotools"
LARGE = ["data.shortest_edge_test=1200", "data.max_edge=2000"]


@pytest.mark.parametrize("mib", [30, 50])
def test_memory_that_runs_out_names_the_options_that_lower_it(
    trained: Path, folder: Path, tmp_path: Path, mib: float
) -> None:
    import_module("gndet.toolbox.onnx.export")  # in this process, where there is memory for it
    words = ["out of memory (", "lower evaluation.images_per_gpu, data.shortest_edge_test or data.workers"]
    predict = ["predict", trained, folder, "--out", tmp_path / "p", *LARGE]
    assert_one_line(gndet(tmp_path, *predict, before=little_memory(mib)), "predict", *words)
    evaluate = ["evaluate", trained, "data.val.count=8", "evaluation.images_per_gpu=8", ENGINE, *LARGE]
    assert_one_line(gndet(tmp_path, *evaluate, before=little_memory(mib)), "evaluate", *words)
    export = ["export", trained, "--onnx", tmp_path / "x.onnx", "--size", "1600x1600"]
    assert_one_line(
        gndet(tmp_path, *export, before=little_memory(mib)), "export", "choose a smaller data.shortest_edge_test"
    )
    assert not (tmp_path / "x.onnx").exists()


def test_memory_that_runs_out_in_a_loader_process_names_the_remedy(trained: Path, folder: Path, tmp_path: Path) -> None:
    words = ["out of memory", "data.workers"]
    predict = ["predict", trained, folder, "--out", tmp_path / "p", *LARGE, "data.workers=2"]
    assert_one_line(gndet(tmp_path, *predict, before=little_memory(30)), "predict", *words)


def test_a_check_is_done_or_says_that_memory_ran_out(trained: Path, tmp_path: Path) -> None:
    check = [
        "check",
        trained / "config.yaml",
        "data.train.size=700",
        "data.train.count=3",
        "--sheet",
        tmp_path / "s.png",
    ]
    for mib in (1, 8):
        ended = gndet(tmp_path, *check, before=little_memory(mib))
        if ended.status != 0:
            assert_one_line(ended, "check", "out of memory (", "end other programs or, with a config, check fewer")


def test_a_full_disk_leaves_nothing_of_a_prediction(trained: Path, folder: Path, tmp_path: Path) -> None:
    predict = ["predict", trained, folder, "--out", tmp_path / "p", "data.workers=0", "data.shortest_edge_test=64"]
    words = ["a.png: cannot write it: File too large"]
    assert_one_line(gndet(tmp_path, *predict, before=limit(resource.RLIMIT_FSIZE, 10_000)), "predict", *words)
    assert not (tmp_path / "p").exists()
