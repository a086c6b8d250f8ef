"""Evaluation on any number of ranks, of nearly empty data sets, and with unreadable pictures (T23)."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import ENGINES
from torch import Tensor, nn

from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.schema import Config
from gndet.data.batches.transforms import test_sample as evaluation_sample
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.distributed.process import Process, spawn
from gndet.errors import DataError
from gndet.evaluation import evaluate as evaluation
from gndet.evaluation.coco_metrics import SUMMARY_COLUMNS
from gndet.evaluation.evaluate import Evaluation, detect_share, evaluate, evaluation_table, scalars, score_shares
from gndet.ops.noise import uniform
from gndet.structures import Detections

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin", "forked_ranks")]
CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
SIZES = (1, 2, 3, 5)  # images of a data set


def config(workers: int = 0, **options: Any) -> Config:
    data = DataConfig(workers=workers, shortest_edge_test=64)
    return Config.model_validate({"data": data, "evaluation": {"images_per_gpu": 2, **options}})


def shapes(count: int = 5) -> Dataset:
    dataset = read_dataset(DatasetConfig(kind="shapes", count=5, size=64), DataConfig())
    return dataset._replace(records=dataset.records[:count])


class Finder(nn.Module):
    """A detector that recognizes a picture by its pixels and roughly finds its objects."""

    def __init__(self, dataset: Dataset, finds: bool = True) -> None:
        super().__init__()
        self.finds = finds
        data = config().data
        self.records = {}
        for record in dataset.records:
            with contextlib.suppress(DataError):
                self.records[self.name(evaluation_sample(record, data).image)] = record

    @staticmethod
    def name(image: Tensor) -> str:
        return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()

    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        assert not self.training
        found = [self.records[self.name(image)] for image in images]
        slots = max(1, *(len(record.labels) for record in found))
        boxes, masks = torch.zeros(len(images), slots, 4), torch.zeros(len(images), slots, 28, 28)
        scores, labels = torch.zeros(len(images), slots), torch.zeros(len(images), slots, dtype=torch.int64)
        valid = torch.zeros(len(images), slots, dtype=torch.bool)
        for place, record in enumerate(found):
            for slot, box in enumerate(record.boxes if self.finds else ()):
                noise = [uniform(record.image_id, slot, corner) for corner in range(4)]
                boxes[place, slot] = torch.from_numpy(box + 8 * np.array(noise) - 4)
                scores[place, slot] = uniform(record.image_id, slot)
                labels[place, slot] = int(record.labels[slot])
                masks[place, slot, 3:25, 3:25] = 1
                valid[place, slot] = True
        return Detections(boxes, scores, labels, masks, valid)


def run(dataset: Dataset, proc: Process = ALONE, model: nn.Module | None = None, **options: Any) -> Evaluation:
    callbacks = {name: options.pop(name) for name in ("on_image", "unreadable") if name in options}
    cfg, model = config(**options), model or Finder(dataset)
    if not callbacks:
        return evaluate(model, dataset, cfg, proc, contextlib.nullcontext)
    share = detect_share(model, dataset, cfg, proc, autocast=contextlib.nullcontext, **callbacks)
    return score_shares(share, dataset, cfg, proc)


def unreadable() -> np.ndarray:
    raise DataError("second.png: cannot be read as a picture")


def with_bad_picture(dataset: Dataset) -> Dataset:
    """Make the second image unreadable."""
    records = [*dataset.records]
    records[1] = records[1]._replace(load=unreadable)
    return dataset._replace(records=records)


def with_bad_truth(dataset: Dataset) -> Dataset:
    """Remove annotation ids, a bug that shows only when scoring starts."""
    return dataset._replace(
        records=[record._replace(annotation_ids=record.annotation_ids[:0]) for record in dataset.records]
    )


def error_of(proc: Process, dataset: Dataset) -> list[str]:
    try:
        run(dataset, proc)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def run_rank(proc: Process, folder: str) -> None:
    """Run one rank: evaluate data sets of each size, then failing ones, and write the answers to a file."""
    found: dict[str, Any] = {}
    for size in SIZES:
        for engine in ENGINES:
            seen: list[int] = []
            evaluation = run(shapes(size), proc, engine=engine, on_image=seen.append)
            found[f"{size} {engine}"] = [plain(evaluation), seen]
    found["bad truth"] = error_of(proc, with_bad_truth(shapes()))
    found["bad picture"] = error_of(proc, with_bad_picture(shapes()))
    told: list[Any] = []
    evaluation = run(with_bad_picture(shapes()), proc, unreadable=lambda *about: told.append(about))
    found["passed over"] = [plain(evaluation), told]
    (Path(folder) / f"{proc.rank}.json").write_text(json.dumps(found, default=np.ndarray.tolist))


def answers(world: int, folder: Path) -> list[dict[str, Any]]:
    """Return the answers of each of `world` ranks."""
    if world == 1:
        run_rank(ALONE, str(folder))
    else:
        spawn(run_rank, world, "cpu", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, thin: None) -> dict[str, Any]:
    return answers(1, tmp_path_factory.mktemp("alone"))[0]


def plain(evaluation: Evaluation) -> list[Any]:
    """Return box metrics, mask metrics and results in a form for JSON."""
    return [*evaluation[:2], list(evaluation.results)]


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal bit for bit, where nan equals nan."""
    return json.dumps(a, default=np.ndarray.tolist) == json.dumps(b, default=np.ndarray.tolist)


