"""Evaluation compared with pycocotools' own numbers, and masks with a slow full-image paste."""

import contextlib
import copy
import io
import json
import math
import pickle
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

import gndet.evaluation.results
from gndet.config.data import DataConfig, DatasetConfig
from gndet.config.schema import Config
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.segmentation import to_rle
from gndet.data.records import Dataset
from gndet.distributed.process import Process
from gndet.evaluation import coco_metrics as metrics_module
from gndet.evaluation import evaluate as evaluation
from gndet.evaluation.coco_metrics import Metrics, coco_metrics
from gndet.evaluation.results import from_coco, join, paste_masks, save_results
from gndet.structures import Detections

ALONE = Process(0, 1, torch.device("cpu"))
ENGINES = ("hotcoco", "pycocotools")


@pytest.fixture(scope="module")
def truth(data_root: Path) -> dict:
    return json.loads((data_root / "coco-tiny/annotations/instances_val2017.json").read_text())


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return read_dataset(DatasetConfig(kind="shapes", count=4), DataConfig())


def perturbed(truth: dict, seed: int) -> list[dict]:
    """Results near the ground truth: shifted boxes and masks, some missed, some of a wrong class."""
    random = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in truth["annotations"]:
        shift = random.integers(-6, 7, 2)
        mask = coco_mask.decode(to_rle(annotation["segmentation"], sizes[annotation["image_id"]]))
        code = coco_mask.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
        x, y, width, height = annotation["bbox"]
        result = {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": [x + float(shift[1]), y + float(shift[0]), width * random.uniform(0.8, 1.2), height],
            "score": float(random.random()),
            "segmentation": code | {"counts": code["counts"].decode()},
        }
        results += [result] if random.random() < 0.8 else []
        results += [result | {"category_id": categories[random.integers(80)]}] if random.random() < 0.3 else []
    return results


