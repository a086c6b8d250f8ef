"""A data set that has been read: records, classes, findings.  Without torch, so that `gndet check` starts at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Tell = Callable[[str], None]  # called with a line before a long wait
MASK_SIDE = 112  # a 28 x 28 mask target sampled from 112 x 112 differs from the full mask in 0.5 % of its pixels


class Record(NamedTuple):
    """One image of a data set with its n objects as in the annotation file (float64, original pixels)."""

    image_id: int
    file_name: str  # for messages and predictions; a drawn image has a made-up name
    size: tuple[int, int]  # height, width in pixels
    load: Callable[[], np.ndarray]  # picklable; returns (height, width, 3) uint8 RGB
    boxes: np.ndarray  # (n, 4) float64 xyxy
    labels: np.ndarray  # (n,) int64 index into Dataset.classes
    crowd: np.ndarray  # (n,) bool: a crowd region, ignored in training, kept in evaluation
    area: np.ndarray  # (n,) float64 pixels, as COCO's evaluation expects it
    annotation_ids: np.ndarray  # (n,) int64 >= 1, unique in the data set
    segmentations: Sequence[Any]  # n: lists of flat [x0, y0, x1, y1, ...] polygons, {"size", "counts"} RLEs, or None


class Finding(NamedTuple):
    """One kind of fault of a data set; `gndet.data.datasets.faults` defines the kinds."""

    code: str  # like box-outside
    severity: str  # E: training is refused; F: fixed in memory; N: noted
    what: str  # follows the count in messages: "boxes wholly outside their image"
    remedy: str
    count: int  # type: ignore[assignment]  # hides tuple.count
    examples: tuple[str, ...]  # the first few, each with id, value and what was expected
    image_ids: tuple[int, ...]  # the first images with this fault, for drawing them
    of: int = 0  # how many annotations were checked, if count is a number of annotations; 0: not known


class Dataset(NamedTuple):
    """A data set that has been read and checked."""

    name: str  # path of the annotation file, or a description of the drawn set
    classes: tuple[str, ...]  # class names; a label is an index into it
    category_ids: tuple[int, ...]  # the file's category id of each class
    records: Sequence[Record]
    findings: tuple[Finding, ...] = ()  # E first, then F, N
    notes: tuple[str, ...] = ()  # lines to show when a run starts, e.g. when the pictures were decoded
    declared: bool = True  # whether the annotations list the classes; if not, classes are the names that occur
    left_out: tuple[tuple[int, str], ...] = ()  # category id and name of classes that no object uses, see `taken_back`

    @property
    def fixes(self) -> dict[str, int]:
        """Count what was fixed in memory: {"boxes without area dropped": 2}."""
        return {finding.what: finding.count for finding in self.findings if finding.severity == "F"}

    @property
    def refused(self) -> bool:
        """Whether a fault rules out training and evaluation."""
        return any(finding.severity == "E" for finding in self.findings)
