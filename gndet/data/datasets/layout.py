"""Find out what a folder or a file holds: the format, and where the annotations and pictures of each set lie.

A set is train, val or test; an export without sets has one, called "".
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gndet.data.datasets.exports.cvat import cvat_sets
from gndet.data.datasets.exports.folders import ALIASES, SPLITS, files_below
from gndet.data.datasets.exports.voc import ANNOTATIONS, MAIN, voc_sets
from gndet.data.datasets.exports.yolo import yolo_sets
from gndet.data.datasets.faults import Fault
from gndet.data.datasets.formats import name_format, sniff
from gndet.data.datasets.images import PICTURES

SETS = ALIASES | {"dev": "val"}  # names of a set in names of annotation files, and of folders beside each other
_SET = re.compile(rf"(?<![a-z])({'|'.join(sorted(SETS, key=len, reverse=True))})(?![a-z])")
LOOKED_AT = 50  # files of a folder whose content is looked at: an export with a file per picture may hold thousands
YOLO_FILES = ("data.yaml", "data.yml", "obj.data")  # YOLO's files that describe the whole export


class Source(NamedTuple):
    """Where a data set lies, and in which format."""

    kind: str  # coco, yolo, voc, labelme, cvat, via, folders
    annotations: Path  # a file, or a folder of files
    images: Path | None = None  # the image folder; None: near the annotations
    split: str = ""  # the set of the annotations that is meant, if they describe several


class Listing(NamedTuple):
    """The entries of a folder, by name."""

    home: Path
    files: list[Path]
    folders: list[Path]


def find_sets(root: Path, kind: str = "auto") -> dict[str, Source]:
    """Find the sets of a folder; kind: only those of this format.

    Looks at its files, then into folders named after sets, then into its only folder that holds data; folders of
    VOC's or LabelMe's files are one data set.  Raises Fault if there is none, if there are two of one name, or if a
    folder cannot be listed.
    """
    try:
        found, (_, files, folders) = _sets_of(root, kind), _list(root)
        if not found and len(folders) == 1:
            try:
                return find_sets(folders[0], kind)
            except Fault as fault:
                if fault.code != "data-unknown" or not files:  # else the files of this folder may be of a known format
                    raise
        found = found or _sets_below(root, folders, kind)
    except OSError as error:
        raise Fault("data-unknown", f"{error.filename}: cannot be listed: {error.strerror}") from None
    if not found:
        raise Fault("data-unknown", f"{root}: {_what_is_there(root)}")
    return _one_of_each(root, found)


def sets_at(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Find the sets of a folder or a file; images: the image folder of a file.  Raises Fault as `find_sets` does."""
    if path.is_dir():
        return find_sets(path)
    source = source_of(path, images, "auto", "")
    if source.kind == "cvat":
        return {name: found._replace(images=images) for name, found in _cvat_in(path)}
    return {name: source._replace(split=name) for name in (yolo_sets(path) if source.kind == "yolo" else [""])}


def source_of(path: Path, images: Path | None, kind: str, split: str) -> Source:
    """Return the source at a path that the user gave: a file, or a folder.

    kind: its format, or auto.  Raises Fault if it is not one that gndet reads.
    """
    if path.is_dir():
        if kind in ("auto", "yolo") and _holds_labels(path):
            return Source("yolo", path, images, split)
        sets = find_sets(path, kind)
        found = sets[""] if list(sets) == [""] else choose_set(path, sets, split)  # a folder that is named is that set
        return found if images is None else found._replace(images=images)
    known = kind if kind != "auto" else sniff(path) or "coco"  # the reader of COCO's JSON says what is wrong with it
    return Source(known, path, images, split)


def _holds_labels(folder: Path) -> bool:
    """Return whether a folder holds YOLO's label files and no pictures, which then lie elsewhere."""
    files = _list(folder).files
    texts = [file for file in files if file.suffix.lower() == ".txt"][:LOOKED_AT]
    return not any(file.suffix.lower() in PICTURES for file in files) and any(sniff(file) == "yolo" for file in texts)


