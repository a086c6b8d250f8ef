"""Name the format of annotations from the beginning of their file: the formats that gndet reads, and many it does not.

To add a format, add a row to FORMATS.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HEAD = 64 << 10  # bytes of the beginning of a file, and of its end, that are looked at
DEPTH = 4  # keys of JSON that are nested deeper are not looked at

_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]')
_LATE = re.compile(r'"(images|annotations|categories|shapes)"\s*:\s*\[|"(imagePath|imageHeight|image_id)"\s*:')
_LINES = re.compile(r"\s*\{[^\n]*\}\s*\n\s*\{")  # two objects, one per line
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class Form(NamedTuple):
    """What the beginning of a file shows."""

    kind: str  # JSON: object, list or lines; else xml, text or binary
    keys: frozenset[tuple[str, ...]]  # JSON: each key with those around it, lists passed over
    text: str

    def has(self, *keys: str) -> bool:
        """Return whether there is a value at these nested keys; "*" is any key."""
        return any(
            len(path) == len(keys) and all(key in ("*", name) for key, name in zip(keys, path, strict=True))
            for path in self.keys
        )

    def rows(self, pattern: str) -> bool:
        """Return whether the first lines of a table match a pattern; the last may be cut."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        whole = lines[: min(5, max(1, len(lines) - 1))]
        return self.kind == "text" and bool(whole) and all(re.fullmatch(pattern, line) for line in whole)

    def heading(self, pattern: str) -> bool:
        """Return whether the first line of a table contains a pattern, in any case."""
        return self.kind == "text" and bool(re.search(pattern, self.text.lstrip().partition("\n")[0], re.IGNORECASE))

    def element(self, name: str) -> bool:
        """Return whether an XML element of this name occurs."""
        return self.kind == "xml" and bool(re.search(rf"<{name}[\s/>]", self.text))


class Format(NamedTuple):
    """A row of FORMATS."""

    name: str
    way: str  # how to use it with gndet
    fits: Callable[[Form], bool]
    kind: str = ""  # data.train.kind, if gndet reads it


def _is_coco(form: Form) -> bool:
    lists = sum(form.has(key) for key in ("images", "annotations", "categories"))
    cut = form.has("images") and form.has("image_id")  # only one list begins near an end of the file
    return form.kind == "object" and (lists >= 2 or form.has("annotations", "image_id") or cut)


def _is_labelme(form: Form) -> bool:
    return form.kind == "object" and form.has("shapes") and (form.has("imagePath") or form.has("imageHeight"))


def _is_via(form: Form) -> bool:
    project = form.has("_via_img_metadata") or form.has("_via_settings")
    return (
        project or (form.has("*", "regions") and form.has("*", "filename")) or form.heading("region_shape_attributes")
    )


def _is_cvat(form: Form) -> bool:
    return form.element("annotations") and any(map(form.element, ("image", "track", "meta")))


def _is_yolo_file(form: Form) -> bool:
    names, sets = (
        re.search(rf"(?m)^({keys})\s*[:=]", form.text) for keys in ("names", "path|train|val|valid|test|nc|classes")
    )
    return form.kind == "text" and bool(names and sets)


_LABELS = (  # of Label Studio's regions
    "rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels", "keypointlabels", "original_width",
)  # fmt: skip
_CONVERT = "convert it to COCO's JSON"
_EXPORT = "export COCO's JSON, or YOLO's files, instead"
_SUPERVISELY = "export COCO's JSON with Supervisely's app `Export to COCO`"
_LABEL_STUDIO = "export COCO's JSON, or YOLO's files, from Label Studio"
_FOLDER = "give the folder that holds all of them"

