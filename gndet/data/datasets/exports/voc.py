"""Open an export in Pascal VOC's format: an XML file per picture, in VOC's folders, beside the pictures, or apart."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from gndet.data.datasets.exports.engine import Export, Found
from gndet.data.datasets.exports.folders import (
    ALIASES,
    Listings,
    by_set,
    children,
    common_folder,
    entered,
    files_below,
    of_set,
    read_text,
    set_missing,
    stem_of,
    swapped,
)
from gndet.data.datasets.exports.voc_xml import Unit, counted_from_0, parse_voc, read_xml
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import PICTURES
from gndet.text import shown

ANNOTATIONS = ("annotations", "annotation", "xmls", "xml")  # folders of XML files
IMAGES = ("JPEGImages", "images", "Images", "imgs", "img")  # folders of pictures beside them
MAIN = Path("ImageSets", "Main")  # folder of the lists of the sets
ASKED = 20  # XML files that are asked for the names of their pictures


def open_voc(annotations: Path, images: Path | None, split: str) -> Export:
    """Find the XML files of a set ("train", "val", "test"; "" for the whole export), and the picture of each.

    annotations: a folder, an XML file, or a list of ImageSets/Main; images: the folder of the pictures, None to find
    it.
    Raises Fault if there is no such set, or no XML file in it.
    """
    if not annotations.exists():
        raise Fault("json-unreadable", f"{annotations}: no such file or folder")
    home = entered(annotations) if annotations.is_dir() else annotations.parent
    if annotations.suffix.lower() == ".txt" or (home.parent / MAIN).is_dir():
        home = next((place for place in home.parents if _xml_folder(place)), home)
    found: Found = []
    whole = files_below(home, (".xml",)) if annotations.is_dir() else []
    files, lists = _find_files(annotations, home, whole, split, images is not None, found)
    if not files:
        raise Fault(*(found or [("folder-missing", f"{annotations}: no XML file there")])[0])
    pictures = Listings(PICTURES)
    by_folder: dict[str, list[str]] = {}
    for file in files:
        folder, name = os.path.split(file)
        by_folder.setdefault(folder, []).append(name)
    places = {folder: _picture_folder(home, folder, images, names, pictures) for folder, names in by_folder.items()}
    root = common_folder(list(places.values()))
    units: list[Unit] = []
    for folder, names in by_folder.items():
        listing, below = pictures.of(places[folder]), os.path.relpath(places[folder], root)
        below = "" if below == "." else f"{below}/"
        units += [(os.path.join(folder, name), below, tuple(listing.get(stem_of(name), ()))) for name in names]
    found += _unlabeled(set(places.values()), whole, pictures)
    zero = counted_from_0(str(home), whole or files)
    found += [("corners-from-0", zero)] if zero else []
    notes = ["masks in SegmentationObject are not read"] if (home / "SegmentationObject").is_dir() else []
    parse = partial(parse_voc, str(home), 0 if zero else 1)
    classes, labelmap = _declared(home)
    paths = [*lists, *labelmap, *(home / file for file in whole or files)]  # all of them decide how corners count
    return Export(units, parse, classes, Path(root), paths, found, tuple(notes))


def voc_sets(home: Path) -> list[str]:
    """List the sets of a folder by ImageSets/Main, or by its folders; [""] if it is not divided."""
    listed = dict.fromkeys(name for lists in _lists_of_sets(home).values() for name in lists)
    return list(listed) or list(by_set(files_below(home, (".xml",)))) or [""]


def _find_files(
    annotations: Path, home: Path, whole: Sequence[str], split: str, is_given: bool, found: Found
) -> tuple[list[str], list[Path]]:
    """Return the XML files of a set, relative to home, and the lists that were read; whole: all files below home."""
    if annotations.suffix.lower() == ".xml" and not annotations.is_dir():
        return [annotations.relative_to(home).as_posix()], []
    if annotations.is_file():
        return _listed(annotations, home, home, found), [annotations]
    sets = _lists_of_sets(home)
    if split and any(sets.values()):
        lists = {root: known[split] for root, known in sets.items() if split in known}
        if not lists:
            known = sorted({path.stem for found_in in sets.values() for path in found_in.values()})
            raise set_missing(home, split, known)
        return [file for root, path in lists.items() for file in _listed(path, root, home, found)], [*lists.values()]
    return of_set(home, whole, split, is_given), []


def _lists_of_sets(home: Path) -> dict[Path, dict[str, Path]]:
    """Return the lists of ImageSets/Main by set, for each folder in VOC's layout."""
    roots = [place for place in (home, *children(home), *children(home / "VOCdevkit")) if (place / MAIN).is_dir()]
    return {root: _lists(root / MAIN) for root in roots if _xml_folder(root)}


