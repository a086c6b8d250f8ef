"""Check the images and categories of a file in COCO's format: their ids, names and sizes, and the pictures' files."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gndet.data.datasets.columns import MAX_SIDE, Item, Size
from gndet.data.datasets.faults import Fault, Findings
from gndet.data.datasets.file_names import is_foreign, readings, split_name
from gndet.data.datasets.ids import NO_NAMES, Numbers, number_names, number_of, to_integer
from gndet.data.datasets.image_folder import Found, ImageFolder
from gndet.data.datasets.images import Reading, picture_size
from gndet.data.datasets.json_items import PLACE
from gndet.data.datasets.packed import Image
from gndet.text import brief, printable, valid_text

UNKNOWN = (None, "", 0)  # what exporters write for a side that they do not know
KEYS_SHOWN = 8  # of an image that lacks one of them
FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")  # keys of LVIS's images


class Category(NamedTuple):
    """A category of a file."""

    name: str
    parent: Any  # its supercategory


def numbered(items: list[Item], kind: str, found: Findings) -> dict[Any, int]:
    """Number the images or categories if some of their ids are names; {} if none is.  kind: "image" or "category"."""
    numbers = number_names([item.get("id") for item in items])
    for name, number in numbers.items():
        if name != number:
            found.add(f"{kind}-id-text", f"{kind} id {brief(name)} becomes {number}")
    return numbers


def read_categories(items: list[Item], numbers: Numbers, found: Findings) -> dict[int, Category]:
    """Check the categories.  Returns them by id; names may occur twice, see `settle_categories`."""
    categories: dict[int, Category] = {}
    rows: set[str] = set()
    for place, item in enumerate(items):
        if (row := repr(item)) in rows:
            found.add("category-left-out", f"categories[{place}]: {brief(item.get('name'))}, equal to an earlier row")
            continue
        rows.add(row)
        number = _new_id(item, place, "category", numbers, categories, found)
        if number is None:
            continue
        name = item.get("name")
        if type(name) in (int, float):
            found.add("category-name-number", f"category {number}: name {brief(name)}")
        elif not isinstance(name, str) or not name.strip():
            found.add("category-name", f"category {number}: name {brief(name)}, expected text")
        categories[number] = Category(str(name), item.get("supercategory"))
    return categories


def settle_categories(
    categories: Mapping[int, Category], used: Collection[int], found: Findings
) -> tuple[dict[int, str], tuple[tuple[int, str], ...]]:
    """Leave out categories without an object that only structure the file; used: ids of those that have objects.

    Left out are rows that repeat the name of another (if none of them has objects, the highest id stays), and a
    category that another names as its supercategory, as Roboflow writes it.
    Returns the names of the others by id, and (id, name) of those left out.
    """
    rows: dict[str, list[int]] = {}
    for number in sorted(categories):
        rows.setdefault(categories[number].name, []).append(number)
    grouping = {
        entry.parent for entry in categories.values() if type(entry.parent) is str and entry.parent != entry.name
    }
    left_out: dict[int, str] = {}
    for name, ids in rows.items():
        kept = [number for number in ids if number in used] or ids[-1:]
        if len(kept) > 1:
            text = f"category {kept[1]}: name {brief(name)} occurs twice, with objects, expected unique names"
            found.add("category-name-twice", text, count=len(kept) - 1)
        left_out |= {number: "another category has its name" for number in ids if number not in kept}
        if len(ids) == 1 and ids[0] not in used and name in grouping:
            left_out[ids[0]] = "others name it as their supercategory"
    for number, why in sorted(left_out.items()):
        found.add("category-left-out", f"category {number}: {brief(categories[number].name)}, no object; {why}")
    names = {number: entry.name for number, entry in categories.items() if number not in left_out}
    if names and max(names) - min(names) >= len(names):
        label, number = max(enumerate(sorted(names)), key=lambda pair: pair[1])
        text = f"ids from {min(names)} to {number}; id {number}, {brief(names[number])}, is label {label}"
        found.add("category-gaps", text, count=len(names))
    return names, tuple((number, categories[number].name) for number in sorted(left_out))


def valid_names(names: Mapping[int, str], found: Findings) -> dict[int, str]:
    """Make the names of categories, by id, valid Unicode: a JSON or YAML file may hold half of a character."""
    valid = {number: valid_text(name) for number, name in names.items()}
    for number in (number for number in names if names[number] != valid[number]):
        name = brief(valid[number])
        found.add("category-name-cut", f"category {number}: name {brief(names[number])} becomes {name}")
        if list(valid.values()).count(valid[number]) > 1:
            found.add("category-name-twice", f"category {number}: name {name} occurs twice, expected unique names")
    return valid


def read_images(
    items: list[Item], files: ImageFolder | None, reading: Reading, found: Findings, numbers: Numbers = NO_NAMES
) -> tuple[list[Image], dict[int, Size | None]]:
    """Check the images, and find the file of each.  numbers: of their ids, if some are names, see `numbered`.

    Returns the images without a fault (an empty file is allowed), and the size of every image by id, None if it is
    wrong.
    """
    images: list[Image] = []
    sizes: dict[int, Size | None] = {}
    owners: dict[str, Item] = {}
    for place, item in enumerate(items):
        number, size = _new_id(item, place, "image", numbers, sizes, found), None
        path = _find_file(item, number, files, owners, found)
        if number is not None:
            size = sizes[number] = _read_size(item, number, files, path, reading, found)
        if number is not None and size is not None and path is not None:
            length = files.length(path) if files else 0
            images.append(Image(number, item.get("file_name") or path, path, size, length))
    if any(FEDERATED[0] in item or FEDERATED[1] in item for item in items):
        found.add("lvis-federated", f"images have {' or '.join(FEDERATED)}")
    return images, sizes


def _read_size(
    item: Item, number: int, files: ImageFolder | None, path: str | None, reading: Reading, found: Findings
) -> Size | None:
    """Return the height and width of an image; read those that the file lacks from the picture's header."""
    stated = item.get("height"), item.get("width")
    height, width = map(to_integer, stated)
    if height is None or width is None or not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        picture = None if files is None or path is None else files.home / path
        return _complete_size(item, number, picture, reading, found)
    if height * width > reading.max_pixels:
        text = f"{_named(item)}: {width} x {height} pixels, the limit is {reading.max_pixels}"
        found.add("image-pixels", text, number)
        return None
    for kind, code in ((float, "number-float"), (str, "number-text")):
        if kind in (type(stated[0]), type(stated[1])):
            found.add(code, f"{_named(item)}: its width or height", number)
    return height, width


