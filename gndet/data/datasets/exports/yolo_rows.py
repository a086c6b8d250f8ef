"""Read and write the rows of YOLO's label files: boxes and outlines, as shares of the picture's width and height.

A row is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, told apart row by row.  Some programs write other things in
files of this kind: corners of oriented boxes, keypoints, scores, pixels.
"""

import math
import os
from collections.abc import Iterable, Iterator

import numpy as np

from gndet.data.datasets.exports.engine import Found, Picture, SizeOf
from gndet.data.datasets.exports.folders import read_text
from gndet.data.datasets.faults import Fault, several
from gndet.text import brief, shown

BOX, SCORED, CORNERS, OUTLINE = 5, 6, 9, 7  # numbers of a row: a box, with its score, 4 corners, the least outline
POSE = 11  # the least numbers of a row that may be a box with keypoints of two numbers each: three of them
INSIDE = 0.1  # share of a box's sides by which a keypoint may leave it
DIGITS = 6  # of a share that is written: a hundredth of a pixel in a picture 10,000 pixels wide
LOW, HIGH = -1, 2  # no box of a picture lies beyond these shares; pixels do

Row = tuple[float, ...]
Rows = list[tuple[int, Row]]  # with their lines
Unit = tuple[str, str]  # file_name, label file relative to home or absolute; "" if the picture has none


def row_of(label: int, box: np.ndarray, outline: np.ndarray | None, size: tuple[int, int]) -> str:
    """Write an object as a row: `label cx cy w h`, or with an outline (V, 2) x, y `label x1 y1 x2 y2 ...`.

    box (4,) xyxy and outline in pixels; size: height, width.  A fifth point, equal to the fourth, keeps an outline of
    four points apart from an oriented box.
    """
    points = np.array([(box[:2] + box[2:]) / 2, box[2:] - box[:2]]) if outline is None else outline
    if len(points) == 4:
        points = np.concatenate((points, points[-1:]))
    shares = (points / size[::-1]).clip(0, 1).ravel()
    return " ".join([str(label), *(f"{share:.{DIGITS}f}".rstrip("0").rstrip(".") for share in shares)])


def read_rows(home: str, label: str) -> tuple[Rows, Found]:
    """Read the rows of a label file that hold only numbers; the others are faults."""
    rows: Rows = []
    found: Found = []
    try:
        text = read_text(os.path.join(home, label))
    except Fault as fault:
        return [], [(fault.code, str(fault))]
    for line, row in enumerate(text.splitlines(), start=1):
        words = row.split()
        try:
            numbers = tuple(map(float, words))
        except ValueError:
            found.append(("row-malformed", f"{shown(label)}, line {line}: {brief(row.strip())}, {_no_numbers(words)}"))
            continue
        if numbers:
            rows.append((line, numbers))
    return rows, found


def _no_numbers(words: list[str]) -> str:
    """Say what a row with words that are not numbers may be."""
    if any("," in word for word in words):
        return "expected numbers between spaces, with a decimal point"
    if len(words) in (CORNERS, CORNERS + 1) and not _is_number(words[CORNERS - 1]):
        return "corners and a class name, as DOTA writes oriented boxes (OBB)"
    if len(words) in (15, 16) and not _is_number(words[0]):
        return "a class name and 14 or 15 numbers, as KITTI writes its labels"
    return "expected numbers"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def parse_labels(home: str, names: dict[int, str], unit: Unit, size_of: SizeOf) -> list[Picture]:
    """Read the objects of a picture.

    home: the folder that label files are relative to; names: of the classes, by number; {}: numbers are their names.
    """
    file_name, label = unit
    try:
        size = size_of(file_name)
    except Fault:
        return [Picture(file_name, None, [])]  # the engine finds it again, and says so
    rows, found = read_rows(home, label) if label else ([], [])
    objects = []
    seen: set[Row] = set()
    file = shown(label)
    for line, numbers in rows:
        place = f"{file}, line {line}"
        if numbers in seen:
            found.append(("row-twice", f"{place}: equal to an earlier row"))
        elif fault := _fault_of(numbers, names):
            found.append((fault[0], f"{place}: {fault[1]}"))
        else:
            if len(numbers) == SCORED:
                found.append(("row-score", f"{place}: sixth number {numbers[-1]:g}"))
            name = names[int(numbers[0])] if names else f"{numbers[0]:g}"
            objects.append(_to_pixels(numbers, size) | {"category": name, "place": place})
        seen.add(numbers)
    return [Picture(file_name, size, objects, found)]


