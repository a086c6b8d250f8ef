"""A contact sheet of a data set: images with their boxes, masks and class names, faulty images first."""

import itertools
from collections.abc import Sequence

import numpy as np

from gndet.data.datasets.faults import Fault
from gndet.data.datasets.images import read_image
from gndet.data.datasets.segmentation import printable
from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.evaluation.drawing import captioned, draw_ground_truth, draw_objects, grid, placard, shrunk

IMAGES = 16
COLUMNS = 4
SIDE = 640  # pixels of the longer side of an image
BARE = ("picture-size", "picture-unrotated")  # boxes for another size would be misplaced
INVISIBLE = ("image-empty", "crowd", "number-float", "area-missing", "mask-missing", "picture-mode")


def contact_sheet(datasets: Sequence[tuple[str, Dataset]]) -> np.ndarray | None:
    """Draw up to IMAGES images, equally many of each data set.

    datasets: (name, data set); the name, if any, starts the captions.  Returns (H, W, 3) uint8, or None if there is no
    image.
    """
    pictures = []
    datasets = [(name, dataset) for name, dataset in datasets if len(dataset.records)]
    for name, dataset in datasets:
        for index, codes in choose_images(dataset, IMAGES // len(datasets)).items():
            shown = [*codes[:2], *([f"and {len(codes) - 2} more"] if len(codes) > 2 else [])]
            file_name = printable(dataset.records[index].file_name)
            caption = "  ".join([f"{name} {file_name}".strip(), *(f"[{code}]" for code in shown)])
            pictures.append(captioned(_drawn(dataset, index), caption))
    return grid(pictures, COLUMNS) if pictures else None


def _drawn(dataset: Dataset, index: int) -> np.ndarray:
    """Draw an image with its objects, without them if its picture has another size, or a placard if it has none."""
    record = dataset.records[index]
    try:
        small, scaled = shrunk(record.load(), record, SIDE)
        return draw_ground_truth(small, scaled, [printable(name) for name in dataset.classes])
    except DataError as error:
        if isinstance(error, Fault) and error.code in BARE:
            picture = read_image(dataset.records.path(index))
            return draw_objects(shrunk(picture, record, SIDE)[0], np.zeros((0, 4)), [], [])
        return placard(str(error), SIDE)


def choose_images(dataset: Dataset, num: int) -> dict[int, list[str]]:
    """Choose num images: an image per kind of fault in turn, then evenly spread images.

    Returns {place in dataset.records: codes of the faults it was chosen for}, in the order of the places.
    """
    places = {record.image_id: place for place, record in enumerate(dataset.records)}
    faults = [finding for finding in dataset.findings if finding.code not in INVISIBLE]
    queues = {fault.code: [places[i] for i in fault.image_ids if i in places] for fault in faults}
    taken: dict[int, list[str]] = {}
    for turn in itertools.zip_longest(*queues.values()):
        for code, place in zip(queues, turn, strict=True):
            if place is not None and (len(taken) < num or place in taken):
                codes = taken.setdefault(place, [])
                codes += [] if code in codes else [code]
    count = min(num, len(dataset.records))
    spread = [i * len(dataset.records) // count for i in range(count)]
    for place in [*spread, *range(len(dataset.records))]:
        if len(taken) >= count:
            break
        taken.setdefault(place, [])
    return dict(sorted(taken.items()))