FORMATS: tuple[Format, ...] = (  # the first that fits
    # an object of JSON
    Format("COCO's panoptic JSON (segments_info)", "convert it with panopticapi's panoptic2detection_coco_format.py",
           lambda form: form.has("annotations", "segments_info")),
    Format("COCO's captions", "give instances_*.json, which has boxes",
           lambda form: form.has("annotations", "caption")),
    Format("Datumaro's JSON", "export it in COCO's format",
           lambda form: form.has("items") and form.has("categories", "label")),
    Format("LabelMe's JSON of one picture", _FOLDER, _is_labelme, "labelme"),
    Format("annotations of VIA (VGG Image Annotator)", "leave kind: auto", _is_via, "via"),
    Format("a project of VIA 3", f"gndet reads files of VIA 2; {_CONVERT}",
           lambda form: form.has("project", "pid") or form.has("metadata", "*", "av") or form.heading("VGG Image Ann")),
    Format("Supervisely's JSON of one picture", _SUPERVISELY,
           lambda form: form.has("objects", "classTitle") or form.has("objects", "geometryType")),
    Format("Supervisely's meta.json", _SUPERVISELY,
           lambda form: form.has("classes", "title")),
    Format("Cityscapes' JSON of one picture", _CONVERT,
           lambda form: form.has("imgHeight") and form.has("objects")),
    Format("V7's Darwin JSON of one picture", _EXPORT,
           lambda form: form.has("annotations", "bounding_box") or form.has("item", "slots")),
    Format("BDD100K's JSON (Scalabel)", "convert it to COCO's JSON with Scalabel's to_coco",
           lambda form: form.has("labels", "box2d") or form.has("frames", "labels") or form.has("frames", "objects")),
    Format("COCO's JSON", "leave kind: auto", _is_coco, "coco"),
    # a list of JSON
    Format("CreateML's JSON", _EXPORT,
           lambda form: form.has("annotations", "coordinates")),
    Format("Label Studio's own JSON", _LABEL_STUDIO,
           lambda form: form.has("annotations", "result") or form.has("completions", "result")),
    Format("Label Studio's JSON-MIN", _LABEL_STUDIO,
           lambda form: form.kind == "list" and any(form.has("*", key) for key in _LABELS)),
    Format("Labelbox's JSON", _EXPORT,
           lambda form: form.has("Labeled Data") or form.has("data_row")),
    Format("a list of detections (COCO's results format)", "give the annotations of these images",
           lambda form: form.kind == "list" and form.has("score") and form.has("image_id")),
    Format("a list of pictures that hold their annotations",
           "write COCO's three lists, images, annotations and categories; image_id tells the image of an annotation",
           lambda form: form.kind == "list" and (form.has("annotations", "bbox") or form.has("objects", "bbox"))),
    # JSON Lines
    Format("a manifest of SageMaker", _CONVERT, lambda form: form.kind == "lines" and form.has("source-ref")),
    Format("Hugging Face's metadata.jsonl", _CONVERT, lambda form: form.kind != "list" and form.has("file_name")),
    Format("JSON Lines, one object per line", _CONVERT, lambda form: form.kind == "lines"),
    # XML
    Format("CVAT's XML", "leave kind: auto", _is_cvat, "cvat"),
    Format("XML of LabelMe's old web tool", _CONVERT,
           lambda form: form.element("annotation") and form.element("polygon") and not form.element("bndbox")),
    Format("Pascal VOC's XML of one picture", _FOLDER, lambda form: form.element("annotation"), "voc"),
    Format("dlib's XML", _CONVERT, lambda form: form.element("dataset") and form.element("box")),
    # text
    Format("YOLO's description of a data set", "leave kind: auto", _is_yolo_file, "yolo"),
    Format("YOLO's labels of one picture", "give the folder that holds labels, pictures and data.yaml",
           lambda form: form.rows(rf"\d+(?:\.0*)?(?:\s+{_NUMBER}){{4,}}"), "yolo"),
    Format("OpenImages' CSV", _CONVERT, lambda form: form.heading("^ImageID,")),
    Format("a CSV table of boxes", _CONVERT,
           lambda form: form.heading(r",.*\b(x_?min|x1|xtl|bbox\w*)\b|\bx_?min\b.*,")),
    Format("Label Studio's CSV", _LABEL_STUDIO, lambda form: form.heading(r"\bannotation_id\b")),
    Format("DOTA's labels of turned boxes", _CONVERT,
           lambda form: form.rows(rf"(?:{_NUMBER} ){{8}}\S.* [0-2]") or form.heading("^imagesource:")),
    Format("KITTI's labels of one picture", _CONVERT, lambda form: form.rows(rf"[A-Za-z_]+(?: {_NUMBER}){{14,15}}")),
    Format("a table of boxes (MOT, VisDrone)", _CONVERT,
           lambda form: form.rows(rf"(?:{_NUMBER},\s*){{7,9}}{_NUMBER},?")),
    Format("a CSV table of boxes", _CONVERT, lambda form: form.rows(rf"[^,]+,(?:{_NUMBER},){{4}}[^,]+(?:,\d+,\d+)?")),
    # binary files
    Format("an archive", "unpack it; gndet does not open archives",
           lambda form: form.text.startswith(("PK\3\4", "\x1f\x8b", "Rar!", "7z"))),
    Format("TensorFlow's TFRecord", _CONVERT, lambda form: form.kind == "binary" and "image/" in form.text),
    Format("a Parquet table", _CONVERT, lambda form: form.text.startswith("PAR1")),
    Format("an HDF5 file", _CONVERT, lambda form: form.text.startswith("\x89HDF")),
)  # fmt: skip


