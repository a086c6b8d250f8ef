"""gndet's COCO metrics for a harness that compares evaluators: evaluate(truth, results, kinds).

It reads and checks the detections of a file, like `gndet analyze`.  In a gndet run they are in columns from the start.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gndet.data.datasets.coco import gc_paused
from gndet.evaluation.coco_metrics import coco_metrics
from gndet.evaluation.results import Results
from gndet.evaluation.results_file import Known, read_detections


def evaluate(truth: str, results: str, kinds: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the 12 numbers of COCO's summary for each kind (bbox or segm), and CPU seconds by phase.

    truth, results: paths of a COCO annotation file and of COCO results for it.
    """
    times: dict[str, float] = {}
    timed = partial(_timed, times)
    expected, found = read_files(Path(truth), Path(results), timed)
    with timed(f"{kinds[0]}.evaluate"):  # all kinds at once
        metrics = coco_metrics(dict.fromkeys(kinds, expected), found, engine="hotcoco", max_detections=100)
    return {kind: list(metrics[kind].summary.values()) for kind in kinds}, times


def read_files(
    truth: Path, results: Path, timed: Callable[[str], AbstractContextManager[None]]
) -> tuple[dict[str, Any], Results]:
    """Read a COCO annotation file, without checks, and the detections for it; timed: of the stages truth and read."""
    with timed("truth"), gc_paused():
        expected = msgspec.json.decode(truth.read_bytes())
    with timed("read"):
        sizes = {image["id"]: (image["height"], image["width"]) for image in expected["images"]}
        known = Known(sizes, frozenset(category["id"] for category in expected["categories"]))
        return expected, read_detections(results, known, truth.name)


@contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    before = time.process_time()
    yield
    phase = {"truth": "load_gt", "read": "read.load_dt"}.get(phase, phase)  # the harness's names
    times[phase] = time.process_time() - before
