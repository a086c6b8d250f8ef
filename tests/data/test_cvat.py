"""CVAT's XML is read as the same data in COCO's JSON; a bad shape costs that shape, named with its line."""

import pickle
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pytest
from labeled import assert_equal, codes, examples, first_pictures, make_pictures, read, window
from pycocotools import mask as coco_mask

from gndet.data.datasets.exports.cvat import cvat_sets, open_cvat
from gndet.data.datasets.layout import find_sets
from gndet.data.datasets.segmentation import to_rle

LABELS = "<labels>" + "".join(f"<label><name>{name}</name></label>" for name in ("plate", "cup")) + "</labels>"
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
META = f"  <meta><task><id>1</id><mode>annotation</mode>{LABELS}</task></meta>\n"
GOOD = '    <box label="cup" source="manual" occluded="0" xtl="5.0" ytl="6.5" xbr="25.0" ybr="36.5" z_order="0"></box>'


def write(folder: Path, *shapes: str, meta: str = META) -> Path:
    """Write a file with a picture of 96 x 72 pixels, whose shapes begin in line 7 with a good one."""
    make_pictures(folder / "images", "a.png")
    path = folder / "annotations.xml"
    image = '  <image id="0" name="a.png" width="96" height="72">'
    path.write_text("\n".join([HEAD + meta + "\n" + image, GOOD, *shapes, "  </image>\n</annotations>\n"]))
    return path


def runs(pixels: np.ndarray) -> str:
    """Return a mask (h, w) as CVAT's run lengths along its rows, the first outside."""
    lengths = [(value, len(list(group))) for value, group in groupby(pixels.ravel().tolist())]
    return ", ".join(str(length) for length in ([0] if lengths[0][0] else []) + [length for _, length in lengths])


def to_shapes(item: dict[str, Any], group: int) -> list[str]:
    """Return an annotation as CVAT writes it, the parts of an object as a group."""
    label, mask = f"label={quoteattr(item['name'])}", item.get("segmentation")
    if isinstance(mask, dict):
        pixels, left, top = window(mask)
        size = f'left="{left}" top="{top}" width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
        return [f'<mask {label} rle="{runs(pixels)}" {size} z_order="0"></mask>']
    if mask:
        group_id = f'group_id="{group}"' if len(mask) > 1 else ""
        points = [";".join(f"{x},{y}" for x, y in zip(part[::2], part[1::2], strict=True)) for part in mask]
        return [f'<polygon {label} points="{part}" {group_id}></polygon>' for part in points]
    x, y, width, height = item["bbox"]
    return [f'<box {label} xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"></box>']


@pytest.mark.parametrize(("name", "num"), [("bccd", 20), ("nuclei", 8), ("coco", 20)])
def test_real_data_reads_as_its_coco_json(data_root: Path, tmp_path: Path, name: str, num: int) -> None:
    truth = first_pictures(data_root, tmp_path, name, num)
    if name == "bccd":
        for item in truth.content["annotations"]:
            item.pop("segmentation", None)
    lines = []
    for image, items in truth.pictures():
        sides = f'width="{image["width"]}" height="{image["height"]}"'
        lines.append(f'<image id="{image["id"]}" name={quoteattr(image["file_name"])} {sides}>')
        lines += [shape for group, item in enumerate(items, start=1) for shape in to_shapes(item, group)]
        lines.append("</image>")
    labels = "".join(f"<label><name>{escape(name)}</name></label>" for name in truth.dataset.classes)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    (tmp_path / "annotations.xml").write_text(HEAD + meta + "\n".join(lines) + "</annotations>")
    dataset = read(open_cvat, tmp_path / "annotations.xml", truth.images)
    assert dataset.classes == truth.dataset.classes
    assert_equal(dataset, truth.dataset, boxes=0.02 if name == "coco" else 1e-6)


def test_the_declared_labels_are_the_classes_in_their_order(tmp_path: Path) -> None:
    dataset = read(open_cvat, write(tmp_path))
    assert dataset.classes == ("plate", "cup") and codes(dataset) == {}
    record = dataset.records[0]
    assert record.boxes.tolist() == [[5, 6.5, 25, 36.5]] and record.labels.tolist() == [1] and record.size == (72, 96)


