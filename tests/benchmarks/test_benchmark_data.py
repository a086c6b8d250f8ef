"""The benchmarks of data and evaluation: all subjects do the same work, and the adapters for harnesses work."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

from benchmarks import evaluation, loader, start
from benchmarks.options import evaluation as evaluation_options
from benchmarks.options import loader as loader_options
from benchmarks.options import start as start_options
from gndet.errors import ConfigError, DataError, MachineError


def options(add: object, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(arguments)


def adapter(name: str) -> ModuleType:
    """Load a file of benchmarks/ as a harness does."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return loader.draw(tmp_path_factory.mktemp("drawn"), 3)


def test_drawn_pictures_are_a_coco_data_set_that_both_sides_read(drawn: tuple[Path, Path]) -> None:
    tree = json.loads(drawn[0].read_text())
    assert [image["file_name"] for image in tree["images"]] == sorted(path.name for path in drawn[1].iterdir())
    for image in tree["images"]:
        with Image.open(drawn[1] / image["file_name"]) as picture:
            assert picture.size[::-1] == (image["height"], image["width"]) == loader.SIZE
    for subject in (loader.gndet_subject, loader.torchvision_subject):
        assert subject(*drawn, 96, 160)() == {}


def test_the_adapter_that_opens_a_file_gives_its_data_set(drawn: tuple[Path, Path]) -> None:
    assert len(adapter("peer_start").load(str(drawn[0])).records) == 3


def test_half_a_data_set_is_refused(drawn: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="--annotations and --pictures go together"):
        loader.run(options(loader_options, "--annotations", str(drawn[0])), print)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    missing, broken = tmp_path / "none.json", tmp_path / "broken.json"
    broken.write_text("no JSON")
    with pytest.raises(ConfigError, match=r"--annotations: .*none\.json: no such file, expected COCO's JSON"):
        start.run(options(start_options, "--annotations", str(missing)), print)
    with pytest.raises(MachineError, match=r"(?s)^gndet, first failed:\n.*broken\.json.*not a JSON file") as told:
        start.run(argparse.Namespace(annotations=broken, rounds=1, threads=1), print)
    assert "Traceback" not in str(told.value)
    with pytest.raises(DataError, match=r"none\.json: cannot read the annotation file"):
        loader.run(options(loader_options, "--annotations", str(missing), "--pictures", str(tmp_path)), print)


def test_all_evaluators_find_the_same_precision(tmp_path: Path) -> None:
    files = evaluation.write(tmp_path, 40, 30)
    gndet = evaluation.gndet_subject(*files)()
    assert 0.05 < gndet["mask AP"] < gndet["box AP"] < 0.95
    for engine in evaluation.LISTED:
        listed = evaluation.listed_subject(engine, *files)()
        assert [listed[fact] for fact in evaluation.FACTS] == [gndet[fact] for fact in evaluation.FACTS]
        assert listed.keys() == gndet.keys() >= set(evaluation.STAGES)


def test_detections_are_as_many_as_asked_for() -> None:
    asked = options(evaluation_options, "--num", "7", "--detections", "11")
    truth, found = evaluation.detected(asked.num, asked.detections)
    assert len(truth["images"]) == 7 and len(found) == 77
    assert {row["image_id"] for row in found} == {image["id"] for image in truth["images"]}


def test_the_loaders_adapter_gives_one_batch_per_image(drawn: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_made.json").symlink_to(drawn[0])
    (tmp_path / "made").symlink_to(drawn[1])
    num, get = adapter("peer_loader").build(str(tmp_path), "made")
    batch = get(1)
    assert num == 3 and batch.sizes.tolist() == [[800, 1067]] and batch.gt.valid.sum() == 8
    assert torch.equal(get(1).images, batch.images)


def test_the_evaluators_adapter_gives_pycocotools_numbers(tmp_path: Path) -> None:
    files = evaluation.write(tmp_path, 20, 30)
    stats, times = adapter("peer_evaluation").evaluate(*map(str, files), ["bbox", "segm"])
    expected = evaluation.listed_subject("pycocotools", *files)()
    assert [stats["bbox"][0], stats["segm"][0]] == [expected["box AP"], expected["mask AP"]]
    assert [len(numbers) for numbers in stats.values()] == [12, 12] and all(np.array(list(times.values())) >= 0)


def test_scoring_needs_no_torch() -> None:
    source = "import sys, gndet.evaluation.coco_metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], cwd=REPOSITORY).returncode == 0
