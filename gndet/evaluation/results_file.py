"""Read the detections of a file in COCO's results format, and check all of them.

The list is cut between detections; processes read its parts and check them column by column.  If one of them holds what
is unusual, the file is read as a whole, and detections near it are checked one by one, which finds words for a fault.
n detections of a part.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.json_parts import LEAST, Cut, NotInParts, cut_between_objects
from gndet.data.datasets.masks import check_segmentation
from gndet.data.datasets.segmentation import MAX_CHAIN, MAX_OUTLINE, to_rle
from gndet.data.workers import read_in_processes
from gndet.errors import DataError
from gndet.evaluation.results import Results, from_coco, join, with_areas, without_areas
from gndet.text import brief

SHOWN = 5  # faults that the error lists
PART = 1 << 20  # bytes of a part: its objects stay in the cache of a core
AT_ONCE = 1000  # detections to check together if the file is read as a whole
LIMIT = 1e9  # numbers of a detection are smaller
NUMBERS = {int, float}


class Known(NamedTuple):
    """What detections may refer to."""

    sizes: dict[int, tuple[int, int]]  # {image id: height, width}
    category_ids: frozenset[int]


def read_detections(path: Path, known: Known, name: str) -> Results:
    """Read detections in the order of the file.

    name: of the data set, for the error.  A detection without a box gets the box of its mask.  Raises DataError if the
    file is not in COCO's results format or names an image or a class that the data set does not have; the error says
    at which index of the list, which value, and what was expected.
    """
    try:
        if not path.is_file():  # opening a pipe would wait
            raise DataError(f"{path}: not a file, expected detections (COCO's results format)")
        with suppress(NotInParts, ValueError):  # ValueError: hotcoco finds that a mask is none
            parts = list(_read_parts(path, known)) if path.stat().st_size > LEAST else []
            if len({part.codes is None for part in parts}) == 1:
                return join(parts)
        listed = _parse(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read this file: {error.strerror}") from None
    faults, rows = [], []
    for first in range(0, len(listed), AT_ONCE):
        items = listed[first : first + AT_ONCE]
        with suppress(NotInParts, ValueError):
            with_areas(_columns(items, known))
            rows += items
            continue
        for index, detection in enumerate(items, first):
            try:
                rows.append(_checked(detection, known))
            except Fault as fault:
                faults.append(f"  detection {index}: {fault}")
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        head = f"{path}: {len(faults)} of {len(listed)} detections do not belong to {name} or are malformed:"
        raise DataError("\n".join([head, *faults[:SHOWN], *more]))
    bare = sum("segmentation" not in row for row in rows)
    if 0 < bare < len(rows):
        raise DataError(f"{path}: {bare} of {len(rows)} detections have no segmentation; expected all or none")
    return from_coco(rows)


def _read_parts(path: Path, known: Known) -> Iterator[Results]:
    """Read the parts in processes, and count the pixels of their masks meanwhile.  Raises NotInParts and ValueError."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        start, end = text.find(b"[") + 1, text.rfind(b"]")
        around = text[: max(start - 1, 0)] + text[end + 1 :]
        cuts = [] if around.strip() else list(cut_between_objects(text, start, end, PART))
    if cuts:
        yield from map(with_areas, read_in_processes(partial(_read_part, path, known), cuts, path))


def _read_part(path: Path, known: Known, cut: Cut) -> Results:
    """Read and check a part, without areas: in a forked process hotcoco would wait for threads that are not there."""
    with path.open("rb") as file:
        file.seek(cut[0])
        text = b"[" + file.read(cut[1] - cut[0]) + b"]"
    return _columns(_fast_parsed(text), known)