def _complete_size(item: Item, number: int, picture: Path | None, reading: Reading, found: Findings) -> Size | None:
    """Return the size of an image that lacks a side, from the picture's header; None if a side is wrong."""
    stated = item.get("height"), item.get("width")
    words = f"{_named(item)}: width {brief(stated[1])}, height {brief(stated[0])}"
    if picture is not None and any(side in UNKNOWN for side in stated):
        try:
            real = picture_size(picture, reading)
        except Fault as fault:
            found.add(fault.code, str(fault), number)
            return None
        if all(side in UNKNOWN or to_integer(side) == true for side, true in zip(stated, real, strict=True)):
            found.add("size-missing", f"{words}; the picture has {real[1]} x {real[0]}", number)
            return real
    found.add("image-size", f"{words}, expected integers from 1 to {MAX_SIDE}", number)
    return None


def _find_file(
    item: Item, number: int | None, files: ImageFolder | None, owners: dict[str, Item], found: Findings
) -> str | None:
    """Return the path of an image's file below the folder, None if the name is wrong.

    owners: the first image of each path.
    """
    try:
        path, size, code = _seek(item, files, found.wants_example("file-missing"))  # suggesting takes a while
    except Fault as fault:
        words = f"{_file_words(item)} {fault}"
        if _name_key(item) not in item:
            words = f"file_name is missing; it has {', '.join(map(printable, list(item)[:KEYS_SHOWN]))}"
        found.add(fault.code, f"{_named(item)}: {words}", number)
        return None
    owner = owners.setdefault(path, item)
    if size and not code and owner is item:
        return path
    words = f"{_named(item)}: {_file_words(item)}"
    if code:
        found.add(code, f"{words} is taken as {brief(path)}" if found.wants_example(code) else "", number)
    if size == 0:
        found.add("file-empty", f"{words} is an empty file", number)
    if owner is not item:
        same = owner.get(_name_key(owner)) == item.get(_name_key(item))
        if not same and "file-by-end" in (code, _seek(owner, files, suggest=False).code):
            text = f"{words} is taken as {brief(path)}, and so is {_file_words(owner)} of {_named(owner)}"
            found.add("file-unclear", text, number)
        else:
            found.add("file-twice", f"{words} is also the file of {_named(owner)}", number)
    return path


def _seek(item: Item, files: ImageFolder | None, suggest: bool) -> Found:
    """Find the file of an image; without a folder, return what its name says, of size -1.  Raises Fault."""
    name = item.get(_name_key(item))
    if files is not None:
        return files.find(name, suggest)
    if isinstance(name, str) and ("/" in name or "\\" in name) and is_foreign(name):
        parts = readings(name)
        return Found("/".join(parts[0]) if parts else name, -1, "file-foreign")
    return Found("/".join(filter(None, split_name(name))), -1)


def _name_key(item: Item) -> str:
    """Return the key of an image's file name; LVIS gives only a URL."""
    return "coco_url" if "coco_url" in item and item.get("file_name") is None else "file_name"


def _file_words(item: Item) -> str:
    key = _name_key(item)
    return f"{key} {brief(item.get(key))}"


def _named(item: Item) -> str:
    return item[PLACE] if PLACE in item else f"image {brief(item.get('id'))}"


def _new_id(item: Item, place: int, kind: str, numbers: Numbers, known: Collection[int], found: Findings) -> int | None:
    """Return the number of an image or category; None if it is not an integer of 0 or more, or is already known."""
    number = number_of(item.get("id"), numbers)
    if number is None or number < 0:
        where = f"{'images' if kind == 'image' else 'categories'}[{place}]"
        found.add(f"{kind}-id", f"{where}: {kind} id {brief(item.get('id'))}, expected an integer of 0 or more")
        return None
    image_id = number if kind == "image" else None
    if type(item["id"]) is float:
        found.add("number-float", f"{kind} {number}: its id", image_id)
    if type(item["id"]) is str and not numbers:
        found.add("number-text", f"{kind} {number}: its id", image_id)
    if number in known:
        found.add(f"{kind}-id-twice", f"{kind} id {brief(item['id'])} occurs twice, expected unique ids")
        return None
    return number
