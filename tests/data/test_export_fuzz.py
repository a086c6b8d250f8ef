"""Damage in any file of a YOLO or VOC export ends in findings, never in a traceback."""

import random
from pathlib import Path

import pytest
from exported import inspected, write

from gndet.data.datasets.exports.voc import open_voc
from gndet.data.datasets.exports.yolo import open_yolo
from gndet.data.datasets.faults import FAULTS

PIECES = [
    b"nan", b"-", b"1e999", b"../", b"\0", b"\xff", b"[", b"{", b"*a", b"&a ", b"<", b"<a/>", b"</", b"&x;", b",",
    b"\n", b"9" * 30, b"~", b"\\", b"%", b"!!python/object:os.system ",
]  # fmt: skip
YOLO = {
    "data.yaml": "path: .\ntrain: images/train\nnc: 2\nkpt_shape: [3, 2]\nnames: {0: cell, 1: plate}\n",
    "labels/train/a.txt": "0 0.5 0.5 0.5 0.5\n1 0.2 0.2 0.8 0.2 0.5 0.8\n",
}
VOC = {
    "ImageSets/Main/train.txt": "a\n",
    "Annotations/a.xml": "<annotation><filename>a.png</filename><size><width>64</width><height>48</height></size>"
    "<object><name>cell</name><bndbox><xmin>9</xmin><ymin>7</ymin><xmax>24</xmax><ymax>18</ymax></bndbox></object></annotation>",
}
EXPORTS = {"yolo": (open_yolo, YOLO, "images/train/a.png"), "voc": (open_voc, VOC, "JPEGImages/a.png")}


def damaged(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.randint(1, 5)):
        place, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        piece = rng.choice([*PIECES, b"", bytes([rng.randrange(256)]), bytes(content[place:other])])
        content[place : place + rng.randrange(6)] = piece
    return bytes(content)


@pytest.mark.parametrize("kind", EXPORTS)
def test_damage_ends_in_findings(tmp_path: Path, kind: str) -> None:
    opener, files, picture = EXPORTS[kind]
    write(tmp_path, files | {picture: None})
    rng = random.Random(0)
    found = set()
    for _ in range(150):
        for name, text in files.items():
            write(tmp_path, {name: damaged(text, rng)})
            found |= {finding.code for finding in inspected(opener, tmp_path).findings}
            write(tmp_path, {name: text})
    assert found <= set(FAULTS) and len(found) > 4
