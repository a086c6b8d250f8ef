"""Folders as strangers bring them: without pictures, with a folder around them, with other data beside them."""

from pathlib import Path

from exported import write
from test_data_folders import COCO

from gndet.data.datasets.guess import guess_folder


def test_pictures_of_another_data_set_beside_the_export_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, {"mine/result.json": COCO, "other/a.png": None, "images/b.png": None})
    assert guess_folder(tmp_path / "mine" / "result.json") is None
    write(tmp_path, {"mine/annotations/file.json": COCO, "mine/pics/a.png": None})
    assert guess_folder(tmp_path / "mine" / "annotations" / "file.json") == tmp_path / "mine" / "pics"
