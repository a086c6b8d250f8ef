"""`Detector.predict`: the same numbers whatever a picture comes as; `Prediction` in the forms of other libraries."""

import base64
import copy
import io
import json
import pickle
import threading
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.cli.main import main
from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.segmentation import to_rle
from gndet.data.datasets.shapes import draw_image
from gndet.errors import ConfigError, DataError, OutputError
from gndet.evaluation.detector import Detector, load
from gndet.evaluation.prediction import Prediction
from gndet.evaluation.results import from_coco

pytestmark = pytest.mark.usefixtures("thin")
LOW = {"box_head": {"score_threshold": 0.01}}  # an untrained detector is sure of nothing
SIZES = [(96, 96), (64, 120), (120, 64), (96, 96), (70, 70)]
FIELDS = ("boxes", "scores", "labels", "masks")


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return load(trained, model=LOW, data={"workers": 1})


@pytest.fixture(scope="module")
def boxes_only(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """The same detector without its mask head."""
    saved = load_checkpoint(trained / "last")
    saved.meta["config"]["model"]["masks"] = False
    kept = {key: value for key, value in saved.groups["ema"].items() if not key.startswith("mask_head")}
    save_checkpoint(tmp_path_factory.mktemp("boxes") / "a", {"model": kept}, saved.meta)
    return load(tmp_path_factory.getbasetemp() / "boxes0" / "a", model=LOW)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    images = [draw_image(seed=3, index=index, size=120) for index in range(len(SIZES))]
    return [np.ascontiguousarray(image[:h, :w]) for image, (h, w) in zip(images, SIZES, strict=True)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def assert_equal(one: Prediction, two: Prediction) -> None:
    assert one.size == two.size and one.names == two.names
    for field in FIELDS:
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)), field


def made_up(size: tuple[int, int], masks: list[np.ndarray]) -> Prediction:
    """Return a Prediction of disc, box, disc ... with the given masks (h, w) bool, and their boxes."""
    rows = []
    for number, mask in enumerate(masks):
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        box = coco_mask.toBbox(code).tolist()
        code["counts"] = code["counts"].decode()
        category = (7, 3)[number % 2]
        rows.append({"image_id": 1, "category_id": category, "bbox": box, "score": 0.9 - number / 1000})
        rows[-1]["segmentation"] = code
    pixels = np.full((*size, 3), 90, dtype=np.uint8)
    return Prediction(size, ("disc", "box"), (7, 3), None, from_coco(rows), pixels.copy)


# --- what a picture comes as


def test_a_file_a_pil_image_an_array_and_a_tensor_agree_to_the_bit(
    detector: Detector, folder: Path, pictures: list[np.ndarray]
) -> None:
    found = detector.predict(folder / "1.png", 0.0)
    assert found.path == folder / "1.png" and len(found) > 3
    for source in (str(folder / "1.png"), Image.open(folder / "1.png"), pictures[1], torch.from_numpy(pictures[1])):
        assert_equal(detector.predict(source, 0.0), found)
    bgr = np.ascontiguousarray(pictures[1][..., ::-1])
    assert_equal(detector.predict(bgr[..., ::-1], 0.0), found)  # strided backward, as OpenCV's users write it
    locked = pictures[1].copy()
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(detector.predict(locked, 0.0), found)


