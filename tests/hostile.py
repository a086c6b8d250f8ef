"""Data sets with every fault that `gndet check` finds."""

import json
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]


NAN, INF = float("nan"), float("inf")


class Hostile:
    """A data set to which faults are added step by step; image 1 stays good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures = folder, folder / "pictures"
        self.pictures.mkdir(parents=True)
        self.tree: dict[str, list[dict[str, Any]]] = {
            "images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }  # fmt: skip
        self.image(), self.object(category_id=2)

    def image(
        self, picture: Image.Image | bytes | None = None, suffix: str = "png", save: Any = (), **entry: Any
    ) -> Path:
        """Add an image with a good object, and write its file."""
        number = len(self.tree["images"]) + 1
        path = self.pictures / f"{number:02d}.{suffix}"
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            plain = Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0))  # no two files are equal
            (picture or plain).save(path, **dict(save))
        usual = {"id": number, "file_name": path.name, "width": WIDTH, "height": HEIGHT}
        self.tree["images"].append(usual | entry)
        self.object()
        return path

    def object(self, **entry: Any) -> None:
        """Add an object to the last image."""
        number = len(self.tree["annotations"]) + 1
        usual = {"id": number, "image_id": self.tree["images"][-1]["id"], "category_id": 1, "bbox": [2, 2, 10, 10]}
        self.tree["annotations"].append(usual | {"area": 100, "iscrowd": 0, "segmentation": [SQUARE]} | entry)

    def write(self, name: str = "file.json") -> Path:
        (self.folder / name).write_text(json.dumps(self.tree))
        return self.folder / name


def noise(mode: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    pixels = np.random.default_rng(len(mode)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(path: Path) -> bytes:
    noise("RGB").save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def make_bad_objects(data: Hostile) -> None:
    """Add every fault that an object can have, next to a good object."""
    rle = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    data.image()
    for box in ([2, 2, 0, 10], [12, 2, -10, 10]):
        data.object(bbox=box)  # box-empty
    data.object(bbox=[-1, 2, 10, 10])  # box-clipped
    data.object(bbox=[-5, 2, 18, 10])  # box-clipped, box-overhang
    data.object(bbox=[40, 2, 10, 10])  # box-outside
    for box in ([NAN, 2, 10, 10], [2, 2, INF, 10], [2, 2, 10], "2 2 10 10", [2, 2, 10, "ten"], 7, [1e308] * 4):
        data.object(bbox=box)  # box-malformed; json-nan twice
    data.object(bbox=None), data.object(bbox=[])  # box-missing
    data.object(bbox=[], segmentation=[])  # box-none
    data.object(attributes={"rotation": 45.0}, bbox=[8, 8, 10, 10], segmentation=None)  # box-rotated, mask-missing
    data.object(bbox=[2, 2, 0.5, 10], area=5, segmentation=[[2, 2, 2.5, 2, 2.5, 12, 2, 12]])  # box-tiny
    data.object(iscrowd=1, bbox=[3, 0, 2, 30], area=50, segmentation=rle)  # crowd
    data.object(ignore=1)  # ignore-flag
    data.object(iscrowd=1)  # crowd, crowd-polygon
    data.object(iscrowd=2)  # crowd-value
    data.object(area=-1)  # area-value
    data.object(area=None)  # area-missing
    data.object(area=0), data.object(area=900)  # area-wrong
    data.object(area=1)  # area-odd
    data.object(segmentation=[[2, 2, 12, 2, 2, 12]])  # area-box
    data.object(segmentation=[SQUARE, [1, 2, 3, 4], SQUARE[:7]])  # polygon-short twice
    data.object(segmentation=[SQUARE[:5]])  # polygon-short, mask-missing
    for point in (NAN, -INF, 1e12, 10**400, "x", None, True, [1]):
        data.object(segmentation=[[*SQUARE[:7], point]])  # polygon-number; json-nan twice
    for value in (SQUARE[:7], "x", 7, [[SQUARE], 3]):
        data.object(segmentation=value)  # segmentation-malformed
    for value in (SQUARE, [[SQUARE]], [[2, 2], [12, 2], [12, 12], [2, 12]]):
        data.object(segmentation=value)  # segmentation-shape
    data.object(segmentation=[[-40, 2, 80, 12] * 17_000])  # mask-long
    data.object(segmentation=rle | {"counts": [1, 2]})  # rle-counts
    data.object(segmentation=rle | {"counts": [HEIGHT * WIDTH + 1, -1]})  # rle-counts
    data.object(segmentation=rle | {"size": [WIDTH, HEIGHT]})  # rle-size
    data.object(segmentation=rle | {"counts": "~~~"})  # rle-malformed
    data.object(segmentation=rle | {"counts": [HEIGHT * WIDTH]})  # mask-empty, mask-missing
    data.object(bbox=[25, 15, 10, 10])  # mask-elsewhere
    data.object(image_id=99), data.object(image_id="x")  # image-unknown
    data.object(category_id=99)  # category-unknown
    data.object(id=1)  # annotation-id-twice
    data.object(id="x")  # annotation-id
    data.object(area="100")  # number-text
    data.object(id=900.0)  # number-float


BAD_OBJECTS = {
    "box-empty": ("F", 2), "box-clipped": ("F", 2), "box-overhang": ("N", 1), "box-outside": ("E", 1),
    "box-malformed": ("E", 7), "box-tiny": ("N", 1), "crowd": ("N", 2), "crowd-polygon": ("N", 1),
    "crowd-value": ("E", 1), "area-value": ("E", 1), "area-missing": ("F", 1), "polygon-short": ("F", 3),
    "polygon-number": ("E", 8), "segmentation-malformed": ("E", 4), "rle-counts": ("E", 2), "rle-size": ("E", 1),
    "rle-malformed": ("E", 1), "mask-long": ("E", 1), "mask-empty": ("F", 1), "mask-missing": ("N", 3),
    "mask-elsewhere": ("N", 1),
    "image-unknown": ("E", 2), "category-unknown": ("E", 1), "annotation-id-twice": ("E", 1),
    "box-missing": ("F", 2), "box-none": ("F", 1), "box-rotated": ("F", 1), "ignore-flag": ("F", 1),
    "area-wrong": ("F", 2), "area-odd": ("N", 1), "area-box": ("N", 1), "segmentation-shape": ("F", 3),
    "annotation-id": ("F", 1), "number-float": ("F", 1), "number-text": ("F", 1), "json-nan": ("N", 4),
}  # fmt: skip


def make_bad_images(data: Hostile) -> None:
    """Add every fault that an image's entry and path can have."""
    outside = data.folder / "outside"
    outside.mkdir()
    noise("RGB").save(outside / "x.png")
    data.image(), data.tree["annotations"].pop()  # image-empty
    data.image(id=-7)  # image-id; its object: image-unknown
    data.image(id=1)  # image-id-twice
    data.image(width=-1), data.image(height="tall"), data.image(height=30.5)  # image-size
    data.image(width=20_000, height=20_000)  # image-pixels
    data.image(file_name=None)  # file-name
    data.image(file_name="../file.json"), data.image(file_name=str(outside / "x.png"))  # file-escape
    data.image().unlink()  # file-missing
    data.image(suffix="jpg", file_name="13.JPG")  # file-missing: the case
    path = data.image()
    path.unlink(), path.symlink_to(outside / "x.png")  # file-escape
    (data.pictures / "more").symlink_to(outside)
    data.image(file_name="more/x.png")  # file-escape
    path = data.image()
    path.unlink(), path.mkdir()  # file-missing: a folder
    data.image(b"")  # file-empty
    data.image(file_name="01.png")  # file-twice
    data.image(width=40.0)  # number-float
    for name in (unicodedata.normalize("NFD", "größe 1.png"), "a b.png", "#.png"):  # these are all good
        path = data.image(file_name=unicodedata.normalize("NFC", name))
        path.rename(data.pictures / name)
    data.tree["categories"] += [{"id": 9, "name": "bird"}]  # category-gaps, category-unused
    data.tree["categories"] += [{"id": 2, "name": "cow"}, {"id": -5, "name": "ox"}]  # category-id-twice, category-id
    data.tree["categories"] += [{"id": 10}, {"id": 11, "name": "cat"}]  # category-name, category-name-twice
    data.image(), data.object(category_id=11)
    data.tree["annotations"][0]["id"] = 0  # annotation-id-low


