"""Hold a data set in a few large arrays, and make records on access.

As Python objects, 860,000 annotations take gigabytes, and every loader process that touches them copies them; arrays
are shared, and may be mapped from a file.  Ragged values are stored end to end: item i is
values[first[i]:first[i + 1]].  Letters: N images, n objects, P polygons.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.data.datasets.columns import Columns
from gndet.data.datasets.images import Reading, read_image
from gndet.data.datasets.masks import offsets
from gndet.data.records import Record


class Image(NamedTuple):
    """An image that is kept."""

    image_id: int
    file_name: str  # as in the annotation file
    path: str  # below the image folder, as on disk
    size: tuple[int, int]
    length: int  # of the file, in bytes; 0 without an image folder


class Packed(NamedTuple):
    """The arrays of a data set."""

    image_ids: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N, 2) int64 height, width
    names: np.ndarray  # UTF-8, end to end
    names_first: np.ndarray  # (N + 1,) int64
    paths: np.ndarray
    paths_first: np.ndarray
    lengths: np.ndarray  # (N,) int64 bytes of the picture files
    objects_first: np.ndarray  # (N + 1,) into the n objects
    boxes: np.ndarray  # (n, 4) float64 xyxy
    labels: np.ndarray  # (n,) int64
    crowd: np.ndarray  # (n,) bool
    area: np.ndarray  # (n,) float64
    annotation_ids: np.ndarray  # (n,) int64
    masks_at: np.ndarray  # (n,) int64: index of each object's mask in the n of `masks.Masks`, which follow
    polygons_first: np.ndarray  # (n + 1,) into the P polygons
    points_first: np.ndarray  # (P + 1,) into points
    points: np.ndarray
    rles_first: np.ndarray  # (n + 1,) into rles
    rles: np.ndarray  # their counts


def pack(images: Sequence[Image], objects: Columns, category_ids: Sequence[int]) -> Packed:
    """Put images and their objects into arrays, in the order of the images, then of the annotations.

    category_ids: ascending; a label is an index into them.  Annotations of other images are left out; masks stay in the
    order of the file.
    """
    image_ids = np.array([image.image_id for image in images], dtype=np.int64)
    ascending = np.argsort(image_ids)
    order = np.argsort(objects.image_ids, kind="stable")  # finding sorted ids takes a tenth of the time
    order = order[np.isin(objects.image_ids[order], image_ids)]
    place = ascending[np.searchsorted(image_ids, objects.image_ids[order], sorter=ascending)]
    in_order = np.argsort(place, kind="stable")
    order, place = order[in_order], place[in_order]
    names, names_first = _end_to_end(image.file_name for image in images)
    paths, paths_first = _end_to_end(image.path for image in images)
    masks = objects.masks
    return Packed(
        image_ids=image_ids, sizes=np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2),
        names=names, names_first=names_first, paths=paths, paths_first=paths_first,
        lengths=np.array([image.length for image in images], dtype=np.int64),
        objects_first=np.searchsorted(place, np.arange(len(images) + 1)),
        boxes=objects.boxes[order],
        labels=np.searchsorted(np.array(category_ids, dtype=np.int64), objects.category_ids[order]),
        crowd=objects.crowd[order], area=objects.area[order], annotation_ids=objects.annotation_ids[order],
        masks_at=order,
        polygons_first=offsets(masks.num_polygons), points_first=offsets(masks.num_numbers), points=masks.points,
        rles_first=offsets(masks.num_letters), rles=masks.texts,
    )  # fmt: skip


def _end_to_end(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Join texts.  Returns them as UTF-8, and where each begins and the last ends."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.frombuffer(b"".join(parts), dtype=np.uint8), offsets(np.array(list(map(len, parts)), dtype=np.int64))


@dataclass(eq=False)
class PackedRecords(Sequence[Record]):
    """The records of packed images, made on each access."""

    packed: Packed
    folder: Path  # of the pictures
    reading: Reading  # of the pictures
    places: Sequence[int]  # indices among the N of the images that are used
    again: functools.partial[Packed] | None = None  # maps the arrays in another process that receives these records
    digests: np.ndarray | None = None  # (N,) uint64, of the bytes of the pictures, 0 if unknown
    labels: np.ndarray | None = None  # the new label of each packed label, see `relabeled`

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        packed, place = self.packed, self.places[index]
        first, end = int(packed.objects_first[place]), int(packed.objects_first[place + 1])
        height, width = packed.sizes[place].tolist()
        columns = (packed.boxes, packed.labels, packed.crowd, packed.area, packed.annotation_ids)
        boxes, labels, crowd, area, ids = (np.array(values[first:end]) for values in columns)  # may be written to
        record = Record(
            int(packed.image_ids[place]),
            _text(packed.names, packed.names_first, place),
            (height, width),
            functools.partial(read_image, self.path(index), (height, width), self.reading),
            boxes,
            labels,
            crowd,
            area,
            ids,
            PackedMasks(packed, range(first, end), (height, width)),
        )
        return record if self.labels is None else relabeled(record, self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"packed": self.again or functools.partial(Packed, *self.packed), "digests": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, packed=state["packed"]())

    def path(self, index: int) -> Path:
        """Return the picture file of a record."""
        place = self.places[index]
        return self.folder / _text(self.packed.paths, self.packed.paths_first, place)

    def note_digests(self, digests: dict[int, int]) -> None:
        """Store {index: digest of the picture's bytes}, found by decoding."""
        self.digests = np.zeros(len(self.packed.image_ids), dtype=np.uint64)
        for index, digest in digests.items():
            self.digests[self.places[index]] = digest

    def files(self) -> Iterator[tuple[int, str, str, int]]:
        """Yield each image's id, file_name, path below the folder and digest (0: unknown), without making records."""
        for place in self.places:
            name = _text(self.packed.names, self.packed.names_first, place)
            path = _text(self.packed.paths, self.packed.paths_first, place)
            yield int(self.packed.image_ids[place]), name, path, 0 if self.digests is None else int(self.digests[place])


def relabeled(record: Record, labels: np.ndarray) -> Record:
    """Give each object of label i the label labels[i]; drop those that get -1."""
    new = labels[record.labels]  # (n,)
    keep = new >= 0
    return record._replace(
        boxes=record.boxes[keep],
        labels=new[keep],
        crowd=record.crowd[keep],
        area=record.area[keep],
        annotation_ids=record.annotation_ids[keep],
        segmentations=[record.segmentations[index] for index in np.flatnonzero(keep).tolist()],
    )


def relabel(records: Sequence[Record], labels: np.ndarray) -> Sequence[Record]:
    """Apply `relabeled` to all records; packed ones stay packed."""
    if not isinstance(records, PackedRecords):
        return [relabeled(record, labels) for record in records]
    before = records.labels
    return replace(records, labels=labels if before is None else np.where(before < 0, -1, labels[before]))


class Counts(NamedTuple):
    """How many objects the N images of a data set have."""

    objects: np.ndarray  # (N,) int64
    trainable: np.ndarray  # (N,) int64: without crowd regions
    sizes: np.ndarray  # (N, 2) int64 height, width


def count_objects(records: Sequence[Record]) -> Counts:
    """Count objects without making packed records, which would take seconds for 118,000 images."""
    if not isinstance(records, PackedRecords):
        rows = [(len(record.labels), np.count_nonzero(~record.crowd), *record.size) for record in records]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return Counts(table[:, 0], table[:, 1], table[:, 2:])
    packed, places = records.packed, np.array(records.places, dtype=np.int64)
    taken = np.ones(len(packed.crowd), dtype=bool) if records.labels is None else records.labels[packed.labels] >= 0
    first, end = packed.objects_first[places], packed.objects_first[places + 1]
    before = [offsets(counted) for counted in (taken, taken & ~packed.crowd)]  # how many precede each object
    objects, trainable = (counts[end] - counts[first] for counts in before)
    return Counts(objects, trainable, packed.sizes[places])


@dataclass(eq=False)
class PackedMasks(Sequence[Any]):
    """The segmentations of an image's objects, made on each access."""

    packed: Packed
    objects: range  # indices of the objects among the n
    size: tuple[int, int]  # height, width of the image

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: Any) -> Any:
        packed, i = self.packed, self.packed.masks_at[self.objects[index]]
        first, end = packed.polygons_first[i], packed.polygons_first[i + 1]
        if first < end:
            bounds = packed.points_first[first : end + 1].tolist()
            return [packed.points[start:stop].tolist() for start, stop in itertools.pairwise(bounds)]
        counts = _text(packed.rles, packed.rles_first, i)
        return {"size": list(self.size), "counts": counts} if counts else None

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a record that is sent to a process takes only its own masks along


def _text(texts: np.ndarray, first: np.ndarray, place: int) -> str:
    return texts[first[place] : first[place + 1]].tobytes().decode("utf-8", "surrogatepass")