def test_labels_of_points_tags_and_parts_of_skeletons_are_no_classes(tmp_path: Path) -> None:
    declared = [("cup", "any"), ("corner", "points"), ("good", "tag"), ("hand", "skeleton"), ("plate", "mask")]
    labels = "".join(
        f"<label><name>{name}</name><color>#fff</color><type>{kind}</type><attributes><attribute><name>color</name>"
        f"<mutable>False</mutable></attribute></attributes></label>"
        for name, kind in declared
    )
    part = "<label><name>thumb</name><type>points</type><attributes/><parent>hand</parent></label>"
    for job in ("task", "project", "job"):
        path = write(tmp_path, meta=f"<meta><{job}><name>x</name><labels>{labels}{part}</labels></{job}></meta>\n")
        dataset = read(open_cvat, path)
        assert dataset.classes == ("cup", "plate")
        assert any("corner, good, hand" in note for note in dataset.notes)


def test_without_declared_labels_the_classes_are_those_that_occur(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("cup", "a &amp; b"), meta="")
    assert read(open_cvat, path).classes == ("a & b", "cup")


def test_a_mask_is_cut_at_the_edge_of_the_picture_and_may_fill_it(tmp_path: Path) -> None:
    whole = np.ones((72, 96), dtype=bool)
    pixels = np.random.default_rng(0).random((30, 41)) < 0.5
    dataset = read(open_cvat, write(
        tmp_path,
        f'<mask label="cup" rle="{runs(whole)}" left="0" top="0" width="96" height="72"></mask>',
        f'<mask label="cup" rle="{runs(pixels)}" left="55" top="42" width="41" height="30"></mask>',
        f'<mask label="cup" rle="{runs(pixels)}" left="60" top="50" width="41" height="30"></mask>',
    ))  # fmt: skip
    masks = [
        coco_mask.decode(to_rle(mask, (72, 96))).astype(bool) for mask in list(dataset.records[0].segmentations)[1:]
    ]
    assert masks[0].all()
    expected = np.zeros((72, 96), dtype=bool)
    expected[42:72, 55:96] = pixels
    assert (masks[1] == expected).all()
    expected[:] = False
    expected[50:72, 60:96] = pixels[:22, :36]
    assert (masks[2] == expected).all()


def test_an_ellipse_becomes_an_outline(tmp_path: Path) -> None:
    shape = '<ellipse label="cup" cx="48.0" cy="36.0" rx="30.0" ry="12.0" {}></ellipse>'
    dataset = read(open_cvat, write(tmp_path, shape.format(""), shape.format('rotation="30.0"')))
    record, masks = dataset.records[0], list(dataset.records[0].segmentations)[1:]
    np.testing.assert_allclose(record.boxes[1], [18, 24, 78, 48])
    y, x = np.mgrid[0:72, 0:96] + 0.5  # the centers of the pixels
    for mask, turn in zip(masks, (0, np.pi / 6), strict=True):
        along = (x - 48) * np.cos(turn) + (y - 36) * np.sin(turn)
        across = (y - 36) * np.cos(turn) - (x - 48) * np.sin(turn)
        inside = (along / 30) ** 2 + (across / 12) ** 2 <= 1
        drawn = coco_mask.decode(to_rle(mask, (72, 96))).astype(bool)
        assert (drawn & inside).sum() / (drawn | inside).sum() > 0.97  # pycocotools draws polygons half a pixel larger


def test_a_box_before_its_turn_is_handed_over_with_its_rotation(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("z_order", 'rotation="30.0" z_order'))
    export = open_cvat(path, None, "")
    objects = export.parse(export.units[0], lambda name: (72, 96))[0].objects
    assert [item.get("attributes") for item in objects] == [None, {"rotation": 30}]


def test_shapes_of_one_label_and_group_are_one_object(tmp_path: Path) -> None:
    square = '<polygon label="{}" points="{}" group_id="{}"></polygon>'
    dataset = read(open_cvat, write(
        tmp_path,
        square.format("cup", "30,10;40,10;40,20;30,20", 3),
        square.format("plate", "30,30;40,30;40,40;30,40", 3),
        square.format("cup", "50,10;60,10;60,20;50,20", 3),
        square.format("cup", "70,10;80,10;80,20;70,20", 0),
        '<mask label="cup" rle="0, 4" left="50" top="60" width="2" height="2" group_id="4"></mask>',
        '<box label="cup" xtl="60" ytl="60" xbr="62" ybr="62" group_id="4"></box>',
        '<box label="plate" xtl="80" ytl="50" xbr="82" ybr="52" group_id="5"></box>',
        '<box label="plate" xtl="84" ytl="54" xbr="86" ybr="56" group_id="5"></box>',
    ))  # fmt: skip
    record = dataset.records[0]
    assert codes(dataset) == {"shape-joined": 3} and "2 shapes of cup" in examples(dataset, "shape-joined")
    assert record.boxes[1:].tolist() == [
        [30, 10, 60, 20], [30, 30, 40, 40], [70, 10, 80, 20], [50, 60, 62, 62], [80, 50, 86, 56]
    ]  # fmt: skip
    areas = [coco_mask.area(to_rle(mask, (72, 96))) for mask in list(record.segmentations)[1:5]]
    assert areas == [200, 100, 100, 8] and record.segmentations[5] is None


