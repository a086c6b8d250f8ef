"""Record the faults of annotations."""

import numpy as np


class Marks:
    """Record the faults of n annotations.  Refused or dropped annotations are not checked further."""

    def __init__(self, num: int) -> None:
        self.left = np.ones(num, dtype=bool)  # those still being checked
        self.places: dict[str, np.ndarray] = {}  # indices, by code of FAULTS

    def note(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left."""
        self.places[code] = np.flatnonzero(self.left & faulty)

    def drop(self, code: str, faulty: np.ndarray) -> None:
        """Mark those of faulty (n,) bool that are left, and stop checking them."""
        self.note(code, faulty)
        self.left &= ~faulty