def name_format(content: str | bytes | Path) -> str | None:
    """Name the format of annotations that are not COCO's, and say what to do; None if it is unknown.

    content: the beginning of a file as text or bytes, or the path of a file.
    """
    form = _form_of_file(content) if isinstance(content, Path) else form_of(content)
    found = _first(form) if form else None
    return f"{found.name}; {found.way}" if found and found.kind != "coco" else None


def sniff(path: Path) -> str | None:
    """Return which kind of data set a file belongs to (coco, yolo, voc, labelme, cvat or via), None if to none.

    Looks at the first and the last HEAD bytes of the file, not at its name.
    """
    form = _form_of_file(path)
    found = _first(form) if form else None
    return found.kind or None if found else None


def is_config(path: Path) -> bool:
    """Return whether a path is meant as a config of gndet, not as data: a YAML file, but none of YOLO's."""
    return path.suffix.lower() in (".yaml", ".yml") and not path.is_dir() and sniff(path) is None


def _first(form: Form) -> Format | None:
    return next((row for row in FORMATS if row.fits(form)), None)


def _form_of_file(path: Path) -> Form | None:
    """Describe a file, None if it cannot be read.  A pipe is not opened: that may wait forever."""
    if not os.path.isfile(path):
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(0, os.SEEK_END)
            file.seek(max(HEAD, file.tell() - HEAD))
            tail = file.read()
    except OSError:
        return None
    form = form_of(head)
    if form.kind == "object" and tail:  # the keys that follow a long list, or an embedded picture
        found = _LATE.finditer(tail.decode("utf-8", "replace"))
        form = form._replace(keys=form.keys | {(key[1] or key[2],) for key in found})
    return form


def form_of(content: str | bytes) -> Form:
    """Describe the beginning of a file."""
    if isinstance(content, bytes):
        encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "utf-8")
        if encoding != "utf-16" and b"\0" in content:
            return Form("binary", frozenset(), content.decode("latin-1"))
        content = content.decode(encoding, "replace")
    text = content.lstrip()
    if text.startswith("<"):
        return Form("xml", frozenset(), text)
    if not text.startswith(("{", "[")):
        return Form("text", frozenset(), text)
    kind = "lines" if _LINES.match(text) else "object" if text.startswith("{") else "list"
    return Form(kind, frozenset(_scan(text)), text)


def _scan(text: str) -> Iterator[tuple[str, ...]]:
    """Yield the keys of the beginning of a JSON text, with those around them."""
    keys: list[str | None] = []  # of each bracket that is open: the last key, None in a list
    for token in _TOKEN.finditer(text):
        if token[0] in ("{", "["):
            keys.append(None)
        elif token[0] in ("}", "]"):
            if keys:
                keys.pop()
        elif token[2] and keys:
            keys[-1] = token[1]
            path = tuple(key for key in keys if key is not None)
            if len(path) <= DEPTH:
                yield path
