"""The day of the GPU on a CPU: a part loses itself alone, the packed data is the same, the page has the day's rows."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from pages import commands
from PIL import Image
from run_files import wait_for

from benchmarks.gpu_day.__main__ import main, parser
from benchmarks.gpu_day.day import PARTS, WAVES, Part, missing_wheels, run_day
from benchmarks.gpu_day.prepare import pack
from benchmarks.gpu_day.table import NOT_RUN, ROWS, figure_of, markdown, text_of

PAGE = REPOSITORY / "docs" / "performance.md"
STEP = {
    "ms": 50.0,
    "least ms": 49.0,
    "images/s": 20.0,
    "peak MiB": 1000.0,
    "first step's peak MiB": 1200.0,
    "loss": 4.0,
}
SLOWER = {**STEP, "ms": 100.0, "images/s": 10.0, "peak MiB": 4000.0}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the orchestrator


def test_a_part_that_fails_or_hangs_loses_itself_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"complete": 60.0, "without": 60.0, "dies": 60.0, "hangs": 6.0}
    names = ("complete_part", "part_without_a_figure", "dying_part", "hanging_part")
    first, *others = (
        Part(name, f"subjects:{function}", limit) for (name, limit), function in zip(kinds.items(), names, strict=True)
    )
    late = Part("late", "subjects:complete_part", 60.0)
    assert run_day([], tmp_path / "out", tmp_path / "none", 300.0, waves=[others, [first]]) == 1
    day = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert {name: part.get("found") for name, part in day["parts"].items()} == {
        "complete": 1, "without": 2, "dies": 3, "hangs": None,
    }  # fmt: skip
    assert set(day["failed"]) == {"without", "dies", "hangs"} and set(day["seconds"]) == set(kinds)
    assert day["parts"]["without"]["broken FAILED"] == "ValueError: no such thing"
    assert day["failed"]["dies"].startswith("status -9: ") and day["failed"]["hangs"].startswith("out of time: ")
    wait_for(lambda: not is_running(day["parts"]["hangs"]["child"]))  # what a part starts ends with it
    text = (tmp_path / "out" / "gpu_day.txt").read_text()
    assert "FAILED hangs: out of time" in text and text in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as packed:
        assert {f"logs/{name}.log" for name in kinds} < set(packed.getnames())
    assert run_day(["late"], tmp_path / "out", tmp_path / "none", 1.0, waves=[[first, late]]) == 1  # no time at all
    day = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert day["failed"] == {"late": "not started: no time left"}


def test_parts_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "run", "facts", "operators", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"GPU_DAY_CPU": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "gpu_day.json").read_text())["parts"]
    assert parts["facts"]["card"] == "CPU" and parts["facts"]["copy GB/s"] > 0
    compared = [found for name, found in parts["operators"].items() if re.fullmatch(r"NMS, [a-z ]+, batch \d", name)]
    assert len(compared) == 6 and all(found["differ"] == 0 and found["the same twice"] for found in compared)
    assert all(parts["operators"][f"RoIAlign, {head} head"]["backward error"] < 1e-2 for head in ("box", "mask"))


def test_every_part_of_the_day_is_a_function() -> None:
    assert len(PARTS) == len(set(PARTS)) == 17
    for part in (part for wave in WAVES for part in wave):
        module, _, function = part.function.partition(":")
        assert function == part.name and callable(getattr(importlib.import_module(module), function))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no such part: stepz; there are facts, doctor, "):
        main(["run", "stepz"])


def test_the_orchestrator_needs_only_python_s_library() -> None:
    code = (
        "import sys; import benchmarks.gpu_day.__main__; "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'gndet', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


# --- what travels


def test_a_packed_data_set_has_the_same_pixels_and_annotations(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "annotations").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (source / part).mkdir()
        Image.fromarray(pixels).save(source / part / "a.png")
        Image.fromarray(pixels).save(source / part / "b.jpg")
        images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.jpg"}]
        tree = {"images": images, "annotations": [{"id": 1, "image_id": 1}]}
        (source / "annotations" / f"instances_{part}.json").write_text(json.dumps(tree))
    pack(source, tmp_path / "packed")
    for part in ("train", "val"):
        found = json.loads((tmp_path / "packed" / "annotations" / f"instances_{part}.json").read_text())
        assert [image["file_name"] for image in found["images"]] == ["a.webp", "b.jpg"]
        assert found["annotations"] == tree["annotations"]
        assert (np.array(Image.open(tmp_path / "packed" / part / "a.webp")) == pixels).all()
        assert (tmp_path / "packed" / part / "b.jpg").read_bytes() == (source / part / "b.jpg").read_bytes()


def test_only_packages_that_are_missing_are_installed(tmp_path: Path) -> None:
    for name in ("numpy-2.5.0-cp312-none-any.whl", "no_such_package-1.0-py3-none-any.whl", "pydantic_core-2.0-x.whl"):
        (tmp_path / name).touch()
    assert [wheel.name for wheel in missing_wheels(tmp_path)] == ["no_such_package-1.0-py3-none-any.whl"]
    assert missing_wheels(tmp_path / "none") == []


# --- the table


def test_figures_stand_beside_their_goals() -> None:
    steps = {
        "gndet lean, batch 1, bf16": STEP, "gndet balanced, batch 1, bf16": STEP, "torchvision, batch 1, bf16": SLOWER,
        "gndet balanced, batch 2, bf16": STEP, "torchvision, batch 2, bf16": {**SLOWER, "images/s": 19.0},
    }  # fmt: skip
    parts = {"steps": {"steps": steps, "ratios": {}}, "invariance": {"passed": False, "worst": {"float64": [1e-3]}}}
    found = {row.name: figure_of(row, parts) for row in ROWS}
    assert found["images/s, batch 1, bf16"] == ("20.0, torchvision 10.0 (2.00x)", True)
    assert found["images/s, batch 2, bf16"] == ("20.0, torchvision 19.0 (1.05x)", False)
    assert found["peak, batch 1, bf16, `lean`: a card of 4 GB"] == ("1.17 GiB", True)
    assert found["peak, batch 1, bf16, `fast` / `balanced` / `lean`"][0].startswith("1,000 / 1,000 MiB, torchvision")
    assert found["`gndet invariance`"] == ("failed, largest 1e-03", False)
    assert found["NMS"] == (NOT_RUN, None)
    text = text_of({"cpu": False, "seconds": {}, "failed": {"micro": "1: why"}, "parts": parts})
    assert "MISSED" in text and "reached" in text and "FAILED micro: 1: why" in text


def test_the_page_has_the_rows_of_the_day() -> None:
    expected = [line.split("|")[1:3] for line in markdown({"parts": {}}, "").splitlines()]
    table = PAGE.read_text().split("## On a GPU")[1].split("| figure |")[1].split("\n\n")[0]
    assert [line.split("|")[1:3] for line in f"| figure |{table}".splitlines()] == expected


def test_the_commands_of_the_page_are_those_of_the_day() -> None:
    found = [command for command in commands(PAGE) if "benchmarks.gpu_day" in command]
    assert len(found) >= 2
    for command in found:
        options = parser().parse_args(command.partition("#")[0].partition("gpu_day ")[2].split())
        assert isinstance(options, argparse.Namespace) and options.command in ("prepare", "run")


def test_syncs_are_counted_by_place() -> None:
    from benchmarks.gpu_day.steps import counted_syncs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.gpu_day.steps.CPU", True)
        with counted_syncs() as places:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert places.total() == 3 and [place.rpartition(":")[0] for place in places] == ["benchmarks/test_gpu_day.py"]