def _xml_folder(root: Path) -> Path | None:
    """Return the folder Annotations of a VOC folder, whatever its case."""
    return next((path for path in children(root) if path.name.lower() in ANNOTATIONS and path.is_dir()), None)


def _lists(main: Path) -> dict[str, Path]:
    """Return the lists of ImageSets/Main by set; trainval is the training set if there is no other."""
    known = {path.stem.lower(): path for path in children(main) if path.suffix.lower() == ".txt"}
    found = {ALIASES[stem]: path for stem, path in known.items() if stem in ALIASES}
    return ({"train": known["trainval"]} if "trainval" in known else {}) | found


def _listed(path: Path, root: Path, home: Path, found: Found) -> list[str]:
    """Return the XML files that a list names, a stem per line, perhaps followed by a number."""
    folder = _xml_folder(root) or root
    prefix = "" if folder == home else f"{folder.relative_to(home)}/"
    known = {file[:-4]: file for file in files_below(folder, (".xml",))}
    files = []
    for line in read_text(path).splitlines():
        stem = line.strip().replace("\\", "/")
        if stem.lower().endswith((".xml", *PICTURES)):
            stem = stem.rpartition(".")[0]
        if stem and stem not in known:
            stem = stem.split()[0]
        if stem in known:
            files.append(prefix + known[stem])
        elif stem:
            found.append(("json-unreadable", f"{shown(str(path))}: {stem}: there is no {folder.name}/{stem}.xml"))
    return list(dict.fromkeys(files))


def _picture_folder(home: Path, folder: str, images: Path | None, names: Sequence[str], pictures: Listings) -> str:
    """Return the folder with most of the pictures of the XML files (names) of a folder, relative to home."""
    place = str(home / folder)
    if images:
        parts = Path(folder).parts
        tails = [Path(*parts[start:]) for start in range(len(parts) + 1)]
        places = [str(images / tail) for tail in tails]
    else:
        above = [home / folder, *(home / folder).parents][: len(Path(folder).parts) + 2]
        places = [place, *swapped(place, (*ANNOTATIONS, "labels"), IMAGES)]
        places += [str(base / name) for base in above for name in (*IMAGES, "")]
    best = pictures.fullest(places, {stem_of(name) for name in names})
    if any(stem_of(name) in pictures.of(best) for name in names):
        return best
    tags = {stem_of(tag) for tag in _file_names(place, names[:ASKED])}
    best = pictures.fullest([place for place in places if os.path.isdir(place)] or places, tags)
    if images or not tags.isdisjoint(pictures.of(best)):
        return best
    below = {str(home / os.path.dirname(name)) for name in files_below(home, PICTURES)}
    return pictures.fullest([best, *sorted(below)], {stem_of(name) for name in names} | tags)


def _file_names(folder: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the names of the pictures that XML files give."""
    for name in names:
        with suppress(Fault):  # reported when it is parsed
            yield read_xml(folder, name).findtext("filename") or ""


def _unlabeled(folders: set[str], files: Sequence[str], pictures: Listings) -> Found:
    """Return the pictures without an XML file, unless none has one of its own name."""
    stems = {stem_of(os.path.basename(file)) for file in files}
    found: Found = []
    for folder in sorted(folders):
        listing = pictures.of(folder)
        if not stems.isdisjoint(listing):
            alone = [names[0] for stem, names in listing.items() if stem not in stems]
            found += [("picture-unlabeled", f"{shown(os.path.join(folder, name))}: no XML file") for name in alone]
    return found


def _declared(home: Path) -> tuple[tuple[str, ...] | None, list[Path]]:
    """Return the classes that CVAT's labelmap.txt lists, and the file; None without one."""
    path = home / "labelmap.txt"
    if not path.is_file():
        return None, []
    names = [line.partition(":")[0].strip() for line in read_text(path).splitlines() if line.strip()[:1] != "#"]
    classes = tuple(dict.fromkeys(name for name in names if name and name != "background"))
    return classes or None, [path]
