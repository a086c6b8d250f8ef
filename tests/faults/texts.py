"""Hostile texts, and data sets whose classes, pictures and folders have them as names, through every verb.

No verb may end in a traceback or steer the terminal, and what is written must be read back as it was.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from faults.killing import run, tiny_config, wrong
from gndet.checkpoint import load_checkpoint
from gndet.errors import GndetError

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # raw in an output
NAME_BYTES = 255  # of a file name
SIDE = 24  # pixels of a picture
ESCAPES = (
    "\x1b[31mred", "\x1b]52;c;cm0gLXJm\x07", "\x1b[2J\x1b[H", "\x9b31m", "over\rwritten", "\x1b]8;;http://x\x07",
    "\x08" * 9,
)  # fmt: skip
TURNED = ("\u202egnp.exe", "\u2066a\u2069", "\u200fright", "שלום", "مرحبا \u202a", "\u2067\u202e\u2069")
PLACES = (
    "..", "../..", "../../etc/passwd", "/etc/passwd", "a/b", "a//b", "./a", "~", "~root", "C:\\a", "\\\\host\\a",
    "file:///a", "-rf", "--out", "-", "*", "?", "[a]", "|cat", ";id", "`id`", "$(id)", "${HOME}", "&", ">x", "#", "%",
    "%2e%2e", "@a", "a=b", "data.root=x", "!", "^",
)  # fmt: skip
FORMATS = (
    "$x$", "$_$", "$\\frac{", "$", "$$", "_hidden", "__", "\\alpha", "%s%d%n", "%(a)s", "{}", "{0}", "{a.b}", "{{",
    "}", "\\n", "\\x1b", "\\u0041", "[bold]", "[/]", "[link=x]", ":smile:", "<b>", "&amp;",
)  # fmt: skip
MARKUP = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</style><script>", "</svg><svg onload=x>", "<!--",
    "-->", "]]>", "\"onclick='x'", "'><i>", "&lt;", "javascript:x", "</title>", "<a href=//x>", "<?xml?>",
    "<!DOCTYPE x [<!ENTITY a 'b'>]>",
)  # fmt: skip
QUOTES = (
    "'", '"', "`", "\\", "\\'", '\\"', "''", '"""', "“", "a,b", "a;b", "a\tb", "=1+1", "+1", "@SUM(1)", "=cmd|x",
)  # fmt: skip
WORDS = (
    "null", "true", "no", "1e999", "NaN", "-0", "0x10", "1_000", "[]", "{", ": ", "- x", "# c", "!!python/object:x",
    "&a *a", "---", "...", "CON", "nul", "aux.txt", "com1", "last", "best", ".lock", "checkpoints", "background",
    "__proto__", "all", "none", "class_0", "toString", "images", "train", "val",
)  # fmt: skip
SPACES = (
    " ", "  a", "a  ", "a.", "a..", "...", ".", "a\nb", "\n", "a\r\nb", "\u2028", "\u2029", "\x85", "\xa0", "\u3000",
    "\ufeff", "\u200b", "\u200d", "\xad", "\ufffe", "\uffff", "\ufffd", "\U000e0001", "\U0010ffff", "\x00", "a\x00b",
    "\t",
)  # fmt: skip
SIGNS = (
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "1️⃣", "👋🏿", "☃", "𝒳", "𠜎", "ﷺ", "ǆ", "ß", "İ", "ﬁ", "Å", "A\u030a",
    "e" + "\u0301" * 60, "日本語", "한국", "ไทย", "Ω",
)  # fmt: skip
HALVES = ("cat \ud83d", "\udc00", "\udcff", "\ude00\ud83d", "\ud800\udbff", "a\udc80b")


def _random(draw: random.Random) -> str:
    """Draw a few code points of one of Unicode's ranges."""
    low, high = draw.choice(
        ((0, 0x20), (0, 0x100), (0x80, 0x800), (0x800, 0xD800), (0xD800, 0x10000), (0x10000, 0x110000))
    )
    return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 12)))


def _bytes(draw: random.Random) -> str:
    return os.fsdecode(draw.randbytes(draw.randint(1, 12)))


def _long(draw: random.Random) -> str:
    return draw.choice(("x", "ä", "日", "😀", "\u0301", "W ", "<", "$", "_")) * draw.choice((60, 130, 250, 300, 5000))


