"""Pictures and objects move together; a mask in the frame of its box is the mask of the whole image."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data.batches import crops, transforms
from gndet.data.datasets.reading import read_dataset
from gndet.data.datasets.segmentation import box_frame_masks, into_frames, to_rle
from gndet.data.records import MASK_SIDE, Dataset, Record
from gndet.errors import DataError

PLAIN = DataConfig(shortest_edge=(96,), flip=0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return read_dataset(DatasetConfig(kind="shapes", count=12, size=96), DataConfig())


def make_record(boxes: list[list[float]], segmentations: list, size: tuple[int, int] = (40, 60)) -> Record:
    number = len(boxes)
    return Record(
        image_id=1,
        file_name="made.png",
        size=size,
        load=functools.partial(np.zeros, (*size, 3), np.uint8),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.arange(number),
        crowd=np.zeros(number, dtype=bool),
        area=np.ones(number),
        annotation_ids=np.arange(11, 11 + number),
        segmentations=segmentations,
    )


def paste(frame: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Put a mask back into the image: every pixel takes the value of the frame's cell that contains its center."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    column = np.floor((x - box[0]) / (box[2] - box[0]) * frame.shape[1]).astype(int)
    row = np.floor((y - box[1]) / (box[3] - box[1]) * frame.shape[0]).astype(int)
    inside = (column >= 0) & (column < frame.shape[1]) & (row >= 0) & (row < frame.shape[0])
    return inside & frame[row.clip(0, frame.shape[0] - 1), column.clip(0, frame.shape[1] - 1)]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.mark.parametrize(
    ("name", "file", "images"),
    [
        ("coco-tiny", "instances_val2017.json", "val2017"),
        ("nuclei", "instances_val.json", "val"),
    ],
)
def test_frame_masks_pasted_back_are_the_full_size_masks(data_root: Path, name: str, file: str, images: str) -> None:
    data = DataConfig(root=str(data_root / name))
    dataset = read_dataset(DatasetConfig(annotations=f"annotations/{file}", images=images), data)
    overlaps = []
    for record in dataset.records[:20]:
        keep = np.flatnonzero(~record.crowd & (record.area > 100))[:20]
        boxes = record.boxes[keep].clip(0, np.tile(record.size[::-1], 2))
        segmentations = [record.segmentations[k] for k in keep]
        frames = box_frame_masks(segmentations, boxes, record.size, MASK_SIDE)
        for frame, box, segmentation in zip(frames, boxes, segmentations, strict=True):
            truth = coco_mask.decode(to_rle(segmentation, record.size)).astype(bool)
            overlaps.append(iou(paste(frame, box, record.size), truth))
    assert len(overlaps) > 100
    assert np.mean(overlaps) > 0.97 and np.quantile(overlaps, 0.01) > 0.85


def test_polygons_and_rles_of_one_mask_agree() -> None:
    size, outline = (200, 300), np.array([[20.3, 30.2], [250.8, 40.1], [220.5, 180.6], [100.2, 90.9]])
    polygons, box = [outline.ravel().tolist()], np.concatenate((outline.min(0), outline.max(0)))
    rle = to_rle(polygons, size)
    uncompressed = {"size": list(size), "counts": []}
    flat = coco_mask.decode(rle).T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    uncompressed["counts"] = np.diff([0, *edges, flat.size]).tolist()
    a, b, c = box_frame_masks([polygons, rle, uncompressed], np.tile(box, (3, 1)), size, MASK_SIDE)
    assert np.array_equal(b, c) and iou(a, b) > 0.98


def test_a_frame_has_no_half_pixel_shift() -> None:
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    mask[10:20, 30:50] = 1
    box = np.array([[20.0, 10, 60, 30]])  # the object fills columns 1/4 to 3/4 and rows 0 to 1/2 of it
    corners = [30, 10, 50, 10, 50, 20, 30, 20]
    truth = np.zeros((MASK_SIDE, MASK_SIDE), dtype=bool)
    truth[: MASK_SIDE // 2, MASK_SIDE // 4 : MASK_SIDE * 3 // 4] = True
    assert np.array_equal(box_frame_masks([[corners]], box, (40, 60), MASK_SIDE)[0], truth)
    sampled = box_frame_masks([coco_mask.encode(mask)], box, (40, 60), MASK_SIDE)[0]
    assert np.array_equal(sampled[28], truth[28]) and np.array_equal(sampled[:, 56], truth[:, 56])
    assert (sampled != truth).sum() < 20  # bilinear sampling rounds the four corners


def test_rles_are_sampled_as_roi_align_samples() -> None:
    rng = np.random.default_rng(1)
    for size in ((37, 53), (1, 9), (60, 2)):
        mask = rng.random(size) < 0.5
        corners = np.sort(rng.uniform(0, 1, (8, 2, 2)), axis=1)  # (8, from and to, x and y)
        boxes = (corners * size[::-1]).reshape(8, 4)
        boxes[0] = (0, 0, *size[::-1])
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        found = box_frame_masks([rle] * len(boxes), boxes, size, 20)
        regions = torch.cat((torch.zeros(8, 1), torch.from_numpy(boxes)), 1)
        maps = torch.from_numpy(mask)[None, None].double()
        truth = roi_align(maps, regions, 20, sampling_ratio=1, aligned=True)[:, 0]
        clear = (truth - 0.5).abs() > 1e-9
        assert torch.equal(torch.from_numpy(found)[clear], (truth >= 0.5)[clear])


def test_a_polygon_far_larger_than_its_box_is_drawn_too() -> None:
    polygons, box = [[0, 0, 60, 0, 60, 40, 0, 40]], np.array([10.0, 10, 10.001, 10.001])
    near = np.array([0.0, 0, 60, 40])
    far_one, near_one = into_frames([polygons, polygons], np.stack((box, near)), MASK_SIDE)
    assert far_one is None  # 6 million pixels wide there
    assert near_one is not None
    masks = box_frame_masks([polygons, polygons], np.stack((box, near)), (40, 60), MASK_SIDE)
    assert masks[0].all() and masks[1].mean() > 0.98


def test_objects_drawn_together_are_those_drawn_alone() -> None:
    rng = np.random.default_rng(0)
    outlines, boxes = [], []
    for number in range(300):  # more than 8 bits can count
        center, parts = rng.uniform(20, 80, 2), 1 + number % 3
        outlines.append([(center + rng.normal(0, 8, (rng.integers(3, 9), 2))).ravel().tolist() for _ in range(parts)])
        boxes.append(np.concatenate((center - rng.uniform(4, 12, 2), center + rng.uniform(4, 12, 2))))
    outlines[7] = to_rle(outlines[7], (100, 100))
    boxes[9] = np.array([50.0, 50, 50.01, 50.01])  # its polygons reach too far out of it
    together = box_frame_masks(outlines, np.stack(boxes), (100, 100), 32)
    for index, (outline, box) in enumerate(zip(outlines, boxes, strict=True)):
        assert np.array_equal(together[index], box_frame_masks([outline], box[None], (100, 100), 32)[0])
        if index not in (7, 9):
            truth = np.zeros((32, 32), dtype=np.uint8)
            for polygon in outline:
                moved = (np.reshape(polygon, (-1, 2)) - box[:2]) * (32 / (box[2:] - box[:2]))
                truth |= coco_mask.decode(coco_mask.frPyObjects([moved.ravel().tolist()], 32, 32))[..., 0]
            assert np.array_equal(together[index], truth)
    assert box_frame_masks([], np.zeros((0, 4)), (100, 100), 32).shape == (0, 32, 32)


def test_resize_keeps_the_ratio_and_both_limits() -> None:
    assert crops.resized((480, 640), 800, 1333) == (800, 1067)  # as detectron2's ResizeShortestEdge
    assert crops.resized((640, 480), 800, 1333) == (1067, 800)
    assert crops.resized((427, 1000), 800, 1333) == (569, 1333)
    assert crops.resized((1, 5000), 800, 1333) == (1, 1333)


def test_resize_equals_pillow_within_rounding(dataset: Dataset) -> None:
    record = dataset.records[0]
    image = transforms.train_sample(record, DataConfig(shortest_edge=(150,), flip=0), 1, False).image
    truth = np.asarray(Image.fromarray(record.load()).resize((150, 150), Image.Resampling.BILINEAR))
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(truth.astype(np.int32))).abs().max() <= 1


@pytest.mark.parametrize("capability", ["as it is", "NO AVX"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(31, 47), (80, 63), (1, 200), (40, 60)])
@pytest.mark.parametrize("layout", ["as a picture", "flipped", "a channel after the other"])
def test_resize_is_torchvisions(
    layout: str, size: tuple[int, int], antialias: bool, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).permute(2, 0, 1)
    image = {"as a picture": image, "flipped": image.flip(2)}.get(layout, image.contiguous())
    if capability == "NO AVX":  # torch then resizes floats
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = crops.resize(image, size, antialias)
    expected = functional.resize(image, list(size), antialias=antialias)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_boxes_are_scaled_clipped_and_dropped_when_empty() -> None:
    record = make_record([[-5, 10, 20, 50], [59.9999, 0, 70, 5], [0, 0, 60, 40]], [None] * 3)
    sample = transforms.train_sample(record, DataConfig(shortest_edge=(80,), flip=0), 1, False)
    assert sample.boxes.tolist() == [[0, 20, 40, 80], [0, 0, 120, 80]]
    assert sample.labels.tolist() == [0, 2]
    assert sample.image.shape == (3, 80, 120) and sample.masks.shape == (2, 0, 0)


@pytest.mark.parametrize(("option", "axis"), [("flip", -1), ("flip_vertical", -2)])
def test_a_flip_moves_picture_boxes_and_masks_together(dataset: Dataset, option: str, axis: int) -> None:
    for record in dataset.records:
        plain = transforms.train_sample(record, PLAIN, 1, True)
        flipped = transforms.train_sample(record, PLAIN.model_copy(update={option: 1.0}), 1, True)
        assert torch.equal(flipped.image.flip(axis), plain.image)
        assert torch.equal(flipped.masks.flip(axis), plain.masks)
        low, high = (0, 2) if axis == -1 else (1, 3)
        back = flipped.boxes.clone()
        back[:, low], back[:, high] = 96 - flipped.boxes[:, high], 96 - flipped.boxes[:, low]
        assert torch.allclose(back, plain.boxes)


@pytest.mark.parametrize(("option", "axis"), [("flip", -1), ("flip_vertical", -2)])
@pytest.mark.parametrize("edge", [70, 133])
def test_flipping_then_resizing_equals_resizing_then_flipping(
    dataset: Dataset, option: str, axis: int, edge: int
) -> None:
    data = PLAIN.model_copy(update={"shortest_edge": (edge,)})
    for record in dataset.records:
        plain = transforms.train_sample(record, data, 1, False).image
        flipped = transforms.train_sample(record, data.model_copy(update={option: 1.0}), 1, False).image
        assert torch.equal(flipped.flip(axis), plain)


def test_masks_lie_on_the_objects_after_resize_and_flips(dataset: Dataset) -> None:
    data = DataConfig(shortest_edge=(192,), flip=1, flip_vertical=1)
    for record in dataset.records:
        sample = transforms.train_sample(record, data, 1, True)
        masks = coco_mask.decode(record.segmentations)[::-1, ::-1].repeat(2, 0).repeat(2, 1)  # (192, 192, n)
        for k, box in enumerate(sample.boxes.numpy()):
            assert iou(paste(sample.masks[k].numpy(), box, (192, 192)), masks[..., k].astype(bool)) > 0.9


def test_augmentation_is_a_function_of_the_key(dataset: Dataset) -> None:
    data = DataConfig(shortest_edge=(64, 96, 128), flip=0.5)
    samples = [transforms.train_sample(dataset.records[0], data, key, False) for key in range(200)]
    again = transforms.train_sample(dataset.records[0], data, 17, False)
    assert torch.equal(again.image, samples[17].image) and torch.equal(again.boxes, samples[17].boxes)
    edges = [sample.image.shape[1] for sample in samples]
    assert all(40 < edges.count(edge) < 95 for edge in data.shortest_edge)
    kinds = {(sample.image.shape[1], sample.boxes.sum().item()) for sample in samples}
    assert len(kinds) == 6  # three sizes, flipped and not


def test_crowd_regions_are_left_out() -> None:
    record = make_record([[0, 0, 9, 9], [5, 5, 20, 20]], [None, [[5, 5, 20, 5, 20, 20]]])
    sample = transforms.train_sample(record._replace(crowd=np.array([True, False])), PLAIN, 1, True)
    assert sample.labels.tolist() == [1] and sample.masks.shape == (1, MASK_SIDE, MASK_SIDE)


def test_an_object_without_mask_is_named() -> None:
    record = make_record([[0, 0, 9, 9], [5, 5, 20, 20]], [[[0, 0, 9, 0, 9, 9]], None])
    with pytest.raises(DataError, match=r"made\.png: annotation 12 .*model\.masks=false"):
        transforms.train_sample(record, PLAIN, 1, True)
    assert len(transforms.train_sample(record, PLAIN, 1, False).labels) == 2


def test_evaluation_resizes_and_gives_no_object(dataset: Dataset) -> None:
    sample = transforms.test_sample(dataset.records[0], DataConfig(shortest_edge_test=120, flip=1))
    assert sample.image.shape == (3, 120, 120)
    assert sample.boxes.shape == (0, 4) and sample.labels.shape == (0,) and sample.masks.shape == (0, 0, 0)
    plain = transforms.test_sample(dataset.records[0], DataConfig(shortest_edge_test=96))
    assert np.array_equal(plain.image.permute(1, 2, 0).numpy(), dataset.records[0].load())
