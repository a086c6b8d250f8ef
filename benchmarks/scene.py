"""Make synthetic pictures with objects, and boxes near the objects, the same for every toolkit.

An untrained network proposes almost no region on an object, which would leave the mask head without work.  So boxes
near the objects come first among the proposals, as from a trained network, and random boxes fill up the rest.
M objects, K proposals, (H, W) picture.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTS = 8  # per picture
NEAR = 160  # proposals near an object: more than the 128 positive regions that are sampled
PROPOSALS = 1000
CLASSES = 80
CATEGORIES = [{"id": label + 1, "name": f"class {label}"} for label in range(CLASSES)]  # as in COCO's files
CORNERS = 24  # of an object's outline


class Scene(NamedTuple):
    """A picture, its objects, and proposals."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (M, 4) float32 xyxy pixels
    labels: Tensor  # (M,) int64 in [0, CLASSES)
    polygons: list[list[list[float]]]  # M objects of one outline each, [x0, y0, x1, y1, ...]
    near: Tensor  # (K, 4) float32 xyxy: NEAR near objects, then random ones

    def bitmaps(self) -> Tensor:
        """Return the objects' masks at the picture's size, (M, H, W) uint8."""
        size = self.image.shape[1:]
        drawn = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(lines, *size))) for lines in self.polygons]
        return torch.from_numpy(np.stack(drawn))

    def annotations(self, image_id: int, first_id: int) -> list[dict[str, Any]]:
        """Return the objects as in a COCO file, numbered from first_id on."""
        objects = zip(self.boxes.tolist(), self.labels.tolist(), self.polygons, strict=True)
        return [
            {
                "id": number, "image_id": image_id, "category_id": label + 1, "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "segmentation": polygons,
            }
            for number, ((x0, y0, x1, y1), label, polygons) in enumerate(objects, start=first_id)
        ]  # fmt: skip


def make_scenes(size: tuple[int, int], num: int, seed: int) -> list[Scene]:
    """Return num scenes of size (height, width); the same seed gives the same scenes."""
    return [_scene(size, np.random.default_rng([seed, number])) for number in range(num)]


def _scene(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    height, width = size
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, height // 16 + 1, width // 16 + 1)).astype(np.float32))
    smooth = F.interpolate(coarse, size=size, mode="bilinear")[0]
    image = (smooth + torch.from_numpy(rng.normal(0, 8, (3, height, width)).astype(np.float32))).clamp(0, 255)
    sides = np.exp(rng.uniform(math.log(20), math.log(0.6 * width), (OBJECTS, 1)))
    sides = np.concatenate([sides, (sides * rng.lognormal(0, 0.4, sides.shape)).clip(16, 0.8 * height)], axis=1)
    center = rng.uniform(sides / 2, np.array([width, height]) - sides / 2)  # (M, 2)
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = 0.5 + 0.07 * rng.normal(size=(OBJECTS, CORNERS, 1)).clip(-1, 1)
    outlines = center[:, None] + sides[:, None] * radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outlines = outlines.clip(0, [width, height])  # (M, CORNERS, 2)
    boxes = np.concatenate([outlines.min(1), outlines.max(1)], axis=1)
    return Scene(
        image.to(torch.uint8), torch.from_numpy(boxes).float(), torch.from_numpy(rng.integers(0, CLASSES, OBJECTS)),
        [[outline.ravel().tolist()] for outline in outlines], torch.from_numpy(_proposals(boxes, size, rng)).float(),
    )  # fmt: skip


def _proposals(boxes: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return boxes (K, 4): NEAR boxes slightly shifted from objects (M, 4), then random boxes."""
    corner = np.array(size[::-1] * 2)
    chosen = boxes[rng.integers(0, len(boxes), NEAR)]
    near = chosen + 0.05 * np.tile(chosen[:, 2:] - chosen[:, :2], 2) * rng.normal(size=chosen.shape)
    ends = rng.uniform(0, corner, (PROPOSALS - NEAR, 4)).reshape(-1, 2, 2)
    random = np.concatenate([ends.min(1), ends.max(1) + 4], axis=1)
    return np.concatenate([near, random]).clip(0, corner)
