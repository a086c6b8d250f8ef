"""Draw objects: boxes, masks and labels on an image; put pictures side by side or in a grid.

n objects.  Boxes (n, 4) xyxy and masks are in pixels of a picture (h, w); an image (H, W, 3) uint8 RGB is that picture
or a smaller copy of it.  Masks are decoded one at a time, each within its box: memory does not grow with their number.
torchvision.utils.draw_bounding_boxes is not used: its labels hide small objects, run out of the picture and are crossed
by later boxes; it needs a font file for any size but 10 px; and it outlines no masks.
"""

import colorsys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from gndet.data.datasets.segmentation import mask_window, to_rle
from gndet.data.records import Record
from gndet.errors import OutputError
from gndet.evaluation.fonts import class_name, drawable, font
from gndet.files import Kind, refuse_output, written_whole

MIN_SIDE = 640  # pixels of the longer side; a smaller picture is enlarged so that labels are legible
MAX_LABELS = 40  # with more objects, labels would cover the picture
GOLDEN_ANGLE = 0.381966  # of a full turn: successive hues stay far apart for any number of classes
MASK_OPACITY = 0.4
GAP = 8  # pixels between pictures
PAPER = (255, 255, 255)
# the format of drawings by suffix: the mark is a text of PNG, a comment of JPEG
MARKED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
PICTURE = Kind("a picture that gndet drew", rb"\A(\x89PNG.*tEXtSoftware\x00gndet|\xff\xd8.*\xff\xfe\x00\x07gndet)")