OTHERS = {
    "polyline": '<polyline label="cup" points="1,2;3,4"></polyline>',
    "points": '<points label="cup" points="1,2"></points>',
    "cuboid": '<cuboid label="cup" xtl1="1" ytl1="2"></cuboid>',
    "skeleton": '<skeleton label="cup"><points label="1" points="1,2"></points><points label="2"/></skeleton>',
    "tag": '<tag label="cup" source="manual"><attribute name="a">b</attribute></tag>',
}


def test_points_lines_and_tags_are_counted_and_are_no_objects(tmp_path: Path) -> None:
    dataset = read(open_cvat, write(tmp_path, *OTHERS.values()))
    assert len(dataset.records[0].labels) == 1 and not dataset.refused
    assert codes(dataset) == {"shape-other": 5} and "line 8: a polyline" in examples(dataset, "shape-other")


BAD = {  # by shape: the code, and the words
    '<box label="cup" xtl="a" ytl="1" xbr="5" ybr="5"></box>': ("shape-malformed", "xtl 'a', expected a number"),
    '<box label="cup" xtl="1" ytl="1" xbr="5"></box>': ("shape-malformed", "ybr None"),
    '<box label="cup" xtl="nan" ytl="1" xbr="5" ybr="5"></box>': ("box-malformed", "nan"),
    '<box label="cup" xtl="100" ytl="1" xbr="120" ybr="5"></box>': ("box-outside", "width 96"),
    '<box xtl="1" ytl="1" xbr="5" ybr="5"></box>': ("shape-label", "without a label"),
    '<box label="fork" xtl="1" ytl="1" xbr="5" ybr="5"></box>': ("category-unknown", "fork"),
    '<polygon label="cup" points="1,2;3"></polygon>': ("shape-malformed", "points '1,2;3'"),
    '<polygon label="cup" points=""></polygon>': ("shape-malformed", "points ''"),
    '<polygon label="cup" points="1,2;3,4"></polygon>': ("polygon-short", "2 points"),
    '<polygon label="cup" points="1,2;3,4;9999,5"></polygon>': ("polygon-number", "9999"),
    '<ellipse label="cup" cx="9" cy="9" rx="0" ry="3"></ellipse>': ("shape-malformed", "radii 0 and 3"),
    '<ellipse label="cup" cx="9" cy="9" rx="inf" ry="3"></ellipse>': ("shape-malformed", "radii inf"),
    '<mask label="cup" rle="1, 2" left="1" top="1" width="2" height="2"></mask>': ("rle-counts", "3, expected 2 x 2"),
    '<mask label="cup" rle="9, -5" left="1" top="1" width="2" height="2"></mask>': ("rle-counts", "2 x 2"),
    '<mask label="cup" rle="x" left="1" top="1" width="2" height="2"></mask>': ("shape-malformed", "rle 'x'"),
    '<mask label="cup" rle="4" left="1" top="1" width="2" height="2"></mask>': ("mask-empty", "2 x 2"),
    '<mask label="cup" rle="0, 4294836225" left="0" top="0" width="65535" height="65535"></mask>': (
        "shape-malformed", "65535 x 65535"
    ),
    '<mask label="cup" rle="0, 4" left="1e99" top="1" width="inf" height="2"></mask>': ("shape-malformed", "inf"),
}  # fmt: skip


@pytest.mark.parametrize("shape", BAD)
def test_a_bad_shape_costs_that_shape_and_is_named_with_its_line(tmp_path: Path, shape: str) -> None:
    code, words = BAD[shape]
    dataset = read(open_cvat, write(tmp_path, shape, GOOD))
    assert codes(dataset)[code] == 1
    assert [finding.code for finding in dataset.findings if finding.severity == "E"] in ([code], [])
    assert "annotations.xml, line 8: " in examples(dataset, code) and words in examples(dataset, code)
    assert dataset.records[0].boxes.tolist() == [[5, 6.5, 25, 36.5]] * 2


