"""What flows between the parts, as NamedTuples (pytree, DDP, pin_memory and torch.compile know them as they are).

Letters used throughout the project: B images, M ground-truth slots, N anchors or candidates, R regions per image,
P positive regions per image, D detections, C channels, L levels, S mask side, (H, W) canvas.
Boxes are xyxy float32 pixels, sizes are (height, width), labels lie in [0, num_classes).
"""

from typing import NamedTuple

from torch import Tensor

GROUND_TRUTH_IDS = 7 << 28  # ids of objects' own boxes start here, above those of anchors and below 2**31


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
    positive_slots: int  # the positives lie in the first so many slots


class Step(NamedTuple):
    """A training forward: its losses, and all that was chosen on the way."""

    losses: dict[str, Tensor]  # {name: (B,)}, one loss per image
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
