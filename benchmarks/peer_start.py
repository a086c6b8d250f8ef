"""gndet's reader for a harness that times toolkits opening an annotation file: load(path).

The first time: the file is read, checked and packed, and kept in a cache that is thrown away.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from gndet.config.schema import DataConfig
from gndet.data.datasets.coco import inspect_file
from gndet.data.records import Dataset


def load(path: str) -> Dataset:
    """The data set of a file."""
    with TemporaryDirectory() as cache:
        return inspect_file(Path(path), None, DataConfig(cache=cache))
