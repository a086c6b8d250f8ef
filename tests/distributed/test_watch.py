"""What a rank says of a hang."""

import os
import threading
import time
from pathlib import Path

import pytest

from gndet.distributed import watch as watching
from gndet.distributed.watch import Watch


def test_a_disk_that_hangs_does_not_keep_a_rank_from_saying_so_and_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: answers.wait(60))
    monkeypatch.setattr(watching, "GRACE", 0.2)
    watch, began = Watch(None, rank=0, world=1, timeout_s=1), time.monotonic()
    watch.report = tmp_path / "stalled"
    watch._report("no answer for 6 s")
    assert time.monotonic() - began < 30 and capfd.readouterr().err == "gndet: no answer for 6 s\n"
    answers.set()
