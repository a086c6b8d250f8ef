"""Results are made in a thread behind a detector on a GPU: the same results, in order, and no thread is left."""

import contextlib
import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_eval_faults import BreakOff, Finder, config, shapes

from gndet.data.records import Dataset
from gndet.distributed.process import Process
from gndet.errors import DataError
from gndet.evaluation import evaluate as evaluation
from gndet.evaluation.behind import MOST, Behind, pack, unpack
from gndet.evaluation.evaluate import Share
from gndet.evaluation.results import Results, from_coco
from gndet.structures import Detections

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)  # a device's type decides whether there is a thread
ALONE = Process(0, 1, CPU)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("results")]


def some_detections(seed: int, side: int) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    numbers = functools.partial(torch.rand, generator=generator)
    labels = torch.randint(0, 80, (2, 7), generator=generator)
    return Detections(numbers(2, 7, 4) * 1333, numbers(2, 7), labels, numbers(2, 7, side, side), numbers(2, 7) > 0.5)


def result(image_id: int) -> Results:
    return from_coco([{"image_id": image_id, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}])


@pytest.mark.parametrize("side", [28, 0])
def test_detections_survive_packing_into_one_tensor_bit_for_bit(side: int) -> None:
    detections = some_detections(0, side)
    packed = pack(detections)
    assert packed.shape == (2, 7, 7 + side * side) and packed.dtype == torch.float32
    for before, after in zip(detections, unpack(packed, side), strict=True):
        assert after.dtype == torch.float32 and torch.equal(before.float(), after)


def detect(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, device: torch.device, **options: Any) -> Share:
    """Detect on the CPU, and make the results as for this device."""
    monkeypatch.setattr(evaluation, "Behind", lambda _: Behind(device))
    workers = options.pop("workers", 0)
    return evaluation.detect_share(
        Finder(dataset), dataset, config(workers), ALONE, autocast=contextlib.nullcontext, **options
    )


def test_results_made_in_a_thread_are_those_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, running = shapes(), set()
    at_once = detect(dataset, monkeypatch, CPU, on_image=lambda _: running.update(threads()))
    assert not running
    behind = detect(dataset, monkeypatch, GPU, on_image=lambda _: running.update(threads()))
    assert running == {"results_0"} and not threads()
    assert behind.image_ids == at_once.image_ids and list(behind.results) == list(at_once.results) != []
    assert np.array_equal(behind.results.areas, at_once.results.areas)


def test_no_more_batches_wait_than_allowed_and_they_stay_in_order() -> None:
    free, started = threading.Semaphore(0), []
    with Behind(GPU) as behind:

        def make(image_id: int, _: Detections) -> Results:
            started.append(image_id)
            free.acquire()
            return result(image_id)

        for image_id in range(MOST):
            behind.add(some_detections(image_id, 0), functools.partial(make, image_id))  # does not wait
        release = threading.Timer(0.2, free.release)
        release.start()
        behind.add(some_detections(9, 0), functools.partial(make, 9))  # waits for the first
        assert [row["image_id"] for found in behind.results for row in found] == [0] and 9 not in started
        free.release(MOST)
        behind.finish()
        assert [row["image_id"] for found in behind.results for row in found] == [*range(MOST), 9] and not threads()
        free.release()
        behind.add(some_detections(10, 0), functools.partial(make, 10))  # a new thread
        behind.finish()
    assert len(behind.results) == MOST + 2 and not threads()


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_an_error_of_the_thread_is_raised_as_it_is_and_ends_the_thread(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Results:
        raise DataError("no such category")

    monkeypatch.setattr(evaluation, "to_results", broken)
    with pytest.raises(DataError, match="no such category"):
        detect(shapes(), monkeypatch, device)
    assert not threads()


def test_a_stop_ends_the_thread_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any, **options: Any) -> Results:
        time.sleep(0.1)
        return result(1)

    def stop(image_id: int) -> None:
        assert threads()
        raise BreakOff

    monkeypatch.setattr(evaluation, "to_results", slow)
    with pytest.raises(BreakOff):
        detect(shapes(), monkeypatch, GPU, on_image=stop)
    assert not threads()


def test_no_thread_runs_when_a_loader_process_is_forked_in_place_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, told, running = shapes(), list[str](), list[bool]()
    plain = detect(dataset, monkeypatch, CPU)
    image, here, flag = dataset.records[4].load(), os.getpid(), tmp_path / "killed"

    def load() -> np.ndarray:
        if os.getpid() != here and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    def tell(message: str) -> None:
        told.append(message)
        running.append(bool(threads()))

    records = [*dataset.records[:4], dataset.records[4]._replace(load=load)]
    seen = list[bool]()
    share = detect(
        dataset._replace(records=records), monkeypatch, GPU, workers=1, notify=tell,
        on_image=lambda _: seen.append(bool(threads())),
    )  # fmt: skip
    assert flag.exists() and len(told) == 1 and running == [False] and all(seen)
    assert list(share.results) == list(plain.results) and not threads()