@pytest.mark.parametrize(
    ("encoding", "label"), [("utf-8", "größe 杯"), ("utf-16", "größe 杯"), ("iso-8859-1", "größe"), ("cp1251", "чашка")]
)
def test_declared_encodings_are_read(tmp_path: Path, encoding: str, label: str) -> None:
    path = write(tmp_path, GOOD.replace("cup", label), meta="")
    text = path.read_text().replace("utf-8", {"cp1251": "windows-1251"}.get(encoding, encoding))
    path.write_bytes(text.encode(encoding))
    assert read(open_cvat, path).classes == ("cup", label)


BROKEN = {
    "a document type": (
        lambda text: text.replace("<annotations>", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>'),
        "DOCTYPE",
    ),
    "cut": (lambda text: text[: len(text) * 2 // 3], "line 6: not well-formed"),
    "another root": (lambda text: text.replace("annotations>", "annotation>"), "'annotation'"),
    "no picture": (lambda text: text[: text.index("<image")] + "</annotations>", "holds no picture"),
    "an unknown encoding": (lambda text: text.replace("utf-8", "utf-9"), "save it in UTF-8"),
    "bytes that are not UTF-8": (
        lambda text: text.encode().replace(b"cup", b"c\xfcp"),
        "line 4: not well-formed XML: not well-formed (invalid token); its text is not in UTF-8",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_cvats_is_refused(tmp_path: Path, name: str) -> None:
    change, words = BROKEN[name]
    path = write(tmp_path)
    text = change(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = read(open_cvat, path)
    assert not dataset.records and dataset.refused
    assert words in dataset.findings[0].examples[0] and str(path) in dataset.findings[0].examples[0]


def test_text_that_looks_like_a_picture_is_text(tmp_path: Path) -> None:
    comment = '<!-- <image id="9" name="b.png" width="1" height="1"> --><tag label="x"><![CDATA[<image ]]></tag>'
    dataset = read(open_cvat, write(tmp_path, comment))
    assert len(dataset.records) == 1 and codes(dataset) == {"shape-other": 1}


LAYOUTS = {  # where the picture is, and its element's attributes
    "images/a.png": 'name="a.png"',
    "images/default/a.png": 'name="a.png" subset="default" task_id="2"',
    "images/default/b/a.png": 'name="b/a.png" subset="default"',
    "images/Train/a.png": 'name="a.png" subset="Train"',
    "a.png": 'name="a.png"',
    "images/frame_000007.png": 'name="frame_000007"',
    "images/frame_000007.PNG": 'name="frame_000007"',
}


@pytest.mark.parametrize("place", LAYOUTS)
def test_the_pictures_are_found_where_cvat_puts_them(tmp_path: Path, place: str) -> None:
    path = write(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    make_pictures(tmp_path, place)
    path.write_text(path.read_text().replace('name="a.png"', LAYOUTS[place]))
    dataset = read(open_cvat, path)
    assert not dataset.refused and dataset.records[0].load().shape == (72, 96, 3)


def test_a_project_is_read_by_its_subsets(tmp_path: Path) -> None:
    names = {"Train": "a.png", "Validation": "b.png"}
    images = "".join(
        f'<image id="{i}" name="{name}" subset="{subset}" width="96" height="72">{GOOD}</image>\n'
        for i, (subset, name) in enumerate(names.items())
    )
    make_pictures(tmp_path / "images", "Train/a.png", "Validation/b.png")
    path = tmp_path / "annotations.xml"
    path.write_text(HEAD + META + images + "</annotations>")
    assert cvat_sets(path) == ["train", "val"]
    for split, expected in (("train", ["Train/a.png"]), ("val", ["Validation/b.png"]), ("", list("ab"))):
        dataset = read(open_cvat, path, split=split)
        assert not dataset.refused and len(dataset.records) == len(expected)
        assert split == "" or [record.file_name for record in dataset.records] == expected
    found = find_sets(tmp_path)
    assert {name: (source.annotations, source.split) for name, source in found.items()} == {
        "train": (path, "train"),
        "val": (path, "val"),
    }
    refused = read(open_cvat, path, split="test")
    assert codes(refused) == {"set-missing": 1} and "it has Train, Validation" in examples(refused, "set-missing")


def video(folder: Path, *tracks: str) -> Path:
    size = "<original_size><width>96</width><height>72</height></original_size>"
    path = folder / "annotations.xml"
    meta = f"<meta><task><mode>interpolation</mode>{LABELS}{size}</task></meta>\n"
    path.write_text(HEAD + meta + "\n".join(tracks) + "\n</annotations>")
    return path


def track(label: str, *frames: tuple[int, float, int]) -> str:
    """Return a track of boxes: frame, left edge, outside."""
    boxes = [
        f'<box frame="{frame}" outside="{outside}" keyframe="1" xtl="{x}" ytl="9" xbr="{x + 9}" ybr="19"></box>'
        for frame, x, outside in frames
    ]
    return "\n".join([f'<track id="0" label="{label}" source="manual">', *boxes, "</track>"])


def test_a_video_is_read_by_its_frames(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", *(f"frame_{number:06d}.png" for number in (0, 5, 10, 15)))
    tracks = track("cup", (0, 1, 0), (5, 2, 0), (10, 2, 1)), track("plate", (5, 30, 0), (10, 31, 0), (15, 32, 0))
    dataset = read(open_cvat, video(tmp_path, *tracks))
    assert codes(dataset) == {} and dataset.classes == ("plate", "cup")
    objects = [(record.file_name, record.labels.tolist(), record.boxes[:, 0].tolist()) for record in dataset.records]
    assert objects == [
        ("frame_000000.png", [1], [1]), ("frame_000005.png", [1, 0], [2, 30]), ("frame_000010.png", [0], [31]),
        ("frame_000015.png", [0], [32]),
    ]  # fmt: skip


def test_frames_without_an_object_are_pictures_too(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", "frame_000000.png", "frame_000001.png", "cover.png")
    dataset = read(open_cvat, video(tmp_path, track("cup", (0, 1, 0), (1, 1, 1))))
    assert [len(record.labels) for record in dataset.records] == [1, 0]


def test_a_bad_shape_of_a_video_is_told_with_its_frame(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", "frame_000000.png", "frame_000001.png")
    bad = '<track id="1" label="cup"><box frame="1" outside="0" xtl="1" ytl="1" xbr="a" ybr="2"></box></track>'
    dataset = read(
        open_cvat, video(tmp_path, track("cup", (0, 1, 0), (1, 1, 0)), bad, bad.replace('"1" outside', '"x" outside'))
    )
    (finding,) = (finding for finding in dataset.findings if finding.severity == "E")
    assert (finding.code, finding.count, finding.image_ids) == ("shape-malformed", 2, (1, 2))
    assert "line 9: xbr 'a'" in examples(dataset, finding.code) and "frame 'x'" in examples(dataset, finding.code)
    assert [len(record.labels) for record in dataset.records] == [1, 1]


def test_tracks_of_several_tasks_are_refused(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", "frame_000000.png")
    tracks = (track("cup", (0, 1, 0)).replace("<track", f'<track task_id="{number}"') for number in (1, 2))
    assert "holds 2 tasks" in examples(read(open_cvat, video(tmp_path, *tracks)), "frames-missing")


def test_tracks_beside_images_are_left_out_and_told(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("</annotations>", track("cup", (0, 1, 0)) + "</annotations>"))
    dataset = read(open_cvat, path)
    assert len(dataset.records) == 1 and any("1 tracks" in note for note in dataset.notes)


def test_a_video_without_its_frames_is_refused_with_what_to_export(tmp_path: Path) -> None:
    dataset = read(open_cvat, video(tmp_path, track("cup", (0, 1, 0))))
    assert list(codes(dataset)) == ["frames-missing"] and "CVAT for images 1.1" in dataset.findings[0].remedy
    make_pictures(tmp_path / "images", "frame_000000.png")
    dataset = read(open_cvat, video(tmp_path, track("cup", (0, 1, 0), (1, 1, 0))))
    assert "frame_000001" in examples(dataset, "file-missing")


def test_a_track_that_leaves_out_frames_is_refused(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", *(f"frame_{number:06d}.png" for number in range(4)))
    dataset = read(open_cvat, video(tmp_path, track("cup", (0, 1, 0), (3, 4, 0))))
    assert codes(dataset) == {"frames-skipped": 1} and "between the frames 0 and 3" in examples(
        dataset, "frames-skipped"
    )


def test_an_export_can_be_sent_to_processes(tmp_path: Path) -> None:
    export = open_cvat(write(tmp_path), None, "")
    again = pickle.loads(pickle.dumps(export))
    assert again.parse(again.units[0], lambda name: (72, 96)) == export.parse(export.units[0], lambda name: (72, 96))