def test_exif_turns_a_file_and_a_pil_image_alike(detector: Detector, tmp_path: Path, pictures: list) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.tif"):
        Image.fromarray(pictures[1]).save(tmp_path / name, exif=exif)
        upright = detector.predict(np.ascontiguousarray(np.rot90(pictures[1], -1)), 0.0)
        assert upright.size == (120, 64)
        assert_equal(detector.predict(tmp_path / name, 0.0), upright)
        assert_equal(detector.predict(Image.open(tmp_path / name), 0.0), upright)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        (np.zeros((8, 8, 3)), r"float64; expected uint8.*\(255 \* x\)\.round\(\)\.astype\(np\.uint8\)"),
        (torch.zeros(8, 8, 3), r"a tensor .*float32; expected uint8.*\(255 \* x\)\.round\(\)\.byte\(\)"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\).*np\.stack\(\[x\] \* 3, axis=-1\)"),
        (np.zeros((3, 8, 9), np.uint8), r"x\.transpose\(1, 2, 0\)"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"x\.permute\(1, 2, 0\)"),
        (np.zeros((8, 9, 4), np.uint8), r"x\[\.\.\., :3\]"),
        (np.zeros((8, 9, 1), np.uint8), r"np\.repeat\(x, 3, axis=-1\)"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"list\(x\)"),
        (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), r"list\(x\.permute\(0, 2, 3, 1\)\)"),
        (np.zeros((8, 9, 3), np.uint16), r"uint16.*x // 257"),
        (np.zeros((8, 9, 3), bool), r"255 \* x\.astype\(np\.uint8\)"),
        (np.zeros((0, 9, 3), np.uint8), "at least one pixel"),
        (b"PNG", "got bytes, expected the path of a picture"),
        (None, "got NoneType, expected the path"),
        ([np.zeros((8, 9, 3), np.uint8), "no.png"], r"picture 1 of the list: no\.png: no such picture"),
        (["."], "a list holds single pictures"),
        ("no.png", r"no\.png: no such picture"),
        ("https://example.org/a.png?b", "is an address; gndet downloads nothing"),
        (["https://example.org/a.png"], "https://example.org/a.png: is an address"),
        ("", "'': no such picture"),
        ("a" * 5000, "no such picture"),
        (["a" * 5000], "no such picture"),
        (Image.new("RGB", (0, 3)), "at least one pixel"),
        (Image.fromarray(np.ones((8, 9), np.int32)), r"values 1 to 1, expected 8 or 16 bits.*data\.pixel_range"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8, device="meta"), "a tensor without an array of pixels"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8).to_sparse(), "a tensor without an array of pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else type(value).__name__,
)
def test_what_cannot_be_taken_is_refused_with_the_remedy(detector: Detector, source: Any, remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        detector.predict(source)


@pytest.mark.parametrize("wrong", [{"threshold": 50}, {"threshold": "0.5"}, {"batch": 0}, {"batch": 1.5}, {"every": 0}])
def test_wrong_options_are_refused(detector: Detector, pictures: list[np.ndarray], wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got {next(iter(wrong.values()))!r}, expected"):
        detector.predict(pictures[0], **wrong)


def test_a_list_gives_a_list_and_a_picture_that_cannot_be_read_is_named(
    detector: Detector, folder: Path, pictures: list[np.ndarray]
) -> None:
    assert detector.predict([]) == [] and isinstance(detector.predict((pictures[0],)), list)
    mixed = [folder / "1.png", pictures[0], Image.fromarray(pictures[2]), folder / "1.png"]
    assert [one.size for one in detector.predict(mixed, batch=2)] == [SIZES[1], SIZES[0], SIZES[2], SIZES[1]]
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"3\.png: cannot be read"):
        detector.predict([folder / "1.png", folder / "3.png", folder / "2.png"], batch=1)


# --- the same numbers


def test_a_picture_alone_and_in_any_list_gives_the_same(detector: Detector, pictures: list[np.ndarray]) -> None:
    """The batch independence of a GN model: to the bit where shapes agree, otherwise rounding."""
    alone = [detector.predict(picture, 0.0) for picture in pictures]
    for one, again in zip(alone, detector.predict(pictures, 0.0, batch=1), strict=True):
        assert_equal(one, again)
    for batch in (2, 5):
        for one, other in zip(alone, detector.predict(pictures, 0.0, batch=batch), strict=True):
            assert one.names == other.names and len(one) > 3
            assert np.abs(one.scores - other.scores).max() < 1e-5
            assert np.abs(one.boxes - other.boxes).max() < 1e-5 * max(one.size)
    first, second, third = pictures[0], pictures[3], pictures[0][::-1]  # of one size
    with_second, with_third = detector.predict([first, second], 0.0)[0], detector.predict([first, third], 0.0)[0]
    assert_equal(with_second, with_third)


def test_a_model_that_couples_images_is_independent_with_batch_1(trained: Path, pictures: list[np.ndarray]) -> None:
    bn = load(trained, model=LOW | {"norm": {"padding": "plain"}})
    assert "plain" in bn.config.model.batch_coupling()
    for picture, found in zip(pictures, bn.predict(pictures, 0.0, batch=1), strict=True):
        assert_equal(bn.predict(picture, 0.0), found)
    alone, padded = bn.predict(pictures[1], 0.0), bn.predict(pictures[:2], 0.0, batch=2)[1]
    assert len(alone) != len(padded) or np.abs(alone.scores - padded.scores).max() > 1e-4  # the test can tell


def test_numbers_are_those_of_gndet_predict(trained: Path, detector: Detector, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["predict", str(trained), str(folder), "--out", str(out), "model.box_head.score_threshold=0.01"]
    assert main([*words, "evaluation.images_per_gpu=2"]) == 0
    written = json.loads((out / "predictions.json").read_text())
    found = list(detector.predict(folder, 0.0, batch=2))
    assert [row for n, one in enumerate(found, start=1) for row in one.to_coco(n)] == written
    assert [one.path.name for one in found] == [f"{n}.png" for n in range(5)]
    results = COCO(str(out / "images.json")).loadRes(found[0].to_coco(np.int64(1)))
    assert len(results.anns) == len(found[0]) > 3


def test_a_threshold_keeps_the_best_and_changes_none(detector: Detector, pictures: list[np.ndarray]) -> None:
    everything = detector.predict(pictures[0], 0.0)
    assert (np.diff(everything.scores) <= 0).all()
    threshold = float(np.median(everything.scores))
    some = detector.predict(pictures[0], threshold)
    assert_equal(some, everything[everything.scores >= threshold])
    assert 0 < len(some) < len(everything)


def test_nothing_changes_in_the_model_nor_in_the_picture(detector: Detector, pictures: list[np.ndarray]) -> None:
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    picture, random = pictures[1].copy(), torch.get_rng_state()
    expected = detector.predict(picture, 0.0)
    expected.draw()
    detector.model.train()
    detector.model.backbone.eval()
    try:
        assert_equal(detector.predict(picture, 0.0), expected)
        assert detector.model.training and not detector.model.backbone.training
    finally:
        detector.model.eval()
    assert torch.equal(torch.get_rng_state(), random) and np.array_equal(picture, pictures[1])
    assert all(torch.equal(before[key], value) for key, value in detector.model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in detector.model.parameters())


def test_threads_find_what_one_finds(detector: Detector, folder: Path, pictures: list[np.ndarray]) -> None:
    expected = [detector.predict(picture, 0.0) for picture in pictures]
    found: dict[int, Prediction] = {}

    def work(first: int) -> None:
        for place in range(first, len(pictures), 2):
            source = pictures[place] if place % 2 else folder / f"{place}.png"
            found[place] = detector.predict(source, 0.0)

    limit = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS
    for place, one in enumerate(expected):
        assert_equal(found[place], one)


# --- folders, patterns, videos


def test_a_folder_is_read_as_the_iterator_goes(trained: Path, folder: Path) -> None:
    found = load(trained, model=LOW, data={"workers": 0}).predict(folder, 0.0, batch=1)
    next(found)
    (folder / "4.png").unlink()
    with pytest.warns(UserWarning, match=r"left out: .*4\.png"):
        assert [one.path.name for one in found] == ["1.png", "2.png", "3.png"]


def test_a_folder_and_a_pattern_give_an_iterator(detector: Detector, folder: Path, pictures: list[np.ndarray]) -> None:
    pattern = detector.predict(str(folder / "[0-2].png"), 0.0)
    assert isinstance(pattern, Iterator) and [one.path.name for one in pattern] == ["0.png", "1.png", "2.png"]
    (folder / "notes.txt").write_text("mine")
    (folder / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"passed over 1 \.txt|left out: .*3\.png") as told:
        rest = detector.predict(folder, 0.0, batch=1)
    assert len(told) == 2
    assert_equal(next(rest), detector.predict(pictures[0], 0.0))
    assert [one.path.name for one in rest] == ["1.png", "2.png", "4.png"]
    with pytest.raises(DataError, match="no pictures in this folder"):
        detector.predict(folder.parent)


def test_a_video_gives_its_frames(detector: Detector, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    pytest.importorskip("av")
    from gndet.evaluation.video import read_frames, video_writer

    with video_writer(tmp_path / "a.mp4", 10) as append:
        for number in range(7):
            append(pictures[1], number / 10)
    frames = list(read_frames(tmp_path / "a.mp4", 3))
    found = list(detector.predict(tmp_path / "a.mp4", 0.0, batch=2, every=3))
    assert [one.seconds for one in found] == pytest.approx([0, 0.3, 0.6], abs=1e-3)
    assert {one.path for one in found} == {tmp_path / "a.mp4"} and "a.mp4 at 0.30 s" in repr(found[1])
    assert_equal(found[2], detector.predict(frames[2].pixels, 0.0, batch=1))
    assert np.array_equal(pickle.loads(pickle.dumps(found[2])).load(), frames[2].pixels)


# --- a Prediction as a container


def test_indexing_keeps_all_fields_together(detector: Detector, pictures: list[np.ndarray]) -> None:
    found = detector.predict(pictures[0], 0.0)
    some = found.scores > np.median(found.scores)
    name = found.names[0]
    for chosen, index in (
        (found[some], some), (found[some.tolist()], some), (found[torch.from_numpy(some)], some), (found[1:3], [1, 2]),
        (found[[2, 0]], [2, 0]), (found[np.array([-1])], [-1]), (found[[]], []),
        (found[name], found.labels == detector.classes.index(name)),
    ):  # fmt: skip
        for field in FIELDS:
            expected = getattr(found, field)[np.array(index, dtype=bool if len(index) == len(found) else int)]
            assert np.array_equal(getattr(chosen, field), expected), (index, field)
        assert (chosen.path, chosen.size, chosen.classes) == (found.path, found.size, found.classes)
    assert name in found and "cat" not in found
    with pytest.raises(ConfigError, match=r"'dsic' is not a class.*did you mean 'disc'\? It knows disc, box"):
        found["dsic"]
    for wrong in (99, np.ones(2, dtype=bool), True, [[0]]):
        with pytest.raises(IndexError):
            found[wrong]


def test_iteration_yields_dicts_as_pipelines_of_hugging_face_do(detector: Detector, pictures: list) -> None:
    found = detector.predict(pictures[0], 0.0)
    rows = list(found)
    assert len(rows) == len(found) and found[0] == rows[0] and found[-1] == rows[-1]
    assert rows[1]["label"] == found.names[1] and rows[1]["score"] == found.scores[1]
    assert list(rows[1]["box"]) == ["xmin", "ymin", "xmax", "ymax"]
    assert list(rows[1]["box"].values()) == found.boxes[1].tolist()


@pytest.mark.parametrize("masks", [True, False])
def test_nothing_found_keeps_shapes_and_types(
    detector: Detector, boxes_only: Detector, pictures: list[np.ndarray], masks: bool, tmp_path: Path
) -> None:
    found = (detector if masks else boxes_only).predict(pictures[1], 1.0)
    for part in (found, found[[]], pickle.loads(pickle.dumps(found))):
        assert len(part) == 0 and part.names == list(part) == part.to_coco(1) == []
        assert (part.boxes.shape, part.boxes.dtype) == ((0, 4), np.float32)
        assert (part.scores.shape, part.scores.dtype) == ((0,), np.float32)
        assert (part.labels.shape, part.labels.dtype) == ((0,), np.int64)
        assert (part.masks.shape, part.masks.dtype) == ((0, 64, 120), bool) if masks else part.masks is None
    tensors = found.to_torchvision()
    assert tensors["boxes"].shape == (0, 4) and ("masks" in tensors) == masks
    assert found.draw().size == (640, 341) and repr(found) == "<Prediction of 0 in 64 x 120: nothing>"
    found.to_yolo(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == ""


def test_a_detector_of_boxes_finds_the_same_boxes(detector: Detector, boxes_only: Detector, pictures: list) -> None:
    one, two = detector.predict(pictures[0], 0.0), boxes_only.predict(pictures[0], 0.0)
    assert two.masks is None and two.names == one.names and np.array_equal(one.boxes, two.boxes)


def test_copies_and_pickles_are_equal_and_hold_no_pasted_masks(
    detector: Detector, folder: Path, pictures: list[np.ndarray]
) -> None:
    for source in (folder / "1.png", pictures[1]):
        found = detector.predict(source, 0.0)
        small = len(pickle.dumps(found))
        assert found.masks.nbytes > 0
        assert len(pickle.dumps(found)) == small
        for twin in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found)):
            assert_equal(found, twin)
            assert np.array_equal(np.asarray(found.draw()), np.asarray(twin.draw()))


def test_repr_is_one_line(detector: Detector) -> None:
    found = made_up((6, 8), [np.eye(6, 8, dtype=bool)] * 6)
    assert repr(found) == "<Prediction of 6 in 6 x 8: disc 0.90, box 0.90, disc 0.90, box 0.90, ...>"
    assert repr(detector) == "<Detector of 4 classes, mask_rcnn, gn, cpu>"


# --- drawn, and written


def test_it_draws_what_gndet_predict_draws(trained: Path, detector: Detector, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["predict", str(trained), str(folder / "1.png"), "--out", str(out), "--threshold", "0.02"]
    assert main([*words, "model.box_head.score_threshold=0.01"]) == 0
    found = detector.predict(folder / "1.png", 0.02)
    drawn = found.draw(tmp_path / "new" / "mine.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(out / "1.png")))
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(tmp_path / "new" / "mine.png")))
    assert Image.open(io.BytesIO(found._repr_png_())).size == drawn.size
    (folder / "1.png").unlink()
    assert found._repr_png_() is None
    with pytest.raises(DataError, match=r"1\.png"):
        found.draw()


def test_no_file_of_the_user_is_replaced(detector: Detector, folder: Path, tmp_path: Path) -> None:
    found = detector.predict(folder / "1.png", 0.02)
    picture = (folder / "1.png").read_bytes()
    with pytest.raises(OutputError, match=r"1\.png"):
        found.draw(folder / "1.png")
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(OutputError, match=r"to_labelme .*mine\.json: exists"):
        found.to_labelme(tmp_path / "mine.json")
    with pytest.raises(OutputError, match=r"to_yolo .*mine\.txt: exists"):
        found.to_yolo(tmp_path / "mine.txt")
    with pytest.raises(OutputError, match=r"a\.xyz: cannot write it"):
        found.draw(tmp_path / "a.xyz")
    found.draw(tmp_path / "drawn.png")
    again = detector.predict(tmp_path / "drawn.png", 0.02)
    with pytest.raises(OutputError, match=r"draw .*drawn\.png: is among your data"):
        again.draw(tmp_path / "drawn.png")
    found[:1].draw(tmp_path / "drawn.png")  # gndet's own
    (tmp_path / "drawn.png").unlink()
    assert (folder / "1.png").read_bytes() == picture and (tmp_path / "mine.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mine.json", "mine.txt"]


def test_a_drawing_of_gndet_is_drawn_again_but_not_onto_its_own_picture(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    for name in ("a.png", "b.jpg", "a.png", "b.jpg"):
        detector.predict(folder / "1.png").draw(tmp_path / name)
    with pytest.raises(OutputError, match=r"a\.webp: cannot write it, expected a name that ends in \.png, \.jpg"):
        detector.predict(folder / "1.png").draw(tmp_path / "a.webp")
    drawn = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OutputError, match=r"draw .*a\.png: is among your data"):
        detector.predict(tmp_path / "a.png").draw(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(drawn[:-1] + b"?" * 20_000)  # damaged, and still known by its start
    detector.predict(folder / "1.png").draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == drawn


# --- other libraries


def test_supervision_takes_it(detector: Detector, boxes_only: Detector, pictures: list[np.ndarray]) -> None:
    supervision = pytest.importorskip("supervision")
    found = detector.predict(pictures[0], 0.0)
    taken = found.to_supervision()
    assert np.array_equal(taken.xyxy, found.boxes) and np.array_equal(taken.mask, found.masks)
    assert taken.data["class_name"].tolist() == found.names and np.array_equal(taken.class_id, found.labels)
    assert len(taken[taken.confidence > np.median(found.scores)]) == (found.scores > np.median(found.scores)).sum()
    drawn = supervision.BoxAnnotator().annotate(pictures[0].copy(), taken)
    assert (drawn != pictures[0]).any()
    other = supervision.Detections.from_transformers(found.to_torchvision())
    assert np.array_equal(other.xyxy, found.boxes) and np.array_equal(other.mask, found.masks)
    assert boxes_only.predict(pictures[0], 0.0).to_supervision().mask is None
    assert len(detector.predict(pictures[0], 1.0).to_supervision()) == 0


def test_torchmetrics_scores_it_as_perfect_against_itself(detector: Detector, pictures: list[np.ndarray]) -> None:
    detection = pytest.importorskip("torchmetrics.detection")
    found = [detector.predict(picture, 0.0)[:5].to_torchvision() for picture in pictures]
    assert found[0]["masks"].shape == (5, 1, 96, 96) and found[0]["masks"].dtype == torch.bool
    found = [one | {"masks": one["masks"].squeeze(1)} for one in found]
    for kind in ("bbox", "segm"):
        metric = detection.MeanAveragePrecision(iou_type=kind)
        metric.update(found, found)
        assert metric.compute()["map_50"] == pytest.approx(1)


def blobs(number: int) -> list[np.ndarray]:
    """Return masks (48, 60) of several parts and holes."""
    random = np.random.default_rng(0)
    rough = random.random((number, 12, 15)) < 0.5
    return [np.kron(one, np.ones((4, 4), dtype=bool)) for one in rough]


def drawn_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    codes = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *size)
    return coco_mask.decode(coco_mask.merge(codes)).astype(bool)


def test_labelme_gets_polygons_that_draw_the_masks_again(tmp_path: Path) -> None:
    found = made_up((48, 60), [*blobs(4), np.zeros((48, 60), dtype=bool)])
    found.to_labelme(tmp_path / "labels" / "a.json")
    content = json.loads((tmp_path / "labels" / "a.json").read_text(encoding="utf-8"))
    assert (content["imageHeight"], content["imageWidth"], content["imagePath"]) == (48, 60, "a.png")
    embedded = Image.open(io.BytesIO(base64.b64decode(content["imageData"])))
    assert np.array_equal(np.asarray(embedded), found.load())
    shapes = content["shapes"]
    assert {shape["label"] for shape in shapes if shape["group_id"] == 1} == {"box"}
    for number, mask in enumerate(found.masks[:4]):
        polygons = [np.array(shape["points"]) for shape in shapes if shape["group_id"] == number]
        assert len(polygons) > 1 and np.array_equal(drawn_polygons(polygons, (48, 60)), mask)
    assert shapes[-1]["shape_type"] == "rectangle"  # a mask without a pixel


def test_labelme_names_the_picture_beside_it(detector: Detector, boxes_only: Detector, folder: Path) -> None:
    for model in (detector, boxes_only):
        found = model.predict(folder / "1.png", 0.0)
        file = folder.parent / f"labels-{found.masks is None}" / "1.json"
        found.to_labelme(file)
        content = json.loads(file.read_text())
        assert (file.parent / content["imagePath"]).samefile(folder / "1.png") and content["imageData"] is None
    assert [shape["shape_type"] for shape in content["shapes"]] == ["rectangle"] * len(found)
    assert np.allclose([np.ravel(shape["points"]) for shape in content["shapes"]], found.boxes)


def test_yolo_rows_draw_the_masks_again_and_hold_the_boxes(
    boxes_only: Detector, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    found = made_up((48, 60), blobs(6))
    found.to_yolo(tmp_path / "a.txt")
    for row, mask, label in zip((tmp_path / "a.txt").read_text().splitlines(), found.masks, found.labels, strict=True):
        first, *numbers = row.split()
        polygon = np.array(numbers, dtype=float).reshape(-1, 2) * (60, 48)
        assert int(first) == label and np.array_equal(drawn_polygons([polygon], (48, 60)), mask)
    plain = boxes_only.predict(pictures[1], 0.0)
    plain.to_yolo(tmp_path / "b.txt")
    rows = np.loadtxt(tmp_path / "b.txt")
    centers = rows[:, 1:3] * (120, 64)
    halves = rows[:, 3:] * (120, 64) / 2
    assert np.allclose(np.hstack((centers - halves, centers + halves)), plain.boxes, atol=1e-3)
    assert np.array_equal(rows[:, 0], plain.labels)


@pytest.mark.parametrize("form", ["labelme", "yolo"])
@pytest.mark.parametrize("masks", [True, False])
def test_its_labels_are_read_as_a_data_set(
    detector: Detector, boxes_only: Detector, folder: Path, form: str, masks: bool
) -> None:
    """Objects whose mask has no pixel are left out: they are written as their boxes."""
    found = list((detector if masks else boxes_only).predict(folder, 0.0))
    found = [one[one.results.areas > 0] for one in found] if masks else found
    for one in found:
        file = one.path.with_suffix(".json" if form == "labelme" else ".txt")
        (one.to_labelme if form == "labelme" else one.to_yolo)(file)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in detector.classes))
    data = DataConfig(root=str(folder), cache="")
    dataset = read_dataset(DatasetConfig(kind=form), data)
    assert len(dataset.records) == len(found)
    for one, record in zip(found, dataset.records, strict=True):
        assert record.size == one.size and sorted(one.names) == sorted(dataset.classes[n] for n in record.labels)
        if masks:
            read = sorted(coco_mask.decode(to_rle(mask, one.size)).tobytes() for mask in record.segmentations)
            assert read == sorted(mask.tobytes() for mask in one.masks)
        else:
            assert np.allclose(np.sort(record.boxes, axis=0), np.sort(one.boxes, axis=0), atol=1e-3)


# --- memory


def test_only_masks_holds_all_masks_at_once(tmp_path: Path) -> None:
    """200 masks of 700 x 800 would take 112 MB."""
    mask = np.zeros((700, 800), dtype=bool)
    mask[100:200, 100:200] = True
    found = made_up((700, 800), [mask] * 200)
    tracemalloc.start()
    found.to_coco(1)
    found.to_yolo(tmp_path / "a.txt")
    found.to_labelme(tmp_path / "a.json")
    pickle.dumps(found[found.scores > 0.5])
    found.draw()
    found._repr_png_()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"
    assert found.masks.nbytes == 112_000_000
