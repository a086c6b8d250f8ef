"""What flows between the parts, as NamedTuples (pytree, DDP, pin_memory and torch.compile know them as they are).

Letters used throughout the project: B images, M ground-truth slots, N anchors or candidates, R regions per image,
P positive regions per image, D detections, C channels, L levels, S mask side, (H, W) canvas.
Boxes are xyxy float32 pixels, sizes are (height, width), labels lie in [0, num_classes).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

GROUND_TRUTH_IDS = 7 << 28  # ids of objects' own boxes start here, above those of anchors and below 2**31
MASK_SIDE = 112  # a 28 x 28 mask target sampled from 112 x 112 differs from the full mask in 0.5 % of its pixels


class GroundTruth(NamedTuple):
    """Objects of a batch, padded to M slots; a slot with valid == False may hold anything, NaN too."""

    boxes: Tensor  # (B, M, 4) float32 xyxy in canvas pixels
    labels: Tensor  # (B, M) int64 in [0, num_classes)
    masks: Tensor  # (B, M, S, S) bool, each in the frame of its own box; S = 0 where masks are off
    valid: Tensor  # (B, M) bool


class Batch(NamedTuple):
    """Images on one canvas with their objects: all that a training step sees."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, each picture in the top-left corner of the canvas
    sizes: Tensor  # (B, 2) int64 height, width of the picture inside the canvas
    keys: Tensor  # (B,) int64: hash of (seed, epoch, image id), the only source of randomness for this image
    gt: GroundTruth
    padded: bool  # False promises that every picture fills the canvas (then no norm needs a mask)


class Anchors(NamedTuple):
    """The anchors of L levels, N_l on each."""

    boxes: list[Tensor]  # L x (N_l, 4) float32 xyxy in canvas pixels
    ids: list[Tensor]  # L x (N_l,) int64: names an anchor by level, row, column and kind, whatever the canvas
    inside: list[Tensor]  # L x (B, N_l) bool: its cell belongs to the picture


class AnchorSample(NamedTuple):
    """Anchors sampled for the RPN's losses; positives come first."""

    index: Tensor  # (B, R) int64 into the anchors of all levels
    ids: Tensor  # (B, R) int64, Anchors.ids
    targets: Tensor  # (B, R, 4) float32 regression targets, of use where positive
    positive: Tensor  # (B, R) bool
    valid: Tensor  # (B, R) bool


class Proposals(NamedTuple):
    """Regions that the RPN proposes, by falling score, padded to K slots."""

    boxes: Tensor  # (B, K, 4) float32 xyxy in canvas pixels, inside the picture
    ids: Tensor  # (B, K) int64 of the anchor each was refined from
    valid: Tensor  # (B, K) bool


class Regions(NamedTuple):
    """Regions of interest sampled for the box and mask heads; positives come first."""

    boxes: Tensor  # (B, R, 4) float32 xyxy in canvas pixels
    ids: Tensor  # (B, R) int64: the proposal's, or GROUND_TRUTH_IDS + slot for an object's own box
    labels: Tensor  # (B, R) int64; num_classes for background
    matched: Tensor  # (B, R) int64 slot of the ground truth the region is compared with
    positive: Tensor  # (B, R) bool
    valid: Tensor  # (B, R) bool


class Step(NamedTuple):
    """A training forward: its losses, and all that was chosen on the way."""

    losses: dict[str, Tensor]  # {name: (B,)}, a loss an image
    anchors: AnchorSample
    proposals: Proposals
    regions: Regions


class Detections(NamedTuple):
    """Detections of a batch, by falling score, padded to D slots."""

    boxes: Tensor  # (B, D, 4) float32 xyxy in canvas pixels
    scores: Tensor  # (B, D) float32 in [0, 1]
    labels: Tensor  # (B, D) int64 in [0, num_classes)
    masks: Tensor  # (B, D, 28, 28) float32 probabilities in the frame of the box; (B, D, 0, 0) where masks are off
    valid: Tensor  # (B, D) bool


class Record(NamedTuple):
    """One image of a data set with its n objects as the annotation file gives them (float64, original pixels)."""

    image_id: int
    file_name: str  # for messages and predictions; a drawn image has a made-up name
    size: tuple[int, int]  # height, width in pixels
    load: Callable[[], np.ndarray]  # picklable; returns (height, width, 3) uint8 RGB
    boxes: np.ndarray  # (n, 4) float64 xyxy
    labels: np.ndarray  # (n,) int64 index into Dataset.classes
    crowd: np.ndarray  # (n,) bool: a crowd region, ignored in training, kept in evaluation
    area: np.ndarray  # (n,) float64 pixels, as COCO's evaluation wants it
    annotation_ids: np.ndarray  # (n,) int64 >= 1, unique in the data set
    segmentations: Sequence[
        Any
    ]  # n of: list of flat [x0, y0, x1, y1, ...] polygons, or {"size", "counts"} RLE, or None


class Finding(NamedTuple):
    """One kind of fault of a data set; `gndet.data.faults` holds the kinds."""

    code: str  # like box-outside
    severity: str  # E: training is refused; F: fixed in memory; N: noted
    what: str  # to be read after the count: "boxes wholly outside their image"
    remedy: str
    count: int
    examples: tuple[str, ...]  # the first few, each with id, value and what was expected
    image_ids: tuple[int, ...]  # of the first images that have it, for pictures of them


class Dataset(NamedTuple):
    """A data set that has been read and checked."""

    name: str  # path of the annotation file, or what was drawn
    classes: tuple[str, ...]  # class names; a label is an index into it
    category_ids: tuple[int, ...]  # the file's category id of each class
    records: Sequence[Record]
    findings: tuple[Finding, ...] = ()  # E first, then F, N
    notes: tuple[str, ...] = ()  # lines to be shown where a run starts: what is known of the pictures

    @property
    def fixes(self) -> dict[str, int]:
        """What was mended in memory, counted: {"boxes without area dropped": 2}."""
        return {one.what: one.count for one in self.findings if one.severity == "F"}

    @property
    def refused(self) -> bool:
        """Whether a fault is in it with which nothing is trained or evaluated."""
        return any(one.severity == "E" for one in self.findings)
