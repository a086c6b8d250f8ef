"""What can be wrong with a data set, and the outcome of each fault, which this table alone decides.

To add a check, add a row to FAULTS, and a line that raises `Fault` or calls `Findings.add` with its code.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gndet.data.records import Dataset, Finding
from gndet.errors import DataError

EXAMPLES = 3  # shown per kind
SHOWN = 16  # images remembered per kind
REFUSED, FIXED, NOTED = "E", "F", "N"
SEVERITIES = {REFUSED: "refused", FIXED: "fixed in memory", NOTED: "noted"}


class Kind(NamedTuple):
    """A row of FAULTS."""

    severity: str
    what: str  # follows a count in messages
    remedy: str  # "" if there is nothing to do


_AS_COCO = "write the file in COCO's format: an object with the lists images, annotations and categories"
_UNIQUE = "give each its own id; renumber a file that was merged from several"
_POLYGON = 'segmentation is a list of polygons, each [x0, y0, x1, y1, ...] in pixels: "segmentation": [[...]]'
_RLE = "encode the mask again with pycocotools' encode(); size is [height, width] of the image"
_IN_BOTH = "validation on images that were trained on measures nothing"
_PICTURE = "fetch the picture again, or remove it from the file; data.skip_unreadable=true trains without it"

FAULTS: dict[str, Kind] = {
    # the annotation file
    "json-unreadable": Kind(REFUSED, "annotation files that cannot be read", "check data.root and annotations"),
    "json-archive": Kind(REFUSED, "archives given as annotations", "unpack it yourself; gndet does not open archives"),
    "json-broken": Kind(REFUSED, "files that are not JSON", "export the file again; it may be truncated"),
    "json-other": Kind(REFUSED, "files that are not in COCO's format", _AS_COCO),
    "json-nan": Kind(NOTED, "values NaN or Infinity, which JSON does not allow", "other programs may reject the file"),
    # exports of labelling tools
    "data-unknown": Kind(REFUSED, "files or folders that hold nothing that gndet reads",
        "data.train.annotations names a file or folder"),
    "set-missing": Kind(REFUSED, "sets that the data does not have",
        "data.train.annotations and data.val.annotations name files or folders; if only val is missing, "
        "data.val.share=0.2 takes a fifth of the images of train"),
    "set-twice": Kind(REFUSED, "sets that are there twice",
        "data.train.annotations or data.train.kind chooses (data.val, too)"),
    "text-encoding": Kind(REFUSED, "text files that are not in UTF-8",
        "save them as UTF-8; an editor may have written Latin-1, Windows-1252 or GBK"),
    "xml-broken": Kind(REFUSED, "files that are not well-formed XML", "export them again"),
    "yaml-broken": Kind(REFUSED, "YOLO data files that cannot be used", "train, val and names are its keys"),
    "labels-missing": Kind(REFUSED, "exports in which no picture has a label file",
        "YOLO's .txt files lie in `labels`, beside `images`, or beside the pictures"),
    "rows-obb": Kind(REFUSED, "exports whose rows may be oriented boxes, or outlines", "export boxes or outlines"),
    "rows-pose": Kind(REFUSED, "exports whose rows hold keypoints", "export boxes or outlines"),
    "row-malformed": Kind(REFUSED, "rows that are neither a box nor an outline",
        "class cx cy w h, or class x1 y1 x2 y2 x3 y3 ..."),
    "row-class": Kind(REFUSED, "rows of a class that has no name",
        "classes are numbered from 0, in the order of names"),
    "row-pixels": Kind(REFUSED, "rows in pixels, or far outside the picture",
        "divide by the picture's width and height"),
    "object-malformed": Kind(REFUSED, "objects without a name or a box", "each <object> has <name> and <bndbox>"),
    "row-twice": Kind(FIXED, "rows equal to an earlier row of their file, left out", ""),
    "row-score": Kind(FIXED, "rows with a sixth number, a score, which is left out", "are these predictions?"),
    "box-swapped": Kind(FIXED, "boxes with exchanged corners, exchanged back", ""),
    "corners-from-0": Kind(FIXED, "exports whose corners are counted from 0, so that 1 is not taken off",
        "VOC counts pixels from 1"),
    "picture-renamed": Kind(FIXED, "annotation files that name another picture; the one of their own name is read", ""),
    "label-stray": Kind(NOTED, "label files without a picture", "are pictures missing?"),
    "names-missing": Kind(NOTED, "exports that do not name their classes", "a classes.txt names one per line"),
    "box-difficult": Kind(NOTED, "objects marked difficult",
        "they are trained on, as in detectron2; VOC's own metric ignores them"),
    "outline-unread": Kind(NOTED, "outlines in XML files that are not read", "only boxes are read from VOC"),
    "picture-unlabeled": Kind(NOTED, "pictures without an XML file, left out", "an XML without objects is background"),
    "class-empty": Kind(REFUSED, "folders of a class without a picture", "put pictures there, or remove the folder"),
    "class-single": Kind(REFUSED, "sets with a single class, which leaves nothing to learn",
        "make a folder for each class, two or more"),
    "class-unknown": Kind(REFUSED, "folders that are no class of train",
        "name them as in train; a classes.txt beside train and val lists the classes"),
    "csv-broken": Kind(REFUSED, "tables that are not CSV", "export the file again"),
    "frames-missing": Kind(REFUSED, "videos without the pictures of their frames",
        "export the task as `CVAT for images 1.1` with its images, or put its frames into `images` beside the file"),
    # categories
    "category-id": Kind(REFUSED, "categories whose id is not an integer from 0 to 2**63 - 1", "number the categories"),
    "category-id-twice": Kind(REFUSED, "category ids that occur twice", _UNIQUE),
    "category-name": Kind(REFUSED, "categories without a name", "name them"),
    "category-name-twice": Kind(REFUSED, "category names that occur twice", "merge these categories, or rename one"),
    "category-name-number": Kind(FIXED, "category names that are numbers, taken as text", ""),
    "category-name-cut": Kind(FIXED, "category names with half of a character, which becomes U+FFFD",
        "a program may have cut an emoji in two"),
    "category-id-text": Kind(FIXED, "categories whose id is a name or beyond 64 bits, numbered in memory",
        "results have these numbers as category_id"),
    "category-left-out": Kind(FIXED, "categories left out: they have no object and only group others or repeat a name",
        ""),
    "category-gaps": Kind(FIXED, "categories mapped to labels from 0 on, because their ids have gaps", ""),
    "category-unused": Kind(NOTED, "categories without an object", "data.classes selects the classes to learn"),
    # images
    "image-id": Kind(REFUSED, "images whose id is not an integer from 0 to 2**63 - 1",
        "number the images, and image_id with them"),
    "image-id-text": Kind(FIXED, "images whose id is a name or beyond 64 bits, numbered in the file's order",
        "results have these numbers as image_id"),
    "image-id-twice": Kind(REFUSED, "image ids that occur twice", _UNIQUE),
    "image-size": Kind(REFUSED, "images without a valid width and height", "give width and height in pixels"),
    "size-missing": Kind(FIXED, "images without width or height, read from the pictures", ""),
    "image-pixels": Kind(REFUSED, "images over data.max_pixels", "scale or crop them, or raise data.max_pixels"),
    "image-empty": Kind(NOTED, "images without an object", "data.keep_empty=true trains on them as background"),
    # their files
    "folder-missing": Kind(REFUSED, "image folders that cannot be listed", "check data.root and images"),
    "file-name": Kind(REFUSED, "images without a file_name", "name the picture, relative to the image folder"),
    "file-escape": Kind(REFUSED, "pictures outside the image folder",
        "file_name must be relative, without ..; data.follow_links=true follows links to files"),
    "file-unclear": Kind(REFUSED, "file names whose end fits two files, or that share a file",
        "make file_name relative to the folder"),
    "file-backslash": Kind(FIXED, "file names with \\ taken as /", ""),
    "file-by-end": Kind(FIXED, "pictures found by the end of a path or URL", "check the first few"),
    "file-foreign": Kind(NOTED, "file names that are URLs, absolute, or lead up",
        "their pictures are found by the last part of the name"),
    "file-missing": Kind(REFUSED, "pictures that are not there", "is this the folder? upper and lower case matter"),
    "file-empty": Kind(REFUSED, "picture files of 0 bytes", _PICTURE),
    "file-twice": Kind(NOTED, "images whose file another image has, too",
        "merge them: each treats the other's objects as background"),
    "picture-embedded": Kind(REFUSED, "pictures that are only inside their annotation file, as imageData",
        "write them beside it: labelme_export_json FILE -o FOLDER makes img.png; name it as imagePath says"),
    "file-in-both": Kind(NOTED, "file names in both train and val", _IN_BOTH),
    "lvis-federated": Kind(NOTED, "files of LVIS",
        "gndet trains and scores them as COCO: a class that was not looked for counts as absent"),
    # annotations
    "number-float": Kind(FIXED, "ids or sides written as 5.0, read as 5", ""),
    "number-text": Kind(FIXED, "images, categories or annotations with numbers written as text, read as numbers", ""),
    "annotation-id": Kind(FIXED, "annotations without an integer id: all are numbered by their place in the file",
        "nothing refers to them"),
    "annotation-id-twice": Kind(REFUSED, "annotation ids that occur twice", _UNIQUE),
    "annotation-id-low": Kind(FIXED, "annotations renumbered from 1, because an id was below 1",
        "COCO's metric reads id 0 as 'no match'"),
    "image-unknown": Kind(REFUSED, "annotations of an image that is not in the file (or its id is wrong)",
        "set image_id to the id of an entry of images"),
    "category-unknown": Kind(REFUSED, "annotations of a category that is not in the file (or its id is wrong)",
        "set category_id to the id of an entry of categories"),
    "crowd-value": Kind(REFUSED, "annotations whose iscrowd or ignore is neither 0 nor 1",
        "1 marks a region of many objects"),
    "crowd": Kind(NOTED, "crowd regions", "they are ignored in training and kept in evaluation, as in COCO"),
    "ignore-flag": Kind(FIXED, "annotations with ignore 1, taken as crowd regions",
        "COCO's metric knows crowd regions only, by iscrowd"),
    "crowd-polygon": Kind(NOTED, "crowd regions outlined by polygons", "COCO writes them as RLE; check iscrowd"),
    "area-value": Kind(REFUSED, "annotations whose area is not a number of pixels", "leave area out to compute it"),
    "area-missing": Kind(FIXED, "annotations without an area, computed from mask or box", ""),
    "area-wrong": Kind(FIXED, "areas of 0 or over that of the box, computed from mask or box", ""),
    "area-odd": Kind(NOTED, "areas that do not fit their mask or box", "small, medium and large objects follow area"),
    "area-box": Kind(NOTED, "areas that are the box's and not the mask's",
        "small, medium and large objects follow area"),
    # shapes of labelling tools
    "shape-label": Kind(REFUSED, "shapes without a class", "give them one in the tool, or delete them there"),
    "class-attribute": Kind(REFUSED, "files whose regions have several attributes that may be the class",
        "name one of them class in VIA, or delete the others"),
    "shape-malformed": Kind(REFUSED, "shapes without the numbers that make them", "draw them again, or delete them"),
    "shape-joined": Kind(FIXED, "objects joined from shapes of one class and group_id", ""),
    "shape-other": Kind(NOTED, "points, lines, tags and the like, which are no objects", ""),
    "frames-skipped": Kind(REFUSED, "tracks with frames left out, whose objects are unknown",
        "export the task as `CVAT for images 1.1`"),
    # boxes
    "box-malformed": Kind(REFUSED, "boxes that are not 4 finite numbers",
        "bbox is [x, y, width, height] in pixels, not 0 to 1"),
    "box-missing": Kind(FIXED, "boxes missing, computed from the mask", ""),
    "box-none": Kind(FIXED, "annotations with an empty box and no mask dropped", ""),
    "box-rotated": Kind(FIXED, "boxes with attributes.rotation, replaced by the upright box around the turned one", ""),
    "box-empty": Kind(FIXED, "boxes of zero or negative width or height dropped", "bbox is [x, y, width, height]"),
    "box-outside": Kind(REFUSED, "boxes wholly outside their image",
        "bbox is [x, y, width, height]; is image_id right?"),
    "box-clipped": Kind(FIXED, "boxes partly outside their image, clipped in training", ""),
    "box-overhang": Kind(NOTED, "boxes more than 2 pixels outside their image",
        "is bbox [x, y, width, height], not [x0, y0, x1, y1]?"),
    "boxes-normalized": Kind(
        REFUSED,
        "boxes whose numbers all lie in 0 to 1",
        "bbox is in pixels: multiply x and width by the image's width, y and height by its height; "
        "YOLO's text files are read as they are",
    ),
    "boxes-xyxy": Kind(REFUSED, "boxes that fit as [x0, y0, x1, y1], not as [x, y, width, height]",
        "write bbox as [x0, y0, x1 - x0, y1 - y0]"),
    "box-tiny": Kind(NOTED, "boxes under 1 pixel wide or high", "is bbox in pixels, not in 0 to 1?"),
    # masks
    "segmentation-malformed": Kind(REFUSED, "segmentations that are neither polygons nor an RLE", _POLYGON),
    "segmentation-shape": Kind(FIXED, "segmentations that are not in COCO's form, read as polygons or an RLE", ""),
    "polygon-number": Kind(REFUSED, "polygons with a coordinate that is not a number near the image", _POLYGON),
    "polygon-short": Kind(FIXED, "polygons with fewer than 3 points, or half a point, dropped", _POLYGON),
    "rle-malformed": Kind(REFUSED, "RLE masks that do not hold run lengths", _RLE),
    "rle-size": Kind(REFUSED, "RLE masks that differ in size from their image", _RLE),
    "rle-counts": Kind(REFUSED, "RLE masks that do not fill their image", _RLE),
    "mask-long": Kind(REFUSED, "masks whose outline is too long to trace", "draw these outlines more coarsely"),
    "mask-empty": Kind(FIXED, "masks without a pixel dropped", "remove these objects, or draw their masks"),
    "mask-missing": Kind(NOTED, "objects without a mask", "model.masks=false trains on boxes only"),
    "mask-needed": Kind(REFUSED, "objects without a mask, where masks are trained",
        "draw them, or set model.masks=false"),
    "mask-elsewhere": Kind(NOTED, "masks that are not where their box is", "check bbox and segmentation"),
    # the pictures, decoded
    "picture-unreadable": Kind(REFUSED, "pictures that cannot be decoded", _PICTURE),
    "picture-crash": Kind(REFUSED, "pictures that crash or hang the decoder", _PICTURE),
    "picture-pixels": Kind(REFUSED, "pictures over data.max_pixels", "scale or crop them, or raise data.max_pixels"),
    "picture-size": Kind(REFUSED, "pictures that differ in size from what the annotation file says",
        "use the version that was annotated, or correct width and height"),
    "picture-unrotated": Kind(REFUSED, "pictures annotated as stored, not as their EXIF turns them",
        "data.exif=stored reads pictures as stored; or remove their EXIF orientation"),
    "picture-range": Kind(REFUSED, "pictures of 32 bits per channel without data.pixel_range",
        "data.pixel_range=[LOW,HIGH] sets it"),
    "picture-truncated": Kind(FIXED, "JPEG files that end early, read but for their last rows",
        "fetch them again if these rows matter"),
    "picture-turned": Kind(FIXED, "pictures rotated as their EXIF says",
        "if they were annotated as stored, set data.exif=stored"),
    "picture-mode": Kind(FIXED, "pictures that are not RGB, converted", ""),
    "picture-16bit": Kind(FIXED, "16-bit pictures scaled to 8 bits", ""),
    "picture-dim": Kind(NOTED, "pictures of more than 8 bits that use under a quarter of the range",
        "data.pixel_range=[LOW,HIGH] sets it"),
    "picture-clipped": Kind(NOTED, "pictures with values outside data.pixel_range, clipped",
        "data.pixel_range=[LOW,HIGH] sets it"),
    "picture-animated": Kind(NOTED, "animations, reduced to their first frame", "annotations must be of this frame"),
    "picture-twice": Kind(NOTED, "pictures that are copies of another file of the set", "keep one of each"),
    "picture-in-both": Kind(NOTED, "pictures in both train and val", _IN_BOTH),
    # the set as a whole
    "objects-none": Kind(REFUSED, "sets without an object to train on", "annotate, or set data.keep_empty=true"),
    "classes-choice": Kind(REFUSED, "lists of classes that do not fit the file", "data.classes takes category names"),
    "classes-differ": Kind(REFUSED, "differences between the classes of train and val",
        "data.classes selects common ones"),
}  # fmt: skip
COUNTED = ("area", "box", "boxes", "crowd", "ignore", "mask", "segmentation")  # codes that begin so count annotations
SKIPPABLE = ("file-empty", "picture-unreadable", "picture-crash")  # with data.skip_unreadable
_LISTED = re.compile(r"(?<=^annotations\[)\d+")  # the place of an annotation in the list of its part


class Fault(DataError):
    """A fault of an item, with its code in FAULTS; the text says what is wrong and what was expected."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)  # both, so that it can be pickled
        self.code = code

    def __str__(self) -> str:
        return self.args[1]


