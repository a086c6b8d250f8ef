"""Drawing takes the memory of a few pictures, whatever the number of masks: they are decoded one at a time."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gndet.data.batches.batch import collate
from gndet.data.batches.stream import Loaded
from gndet.data.batches.transforms import Sample
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import MASK_SIDE, Dataset, Record
from gndet.evaluation.drawing import MASK_OPACITY, color, draw_ground_truth
from gndet.evaluation.prediction import Prediction
from gndet.evaluation.results import Results, from_coco
from gndet.toolbox.analysis.analysis import make_analysis
from gndet.toolbox.check.pictures import contact_sheet
from gndet.toolbox.report.mistakes import draw_pair
from gndet.train import show_batches
from gndet.training import validation
from gndet.training.log import Log

SIDE, COUNT, EDGE = 3000, 300, 120  # decoded at once, the masks would take 2.7 GB
ROOM = 400 << 20  # bytes beside what the process has; a picture with its copies takes up to 200 MB


def picture() -> np.ndarray:
    return np.zeros((SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A picture with COUNT squares, outlined by polygons and RLEs in turn."""
    corners = np.random.default_rng(0).integers(0, SIDE - EDGE, (COUNT, 2))
    boxes = np.hstack((corners, corners + EDGE)).astype(np.float64)
    masks: list[Any] = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    masks[::2] = [to_rle(mask, (SIDE, SIDE)) for mask in masks[::2]]
    zeros = np.zeros(COUNT, dtype=np.int64)
    record = Record(1, "a.png", (SIDE, SIDE), picture, boxes, zeros, zeros > 0, zeros + EDGE**2, zeros + 1, masks)
    return Dataset("made up", ("cup",), (1,), [record._replace(annotation_ids=np.arange(1, COUNT + 1))])


@pytest.fixture(scope="module")
def results(dataset: Dataset) -> Results:
    """Detect every square."""
    codes = [to_rle(mask, (SIDE, SIDE))["counts"].decode() for mask in dataset.records[0].segmentations]
    boxes = (dataset.records[0].boxes - np.tile(dataset.records[0].boxes[:, :2], 2) * [0, 0, 1, 1]).tolist()
    return from_coco([
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9,
         "segmentation": {"size": [SIDE, SIDE], "counts": code}}
        for box, code in zip(boxes, codes, strict=True)
    ])  # fmt: skip


@contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Let the process grow by `room` bytes only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_drawn(drawn: np.ndarray) -> bool:
    """Return whether masks are there: their tint, and their outlines."""
    tint = (np.array(color(0)) * MASK_OPACITY).round()
    return all((drawn[::3, ::3] == shade).all(-1).sum() > 1000 for shade in (tint, color(0)))


def test_pictures_of_predictions_and_of_ground_truth_take_little(dataset: Dataset, results: Results) -> None:
    record = dataset.records[0]
    with little_memory():
        assert is_drawn(draw_ground_truth(picture(), record, dataset.classes))
        assert is_drawn(np.asarray(Prediction((SIDE, SIDE), ("cup",), (1,), None, results, picture).draw()))


def test_contact_sheets_and_pages_take_little(dataset: Dataset, results: Results) -> None:
    found = make_analysis(dataset, results, kind="mask", max_detections=COUNT)
    with little_memory():
        sheet = contact_sheet([("val", dataset)])
        assert sheet is not None and is_drawn(sheet)
        assert is_drawn(draw_pair(dataset.records[0], found, 0, results, dataset))


def test_pictures_during_training_take_little(dataset: Dataset, results: Results, tmp_path: Path) -> None:
    record = dataset.records[0]
    masks = torch.ones(COUNT, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    image = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).permute(2, 0, 1)
    sample = Sample(image, torch.from_numpy(record.boxes).float(), torch.zeros(COUNT, dtype=torch.int64), masks, 0)
    run: Any = SimpleNamespace(val_set=dataset, out=tmp_path, cfg=SimpleNamespace(train=SimpleNamespace(vis_images=4)))
    evaluation: Any = SimpleNamespace(results=results)
    console = Console(record=True, width=200)
    with Log(tmp_path, total_updates=1, console=console) as log, little_memory():
        assert is_drawn(validation.draw(Loaded(collate([sample], 1), (1,), ()), 0, dataset.classes))
        validation.show_examples(run, 1, log, evaluation)
    assert "could not" not in console.export_text() and (tmp_path / "predictions.png").is_file()


def test_a_drawing_that_fails_is_told_and_ends_nothing(dataset: Dataset, results: Results, tmp_path: Path) -> None:
    good = dataset.records[0]
    records = [good._replace(image_id=2, boxes=np.zeros((1, 7))), good._replace(size=(0, 0)), good]
    broken = dataset._replace(records=records, classes=())
    run: Any = SimpleNamespace(val_set=broken, out=tmp_path, cfg=SimpleNamespace(train=SimpleNamespace(vis_images=9)))
    run.train_set = broken
    console = Console(record=True, width=200)
    with Log(tmp_path, total_updates=1, console=console) as log:
        validation.show_examples(run, 1, log, SimpleNamespace(results=results))  # type: ignore[arg-type]
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        sample = Sample(image, torch.zeros(1, 4), torch.ones(1, dtype=torch.int64), torch.zeros(1, 0, 0).bool(), 0)
        show_batches(run, [Loaded(collate([sample], 1), (1,), ())], log)  # its class has no name
    text = console.export_text()
    assert text.count("the run goes on without it") == 4
    assert "could not draw image 2 (" in text and "could not draw train/0 (IndexError: " in text
