"""The analysis of detections: its matches, curves and intervals agree with COCO's, its mistakes with TIDE's."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import ConfigError, DataError
from gndet.evaluation.coco_metrics import coco_truths
from gndet.evaluation.results import Results, from_coco
from gndet.toolbox.analysis.analysis import Analysis, image_counts, make_analysis
from gndet.toolbox.analysis.analyze import analyze, read_subject, terminal_table
from gndet.toolbox.analysis.bootstrap import ap_intervals, average_precision, paired_interval, resample
from gndet.toolbox.analysis.errors import KINDS
from gndet.toolbox.analysis.matches import SCORES, best_thresholds, false_positives, true_positives
from gndet.toolbox.analysis.tables import COLUMNS, Table


def detections(dataset: Dataset, *, masks: bool, seed: int = 0) -> list[dict]:
    """Return the detections of a poor detector: moved, doubled, of a wrong class, missed, invented."""
    draws, found = np.random.default_rng(seed), []
    for record in dataset.records:
        height, width = record.size
        for label, box, mask in zip(record.labels, record.boxes, record.segmentations, strict=True):
            for _ in range(draws.choice(3, p=(0.15, 0.65, 0.2))):
                label = label if draws.random() < 0.8 else draws.integers(len(dataset.classes))
                moved = box + draws.normal(0, 0.08, 4) * np.tile(box[2:] - box[:2], 2)
                row = {
                    "image_id": record.image_id, "category_id": dataset.category_ids[label],
                    "bbox": [float(v) for v in (*moved[:2], *(moved[2:] - moved[:2]).clip(0.5))],
                    "score": float(np.round(draws.random(), 2)),
                }  # fmt: skip
                if masks and mask is not None:
                    rows = np.zeros((height, width), np.uint8)
                    x, y, w, h = (int(v) for v in row["bbox"])
                    rows[max(y, 0) : y + h + 1, max(x, 0) : x + w + 1] = 1
                    rows[0, 0] = 1  # never empty
                    from_mask = encode(rows)
                    row["segmentation"] = from_mask
                if not masks or "segmentation" in row:
                    found.append(row)
        if not masks:
            found.append({
                "image_id": record.image_id, "category_id": dataset.category_ids[0],
                "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.99,
            })  # fmt: skip
    return found


def encode(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@pytest.fixture(scope="module")
def dataset(data_root: Path) -> Dataset:
    cfg = DatasetConfig(annotations="annotations/instances_val2017.json", images="val2017")
    return read_dataset(cfg, DataConfig(root=str(data_root / "coco-tiny"), cache=""))


@pytest.fixture(scope="module", params=["box", "mask"])
def case(request: pytest.FixtureRequest, dataset: Dataset) -> tuple[Dataset, Results, Analysis, COCOeval]:
    kind = request.param
    found = from_coco(detections(dataset, masks=kind == "mask")).in_order_of([r.image_id for r in dataset.records])
    return dataset, found, make_analysis(dataset, found, kind=kind, max_detections=100), reference(dataset, found, kind)


def reference(dataset: Dataset, found: Results, kind: str) -> COCOeval:
    """Return pycocotools' evaluation."""
    from pycocotools.coco import COCO

    truth = coco_truths(dataset, masks=kind == "mask")["segm" if kind == "mask" else "bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = truth | {"annotations": [dict(row) for row in truth["annotations"]]}
        expected.createIndex()
        key = "segmentation" if kind == "mask" else "bbox"
        rows = [{name: row[name] for name in ("image_id", "category_id", "score", key)} for row in found]
        scorer = COCOeval(expected, expected.loadRes(rows), "segm" if kind == "mask" else "bbox")
        scorer.evaluate()
        scorer.accumulate()
    return scorer


def test_matches_are_pycocotools_own(case: tuple) -> None:
    _, _, found, scorer = case
    matched = found.matches.matched * ~found.matches.ignored
    listed = {}
    for part in scorer.evalImgs:
        if part is not None and part["aRng"] == scorer.params.areaRng[0]:
            for place, id in enumerate(part["dtIds"]):
                listed[id - 1] = np.where(part["dtIgnore"][:, place], 0, part["dtMatches"][:, place])
    assert sorted(found.matches.index.tolist()) == sorted(listed)
    assert all((matched[row] == listed[id]).all() for row, id in enumerate(found.matches.index.tolist()))


def test_precision_arrays_and_summary_are_pycocotools_own(case: tuple) -> None:
    _, _, found, scorer = case
    np.testing.assert_array_equal(found.metrics.precision, scorer.eval["precision"][:, :, :, 0, -1])
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()
    np.testing.assert_array_equal(
        list(found.metrics.summary.values()), np.where(scorer.stats < 0, np.nan, scorer.stats)
    )


def test_average_precision_of_the_images_as_they_are_is_cocos(case: tuple) -> None:
    _, _, found, scorer = case
    matches = found.matches
    for k in range(len(matches.classes)):
        rows = np.flatnonzero(matches.label == k)
        rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
        counted = ~matches.ignored[rows]
        hit = (matches.matched[rows] > 0) & counted
        objects = ((matches.object_label == k) & ~matches.object_ignored).sum()
        got = average_precision(hit, counted & ~hit, np.ones((1, len(rows))), np.array([float(objects)]))[0]
        expected = scorer.eval["precision"][:, :, k, 0, -1].mean(1)
        np.testing.assert_allclose(got, np.where(expected < 0, np.nan, expected), atol=1e-12)


def test_an_interval_contains_the_value_and_depends_on_the_seed_alone(case: tuple) -> None:
    _, _, found, _ = case
    ends = ap_intervals(found.matches, seed=3)
    assert ends.ap.low < found.metrics.summary["AP"] < ends.ap.high
    assert ends == ap_intervals(found.matches, seed=3) != ap_intervals(found.matches, seed=4)
    sample = resample(found.matches, seed=0, draws=50)
    assert sample.shape == (51, len(found.matches.classes), 10)
    zero = paired_interval(found.matches, found.matches)
    assert zero == (0.0, 0.0)


def test_a_draw_that_takes_an_image_twice_counts_it_twice() -> None:
    hit, wrong = np.array([[True], [False], [True]]), np.array([[False], [True], [False]])
    # by hand: found, false, found with weights 1, 2, 1 of 2 objects: precisions 1, 1/3, 2/4 at recalls .5 and 1
    value = average_precision(hit, wrong, np.array([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), np.array([2.0, 0.0]))
    assert value[0, 0] == pytest.approx((51 * 1 + 50 * 0.5) / 101)
    assert math.isnan(value[1, 0])


def test_curves_count_detections_from_a_score_on(case: tuple) -> None:
    _, _, found, _ = case
    matches, curves = found.matches, found.curves
    for place in (0, 30, 77):
        shown = matches.scores >= SCORES[place]
        tp, fp = (shown & true_positives(matches)).sum(), (shown & false_positives(matches)).sum()
        objects = (~matches.object_ignored).sum()
        assert curves.precision[-1, place] == pytest.approx(tp / (tp + fp))
        assert curves.recall[-1, place] == pytest.approx(tp / objects)
        assert curves.f1[-1, place] == pytest.approx(2 * tp / (tp + fp + objects))
    best = best_thresholds(curves)[-1]
    assert best[3] == np.nanmax(curves.f1[-1])


def test_mistakes_are_sorted_as_hotcoco_counts_them(case: tuple) -> None:
    _, _, found, _ = case
    counts = {kind: int((found.errors.kind == kind).sum()) for kind in KINDS}
    counts["Miss"] = int(found.errors.missed.sum())
    assert counts == found.errors.counts
    assert min(counts["Cls"], counts["Loc"], counts["Dupe"], counts["Miss"]) > 0
    assert set(found.errors.kind[true_positives(found.matches)]) == {""}


def test_an_image_counts_what_is_found_false_and_missed(case: tuple) -> None:
    _, _, found, _ = case
    counts = image_counts(found.matches, 0.4)
    place = int(counts.sum(1).argmax())
    matches = found.matches
    of_image = (matches.image == place) & (matches.scores >= 0.4)
    taken = set(matches.matched[of_image & true_positives(matches), 0].tolist())
    objects = set(matches.object_ids[(matches.object_image == place) & ~matches.object_ignored].tolist())
    assert counts[place].tolist() == [
        len(taken), int((of_image & false_positives(matches)).sum()), len(objects - taken),
    ]  # fmt: skip
    assert found.worst(3)[0] == int(np.lexsort((-found.counts[:, 1:].sum(1), found.f1))[0])


def test_a_perfect_detector_makes_no_mistakes(dataset: Dataset) -> None:
    rows = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.9}
        for row in to_coco(dataset)["annotations"] if not row["iscrowd"]
    ]  # fmt: skip
    found = make_analysis(dataset, from_coco(rows), kind="box", max_detections=100)
    assert found.metrics.summary["AP"] == 1.0 and found.worst(50) == [] and found.suspects == []
    assert sum(found.errors.counts.values()) == 0 and found.intervals.ap == (1.0, 1.0)
    assert (found.confusion == np.diag(np.diag(found.confusion))).all()


