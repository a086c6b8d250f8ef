"""Names of any code points and bytes go through every verb: nothing ends in a traceback or steers the terminal."""

import csv
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import gndet.train
from faults.tiny import CONFIG
from gndet.checkpoint import load_checkpoint
from gndet.cli.main import main
from gndet.text import valid_text

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("thin")]

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PIECES = [
    "\ud83d", "\x1b]52;c;cm0gLXJm\x07", "\x9b31m", "\u202e", "\n", "\r", "\t", "\0", "$x_{", "<b>&\"'", "%s{}", "\\",
    "\u3000", "e\u0301", "日本", "אב", "\U0001f600", "/", "..", " ", "x" * 100, "\x7f", "\u2028", "\ufeff", "\uffff",
    "=cmd()", ",;", "#",
]  # fmt: skip


def class_name(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, 4)))


def file_name(rng: random.Random) -> str:
    letters = [piece.replace("/", "-").replace("\0", "0").encode("utf-8", "ignore") for piece in PIECES]
    parts = [bytes([rng.choice([*range(1, 47), *range(48, 256)])]) for _ in range(8)] + rng.choices(letters, k=2)
    rng.shuffle(parts)
    return os.fsdecode(b"".join(parts))


def write_data(folder: Path, rng: random.Random, pictures: int) -> list[str]:
    """Write a data set with two classes per picture.  Returns its class names."""
    names = ["0\ud83d", *(f"{i}{class_name(rng)}" for i in range(1, 2 * pictures))]
    images, annotations = [], []
    for i in range(pictures):
        name = f"{i}{file_name(rng)}/{i}{file_name(rng)}.png" if i % 2 else f"{i}{file_name(rng)}.png"
        path = folder / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9 * i, 80, 80)).save(path, "PNG")
        images.append({"id": i + 1, "file_name": name, "width": 64, "height": 64})
        for j in (2 * i, 2 * i + 1):
            box = {"bbox": [5, 5 + j % 20, 30, 30], "area": 900, "iscrowd": 0}
            corners = [5, 5 + j % 20, 35, 5 + j % 20, 35, 35 + j % 20, 5, 35 + j % 20]
            box |= {"segmentation": [corners], "image_id": i + 1, "category_id": j + 1}
            annotations.append({"id": j + 1} | box)
    categories = [{"id": j + 1, "name": name} for j, name in enumerate(names)]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(tree))
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    part = {"annotations": "a.json", "images": "img"}
    config["data"] |= {"root": "", "train": part, "val": part, "cache": "cache", "max_unreadable": 0.5}
    config["train"] |= {"report": True, "vis_images": 3, "checkpoint_every": 1, "schedule": {"updates": 3}}
    (folder / "c.yaml").write_text(yaml.safe_dump(config | {"device": "cpu"}))
    return json.loads(json.dumps(names))  # JSON joins the halves of a character


def test_names_of_any_kind_go_through_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    home = tmp_path / os.fsdecode(b"caf\xe9 \x1b]0;a\x07")
    home.mkdir()
    monkeypatch.chdir(home)
    names = write_data(home, rng, 12)
    picture = next(path for path in (home / "img").iterdir() if path.is_file())

    def gndet_says(*words: str, status: int = 0) -> str:
        assert main(words) == status, words
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and not STEERING.search(out + err), ascii(out + err)
        return out + err

    def stop_after_a_bad_picture(*arguments: Any) -> None:
        save(*arguments)
        picture.write_bytes(b"no picture")
        raise KeyboardInterrupt

    save = gndet.train.Saver.save
    assert "category-name-cut" in gndet_says(
        "check", "c.yaml", "--images", "--sheet", "sheet.png", "--json", "check.json"
    )
    before = picture.read_bytes()
    monkeypatch.setattr(gndet.train.Saver, "save", stop_after_a_bad_picture)
    gndet_says("train", "c.yaml", "out=run", status=130)
    monkeypatch.setattr(gndet.train.Saver, "save", save)
    assert "continuing after update 1" in gndet_says("train", "c.yaml", "out=run")
    meta = load_checkpoint(home / "run" / "last").meta
    assert meta["classes"] == [valid_text(name) for name in names] and meta["unreadable"]
    picture.write_bytes(before)
    gndet_says("evaluate", "run", "--out", "found.json")
    gndet_says("predict", "run", "img/**/*.png", "--out", "drawn", "--threshold", "0", "--save-crops", "--sheet")
    assert len(json.loads((home / "drawn" / "images.json").read_text())["images"]) == 12
    gndet_says("analyze", "run", "--json", "analysis.json", "--csv", "tables")
    rows = list(csv.DictReader((home / "tables" / "classes.csv").open(newline="")))
    assert sorted(row["class"] for row in rows) == sorted(["all classes", *meta["classes"]])
    gndet_says("analyze", "found.json", "--data", "a.json")
    gndet_says("report", "run")
    page = (home / "run" / "report.html").read_text(encoding="utf-8")
    assert "Missing here" not in page and "1 training picture(s) could not be read" in page
    for kind in ("coco", "yolo"):
        gndet_says("convert-data", "c.yaml", kind, "--to", kind)
        gndet_says("check", kind)
    gndet_says("export", "run", "--onnx", os.fsdecode(b"m\xff.onnx"), "--size", "64x64")