BAD_IMAGES = {
    "image-empty": ("N", 1), "image-id": ("E", 1), "image-unknown": ("E", 1), "image-id-twice": ("E", 1),
    "image-size": ("E", 3), "image-pixels": ("E", 1), "file-name": ("E", 1), "file-escape": ("E", 4),
    "file-missing": ("E", 3), "file-empty": ("E", 1), "file-twice": ("N", 1), "number-float": ("F", 1),
    "category-gaps": ("F", 5), "category-unused": ("N", 2), "category-id-twice": ("E", 1), "category-id": ("E", 1),
    "category-name": ("E", 1), "category-name-twice": ("E", 1), "annotation-id-low": ("F", 19),
}  # fmt: skip


def make_bad_pictures(data: Hostile) -> None:
    """Add every fault that only decoding shows."""
    whole = jpeg(data.folder / "x.jpg")
    data.image(whole[: len(whole) // 2], "jpg")
    data.image(b"<!DOCTYPE html><html>404</html>", "jpg")
    with zipfile.ZipFile(data.folder / "x.zip", "w") as file:
        file.writestr("../canary.png", whole)
    data.image((data.folder / "x.zip").read_bytes(), "png")  # picture-unreadable, so far
    for mode, suffix in (("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png")):
        data.image(noise(mode), suffix)  # picture-mode
    data.image(
        Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH))
    )  # picture-16bit, picture-dim
    data.image(Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32)), "tif")  # picture-range
    exif = Image.Exif()
    exif[0x0112] = 6
    data.image(noise("RGB", (HEIGHT, WIDTH)), "jpg", {"exif": exif})  # picture-turned
    data.image(noise("RGB", (WIDTH, HEIGHT)), "jpg", {"exif": exif})  # picture-unrotated
    data.image(noise("RGB", (HEIGHT, WIDTH)))  # picture-size
    frames = [noise("RGB"), Image.new("RGB", (WIDTH, HEIGHT))]
    data.image(frames[0], "gif", {"save_all": True, "append_images": frames[1:]})  # picture-animated, picture-mode
    data.image(Image.new("1", (10_001, 10_000)))  # picture-pixels
    data.image(data.image().read_bytes())  # picture-twice


BAD_PICTURES = {
    "picture-unreadable": ("E", 3), "picture-mode": ("F", 7), "picture-16bit": ("F", 1), "picture-turned": ("F", 1),
    "picture-unrotated": ("E", 1), "picture-size": ("E", 1), "picture-animated": ("N", 1), "picture-pixels": ("E", 1),
    "picture-twice": ("N", 1), "picture-dim": ("N", 1), "picture-range": ("E", 1),
}  # fmt: skip