@pytest.mark.parametrize("world", [2, 3])
def test_t23_any_number_of_processes_sees_each_image_once_and_is_answered_the_same(
    alone: dict[str, Any], tmp_path: Path, world: int
) -> None:
    several = answers(world, tmp_path)
    ids = [record.image_id for record in shapes().records]
    for size in SIZES:
        for engine in ENGINES:
            expected, seen = alone[f"{size} {engine}"]
            assert seen == ids[:size] and 0 < expected[0][0]["AP"] < 1 and 0 < expected[1][0]["AP"] < 1
            for rank, answer in enumerate(several):
                numbers = [*expected[:2], [] if rank else expected[2]]  # only rank 0 has the detections
                assert same(answer[f"{size} {engine}"][0], numbers)
            assert [answer[f"{size} {engine}"][1] for answer in several] == [ids[r:size:world] for r in range(world)]
    for answer in several:  # a failure on one rank fails on all, so no rank keeps waiting
        kind, text = answer["bad truth"]
        assert kind == "RuntimeError" and "could not score the detections" in text and "ValueError" in text
        assert answer["bad picture"] == ["DataError", "second.png: cannot be read as a picture"]
        assert same(answer["passed over"][0][:2], alone["passed over"][0][:2])
    told = [about for answer in several for about in answer["passed over"][1]]
    assert told == [[ids[1], "second.png: cannot be read as a picture"]]


def test_t23_the_engines_agree_to_the_last_bit(alone: dict[str, Any]) -> None:
    for size in SIZES:
        first, second = (alone[f"{size} {engine}"] for engine in ENGINES)
        assert same(first, second)


def test_a_picture_that_is_passed_over_counts_as_one_without_detections(alone: dict[str, Any]) -> None:
    whole, (passed, told) = alone["5 hotcoco"][0], alone["passed over"]
    second = shapes().records[1].image_id
    assert told == [[second, "second.png: cannot be read as a picture"]]
    assert passed[2] == [result for result in whole[2] if result["image_id"] != second] != whole[2]
    assert passed[0][0]["AR"] < whole[0][0]["AR"]  # its objects count as missed
    assert alone["bad picture"] == ["DataError", "second.png: cannot be read as a picture"]


