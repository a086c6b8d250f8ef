"""gndet's COCO metrics for a harness that compares evaluators: evaluate(truth, results, kinds).

It reads the detections from a file, which a gndet run never does: there they are in columns from the start.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson

from gndet.data.datasets.coco import gc_paused
from gndet.evaluation.coco_metrics import coco_metrics
from gndet.evaluation.results import from_coco


def evaluate(truth: str, results: str, kinds: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the 12 numbers of COCO's summary for each kind (bbox or segm), and CPU seconds by phase.

    truth, results: paths of a COCO annotation file and of COCO results for it.
    """
    times: dict[str, float] = {}
    with gc_paused():
        with _timed(times, "load_gt"):
            expected = orjson.loads(Path(truth).read_bytes())
        with _timed(times, "read.load_dt"):
            found = from_coco(orjson.loads(Path(results).read_bytes()))
    with _timed(times, f"{kinds[0]}.evaluate"):  # all kinds at once
        metrics = coco_metrics(dict.fromkeys(kinds, expected), found, engine="hotcoco", max_detections=100)
    return {kind: list(metrics[kind].summary.values()) for kind in kinds}, times


@contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    before = time.process_time()
    yield
    times[phase] = time.process_time() - before