def _fast_parsed(text: bytes) -> Any:
    """Parse JSON.  Raises NotInParts for what Python's parser may still take: NaN, half of an emoji, huge integers."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotInParts(str(error)) from None


def _columns(items: list[Any], known: Known) -> Results:
    """Return detections that are all without a fault and in the usual form.  Raises NotInParts for others."""
    try:
        results = without_areas(items) if _are_usual(items, known) else None
    except (KeyError, TypeError, OverflowError, UnicodeEncodeError):
        results = None
    if (
        results is None
        or not (np.abs(np.column_stack((results.boxes, results.scores))) < LIMIT).all()
        or (results.boxes[:, 2:] < 0).any()
        or (results.codes is not None and _sum_of_runs(results.codes) != results.sizes.prod(axis=1).sum())
    ):
        raise NotInParts("a detection is unusual")
    return results


def _are_usual(items: list[Any], known: Known) -> bool:
    """Return whether all have a box, and either all or none the code of a mask, of the right types and lengths."""
    ids, category_ids, scores, boxes = (
        [item[key] for item in items] for key in ("image_id", "category_id", "score", "bbox")
    )
    if not (
        set(map(type, ids + category_ids)) == {int} and known.sizes.keys() >= set(ids)
        and known.category_ids >= set(category_ids) and set(map(type, scores)) <= NUMBERS
        and set(map(type, boxes)) == {list} and set(map(len, boxes)) == {4}
        and set(map(type, chain.from_iterable(boxes))) <= NUMBERS
    ):  # fmt: skip
        return False
    if not any("segmentation" in item for item in items):
        return True
    masks = [item["segmentation"] for item in items]
    codes = [mask["counts"] for mask in masks]
    return set(map(type, codes)) == {str} and all(
        mask["size"] == [*known.sizes[id]] and 0 < len(code) <= MAX_OUTLINE
        for id, mask, code in zip(ids, masks, codes, strict=True)
    )


def _sum_of_runs(codes: list[bytes]) -> int:
    """Return the sum of all run lengths of n compressed RLEs, none of them empty; -1 if one is malformed.

    See `segmentation.run_lengths` for the format.  A length, apart from the first three, is the sum of every second
    number before it, so a number counts once for each length that it is part of.
    """
    text = np.frombuffer(b"".join(codes), dtype=np.uint8) - 48  # a letter below 48 becomes one above 63
    stops = np.cumsum(list(map(len, codes)))
    more = text >= 32
    if text.max() > 63 or more[stops - 1].any():
        return -1
    ends = np.flatnonzero(~more)  # (N,) last letters of numbers
    numbers = ((text[ends] & 31) ^ 16).astype(np.int64) - 16
    longer, back = np.flatnonzero(more[ends - 1]), 1  # the letter before the first one is the last one, which ends
    while longer.size and back < MAX_CHAIN:
        numbers[longer] = numbers[longer] * 32 + (text[ends[longer] - back] & 31)
        back += 1
        longer = longer[more[ends[longer] - back]]
    num = np.diff(np.searchsorted(ends, stops), prepend=0)  # (n,) numbers of each
    last = num.cumsum()
    times = (np.repeat(last + 1, num) - np.arange(len(ends))) >> 1
    times[last - num] = 1  # the third length does not contain the first
    return -1 if longer.size else int(numbers @ times)


def _parse(path: Path) -> list[Any]:
    text = path.read_bytes()
    try:
        listed = _fast_parsed(text)
    except NotInParts:
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    if isinstance(listed, dict) and "annotations" in listed:
        raise DataError(f"{path}: holds annotations, expected detections: a list of image_id, category_id, bbox, score")
    if not isinstance(listed, list):
        raise DataError(f"{path}: holds {brief(listed)}, expected a list of detections (COCO's results format)")
    return listed


def _checked(detection: Any, known: Known) -> dict[str, Any]:
    """Check a detection; return the fields that are used.  Raises Fault."""
    if not isinstance(detection, dict):
        raise Fault("", f"{brief(detection)}, expected an object with image_id, category_id, bbox and score")
    image, category, score, box = (detection.get(key) for key in ("image_id", "category_id", "score", "bbox"))
    if type(image) is not int or image not in known.sizes:
        raise Fault("", f"image_id {brief(image)}, expected the id of one of {len(known.sizes)} images")
    if type(category) is not int or category not in known.category_ids:
        raise Fault("", f"category_id {brief(category)}, expected one of {brief(sorted(known.category_ids))}")
    if not _is_number(score):
        raise Fault("", f"score {brief(score)}, expected a finite number")
    row: dict[str, Any] = {"image_id": image, "category_id": category, "score": float(score)}
    if detection.get("segmentation"):
        row["segmentation"] = _code(detection["segmentation"], known.sizes[image])
        box = coco_mask.toBbox(row["segmentation"]).tolist() if box is None else box
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        raise Fault("", f"bbox {brief(box)}, expected 4 finite numbers: x, y, width, height, the last two not negative")
    return row | {"bbox": [float(side) for side in box]}


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in NUMBERS and abs(value) < LIMIT


def _code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Check a mask; return its compressed RLE, that of an empty mask if it covers no pixel."""
    checked = check_segmentation(segmentation, size)
    rle = to_rle(checked if checked is not None else {"size": list(size), "counts": [size[0] * size[1]]}, size)
    counts = rle["counts"]
    return {"size": list(size), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
