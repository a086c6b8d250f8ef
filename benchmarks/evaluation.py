"""`python -m benchmarks eval`: time COCO's metrics of boxes and masks, from two files in COCO's formats, by stage.

gndet reads detections into columns and checks them.  pycocotools (used by torchvision's reference scripts) and hotcoco
(used by gndet) read them twice, once with boxes and once with masks; in the latter case mask areas decide what is small
or large.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hotcoco
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.peer_evaluation import read_files
from benchmarks.report import machine, table
from benchmarks.scene import CATEGORIES, CLASSES, OBJECTS, Scene, make_scenes
from benchmarks.turns import Subject, Work, peak_mib, take_turns
from gndet.evaluation.coco_metrics import coco_metrics

SIZE = (480, 640)  # height, width of the pictures
SCENES = 32  # synthetic scenes; pictures repeat them with other scores
NEAR, RIGHT = 0.5, 0.85  # share of detections near an object; share of these that have its class
FACTS = ("box AP", "mask AP")
STAGES = ("truth s", "read s", "score s", "read MiB", "score MiB")  # MiB: the peak until the stage's end
LISTED = ("hotcoco", "pycocotools")

Truth, Found = dict[str, Any], list[dict[str, Any]]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time all asked for on the same synthetic files, and show their AP."""
    num, each = options.num, options.detections
    with TemporaryDirectory() as folder:
        files = write(Path(folder), num, each)
        mib = files[1].stat().st_size / 2**20
        say(f"COCO metrics of boxes and masks: {num} pictures, {num * each} detections, {mib:.0f} MiB of JSON")
        subjects = [Subject("gndet", gndet_subject, files)]
        subjects += [Subject(name, listed_subject, (name, *files)) for name in LISTED if name not in options.without]
        turns = take_turns(subjects, options.rounds, threads=options.threads, warmup=0, fresh=True, say=say)
    against = subjects[-1].name
    say(f"\n{machine(options.threads)}\n{table(turns, against=against, facts=(*STAGES, *FACTS))}")


def write(folder: Path, num: int, each: int) -> tuple[Path, Path]:
    """Write the data set and the detections of `detected` to a folder.  Returns their paths."""
    paths = folder / "truth.json", folder / "detections.json"
    for path, tree in zip(paths, detected(num, each), strict=True):
        path.write_text(json.dumps(tree))
    return paths


class Stages(dict[str, float]):
    """The seconds and the peak memory of stages."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a stage, which may come in parts."""
        before = time.perf_counter()
        yield
        self[f"{name} s"] = self.get(f"{name} s", 0.0) + time.perf_counter() - before
        self[f"{name} MiB"] = peak_mib(os.getpid())


def gndet_subject(truth: Path, found: Path) -> Work:
    """Return the work of gndet's reader and metrics."""
    return functools.partial(_gndet_scores, truth, found)


def _gndet_scores(truth: Path, found: Path) -> dict[str, float]:
    stages = Stages()
    expected, results = read_files(truth, found, stages.timed)
    with stages.timed("score"):
        metrics = coco_metrics({"bbox": expected, "segm": expected}, results, engine="hotcoco", max_detections=100)
    return stages | dict(zip(FACTS, (metrics[kind].summary["AP"] for kind in ("bbox", "segm")), strict=True))


def listed_subject(engine: str, truth: Path, found: Path) -> Work:
    """Return the work of an evaluator that takes lists of dicts."""
    return functools.partial(_listed_scores, engine, truth, found)


def _listed_scores(engine: str, truth: Path, found: Path) -> dict[str, float]:
    stages, scores = Stages(), []
    opened, evaluator = (hotcoco.COCO, hotcoco.COCOeval) if engine == "hotcoco" else (COCO, COCOeval)
    with contextlib.redirect_stdout(io.StringIO()):
        with stages.timed("truth"):
            expected = opened(str(truth))
        for kind in ("bbox", "segm"):
            with stages.timed("read"):
                if kind == "bbox":
                    results = expected.loadRes(str(found))
                else:  # where there is a box, its area counts
                    rows = json.loads(found.read_bytes())
                    results = expected.loadRes([{key: row[key] for key in row if key != "bbox"} for row in rows])
                    del rows
            with stages.timed("score"):
                scorer = evaluator(expected, results, kind)
                scorer.evaluate()
                scorer.accumulate()
                scorer.summarize()
                scores.append(float(scorer.stats[0]))
    return stages | dict(zip(FACTS, scores, strict=True))


def detected(num: int, each: int) -> tuple[Truth, Found]:
    """Return a COCO data set of num pictures, and COCO results: `each` detections per picture by descending score."""
    rng = np.random.default_rng(0)
    scenes = make_scenes(SIZE, SCENES, 0)
    drawn = [_detections(scene, each, rng) for scene in scenes]
    images, annotations, found = [], [], []
    for number in range(1, num + 1):
        scene, detections = scenes[number % SCENES], drawn[number % SCENES]
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": SIZE[0], "width": SIZE[1]})
        annotations += scene.annotations(number, len(annotations) + 1)
        scores = np.sort(rng.uniform(0, 1, each))[::-1].tolist()
        found += [{"image_id": number, **row, "score": score} for row, score in zip(detections, scores, strict=True)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, found


def _detections(scene: Scene, each: int, rng: np.random.Generator) -> Found:
    """Return detections of a scene, those near objects first: outlines of objects, moved and scaled."""
    limits, found = np.array(SIZE[::-1]), []
    for number in range(each):
        near, which = number < NEAR * each, int(rng.integers(OBJECTS))
        outline = np.reshape(scene.polygons[which][0], (-1, 2))  # (points, 2)
        middle = outline.mean(0)
        side = outline.max(0) - outline.min(0)
        target = middle + 0.06 * side * rng.normal(size=2) if near else rng.uniform(0, limits)
        moved = ((outline - middle) * np.exp(0.08 * rng.normal(size=2)) + target).clip(0, limits)
        low, high = moved.min(0), moved.max(0)
        label = int(scene.labels[which]) if near and rng.uniform() < RIGHT else int(rng.integers(CLASSES))
        code = coco_mask.frPyObjects([moved.ravel().tolist()], *SIZE)[0]
        found.append({
            "category_id": label + 1,
            "bbox": [*low.tolist(), *(high - low).tolist()],
            "segmentation": {"size": list(SIZE), "counts": code["counts"].decode("ascii")},
        })  # fmt: skip
    return found