def choose_set(root: Path, found: dict[str, Source], split: str) -> Source:
    """Return the set `split` of a folder, or its only one if it has no names.  Raises Fault if it is not there."""
    if split in found:
        return found[split]
    if list(found) == [""]:
        if split not in ("", "train"):
            raise Fault("set-missing", f"{root}: has one set of images, and no {split}")
        return found[""]
    raise Fault("set-missing", f"{root}: has {', '.join(name or 'a set without a name' for name in found)}, no {split}")


def set_of(name: str) -> str | None:
    """Return which set a file or folder is named after, None if it is none."""
    found = _SET.search(name.lower())
    return SETS[found[1]] if found else None


def _sets_of(folder: Path, kind: str) -> list[tuple[str, Source]]:
    """List the sets that the files of a folder describe, or its folders that are named after sets."""
    named = [(place, name) for place in _list(folder).folders if (name := set_of(place.name)) is not None]
    return _sets_in(folder, kind) or [(name, source) for place, name in named for _, source in _sets_in(place, kind)]


def _sets_in(folder: Path, kind: str) -> list[tuple[str, Source]]:
    """List the sets that the files of a folder describe, of all formats or of one: (name, source)."""
    listed = _list(folder)
    found = [*_yolo_in(listed), *_json_in(listed), *_xml_in(listed)]
    return [(name, source) for name, source in found if kind in ("auto", source.kind)]


def _sets_below(root: Path, folders: Sequence[Path], kind: str) -> list[tuple[str, Source]]:
    """Return the sets of the only one of these folders that holds data; VOC's or LabelMe's folders are one data set."""
    found = {folder: sets for folder in _readable(folders) if (sets := _sets_of(folder, kind))}
    listed = [pair for sets in found.values() for pair in sets]
    if listed and {source.kind for _, source in listed} == {"voc"}:  # the pictures may lie in another folder
        return [(name, Source("voc", root, None, name)) for name in voc_sets(root)]
    if len(found) < 2:
        return listed
    if {source.kind for _, source in listed} == {"labelme"}:
        return [("", Source("labelme", root))]
    names = " and ".join(f"{folder.name} ({sets[0][1].kind})" for folder, sets in list(found.items())[:2])
    raise Fault("set-twice", f"{root}: holds {len(found)} data sets, {names}; give one of them")


def _one_of_each(root: Path, found: list[tuple[str, Source]]) -> dict[str, Source]:
    """Return the sets by name; sets without a name only if there is no other.  Raises Fault for two of one name."""
    if len(named := [pair for pair in found if pair[0]]) > 0:
        found = named
    sets: dict[str, Source] = {}
    for name, source in found:
        if name in sets:
            both = f"{sets[name].kind}: {sets[name].annotations}, and {source.kind}: {source.annotations}"
            raise Fault("set-twice", f"{root}: {name or 'the set'} is there twice: {both}")
        sets[name] = source
    return {name: sets[name] for name in sorted(sets, key=[*SPLITS, ""].index)}


def _yolo_in(listed: Listing) -> list[tuple[str, Source]]:
    """Find YOLO's data file, or label files beside pictures or in `labels`."""
    files = [listed.home / name for name in YOLO_FILES if listed.home / name in listed.files]
    files += [file for file in listed.files if file.suffix in (".yaml", ".yml") and file not in files][:LOOKED_AT]
    described = next((file for file in files if sniff(file) == "yolo"), None)
    if described is None and not _has_labels(listed.files) and not any(map(_holds_rows, listed.folders)):
        return []
    where = described or listed.home
    return [(name, Source("yolo", where, None, name)) for name in yolo_sets(where)]


def _has_labels(files: list[Path]) -> bool:
    """Return whether text files lie beside pictures of the same names."""
    pictures = {file.stem for file in files if file.suffix.lower() in PICTURES}
    return any(file.suffix == ".txt" and file.stem in pictures for file in files)


