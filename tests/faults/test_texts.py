"""Hostile names of classes, pictures and folders through every verb; `--all-faults`: 4,000 of them instead of 80."""

from pathlib import Path

import pytest

from faults.launch import cleared
from faults.texts import Hostile

pytestmark = pytest.mark.faults
FEW, ALL = (1, 40), (10, 200)  # data sets, and classes and pictures of each


def test_hostile_names_are_shown_written_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    sets, count = ALL if request.config.getoption("--all-faults") else FEW
    broken = []
    with cleared(tmp_path):
        for seed in range(sets):
            (tmp_path / str(seed)).mkdir()
            broken += [f"{seed}: {line}" for line in Hostile(tmp_path / str(seed), seed, count).broken()]
    with capsys.disabled():
        print(f"\n{sets} data sets with {count} hostile classes and {count} hostile pictures each")
    assert not broken, "\n".join(map(ascii, broken))