def test_only_the_first_process_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what rank 1 of two ranks sends and receives in the four exchanges."""
    dataset, sent, kept = shapes(2), [], []
    numbers = run(dataset)[:2]
    of_first = [[""], [dataset.records[0].image_id], [numbers]]

    def gather_as_second(part: list, proc: Process) -> list[list]:
        sent.append(part)
        return [of_first[len(sent) - 1], part]

    def collect_as_second(part: list, proc: Process) -> list[list]:
        kept.append(part)
        return []

    monkeypatch.setattr(evaluation, "all_gather", gather_as_second)
    monkeypatch.setattr(evaluation, "gather_to_first", collect_as_second)
    answer = run(dataset, Process(1, 2, CPU))
    assert sent[2] == [] and answer[:2] == numbers
    assert len(kept[0][0]) > 0 and len(answer.results) == 0  # sent to rank 0 and not kept


# --- next to nothing


def changed(dataset: Dataset, **fields: Any) -> Dataset:
    return dataset._replace(records=[record._replace(**fields) for record in dataset.records])


def only_class(dataset: Dataset, label: int) -> Dataset:
    """Keep the objects of one class as the only class."""
    records = []
    for record in dataset.records:
        keep = np.flatnonzero(record.labels == label)
        records.append(
            record._replace(
                boxes=record.boxes[keep], labels=record.labels[keep] * 0, crowd=record.crowd[keep],
                area=record.area[keep], annotation_ids=record.annotation_ids[keep],
                segmentations=[record.segmentations[index] for index in keep],
            )
        )  # fmt: skip
    return dataset._replace(records=records, classes=("one",), category_ids=(7,))


def no_objects(dataset: Dataset) -> Dataset:
    none = np.zeros(0)
    return changed(
        dataset, boxes=np.zeros((0, 4)), labels=none.astype(int), crowd=none.astype(bool), area=none,
        annotation_ids=none.astype(int), segmentations=[],
    )  # fmt: skip


def all_crowd(dataset: Dataset) -> Dataset:
    return dataset._replace(records=[record._replace(crowd=np.ones_like(record.crowd)) for record in dataset.records])


UNDEFINED = dict.fromkeys(SUMMARY_COLUMNS, math.nan)
NOTHING = {
    "no images": (lambda: shapes(0), True, UNDEFINED),
    "all negative": (lambda: no_objects(shapes()), True, UNDEFINED),
    "all crowd": (lambda: all_crowd(shapes()), True, UNDEFINED),
    "no detections": (shapes, False, {"AP": 0.0, "AR": 0.0, "AP50": 0.0}),
    "one class": (lambda: only_class(shapes(), 1), True, {}),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("engine", ENGINES)
def test_t23_next_to_nothing_has_a_defined_result(case: str, engine: str, capsys: pytest.CaptureFixture) -> None:
    make, finds, expected = NOTHING[case]
    dataset = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(dataset, model=Finder(shapes() if case != "one class" else dataset, finds), engine=engine)
        text = evaluation_table(result)
    assert {key: repr(value) for key, value in result.box.summary.items() if key in expected} == {
        key: repr(value) for key, value in expected.items()
    }
    values = list(scalars(result).values())
    assert all(math.isnan(value) or 0 <= value <= 1 for value in values)
    assert text.splitlines()[1].split()[1:] == [
        "-" if math.isnan(value) else f"{100 * value:.1f}" for value in result.box.summary.values()
    ]
    assert [row["name"] for row in result.box.per_class] == list(dataset.classes)
    assert (case == "one class") == (0 < result.box.summary["AP"] <= 1)
    assert bool(result.results) == (finds and case != "no images")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("case", NOTHING)
def test_t23_the_engines_agree_on_next_to_nothing(case: str) -> None:
    make, finds, _ = NOTHING[case]
    first, second = (run(make(), model=Finder(make(), finds), engine=engine) for engine in ENGINES)
    assert same(plain(first), plain(second))


# --- broken off


class BreakOff(BaseException):
    """An exception like the one that a signal raises."""


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_evaluation_leaves_no_process_and_the_model_as_it_was(workers: int) -> None:
    dataset, seen = shapes(), []
    model = Finder(dataset).train()

    def stop(image_id: int) -> None:
        seen.append(image_id)
        if len(seen) == 3:
            raise BreakOff

    with pytest.raises(BreakOff) as broken:  # its traceback keeps the batches alive
        detect_share(model, dataset, config(workers), ALONE, autocast=contextlib.nullcontext, on_image=stop)
    assert broken.tb and model.training and len(seen) == 3 and not multiprocessing.active_children()
