"""Detections of a data set in columns, which read as COCO results: the dicts are made on demand.

500,000 detections with masks take 600 MB as the dicts of COCO's format and 90 MB in columns, which the ranks exchange.
n detections.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as hotcoco_mask

from gndet.files import written_whole

WRITTEN_AT_ONCE = 10_000  # detections that stand in memory as text
FIELDS = ("image_ids", "category_ids", "boxes", "scores", "sizes", "areas")


@dataclass(eq=False)
class Results(Sequence[dict[str, Any]]):
    """Detections in a stated order; each as {"image_id", "category_id", "bbox", "score"[, "segmentation"]}."""

    image_ids: np.ndarray  # (n,) int64
    category_ids: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 xywh pixels of the picture
    scores: np.ndarray  # (n,) float64
    sizes: np.ndarray  # (n, 2) int64 height, width of the picture; of no meaning for boxes alone
    areas: np.ndarray  # (n,) float64 pixels of the mask; of no meaning for boxes alone
    codes: list[bytes] | None  # n masks as COCO's compressed run-length codes; None for boxes alone

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return next(iter(self.take(np.array([range(len(self))[index]]))))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        rows = zip(*(column.tolist() for column in columns), self.masks() or [None] * len(self), strict=True)
        for image_id, category_id, box, score, mask in rows:
            result = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            if mask is not None:
                result["segmentation"] = mask | {"counts": mask["counts"].decode("ascii")}
            yield result

    def masks(self) -> list[dict[str, Any]] | None:
        """Return the n masks as pycocotools has them, {"size": [h, w], "counts": bytes}; None for boxes alone."""
        if self.codes is None:
            return None
        _, first, index = np.unique(self.sizes @ (1 << 32, 1), return_index=True, return_inverse=True)
        sizes = self.sizes[first].tolist()  # few: masks of one size share the list
        return [{"size": sizes[i], "counts": code} for i, code in zip(index.tolist(), self.codes, strict=True)]

    def take(self, index: np.ndarray) -> "Results":
        """Return the detections at places `index` (m,), in that order."""
        codes = None if self.codes is None else [self.codes[i] for i in index.tolist()]
        return Results(*(getattr(self, field)[index] for field in FIELDS), codes)

    def of_image(self, image_id: int) -> "Results":
        """Return the detections of an image."""
        return self.take(np.flatnonzero(self.image_ids == image_id))

    def in_order_of(self, image_ids: Sequence[int]) -> "Results":
        """Return the detections image by image in the order of image_ids; those of an image stay in their order."""
        ids = np.array(image_ids, dtype=np.int64)
        by_id = ids.argsort()
        place = by_id[np.searchsorted(ids, self.image_ids, sorter=by_id)]
        return self.take(place.argsort(kind="stable"))


def join(parts: Iterable[Results]) -> Results:
    """Concatenate parts; the whole has no masks where a part that has detections has none."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return from_coco([])
    whole = [None] if any(part.codes is None for part in parts) else [[code for part in parts for code in part.codes]]
    return Results(*(np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS), *whole)


def from_coco(results: Sequence[dict[str, Any]]) -> Results:
    """Turn COCO results, all of them with a compressed run-length code or all without, into columns."""
    codes, sizes, areas = None, np.zeros((len(results), 2), dtype=np.int64), np.zeros(len(results))
    if all("segmentation" in result for result in results):
        masks = [result["segmentation"] for result in results]
        codes = [mask["counts"].encode("ascii") for mask in masks]
        sizes = np.array([mask["size"] for mask in masks], dtype=np.int64).reshape(-1, 2)
        areas = mask_areas(masks)
    return Results(
        image_ids=np.array([result["image_id"] for result in results], dtype=np.int64),
        category_ids=np.array([result["category_id"] for result in results], dtype=np.int64),
        boxes=np.fromiter(chain.from_iterable(result["bbox"] for result in results), np.float64).reshape(-1, 4),
        scores=np.array([result["score"] for result in results], dtype=np.float64),
        sizes=sizes, areas=areas, codes=codes,
    )  # fmt: skip


def mask_areas(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Count the pixels of n run-length codes, (n,) float64.  pycocotools counts at most 255 masks at once."""
    return np.array(hotcoco_mask.area(list(masks)), dtype=np.float64)


def save_results(path: Path, results: Results) -> None:
    """Write COCO results as JSON, whole or not at all.  Raises OutputError."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for first in range(0, len(results), WRITTEN_AT_ONCE):
            text = json.dumps(list(results[first : first + WRITTEN_AT_ONCE]))
            file.write(("[" if first == 0 else ", ") + text[1:-1])
        file.write("]" if len(results) else "[]")