def color(index: int) -> tuple[int, int, int]:
    """Return the RGB color of a class: hues a golden angle apart, cycling through three depths."""
    saturation, value = ((0.85, 1.0), (0.6, 1.0), (0.95, 0.8))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.43 + index * GOLDEN_ANGLE) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    class_indices: Sequence[int],
    masks: Iterable[Any] = (),
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Draw boxes, labels and masks; later objects cover earlier ones.

    image (H, W, 3) uint8 RGB; boxes (n, 4); n labels; n class indices, which choose the colors; masks: n checked
    segmentations (polygons, RLE or None), or none; size (h, w), by default that of the image.
    Returns (H', W', 3) uint8, enlarged if the longer side is below MIN_SIDE.
    With more than MAX_LABELS objects, labels are left out, and so are boxes of objects with a mask.
    """
    height, width = size = size or (image.shape[0], image.shape[1])
    scale = max(1.0, MIN_SIDE / max(image.shape))
    drawn = (round(image.shape[1] * scale), round(image.shape[0] * scale))  # width, height
    pixels = np.array(Image.fromarray(image).resize(drawn, Image.Resampling.BICUBIC))
    line = max(2, round(max(drawn) / 400))
    colors = [color(index) for index in class_indices]
    has_mask = np.zeros(len(colors), dtype=bool)
    for index, segmentation in enumerate(masks):
        if segmentation is not None:
            has_mask[index] = _tint(pixels, to_rle(segmentation, size), colors[index], line)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * np.tile(np.array(drawn) / (width, height), 2)
    boxes = np.clip(boxes, 0, [*drawn, *drawn] - np.ones(4))
    crowded = len(boxes) > MAX_LABELS
    for box, masked, tint in zip(boxes, has_mask, colors, strict=True):
        if not (masked and crowded):
            draw.rectangle(tuple(box.round()), outline=tint, width=line)
    if not crowded:
        letters = font(max(12, round(max(drawn) / 55)))
        for box, label, tint in zip(boxes, labels, colors, strict=True):
            _label(draw, box, drawable(label), tint, letters, drawn)
    return np.asarray(picture)


def _tint(pixels: np.ndarray, code: dict[str, Any], tint: tuple[int, int, int], line: int) -> bool:
    """Blend a mask's color into the pixels in place, with a solid outline, `line` pixels wide, inside the mask.

    code: compressed RLE of the picture's size (h, w).  Returns whether the mask covers a pixel.
    """
    top, left, window = mask_window(code)
    rows, y = _sampled(code["size"][0], pixels.shape[0], top, window.shape[0])
    columns, x = _sampled(code["size"][1], pixels.shape[1], left, window.shape[1])
    inside = window[y[:, None], x]
    core = np.pad(inside, line)
    for axis in (0, 1):
        core = core & np.roll(core, line, axis) & np.roll(core, -line, axis)
    core = core[line:-line, line:-line]
    region, levels = pixels[rows, columns], np.arange(256)
    for channel, level in enumerate(tint):
        values = region[..., channel]
        blended = (levels + MASK_OPACITY * (level - levels)).round().astype(np.uint8)  # of each level
        np.copyto(values, blended[values], where=inside)
        values[inside & ~core] = level
    return bool(inside.any())


def _sampled(size: int, drawn: int, start: int, length: int) -> tuple[slice, np.ndarray]:
    """Choose the pixels of a picture of `size` that stand, along one axis, for `drawn` pixels: those at their centers.

    Returns the drawn pixels that are within [start, start + length) of the picture, and their places from `start`.
    """
    centers = ((np.arange(drawn) + 0.5) * (size / drawn)).astype(int)
    first, end = np.searchsorted(centers, [start, start + length])
    return slice(first, end), centers[first:end] - start


def _label(
    draw: ImageDraw.ImageDraw,
    box: np.ndarray,
    label: str,
    tint: tuple[int, int, int],
    letters: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write a label on a filled background above the box, or inside its top edge; keep it inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=letters)
    width, height = right - left + 6, bottom - top + 4
    x = min(box[0], size[0] - width)
    y = box[1] - height if box[1] >= height else box[1]
    x, y = max(0, round(x)), max(0, round(min(y, size[1] - height)))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=tint)
    luminance = 0.299 * tint[0] + 0.587 * tint[1] + 0.114 * tint[2]  # ITU-R BT.601
    draw.text((x + 3 - left, y + 2 - top), label, font=letters, fill="black" if luminance > 120 else "white")


def draw_ground_truth(image: np.ndarray, record: Record, classes: Sequence[str]) -> np.ndarray:
    """Draw a record's objects; crowd regions are labeled as such.

    image (H, W, 3) uint8, the record's picture or a smaller copy.  Returns what `draw_objects` does.
    """
    labels = [
        f"{class_name(classes, label)} (crowd)" if crowd else class_name(classes, label)
        for label, crowd in zip(record.labels, record.crowd, strict=True)
    ]
    return draw_objects(image, record.boxes, labels, record.labels.tolist(), record.segmentations, record.size)


def draw_detections(
    image: np.ndarray,
    results: Sequence[dict[str, Any]],
    classes: Sequence[str],
    category_ids: Sequence[int],
    threshold: float,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Draw the COCO results of one image that score at least `threshold`, the best one on top.

    image (H, W, 3) uint8; results: boxes xywh in pixels of the picture; category_ids: the id of each class in the file;
    size (h, w), by default that of the image.  Returns what `draw_objects` does.
    """
    shown = sorted((row for row in results if row["score"] >= threshold), key=lambda row: row["score"])
    boxes = np.array([row["bbox"] for row in shown], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    indices = [category_ids.index(row["category_id"]) for row in shown]
    labels = [f"{class_name(classes, index)} {row['score']:.2f}" for index, row in zip(indices, shown, strict=True)]
    return draw_objects(image, boxes, labels, indices, [row.get("segmentation") for row in shown], size)


def shrunk(image: np.ndarray, longest: int) -> np.ndarray:
    """Shrink a picture to at most `longest` pixels on the longer side."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(picture)


def placard(text: str, side: int) -> np.ndarray:
    """Return a picture (side // 2, side, 3) of a text, as a placeholder for an unreadable picture."""
    picture = Image.new("RGB", (side, side // 2), (225, 225, 225))
    letters = font(18)
    width = int((side - 40) / letters.getlength("x"))  # an x has about the average width of a letter
    lines = [drawable(line) for line in textwrap.wrap(text, width)]
    ImageDraw.Draw(picture).multiline_text((20, 20), "\n".join(lines[:10]), font=letters, fill="black")
    return np.asarray(picture)


def side_by_side(left: np.ndarray, right: np.ndarray, captions: tuple[str, str]) -> np.ndarray:
    """Put two pictures side by side, each under its caption.  Returns (H', W', 3) uint8."""
    return grid([captioned(left, captions[0]), captioned(right, captions[1])], columns=2)


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """Put a caption above a picture; cut the beginning of a caption that is too long."""
    font_size = max(14, round(max(picture.shape[:2]) / 40))
    strip = Image.new("RGB", (picture.shape[1], round(1.6 * font_size)), PAPER)
    letters, caption = font(font_size), drawable(caption)
    while len(caption) > 2 and letters.getlength(caption) > strip.width - 8:
        caption = f"…{caption[2:]}"  # the end of a file name says more
    ImageDraw.Draw(strip).text((4, strip.height / 2), caption, font=letters, fill="black", anchor="lm")
    return np.concatenate([np.asarray(strip), picture])


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange one or more pictures in rows of `columns`, in cells of the largest picture's size.

    Returns (H', W', 3) uint8.
    """
    columns = min(columns, len(pictures))
    height = max(picture.shape[0] for picture in pictures) + GAP
    width = max(picture.shape[1] for picture in pictures) + GAP
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height + GAP, columns * width + GAP, 3), PAPER, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height + GAP, index % columns * width + GAP
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8 as PNG into an existing folder.  Raises OutputError."""
    with written_whole(path) as file:
        Image.fromarray(picture).save(file, "PNG", pnginfo=_text("Source"))


def refuse_drawing(file: Path, option: str, data: Iterable[Path] = ()) -> None:
    """Raise OutputError if the drawing that an option names cannot be written, as `refuse_output` does."""
    refuse_output(file, option, PICTURE, data)
    if file.suffix.lower() not in MARKED:
        raise OutputError(f"{option} {file}: cannot write it, expected a name that ends in {', '.join(MARKED)}")


def save_marked(path: Path, picture: np.ndarray, compression: int = 6) -> None:
    """Write a picture (H, W, 3) uint8 in a format of MARKED, with the mark of PICTURE, into an existing folder.

    compression: zlib's level of a PNG file.  Raises OutputError.
    """
    options: dict[str, Any] = {"pnginfo": _text("Software"), "comment": b"gndet", "compress_level": compression}
    # not flushed: that would take longer than drawing, and predict writes the list of its pictures last
    with written_whole(path, sync=False) as file:
        Image.fromarray(picture).save(file, MARKED[path.suffix.lower()], **options)


def _text(key: str) -> PngInfo:
    """Return the text of a PNG file that tells gndet's pictures from the user's: `files.DRAWN`."""
    text = PngInfo()
    text.add_text(key, "gndet")
    return text