def test_finding_nothing_is_not_a_failure(dataset: Dataset) -> None:
    found = make_analysis(dataset, from_coco([]), kind="box", max_detections=100)
    assert found.metrics.summary["AP"] == 0.0 and found.threshold == 0.5 and np.isnan(found.best[-1]).all()
    assert found.errors.counts["Miss"] == sum(row["num_objects"] for row in found.metrics.per_class)


# --- results files of other toolkits

GOOD = {"image_id": 1, "category_id": 1, "bbox": [1.0, 2.0, 10.0, 12.0], "score": 0.5}


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}],
    }))  # fmt: skip
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 7}, "image_id 7"),
        ({"image_id": "1"}, "image_id '1'"),
        ({"category_id": 3}, "category_id 3"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3]"),
        ({"bbox": [1, 2, -3, 4]}, "bbox [1, 2, -3, 4]"),
        ({"bbox": [1, 2, 1e300, 4]}, "bbox [1, 2, 1e+300, 4]"),
        ({"score": None}, "score None"),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, "RLE size [3, 3]"),
        ({"segmentation": {"size": [30, 40], "counts": "abc"}}, "RLE counts"),
    ],
)
def test_a_detection_that_does_not_fit_is_named(tmp_path: Path, annotations: Path, change: dict, words: str) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps([GOOD, GOOD | change]))
    with pytest.raises(DataError) as error:
        read_subject(file, str(annotations), [])
    assert f"1 of 2 detections do not belong to {annotations}" in str(error.value)
    assert f"detection 1: {words}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ('{"images": [], "annotations": []}', "holds annotations, expected detections"),
        ('{"a": 1}', "expected a list of detections"),
        ("[3]", "detection 0: 3, expected an object"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, annotations: Path, text: str, words: str) -> None:
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_subject(file, str(annotations), [])


