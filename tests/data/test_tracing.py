"""Traced outlines give back the mask that they were traced from."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gndet.data.datasets.tracing import joined, outlines_of, trace


def drawn(outlines: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    polygons = [outline.ravel().tolist() for outline in outlines]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Return the parts of a mask whose pixels touch by their sides, by flooding each."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        part, edge = np.zeros_like(mask), [left.pop()]
        while edge:
            y, x = edge.pop()
            part[y, x] = True
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
        found.append(part)
    return found


def blobs(seed: int) -> np.ndarray:
    """Return noise in lumps of some pixels, its holes filled."""
    rng = np.random.default_rng(seed)
    rough = np.kron(rng.normal(size=(14, 17)), np.ones((3, 3)))[:40, :50] + rng.normal(size=(40, 50)) / 3
    outside = next(part for part in parts(np.pad(rough < 0.3, 1, constant_values=True)) if part[0, 0])
    return ~outside[1:-1, 1:-1]


@pytest.mark.parametrize("seed", range(5))
def test_drawing_the_outlines_gives_the_mask(seed: int) -> None:
    mask = blobs(seed)
    outlines = trace(mask)
    assert len(outlines) == len(parts(mask)) > 3
    assert (drawn(outlines, mask.shape) == mask).all()


@pytest.mark.parametrize("seed", range(5))
def test_one_joined_outline_gives_the_mask(seed: int) -> None:
    mask = blobs(seed)
    assert (drawn([joined(trace(mask))], mask.shape) == mask).all()


def test_pixels_that_touch_by_a_corner_are_two_parts() -> None:
    outlines = trace(np.eye(2, dtype=bool))
    assert [outline.tolist() for outline in outlines] == [
        [[0, 0], [1, 0], [1, 1], [0, 1]], [[1, 1], [2, 1], [2, 2], [1, 2]],
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_noise_with_holes_and_islands_in_them_comes_back(share: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        mask = random.random(random.integers(1, 12, 2)) < share
        outlines = trace(mask)
        assert len(outlines) == len(parts(mask))
        if outlines:
            assert (drawn(outlines, mask.shape) == mask).all()
            assert (drawn([joined(outlines)], mask.shape) == mask).all()


def test_a_hole_is_joined_to_the_border_around_it() -> None:
    mask = np.ones((5, 5), dtype=bool)
    mask[2, 2] = False
    (outline,) = trace(mask)
    assert outline.tolist() == [
        [0, 0], [2, 2], [2, 3], [3, 3], [3, 2], [2, 2], [0, 0], [5, 0], [5, 5], [0, 5],
    ] and (drawn([outline], (5, 5)) == mask).all()  # fmt: skip


def test_nothing_has_no_outline() -> None:
    assert trace(np.zeros((3, 3), dtype=bool)) == []


def test_polygons_stay_as_they_are() -> None:
    assert outlines_of([[0, 0, 9, 0, 9, 9.5]], (10, 10))[0].tolist() == [[0, 0], [9, 0], [9, 9.5]]
