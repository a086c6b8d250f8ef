"""Take a share of the images of a data set for validation: stratified by class, the same on every machine."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from gndet.data.records import Record

_COPY = re.compile(r"\.rf\.[0-9A-Za-z]{8,}(?=\.|$)")  # Roboflow names the augmented copies of a picture so


def choose_share(records: Sequence[Record], num_classes: int, share: float, seed: int) -> np.ndarray:
    """Choose about a share of N images such that the images of each class are divided by that share, too.

    From the rarest class on, the images of a class that are not yet assigned are divided in a random order (iterative
    stratification: Sechidis et al. 2011, without its order of the remaining folds).  The order is a hash of the seed
    and the file name: neither the order of the images nor the machine matters.  Copies of one picture that Roboflow
    made stay together.  A class with two pictures or more has one on each side, where that can be.
    Returns (N,) bool.
    """
    keys = [_COPY.sub("", record.file_name) for record in records]
    groups = sorted(
        dict.fromkeys(keys), key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()
    )
    place = {key: index for index, key in enumerate(groups)}
    group = np.array([place[key] for key in keys], dtype=np.int64)  # (N,)
    holds = np.zeros((len(groups), num_classes + 1), dtype=bool)  # the last column: groups without an object
    for index, record in zip(group.tolist(), records, strict=True):
        holds[index, record.labels] = True
    holds[:, num_classes] = ~holds[:, :num_classes].any(1)
    side = np.full(len(groups), -1)  # 1: chosen, 0: not, -1: not yet assigned
    for column in holds[:, holds.sum(0).argsort(kind="stable")].T:
        total = int(column.sum())
        wanted = min(max(round(share * total), 1), total - 1)
        free = np.flatnonzero(column & (side < 0))
        missing = max(wanted - int(column[side == 1].sum()), 0)
        side[free[:missing]], side[free[missing:]] = 1, 0
    return side[group] == 1