def test_what_is_missing_is_asked_for(tmp_path: Path, annotations: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps([GOOD]))
    with pytest.raises(DataError, match="--data is missing; name the COCO annotations"):
        read_subject(file, None, [])
    with pytest.raises(DataError, match="no such file"):
        read_subject(file, str(tmp_path / "none.json"), [])
    with pytest.raises(DataError, match="not a run folder, it has no config"):
        read_subject(tmp_path, None, [])
    with pytest.raises(DataError, match="the objects of the data set have no masks"):
        analyze(file, [], print, data=str(annotations), kind="mask")


def test_an_option_without_effect_is_refused(tmp_path: Path, annotations: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps([GOOD]))
    assert read_subject(file, str(annotations), ["evaluation.max_detections=500"])[2] == 500
    with pytest.raises(ConfigError, match=r"unknown key nonsense"):
        read_subject(file, str(annotations), ["nonsense=1"])
    with pytest.raises(DataError, match=r"--data .* is only for a results file; the run .* names its own data"):
        read_subject(tmp_path, str(annotations), [])


def test_scores_are_shown_as_options_take_them() -> None:
    table = Table("suspects", "", COLUMNS["suspects"], [("a.png", 1, "missing", None, "-", "cat", 0.93)])
    assert "0.93" in terminal_table(table) and "93.0" not in terminal_table(table)
    thresholds = Table("thresholds", "", COLUMNS["thresholds"], [("cat", 0.45, 0.9, 0.8, 0.85)])
    assert terminal_table(thresholds).splitlines()[-1].split() == ["cat", "0.45", "90.0", "80.0", "85.0"]


def test_masks_of_other_toolkits_need_no_box(tmp_path: Path, annotations: Path) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:9, 10:16] = 1
    file = tmp_path / "found.json"
    bare = {key: value for key, value in GOOD.items() if key != "bbox"}
    file.write_text(json.dumps([bare | {"segmentation": encode(mask)}]))
    _, found, _ = read_subject(file, str(annotations), [])
    assert found.boxes.tolist() == [[10.0, 5.0, 6.0, 4.0]] and found.areas.tolist() == [24.0]
    file.write_text(json.dumps([GOOD, GOOD | {"segmentation": encode(mask)}]))
    with pytest.raises(DataError, match="1 of 2 detections have no segmentation"):
        read_subject(file, str(annotations), [])


def test_tables_go_to_the_terminal_json_and_csv_alike(tmp_path: Path, annotations: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps([GOOD, GOOD | {"bbox": [20, 20, 5, 5], "score": 0.4}]))
    said: list[str] = []
    analyze(file, [], said.append, data=str(annotations), json_file=tmp_path / "a.json", csv_folder=tmp_path / "csv")
    whole = json.loads((tmp_path / "a.json").read_text())
    assert whole["summary"]["AP"] == whole["classes"][0]["AP"] == pytest.approx(1.0)  # COCO adds 2**-52 below
    assert whole["intervals"]["AP"] == pytest.approx([1.0, 1.0]) and whole["draws"] == 400
    errors = {row["kind"]: row["count"] for row in whole["errors"]}
    assert errors == {"Cls": 0, "Loc": 0, "Both": 0, "Dupe": 0, "Bkg": 1, "Miss": 0}
    lines = (tmp_path / "csv" / "classes.csv").read_text().splitlines()
    assert lines[0].startswith("class,images,objects,AP") and lines[1].startswith("cat,1,1,0.99999999")
    assert any("cat" in text and "100.0" in text for text in said)
    assert {path.name for path in (tmp_path / "csv").iterdir()} == {
        "classes.csv", "confusion.csv", "errors.csv", "images.csv", "suspects.csv", "thresholds.csv",
    }  # fmt: skip