class Findings:
    """The faults found so far, by kind."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}  # by code

    def add(self, code: str, example: str, image_id: int | None = None, count: int = 1) -> None:
        """Count a fault; keep the first EXAMPLES of a kind, and the first SHOWN images."""
        image_ids = () if image_id is None else (image_id,)
        self._merge(Finding(code, *FAULTS[code], count, (example,), image_ids))

    def take(self, later: Iterable[Finding], before: int = 0) -> None:
        """Add the findings of a later part of the same data set; before: how many annotations precede the part."""
        for finding in later:
            examples = tuple(_LISTED.sub(lambda place: f"{int(place[0]) + before}", text) for text in finding.examples)
            self._merge(finding._replace(examples=examples))

    def _merge(self, new: Finding) -> None:
        if new.code in self._found:
            old = self._found[new.code]
            examples = (old.examples + new.examples)[:EXAMPLES]
            image_ids = tuple(dict.fromkeys(old.image_ids + new.image_ids))[:SHOWN]
            new = old._replace(count=old.count + new.count, examples=examples, image_ids=image_ids)
        self._found[new.code] = new

    def wants_example(self, code: str) -> bool:
        """Return whether another example of this kind would be kept."""
        return code not in self._found or len(self._found[code].examples) < EXAMPLES

    def listed(self) -> tuple[Finding, ...]:
        """Return the findings, refused first, each severity in the order of FAULTS."""
        return in_order(self._found.values())


class Marks:
    """Record the faults of n annotations.  Refused or dropped annotations are not checked further."""

    def __init__(self, num: int) -> None:
        self.left = np.ones(num, dtype=bool)  # those still being checked
        self.places: dict[str, np.ndarray] = {}  # indices, by code of FAULTS

    def note(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left."""
        self.places[code] = np.flatnonzero(self.left & faulty)

    def drop(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left, and stop checking them."""
        self.note(code, faulty)
        self.left &= ~faulty


def with_totals(findings: Iterable[Finding], annotations: int) -> tuple[Finding, ...]:
    """Note in findings that count annotations how many were checked in all."""
    return tuple(
        found._replace(of=annotations) if found.code.partition("-")[0] in COUNTED else found for found in findings
    )


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings: refused, fixed, noted, each in the order of FAULTS."""
    severities, codes = list(SEVERITIES), list(FAULTS)
    return tuple(sorted(findings, key=lambda found: (severities.index(found.severity), codes.index(found.code))))


def skipping_unreadable(findings: Iterable[Finding], unreadable: int, images: int, share: float) -> tuple[Finding, ...]:
    """Return findings as data.skip_unreadable=true changes them: unreadable pictures are skipped, not refused.

    unreadable: number of unreadable images; more than a share (data.max_unreadable) of all images is still refused.
    """
    if unreadable <= share * images:
        severity, words = FIXED, ", skipped (data.skip_unreadable)"
        remedy = "fetch them again, or remove them from the file"
    else:
        severity, words = REFUSED, ""
        excess = f"{unreadable} of {images}; data.max_unreadable allows a share of {share:g}"
        remedy = f"fix them ({excess}), or raise data.max_unreadable"
    return in_order(
        found._replace(severity=severity, what=FAULTS[found.code].what + words, remedy=remedy)
        if found.code in SKIPPABLE
        else found
        for found in findings
    )


def share(finding: Finding) -> str:
    """Return how many have a fault, and of how many unless each must be corrected by itself: "4 of 6"."""
    alone = not finding.of or (finding.severity == REFUSED and not finding.code.startswith("boxes-"))
    return str(finding.count) if alone else f"{finding.count} of {finding.of}"


def describe_finding(finding: Finding) -> list[str]:
    """Return a finding as lines: code and share, up to EXAMPLES examples, what to do."""
    more = finding.count - len(finding.examples)
    return [
        f"{finding.code} ({share(finding)}): {finding.what}",
        *(f"  {example}" for example in finding.examples),
        *([f"  and {more} more"] if more > 0 and len(finding.examples) == EXAMPLES else []),
        *([f"  {'remedy' if finding.severity == REFUSED else 'note'}: {finding.remedy}"] if finding.remedy else []),
    ]


def refuse(dataset: Dataset) -> Dataset:
    """Return the data set, or raise a DataError that lists everything that is refused in it."""
    refuse_all({dataset.name: dataset.findings})
    return dataset


def refuse_all(findings: Mapping[str, Sequence[Finding]]) -> None:
    """Raise a DataError that lists everything that is refused, if anything; findings: by name of the data set."""
    lines = []
    for name, listed in findings.items():
        if refused := [finding for finding in listed if finding.severity == REFUSED]:
            total = sum(finding.count for finding in refused)
            lines.append(f"{name}: {several(total, 'fault')}; `gndet check` reports everything")
            lines += [f"  {line}" for finding in refused for line in describe_finding(finding)]
    if lines:
        raise DataError("\n".join(lines))


def several(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