FAMILIES: tuple[Callable[[random.Random], str], ...] = (
    *((lambda draw, texts=texts: draw.choice(texts)) for texts in
      (ESCAPES, TURNED, PLACES, FORMATS, MARKUP, QUOTES, WORDS, SPACES, SIGNS, HALVES)),
    _random, _random, _bytes, _long,
)  # fmt: skip


def texts(draw: random.Random, count: int) -> list[str]:
    """Draw different texts; every other one has a number before or after it, so that it is new."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = "".join(draw.choice(FAMILIES)(draw) for _ in range(draw.choice((1, 1, 2))))
        text = draw.choice((text, f"{text}{len(found)}", f"{len(found)}{text}"))
        if text not in found:
            found[text] = None
    return list(found)


def file_names(draw: random.Random, count: int) -> list[str]:
    """Draw texts that a file system takes as the names of files, with a suffix."""
    found: dict[str, None] = {}
    for text in texts(draw, 4 * count):
        data = os.fsencode(valid(text) if re.search("[\ud800-\udc7f\udd00-\udfff]", text) else text)
        name = os.fsdecode(data.replace(b"/", b"").replace(b"\0", b"")[: NAME_BYTES - 4])
        if name.strip(".") and len(found) < count:
            found[f"{name}.png"] = None
    return list(found)


def valid(text: str) -> str:
    """Return a text as it is read from JSON, with U+FFFD for each half of a character."""
    return re.sub("[\ud800-\udfff]", "\ufffd", json.loads(json.dumps(text)))  # two halves may be a character


class Hostile:
    """A COCO data set of hostile names: one picture and object per class, in a few folders."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        """Write the data set and a config that trains on it."""
        draw = random.Random(f"texts {seed}")
        # a config is text: it refuses a data.root of other bytes, with its key
        self.folder, self.root = folder, folder / next(name for name in file_names(draw, 50) if valid(name) == name)
        self.classes = list({valid(text): text for text in texts(draw, 2 * count) if text.strip()}.values())[:count]
        folders = ["", *(name[:-4] for name in file_names(draw, count // 10))]
        self.names = [f"{draw.choice(folders)}/{name}".lstrip("/") for name in file_names(draw, count)]
        tree: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        for number, (name, text) in enumerate(zip(self.names, self.classes, strict=True), 1):
            path = self.root / "img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            color = (number % 256, number // 256, draw.randrange(256))
            with open(path, "xb") as file:
                Image.new("RGB", (SIDE, SIDE), color).save(file, "PNG")
            tree["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            tree["categories"].append({"id": number, "name": text})
            tree["annotations"].append({
                "id": number, "image_id": number, "category_id": number, "bbox": [4, 4, 12, 12], "area": 144,
                "iscrowd": 0, "segmentation": [[4, 4, 16, 4, 16, 16, 4, 16]],
            })  # fmt: skip
        self.file = self.root / "a.json"
        self.file.write_text(json.dumps(tree, ensure_ascii=True))
        found = {"kind": "coco", "annotations": "a.json", "images": "img"}
        config = tiny_config()
        config["data"] |= {
            "root": str(self.root),
            "train": found,
            "val": found,
            "shortest_edge": [32],
            "shortest_edge_test": 32,
        }
        config["model"]["box_head"] |= {"score_threshold": 0.0, "detections_per_image": 2}
        config["train"]["schedule"]["updates"] = 1
        (folder / "hostile.yaml").write_text(yaml.safe_dump(config))

    def commands(self) -> Iterator[tuple[str, ...]]:
        """Yield the commands in which names are read, written and shown."""
        file, pictures = str(self.file), str(self.root / "img")
        yield "check", file, "--image-folder", pictures, "--images", "--sheet", "sheet.png", "--json", "check.json"
        yield "check", "hostile.yaml"
        yield "train", "hostile.yaml", "out=run", "train.vis_images=4"
        yield "evaluate", "run", "--out", "found.json"
        yield "report", "run"
        yield "analyze", "run", "--json", "analysis.json", "--csv", "tables"
        yield "predict", "run", pictures, "--out", "drawn", "--threshold", "0", "--save-crops", "--sheet"
        yield "convert-data", file, "coco", "--to", "coco", "--image-folder", pictures
        yield "convert-data", file, "yolo", "--to", "yolo", "--image-folder", pictures
        yield "check", "yolo"
        yield "check", "coco"

    def broken(self) -> Iterator[str]:
        """Give each command.  Yields each promise that is broken."""
        for words in self.commands():
            status, text = run(words, self.folder, self.folder.parent)
            shown = " ".join(words[:2])
            yield from (f"{shown}: {line}" for line in wrong(status, text, (0,)))
            if raw := STEERING.findall(text):
                yield f"{shown}: raw in the output: {sorted(map(ascii, set(raw)))[:5]}"
        for read in (self._checkpoint, self._copy, self._predictions, self._page, self._others):
            try:
                yield from read()
            except (GndetError, OSError, ValueError, KeyError) as error:
                yield f"{read.__name__}: cannot be read back: {error!r}"

    def _checkpoint(self) -> Iterator[str]:
        classes = load_checkpoint(self.folder / "run" / "last").meta["classes"]
        yield from unequal("classes of the checkpoint", list(map(valid, self.classes)), classes)

    def _copy(self) -> Iterator[str]:
        tree = json.loads((self.folder / "coco" / "annotations" / "instances_all.json").read_bytes())
        names = [category["name"] for category in tree["categories"]]
        yield from unequal("classes of the copy", list(map(valid, self.classes)), names)
        for image in tree["images"]:
            copy = self.folder / "coco" / "all" / image["file_name"]
            if copy.read_bytes() != (self.root / "img" / self.names[image["id"] - 1]).read_bytes():
                yield f"picture {image['id']} of the copy is another one"
        labels = [path for path in (self.folder / "yolo" / "labels").rglob("*") if path.is_file()]
        if len(labels) != len(self.names):
            yield f"{len(labels)} label files for {len(self.names)} pictures"
        classes = yaml.safe_load((self.folder / "yolo" / "data.yaml").read_text(encoding="utf-8"))["names"]
        yield from unequal("classes of data.yaml", list(map(valid, self.classes)), list(classes.values()))

    def _predictions(self) -> Iterator[str]:
        images = json.loads((self.folder / "drawn" / "images.json").read_bytes())
        found = json.loads((self.folder / "drawn" / "predictions.json").read_bytes())
        crops = [path for path in (self.folder / "drawn" / "crops").rglob("*") if path.is_file()]
        drawn = [path for path in (self.folder / "drawn").rglob("*.png") if "crops" not in path.parts]
        if len(crops) != len(found):
            yield f"{len(crops)} crops of {len(found)} detections"
        expected = {str(self.root / "img" / name) for name in self.names if "/" not in name}  # none from folders below
        yield from unequal("names in images.json", sorted(expected), sorted(i["file_name"] for i in images["images"]))
        if len(drawn) != len(expected) + 1:
            yield f"{len(drawn)} drawn pictures of {len(expected)} and a sheet"

    def _page(self) -> Iterator[str]:
        page = Page()
        page.feed((self.folder / "run" / "report.html").read_text(encoding="utf-8"))
        if page.wrong:
            yield f"report.html: {page.wrong[:3]}"

    def _others(self) -> Iterator[str]:
        for name in ("check.json", "analysis.json", "found.json"):
            content = (self.folder / name).read_bytes()
            json.loads(content.partition(b"\ngndet")[0] if name == "found.json" else content)
        tables = list((self.folder / "tables").glob("*.csv"))
        if not tables:
            yield "no tables"
        for path in tables:
            path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Finds what names could have put into a page: scripts, event handlers, links, tags of unknown kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.wrong = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if self.scripts > 1 or any(name.startswith("on") or "//x" in (value or "") for name, value in attrs):
            self.wrong.append(f"<{tag} {attrs}>")


def unequal(what: str, expected: list[str], found: list[str]) -> Iterator[str]:
    """Say in what two lists differ."""
    pairs = [(a, b) for a, b in zip(expected, found, strict=False) if a != b]
    if pairs or len(expected) != len(found):
        yield f"{what}: {len(found)} of {len(expected)}, {len(pairs)} differ: {ascii(pairs[:3])[:300]}"
