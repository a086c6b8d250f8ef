"""A file's format is named from its beginning, in whatever order its keys are."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from gndet.data.datasets.formats import name_format, sniff

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
COCO = {
    "info": {"description": "a set"},
    "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
    "annotations": [BOX],
    "categories": [{"id": 1, "name": "cup"}],
}
LABELME = {
    "version": "5.4.1",
    "flags": {},
    "shapes": [{"label": "cup", "points": [[1, 2], [3, 4], [5, 6]], "group_id": None, "shape_type": "polygon"}],
    "imagePath": "a.png",
    "imageData": None,
    "imageHeight": 9,
    "imageWidth": 9,
}
REGION = {"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}, "region_attributes": {}}
VIA_FILE = {"filename": "a.png", "size": 12, "regions": [REGION], "file_attributes": {}}
VIA_CSV = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
CVAT = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n'
VOC = "<annotation>\n\t<folder>a</folder>\n\t<filename>a.png</filename>\n\t<object><name>cup</name><bndbox>"

READ: dict[str, tuple[str, Any]] = {
    "COCO": ("coco", COCO),
    "COCO, annotations first": ("coco", {key: COCO[key] for key in ("annotations", "categories", "images")}),
    "COCO without categories": ("coco", {"images": COCO["images"], "annotations": [BOX]}),
    "COCO without annotations": ("coco", {"images": COCO["images"], "categories": COCO["categories"]}),
    "LabelMe": ("labelme", LABELME),
    "LabelMe without shapes": ("labelme", LABELME | {"shapes": []}),
    "VIA project": ("via", {"_via_settings": {}, "_via_img_metadata": {"a.png12": VIA_FILE}, "_via_attributes": {}}),
    "VIA regions": ("via", {"a.png12": VIA_FILE}),
    "VIA 1 regions": ("via", {"a.png12": VIA_FILE | {"regions": {"0": REGION}, "base64_img_data": ""}}),
    "VIA CSV": ("via", VIA_CSV + 'a.png,12,"{}",0,0,"{}","{}"\n'),
    "VIA 1 CSV": ("via", "#" + VIA_CSV),
    "CVAT": ("cvat", CVAT),
    "CVAT without meta": ("cvat", "<annotations><image id='0' name='a.png' width='9' height='9'/></annotations>"),
    "VOC": ("voc", VOC),
    "VOC with a comment": ("voc", "<?xml version='1.0'?><!-- made by a tool --><annotation verified='yes'>"),
    "YOLO data.yaml": ("yolo", "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['cup', 'plate']\n"),
    "YOLO data.yaml, names first": ("yolo", "names:\n  0: cup\npath: .\ntrain: images/train\n"),
    "Darknet": ("yolo", "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n"),
    "YOLO rows": ("yolo", "0 0.5 0.5 0.2 0.2\n1 .25 0.3 1e-2 0.1\n"),
    "YOLO outlines": ("yolo", "0 0.1 0.1 0.2 0.1 0.2 0.2\n"),
}
NAMED: dict[str, tuple[str, Any]] = {
    "panoptic": ("segments_info", COCO | {"annotations": [{"image_id": 1, "segments_info": [{"id": 7}]}]}),
    "captions": ("captions", COCO | {"annotations": [{"image_id": 1, "id": 2, "caption": "a cup"}]}),
    "Datumaro": ("Datumaro", {"info": {}, "categories": {"label": {"labels": []}}, "items": [{"id": "a"}]}),
    "VIA 3": ("VIA 3", {"project": {"pid": "__VIA_PROJECT_ID__"}, "config": {}, "attribute": {}, "metadata": {}}),
    "Supervisely": ("Supervisely", {"size": {"height": 9, "width": 9}, "objects": [{"classTitle": "cup"}]}),
    "Supervisely meta": ("meta.json", {"classes": [{"title": "cup", "shape": "rectangle"}], "tags": []}),
    "Cityscapes": ("Cityscapes", {"imgHeight": 9, "imgWidth": 9, "objects": [{"label": "car", "polygon": []}]}),
    "Darwin": ("Darwin", {"version": "2.0", "item": {"name": "a", "slots": []}, "annotations": []}),
    "BDD100K": ("BDD100K", [{"name": "a.jpg", "labels": [{"category": "car", "box2d": {"x1": 1}}]}]),
    "CreateML": ("CreateML", [{"image": "a.png", "annotations": [{"label": "cup", "coordinates": {"x": 2}}]}]),
    "Label Studio": ("Label Studio", [{"id": 1, "annotations": [{"result": []}], "data": {"image": "/a.png"}}]),
    "Label Studio MIN": ("JSON-MIN", [{"image": "a.png", "id": 1, "label": [{"x": 1, "rectanglelabels": ["cup"]}]}]),
    "Labelbox": ("Labelbox", [{"ID": "x", "Labeled Data": "http://a.png", "Label": {"objects": []}}]),
    "detections": ("detections", [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]),
    "nested": ("hold their annotations", [{"file_name": "a.png", "annotations": [BOX]}]),
    "metadata.jsonl": ("Hugging Face", '{"file_name": "a.png", "objects": {}}\n{"file_name": "b.png"}\n'),
    "JSON Lines": ("JSON Lines", '{"image": "a.png", "prefix": "detect"}\n{"image": "b.png"}\n'),
    "SageMaker": ("SageMaker", '{"source-ref": "s3://a"}\n{"source-ref": "s3://b"}\n'),
    "old LabelMe": ("old web tool", "<annotation><filename>a.jpg</filename><object><polygon><pt><x>1</x>"),
    "dlib": ("dlib", "<?xml version='1.0'?><dataset><images><image file='a.jpg'><box top='1' left='2'"),
    "OpenImages": ("OpenImages", "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n"),
    "TensorFlow CSV": ("CSV", "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,9,9,cup,1,2,3,4\n"),
    "RetinaNet CSV": ("CSV", "a.png,1,2,3,4,cup\nb.png,5,6,7,8,plate\n"),
    "DOTA": ("DOTA", "10.0 10.0 20.0 10.0 20.0 20.0 10.0 20.0 plane 0\n"),
    "KITTI": ("KITTI", "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"),
    "MOT": ("MOT", "1,1,912,484,97,109,0,7,1\n2,1,912,484,97,109,0,7,1\n"),
    "TFRecord": ("TFRecord", struct.pack("<QI", 40, 77) + b"\n\x26\n\x24\n\rimage/encoded\x12\0"),
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "file"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", READ)
def test_a_format_that_is_read_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    kind, content = READ[name]
    path = write(tmp_path, content)
    text = path.read_text()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert sniff(path) == kind


@pytest.mark.parametrize("name", NAMED)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    words, content = NAMED[name]
    path = write(tmp_path, content)
    named = name_format(path)
    assert named is not None and words in named and ";" in named
    assert sniff(path) is None
    assert name_format(path.read_bytes()) == named


@pytest.mark.parametrize("words", ["plain words", "", "{", "[]", "{}", "[1, 2]", "\0\0\0", "a,b\n1,2\n", "<html>"])
def test_what_is_none_of_them_has_no_name(tmp_path: Path, words: str) -> None:
    assert sniff(write(tmp_path, words)) is None and name_format(write(tmp_path, words)) is None


def test_coco_is_not_named_as_another_format(tmp_path: Path) -> None:
    assert name_format(write(tmp_path, COCO)) is None


def test_keys_that_follow_a_long_list_or_an_embedded_picture_are_seen(tmp_path: Path) -> None:
    images = [COCO["images"][0] | {"id": number} for number in range(5000)]
    assert sniff(write(tmp_path, COCO | {"images": images})) == "coco"
    picture_first = {"imageData": "A" * 500_000} | {key: LABELME[key] for key in LABELME if key != "imageData"}
    assert sniff(write(tmp_path, picture_first)) == "labelme"


def test_quotes_and_brackets_within_text_are_text(tmp_path: Path) -> None:
    odd = {"info": {"description": 'the key "shapes": [ and "imagePath": "x"} \\'}} | COCO
    assert sniff(write(tmp_path, odd)) == "coco"


def test_a_file_that_cannot_be_read_has_no_format(tmp_path: Path) -> None:
    assert sniff(tmp_path / "none.json") is None and sniff(tmp_path) is None
