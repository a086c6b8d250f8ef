"""Switch off Pillow's limit of pixels, which is global, also where several threads read pictures."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


class _PillowLimit:
    """Pillow's limit, which is global: switched off while any thread is inside, then as it was before the first."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS
        # a process that is forked meanwhile must not inherit a lock that is held
        os.register_at_fork(
            before=self.lock.acquire, after_in_parent=self.lock.release, after_in_child=self.lock.release
        )

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                Image.MAX_IMAGE_PIXELS = self.before


_LIMIT = _PillowLimit()


@contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Switch off Pillow's limit in favor of max_pixels: it warns from 89 million pixels on, whatever the file.

    Any number of threads may be in this context.
    """
    _LIMIT.enter()
    try:
        yield
    finally:
        _LIMIT.leave()