def reference_stats(truth: dict, results: list[dict], kind: str) -> list[float]:
    results = copy.deepcopy(results)
    if kind == "segm":  # with a bbox, pycocotools takes the box's area
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def metrics_of(truth: dict, results: list[dict], kind: str, **options: object) -> Metrics:
    return coco_metrics({kind: truth}, from_coco(results), **options)[kind]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_are_pycocotools_stats_bit_for_bit(truth: dict, engine: str, kind: str, capsys) -> None:
    results = perturbed(truth, seed=1)
    before = copy.deepcopy((truth, results))
    metrics = metrics_of(truth, results, kind, engine=engine, max_detections=100)
    assert list(metrics.summary.values()) == reference_stats(truth, results, kind)
    assert 0.1 < metrics.summary["AP"] < 0.9
    assert (truth, results) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_boxes_and_masks_scored_together_are_those_scored_alone(truth: dict, engine: str) -> None:
    results, options = perturbed(truth, seed=3), {"engine": engine, "max_detections": 100}
    truths = {"bbox": truth, "segm": truth}
    together = coco_metrics(truths, from_coco(results), **options)
    assert list(together) == ["bbox", "segm"]
    for kind, metrics in together.items():
        assert repr(metrics) == repr(metrics_of(truth, results, kind, **options))
    few = truth | {"annotations": [row | {"iscrowd": 1} for row in truth["annotations"]]}  # for masks only
    apart = coco_metrics(truths | {"segm": few}, from_coco(results), **options)
    assert apart["bbox"].summary == together["bbox"].summary and math.isnan(apart["segm"].summary["AP"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("at_once", [1, 20_000])
def test_parts_of_any_size_and_any_order_give_the_same_numbers(
    truth: dict, kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random.Random(0).sample(truth["images"], 20)
    ids = {image["id"] for image in images}
    few = truth | {"images": images, "annotations": [row for row in truth["annotations"] if row["image_id"] in ids]}
    results = perturbed(few, seed=6)
    for place, result in enumerate(results):
        result["score"] = 0.5 if place % 3 else result["score"]  # ties are ranked by image, then in the file's order
    order = random.Random(1).sample(range(20), 20)  # images in any order, the detections of one as they were
    results.sort(key=lambda result: order[sorted(ids).index(result["image_id"])])
    monkeypatch.setattr(metrics_module, "AT_ONCE", at_once)
    sizes, table = [], metrics_module._table
    monkeypatch.setattr(metrics_module, "_table", lambda *columns: sizes.append(len(columns[0])) or table(*columns))
    metrics = coco_metrics({kind: few}, from_coco(results), engine="hotcoco", max_detections=100)[kind]
    assert list(metrics.summary.values()) == reference_stats(few, results, kind)
    assert sum(sizes) == len(results)
    largest = max(Counter(result["image_id"] for result in results).values())
    assert max(sizes) <= largest + at_once // metrics_module.RECORD


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_ids_too_large_for_a_float_stay_distinct(truth: dict, engine: str, kind: str) -> None:
    results = perturbed(truth, seed=5)
    expected = metrics_of(truth, results, kind, engine=engine, max_detections=100)
    new = {image_id: 2**62 + i for i, image_id in enumerate(sorted(image["id"] for image in truth["images"]))}
    moved = {
        "images": [image | {"id": new[image["id"]]} for image in truth["images"]],
        "annotations": [annotation | {"image_id": new[annotation["image_id"]]} for annotation in truth["annotations"]],
        "categories": truth["categories"],
    }
    found = [result | {"image_id": new[result["image_id"]]} for result in results]
    assert repr(metrics_of(moved, found, kind, engine=engine, max_detections=100)) == repr(expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_per_class_numbers_are_those_of_the_class_alone(truth: dict, engine: str) -> None:
    results = perturbed(truth, seed=2)
    metrics = metrics_of(truth, results, "bbox", engine=engine, max_detections=100)
    person = {
        "images": truth["images"],
        "annotations": [annotation for annotation in truth["annotations"] if annotation["category_id"] == 1],
        "categories": [category for category in truth["categories"] if category["id"] == 1],
    }
    stats = reference_stats(person, [result for result in results if result["category_id"] == 1], "bbox")
    row = next(row for row in metrics.per_class if row["name"] == "person")
    assert [row["AP"], row["AP50"], row["AR"]] == [stats[0], stats[1], stats[8]]
    objects = [annotation["image_id"] for annotation in person["annotations"] if not annotation["iscrowd"]]
    assert (row["num_objects"], row["num_images"]) == (len(objects), len(set(objects)))
    assert len(objects) < len(person["annotations"])  # there are crowd regions to leave out


def row_of_boxes(count: int) -> tuple[dict, list[dict]]:
    """Return a picture with count objects, and results that find each of them exactly."""
    boxes = [[20.0 * index, 0.0, 10.0, 10.0] for index in range(count)]
    truth = {
        "images": [{"id": 1, "height": 10, "width": 20 * count}, {"id": 2, "height": 10, "width": 10}],
        "categories": [{"id": 5, "name": "box"}],
        "annotations": [
            {"id": index + 1, "image_id": 1, "category_id": 5, "bbox": box, "area": 100.0, "iscrowd": 0}
            for index, box in enumerate(boxes)
        ],
    }
    results = [
        {"image_id": 1, "category_id": 5, "bbox": box, "score": 1 - index / count} for index, box in enumerate(boxes)
    ]
    return truth, results


@pytest.mark.parametrize("engine", ENGINES)
def test_objects_beyond_the_limit_do_not_count(engine: str) -> None:
    truth, results = row_of_boxes(200)
    recall = {
        limit: metrics_of(truth, results, "bbox", engine=engine, max_detections=limit).summary["AR"]
        for limit in (5, 100, 300)
    }
    assert recall == pytest.approx({5: 0.025, 100: 0.5, 300: 1.0})


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_absent_is_zero_or_undefined(engine: str) -> None:
    truth, results = row_of_boxes(3)
    empty = truth | {"annotations": []}
    score = {"engine": engine, "max_detections": 100}
    full = metrics_of(truth, results, "bbox", **score).summary
    assert full["AP"] == full["APs"] == full["AR10"] == 1 and math.isnan(full["APl"])
    assert full["AR1"] == pytest.approx(1 / 3)
    missed = metrics_of(truth, [], "bbox", **score)
    assert missed.summary["AP"] == 0 and missed.per_class[0]["AR"] == 0
    for found in (results, []):
        nothing = metrics_of(empty, found, "bbox", **score)
        assert all(math.isnan(value) for value in nothing.summary.values())
    no_image = metrics_of(empty | {"images": []}, [], "bbox", **score)
    assert math.isnan(no_image.summary["AP"]) and no_image.per_class[0]["num_objects"] == 0


def slow_paste(mask: Tensor, box: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Paste a mask like detectron2: grid_sample at every pixel of the picture."""
    ys, xs = (torch.arange(edge, dtype=torch.float64) + 0.5 for edge in size)
    ys = (ys - box[1]) / (box[3] - box[1]) * 2 - 1
    xs = (xs - box[0]) / (box[2] - box[0]) * 2 - 1
    points = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    return nn.functional.grid_sample(mask[None, None], points[None], align_corners=False)[0, 0].numpy()


def test_pasted_masks_are_detectron2s() -> None:
    generator = torch.Generator().manual_seed(3)
    size = (61, 90)
    masks = torch.rand(40, 28, 28, generator=generator, dtype=torch.float64)
    masks[::2] = 0.3 + 0.7 * (masks[::2] > 0.05)  # solid up to the border, so that errors just outside the box show
    corners = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 80 - 10
    edges = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 60 + 0.5
    boxes = torch.cat([corners, corners + edges], dim=1)  # some are smaller than a pixel, some leave the picture
    codes = paste_masks(masks.float().numpy(), boxes.numpy(), size)
    covered = 0
    for mask, box, code in zip(masks, boxes, codes, strict=True):
        wanted = slow_paste(mask, box, size)
        decided = np.abs(wanted - 0.5) > 1e-5  # float32 may round a tie to the other side
        assert code["size"] == [61, 90] and isinstance(code["counts"], bytes)
        assert ((coco_mask.decode(code) == 1) == (wanted >= 0.5))[decided].all()
        covered += (wanted >= 0.5).sum()
    assert covered > 5000


@pytest.mark.parametrize("paste", ["exact", "rounded", "detectron"])
def test_a_mask_is_encoded_as_pycocotools_encodes_the_whole_picture(paste: str) -> None:
    random = np.random.default_rng(4)
    coarse = torch.from_numpy(random.normal(0, 3, (30, 1, 6, 6)))
    masks = nn.functional.interpolate(coarse, (28, 28), mode="bilinear")[:, 0].sigmoid().numpy()
    masks[:6] = np.array([1, 1, 1, 0, 1, 1])[:, None, None]
    for height, width in ((24, 31), (1, 40), (40, 1), (1, 1)):
        corners = np.sort(random.uniform(-10, 50, (30, 2, 2)), axis=1)
        corners[::3] = [[-9, -9], [60, 60]]  # the whole picture: a run continues from one column to the next
        corners[1::3, :, 1] = [-9, 60]  # from top to bottom
        for code in paste_masks(masks, corners.reshape(30, 4), (height, width), paste):
            whole = coco_mask.encode(np.asfortranarray(coco_mask.decode(code)))
            assert code == whole


def test_pasting_makes_no_array_of_the_whole_picture() -> None:
    """A bool of each of 12 million pixels would take 12 MB."""
    masks, boxes = np.ones((3, 28, 28), dtype=np.float32), np.array([[0.0, 0, 4000, 3000]] * 3)
    tracemalloc.start()
    codes = paste_masks(masks, boxes, (3000, 4000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 11e6, f"{peak / 1e6:.1f} MB"
    assert (coco_mask.area(codes) > 0.999 * 3000 * 4000).all()  # the corners fade


def test_an_empty_box_pastes_as_an_empty_mask() -> None:
    boxes = np.array([[5.3, 5, 5.3, 9], [-30, -30, -20, -20], [4, 4, 4, 4], [9, 9, 5, 5]])
    masks = np.ones((4, 28, 28), dtype=np.float32)
    with np.errstate(all="raise"):
        codes = paste_masks(masks, boxes, (20, 20))
    assert coco_mask.area(codes).tolist() == [0, 0, 0, 0]


def test_three_hundred_masks_paste_in_seconds() -> None:
    corners = np.random.default_rng(0).uniform(0, 1000, (300, 2))
    boxes = np.concatenate([corners, corners + 60], axis=1)
    start = time.perf_counter()
    assert len(paste_masks(np.ones((300, 28, 28), np.float32), boxes, (1040, 1388))) == 300
    assert time.perf_counter() - start < 5  # 0.2 s on one core; pasting over the whole picture takes far longer


class Oracle(nn.Module):
    """A detector that knows the answer: the records' ground truth in reading order, plus an empty slot."""

    def __init__(self, dataset: Dataset, records: list[int]) -> None:
        super().__init__()
        self.records = [dataset.records[index] for index in records]

    def detect(self, images: Tensor, sizes: Tensor, padded: bool) -> Detections:
        assert not self.training and torch.is_inference_mode_enabled() and images.dtype == torch.uint8
        now, self.records = self.records[: len(images)], self.records[len(images) :]
        slots = 1 + max(len(record.labels) for record in now)
        boxes = torch.full((len(now), slots, 4), float("nan"))
        labels = torch.zeros(len(now), slots, dtype=torch.int64)
        masks = torch.zeros(len(now), slots, 28, 28)
        valid = torch.zeros(len(now), slots, dtype=torch.bool)
        for place, (record, size) in enumerate(zip(now, sizes.tolist(), strict=True)):
            count = len(record.labels)
            scale = np.array(size[::-1]) / record.size[::-1]
            boxes[place, :count] = torch.from_numpy(record.boxes * np.tile(scale, 2))
            labels[place, :count] = torch.from_numpy(record.labels)
            for slot, segmentation in enumerate(record.segmentations):
                masks[place, slot] = self.in_box(segmentation, record.boxes[slot], record.size)
            valid[place, :count] = True
        scores = torch.full((len(now), slots), 0.5)
        return Detections(boxes, scores, labels, masks, valid)

    def in_box(self, segmentation: object, box: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Return the object's mask as the mean of 4 x 4 points per cell."""
        x, y = ((box[axis] + (box[axis + 2] - box[axis]) * (np.arange(112) + 0.5) / 112).astype(int) for axis in (0, 1))
        mask = coco_mask.decode(to_rle(segmentation, size))
        points = mask[np.ix_(y.clip(max=size[0] - 1), x.clip(max=size[1] - 1))]
        return torch.from_numpy(points.reshape(28, 4, 28, 4).mean(axis=(1, 3)))


def config(**options: object) -> Config:
    data = DataConfig(workers=0, shortest_edge_test=100, max_edge=400)
    return Config.model_validate({"data": data, "evaluation": {"images_per_gpu": 2, **options}})


@pytest.mark.parametrize("engine", ENGINES)
def test_an_oracle_scores_one_whatever_the_picture_size(shapes: Dataset, engine: str) -> None:
    model, seen = Oracle(shapes, [0, 1, 2, 3]), []
    cfg = config(engine=engine)
    share = evaluation.detect_share(
        model, shapes, cfg, ALONE, autocast=contextlib.nullcontext, on_image=seen.append
    )  # fmt: skip
    result = evaluation.score_shares(share, shapes, cfg, ALONE)
    assert model.training and seen == [record.image_id for record in shapes.records]
    assert len(result.results) == sum(len(record.labels) for record in shapes.records)
    assert result.box.summary["AP"] == 1
    assert result.mask.summary["AP50"] == 1 and result.mask.summary["AP"] > 0.8
    boxes = np.array([row["bbox"] for row in result.results])
    wanted = np.concatenate([record.boxes for record in shapes.records])
    assert np.abs(boxes[:, :2] - wanted[:, :2]).max() < 1e-3
    assert np.abs(boxes[:, 2:] - (wanted[:, 2:] - wanted[:, :2])).max() < 1e-3


def test_an_image_seen_twice_is_refused(shapes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "all_gather", lambda items, proc: [items, items])
    with pytest.raises(AssertionError, match="8 images seen"):
        evaluation.evaluate(Oracle(shapes, [0, 1, 2, 3]), shapes, config(), ALONE, contextlib.nullcontext)


def test_boxes_are_clipped_to_the_picture_and_junk_slots_left_out(shapes: Dataset) -> None:
    height, width = shapes.records[1].size
    boxes = torch.tensor([[[-10.0, 20, 2 * width + 9, 2 * height + 9], [float("nan")] * 4]])
    detections = Detections(
        boxes,
        torch.ones(1, 2),
        torch.ones(1, 2).long(),
        torch.zeros(1, 2, 0, 0),
        torch.tensor([[True, False]]),
    )
    sizes = torch.tensor([[2 * height, 2 * width]])
    (result,) = evaluation.to_results(detections, [1], sizes, shapes)
    assert result["bbox"] == [0, 10, width, height - 10] and "segmentation" not in result
    assert result["category_id"] == shapes.category_ids[1]
    assert result["image_id"] == shapes.records[1].image_id


def test_columns_read_as_the_results_they_were_made_of(truth: dict) -> None:
    results = perturbed(truth, seed=6)
    columns = from_coco(results)
    assert list(columns) == results and len(columns) == len(results) and columns[-1] == results[-1]
    assert list(columns[5:50:3]) == results[5:50:3]
    with pytest.raises(IndexError):
        columns[len(results)]
    assert list(pickle.loads(pickle.dumps(columns))) == results
    assert list(join([columns[:7], from_coco([]), columns[7:]])) == results and len(join([])) == 0
    ids = [image["id"] for image in truth["images"]][::-1]
    assert list(columns.of_image(ids[3])) == [found for found in results if found["image_id"] == ids[3]]
    shuffled = [results[place] for place in np.random.default_rng(0).permutation(len(results))]
    ordered = sorted(shuffled, key=lambda found: ids.index(found["image_id"]))
    assert list(from_coco(shuffled).in_order_of(ids)) == ordered
    boxes = [{key: found[key] for key in ("image_id", "category_id", "bbox", "score")} for found in results]
    assert list(from_coco(boxes)) == boxes


def test_saved_results_load_in_pycocotools(
    truth: dict, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = perturbed(truth, seed=4)
    monkeypatch.setattr(gndet.evaluation.results, "WRITTEN_AT_ONCE", 7)
    columns = from_coco(results)
    save_results(tmp_path / "results.json", columns)
    assert (tmp_path / "results.json").read_text() == json.dumps(list(columns))
    save_results(tmp_path / "none.json", from_coco([]))
    assert (tmp_path / "none.json").read_text() == "[]"
    (tmp_path / "none.json").unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data_root / "coco-tiny/annotations/instances_val2017.json"))
        loaded = coco.loadRes(str(tmp_path / "results.json"))
    assert len(loaded.getAnnIds()) == len(results)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_table_is_aligned_and_shows_undefined_as_a_dash() -> None:
    truth, results = row_of_boxes(3)
    box = metrics_of(truth, results, "bbox", engine="hotcoco", max_detections=100)
    result = evaluation.Evaluation(box, None, from_coco(results))
    summary, classes = evaluation.evaluation_table(result).split("\n\n")
    assert summary.splitlines()[1].split()[:7] == ["box", "100.0", "100.0", "100.0", "100.0", "-", "-"]
    assert classes.splitlines()[1].split() == ["box", "1", "3", "100.0", "100.0", "100.0"]
    assert all(len({len(line) for line in part.splitlines()}) == 1 for part in (summary, classes))
    assert evaluation.scalars(result)["box/AP"] == 1


@pytest.mark.parametrize(("objects", "precision"), [(1, 1.0), (100, None)])
def test_objects_without_a_mask_do_not_enter_mask_metrics(
    shapes: Dataset, objects: int, precision: float | None
) -> None:
    records = [
        record._replace(segmentations=[None] * len(record.labels[:objects]) + record.segmentations[objects:])
        for record in shapes.records
    ]
    model, dataset = Oracle(shapes, [0, 1, 2, 3]), shapes._replace(records=records)
    result = evaluation.evaluate(model, dataset, config(), ALONE, contextlib.nullcontext)
    assert result.box.summary["AP"] == 1
    assert (result.mask and result.mask.summary["AP50"]) == precision
