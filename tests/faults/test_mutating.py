"""Run folders with random damage through train, report, evaluate and predict; `--all-faults`: 500 instead of 40."""

from pathlib import Path

import pytest

from faults.launch import cleared
from faults.mutating import Mutations

pytestmark = pytest.mark.faults
FEW, ALL = 40, 500


def test_a_damaged_run_folder_is_used_or_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    count = ALL if request.config.getoption("--all-faults") else FEW
    with cleared(tmp_path):
        mutations = Mutations(tmp_path)
        broken = [line for number in range(count) for line in mutations.try_one(number)]
    with capsys.disabled():
        print(f"\n{count} damaged run folders\n{mutations.table()}")
    assert not broken, "\n".join(broken)
