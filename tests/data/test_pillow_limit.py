"""Pillow's limit is switched off while any thread reads, and then as it was."""

import pytest
from PIL import Image

from gndet.data.datasets.pillow_limit import without_pillow_limit


def test_the_limit_comes_back_when_the_last_reader_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)
    first, second = without_pillow_limit(), without_pillow_limit()  # of two threads, the first to enter leaves first
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 1234