def _fault_of(numbers: Row, names: dict[int, str]) -> tuple[str, str] | None:
    """Return the fault of a row, its code and words; None if there is none."""
    num = len(numbers)
    if not math.isfinite(sum(numbers)):
        return "row-malformed", "a number that is not finite"
    if num == SCORED:
        if not 0 <= numbers[-1] <= 1:
            return "row-malformed", f"the sixth number is {numbers[-1]:g}, expected a score from 0 to 1"
    elif num != BOX and (num < OUTLINE or num % 2 == 0):
        return "row-malformed", f"{several(num, 'number')}, expected {BOX} for a box, or a class and at least 3 points"
    if not names and (numbers[0] < 0 or not numbers[0].is_integer()):
        return "row-class", f"class {numbers[0]:g}, expected a whole number from 0 on"
    if names and numbers[0] not in names:
        hint = "; are the classes numbered from 1?" if numbers[0] == max(names) + 1 else ""
        return "row-class", f"class {numbers[0]:g}, expected one of 0 to {max(names)}{hint}"
    if min(numbers[1:]) < LOW or max(numbers[1:]) > HIGH:
        largest = max(numbers[1:], key=abs)
        return "row-pixels", f"{largest:g}, expected shares from 0 to 1 of the picture's width and height"
    return None


def _to_pixels(numbers: Row, size: tuple[int, int]) -> dict[str, list]:
    """Return a row as COCO's bbox, and its outline if it has one; size: height, width."""
    height, width = size
    if len(numbers) <= SCORED:
        x, y, w, h = numbers[1:5]
        return {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    points = [0.0] * (len(numbers) - 1)
    xs = points[::2] = [x * width for x in numbers[1::2]]
    ys = points[1::2] = [y * height for y in numbers[2::2]]
    left, top = min(xs), min(ys)
    return {"bbox": [left, top, max(xs) - left, max(ys) - top], "segmentation": [points]}


def refuse_other_rows(home: str, labels: Iterable[str], keypoints: int, outlines: bool) -> None:
    """Raise Fault if all rows are corners of oriented boxes, or boxes with keypoints.

    keypoints: numbers of the keypoints of a row by data.yaml, 0 for none; outlines: the user says that rows of equal
    length are outlines.  Reads no more files than it takes to know.
    """
    width, first = 0, ""
    flags = points = True  # all rows may be boxes with keypoints of three numbers, of two
    for place, numbers in _all_rows(home, labels):
        first = first or place
        if keypoints and len(numbers) == BOX + keypoints:
            raise Fault("rows-pose", f"{place}: a box and keypoints, as kpt_shape in data.yaml says")
        if keypoints:
            continue
        width = width or len(numbers)
        flags, points = flags and _has_flags(numbers), points and not outlines and _has_points(numbers)
        corners = width in (CORNERS, CORNERS + 1) and not outlines
        if len(numbers) != width or not (flags or points or corners):
            return
    if flags and width:
        raise Fault("rows-pose", f"{first}: a box and {(width - BOX) // 3} keypoints of 3 numbers, as in all rows")
    way = "; kind: yolo (data.train.kind, data.val.kind) reads them as outlines"
    if width in (CORNERS, CORNERS + 1):
        words = f"all rows have {width} numbers: 4 corners of oriented boxes (OBB), or outlines of 4 points"
        raise Fault("rows-obb", f"{first}: {words}{way if width == CORNERS else ''}")
    if width:
        words = f"all rows have {width} numbers: boxes with keypoints, or outlines of {width // 2} points"
        raise Fault("rows-pose", f"{first}: {words}{way}")


def _all_rows(home: str, labels: Iterable[str]) -> Iterator[tuple[str, Row]]:
    for label in labels:
        for line, numbers in read_rows(home, label)[0]:
            yield f"{shown(label)}, line {line}", numbers


def _has_flags(numbers: Row) -> bool:
    """Return whether a row may be a box and keypoints x y v, with v 0, 1 or 2."""
    return (
        len(numbers) > SCORED and (len(numbers) - BOX) % 3 == 0 and all(v in (0, 1, 2) for v in numbers[BOX + 2 :: 3])
    )


def _has_points(numbers: Row) -> bool:
    """Return whether a row may be a box and keypoints x y that lie in it; 0 0 is a keypoint that was not seen."""
    if len(numbers) < POSE or len(numbers) % 2 == 0:
        return False
    x, y, w, h = numbers[1:BOX]
    reach_x, reach_y = w * (0.5 + INSIDE), h * (0.5 + INSIDE)
    pairs = zip(numbers[BOX::2], numbers[BOX + 1 :: 2], strict=True)
    return all((abs(a - x) <= reach_x and abs(b - y) <= reach_y) or a == b == 0 for a, b in pairs)