def _holds_rows(folder: Path) -> bool:
    """Return whether a folder holds label files: by its name, unless it holds JSON or XML instead, or by a file."""
    if folder.name.lower() in ("labels", "obj_train_data"):
        return _has_below(folder, ".txt") or not _has_below(folder, ".json", ".xml")
    texts = [name for name in os.listdir(folder) if name.endswith(".txt")] if folder.name.lower() in ANNOTATIONS else []
    return any(sniff(folder / name) == "yolo" for name in texts[:LOOKED_AT])


def _has_below(folder: Path, *suffixes: str) -> bool:
    return any(name.lower().endswith(suffixes) for _, _, names in os.walk(folder) for name in names)


def _json_in(listed: Listing) -> list[tuple[str, Source]]:
    """Find JSON and CSV files of COCO and VIA, here or in `annotations`, and folders of LabelMe's files."""
    for home in (listed, *_annotations_in(listed)):
        files = [file for file in home.files if file.suffix.lower() in (".json", ".csv")]
        kinds = {file: sniff(file) for file in files[:LOOKED_AT]}
        labelme = [("", Source("labelme", home.home))] if "labelme" in kinds.values() else []
        read = [file for file, kind in kinds.items() if kind in ("coco", "via")]
        main = [file for file in read if file.name.startswith("instances")]  # beside COCO's captions and keypoints
        if labelme or read:
            return [*labelme, *((set_of(file.stem) or "", Source(str(kinds[file]), file)) for file in main or read)]
    return []


def _xml_in(listed: Listing) -> list[tuple[str, Source]]:
    """Find CVAT's XML file, and VOC's files here, in or below `Annotations`, or in the folders of a devkit."""
    for home in (listed, *_annotations_in(listed, (*ANNOTATIONS, "labels"))):
        files = [file for file in home.files if file.suffix.lower() == ".xml"]
        if not files and home is not listed:
            files = [home.home / name for name in files_below(home.home, (".xml",))]
        kinds = {file: sniff(file) for file in files[:LOOKED_AT]}
        if "voc" in kinds.values():
            return [(name, Source("voc", listed.home, None, name)) for name in voc_sets(listed.home)]
        if cvat := [file for file, kind in kinds.items() if kind == "cvat"]:
            return [pair for file in cvat for pair in _cvat_in(file)]
    if any((folder / MAIN).is_dir() for folder in listed.folders):
        return [(name, Source("voc", listed.home, None, name)) for name in voc_sets(listed.home)]
    return []


def _cvat_in(file: Path) -> list[tuple[str, Source]]:
    """Return the sets that a project's file has as subsets, or the set that a file is."""
    try:
        subsets = cvat_sets(file)
    except Fault:  # the reader will say it with the place
        subsets = []
    alone = [(set_of(file.stem) or "", Source("cvat", file))]
    return [(name, Source("cvat", file, None, name)) for name in subsets] or alone


def _annotations_in(listed: Listing, names: Sequence[str] = ("annotations", "labels")) -> list[Listing]:
    folders = [folder for folder in listed.folders if folder.name.lower() in names]
    return [_list(folder) for folder in folders if folder.name.lower() != "labels" or not _holds_rows(folder)]


def _list(folder: Path) -> Listing:
    """List a folder by name, without hidden entries.  Raises OSError."""
    with os.scandir(folder) as entries:
        visible = sorted(
            (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith((".", "__MACOSX"))
        )
    files = [folder / name for name, is_folder in visible if not is_folder]
    return Listing(folder, files, [folder / name for name, is_folder in visible if is_folder])


def _readable(folders: Sequence[Path]) -> list[Path]:
    return [folder for folder in folders[:LOOKED_AT] if os.access(folder, os.R_OK | os.X_OK)]


def _what_is_there(root: Path) -> str:
    """Say in a few words what a folder holds instead of a data set: the first known format, here or two levels down."""
    level = [listed := _list(root)]
    for _ in range(3):
        for file in [file for home in level for file in home.files[:LOOKED_AT]]:
            if file.suffix.lower() not in PICTURES and (named := name_format(file)):
                return f"{file.relative_to(root)}: {named}"
        level = [_list(folder) for home in level for folder in _readable(home.folders)][:LOOKED_AT]
    names = [entry.name for entry in (*listed.folders, *listed.files)]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"holds {shown}" if names else "is empty"
