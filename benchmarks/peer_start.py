"""gndet's reader for a harness that compares how toolkits open an annotation file: load(path).

As on a first opening, the file is read, checked and packed into a cache, which is deleted.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from gndet.config.data import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.records import Dataset


def load(path: str) -> Dataset:
    """Return the data set of a file."""
    with TemporaryDirectory() as cache:
        return inspect_file(Path(path), None, DataConfig(cache=cache))
