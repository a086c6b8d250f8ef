"""The data that flows between parts, as NamedTuples (pytree, DDP, pin_memory and torch.compile support them).

Letters used throughout the project: B images, M ground-truth slots, N anchors or candidates, R regions per image,
P positive regions per image, D detections, C channels, L levels, S mask side, (H, W) canvas.
Boxes are xyxy float32 pixels, sizes are (height, width), labels lie in [0, num_classes).
"""

from typing import NamedTuple

from torch import Tensor

GROUND_TRUTH_IDS = 7 << 28  # ids of ground-truth boxes start here, above those of anchors and below 2**31


class GroundTruth(NamedTuple):
    """Objects of a batch, padded to M slots; a slot with valid == False may hold anything, even NaN."""

    boxes: Tensor  # (B, M, 4) float32 xyxy in canvas pixels
    labels: Tensor  # (B, M) int64 in [0, num_classes)
    masks: Tensor  # (B, M, S, S) bool, each in the frame of its own box; S = 0 if masks are off
    valid: Tensor  # (B, M) bool


class Batch(NamedTuple):
    """Images on one canvas with their objects: everything that a training step sees."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, each picture in the top-left corner of the canvas
    sizes: Tensor  # (B, 2) int64 height, width of the picture inside the canvas
    keys: Tensor  # (B,) int64: hash of (seed, epoch, image id), the only source of randomness for an image
    gt: GroundTruth
    padded: bool  # False only if every picture fills the canvas (then no norm needs a mask)
    # (B, M) float32, of mixed pictures: each object's share of the class, 0 in empty slots
    shares: Tensor | None = None


class Anchors(NamedTuple):
    """The anchors of L levels, N_l on each level."""

    boxes: list[Tensor]  # L x (N_l, 4) float32 xyxy in canvas pixels
    ids: list[Tensor]  # L x (N_l,) int64: encodes level, row, column and kind, independent of the canvas
    inside: list[Tensor]  # L x (B, N_l) bool: whether the anchor's cell belongs to the picture


class AnchorSample(NamedTuple):
    """Anchors sampled for the RPN's losses; positives come first."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index; (B, R) int64 into the anchors of all levels
    ids: Tensor  # (B, R) int64, Anchors.ids
    targets: Tensor  # (B, R, 4) float32 regression targets, meaningful if positive
    positive: Tensor  # (B, R) bool
    valid: Tensor  # (B, R) bool


class Proposals(NamedTuple):
    """Regions that the RPN proposes, by descending score, padded to K slots."""

    boxes: Tensor  # (B, K, 4) float32 xyxy in canvas pixels, inside the picture
    ids: Tensor  # (B, K) int64 ids of the anchors they were refined from
    valid: Tensor  # (B, K) bool


class Regions(NamedTuple):
    """Regions of interest to train the heads on; sampled ones have their positives first."""

    boxes: Tensor  # (B, R, 4) float32 xyxy in canvas pixels
    ids: Tensor  # (B, R) int64: the proposal's id, or GROUND_TRUTH_IDS + slot for a ground-truth box
    labels: Tensor  # (B, R) int64; num_classes for background
    matched: Tensor  # (B, R) int64 slot of the ground truth that the region is matched to
    positive: Tensor  # (B, R) bool
    valid: Tensor  # (B, R) bool
    positive_slots: int  # all positives lie in the first positive_slots slots
    features: Tensor | None = None  # (B, R, C, P, P) what the heads share, in a C4 model


class Step(NamedTuple):
    """The result of a training forward: the losses and the sampled anchors, proposals and regions."""

    losses: dict[str, Tensor]  # {name: (B,)}, one loss per image
    anchors: AnchorSample
    proposals: Proposals
    regions: Regions
    later: tuple[Regions, ...] = ()  # the regions of a cascade's later stages


class Detections(NamedTuple):
    """Detections of a batch, by descending score, padded to D slots; S side of a mask: 28, or 14 in a C4 model."""

    boxes: Tensor  # (B, D, 4) float32 xyxy in canvas pixels
    scores: Tensor  # (B, D) float32 in [0, 1]
    labels: Tensor  # (B, D) int64 in [0, num_classes)
    masks: Tensor  # (B, D, S, S) float32 probabilities in the frame of the box; (B, D, 0, 0) if masks are off
    valid: Tensor  # (B, D) bool
